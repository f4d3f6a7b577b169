"""Annotation files and the records in them: reading, fields of the right type, and the pictures they name."""

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
    """Stands for a line that is no JSON; says what is wrong with it."""


def read_json(path: str) -> Any:
    """
    What a JSON file holds; of JSON lines, the list of them, with a `Broken` for a bad one. Lines are told by the name
    (`.jsonl`), or by a first line that is JSON by itself before others: NLVR2 calls its lines `.json`.

    Raises:
        PairDataError: no such file, not UTF-8, or no JSON.
    """
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise PairDataError(f"{path}: cannot be read: {error.strerror or error}") from error

    # one document, or a document a line
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
    """A field of one of these types. Raises `RowFault`; not where the field is missing and there is a default."""
    return first_field(record, (name,), kinds, default)


def first_field(
    record: Mapping[str, Any], names: Sequence[str], kinds: tuple[type, ...], default: Any = MISSING
) -> Any:
    """The first of several fields that is there, as `field`."""
    present = [name for name in names if name in record]

    # none of them
    if not present:
        if default is not MISSING:
            return default
        wanted = " or ".join(map(repr, names))
        raise RowFault(f"there is no {wanted} among the fields {', '.join(sorted(map(str, record)))}")

    # a bool is an int to Python, and no number here
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
    """A field of a file that must be a list. Raises `PairDataError`."""
    if not isinstance(content.get(name), list):
        raise PairDataError(f"{path}: {name!r} should be a list, got {type(content.get(name)).__name__}")
    return content[name]


def find_file(folder: str, *names: str) -> str:
    """Path of the first of these names that is a file below `folder`; of the first name, if none is."""
    return _find_file(folder, names)


@lru_cache(maxsize=1 << 18)
def _find_file(folder: str, names: tuple[str, ...]) -> str:
    # data sets are unpacked in more than one way
    paths = [os.path.join(folder, name) for name in names]
    return next((path for path in paths if is_file(path)), paths[0])


@lru_cache(maxsize=1 << 18)
def is_file(path: str) -> bool:
    """Whether there is such a file; asked once of each, for many rows share a picture."""
    return os.path.isfile(path)


def forget_files() -> None:
    """Looks anew from now on: what was missing may have come."""
    _find_file.cache_clear()
    is_file.cache_clear()


__all__ = ["Broken", "RowFault", "field", "find_file", "first_field", "forget_files", "is_file", "listed", "read_json"]
