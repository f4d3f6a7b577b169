"""The rows of a table of pairs as an index takes them: each picture, and what its answers show, columns included."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oner.processing.data.places import expand, located
from oner.processing.data.rows import PairTable
from oner.processing.data.sources import USUAL, open_rows
from oner.processing.data.text_tables import READERS
from oner.processing.retrieval_filter import number_of
from oner.training.evaluation.contact_sheet import READING
from oner.training.run.arguments import DataArguments

CSV = (".csv", ".tsv")
TABLES = (".parquet", *CSV, ".jsonl")
AT_ONCE = 256  # rows that are read together
OWN = {"table", "row", "path", READING}  # of every item; a column of such a name keeps its values to itself
ROLES = {*USUAL["image"], *USUAL["text"]}
# how `open_rows` and the arguments of a run call which rows and columns of a source are read
TOLD = {
    "image_column": "image_column",
    "text_column": "text_column",
    "id_column": "id_column",
    "split": "split",
    "config": "data_config",
    "revision": "data_revision",
}
DECIMAL = re.compile(r"-?(?:0|[1-9]\d*)\.(\d+)")


class TableItems:
    """
    Rows {"image", "item"}, read lazily. An item has "table", "row" and "text" (the first caption), the picture's
    "path" if it is a separate file, and the row's other columns of numbers, texts and booleans; READING is what a
    sheet needs to open the same row.

    Args:
        reading: Options of `open_rows`, as `reading_of` finds them; without any, the usual columns.

    Attributes:
        bad: {row number: reason} of skipped rows.
    """

    def __init__(self, table: str, reading: Mapping[str, str] | None = None):
        self.table = table
        self.reading = dict(reading or {})
        self.rows = open_rows(table, bad_rows="skip", **self.reading)
        self.bad = dict(self.rows.bad)
        self.columns = columns_of_table(table, {self.reading.get(name) for name in ("image_column", "text_column")})

    def __len__(self) -> int:
        return len(self.rows) - len(self.bad)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        good = [number for number in range(len(self.rows)) if number not in self.bad]
        for start in range(0, len(good), AT_ONCE):
            numbers = good[start : start + AT_ONCE]
            for number, row in zip(numbers, self.rows.take(numbers), strict=True):
                yield {"image": row["image"], "item": self._item(number, row)}

    def files(self) -> list[str]:
        """The pictures that are files of their own, whose change is a change of the table."""
        if not isinstance(self.rows, PairTable):
            return []
        name = self.rows.columns["image"]
        chunks = self.rows.data.select_columns([name]).with_format("arrow")[:].column(0).chunks
        paths = [path for chunk in chunks for path in paths_of(chunk) if path is not None]
        return [located(os.path.join(self.rows.folder or "", path)) for path in paths]

    def _item(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        item = {"table": self.table, "row": number, "text": row["captions"][0]}
        if isinstance(row["image"], str):
            item["path"] = row["image"]
        if shown := {name: value for name, value in self.reading.items() if name != "id_column"}:
            item[READING] = shown
        more = {name: values[number] for name, values in self.columns.items() if number < len(values)}
        return {**{name: value for name, value in more.items() if value is not None}, **item}


def reading_of(data: DataArguments) -> dict[str, str]:
    """Columns, split, configuration and revision of a run's sources, without those that it does not name."""
    told = {name: getattr(data, argument) for name, argument in TOLD.items()}
    return {name: value for name, value in told.items() if value is not None}


def paths_of(cells: pa.Array) -> list[str | None]:
    """Of cells that are paths, or hold one and no bytes; no bytes are copied."""
    if pa.types.is_struct(cells.type):
        cells = pc.struct_field(cells, "path").filter(pc.is_null(pc.struct_field(cells, "bytes")))
    return cells.to_pylist() if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type) else []


def columns_of_table(table: str, named: Collection[str | None] = ()) -> dict[str, list[Any]]:
    """The values of each column of a table file, except pictures and captions, usual or `named`; None for a missing
    value."""
    files = expand(table)
    files = [Path(file) for file in (files if isinstance(files, list) else [files])]
    if not all(file.is_file() and file.suffix.lower() in TABLES for file in files):
        return {}
    columns: dict[str, list[Any]] = {}
    left_out = {*ROLES, *OWN, *named}
    before = 0
    for file in files:
        rows = _parquet(file, left_out) if file.suffix.lower() == ".parquet" else _texts(file, left_out)
        for place, cells in enumerate(rows, before):
            for name, value in cells.items():
                values = columns.setdefault(name, [])
                values += [None] * (place - len(values))
                values.append(value)
            before = place + 1
    return columns if files[0].suffix.lower() not in CSV else {name: read(cells) for name, cells in columns.items()}


def _parquet(file: Path, left_out: Collection[str | None]) -> Iterator[dict[str, Any]]:
    reader = pq.ParquetFile(file)
    nested = {field.name for field in reader.schema_arrow if field.type.num_fields}
    names = [name for name in reader.schema_arrow.names if name not in nested and name not in left_out]
    if not names:
        yield from ({} for _ in range(reader.metadata.num_rows))
        return
    for batch in reader.iter_batches(columns=names):
        yield from ({name: plain(value) for name, value in row.items()} for row in batch.to_pylist())


def _texts(file: Path, left_out: Collection[str | None]) -> Iterator[dict[str, Any]]:
    for cells in READERS["csv" if file.suffix.lower() in CSV else "json"](file):
        cells = {} if isinstance(cells, str) else cells
        yield {name: plain(value) for name, value in cells.items() if name not in left_out}


def read(cells: list[str | None]) -> list[Any]:
    """The values of a column of a csv. A zero at the end is one of a number where all have as many decimals."""
    decimals = {len(found[1]) for cell in cells if cell and (found := DECIMAL.fullmatch(cell))}
    return [cell if cell is None else spelled(cell, len(decimals) == 1) for cell in cells]


def spelled(cell: str, padded: bool = False) -> Any:
    """The number that a cell of a csv spells as Python would, else its text; None of an empty one. `padded`: 3.50 is
    3.5 too, as prices are written, and no name such as that of a release."""
    number = number_of(cell)
    if number is None:
        return cell or None
    if padded and DECIMAL.fullmatch(cell):
        return number
    return next((value for value in (int(number), number) if str(value) == cell), cell)


def plain(value: Any) -> Any:
    """A number, a text or a boolean, a date as text; None of anything else."""
    if isinstance(value, Decimal):  # as prices are kept in parquet
        value = float(value) if value % 1 else int(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, float) and value - value != 0:  # NaN and infinity are no JSON
        return None
    return value if isinstance(value, (str, int, float, bool)) else None
