"""Checkpoints written beside the steps: the copy is of one moment, one is pending at most, and no error is lost."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_pretraining import EVERY_STEP, assert_same_checkpoint, read_log, tiny_arguments, write_as_late_as_can_be

from oner.training.run import checkpoint
from oner.training.run.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint, verify
from oner.training.run.checkpoint_writer import CheckpointWriter, HostCopy
from oner.training.run.engine import Engine

BESIDE = {**EVERY_STEP, "async_checkpoints": True}
PATIENCE = 60  # seconds after which a test that waits has failed


def some_state() -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.randn(4, 6)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "transposed": weight.T,
            "half": torch.randn(3).bfloat16(),
            "nan": torch.tensor([float("nan"), -0.0]),
        },
        "objective": {"pointer": torch.tensor(3), "empty": torch.zeros(0, 5)},
    }


def as_bytes(tensors) -> dict[str, bytes]:
    flat = {f"{stem}.{name}": value for stem, content in tensors.items() for name, value in content.items()}
    return {name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in flat.items()}


def test_a_copy_holds_the_bits_of_its_moment_and_its_memory_is_used_again(tmp_path):
    state = some_state()
    expected = as_bytes(state)
    copy_of = HostCopy()
    held = copy_of(state)
    # tied ones have memory of their own, without which safetensors refuses them
    pointers = {name: value.data_ptr() for name, value in held["model"].items()}
    assert len(set(pointers.values())) == len(pointers) and held["model"]["transposed"].is_contiguous()
    for content in state.values():
        for value in content.values():
            value.zero_()
    assert as_bytes(held) == expected
    path = save_checkpoint(tmp_path, 1, held, {}, copied=True)
    assert as_bytes(load_checkpoint(path)[0]) == expected

    # what grows or comes later, as moments do, is followed; what went is not held
    later = {"model": {"weight": torch.ones(4, 6), "half": torch.ones(5)}, "optimizer": {"0.step": torch.tensor(1.0)}}
    again = copy_of(later)
    assert as_bytes(again) == as_bytes(later) and again["model"].keys() == later["model"].keys()
    assert again["model"]["weight"].data_ptr() == pointers["weight"]


@pytest.mark.gpu
def test_a_copy_of_an_accelerator_is_page_locked_and_of_one_moment():
    state = {"model": {"weight": torch.randn(1000, 1000, device="cuda"), "count": torch.tensor(1)}}
    expected = state["model"]["weight"].cpu()
    held = HostCopy()(state)["model"]
    state["model"]["weight"].zero_()
    assert torch.equal(held["weight"], expected) and held["weight"].is_pinned() and not held["count"].is_pinned()


def test_the_caller_goes_on_and_the_next_copy_waits():
    """One pending copy at most, each written as it was at its start, in their order."""
    value, written, go_on = torch.zeros(()), [], threading.Event()

    def write(tensors):
        assert go_on.wait(PATIENCE)
        written.append(tensors["model"]["value"].item())

    with CheckpointWriter() as writer:
        writer.start({"model": {"value": value}}, write)
        value += 1
        assert not written
        second = threading.Thread(target=writer.start, args=({"model": {"value": value}}, write))
        second.start()
        time.sleep(0.05)
        assert second.is_alive() and not written
        go_on.set()
        second.join(PATIENCE)
        value += 1
    assert written == [0, 1]


def failing(tensors) -> None:
    time.sleep(0.02)
    raise CheckpointError("no space left")


@pytest.mark.parametrize("how", ["the next one", "wait", "leaving"])
def test_what_the_writing_raised_is_raised_once(how):
    state, written = some_state(), []
    with pytest.raises(CheckpointError, match="no space left"):
        with CheckpointWriter() as writer:
            writer.start(state, failing)
            if how == "the next one":
                writer.start(state, written.append)
            if how == "wait":
                writer.wait()
    assert not written
    writer.wait()


def test_an_error_of_the_run_lets_the_writing_end_and_names_both(caplog):
    written = []

    def late(tensors):
        time.sleep(0.05)
        written.append(tensors)

    for write, said in ((late, ""), (failing, "CheckpointError: no space left")):
        with pytest.raises(KeyboardInterrupt):
            with CheckpointWriter() as writer:
                writer.start(some_state(), write)
                raise KeyboardInterrupt
        assert said in caplog.text
    assert len(written) == 1


# Runs


@pytest.mark.usefixtures("fresh_accelerator")
def test_every_checkpoint_is_that_of_a_run_that_waits(example, pairs, undisturbed, tmp_path, monkeypatch):
    """To the bit, though the step after it was taken before it was written; and so are the log and the model."""
    written = write_as_late_as_can_be(monkeypatch)
    example.main(tiny_arguments(pairs, tmp_path, **BESIDE))
    assert written == list(range(1, 11))
    assert len(list_checkpoints(undisturbed)) == 10
    for whole in list_checkpoints(undisturbed):
        assert_same_checkpoint(whole, tmp_path / whole.name)
    assert read_log(tmp_path) == read_log(undisturbed)
    one, other = (path / "model" / "model.safetensors" for path in (undisturbed, tmp_path))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("last", [False, True])
def test_a_disk_that_is_full_ends_the_run_with_the_words_of_one_that_waits(
    example, pairs, tmp_path, monkeypatch, last
):
    """At the next checkpoint, or at the end where there is none."""
    write, train_step, steps = checkpoint.save_file, Engine._train_step, []

    def full(tensors, file):
        write(tensors, file)
        if "00000003" in str(file):
            Path(file).write_bytes(b"xx")
            raise OSError(28, "No space left on device")

    def watched(self, batches):
        steps.append(self.step + 1)
        return train_step(self, batches)

    monkeypatch.setattr(Engine, "_train_step", watched)
    monkeypatch.setattr(checkpoint, "save_file", full)
    options = {**BESIDE, "max_steps": 3 if last else 9}
    with pytest.raises(CheckpointError, match=r"-00000003: cannot be written, .* were: \[Errno 28\] No space"):
        example.main(tiny_arguments(pairs, tmp_path, **options))
    assert steps[-1] == (3 if last else 4)
    left = sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-00000001", "checkpoint-00000002"] and not (tmp_path / "model").exists()
    for path in list_checkpoints(tmp_path):
        verify(path)

    # with room again it goes on
    monkeypatch.undo()
    example.main(tiny_arguments(pairs, tmp_path, resume="auto", **options))
    assert list_checkpoints(tmp_path)[-1].name == f"checkpoint-{options['max_steps']:08d}"


@pytest.mark.usefixtures("fresh_accelerator")
def test_weights_that_are_not_finite_are_not_saved_beside_the_run_either(example, pairs, tmp_path):
    options = {**BESIDE, "base_learning_rate": 1e38, "warmup_epochs": 0, "weight_decay": 1e9}
    with pytest.raises(FloatingPointError, match=r"not saved: at step 1 \d+ tensors of the model contain NaN"):
        example.main(tiny_arguments(pairs, tmp_path, **options))
    assert not list_checkpoints(tmp_path)
