"""What a run goes on from: which checkpoint, past which damage, with which log, and what it refuses."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from tiny_pretraining import (
    EVERY_STEP,
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
    write_pairs,
)

from oner.training.run.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from oner.training.run.data_workers import outlive_signals_to_the_group
from oner.training.run.engine import Engine
from oner.training.run.parsing import parse_arguments
from oner.training.run.resumption import RunLog, check_same_run, choose_checkpoint

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
CPU = torch.device("cpu")


def numbered(step: int) -> str:
    return f"checkpoint-{step:08d}"


def names(directory: Path) -> list[str]:
    return [path.name for path in list_checkpoints(directory)]


def small(directory: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(directory, step, {"model": {"weight": torch.ones(2)}}, {"step": step}, keep=9)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], None), (["--resume"], "auto"), (["--resume", "auto"], "auto"), (["--resume", "a/b"], "a/b")],
)
def test_the_forms_of_resume(pairs, tmp_path, given, expected):
    arguments = parse_arguments([*tiny_arguments(pairs, tmp_path), *given, "--seed", "3"])
    assert arguments.run.resume == expected and arguments.run.seed == 3


def test_damaged_checkpoints_are_passed_over_named_and_set_aside(example, pairs, undisturbed, tmp_path, caplog):
    for step in (3, 4, 5):
        shutil.copytree(undisturbed / numbered(step), tmp_path / numbered(step))
    shutil.copy(undisturbed / "log.jsonl", tmp_path)
    for step, file in ((4, "optimizer.safetensors"), (5, "state.json")):
        damaged = tmp_path / numbered(step) / file
        damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{numbered(4)}/optimizer\.safetensors"):
        example.main(tiny_arguments(pairs, tmp_path, resume=tmp_path / numbered(4), **EVERY_STEP))
    with caplog.at_level(logging.WARNING):
        example.main([*tiny_arguments(pairs, tmp_path, **EVERY_STEP), "--resume"])
    for step, file in ((4, "optimizer.safetensors"), (5, "state.json")):
        assert f"{numbered(step)} is damaged and skipped: {tmp_path / numbered(step) / file}" in caplog.text
        assert (tmp_path / f"passed-over-{numbered(step)}").is_dir()
        assert_same_checkpoint(undisturbed / numbered(step), tmp_path / numbered(step))
    assert_same_checkpoint(undisturbed / numbered(10), tmp_path / numbered(10))
    assert read_log(tmp_path) == read_log(undisturbed)


def test_a_run_may_go_back_and_does_not_meet_the_course_it_left(example, pairs, undisturbed, tmp_path):
    directory = shutil.copytree(undisturbed, tmp_path / "run")
    options = {**EVERY_STEP, "keep_checkpoints": 1}
    back = tiny_arguments(
        pairs, directory, resume=directory / numbered(2), weight_decay=0.7, allow_changes=True, **options
    )
    example.main([*back, "--max_steps", "4"])
    # among the later ones of the other course, those of this one would have been the first to be removed
    assert names(directory) == [numbered(4)]
    assert len(list(directory.glob("passed-over-*"))) == 8
    lines = read_log(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == read_log(undisturbed)[:2] and lines[2]["loss"] != read_log(undisturbed)[2]["loss"]


def test_a_new_run_does_not_mix_with_an_earlier_one(example, pairs, undisturbed, tmp_path):
    directory = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"contains {numbered(10)} of an earlier run: resume it with --resume"):
        example.main(tiny_arguments(pairs, directory, **EVERY_STEP))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_run_that_came_to_no_checkpoint_begins_anew_with_its_log(example, pairs, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    example.main([*tiny_arguments(pairs, tmp_path, max_steps=2), "--resume"])
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2] and read_log(tmp_path)[0]["loss"] != 3.0


def test_data_of_another_length_are_another_run(example, undisturbed, tmp_path):
    """The path is the same, and so is every argument; the rows are not."""
    pairs = write_pairs(tmp_path / "pairs.parquet", rows=40)
    example.main(tiny_arguments(pairs, tmp_path / "run", max_steps=3, **EVERY_STEP))
    write_pairs(tmp_path / "pairs.parquet", rows=32)
    forget_accelerator()
    with pytest.raises(CheckpointError, match="belongs to another configuration; epoch_steps: 5 -> 4"):
        example.main([*tiny_arguments(pairs, tmp_path / "run", max_steps=3, **EVERY_STEP), "--resume"])


def test_a_checkpoint_that_lacks_what_a_run_needs_is_named(example, pairs, undisturbed, tmp_path):
    for missing in ("objective", "random"):
        directory = tmp_path / missing
        shutil.copytree(undisturbed / numbered(9), directory / numbered(9))
        tensors, state = load_checkpoint(directory / numbered(9))
        save_checkpoint(directory, 9, {stem: tensors[stem] for stem in tensors if stem != missing}, state)
        with pytest.raises(CheckpointError, match=f"{numbered(9)}: lacks '{missing}'"):
            example.main([*tiny_arguments(pairs, directory, **EVERY_STEP), "--resume"])
        forget_accelerator()


def test_a_checkpoint_older_than_an_argument_goes_on_where_its_default_is_meant(example, pairs, undisturbed, tmp_path):
    tensors, state = load_checkpoint(undisturbed / numbered(9))
    assert state["arguments"].pop("schedule") == "cosine"
    save_checkpoint(tmp_path, 9, tensors, state)
    line = [*tiny_arguments(pairs, tmp_path, **EVERY_STEP), "--resume"]
    with pytest.raises(CheckpointError, match="belongs to another configuration; schedule: 'cosine' -> 'albef'"):
        example.main([*line, "--schedule", "albef", "--warmup_steps", "0"])
    forget_accelerator()
    example.main(line)
    assert_same_checkpoint(undisturbed / numbered(10), tmp_path / numbered(10))


def test_the_choice_of_a_checkpoint(tmp_path):
    assert choose_checkpoint(tmp_path, None, CPU) is None and choose_checkpoint(tmp_path, "auto", CPU) is None
    small(tmp_path, 3, 12)
    assert choose_checkpoint(tmp_path, "auto", CPU) == tmp_path / numbered(12)
    assert choose_checkpoint(tmp_path / "new", str(tmp_path / numbered(3)), CPU) == tmp_path / numbered(3)
    with pytest.raises(CheckpointError, match=r"nowhere/manifest\.json: cannot be read"):
        choose_checkpoint(tmp_path, str(tmp_path / "nowhere"), CPU)
    for step in (3, 12):
        (tmp_path / numbered(step) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoints are damaged; .*{numbered(12)}.*missing; .*{numbered(3)}"):
        choose_checkpoint(tmp_path, "auto", CPU)


def test_changes_are_reported_field_by_field(tmp_path, caplog):
    then = {"seed": 0, "crop_scale": [0.5, 1.0], "num_workers": 2, "gone": 1, "max_nonfinite_steps": 3}
    now = {"seed": 1, "crop_scale": (0.5, 1.0), "num_workers": 0, "new": None, "fresh": 2, "max_nonfinite_steps": 9}
    with pytest.raises(CheckpointError) as error:
        check_same_run(tmp_path, then, now, allow_changes=False)
    assert str(error.value) == (
        f"{tmp_path} belongs to another configuration; fresh: None -> 2; gone: 1 -> None; seed: 0 -> 1 "
        f"(allow_changes resumes anyway)"
    )
    with caplog.at_level(logging.WARNING):
        check_same_run(tmp_path, then, now, allow_changes=True)
    assert "with another configuration; fresh: None -> 2; gone: 1 -> None; seed: 0 -> 1" in caplog.text


def test_the_log_is_cut_at_the_checkpoint_and_where_a_crash_cut_it(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.trim(3), log.flush()  # of a run that has none yet
    for step in (1, 2, 2, 3, 4):
        log.write({"step": step, "loss": 1 / step})
    whole = log.path.read_bytes()
    log.trim(4)
    assert log.path.read_bytes() == whole
    with open(log.path, "a") as file:
        file.write('{"step": 2, "loss": 0.')
    log.trim(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    with pytest.raises(CheckpointError, match=r"nowhere/log\.jsonl: cannot be written"):
        RunLog(tmp_path / "nowhere" / "log.jsonl").write({"step": 1})


def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_to_it(
    example, pairs, undisturbed, tmp_path, monkeypatch
):
    """SIGTERM and SIGINT from outside, to the data workers first: the run finishes its step, saves, and ends them."""
    train_step, workers = Engine._train_step, []

    def signalled(self, batch):
        if self.step + 1 == 4:
            workers.extend(psutil.Process().children())
            sender = os.fork()  # another process than their parent
            if sender == 0:
                for worker in workers:
                    worker.send_signal(signal.SIGTERM), worker.send_signal(signal.SIGINT)
                os._exit(0)
            os.waitpid(sender, 0)
            assert not psutil.wait_procs(workers, timeout=0.3)[0]
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch)

    monkeypatch.setattr(Engine, "_train_step", signalled)
    options = {**EVERY_STEP, "save_every_epochs": 9, "num_workers": 2}
    example.main(tiny_arguments(pairs, tmp_path, **options))
    assert len(workers) == 2 and names(tmp_path) == [numbered(4)]
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert_same_checkpoint(undisturbed / numbered(4), tmp_path / numbered(4))


def test_a_worker_obeys_its_parent():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outlive_signals_to_the_group(0)
        os.write(writer, b"!")
        signal.pause()
        os._exit(7)
    os.read(reader, 1)
    psutil.Process(child).terminate()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
