"""A checkpoint is a directory of safetensors and JSON, written beside and renamed into place.

Accelerate's own `save_state` pickles optimiser and random states, so it cannot be used here: nothing unpickles.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, missing, or of another run; the message names the file and the reason."""


def save_checkpoint(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """
    Writes `directory/checkpoint-STEP` and removes all but the last `keep`.

    Args:
        tensors: File stem -> tensors by name; one safetensors file each.
        state: What else there is to keep, JSON-serialisable.
    """
    directory = Path(directory)
    final = directory / f"{PREFIX}{step:08d}"
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stem, content in tensors.items():
        # a clone of its own for each: safetensors refuses tied tensors, and a checkpoint has no use for ties
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in content.items()},
                  partial / f"{stem}.safetensors")  # fmt: skip
    (partial / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
    manifest = {file.name: sha256_of(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(directory)
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints by step, the last one last, whole or not."""
    return sorted(path for path in Path(directory).glob(f"{PREFIX}*") if path.is_dir())


def find_checkpoint(directory: str | Path) -> Path | None:
    """The last whole checkpoint of a run, or None; damaged ones are passed over."""
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


def verify(path: str | Path) -> None:
    """Raises `CheckpointError` that names the first file that is missing or whose bytes are not those written."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / MANIFEST}: expected a mapping of digests, got {type(manifest).__name__}")
    for name, digest in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if sha256_of(path / name) != digest:
            raise CheckpointError(f"{path / name}: its bytes are not those that were written")


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors by file stem, and the state. Raises `CheckpointError`."""
    path = Path(path)
    verify(path)
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """All weights and buffers of the model, or a `CheckpointError` that lists the keys that do not fit."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    wrong = {
        name: f"{tuple(value.shape)}, expected {tuple(shapes[name])}"
        for name, value in weights.items()
        if name in shapes and value.shape != shapes[name]
    }
    if wrong:
        raise CheckpointError(f"{path}: wrong shapes {dict(list(wrong.items())[:10])}")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing keys {missing[:10]}, unexpected keys {unexpected[:10]}")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """AdamW's state as tensors by "index.name", and its groups as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """
    The moments of each parameter. Rates, betas and decay are the run's own: the same, unless changes were allowed.

    Raises:
        CheckpointError: the parameters are grouped in another way.
    """
    current = optimizer.state_dict()["param_groups"]
    theirs, mine = [[len(group["params"]) for group in one] for one in (groups, current)]
    if theirs != mine:
        raise CheckpointError(f"the optimiser's groups hold {theirs} parameters, expected {mine}")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": current})


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """This process's generators: tensors, and what fits into JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {"numpy": [name, int(position), int(has_gauss), float(cached)], "python": [version, gauss]}


def restore_random_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    name, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
