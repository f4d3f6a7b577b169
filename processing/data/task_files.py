"""Reads annotation files, checks the types of their fields, and finds the image files that they name."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .places import regular
from .row_checks import PairDataError
from .text_tables import is_utf8, parsed

MISSING = object()


class RowFault(ValueError):
    """What is wrong with one row."""


class Broken(str):
    """Replaces a line that is not JSON; its text says what is wrong."""


def read_json(path: str) -> Any:
    """
    The content of a JSON file, or the list of values of a JSON lines file, with a `Broken` for each bad line. JSON
    lines are recognised by the name (`.jsonl`), or by a first line that is a JSON object, as in NLVR2's `.json` files.

    Raises:
        PairDataError: the file does not exist, is not UTF-8, or is not JSON.
    """
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise PairDataError(f"{path}: cannot be read: {error.strerror or error}") from error

    # one document, or one per line
    if Path(path).suffix != ".jsonl":
        value = parsed(content, unique=False)
        if not isinstance(value, str):
            return value[0]
        if not isinstance(_line(content.lstrip().partition(b"\n")[0]), dict):
            raise PairDataError(f"{path}: cannot be read as JSON: it {value}")
    return [_line(line) for line in content.split(b"\n") if line.strip()]


def _line(content: bytes) -> Any:
    value = parsed(content, unique=False)
    return Broken(value) if isinstance(value, str) else value[0]


def field(record: Mapping[str, Any], name: str, kinds: tuple[type, ...], default: Any = MISSING) -> Any:
    """A field of one of these types. Raises `RowFault`, unless the field is missing and has a default."""
    return first_field(record, (name,), kinds, default)


def first_field(
    record: Mapping[str, Any], names: Sequence[str], kinds: tuple[type, ...], default: Any = MISSING
) -> Any:
    """`field` for the first of several names that is present."""
    present = [name for name in names if name in record]

    # none is present
    if not present:
        if default is not MISSING:
            return default
        wanted = " or ".join(map(repr, names))
        raise RowFault(f"there is no {wanted} among the fields {', '.join(sorted(map(str, record)))}")

    # bool is a subclass of int, but is not a number here
    value = record[present[0]]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise RowFault(f"{present[0]!r} must be {expected}, got {type(value).__name__} {value!r:.40}")
    if isinstance(value, str) and not is_utf8(value):
        raise RowFault(f"{present[0]!r} holds a lone surrogate, which is no text: {value!r:.40}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RowFault(f"{present[0]!r} does not fit into 64 bits: {value!r:.40}")
    return value


def listed(content: Mapping[str, Any], name: str, path: str) -> list[Any]:
    """A field of a file, which must be a list. Raises `PairDataError`."""
    if not isinstance(content.get(name), list):
        raise PairDataError(f"{path}: {name!r} should be a list, got {type(content.get(name)).__name__}")
    return content[name]


def find_file(folder: str, *names: str) -> str:
    """Path of the first of these names that is a file below `folder`; of the first name, if none is."""
    return _find_file(folder, names)


@lru_cache(maxsize=1 << 18)
def _find_file(folder: str, names: tuple[str, ...]) -> str:
    # data sets are unpacked into different folders
    paths = [os.path.join(folder, name) for name in names]
    return next((path for path in paths if is_file(path)), paths[0])


@lru_cache(maxsize=1 << 18)
def is_file(path: str) -> bool:
    """Whether the file exists; cached, because many rows share an image."""
    return os.path.isfile(path)


def forget_files() -> None:
    """Clears the caches: missing files may have been added."""
    _find_file.cache_clear()
    is_file.cache_clear()


__all__ = ["Broken", "RowFault", "field", "find_file", "first_field", "forget_files", "is_file", "listed", "read_json"]
