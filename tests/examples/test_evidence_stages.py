"""The evidence of MoMo's stages: what begins with what, in which order, what is measured, and the text of its page."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oner import open_rows
from oner.training.run.parsing import parse_arguments


@pytest.fixture(scope="module", autouse=True)
def examples_on_path(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root / "examples"))
    yield
    sys.path.remove(str(root / "examples"))


def told(output: Path, *rows: str) -> list[str]:
    return ["--table", "momo", "--rows", *rows, "--seeds", "3", "--output", str(output), "--jobs", "2"]


def test_rows_share_the_stages_before_them(tmp_path: Path) -> None:
    import evidence

    runs = evidence.plan(evidence.parse(told(tmp_path, "momo_stage3", "momo_stage2_text_only", "momo_stage2")))
    assert [run.row for run in runs] == ["momo_stage1", "momo_stage2", "momo_stage3", "momo_stage2_text_only"]
    first, second, third, alone = runs
    assert second.arguments()["initial_model"] == alone.arguments()["initial_model"] == str(first.directory / "model")
    assert third.arguments()["initial_model"] == str(second.directory / "model")
    for run in runs:
        command = run.command(threads=1)
        arguments = parse_arguments(command[command.index("--config") :])
        assert arguments.model.initial_model == run.arguments().get("initial_model")
        assert arguments.run.seed == 3 and arguments.run.max_steps == run.config()["max_steps"]


def test_a_fraction_is_of_steps_and_of_warm_up_and_a_stage_of_another_length_is_another(tmp_path: Path) -> None:
    import evidence

    (stage1, stage2), (_, half) = (
        evidence.plan(evidence.parse([*told(tmp_path, "momo_stage2"), "--fraction", fraction]))
        for fraction in ("1", "0.5")
    )
    for name in ("max_steps", "warmup_steps"):
        assert 2 * half.arguments()[name] == stage2.arguments()[name] == stage2.config()[name]
    stage2.result.write_text(json.dumps({"setup": stage2.setup()}), encoding="utf-8")
    assert evidence.finished(stage2) == {"setup": stage2.setup()}
    with pytest.raises(ValueError, match="has other settings .*initial_model: .*max_steps"):
        evidence.finished(half)
    assert stage2.batch_sizes() == {"texts": 128, "images": 128} and stage1.batch_sizes() == {"images": 128}


def test_no_stage_begins_before_the_one_before_it_has_ended(tmp_path: Path, monkeypatch) -> None:
    import evidence

    begun = []

    def work(run, threads, data, limit, children):
        assert run.before is None or run.before.result.is_file()
        begun.append(run.row)
        run.result.write_text("{}", encoding="utf-8")
        values = {f"cls/{name}/logistic_accuracy": 0.5 for name in evidence.PROBES}
        return {"row": run.row, "values": values, "wall_seconds": 1.0}

    monkeypatch.setattr(evidence, "work", work)
    runs = evidence.plan(evidence.parse(told(tmp_path, *evidence.BEFORE)))
    assert evidence.work_all(runs, 2, 1, ([], []), None) == []
    assert sorted(begun) == sorted(evidence.BEFORE)


def test_finished_rows_are_measured_again_and_none_is_trained(tmp_path: Path, monkeypatch) -> None:
    import evidence

    stage1, stage2 = evidence.plan(evidence.parse(told(tmp_path, "momo_stage2")))
    done = {"setup": stage1.setup(), "values": {"old": 0.5}, "loss": 2.0}
    stage1.result.write_text(json.dumps(done), encoding="utf-8")
    monkeypatch.setattr(evidence, "measure", lambda run, data, limit: ({"new": float(limit)}, 0))
    evidence.measure_again([stage1, stage2], ([], []), 7)
    assert json.loads(stage1.result.read_text(encoding="utf-8")) == {**done, "values": {"new": 7.0}}
    assert not stage2.result.exists()


@pytest.mark.parametrize("losses", [["mim"], ["itc"]])
def test_features_are_probed_and_what_has_learnt_contrast_retrieves(root: Path, losses: list[str]) -> None:
    pytest.importorskip("sklearn")
    from evidence_stages import stage_values

    rows = open_rows(root / "examples/data/emoji/test_style.parquet", id_column="hexcode")
    some = [rows[place] for place in range(0, 64, 4)]
    directory, data = root / "examples/checkpoints/oner-emoji", root / "examples/data"
    values, parameters = stage_values(directory, {"losses": losses}, some, 0, 60, data)
    probed = {
        f"{pool}/{name}/logistic_accuracy" for pool in ("cls", "mean") for name in ("emoji_groups", "supersense")
    }
    probed |= {f"{pool}/styles/recall@10" for pool in ("cls", "mean")}
    assert values["cls/styles/recall@10"] > 5 * values["cls/styles/chance@10"]
    assert probed <= values.keys() and all(0 <= value <= 1 for name, value in values.items() if "accuracy" in name)
    assert ("scenes/tr_r@10" in values) == (losses == ["itc"]) and parameters > 1e6


def test_the_page_has_chance_every_row_and_the_papers_numbers(tmp_path: Path) -> None:
    from evidence import ROWS, TABLES
    from evidence_table import write_evidence

    # made up, to test the text
    def content(row: str, seed: int, score: float) -> dict:
        values = {
            f"{pool}/{name}/{value}": score
            for pool in ("cls", "mean")
            for name in ("emoji_groups", "supersense")
            for value in ("logistic_accuracy", "knn_accuracy", "chance")
        }
        if "stage3" in row:
            values |= {f"scenes/{way}_{kind}@{k}": score for way in ("tr", "ir") for kind in ("r", "chance")
                       for k in (1, 5, 10)}  # fmt: skip
        sizes = {"steps": 10, "pairs": 1280, "train_seconds": 60.0, "wall_seconds": 90.0, "loss": 2.0}
        named = {"row": row, "title": ROWS[row][0], "before": None, "seed": seed, "command": ["python", "x"]}
        machine = {"processor": "abacus", "cores": 2, "versions": {"torch": "0"}}
        return {**named, **sizes, "resumed": False, "values": values, "machine": machine}

    rows = TABLES["momo"].rows
    contents = [content(row, seed, 0.1 + 0.2 * seed) for row in rows for seed in (0, 1)]
    facts = {"command": ["python", "x"], "jobs": 1, "threads": 1, "data": "seen.parquet", "pictures": 16}
    table = write_evidence(tmp_path, contents, facts, TABLES["momo"])
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()
    }
    assert {len(line) for line in cells.values()} == {9} and set(cells) >= {ROWS[row][0] for row in rows}
    assert cells["stage 2: texts alone"] == [*["20.0 ± 14.1"] * 4, "-", "-", "9.5", "78.7", "-"]
    assert cells["stage 3: texts and pairs"][4:] == ["20.0 ± 14.1"] * 2 + ["75.7", "78.1", "64.0"]
    assert cells["chance"][:6] == ["10.0"] * 6
    page = (tmp_path / "evidence_momo.md").read_text(encoding="utf-8")
    assert (
        "| stage 1: images | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | - | - | - | - | - | - |" in page
    )
    assert "| stage 1: images | 0, 1 | nothing | 10 | 1,280 |" in page and "abacus" in page
