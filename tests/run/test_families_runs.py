"""examples/pretrain.py with every family: it ends, it resumes to the bit, bad rows and bad numbers leave no trace."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_bad_rows_in_training import spoil
from test_nonfinite import moved, spoil_loss
from tiny_pretraining import (
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
    write_as_late_as_can_be,
)

from oner.processing.data.quarantine import read_quarantine
from oner.training.publishing.model_loading import load_model
from oner.training.run.checkpoint import list_checkpoints, load_checkpoint
from oner.training.run.engine import Engine

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:.* cannot be used:UserWarning"),
]
STEPS = 6  # of five an epoch, so that the second begins


def command(family, pairs: Path, directory: Path, **options) -> list[str]:
    """Six steps with dropout, and a checkpoint after each."""
    fields = {"max_steps": STEPS, "save_every_epochs": 0.2, "keep_checkpoints": STEPS, "model_config": {}, **options}
    fields["model_config"] = {**family.tiny.DRAWN, **fields["model_config"]}
    return tiny_arguments(pairs, directory, family.name, **fields)


@pytest.fixture(scope="module")
def undisturbed(family, example, pairs, tmp_path_factory) -> Path:
    forget_accelerator()
    directory = tmp_path_factory.mktemp("undisturbed")
    example.main(command(family, pairs, directory))
    return directory


def checkpoint(directory: Path, step: int) -> tuple[dict, dict]:
    return load_checkpoint(directory / f"checkpoint-{step:08d}")


def test_a_run_logs_its_losses_and_moves_everything(family, undisturbed):
    lines = read_log(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    logged = [name for name in family.losses if name in lines[0]]
    assert [name for name in lines[0] if name in family.losses] == logged
    assert set(logged) == set(family.run["losses"])
    assert len({line["loss"] for line in lines}) == STEPS
    (first, _), (last, _) = checkpoint(undisturbed, 1), checkpoint(undisturbed, STEPS)
    for stem in ("model", "objective", "optimizer"):
        kept = [name for name in first[stem] if name not in moved(first[stem], last[stem])]
        whole = [name for name in kept if first[stem][name].numel() > 1 and first[stem][name].is_floating_point()]
        # a part of the model that none of these losses reads, and the teacher's copy of it
        assert len(whole) < 0.1 * len(first[stem]) or not first[stem], (stem, whole)


def test_its_model_directory_serves_every_class(family, undisturbed):
    """Through the auto class by name, with the weights of the last checkpoint."""
    directory = undisturbed / "model"
    weights, trained = load_file(directory / "model.safetensors"), checkpoint(undisturbed, STEPS)[0]["model"]
    assert all(torch.equal(value, trained[name]) for name, value in weights.items())
    for auto, cls in family.classes.items():
        model = load_model(getattr(transformers, auto), directory, draws_heads=True)
        assert type(model) is cls
        prefix, found = model.base_model_prefix, 0
        for name, value in model.state_dict().items():
            key = name if name in weights else f"{prefix}.{name}"
            if key in weights:
                found += 1
                assert torch.equal(value, weights[key]), name
        assert found >= len(family.tower(model).state_dict()) - 1  # tied words are stored once


@pytest.mark.parametrize(("chunks", "beside"), [(1, False), (2, True)], ids=["whole", "chunks, saved beside"])
def test_stopped_and_resumed_is_never_stopped(
    family, example, pairs, undisturbed, tmp_path, tmp_path_factory, monkeypatch, chunks, beside
):
    """Weights, moments, teacher, queues, generators and the log; in one piece, and in pieces while it is saved."""
    whole, options = undisturbed, {"gradient_cache_chunks": chunks, "model_config": family.tiny.APART}
    if chunks > 1:
        whole = tmp_path_factory.mktemp("whole")
        example.main(command(family, pairs, whole, **options))
        forget_accelerator()
    else:
        options = {}
    if beside:
        options["async_checkpoints"] = True
        write_as_late_as_can_be(monkeypatch)
    log = Engine._log
    for stop in (2, 5):

        def stop_there(self, *values, stop=stop, **more):
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return log(self, *values, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_log", stop_there)
            example.main(command(family, pairs, tmp_path, resume="auto", **options))
        forget_accelerator()
        assert list_checkpoints(tmp_path)[-1].name == f"checkpoint-{stop:08d}"
    example.main(command(family, pairs, tmp_path, resume="auto", **options))
    assert len(list_checkpoints(whole)) == STEPS
    for one in list_checkpoints(whole):
        assert_same_checkpoint(one, tmp_path / one.name)
    assert read_log(tmp_path) == read_log(whole)


def test_bad_rows_are_replaced_and_listed(family, example, tmp_path, monkeypatch):
    source, seen, train_step = spoil(tmp_path / "pairs.parquet"), [], Engine._train_step

    def watched(self, batches):
        seen.extend(batches["pairs"]["rows"].tolist())
        return train_step(self, batches)

    monkeypatch.setattr(Engine, "_train_step", watched)
    example.main(command(family, source, tmp_path / "run", max_bad_rows=0.5, max_steps=5))
    lines = read_quarantine(tmp_path / "run" / "quarantine.jsonl")
    bad = {3, 11, 12, 20, 33}  # half a picture, or no caption
    assert {line["row"] for line in lines} == bad and not set(seen) & bad and len(seen) == 40
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_nothing_moves_in_a_step_that_is_not_finite(family, example, pairs, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, {3})
    example.main(command(family, pairs, tmp_path))
    (before, _), (after, state) = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    for stem in ("model", "optimizer"):
        assert moved(before[stem], after[stem]) == [], stem
    # a teacher may follow the student before the step, which stood still; a queue may not take anything
    for name in moved(before["objective"], after["objective"]):
        theirs = before["model"][name.removeprefix("teacher.")].double()
        far = (before["objective"][name].double() - theirs).abs()
        assert ((after["objective"][name].double() - theirs).abs() <= far + 1e-7).all(), name
    assert not torch.equal(before["random"]["cpu"], after["random"]["cpu"])
    assert state["nonfinite"] == {"total": 1, "in_a_row": 1}
    following, state = checkpoint(tmp_path, 4)
    kept = [stem for stem in ("model", "objective", "optimizer") if after[stem]]  # not every objective keeps state
    assert all(moved(after[stem], following[stem]) for stem in kept)
    assert state["nonfinite"] == {"total": 1, "in_a_row": 0}
    told = json.loads((tmp_path / "nonfinite-00000003" / "process-0.json").read_text())
    assert told["step"] == 3 and told["loss"] == "nan"
