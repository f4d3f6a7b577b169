"""Checkpoints: whole or not there at all, checked by digest, and never unpickled."""

import json
import pickletools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny_oner import tiny_config

from oner.modeling.modeling_oner import OneRModel
from oner.training.parallel.sharding import full_optimizer_state
from oner.training.run import checkpoint
from oner.training.run.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
    set_aside,
    verify,
)

NAMES = ("model.safetensors", "objective.safetensors", "state.json", "manifest.json")


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
    tensors, groups = full_optimizer_state(optimizer)
    path = save_checkpoint(tmp_path, 4, {"model": undisturbed.state_dict(), "optimizer": tensors}, {"groups": groups})
    steps(undisturbed, optimizer, range(14, 18))

    loaded, state = load_checkpoint(path)
    resumed, fresh = build()
    resumed.load_state_dict(loaded["model"])
    restore_optimizer(fresh, loaded["optimizer"], state["groups"], path)
    steps(resumed, fresh, range(14, 18))
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, value in full_optimizer_state(optimizer)[0].items():
        assert torch.equal(value, full_optimizer_state(fresh)[0][name]), name


def test_a_changed_hyperparameter_is_not_undone_by_resuming():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    old = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    weight.sum().backward()
    old.step()
    tensors, groups = full_optimizer_state(old)
    new = torch.optim.AdamW([weight], lr=0.2, weight_decay=0.5)
    restore_optimizer(new, tensors, groups, "here")
    assert new.param_groups[0]["weight_decay"] == 0.5 and new.param_groups[0]["lr"] == 0.2
    assert torch.equal(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"7.exp_avg": torch.zeros(2)}, r"has '7\.exp_avg'; expected a number below 2"),
        (lambda t: t | {"exp_avg": torch.zeros(2)}, r"has 'exp_avg'; expected a number"),
        (lambda t: t | {"1.exp_avg": torch.zeros(3)}, r"1\.exp_avg has shape \(3,\), expected \(2,\)"),
        (
            lambda t: {k: v for k, v in t.items() if k != "1.exp_avg_sq"},
            "not the same for all .*'exp_avg_sq'",
        ),
    ],
    ids=["foreign", "nameless", "shape", "missing"],
)
def test_an_optimiser_state_with_other_keys_is_refused(change, said):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    tensors, groups = full_optimizer_state(optimizer)
    restore_optimizer(optimizer, tensors, groups, "here")
    with pytest.raises(CheckpointError, match=said):
        restore_optimizer(optimizer, change(tensors), groups, "here")


def test_an_optimiser_of_other_groups_is_refused():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    old = torch.optim.AdamW(weights, lr=0.1)
    sum(weight.sum() for weight in weights).backward()
    old.step()
    tensors, groups = full_optimizer_state(old)
    with pytest.raises(CheckpointError, match=r"\[3\] parameters, expected \[2, 1\]"):
        restore_optimizer(
            torch.optim.AdamW([{"params": weights[:2]}, {"params": weights[2:]}]), tensors, groups, "here"
        )


def test_the_generators_of_torch_numpy_and_python_go_on(tmp_path):
    def draw() -> tuple:
        return torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    for odd in (True, False):  # an odd number of draws leaves a cached gauss behind
        np.random.standard_normal(2 + odd)
        random.gauss(0, 1)
        if not odd:
            random.gauss(0, 1)
        path = save_checkpoint(tmp_path, int(odd), {"random": random_state()}, {})
        expected = draw()
        assert draw() != expected
        restore_random_state(load_checkpoint(path)[0]["random"])
        assert draw() == expected


def test_a_crash_before_the_rename_leaves_the_earlier_one(tmp_path, monkeypatch):
    earlier = save(tmp_path, 1)

    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def crash(self, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert find_checkpoint(tmp_path) == earlier == list_checkpoints(tmp_path)[-1]
    later = save(tmp_path, 3)  # and what is left over is cleared away, of whatever step
    assert find_checkpoint(tmp_path) == later
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "checkpoint-00000003"]


def test_a_crash_while_an_old_one_is_removed_leaves_whole_ones(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    remove = checkpoint.shutil.rmtree

    class Killed(BaseException):
        pass

    def crash(path, **options):
        if "discarded" not in path.name:
            return remove(path, **options)
        next(path.glob("*.safetensors")).unlink()
        raise Killed

    for step, keep in ((3, 1), (3, 9)):  # one too many, and one that is written again
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", crash)
            with pytest.raises(Killed):
                save(tmp_path, step, keep=keep)
        for path in list_checkpoints(tmp_path):
            verify(path)
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000004"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), SafetensorError("I/O error")])
def test_a_file_that_cannot_be_written_is_a_typed_error_and_leaves_the_earlier_ones(tmp_path, monkeypatch, error):
    earlier = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in earlier.iterdir()}
    write = checkpoint.save_file

    def fail(tensors, file):
        write(tensors, file)
        file.write_bytes(file.read_bytes()[:20])
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match=f"checkpoint-00000002: cannot be written.*{error}"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert find_checkpoint(tmp_path) == earlier
    assert {path: path.read_bytes() for path in earlier.iterdir()} == before


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
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_an_error_that_names_the_file_and_is_passed_over(tmp_path, name, how):
    earlier, last = save(tmp_path, 1), save(tmp_path, 2)
    damage(last / name, how)
    # a flipped bit of the manifest is a digest, or a name, that fits no more
    named = "checkpoint-00000002/" if name == "manifest.json" and how == "flipped" else f"checkpoint-00000002/{name}"
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(last)
    verify(earlier)
    assert find_checkpoint(tmp_path) == earlier


@pytest.mark.parametrize("content", ["[]", "{}", '{"model.safetensors": "00"}'])
def test_a_manifest_that_names_no_state_is_damage(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected the digests of state\.json"):
        verify(path)


def test_a_file_that_no_digest_vouches_for_is_damage(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"contains \['extra\.safetensors'\], which its manifest\.json"):
        load_checkpoint(path)


def every_kibibyte(path: Path) -> list[int]:
    return [*range(0, path.stat().st_size, 1024), path.stat().st_size - 1]


def test_a_checkpoint_cut_at_any_kibibyte_or_flipped_anywhere_is_named(tmp_path):
    """Each file cut at each KiB and a byte before its end, and a bit turned at each of these places."""
    tensors = some_tensors() | {"optimizer": {"0.exp_avg": torch.randn(4, 3000)}}
    path = save_checkpoint(tmp_path, 1, tensors, {"step": 1, "arguments": {str(n): n for n in range(100)}})
    files, cases = sorted(path.iterdir()), 0
    for file in files:
        whole = file.read_bytes()
        for place in every_kibibyte(file):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            for damaged in (whole[:place], bytes(flipped)):
                file.write_bytes(damaged)
                # a turned bit of the manifest may show at another file: its digest, or its name, fits no more
                with pytest.raises(CheckpointError, match=path.name if file.name == "manifest.json" else file.name):
                    load_checkpoint(path)
                cases += 1
        file.write_bytes(whole)
    load_checkpoint(path)
    assert len(files) == 5 and cases > 110


def test_none_whole_is_not_none_at_all(tmp_path):
    assert find_checkpoint(tmp_path) is None
    for step in (1, 2):
        damage(save(tmp_path, step) / "model.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"checkpoints are damaged; .*-00000002/model\.s.*-00000001/model\.s"):
        find_checkpoint(tmp_path)


def spoil_reading(path: Path) -> None:
    """Reading it gives EIO, as on a bad sector."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


UNREADABLE = {
    "a file gives EIO": lambda path: spoil_reading(path / "model.safetensors"),
    "the manifest gives EIO": lambda path: spoil_reading(path / "manifest.json"),
    "a file is a directory": lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
    "a file is a dead link": lambda path: ((path / "state.json").unlink(), (path / "state.json").symlink_to("gone")),
    "a file is a link to itself": lambda path: (
        (path / "state.json").unlink(),
        (path / "state.json").symlink_to("state.json"),
    ),
    "the manifest is nested too deep": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "the manifest is no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "the manifest holds numbers": lambda path: (path / "manifest.json").write_text('{"state.json": 7}'),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_one_that_cannot_be_read_is_passed_over_and_named(tmp_path, how, caplog):
    save(tmp_path, 1)
    spoiled = save(tmp_path, 2)
    UNREADABLE[how](spoiled)
    assert find_checkpoint(tmp_path).name == "checkpoint-00000001"
    assert f"{spoiled} is damaged and skipped: {spoiled}" in caplog.text
    with pytest.raises(CheckpointError, match=str(spoiled)):
        load_checkpoint(spoiled)
    set_aside(tmp_path, 1)
    assert list_checkpoints(save(tmp_path, 2).parent)[-1] == spoiled and verify(spoiled) is None


@pytest.mark.parametrize("what", ["open", "iterdir"])
def test_a_permission_that_is_missing_is_named(tmp_path, monkeypatch, caplog, what):
    save(tmp_path, 1)
    spoiled = save(tmp_path, 2)
    opened, listed = open, Path.iterdir

    def refuse_open(file, *arguments, **options):
        if str(file) == str(spoiled / "model.safetensors"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    def refuse_iterdir(self):
        if self == spoiled:
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    with monkeypatch.context() as patch:
        if what == "open":
            patch.setattr("builtins.open", refuse_open)
        else:
            patch.setattr(Path, "iterdir", refuse_iterdir)
        assert find_checkpoint(tmp_path).name == "checkpoint-00000001"
    assert "cannot be read: Permission denied" in caplog.text


def test_what_the_system_puts_into_a_checkpoint_is_no_damage(tmp_path):
    path = save(tmp_path, 1)
    for name in (".DS_Store", ".nfs0001", ".model.safetensors.a8Xk2p"):
        (path / name).write_text("x")
    verify(path)
    (path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"contains \['notes.txt'\], which its manifest.json does not list"):
        verify(path)


@pytest.mark.parametrize("where", ["rename", "rmtree"])
def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog, where):
    """As of another owner, or with a file that another program holds open; root may remove all, so it is acted."""
    old = save(tmp_path, 1)
    rename, rmtree = Path.rename, checkpoint.shutil.rmtree

    def refuse_rename(self, target):
        if self == old:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    def refuse_rmtree(path, **options):
        if "00000001" in str(path):
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr(Path, "rename", refuse_rename)
        else:
            patch.setattr(checkpoint.shutil, "rmtree", refuse_rmtree)
        for step in (2, 3, 4):
            verify(save(tmp_path, step, keep=1))
        checkpoint.sweep(tmp_path)
    assert "cannot be removed: [Errno" in caplog.text and "00000001" in caplog.text
    assert find_checkpoint(tmp_path).name == "checkpoint-00000004"
    # and once it can be
    save(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000005"]


def test_a_link_to_a_checkpoint_is_removed_and_what_it_leads_to_is_not(tmp_path):
    store = tmp_path / "store"
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", 1).rename(store)
    (tmp_path / "run" / "checkpoint-00000001").symlink_to(store)
    for step in (2, 3):
        save(tmp_path / "run", step, keep=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-00000003"]
    verify(store)


def test_the_course_that_was_left_is_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    assert [path.name for path in set_aside(tmp_path, 1)] == [
        "passed-over-checkpoint-00000002", "passed-over-checkpoint-00000003"
    ]  # fmt: skip
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000001"]
    save(tmp_path, 2, keep=1)  # and does not count among those kept
    assert find_checkpoint(tmp_path).name == "checkpoint-00000002" and len(list_checkpoints(tmp_path)) == 1
    assert set_aside(tmp_path, 1) and not set_aside(tmp_path, 1)


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
    tensors, groups = full_optimizer_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    path = save_checkpoint(
        tmp_path, 1, {**some_tensors(), "optimizer": tensors, "random": random_state()}, {"groups": groups}
    )
    for file in path.iterdir():
        assert file.suffix in (".json", ".safetensors")
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
            list(pickletools.genops(file.read_bytes()))
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    assert "import pickle" not in source and "torch.load" not in source and "torch.save" not in source
