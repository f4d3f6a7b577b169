"""A whole run over data of which some rows are bad: it ends, lists them, and resumes to the bit; or it stops."""

import json
import os
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pretraining import (
    PAIRS,
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
    write_pairs,
)

from oner.processing.data.quarantine import BadRowsError, read_quarantine
from oner.processing.data.sources import PairDataError
from oner.training.commands.train import train
from oner.training.run.building import build_processor_and_config
from oner.training.run.checkpoint import list_checkpoints, load_checkpoint
from oner.training.run.collators import build_collators
from oner.training.run.engine import Engine
from oner.training.run.launch import make_accelerator
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.parsing import parse_arguments

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:.* cannot be used:UserWarning"),
]
DECODED, OPENED = (3, 11, 12), (20, 33)  # bad when decoded, bad when opened
MANY = {"max_bad_rows": 0.5, "save_every_epochs": 0.2, "keep_checkpoints": 20}


def spoil(path: Path, decoded=DECODED, opened=OPENED) -> Path:
    """Forty real pairs of which some have half a picture and some an empty caption."""
    table = pq.read_table(write_pairs(path))
    pictures, captions = table["image"].to_pylist(), table["captions"].to_pylist()
    for row in decoded:
        pictures[row] = {**pictures[row], "bytes": pictures[row]["bytes"][:200]}
    for row in opened:
        captions[row] = [""]
    for name, cells in (("image", pictures), ("captions", captions)):
        place = table.column_names.index(name)
        table = table.set_column(place, table.field(name), pa.array(cells, table.field(name).type))
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    return spoil(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def undisturbed(example, spoilt, tmp_path_factory) -> Path:
    forget_accelerator()
    directory = tmp_path_factory.mktemp("undisturbed")
    example.main(tiny_arguments(spoilt, directory, **MANY))
    return directory


def lines_of(directory: Path) -> list[dict]:
    return read_quarantine(directory / "quarantine.jsonl")


def test_a_run_over_bad_rows_lists_each_with_its_place(spoilt, undisturbed):
    lines = lines_of(undisturbed)
    opened = [line for line in lines if line["step"] is None]
    assert [(line["row"], line["reason"]) for line in opened] == [
        (row, "caption 0 of the list: the caption is empty") for row in OPENED
    ]
    met = [line for line in lines if line["step"] is not None]
    first = [line for line in met if line["attempt"] == 0]
    # two epochs of all forty rows
    assert sorted((line["epoch"], line["row"]) for line in first) == [(e, row) for e in (0, 1) for row in DECODED]
    assert all(line["epoch"] == line["step"] // 5 and line["source"] == str(spoilt) for line in met)
    assert all("truncated" in line["reason"].lower() for line in met)
    assert not {line["replaced_by"] for line in met} & {*DECODED, *OPENED}
    assert [line["step"] for line in read_log(undisturbed)] == list(range(1, 11))


def test_the_engine_sees_whole_batches_without_bad_rows(spoilt, tmp_path):
    arguments = parse_arguments(tiny_arguments(spoilt, tmp_path, max_bad_rows=0.5, one_row_per_id=True))
    rows = open_portions(arguments)
    loader = RunLoader(arguments, rows, build_collators(arguments, *build_processor_and_config(arguments, rows)))
    batches = [step["pairs"] for step in loader(0)]
    assert len(batches) == loader.total_steps == 10
    for batch in batches:
        assert len(batch["rows"]) == 8 == len(set(batch["ids"].tolist())) and "quarantine" not in batch
        assert not set(batch["rows"].tolist()) & {*DECODED, *OPENED}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_never_stopping(example, spoilt, undisturbed, tmp_path, monkeypatch, workers):
    arguments = tiny_arguments(spoilt, tmp_path, resume="auto", **{**MANY, "save_every_epochs": 9})
    arguments[arguments.index("--num_workers") + 1] = str(workers)
    log = Engine._log
    for stop in (2, 5, 7):

        def stop_there(self, *values, stop=stop, **more):
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return log(self, *values, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_log", stop_there)
            example.main(arguments)
        assert list_checkpoints(tmp_path)[-1].name == f"checkpoint-{stop:08d}"
    example.main(arguments)
    assert_same_checkpoint(list_checkpoints(undisturbed)[-1], list_checkpoints(tmp_path)[-1])
    assert read_log(tmp_path) == read_log(undisturbed)
    assert (tmp_path / "quarantine.jsonl").read_bytes() == (undisturbed / "quarantine.jsonl").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_is_only_timed_leaves_the_list_as_it_is(spoilt, undisturbed, tmp_path, workers, capsys):
    """As `oner train FOLDER` does when it is called again."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in list_checkpoints(run)[5:]:
        shutil.rmtree(path)
    told = tiny_arguments(spoilt, run, resume="auto", **MANY)
    told[told.index("--num_workers") + 1] = str(workers)
    arguments = parse_arguments(told)
    train(arguments, make_accelerator(arguments.run), timed=True)
    assert "this will take about" in capsys.readouterr().out
    assert (run / "quarantine.jsonl").read_bytes() == (undisturbed / "quarantine.jsonl").read_bytes()
    assert_same_checkpoint(list_checkpoints(undisturbed)[-1], list_checkpoints(run)[-1])


def test_too_many_bad_rows_at_opening_stop_the_run_before_it_starts(example, spoilt, tmp_path):
    with pytest.raises(
        BadRowsError, match="2 of 40 rows cannot be used, more than max_bad_rows=0.01 allows"
    ) as caught:
        example.main(tiny_arguments(spoilt, tmp_path))
    assert "row 20 of" in str(caught.value) and "row 33 of" in str(caught.value)
    assert [line["row"] for line in lines_of(tmp_path)] == list(OPENED) and not list_checkpoints(tmp_path)


def test_too_many_bad_rows_in_steps_stop_the_run_with_the_list(example, tmp_path):
    source = spoil(tmp_path / "pairs.parquet", decoded=range(0, PAIRS, 2), opened=())
    with pytest.raises(BadRowsError, match=r"\d+ of \d+ rows could not be used; more than max_bad_rows=0.1") as caught:
        example.main(tiny_arguments(source, tmp_path / "run", max_bad_rows=0.1))
    assert "quarantine.jsonl lists them all" in str(caught.value) and "of " + str(source) in str(caught.value)
    lines = lines_of(tmp_path / "run")
    assert len(lines) >= 4 and {line["row"] % 2 for line in lines} == {0}
    with pytest.raises(BadRowsError):
        example.main(tiny_arguments(source, tmp_path / "none", max_bad_rows=0.0))
    assert {line["step"] for line in lines_of(tmp_path / "none")} == {0}


def test_the_limit_may_be_raised_at_a_resume(example, spoilt, undisturbed, tmp_path):
    example.main(tiny_arguments(spoilt, tmp_path, **{**MANY, "max_bad_rows": 0.6, "epochs": 2, "max_steps": None}))
    state = load_checkpoint(list_checkpoints(tmp_path)[3])[1]
    assert state["arguments"]["max_bad_rows"] == 0.6
    for path in list_checkpoints(tmp_path)[4:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    example.main(tiny_arguments(spoilt, tmp_path, resume="auto", **{**MANY, "max_bad_rows": 0.9}))
    assert_same_checkpoint(list_checkpoints(undisturbed)[-1], list_checkpoints(tmp_path)[-1])


def test_only_bad_rows(example, tmp_path):
    source = spoil(tmp_path / "pairs.parquet", decoded=(), opened=range(PAIRS))
    with pytest.raises(BadRowsError, match="40 of 40 rows cannot be used"):
        example.main(tiny_arguments(source, tmp_path / "a"))
    source = spoil(tmp_path / "decoded.parquet", decoded=range(PAIRS), opened=())
    with pytest.raises(BadRowsError, match="cannot be used, and none of"):
        example.main(tiny_arguments(source, tmp_path / "b", max_bad_rows=1.0))


def test_a_structural_fault_is_an_error_before_any_step(example, tmp_path):
    (tmp_path / "pairs.csv").write_text('image,captions\n0.png,"apple\n1.png,pear\n')
    with pytest.raises(PairDataError, match="row 0: has wrong quoting, from line 2 on"):
        example.main(tiny_arguments(tmp_path / "pairs.csv", tmp_path, id_column=None, max_bad_rows=1.0))
    assert not (tmp_path / "log.jsonl").exists()


def test_a_bad_picture_of_an_evaluation_is_named_before_the_run(example, spoilt, tmp_path):
    pairs = write_pairs(tmp_path / "good.parquet")
    source = spoil(tmp_path / "eval.parquet", opened=())
    with pytest.raises(PairDataError, match="eval.parquet: 3 of 40 rows cannot be used") as caught:
        example.main(tiny_arguments(pairs, tmp_path / "run", eval_data=[source]))
    assert all(f"row {row}: cannot read" in str(caught.value) for row in DECODED)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_share_out_of_range_is_refused(spoilt, tmp_path):
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"max_bad_rows is .*; expected a number in \[0, 1\]"):
            parse_arguments(tiny_arguments(spoilt, tmp_path, max_bad_rows=share))


def test_the_run_says_that_rows_are_replaced(example, spoilt, tmp_path):
    with pytest.warns(UserWarning) as caught:
        example.main(tiny_arguments(spoilt, tmp_path, max_bad_rows=0.5, max_steps=5))
    said = [str(warning.message) for warning in caught]
    assert sum("2 of 40 rows cannot be used and will be replaced; see " in text for text in said) == 1
    assert sum(text.startswith("a row cannot be used: cannot read the picture") for text in said) == 1
    assert json.loads((tmp_path / "quarantine.jsonl").read_text().splitlines()[0])["row"] == OPENED[0]
