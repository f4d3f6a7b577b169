"""Strict row-by-row readers of text tables: csv, JSON and plain lines.

Cells are not interpreted: "NA", "007" and "2020-01-01" are captions. An error in one row, such as a line that is not
JSON, becomes the reason why that row is bad, and the others are read; an error beyond one row, such as an unclosed
quote, is an error of the file. The length of lines and the depth of nesting are limited, to bound memory.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

import numpy as np

from .row_checks import SHOWN, PairDataError, report

LONGEST_LINE = 64 << 20  # bytes: a text of maximum length with every character escaped
DEEPEST = 200  # nesting depth of JSON; python's reader fails at its recursion limit
LONGEST_DOCUMENT = 1 << 30  # bytes of a .json file that is one document

Cells = dict[str, Any]
Reader = Callable[[Path], Iterator[Cells | str]]  # yields each row's cells, or why it is bad
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)  # to the end where it never closes
_NO_BRACKETS = bytes(set(range(256)).difference(b"[]{}"))


def separator(file: Path) -> str:
    """The field separator of a csv or tsv."""
    return "\t" if file.suffix.lower() == ".tsv" else ","


def csv_rows(file: Path) -> Iterator[Cells | str]:
    """
    Yields rows whose cells are texts; short rows are padded with empty cells. A column without a name, as pandas
    writes its index, is ignored.

    Raises:
        PairDataError: the header is missing or names a column twice, the file is UTF-16, rows cannot be separated, or
            rows have more fields than the header.
    """
    _refuse_utf16(file)
    header: list[str] = []
    wide = []
    count = 0
    row = -1
    line = 1
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text, _long_fields():
        reader = csv.reader(_short_lines(text, file), delimiter=separator(file), strict=True)
        try:
            for fields in reader:
                first = line  # of this row
                line = reader.line_num + 1
                if not header:
                    header = _header(file, fields)
                    continue
                if not fields or (len(fields) == 1 and fields[0].isspace()):
                    continue
                row += 1
                if len(fields) > len(header):
                    count += 1
                    wrong = f"has {len(fields)} fields where the header has {len(header)} (a comma outside quotes?)"
                    wide += [(row, wrong)][: SHOWN - len(wide)]
                elif not is_utf8("".join(fields)):
                    yield f"is not UTF-8 (line {first})"
                else:
                    yield dict(zip(header, fields + [""] * (len(header) - len(fields)), strict=True))
        except csv.Error as error:
            wrong = (row + 1, f"has wrong quoting, from line {line} on: {error}")
            raise PairDataError(report(str(file), [wrong, *wide][:SHOWN], 1 + count, None)) from error
    if wide:
        raise PairDataError(report(str(file), wide, count, row + 1))


def csv_names(file: Path) -> list[str]:
    """The columns of a csv. Raises `PairDataError` as `csv_rows`."""
    _refuse_utf16(file)
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as text, _long_fields():
        try:
            return _header(file, next(csv.reader(_short_lines(text, file), delimiter=separator(file)), []))
        except csv.Error as error:
            raise PairDataError(f"{file}: the first line cannot be read: {error}") from error


def _header(file: Path, fields: list[str]) -> list[str]:
    if not fields or len(set(fields)) != len(fields):
        raise PairDataError(f"{file}: the first line must name the columns, each once; got {fields}")
    if len(fields) == 1 and any(sign in fields[0] for sign in ";\t,"):
        expected = "tabs" if separator(file) == "\t" else "commas"
        raise PairDataError(
            f"{file}: the first line is one field, {fields[0]!r}; expected {expected} between the columns"
        )
    return fields


def json_rows(file: Path) -> Iterator[Cells | str]:
    """
    Yields the objects of JSON lines, or of a `.json` file with one list of objects.

    Raises:
        PairDataError: the file is UTF-16, or neither of these.
    """
    _refuse_utf16(file)
    with open(file, "rb") as content:
        lines = (line for line in _bounded(content) if line is None or not line.isspace())
        first = next(lines, b"")
        if first == b"":
            return
        if file.suffix.lower() == ".json" and isinstance(_object(first), str):
            content.seek(0)
            yield from _document(content, file)
            return
        yield _object(first)
        yield from map(_object, lines)


def _document(content: BinaryIO, file: Path) -> Iterator[Cells | str]:
    data = content.read(LONGEST_DOCUMENT + 1)
    if len(data) > LONGEST_DOCUMENT:
        raise PairDataError(
            f"{file}: is no JSON lines, and has more than {LONGEST_DOCUMENT} bytes; write a line a row"
        )
    rows = parsed(data)
    if isinstance(rows, str):
        raise PairDataError(f"{file}: cannot be read as json: it {rows}")
    rows = rows[0]
    if not isinstance(rows, list):
        raise PairDataError(f"{file}: expected a JSON object a line or a list of them, got {type(rows).__name__}")
    for row in rows:
        yield row if isinstance(row, dict) else f"is not a JSON object, but {type(row).__name__}"


def _object(line: bytes | None) -> Cells | str:
    if line is None:
        return f"has more than {LONGEST_LINE} bytes"
    value = parsed(line)
    if isinstance(value, str):
        return value
    return value[0] if isinstance(value[0], dict) else f"is not a JSON object, but {type(value[0]).__name__}"


def parsed(content: bytes, unique: bool = True) -> tuple[Any] | str:
    """The value of a JSON document, in a 1-tuple, or a str saying why it is bad; `unique` rejects duplicate keys."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "is not UTF-8"
    if (depth := _depth(content)) > DEEPEST:
        return f"is not JSON that can be read: its brackets are {depth} deep, at most {DEEPEST} are read"
    try:
        return (json.loads(text, object_pairs_hook=_unique if unique else None),)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"


def _depth(content: bytes) -> int:
    """Nesting depth of brackets outside of strings; 0 if there are too few of them to exceed DEEPEST."""
    if content.count(b"[") + content.count(b"{") <= DEEPEST:
        return 0
    brackets = np.frombuffer(_STRING.sub(b"", content).translate(None, _NO_BRACKETS), dtype=np.uint8)
    opening = np.isin(brackets, np.frombuffer(b"[{", dtype=np.uint8))
    return int(np.cumsum(np.where(opening, 1, -1).astype(np.int8), dtype=np.int32).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> Cells:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs][:8]}")
    return dict(pairs)


def line_rows(file: Path) -> Iterator[Cells | str]:
    """Yields every non-blank line as {"text": line}."""
    _refuse_utf16(file)
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as content:
        for number, line in enumerate(_bounded(content), 1):
            if line is None:
                yield f"has more than {LONGEST_LINE} characters (line {number})"
            elif not line.isspace():
                yield {"text": line.rstrip("\n")} if is_utf8(line) else f"is not UTF-8 (line {number})"


def _bounded(content: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """Yields lines; None for a line longer than `LONGEST_LINE`."""
    while line := content.readline(LONGEST_LINE + 1):
        whole = len(line) <= LONGEST_LINE
        yield line if whole else None
        while not whole and line and line[-1:] not in (b"\n", "\n"):
            line = content.readline(1 << 20)


def _short_lines(content: IO[str], file: Path) -> Iterator[str]:
    for line in _bounded(content):
        if line is None:
            raise PairDataError(f"{file}: a line has more than {LONGEST_LINE} characters; expected a csv of rows")
        yield line


def _refuse_utf16(file: Path) -> None:
    with open(file, "rb") as content:
        if content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise PairDataError(f"{file}: is UTF-16; expected UTF-8")


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, to which bytes that are not UTF-8 were decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


READERS: dict[str, Reader] = {"csv": csv_rows, "json": json_rows, "text": line_rows}
