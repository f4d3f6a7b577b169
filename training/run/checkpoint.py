"""Saves and loads checkpoints: directories of safetensors and JSON files, written under another name and then renamed.

Accelerate's own `save_state` pickles optimiser and random states, and we never unpickle.
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
# key of state.json: stems of the safetensors files
FILES = "files"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, missing, or belongs to another run; the message names the file and the reason."""


def save_checkpoint(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    copied: bool = False,
) -> Path:
    """
    Writes `directory/checkpoint-STEP` and removes all but the last `keep` checkpoints.

    Args:
        tensors: File stem -> tensors by name; one safetensors file each.
        state: All other state, JSON-serialisable.
        copied: The tensors are a `HostCopy` and are not copied again.

    An old checkpoint that cannot be removed stays, with a warning.

    Raises:
        CheckpointError: it cannot be written (no space, no permission); earlier checkpoints are intact, and no partial
            files remain.
    """
    directory = Path(directory)
    final = directory / f"{PREFIX}{step:08d}"

    # written under another name and then renamed, so that all checkpoints are complete at any moment
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
        raise CheckpointError(f"{final}: cannot be written, earlier checkpoints are as they were: {error}") from error

    # the new one is complete; failing to remove old ones is only a warning
    for old in list_checkpoints(directory)[:-keep]:
        try:
            _discard(old)
        except OSError as error:
            logger.warning_once(f"{old} is no longer needed, but cannot be removed: {error}")
    return final


def check_finite(step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Raises `FloatingPointError` for NaN or infinity, from which a resumed run could not recover."""
    for stem in ("model", "objective"):
        spoiled = [n for n, v in tensors[stem].items() if v.is_floating_point() and not v.isfinite().all()]
        if spoiled:
            raise FloatingPointError(
                f"not saved: at step {step} {len(spoiled)} tensors of the {stem} contain NaN or infinity: "
                f"{spoiled[:5]}; lower the learning rate"
            )


def sweep(directory: str | Path) -> None:
    """Removes leftovers of runs that were killed while writing or removing a checkpoint."""
    for left in Path(directory).glob(f".{PREFIX}*.partial*"):
        _remove(left)


def _discard(path: Path) -> None:
    """Removes a checkpoint. Raises OSError if it cannot even be renamed."""
    # renamed first: a kill during the removal would otherwise leave a damaged checkpoint
    _remove(path.rename(_unused(path.with_name(f".{path.name}.discarded.partial"))))


def _remove(path: Path) -> None:
    """Removes a directory, or a link but not its target; warns if it cannot be removed, for example a file in use."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning_once(f"{path} is left over and cannot be removed: {error}")


def _unused(path: Path) -> Path:
    """The path, or if it exists because it could not be removed, the path with a number appended."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return path if not os.path.lexists(path) else next(one for one in numbered if not os.path.lexists(one))


def _write(
    directory: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], copied: bool
) -> None:
    # one safetensors file per stem
    directory.mkdir(parents=True)
    for stem, content in tensors.items():
        # cloned, because safetensors refuses tied tensors
        if not copied:
            content = {name: value.detach().cpu().clone().contiguous() for name, value in content.items()}
        save_file(content, directory / f"{stem}.safetensors")
    text = json.dumps({**state, FILES: sorted(tensors)}, indent=1)
    (directory / STATE).write_text(text, encoding="utf-8")

    # write digests, and flush everything to disk before the rename
    manifest = {file.name: sha256_of(file) for file in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    set_modes(directory)
    for file in directory.iterdir():
        flush(file)
    flush(directory)


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints in order of their steps, including damaged ones."""
    # the name is checked first, so that other entries are not accessed
    paths = [path for path in Path(directory).glob(f"{PREFIX}*") if step_of(path) is not None and path.is_dir()]
    return sorted(paths, key=step_of)


def step_of(path: str | Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    number = Path(path).name.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


def find_checkpoint(directory: str | Path) -> Path | None:
    """
    The last intact checkpoint of a run; None if there are no checkpoints. Damaged ones are skipped with a warning.

    Raises:
        CheckpointError: all checkpoints are damaged; silently starting again would lose the run.
    """
    # the newest first
    damage = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning(f"{path} is damaged and skipped: {error}")
            damage.append(str(error))
            continue
        return path
    if damage:
        raise CheckpointError(f"{directory}: all checkpoints are damaged; " + "; ".join(damage))
    return None


def set_aside(directory: str | Path, step: int) -> list[Path]:
    """
    Renames the checkpoints after `step` to `passed-over-checkpoint-...`, so that no later resume uses them: they are
    damaged, or belong to a continuation that is being abandoned. Returns the new paths.
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
    Raises `CheckpointError` that names the first file that is missing, unreadable or changed. Hidden files are
    ignored, since file systems and desktops create their own.
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

    # exactly the files in the manifest must exist, unchanged
    for name, digest in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        try:
            written = sha256_of(path / name)
        except OSError as error:  # errors of reading, unlike those of opening, do not name the file
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from error
        if written != digest:
            raise CheckpointError(f"{path / name}: was changed or damaged since it was written")
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if foreign := sorted(names - {*manifest, MANIFEST}):
        raise CheckpointError(f"{path}: contains {foreign}, which its {MANIFEST} does not list")


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Verifies a checkpoint and returns its tensors by file stem, and its state. Raises `CheckpointError`."""
    path = Path(path)
    verify(path)
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Like `load_checkpoint`, for a verified checkpoint."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        stems = state.pop(FILES, None)
        if stems is None:
            raise CheckpointError(f"{path / STATE}: lacks {FILES!r}; it was written by an earlier version of oner")
        return {stem: load_file(path / f"{stem}.safetensors") for stem in stems}, state
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Loads all weights and buffers of the model. Raises `CheckpointError` with the keys that do not fit."""
    # unsharded shapes; tied weights under each of their names
    shapes = full_shapes(model)
    wrong = {
        name: f"{tuple(value.shape)}, expected {tuple(shapes[name])}"
        for name, value in weights.items()
        if name in shapes and value.shape != shapes[name]
    }
    if wrong:
        raise CheckpointError(f"{path}: wrong shapes {dict(list(wrong.items())[:10])}")

    # names are checked last, because a wrong shape is more informative
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
    Restores the moments of each parameter. Learning rates, betas and decay are those of the current run.

    Raises:
        CheckpointError: the parameters are grouped differently, or keys or shapes do not fit.
    """
    # names in the state are `INDEX.NAME`; collect them by the parameter's index
    parameters = sum(len(group["params"]) for group in groups)
    names: dict[str, set[str]] = {}
    for key in tensors:
        index, _, name = key.partition(".")
        if not index.isdigit() or int(index) >= parameters or not name:
            raise CheckpointError(f"{path}: the optimiser's state has {key!r}; expected a number below {parameters} "
                                  f"and a name")  # fmt: skip
        names.setdefault(index, set()).add(name)

    # every parameter must have the same kinds of moments
    if len(kinds := {frozenset(moments) for moments in names.values()}) > 1:
        different = sorted(map(sorted, kinds))
        raise CheckpointError(f"{path}: the optimiser's state is not the same for all parameters: {different}")
    try:
        load_full_optimizer_state(optimizer, tensors, groups)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process's random generators in torch, numpy and Python, as tensors."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()

    # Mersenne Twister: 624 keys, the position, and the cached second value of a pair of normal draws
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.array([*keys, position, has_gauss, _bits(cached)], dtype=np.int64))
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor([*internal, version, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64)
    return tensors


def restore_random_state(tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `random_state`."""
    # cloned: torch reads from the start of the storage, and crashes on a row of a larger tensor
    torch.set_rng_state(tensors["cpu"].clone())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].clone())
    *keys, position, has_gauss, cached = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _number(cached)))
    *internal, version, has_gauss, gauss = tensors["python"].tolist()
    random.setstate((version, tuple(internal), _number(gauss) if has_gauss else None))


def _bits(number: float) -> int:
    # the bits of a float as an integer, so that one integer tensor can hold everything
    return int(np.float64(number).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
