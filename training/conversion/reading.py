"""Reads the weights of foreign checkpoint files by name, and nothing else in them.

A `.pth` is a pickle, which may contain code. It is read with torch's weights-only unpickler, which refuses everything
except tensors, numbers and containers. Configuration objects and script arguments, which the official repositories
store with their weights, are replaced by empty objects: none of their classes is imported.
"""

import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

# classes in a configuration stored with the weights: hydra's in SIMLA's pretraining, argparse's in others
SIDE_NOTES = re.compile(
    r"omegaconf\.[\w.]+|argparse\.Namespace|typing\.Any|builtins\.(dict|list|tuple|int|float|str|bool)"
)
# keys under which repositories store the weights, beside optimiser, epoch and so on
WRAPPERS = ("model", "state_dict", "model_state_dict")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
CONFIGURATION = "config.json"


class CheckpointFileError(ValueError):
    """A file that is not a checkpoint of weights; the message names the file and the problem."""


class SideNote:
    """Replaces an object of a stored configuration; it keeps nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty(*args: object) -> dict:
    return {}


def read_weights(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a checkpoint by name, on the CPU.

    Args:
        source: A `.safetensors` file; a `.pth`, `.pt` or `.bin` file with the weights at the top or under "model" or
            "state_dict"; a directory that contains one; or a name on the Hub.

    Raises:
        CheckpointFileError: the file does not exist, cannot be read, or contains code or no tensors.
    """
    path = _find(source)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointFileError(f"{path}: cannot be read as safetensors: {error}") from error
    return _weights_in(path, _read_pickle(path))


def read_configuration(source: str | os.PathLike) -> dict[str, Any]:
    """
    Reads the `config.json` beside the weights that `read_weights` reads; empty if there is none.

    Raises:
        CheckpointFileError: the source does not exist, or the file is not a JSON object.
    """
    beside = _find(source).parent / CONFIGURATION
    if not beside.is_file() and not Path(source).exists():
        # for a name on the Hub only the weights were fetched
        found = cached_file(str(source), CONFIGURATION, _raise_exceptions_for_missing_entries=False)
        beside = Path(found) if found is not None else beside
    if not beside.is_file():
        return {}
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointFileError(f"{beside}: cannot be read as JSON: {error}") from error
    if not isinstance(said, dict):
        raise CheckpointFileError(f"{beside}: expected a JSON object, got {type(said).__name__}")
    return said


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() and (path.suffix in (".safetensors", ".pth", ".pt", ".bin") or path.is_absolute()):
        raise CheckpointFileError(f"{path}: no such file")

    # a directory or a name on the Hub, the safest format first
    for name in WEIGHT_FILES:
        try:
            found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise CheckpointFileError(f"{source}: no such file or directory, nor on the Hub: {error}") from error
        if found is not None:
            return Path(found)
    raise CheckpointFileError(f"{source}: expected one of {', '.join(WEIGHT_FILES)} in it")


def _read_pickle(path: Path) -> object:
    # classes are refused by name before anything is read
    names = _foreign_names(path)
    refused = sorted(name for name in names if name != "collections.defaultdict" and not SIDE_NOTES.fullmatch(name))
    if refused:
        raise CheckpointFileError(
            f"{path}: contains {refused[:5]}, which is code or an object, not weights; expected tensors by name. If "
            "you trust its source, load it where it was made and save only its weights, "
            f"torch.save({{'model': state_dict}}, ...)"
        )
    # a defaultdict becomes an empty dictionary, every other class an empty object
    places = [(_empty if name == "collections.defaultdict" else SideNote, name) for name in sorted(names)]
    try:
        with torch.serialization.safe_globals(places):
            # memory-mapped, so that the optimiser's moments, twice the size of the weights, are not read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError, struct.error) as error:
        raise CheckpointFileError(f"{path}: cannot be read as weights: {error}") from error
    except Exception as error:
        # torch's unpickler raises pickle's own error class, which this package does not import
        if type(error).__name__ != "UnpicklingError":
            raise
        # torch's own text goes on with the advice to trust the file
        named = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
        what = (
            f"holds more than weights: {named[1]}" if named else "cannot be read as weights: no checkpoint of torch's"
        )
        raise CheckpointFileError(f"{path}: {what}") from error


def _foreign_names(path: Path) -> set[str]:
    """The classes and functions that a file names, except torch's own for tensors. No code of the file runs."""
    if not zipfile.is_zipfile(path):
        return set()  # torch's format before 1.6, or not a checkpoint: torch.load tells
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:
        raise CheckpointFileError(f"{path}: cannot be read as a checkpoint: {error}") from error


def _weights_in(path: Path, content: object) -> dict[str, torch.Tensor]:
    # the weights may be one level down
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointFileError(f"{path}: expected tensors by name, got {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointFileError(
            f"{path}: expected only tensors by name, at the top or under one of {list(WRAPPERS)}; got also "
            f"{others[:5]}"
        )
    # DistributedDataParallel's prefix
    return {str(name).removeprefix("module."): value.detach() for name, value in content.items()}


__all__ = ["CheckpointFileError", "read_configuration", "read_weights"]
