"""Losses and gradients that are not finite: nothing moves, the step's origin is kept, a few in a row stop the run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_pretraining import forget_accelerator, read_log, tiny_arguments

from oner.training.run.checkpoint import list_checkpoints, load_checkpoint, restore_random_state
from oner.training.run.engine import Engine
from oner.training.run.nonfinite import NonFiniteGuard, gradient_norm

pytestmark = [pytest.mark.usefixtures("fresh_accelerator")]
# batch norm in the heads, whose statistics a forward moves; a checkpoint after every one of the ten steps
EVERY_STEP = {
    "save_every_epochs": 0.2,
    "keep_checkpoints": 20,
    "model_config": {"attention_dropout": 0.1, "head_norm": "batch"},
}


def spoil_pictures(monkeypatch, steps: set[int]) -> list[list[int]]:
    """A pixel in the batches of `steps` at which the first layer and its batch norm overflow; returns all rows."""
    train_step, rows = Engine._train_step, []

    def spoiled(self, batches):
        rows.append(batches["pairs"]["rows"].tolist())
        if self.step + 1 in steps:
            batches["pairs"]["pixel_values"][3, 0, 5, 5] = 3e38
        return train_step(self, batches)

    monkeypatch.setattr(Engine, "_train_step", spoiled)
    return rows


def spoil_loss(monkeypatch, steps: set[int]) -> None:
    """A loss that is not finite over gradients that are."""
    update = Engine._update
    monkeypatch.setattr(
        Engine, "_update", lambda self, loss: update(self, loss * float("nan") if self.step + 1 in steps else loss)
    )


def spoil_gradient(monkeypatch, steps: set[int]) -> None:
    """Infinity in one gradient of `steps`, under a finite loss."""
    update = Engine._update

    def spoiled(self, loss):
        if self.step + 1 in steps:
            self.model.oner.layers[0].attention.qkv.weight.grad[1, 1] = float("inf")
        return update(self, loss)

    monkeypatch.setattr(Engine, "_update", spoiled)


def checkpoint(directory: Path, step: int):
    return load_checkpoint(directory / f"checkpoint-{step:08d}")


def moved(one: dict, other: dict) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize(
    ("spoil", "loss", "norm"),
    [(spoil_pictures, True, "nan"), (spoil_loss, False, None), (spoil_gradient, True, "inf")],
    ids=["pictures", "loss", "gradient"],
)
def test_nothing_moves_in_a_step_that_is_not_finite(example, pairs, tmp_path, monkeypatch, spoil, loss, norm):
    rows = spoil(monkeypatch, {3, 7})
    # a line of the log in two steps: the third step is one of those that no line looks at
    example.main(tiny_arguments(pairs, tmp_path, log_every=2, **EVERY_STEP))
    (before, _), (after, state) = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    for stem in ("model", "objective", "optimizer"):
        assert moved(before[stem], after[stem]) == [], stem
    assert any("running_mean" in name for name in before["model"])
    assert any("running_mean" in name for name in before["objective"])
    assert not torch.equal(before["random"]["cpu"], after["random"]["cpu"])
    assert state["nonfinite"] == {"total": 1, "in_a_row": 1}
    following, state = checkpoint(tmp_path, 4)
    assert all(moved(after[stem], following[stem]) for stem in ("model", "objective", "optimizer"))
    assert state["nonfinite"] == {"total": 1, "in_a_row": 0}
    assert checkpoint(tmp_path, 10)[1]["nonfinite"] == {"total": 2, "in_a_row": 0}
    lines = {line["step"]: line for line in read_log(tmp_path)}
    assert [lines[step].get("nonfinite_steps") for step in (2, 4, 6, 8, 10)] == [None, 1, 1, 2, 2]
    assert all(isinstance(line["loss"], float) for line in lines.values())

    kept = tmp_path / "nonfinite-00000003"
    assert sorted(path.name for path in kept.iterdir()) == ["process-0.json", "process-0.safetensors"]
    told, tensors = json.loads((kept / "process-0.json").read_text()), load_file(kept / "process-0.safetensors")
    assert told["step"] == 3 and told["progress"] == 0.2
    assert (float(told["loss"]) > 0) == loss and (norm is None or told["gradient_norm"] == norm)
    if rows:
        assert tensors["pairs.rows"].tolist() == rows[2]
    for name, value in before["random"].items():
        assert torch.equal(tensors[name], value[0]), name
    restore_random_state(tensors)


def test_a_line_of_the_log_at_such_a_step_is_still_json(example, pairs, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, {2})
    train_step = Engine._train_step

    def spoiled(self, batches):
        taken = train_step(self, batches)
        if self.step != 2:
            return taken
        return taken._replace(loss=taken.loss * float("nan"), parts={**taken.parts, "itc": taken.loss / 0})

    monkeypatch.setattr(Engine, "_train_step", spoiled)
    example.main(tiny_arguments(pairs, tmp_path, max_steps=3))
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    for name, spoilt in (("loss", True), ("itc", True), ("cmc", False)):
        assert [line[name] is None for line in lines] == [False, spoilt, False]


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_so_many_in_a_row_stop_the_run(example, pairs, tmp_path, monkeypatch, log_every):
    with monkeypatch.context() as patch:
        rows = spoil_pictures(patch, {3, 5, 6, 9, 10})
        options = {**EVERY_STEP, "save_every_epochs": 9, "max_nonfinite_steps": 3}
        example.main(tiny_arguments(pairs, tmp_path / "a", log_every=log_every, **options))
    assert [path.name for path in sorted((tmp_path / "a").glob("nonfinite-*"))] == [
        f"nonfinite-{step:08d}" for step in (3, 5, 6, 9, 10)
    ]
    forget_accelerator()
    with monkeypatch.context() as patch:
        rows = spoil_pictures(patch, {1, 3, 4, 5})
        with pytest.raises(FloatingPointError) as error:
            example.main(tiny_arguments(pairs, tmp_path / "b", log_every=log_every, **options))
    message = str(error.value)
    assert message.startswith("3 steps in a row were not finite (max_nonfinite_steps is 3); step 3: loss ")
    assert all(f"step {step}: " in message and f"nonfinite-{step:08d}" in message for step in (3, 4, 5))
    assert str(rows[3]).strip("[]") in message and "step 1:" not in message
    assert not list_checkpoints(tmp_path / "b")


def test_the_count_goes_on_in_a_resumed_run(example, pairs, tmp_path, monkeypatch):
    options = {**EVERY_STEP, "max_nonfinite_steps": 3}
    spoil_pictures(monkeypatch, {4, 5, 6})
    with pytest.raises(FloatingPointError):
        example.main(tiny_arguments(pairs, tmp_path, **options))
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-00000005"
    kept = (tmp_path / "nonfinite-00000006" / "process-0.safetensors").read_bytes()
    forget_accelerator()
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite.*step 6:"):
        example.main([*tiny_arguments(pairs, tmp_path, **options), "--resume"])
    # the same step, with the same rows and generators
    assert (tmp_path / "nonfinite-00000006" / "process-0.safetensors").read_bytes() == kept
    forget_accelerator()
    example.main([*tiny_arguments(pairs, tmp_path, **{**options, "max_nonfinite_steps": 4}), "--resume"])
    assert checkpoint(tmp_path, 10)[1]["nonfinite"] == {"total": 3, "in_a_row": 0}


def test_a_rate_that_is_too_high_stops_the_run_and_is_never_saved(example, pairs, tmp_path):
    options = {"base_learning_rate": 1e38, "warmup_epochs": 0, "save_every_epochs": 1}
    for log_every in (1, 100):
        directory = tmp_path / str(log_every)
        with pytest.raises(FloatingPointError, match="3 steps in a row were not finite.*step 2: loss (nan|inf)"):
            example.main(tiny_arguments(pairs, directory, log_every=log_every, **options))
        assert not list_checkpoints(directory)
        forget_accelerator()
    # finite gradients may still throw the weights out of range
    with pytest.raises(FloatingPointError, match=r"not saved: at step 1 \d+ tensors of the .* contain NaN"):
        example.main(
            tiny_arguments(pairs, tmp_path / "c", **options | {"save_every_epochs": 0.2, "weight_decay": 1e9})
        )
    assert not list_checkpoints(tmp_path / "c")


def test_a_scaler_may_search_but_not_for_ever(tmp_path):
    """fp16: a gradient that overflows under a large factor is skipped and not counted; under a factor of 1 it is."""
    weight = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.Module()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**2)
    guard = NonFiniteGuard(tmp_path, 2, model, SimpleNamespace(teachers=lambda: ()))
    accelerator = SimpleNamespace(
        distributed_type="NO", scaler=scaler, unscale_gradients=lambda: scaler.unscale_(optimizer)
    )
    engine = SimpleNamespace(
        accelerator=accelerator,
        run=SimpleNamespace(max_grad_norm=None),
        student=SimpleNamespace(parameters=lambda: iter([weight])),
        optimizer=SimpleNamespace(optimizer=optimizer),
        guard=guard,
    )

    def step(number: int, gradient: float, loss: float = 1.0) -> float:
        guard.before(number, {}, 0.0)
        weight.grad = torch.full((3,), gradient) * scaler.scale(torch.ones(()))
        applied = float(Engine._update(engine, torch.tensor(loss)))
        guard.settle()
        return applied

    assert step(1, 1.0) == 1 and not torch.equal(weight, torch.ones(3))
    reference = weight.detach().clone()
    for number, scale in ((2, 2.0), (3, 1.0)):
        assert step(number, float("inf")) == 0 and scaler.get_scale() == scale and guard.total == 0
    assert step(4, float("inf")) == 0 and (guard.total, guard.in_a_row) == (1, 1)
    assert torch.equal(weight, reference) and optimizer.state[weight]["step"] == 1
    # scaler.step would have applied this one: the gradient is finite
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        step(5, 1.0, loss=float("nan"))
    assert torch.equal(weight, reference)


def test_the_norm_sees_every_gradient():
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    for weight in weights[:2]:
        weight.grad = torch.full((2, 2), 2.0)
    assert gradient_norm(weights) == pytest.approx(32**0.5)
    for value in ("nan", "inf", "-inf"):
        weights[1].grad[0, 1] = float(value)
        assert not gradient_norm(weights).isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("spoilt", [(), (4,)], ids=["finite", "spoilt"])
def test_an_accelerator_is_not_waited_for_between_lines_of_the_log(
    example, pairs, tmp_path, monkeypatch, family, spoilt
):
    """A step that is not applied makes the host wait no more than one that is."""
    train_step, weights = Engine._train_step, {}

    def watched(self, batches):
        if self.step + 1 in spoilt:
            batches["pairs"]["pixel_values"][3, 0, 5, 5] = 3e38
        pairs = {name: value.pin_memory() for name, value in batches["pairs"].items()}
        torch.cuda.set_sync_debug_mode("error" if self.step > 1 else "default")
        try:
            told = train_step(self, {"pairs": pairs})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        weights[self.step] = max(self.model.parameters(), key=torch.numel).detach().clone()
        return told

    monkeypatch.setattr(Engine, "_train_step", watched)
    options = {"log_every": 100, "mixed_precision": "bf16", "max_grad_norm": 1.0}
    example.main(tiny_arguments(pairs, tmp_path, family.name, **options))
    assert len(weights) == 10
    for step in range(2, 11):
        assert torch.equal(weights[step], weights[step - 1]) == (step in spoilt), step
