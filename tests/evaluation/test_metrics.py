"""Metrics against a naive oracle in numpy loops, closed forms, and `evaluate` modules loaded from their files."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from oner.training.evaluation import metric_retrieval_recall, metric_zero_shot_accuracy
from oner.training.evaluation.metrics import (
    area_under_curve,
    centroid_distance,
    chance_recall,
    chunked_standing,
    match_ids,
    mcnemar,
    ranks,
    recall,
    recall_at_k,
    standing,
    top_k_accuracy,
)

KS = (1, 5, 10)


@pytest.fixture
def fixture() -> dict:
    """23 pictures with one to five captions each, and distinct scores that favour the right pairs a little."""
    rng = np.random.default_rng(7)
    owners = np.repeat(np.arange(23), rng.integers(1, 6, 23))
    scores = rng.normal(size=(len(owners), 23))
    scores[np.arange(len(owners)), owners] += 1.0
    return {"scores": scores, "owners": owners}


def oracle_share_with_any_positive(scores: np.ndarray, positive: np.ndarray, k: int) -> float:
    """CLIP_benchmark's definition, by hand: sort, look at the first k, count a query that meets a positive."""
    found = 0
    for row, right in zip(scores, positive, strict=True):
        first = sorted(range(len(row)), key=lambda item: -row[item])[:k]
        found += any(right[item] for item in first)
    return found / len(scores)


@pytest.mark.parametrize("k", [1, 3, 5, 10, 23])
def test_recall_is_clip_benchmarks(fixture, k):
    scores, owners = fixture["scores"], fixture["owners"]
    positive = owners[:, None] == np.arange(23)[None]
    of_captions = (torch.from_numpy(owners), torch.arange(23))
    image_recall = recall_at_k(torch.from_numpy(scores), of_captions, [k])[k]
    text_recall = recall_at_k(torch.from_numpy(scores.T), of_captions[::-1], [k])[k]
    assert image_recall == pytest.approx(oracle_share_with_any_positive(scores, positive, k), abs=1e-12)
    assert text_recall == pytest.approx(oracle_share_with_any_positive(scores.T, positive.T, k), abs=1e-12)
    assert 0 < image_recall < 1 or k == 23


# Recorded: plain loops over the definition in LAION-AI/CLIP_benchmark, clip_benchmark/metrics/zeroshot_retrieval.py
# at 082089f (a query counts 1 if at least one positive is among its first k), checked by hand. Nothing ties.
RECORDED_SCORES = [  # 7 captions of 4 pictures
    [0.90, 0.10, 0.30, 0.20],
    [0.15, 0.60, 0.85, 0.25],
    [0.40, 0.55, 0.20, 0.70],
    [0.35, 0.95, 0.05, 0.45],
    [0.80, 0.65, 0.50, 0.75],
    [0.30, 0.50, 0.42, 0.08],
    [0.22, 0.33, 0.11, 0.44],
]
RECORDED_OWNERS = [0, 0, 0, 1, 2, 2, 3]
RECORDED = {"image": {1: 3 / 7, 2: 4 / 7, 3: 5 / 7, 4: 1.0}, "text": {1: 2 / 4, 2: 3 / 4, 3: 3 / 4, 4: 1.0}}


def test_recall_equals_recorded_numbers_of_clip_benchmarks_definition():
    scores, owners = torch.tensor(RECORDED_SCORES), torch.tensor(RECORDED_OWNERS)
    assert recall_at_k(scores, (owners, torch.arange(4)), [1, 2, 3, 4]) == pytest.approx(RECORDED["image"])
    assert recall_at_k(scores.T, (torch.arange(4), owners), [1, 2, 3, 4]) == pytest.approx(RECORDED["text"])


def test_ranks_are_albefs_best_rank_over_the_captions_of_a_picture(fixture):
    scores, owners = fixture["scores"].T, fixture["owners"]
    expected = []
    for picture, row in enumerate(scores):
        order = np.argsort(-row)
        expected.append(min(int(np.where(order == caption)[0][0]) for caption in np.where(owners == picture)[0]))
    where = standing(torch.from_numpy(scores), (torch.arange(23), torch.from_numpy(owners)))
    assert ranks(where).tolist() == expected
    assert recall(where, [5])[5] == pytest.approx(np.mean(np.array(expected) < 5))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_count_as_the_mean_over_all_orders(k):
    scores, right = [3.0, 2.0, 2.0, 2.0, 2.0, 1.0], {1, 3}  # two positives among four tied items below one
    hits, places = [], []
    for order in itertools.permutations(range(6)):
        ranked = sorted(order, key=lambda item: -scores[item])
        place = min(ranked.index(item) for item in right)
        hits.append(place < k)
        places.append(place)
    positives = torch.tensor([[item in right for item in range(6)]])
    where = standing(torch.tensor([scores]), positives)
    assert recall(where, [k])[k] == pytest.approx(np.mean(hits))
    assert ranks(where).item() == pytest.approx(np.mean(places))


def test_constant_scores_give_chance():
    ids = torch.arange(40).repeat_interleave(3)
    captions = recall_at_k(torch.zeros(40, 120), (torch.arange(40), ids), KS)
    for k in KS:
        assert captions[k] == pytest.approx(1 - math.comb(117, k) / math.comb(120, k))
    assert recall_at_k(torch.ones(120, 40), (ids, torch.arange(40)), [10])[10] == pytest.approx(10 / 40)
    assert top_k_accuracy(torch.zeros(6, 5), torch.zeros(6, dtype=torch.long), [1, 5]) == pytest.approx({1: 0.2, 5: 1})


def test_chance_agrees_with_random_scores():
    torch.manual_seed(0)
    pair = (torch.arange(4000) % 20, torch.arange(60) % 20)
    where = standing(torch.rand(4000, 60), pair)
    for k, value in chance_recall(where, KS).items():
        assert recall(where, KS)[k] == pytest.approx(value, abs=0.03)


@pytest.mark.parametrize("chunk_size, block_size", [(1, 1), (7, 9), (64, 13), (1000, 69), (50, 70), (1000, 1000)])
@pytest.mark.parametrize("excluding", [False, True])
def test_chunks_and_blocks_change_nothing(chunk_size, block_size, excluding):
    """Against the whole matrix in fp64, of vectors of few values, so that many scores are exactly equal."""
    torch.manual_seed(1)
    queries, gallery = torch.randint(-2, 3, (50, 4)).float(), torch.randint(-2, 3, (70, 4)).float()
    pair = (torch.arange(50) % 25, torch.randperm(70) % 25)
    keys = (torch.arange(50), torch.randint(0, 90, (70,))) if excluding else (None, None)
    scores = queries.double() @ gallery.double().T
    whole = standing(scores, pair, match_ids(*keys) if excluding else None)
    assert whole.tied.max() > whole.tied_positives.max() > 1
    sizes = {"chunk_size": chunk_size, "block_size": block_size}
    for one, other in zip(whole, chunked_standing(queries, gallery, *pair, *keys, **sizes), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [5, 64, 200])
def test_copies_of_a_vector_tie_in_any_block(width):
    """A product must not depend on the place of its column, or copies in a short last block would not tie."""
    torch.manual_seed(2)
    once = torch.nn.functional.normalize(torch.randn(40, width), dim=-1)
    places = torch.randint(0, 40, (3000,))
    where = chunked_standing(once, once[places], torch.arange(40), places, chunk_size=17, block_size=512)
    copies = torch.bincount(places, minlength=40)
    assert torch.equal(where.tied, copies) and torch.equal(where.tied_positives, copies)
    assert where.above.max() == 0 and torch.equal(where.positives, copies)


def test_an_excluded_item_is_neither_found_nor_counted():
    embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
    ids, keys = torch.tensor([0, 0, 1]), torch.arange(3)
    where = chunked_standing(embeddings[:2], embeddings, ids[:2], ids, keys[:2], keys, chunk_size=1)
    assert where.candidates.tolist() == [2, 2] and where.positives.tolist() == [1, 1]
    assert recall(where, [1])[1] == 1.0 and chance_recall(where, [1])[1] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_held_in_16_bits_are_compared_in_fp32(dtype):
    torch.manual_seed(3)
    queries, gallery = torch.randn(40, 16).to(dtype), torch.randn(90, 16).to(dtype)
    pair = (torch.arange(40) % 30, torch.arange(90) % 30)
    whole = standing(queries.double() @ gallery.double().T, pair)
    assert whole.tied.max() == 1  # products rounded to 16 bits would tie
    for one, other in zip(whole, chunked_standing(queries, gallery, *pair, chunk_size=9, block_size=20), strict=True):
        assert torch.equal(one, other)


def test_chunks_name_bad_input():
    one, ids = torch.ones(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match=r"1 of 2 queries from query 2 on \(of 4\) have no .* query 3"):
        chunked_standing(torch.ones(4, 2), one, torch.tensor([0, 1, 2, 5]), ids, chunk_size=2)
    with pytest.raises(ValueError, match="1 of 3 gallery items have NaN or infinite embeddings"):
        chunked_standing(one, torch.tensor([[1.0, 1], [math.inf, 0], [0, 1]]), ids, ids)
    with pytest.raises(ValueError, match="numbers up to 1e\\+20 and 1e\\+20 would overflow"):
        chunked_standing(one * 1e20, one * 1e20, ids, ids)
    with pytest.raises(ValueError, match="got 2 ids for 3 queries"):
        chunked_standing(one, one, ids[:2], ids)
    with pytest.raises(ValueError, match="must be at least 1, got 1 and 0"):
        chunked_standing(one, one, ids, ids, chunk_size=1, block_size=0)
    with pytest.raises(ValueError, match="got 0 and 3"):
        chunked_standing(one[:0], one, ids[:0], ids)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 of 3 queries have no positive, the first is query 1"):
        standing(torch.rand(3, 4), (torch.tensor([0, 9, 8]), torch.arange(4)))
    with pytest.raises(ValueError, match="NaN in 1 of 2"):
        standing(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.eye(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool of the scores' shape \(2, 2\)"):
        standing(torch.rand(2, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3, got 0\.\.4"):
        top_k_accuracy(torch.rand(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="ks must be whole numbers"):
        recall_at_k(torch.rand(2, 2), torch.eye(2, dtype=torch.bool), [0])


def test_centroid_distance_in_closed_form():
    assert centroid_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])) == pytest.approx(math.sqrt(2))
    spread = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # centroid (.5, .5)
    assert centroid_distance(spread, torch.tensor([[-2.0, 0.0]])) == pytest.approx(math.hypot(1.5, 0.5))
    assert centroid_distance(spread, spread.flip(0)) == 0
    with pytest.raises(ValueError, match=r"got \(0, 2\)"):
        centroid_distance(torch.empty(0, 2), spread)


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_evaluate_modules_equal_the_functions(fixture, keep_in_memory, tmp_path):
    how = {"keep_in_memory": keep_in_memory, "cache_dir": str(tmp_path)}
    scores, owners = torch.from_numpy(fixture["scores"]), torch.from_numpy(fixture["owners"])
    metric = metric_retrieval_recall.RetrievalRecall(**how)
    for start in range(0, len(owners), 20):
        chunk = slice(start, start + 20)
        columns = owners[chunk] if start else owners[chunk, None]  # a list for each query, or its only column
        metric.add_batch(predictions=scores[chunk], references=columns.tolist())
    result = metric.compute(ks=[1, 5])
    expected = recall_at_k(scores, (owners, torch.arange(23)), [1, 5])
    assert [result["recall@1"], result["recall@5"]] == pytest.approx(list(expected.values()))
    assert result["queries"] == len(owners) and result["chance@5"] == pytest.approx(5 / 23)
    metric = metric_zero_shot_accuracy.ZeroShotAccuracy(**how)
    result = metric.compute(predictions=scores, references=owners, ks=[1, 5])
    assert [result["top1"], result["top5"]] == pytest.approx(list(expected.values()))
    metric.add(prediction=[0.1, 0.9], reference=1)  # and again, one at a time
    assert metric.compute(ks=[1])["top1"] == 1.0


OFFLINE = """
import json, socket
def refuse(*args, **kwargs):
    raise AssertionError(f"tried the network: {args}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from oner.training.evaluation import metric_retrieval_recall as r
from oner.training.evaluation import metric_zero_shot_accuracy as z
import evaluate
scores = [[.9, .1], [.8, .2]]
one = evaluate.load(r.__file__, keep_in_memory=True).compute(predictions=scores, references=[[0], [1]], ks=[1])
two = evaluate.load(z.__file__, keep_in_memory=True).compute(predictions=scores, references=[0, 1], ks=[1])
print(json.dumps([one["recall@1"], one["median_rank"], two["top1"]]))
"""


def test_evaluate_loads_the_modules_offline_beside_a_script_of_its_name(tmp_path):
    script = tmp_path / "evaluate.py"  # hides the package from a plain import, as examples/evaluate.py does
    script.write_text(OFFLINE)
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [0.5, 1.5, 0.5]


def test_evaluate_modules_name_what_is_wrong():
    metric = metric_retrieval_recall.RetrievalRecall(keep_in_memory=True)
    with pytest.raises(ValueError, match="got 2 queries, 1 lists"):
        metric.add_batch(predictions=torch.rand(2, 3), references=[[0]])
    with pytest.raises(ValueError, match=r"must be in 0\.\.2, got \[3\]"):
        metric.add_batch(predictions=torch.rand(1, 3), references=[[3]])


@pytest.mark.slow
def test_a_million_queries_are_ranked_in_a_million_items_within_two_gib(root):
    """All embeddings are held; 2,048 queries are ranked, since memory does not grow with them."""
    command = [sys.executable, str(root / "tests" / "reliability" / "ranks.py"), "--ranked", "2048"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert figures["queries"] == figures["gallery"] == 1_000_000 and 0.5 < figures["recall@1"] < 1
    assert figures["peak_MiB"] < 2048 and figures["peak_MiB"] - figures["MiB_before"] < 256


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (7, 0), (3, 12), (40, 25), (900, 700)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    both = torch.tensor([True] * 5 + [False] * 4)
    before = torch.cat([both, torch.zeros(gained, dtype=torch.bool), torch.ones(lost, dtype=torch.bool)])
    after = torch.cat([both, torch.ones(gained, dtype=torch.bool), torch.zeros(lost, dtype=torch.bool)])
    changed = mcnemar(before, after)
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert changed == (gained, lost, pytest.approx(expected, rel=1e-9))
    with pytest.raises(ValueError, match="twice, got"):
        mcnemar(before, after[:-1])


def test_area_under_curve_counts_pairs_and_half_of_ties():
    torch.manual_seed(0)
    positives, negatives = torch.randint(0, 6, (40,)).float(), torch.randint(-2, 5, (60,)).float()
    pairs = [(one > other) + (one == other) / 2 for one in positives.tolist() for other in negatives.tolist()]
    assert area_under_curve(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="on both sides"):
        area_under_curve(positives, negatives[:0])
