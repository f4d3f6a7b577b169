"""Reads local files of rows (csv, JSON lines, plain lines, parquet) into one memory-mapped table.

Only the required columns are kept, in an Arrow file in the cache of `datasets`, named after a digest of the files and
options. Paths are never patterns here. Cells are read as they are written: no dates, numbers or missing values are
inferred, and columns that are not read may hold any JSON.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .parquet_batches import MOST_TIMES, chunks_of
from .row_checks import (
    CHUNK,
    SHOWN,
    PairDataError,
    TextRule,
    id_reason,
    image_reason,
    plain_texts,
    report,
    text_reason,
)
from .same_pictures import PICTURE, picture_digest
from .text_tables import READERS, csv_names, is_utf8
from .waiting_lock import waiting_lock

FORMAT = 2  # version of the cache file; changing it rebuilds all
PEEK = 1000  # first rows, whose keys are the columns of JSON lines
WRITTEN = 32 << 20  # minimum bytes of a batch in the cache file, to keep batches few
WRITTEN_LIST = r"""^\s*\[\s*(?:'.*'|".*")\s*,?\s*\]\s*$"""
COLUMNS = {"image": "image", "text": "captions", "id": "id"}  # of text files; parquet keeps its own names

Pick = Callable[[list[str]], dict[str, str]]


class TableFile(NamedTuple):
    """A table, its column for each role, and {row: why it cannot be read}."""

    data: datasets.Dataset
    columns: dict[str, str]
    reasons: dict[int, str]


def read_tables(form: str, files: Sequence[Path], pick: Pick, rule: TextRule, name: str) -> TableFile:
    """
    Reads files of one format as one table.

    Args:
        form: "csv", "json", "text" or "parquet".
        files: at least one, each a regular file.
        pick: maps column names to the column of each role. Raises `PairDataError` if one is missing.
        rule: rule for texts.
        name: name of the source in messages.

    Raises:
        PairDataError: a file cannot be split into rows, or there are no rows, or no good ones.
    """
    # the cache file, named after a digest of files and options
    with _readable(form, name):
        columns = pick(_names(form, files, name))
        key = blake2b(json.dumps([FORMAT, form, columns, *rule]).encode(), digest_size=16)
        for file in files:
            key.update(_state(file, form))
    place = Path(datasets.config.HF_DATASETS_CACHE) / "oner" / f"{key.hexdigest()}.arrow"

    # written by one process while the others wait
    if not place.is_file():
        with waiting_lock(place):
            if not place.is_file():
                tables = _parquet(files, columns) if form == "parquet" else _texts(form, files, columns, rule)
                _write(_merged(_reading(tables, form, name)), place, f"{name}: cannot be read as {form}: no data")
    data = datasets.Dataset.from_file(str(place))
    if form == "parquet":
        return TableFile(data, columns, {})

    # bad rows, found when the table was written
    column = data.data.column("reason")
    reasons = {int(row): column[int(row)].as_py() for row in np.flatnonzero(column.is_valid().to_numpy())}
    if len(reasons) == len(data):
        raise PairDataError(report(name, list(islice(reasons.items(), SHOWN)), len(reasons), len(data)))
    if form == "csv" and "text" in columns:
        _warn_of_lists(data.data.column(COLUMNS["text"]), name)
    return TableFile(data, {role: COLUMNS[role] for role in columns}, reasons)


def _warn_of_lists(texts: pa.ChunkedArray, name: str) -> None:
    """Warns of csv cells that look like lists: csv has no lists, so programs write their text form."""
    texts = pc.list_flatten(texts)
    spelled = texts.filter(pc.match_substring_regex(texts, WRITTEN_LIST))
    if len(spelled):
        warnings.warn(
            f"{name}: {len(spelled)} captions of a csv look like lists and are read as one text each, "
            f"{spelled[0].as_py()!r:.80}; keep several captions of a picture as lists in JSON lines or parquet",
            stacklevel=4,
        )


@contextmanager
def _readable(form: str, name: str) -> Iterator[None]:
    try:
        yield
    except PairDataError:
        raise
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise PairDataError(f"{name}: cannot be read as {form}: {error}") from error


def _reading(tables: Iterator[pa.Table], form: str, name: str) -> Iterator[pa.Table]:
    with _readable(form, name):
        yield from tables


def _names(form: str, files: Sequence[Path], name: str) -> list[str]:
    """The columns of the files, in order."""
    if form == "text":
        return ["text"]
    if form == "csv":
        return csv_names(files[0])
    if form == "parquet":
        return pq.read_schema(files[0]).names

    # keys of the first objects; if there are none, report the bad rows
    found: dict[str, None] = {}
    wrong = []
    for row, cells in enumerate(islice(chain.from_iterable(map(READERS[form], files)), PEEK)):
        if isinstance(cells, str):
            wrong.append((row, cells))
        else:
            found |= dict.fromkeys(cells)
    if wrong and not found:
        raise PairDataError(report(name, wrong[:SHOWN], len(wrong), None))
    if not found:
        raise PairDataError(f"{name}: cannot be read as {form}: no data")
    return list(found)


def _state(file: Path, form: str) -> bytes:
    """A digest that changes with the file: of its content or, for parquet, of its end, size, times and inode."""
    digest = blake2b(file.suffix.lower().encode(), digest_size=32)
    with open(file, "rb") as content:
        if form == "parquet":
            # mtime can be set, ctime cannot
            status = os.fstat(content.fileno())
            digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode())
            content.seek(max(0, status.st_size - (1 << 16)))
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _texts(form: str, files: Sequence[Path], columns: dict[str, str], rule: TextRule) -> Iterator[pa.Table]:
    """Yields tables of image (string), captions (list of string), id (int64 or string) and reason (string)."""
    kind = _type_of_ids(form, files, columns["id"]) if "id" in columns else None
    types = {"image": pa.string(), "text": pa.large_list(pa.large_string()), "id": kind}
    digest = [(PICTURE, pa.int64())] if columns.keys() >= {"image", "text"} else []
    schema = pa.schema([*((COLUMNS[role], types[role]) for role in columns), *digest, ("reason", pa.string())])
    rows = chain.from_iterable(map(READERS[form], files))
    while chunk := list(islice(rows, CHUNK)):
        table: dict[str, list[Any]] = {column: [] for column in schema.names}
        for cells in chunk:
            values, reason = ({}, cells) if isinstance(cells, str) else _checked(cells, columns, rule)
            if kind is not None:
                _check_type(values.get("id"), kind, files, columns["id"])
            for role in columns:
                table[COLUMNS[role]].append(values.get(role))
            if digest:
                table[PICTURE].append(picture_digest(values.get("image")))
            table["reason"].append(reason and reason.encode("utf-8", "backslashreplace").decode())
        yield pa.table({one.name: pa.array(table[one.name], one.type) for one in schema}, schema)


def _checked(cells: dict[str, Any], columns: dict[str, str], rule: TextRule) -> tuple[dict[str, Any], str | None]:
    """The values to store by role, or, for a bad row, no values and the reason."""
    values = {role: cells.get(column) for role, column in columns.items()}
    reasons = []
    if "text" in values:
        values["text"] = plain_texts(values["text"])
        reasons.append(text_reason(values["text"], rule))
    if "id" in values:
        reasons.append(id_reason(values["id"]))
    if "image" in values:
        image = values["image"]
        image = image.get("path", image) if isinstance(image, dict) else image
        values["image"] = image
        # whether the file exists is checked on each opening
        reasons.append(None if isinstance(image, str) else image_reason(image, None))
    if any(isinstance(value, str) and not is_utf8(value) for value in values.values()):
        reasons.append("holds a lone surrogate, which is no text")
    reason = "; ".join(filter(None, reasons)) or None
    if reason is not None:
        return {}, reason
    if isinstance(values.get("text"), str):
        values["text"] = [values["text"]]
    return values, None


def _type_of_ids(form: str, files: Sequence[Path], column: str) -> pa.DataType:
    """The type of the first valid id."""
    for cells in chain.from_iterable(map(READERS[form], files)):
        identity = cells.get(column) if isinstance(cells, dict) else None
        if id_reason(identity) is None:
            return pa.int64() if isinstance(identity, int) else pa.string()
    return pa.string()


def _check_type(identity: Any, kind: pa.DataType, files: Sequence[Path], column: str) -> None:
    if identity is not None and isinstance(identity, int) != pa.types.is_integer(kind):
        raise PairDataError(
            f"{files[0]}: the id column {column!r} mixes types, and 7 is not '7'; write all ids as strings or all as "
            "integers"
        )


def _parquet(files: Sequence[Path], columns: dict[str, str]) -> Iterator[pa.Table]:
    """Yields tables of the columns, with types unified over all files and dictionaries decoded."""
    wanted = list(dict.fromkeys(columns.values()))
    schemas = []
    for file in files:
        found = pq.read_schema(file)
        if missing := [column for column in wanted if column not in found.names]:
            raise PairDataError(f"{file}: no column {missing[0]!r}; columns found: {', '.join(found.names)}")
        if several := [column for column in wanted if found.names.count(column) > 1]:
            raise PairDataError(f"{file}: several columns are called {several[0]!r}; expected one of that name")
        schemas.append(pa.schema([(column, _plain(found.field(column).type)) for column in wanted]))
    schema = pa.unify_schemas(schemas, promote_options="permissive")

    for file in files:
        with pq.ParquetFile(file) as parquet:
            room, rows = chunks_of(file, parquet, wanted)
            for batch in parquet.iter_batches(min(CHUNK, rows), columns=wanted):
                room -= batch.nbytes
                if room < 0:
                    raise PairDataError(f"{file}: becomes more than {MOST_TIMES} times as long where it is unpacked")
                table = pa.Table.from_batches([batch]).select(wanted).cast(schema)
                if columns.keys() >= {"image", "text"}:
                    images = (image.as_py() for image in table.column(columns["image"]))
                    table = table.append_column(PICTURE, pa.array(map(picture_digest, images), pa.int64()))
                yield table


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _merged(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Merges tables to at least `WRITTEN` bytes or `CHUNK` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= CHUNK or sum(one.nbytes for one in waiting) >= WRITTEN:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _write(tables: Iterator[pa.Table], place: Path, empty: str) -> None:
    """Writes the tables to `place` atomically. Raises `PairDataError`, with message `empty` if there are no rows."""
    first = next(tables, None)
    if first is None or not len(first):
        raise PairDataError(empty)
    beside = place.with_name(f".{place.name}.{uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
        os.replace(beside, place)
    except OSError as error:
        raise PairDataError(f"{place}: the cache cannot be written: {error}; HF_DATASETS_CACHE names it") from error
    finally:
        beside.unlink(missing_ok=True)


__all__ = ["TableFile", "read_tables"]
