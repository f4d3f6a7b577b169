"""Checkpoints: whole or not there at all, checked by digest, and never unpickled."""

import json
import pickletools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_oner import tiny_config

from oner.modeling.modeling_oner import OneRModel
from oner.training import checkpoint
from oner.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    flatten_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
    verify,
)

FILES = ("model.safetensors", "objective.safetensors", "state.json", "manifest.json")


def some_tensors() -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.randn(4, 6)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "transposed": weight.T,
            "half": torch.randn(3, 2).to(torch.bfloat16),
            "count": torch.tensor(2**40 + 1),
            "empty": torch.zeros(0, 5),
            "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        },
        "objective": {},
    }


def save(directory: Path, step: int, **options) -> Path:
    return save_checkpoint(directory, step, some_tensors(), {"step": step}, **options)


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    state = {"step": 7, "rate": 0.1, "text": "größe", "nested": [1, {"none": None}]}
    path = save_checkpoint(tmp_path, 7, tensors, state)
    assert path.name == "checkpoint-00000007"
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state and loaded.keys() == tensors.keys() and loaded["objective"] == {}
    assert loaded["model"].keys() == tensors["model"].keys()
    for name, value in tensors["model"].items():
        got = loaded["model"][name]
        assert got.dtype == value.dtype and got.shape == value.shape, name
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, value))
        assert torch.equal(one, other), name  # as bytes: NaN and -0.0 too


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimiser_goes_on_where_it_was(tmp_path, fused):
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
        matrices = [p for p in net.parameters() if p.ndim > 1]
        vectors = [p for p in net.parameters() if p.ndim == 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
        return net, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, fused=fused)

    def steps(net, optimizer, numbers) -> None:
        for number in numbers:
            torch.manual_seed(number)
            net(torch.randn(3, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    undisturbed, optimizer = build()
    steps(undisturbed, optimizer, range(10, 14))
    tensors, groups = flatten_optimizer(optimizer)
    path = save_checkpoint(tmp_path, 4, {"model": undisturbed.state_dict(), "optimizer": tensors}, {"groups": groups})
    steps(undisturbed, optimizer, range(14, 18))

    loaded, state = load_checkpoint(path)
    resumed, fresh = build()
    resumed.load_state_dict(loaded["model"])
    restore_optimizer(fresh, loaded["optimizer"], state["groups"])
    steps(resumed, fresh, range(14, 18))
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, value in flatten_optimizer(optimizer)[0].items():
        assert torch.equal(value, flatten_optimizer(fresh)[0][name]), name


def test_a_changed_hyperparameter_is_not_undone_by_resuming():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    old = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    weight.sum().backward()
    old.step()
    tensors, groups = flatten_optimizer(old)
    new = torch.optim.AdamW([weight], lr=0.2, weight_decay=0.5)
    restore_optimizer(new, tensors, groups)
    assert new.param_groups[0]["weight_decay"] == 0.5 and new.param_groups[0]["lr"] == 0.2
    assert torch.equal(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"])


def test_an_optimiser_of_other_groups_is_refused():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    old = torch.optim.AdamW(weights, lr=0.1)
    sum(weight.sum() for weight in weights).backward()
    old.step()
    tensors, groups = flatten_optimizer(old)
    with pytest.raises(CheckpointError, match=r"\[3\] parameters, expected \[2, 1\]"):
        restore_optimizer(torch.optim.AdamW([{"params": weights[:2]}, {"params": weights[2:]}]), tensors, groups)


def test_the_generators_of_torch_numpy_and_python_go_on(tmp_path):
    np.random.standard_normal(3)  # an odd number leaves a cached gauss behind
    random.gauss(0, 1)
    tensors, state = random_state()
    path = save_checkpoint(tmp_path, 0, {"random": tensors}, {"random": state})

    def draw() -> tuple:
        return torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    expected = draw()
    assert draw() != expected
    loaded, loaded_state = load_checkpoint(path)
    restore_random_state(loaded["random"], loaded_state["random"])
    assert draw() == expected


def test_a_crash_before_the_rename_leaves_the_earlier_one(tmp_path, monkeypatch):
    earlier = save(tmp_path, 1)

    def crash(self, target):
        raise OSError("power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(OSError, match="power"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert find_checkpoint(tmp_path) == earlier == list_checkpoints(tmp_path)[-1]
    later = save(tmp_path, 2)  # and what is left over does not hinder the next
    assert find_checkpoint(tmp_path) == later
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "checkpoint-00000002"]


def test_a_crash_in_the_midst_of_a_file_leaves_the_earlier_one(tmp_path, monkeypatch):
    earlier = save(tmp_path, 1)
    write = checkpoint.save_file

    def crash(tensors, file):
        write(tensors, file)
        file.write_bytes(file.read_bytes()[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == earlier


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_an_error_that_names_the_file_and_is_passed_over(tmp_path, name, how):
    earlier, last = save(tmp_path, 1), save(tmp_path, 2)
    damage(last / name, how)
    # a flipped bit of the manifest is a digest, or a name, that fits no more
    named = "checkpoint-00000002/" if name == "manifest.json" and how == "flipped" else f"checkpoint-00000002/{name}"
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(last)
    verify(earlier)
    assert find_checkpoint(tmp_path) == earlier


def test_a_manifest_that_is_no_mapping_is_damage(tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)


def test_a_checkpoint_that_is_not_there(tmp_path):
    assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(CheckpointError, match="nothing/manifest.json: cannot be read"):
        load_checkpoint(tmp_path / "nothing")


def test_the_last_k_are_kept(tmp_path):
    for step in (1, 20, 300, 4000):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000300", "checkpoint-00004000"]
    save(tmp_path, 5000, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00005000"]


def test_the_same_step_can_be_written_again(tmp_path):
    save(tmp_path, 3)
    path = save_checkpoint(tmp_path, 3, {"model": {"x": torch.ones(1)}}, {"second": True})
    assert load_checkpoint(path)[1] == {"second": True} and list_checkpoints(tmp_path) == [path]


def test_missing_and_foreign_keys_and_wrong_shapes_are_listed(tmp_path):
    model = OneRModel(tiny_config())
    weights = dict(model.state_dict())
    del weights["norm.weight"]
    weights["foreign.weight"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match=r"missing keys \['norm\.weight'\], unexpected keys \['foreign\.weight'\]"
    ):
        load_weights(model, weights, tmp_path)
    weights = dict(model.state_dict()) | {"norm.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"wrong shapes \{'norm\.bias': '\(3,\), expected \(32,\)'"):
        load_weights(model, weights, tmp_path)


def test_nothing_in_it_is_a_pickle(tmp_path):
    tensors, groups = flatten_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    path = save_checkpoint(
        tmp_path, 1, {**some_tensors(), "optimizer": tensors, "random": random_state()[0]}, {"groups": groups}
    )
    for file in path.iterdir():
        assert file.suffix in (".json", ".safetensors")
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
            list(pickletools.genops(file.read_bytes()))
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    assert "import pickle" not in source and "torch.load" not in source and "torch.save" not in source
