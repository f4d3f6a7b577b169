"""examples/benchmark_growth.py and benchmark_embedding.py: what a point is, and pages that say what was measured."""

import json
import sys

import pytest
import torch
from tiny_pretraining import ROOT

sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="module")
def growth():
    import benchmark_growth

    return benchmark_growth


@pytest.fixture(scope="module")
def embedding():
    pytest.importorskip("onnxruntime")
    import benchmark_embedding

    return benchmark_embedding


@pytest.mark.parametrize("name", ["growth", "embedding"])
def test_the_page_says_what_was_measured(request, name):
    script = request.getfixturevalue(name)
    figures = json.loads(script.FIGURES.read_text(encoding="utf-8"))
    begin, end = script.MARKS
    table = script.PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert table == script.markdown(figures)


def test_a_point_is_the_median_time(growth):
    waits = iter([10**5, 3 * 10**6, 10**5])
    quick = growth.cost(lambda: sum(range(next(waits))), repeats=3)
    slow = growth.cost(lambda: sum(range(3 * 10**6)))
    assert 0 < quick.seconds < slow.seconds


def test_pairs_of_a_step_pass_in_pieces_and_rows_are_read(growth):
    with torch.random.fork_rng():
        assert growth.step(pairs=2, words=3).seconds > 0
    assert growth.table(20).seconds > 0
    assert growth.shards(20).seconds > 0
    assert growth.recall(300).seconds > 0


def test_time_by_each_is_of_the_size(growth, tmp_path):
    machine = {"processor": "P", "cores": 2, "versions": {"torch": "2"}}
    figures = {"machine": machine, "curves": {"order": {"1000": [0.002, 1.0], "2000": [0.004, 2.0]}}}
    assert "| rows: order of an epoch | 2,000 | 0.004 | 2 µs a row | 2 |" in growth.markdown(figures)
    growth.picture(figures, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_captions_are_padded_as_each_library_pads(embedding):
    tokenizer = embedding.AutoTokenizer.from_pretrained(embedding.TOKENIZER)
    made = embedding.captions_padded(tokenizer, rows=12, size=4)
    lengths = {name: [batch["input_ids"].shape[1] for batch in batches] for name, batches in made.items()}
    real = {name: sum(int(batch["attention_mask"].sum()) for batch in batches) for name, batches in made.items()}
    assert lengths["77"] == [77, 77, 77] and len(set(real.values())) == 1
    assert sum(lengths["sorted"]) <= sum(lengths["longest"]) < 77


def test_rates_are_over_clip_or_over_32_bits(embedding):
    machine = {"processor": "P", "cores": 2, "versions": {"torch": "2", "transformers": "5"}}
    seconds = {"pictures": {"OneR": 2.0, "CLIP": 3.0}, "graphs": {"fp32": 4.0, "int8": 1.0}}
    page = embedding.markdown({"machine": machine, "seconds": seconds})
    assert "| pictures | OneR | 2.000 | 1.50 |" in page and "| graphs | int8 | 1.000 | 4.00 |" in page
