"""Two-stage retrieval against a loop over single pairs that ranks as ALBEF's evaluation does."""

import pyarrow.parquet as pq
import pytest
import torch
from tiny_simla import randomised
from torch.nn import functional as F

from oner import SimlaConfig, VisionLanguageImageProcessor, VisionLanguageProcessor, train_tokenizer
from oner.modeling.modeling_simla import SimlaForImageTextRetrieval
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import RetrievalEvaluator

ROWS = 14
WEIGHT = 20.0  # a random head has little to say beside a random cosine


@pytest.fixture(scope="module")
def rows(emoji_folder):
    """Real pictures; three captions each, of which the last is another picture's too."""
    table = pq.read_table(emoji_folder / "test_style.parquet").slice(0, ROWS)
    pictures = [cell["bytes"] for cell in table["image"].to_pylist()]
    texts = [captions[0] for captions in table["captions"].to_pylist()]
    return [
        {"image": picture, "captions": [text, f"{text} again", texts[number // 2]], "id": number}
        for number, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def processor(rows):
    tokenizer = train_tokenizer((text for row in rows for text in row["captions"]), vocab_size=200, max_text_length=12)
    image_processor = VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=4)
    return VisionLanguageProcessor(image_processor, tokenizer, max_text_length=12, joint_layout=False)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = SimlaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_text_layers=2,
        image_size=16, patch_size=4, max_text_length=12, max_position_embeddings=32, projection_dim=8,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id, image_token_id=tokenizer.image_token_id,
        cls_token_id=tokenizer.cls_token_id, sep_token_id=None, mask_token_id=tokenizer.mask_token_id,
    )  # fmt: skip
    return randomised(SimlaForImageTextRetrieval(config))


@torch.no_grad()
def by_hand(model, processor, rows, k, ks, score="logit"):
    """Recall of both directions and both stages, a pair at a time; the sort keeps equal ones in their order."""
    model.eval()
    owners = [number for number, row in enumerate(rows) for _ in row["captions"]]
    texts = [text for row in rows for text in row["captions"]]
    images = torch.cat([model.get_image_features(**processor(images=row["image"])).pooler_output for row in rows])
    words = torch.cat([model.get_text_features(**processor(text=[text])).pooler_output for text in texts])
    cosines = (F.normalize(images, dim=-1) @ F.normalize(words, dim=-1).T).tolist()
    logits = [[model.match(**processor(images=row["image"], text=text))[0].tolist() for text in texts] for row in rows]
    tau = float(model.temperature)
    opinion = {
        "logit": lambda cosine, no, yes: yes,
        "difference": lambda cosine, no, yes: yes - no,
        "sum": lambda cosine, no, yes: cosine / tau + WEIGHT * (yes - no),
    }[score]
    logits = [
        [opinion(cosine, *both) for cosine, both in zip(*lines, strict=True)]
        for lines in zip(cosines, logits, strict=True)
    ]

    def ranks(first, second, right):
        """For each query: the rank of its best right answer by the first stage, and after the second."""
        before, after = [], []
        for number, (cosine, logit) in enumerate(zip(first, second, strict=True)):
            order = sorted(range(len(cosine)), key=lambda item: -cosine[item])
            best = sorted(order[:k], key=lambda item: -logit[item])
            before.append(min(order.index(item) for item in right(number)))
            after.append(min((best + order[k:]).index(item) for item in right(number)))
        return before, after

    def turned(scores):
        return [list(column) for column in zip(*scores, strict=True)]

    sides = {
        "tr": ranks(cosines, logits, lambda image: [t for t, owner in enumerate(owners) if owner == image]),
        "ir": ranks(turned(cosines), turned(logits), lambda text: [owners[text]]),
    }
    values = {}
    for direction, (before, after) in sides.items():
        for at in ks:
            values[f"eval/{direction}_r@{at}"] = sum(rank < at for rank in before) / len(before)
            values[f"eval/rerank_{direction}_r@{at}"] = sum(rank < at for rank in after) / len(after)
        values[f"eval/rerank_{direction}_reach"] = sum(rank < k for rank in before) / len(before)
    recalls = [value for name, value in values.items() if "rerank" in name and "@" in name]
    values["eval/rerank_r_mean"] = sum(recalls) / len(recalls)
    return values


@pytest.mark.parametrize(
    ("k", "score"), [(1, "logit"), (5, "logit"), (100, "logit"), (5, "difference"), (100, "difference"), (8, "sum")]
)
def test_both_stages_are_those_of_a_loop_over_pairs(model, processor, rows, k, score):
    # captions that occur once, since a loop cannot rank equal ones
    once = [{**row, "captions": row["captions"][:2]} for row in rows]
    expected = by_hand(model, processor, once, k, (1, 3, 5), score)
    evaluator = RerankingEvaluator(
        once, batch_size=5, ks=(1, 3, 5), progress=False, chunk_size=4, rerank_k=k, image_batch_size=3,
        pair_batch_size=7, rerank_score=score, rerank_weight=WEIGHT,
    )  # fmt: skip
    values = dict(evaluator.run(model, processor))
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert evaluator.protocol["rerank_k"] == k and evaluator.protocol["pictures"] == ROWS
    if k > 1:  # the test would be idle if the second stage changed nothing
        assert any(
            expected[f"eval/rerank_{one}_r@{at}"] != expected[f"eval/{one}_r@{at}"]
            for one in ("tr", "ir")
            for at in (1, 3, 5)
        )
    if k == 1:
        assert values["eval/rerank_r_mean"] == values["eval/r_mean"]  # one candidate can only stay where it is


def test_the_first_stage_is_that_of_the_retrieval_evaluator(model, processor, rows):
    first = dict(RetrievalEvaluator(rows, progress=False).run(model, processor))
    both = dict(RerankingEvaluator(rows, progress=False, rerank_k=3).run(model, processor))
    assert {name: both[name] for name in first} == first


def test_pieces_do_not_change_the_numbers(model, processor, rows):
    whole = dict(RerankingEvaluator(rows, progress=False, rerank_k=6).run(model, processor))
    pieces = RerankingEvaluator(
        rows, progress=False, rerank_k=6, chunk_size=3, image_batch_size=1, pair_batch_size=2
    ).run(model, processor)
    assert dict(pieces) == pytest.approx(whole, abs=1e-6)


def test_pairs_are_matched_once(model, processor, rows, monkeypatch):
    evaluator = RerankingEvaluator(rows, progress=False, rerank_k=1000)
    counted = []
    match = type(model).match

    def counting(self, *args, **kwargs):
        told = match(self, *args, **kwargs)
        counted.append(len(told))
        return told

    monkeypatch.setattr(type(model), "match", counting)
    dict(evaluator.run(model, processor))
    assert sum(counted) == ROWS * len({text for row in rows for text in row["captions"]})


def test_equal_captions_tie_after_reranking(model, processor, rows):
    """A caption that k pictures share, alone: which of them comes first is chance, whatever order they stand in."""
    same = [{**row, "captions": ["the very same"]} for row in rows]
    values = dict(RerankingEvaluator(same, ks=(1,), progress=False, rerank_k=50).run(model, processor))
    assert values["eval/rerank_tr_r@1"] == pytest.approx(1 / ROWS)


def test_a_model_must_be_able_to_match(model, processor, rows):
    class Mute:
        pass

    with pytest.raises(ValueError, match="Mute cannot re-rank"):
        next(RerankingEvaluator(rows, progress=False).run(Mute(), processor))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RerankingEvaluator(rows, rerank_k=0)
    with pytest.raises(ValueError, match="rerank_score must be one of .* got 'logits'"):
        RerankingEvaluator(rows, rerank_score="logits")


def test_a_logit_that_is_no_number_is_an_error(model, processor, rows, monkeypatch):
    monkeypatch.setattr(type(model), "match", lambda self, input_ids, **_: torch.full((len(input_ids), 2), torch.nan))
    with pytest.raises(ValueError, match="matching logits are not finite"):
        dict(RerankingEvaluator(rows, progress=False, rerank_k=2).run(model, processor))
