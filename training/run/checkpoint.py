"""A checkpoint is a directory of safetensors and JSON, written beside and renamed into place.

Accelerate's own `save_state` pickles optimiser and random states, so it cannot be used here: nothing unpickles.
"""

import json
import os
import random
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from oner.training.parallel.sharding import full_shapes, load_full_optimizer_state, load_full_state
from oner.training.publishing.digests import sha256_of
from oner.training.publishing.placing import flush, set_modes

logger = logging.get_logger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
STATE = "state.json"
# in state.json, the stems of the safetensors files
FILES = "files"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, missing, or of another run; the message names the file and the reason."""


def save_checkpoint(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    copied: bool = False,
) -> Path:
    """
    Writes `directory/checkpoint-STEP` and removes all but the last `keep`.

    Args:
        tensors: File stem -> tensors by name; one safetensors file each.
        state: What else there is to keep, JSON-serialisable.
        copied: The tensors are a `HostCopy`, and no other copy is made of them.

    An old one that cannot be removed stays, and a warning names it.

    Raises:
        CheckpointError: it cannot be written (no space, no permission); earlier ones are whole, nothing is left over.
    """
    directory = Path(directory)
    final = directory / f"{PREFIX}{step:08d}"

    # written beside and renamed: at any moment the directory holds whole checkpoints only
    sweep(directory)
    partial = _unused(directory / f".{final.name}.partial")
    try:
        _write(partial, tensors, state, copied)
        if final.exists():
            _discard(final)
        partial.rename(final)
        flush(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written, checkpoints before it are as they were: {error}"
        ) from error

    # the new one stands, whatever becomes of the old ones
    for old in list_checkpoints(directory)[:-keep]:
        try:
            _discard(old)
        except OSError as error:
            logger.warning_once(f"{old} is no longer needed, but cannot be removed: {error}")
    return final


def check_finite(step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Raises `FloatingPointError`: a run that goes on from NaN stays NaN."""
    for stem in ("model", "objective"):
        spoiled = [n for n, v in tensors[stem].items() if v.is_floating_point() and not v.isfinite().all()]
        if spoiled:
            raise FloatingPointError(
                f"not saved: at step {step} NaN or infinity is in {len(spoiled)} tensors of the {stem}: "
                f"{spoiled[:5]}; lower the learning rate"
            )


def sweep(directory: str | Path) -> None:
    """Removes what runs left that were killed while they wrote or removed a checkpoint."""
    for left in Path(directory).glob(f".{PREFIX}*.partial*"):
        _remove(left)


def _discard(path: Path) -> None:
    """Raises OSError if it stays in its place."""
    # renamed first: a kill in the midst of the removal would leave a damaged checkpoint
    _remove(path.rename(_unused(path.with_name(f".{path.name}.discarded.partial"))))


def _remove(path: Path) -> None:
    """A directory, or a link to one, which stays; a warning names what cannot be removed, such as a file in use."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning_once(f"{path} is left over, and cannot be removed: {error}")


def _unused(path: Path) -> Path:
    """The path, or where something stands there that could not be removed, the same with a number behind it."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return path if not os.path.lexists(path) else next(one for one in numbered if not os.path.lexists(one))


def _write(
    directory: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], copied: bool
) -> None:
    # a safetensors file for each stem
    directory.mkdir(parents=True)
    for stem, content in tensors.items():
        # a clone of its own for each: safetensors refuses tied tensors, and a checkpoint has no use for ties
        if not copied:
            content = {name: value.detach().cpu().clone().contiguous() for name, value in content.items()}
        save_file(content, directory / f"{stem}.safetensors")
    text = json.dumps({**state, FILES: sorted(tensors)}, indent=1)
    (directory / STATE).write_text(text, encoding="utf-8")

    # digests of all that, and then all of it onto the disk before the rename
    manifest = {file.name: sha256_of(file) for file in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    set_modes(directory)
    for file in directory.iterdir():
        flush(file)
    flush(directory)


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints by step, the last one last, whole or not."""
    # by names first: what else lies there is not looked at
    paths = [path for path in Path(directory).glob(f"{PREFIX}*") if step_of(path) is not None and path.is_dir()]
    return sorted(paths, key=step_of)


def step_of(path: str | Path) -> int | None:
    """The step in a checkpoint's name, None if it is not one's."""
    number = Path(path).name.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


def find_checkpoint(directory: str | Path) -> Path | None:
    """
    The last whole checkpoint of a run; None if there is none at all. Damaged ones are passed over, and named.

    Raises:
        CheckpointError: there are some, but not one is whole: to begin anew in silence would be to lose the run.
    """
    # the newest first
    damage = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning(f"{path} is damaged and passed over: {error}")
            damage.append(str(error))
            continue
        return path
    if damage:
        raise CheckpointError(f"{directory}: no checkpoint is whole; " + "; ".join(damage))
    return None


def set_aside(directory: str | Path, step: int) -> list[Path]:
    """
    Renames the checkpoints after `step` to `passed-over-checkpoint-...`, where no later resume takes them up: they are
    damaged, or belong to a course of the run that is being left. Returns the new paths.
    """
    moved = []
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            target = path.with_name(f"passed-over-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(_unused(target)))
    return moved


def verify(path: str | Path) -> None:
    """
    Raises `CheckpointError` that names the first file that is missing, cannot be read, or whose bytes are not those
    written. Hidden files are not looked at: file systems and desktops put their own there.
    """
    path = Path(path)
    try:
        _verify(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _verify(path: Path) -> None:
    # the manifest
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise CheckpointError(f"{path / MANIFEST}: expected the digests of {STATE} and others, got {manifest!r:.80}")

    # what it names is there, byte for byte, and nothing else is
    for name, digest in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        try:
            written = sha256_of(path / name)
        except OSError as error:  # an error of reading, unlike one of opening, does not say which file it was
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from error
        if written != digest:
            raise CheckpointError(f"{path / name}: its bytes are not those that were written")
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if foreign := sorted(names - {*manifest, MANIFEST}):
        raise CheckpointError(f"{path}: holds {foreign}, which its {MANIFEST} does not name")


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors by file stem, and the state. Raises `CheckpointError`."""
    path = Path(path)
    verify(path)
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """`load_checkpoint` of one that was verified."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        stems = state.pop(FILES, None)
        if stems is None:
            raise CheckpointError(f"{path / STATE}: lacks {FILES!r}; it was written by an earlier version of oner")
        return {stem: load_file(path / f"{stem}.safetensors") for stem in stems}, state
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """All weights and buffers of the model, or a `CheckpointError` that lists the keys that do not fit."""
    # as if nothing were spread over processes; tied weights under each of their names
    shapes = full_shapes(model)
    wrong = {
        name: f"{tuple(value.shape)}, expected {tuple(shapes[name])}"
        for name, value in weights.items()
        if name in shapes and value.shape != shapes[name]
    }
    if wrong:
        raise CheckpointError(f"{path}: wrong shapes {dict(list(wrong.items())[:10])}")

    # names last: a wrong shape says more than a missing name
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing keys {missing[:10]}, unexpected keys {unexpected[:10]}")
    load_full_state(model, weights)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    groups: list[dict[str, Any]],
    path: str | Path,
) -> None:
    """
    The moments of each parameter. Rates, betas and decay are the run's own: the same, unless changes were allowed.

    Raises:
        CheckpointError: the parameters are grouped in another way, or keys or shapes are not theirs.
    """
    # names of the state, `INDEX.NAME`, gathered by the parameter's index
    parameters = sum(len(group["params"]) for group in groups)
    names: dict[str, set[str]] = {}
    for key in tensors:
        index, _, name = key.partition(".")
        if not index.isdigit() or int(index) >= parameters or not name:
            raise CheckpointError(f"{path}: the optimiser's state holds {key!r}; expected a number below {parameters} "
                                  f"and a name")  # fmt: skip
        names.setdefault(index, set()).add(name)

    # every parameter has the same kinds of moments
    if len(kinds := {frozenset(moments) for moments in names.values()}) > 1:
        different = sorted(map(sorted, kinds))
        raise CheckpointError(f"{path}: the optimiser's state is not the same for all parameters: {different}")
    try:
        load_full_optimizer_state(optimizer, tensors, groups)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def random_state() -> dict[str, torch.Tensor]:
    """This process's generators of torch, numpy and Python, as tensors."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()

    # Mersenne Twister: 624 keys, its position, and the half of a pair of normal draws that is not yet given
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.array([*keys, position, has_gauss, _bits(cached)], dtype=np.int64))
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor([*internal, version, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64)
    return tensors


def restore_random_state(tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `random_state`."""
    # a copy: torch reads from the start of the storage, and crashes on a row of several states
    torch.set_rng_state(tensors["cpu"].clone())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].clone())
    *keys, position, has_gauss, cached = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _number(cached)))
    *internal, version, has_gauss, gauss = tensors["python"].tolist()
    random.setstate((version, tuple(internal), _number(gauss) if has_gauss else None))


def _bits(number: float) -> int:
    # a float's bits as an integer, so that one integer tensor holds all
    return int(np.float64(number).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
