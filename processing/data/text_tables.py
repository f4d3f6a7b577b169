"""Tables kept as text, csv, lines of JSON and plain lines: what is wrong with their rows, whatever `datasets` does.

Read leniently, a quote that is never closed swallows the rows up to the next one and a lone surrogate is dropped, both
without a word. So a csv is first read strictly, by python's own reader, and lines of JSON are searched for surrogates.
"""

import codecs
import csv
import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from .row_checks import CHUNK, PairDataError

# \ud800 without \udc00 behind it, or the other way round; a backslash that is itself escaped is sorted out later
LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


class Fault(NamedTuple):
    """What is wrong with a row of a file; `alone` if its neighbours can be read all the same."""

    row: int
    reason: str
    alone: bool


def separator(file: Path) -> str:
    """What stands between the fields of a csv or tsv."""
    return "\t" if file.suffix == ".tsv" else ","


def csv_header(file: Path) -> list[str]:
    """The names of the columns.

    Raises:
        PairDataError: no line, a name that occurs twice, or another encoding than UTF-8.
    """
    _refuse_utf16(file)
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines, _fields_of_any_size():
        try:
            header = next(csv.reader(lines, delimiter=separator(file)), [])
        except csv.Error as error:
            raise PairDataError(f"{file}: the first line cannot be read: {error}") from error
    if not header or len(set(header)) != len(header):
        raise PairDataError(f"{file}: the first line must name the columns, each once; got {header}")
    return header


def csv_faults(file: Path) -> tuple[int, list[Fault]]:
    """How many rows a csv has, and those that cannot be read; none is looked at beyond a quote that does not close."""
    width = None
    row = -1
    line = 1
    found = []
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines, _fields_of_any_size():
        reader = csv.reader(lines, delimiter=separator(file), strict=True)
        try:
            for fields in reader:
                first = line  # of this row
                line = reader.line_num + 1
                if not fields or (len(fields) == 1 and fields[0].isspace()):
                    continue
                if width is None:
                    width = len(fields)
                    continue
                row += 1
                if len(fields) > width:
                    wrong = f"has {len(fields)} fields where the header has {width} (a comma outside quotes?)"
                    found.append(Fault(row, wrong, alone=False))
                elif not _is_utf8("".join(fields)):
                    found.append(Fault(row, f"is not UTF-8 (line {first})", alone=True))
        except csv.Error as error:
            found.append(Fault(row + 1, f"has wrong quoting, from line {line} on: {error}", alone=False))
    return row + 1, found


def json_faults(file: Path) -> tuple[int, list[Fault]]:
    """How many lines a file of JSON lines has, and those that are not an object each, in Unicode."""
    row, found = -1, []
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if line.isspace():
                continue
            row += 1
            reason = _json_reason(line)
            if reason is not None:
                found.append(Fault(row, reason, alone=True))
    return row + 1, found


def line_faults(file: Path) -> tuple[int, list[Fault]]:
    """How many lines a text has, blank ones left out, and those that are not UTF-8."""
    _refuse_utf16(file)
    row, found = -1, []
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            row += 1
            if not _is_utf8(line):
                found.append(Fault(row, f"is not UTF-8 (line {number})", alone=True))
    return row + 1, found


def without_blank_lines(data: Any) -> Any:
    """The rows of a data set of lines that are a text."""
    if isinstance(data, datasets.IterableDataset):
        return data.filter(_has_text, input_columns="text")
    kept = [np.array([_has_text(line) for line in table["text"]], dtype=bool) for table in data.iter(CHUNK)]
    filled = np.flatnonzero(np.concatenate(kept)) if kept else []
    return data if len(filled) == len(data) else data.select(filled)


def _has_text(line: str) -> bool:
    return bool(line) and not line.isspace()


def _refuse_utf16(file: Path) -> None:
    with open(file, "rb") as content:
        if content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise PairDataError(f"{file}: is UTF-16; expected UTF-8")


def _json_reason(line: str) -> str | None:
    if not _is_utf8(line):
        return "is not UTF-8"
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(value, dict):
        return f"is not a JSON object, but {type(value).__name__}"
    return None if _is_utf8(json.dumps(value, ensure_ascii=False)) else "holds a lone surrogate, which is no text"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs][:8]}")
    return dict(pairs)


def has_lone_surrogates(file: Path) -> bool:
    """Whether a file of JSON lines seems to hold one; a quick look that may be wrong when it says so."""
    if not file.stat().st_size:
        return False
    with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return LONE_SURROGATE.search(view) is not None


def without_lines(file: Path, faults: list[Fault]) -> Path:
    """A copy of a file of JSON lines, in the cache of `datasets`, with an empty object in place of each bad line."""
    bad = {fault.row for fault in faults}
    state = file.stat()
    name = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:24]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "oner-cleaned" / name
    copy = folder / file.name
    beside = folder / f".{file.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as lines, open(beside, "wb") as kept:
        filled = (line for line in lines if not line.isspace())
        kept.writelines(b"{}\n" if row in bad else line for row, line in enumerate(filled))
    os.replace(beside, copy)
    return copy


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that were no UTF-8 were read as lone surrogates
        return False
    return True


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
