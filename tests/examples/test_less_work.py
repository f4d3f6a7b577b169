"""examples/less_work.py over a few real pairs: its runs, and what it counts of them."""

import shutil
import sys

import pytest
from tiny_pretraining import ROOT
from transformers import AutoConfig

sys.path.insert(0, str(ROOT / "examples"))
import less_work  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TINY = {
    "model_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16},
    "batch_size": 8,
    "vocab_size": 300,
}


def test_a_way_reads_the_pairs_of_whole_pictures():
    for way in less_work.WAYS.values():
        runs = list(way.runs(400, peak=1.0))
        assert sum(run["max_steps"] for run in runs) == 400
        if way.image_size is not None:
            assert [run["max_steps"] for run in runs] == [340, 60]
            assert [run["model_config"]["image_size"] for run in runs] == [32, 64]


def test_small_pictures_before_whole_ones_and_fewer_pairs_beside_them(pairs, tmp_path, monkeypatch):
    for name in ("train", "unseen_pairs"):
        shutil.copy(pairs, tmp_path / f"{name}.parquet")
    monkeypatch.setattr(less_work, "SMALL", TINY)
    given = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--steps", "4", "--repeats", "1"]
    less_work.main([*given, "--ways", "half of the side", "--lengths", "0.5"])
    table = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [line[0] for line in cells] == ["half of the side", "whole, 0.5 of the pairs"]
    assert cells[-1][2] == "50 %"

    # the last part of small pictures sees whole ones, and nothing is trained twice
    (last,) = (tmp_path / "out").glob("half_of_the_side_4_part1/seed0/model")
    config = AutoConfig.from_pretrained(last)
    assert (config.image_size, config.position_image_size) == (64, 32)
    monkeypatch.setattr(less_work, "trained", None)
    runs = less_work.Runs(less_work.options(given))
    assert 0 <= runs.recall("half of the side", less_work.WAYS["half of the side"], 4, 0)["tr_r@10"] <= 1

    # results of another model are not taken over
    with pytest.raises(SystemExit, match="results of other data or another size"):
        less_work.Runs(less_work.options([*given, "--full_size"]))
