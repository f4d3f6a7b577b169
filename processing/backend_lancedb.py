"""The backend "lancedb": a table of LanceDB, in the directory of the index or at a URL that lancedb accepts.

    oner_id, oner_vector, oner_item    index, unit row (P,) fp32 and item as JSON; plus the items' columns

The search is exact and reads every row, unless you create an index of LanceDB's own (`table.create_index`).
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .retrieval_backend import Answer, DatabaseBackend, current_note, library, read_note, write_note, written
from .retrieval_filter import ORDERS, Condition, Where, columns_of, number_of, read_where
from .retrieval_index import RetrievalIndex
from .retrieval_index_files import read_header
from .retrieval_nearest import unit_rows

NAME = "lancedb"
ID, VECTOR, ITEM = OWN = "oner_id", "oner_vector", "oner_item"
AT_ONCE = 8192  # rows per batch
KINDS = {bool: "bool_", int: "int64", float: "float64", str: "string"}
NUMBERS = {"int64", "float64"}


class Backend(DatabaseBackend):
    """
    Args:
        table: a table of lancedb.
        note: describes what was built from which index, see `write_note`.
    """

    def __init__(self, table: Any, note: dict[str, Any]):
        super().__init__(note)
        self.table = table
        self._kinds = {field.name: str(field.type) for field in table.schema}

    @classmethod
    def build(cls, directory: Path, url: str | None = None) -> "Backend":
        """Writes a new table, then drops the previous one."""
        header = read_header(directory)
        index = RetrievalIndex.load(directory)
        before = read_note(directory, NAME) if (directory / f"{NAME}.json").is_file() else None

        # named after its content, so that the previous table answers until this one is complete
        name = f"oner_{header['header_sha256'][:16]}"
        database = library(NAME, NAME).connect(url or str(directory / NAME))
        schema = schema_of(index)
        database.create_table(name, data=batches(index, schema), schema=schema, mode="overwrite")
        write_note(directory, NAME, header, {"url": url}, table=name)
        if before and before["options"] == {"url": url} and before.get("table") != name:
            database.drop_table(before["table"], ignore_missing=True)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> "Backend":
        note = current_note(directory, NAME)
        database = library(NAME, NAME).connect(note["options"].get("url") or str(directory / NAME))
        return cls(database.open_table(note["table"]), note)

    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        self.check_queries(queries, top_k)
        condition = " AND ".join(f"({self._sql(one)})" for one in read_where(where))
        rows = unit_rows(queries).float()  # (q, P)
        return [self._first(partial(self._ask, row.tolist(), condition), top_k) for row in rows]

    def _ask(self, row: list[float], condition: str, count: int) -> list[Answer]:
        """The `count` best answers for one unit row (P,)."""
        asked = self.table.search(row, vector_column_name=VECTOR).distance_type("dot").limit(count)
        asked = asked.select([ID, ITEM, "_distance"])
        found = (asked.where(condition, prefilter=True) if condition else asked).to_list()
        return [{"score": 1.0 - one["_distance"], "item": json.loads(one[ITEM]), "index": one[ID]} for one in found]

    def embedding_at(self, index: int) -> torch.Tensor:
        (row,) = self.table.search().where(f"{ID} = {int(index)}").select([VECTOR]).limit(1).to_list()
        return torch.tensor(row[VECTOR])  # (P,)

    def index_of(self, item: Any) -> int | None:
        found = self.table.search().where(f"{ITEM} = {quoted(written(item))}").select([ID]).limit(self._count)
        return min((one[ID] for one in found.to_list()), default=None)

    def _sql(self, condition: Condition) -> str:
        """A condition in LanceDB's SQL. Raises `ValueError` for a column of mixed values."""
        kind = self._kinds.get(condition.column)
        if kind is None or condition.column in OWN:
            return "false"
        if kind == "binary":
            raise ValueError(
                f"lancedb cannot compare the column {condition.column!r}: it mixes numbers and texts, holds lists or "
                "integers beyond 64 bits, or has a backtick in its name; exact search can"
            )
        column = f"`{condition.column}`"
        numeric = kind in ("double", "int64")
        if condition.operator in ORDERS:
            return f"{column} {condition.operator} {number_of(condition.values[0])!r}" if numeric else "false"

        # values of another type than the column's never match
        if kind == "bool":
            values = [value for value in condition.values if value in ("true", "false")]
        elif numeric:
            values = [repr(number_of(value)) for value in condition.values if number_of(value) is not None]
        else:
            values = [quoted(value) for value in condition.values]
        equal = " OR ".join(f"{column} = {value}" for value in values)
        if condition.operator == "=":
            return equal or "false"
        return f"NOT ({equal})" if equal else f"{column} IS NOT NULL"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def kind_of(name: str, value: Any) -> str:
    """The Arrow type of a value: binary if LanceDB cannot compare it, or cannot quote the name of its column."""
    if "`" in name or (type(value) is int and not -(2**63) <= value < 2**63):
        return "binary"
    return KINDS.get(type(value), "binary")


def schema_of(index: RetrievalIndex) -> Any:
    """
    Arrow schema: our columns, and the items' by type of value. What LanceDB cannot compare is binary and null.

    Raises:
        ValueError: a column of the items has the name of one of ours.
    """
    arrow = library("pyarrow", NAME)
    kinds: dict[str, set[str]] = {}
    for item in index.items:
        for name, value in columns_of(item).items():
            if value is not None:
                kinds.setdefault(name, set()).add(kind_of(name, value))
    if taken := kinds.keys() & {*OWN}:
        raise ValueError(f"items have a column {min(taken)!r}, a name that the table in lancedb needs; rename it")
    fields = [
        arrow.field(ID, arrow.int64()),
        arrow.field(VECTOR, arrow.list_(arrow.float32(), index.projection_dim)),
        arrow.field(ITEM, arrow.string()),
    ]
    for name, found in kinds.items():
        found = {"float64"} if found == NUMBERS else found  # integers and floats in one column
        kind = getattr(arrow, next(iter(found)))() if len(found) == 1 else arrow.binary()
        fields.append(arrow.field(name, kind))
    return arrow.schema(fields)


def batches(index: RetrievalIndex, schema: Any) -> Iterator[Any]:
    """The whole index as batches of Arrow."""
    arrow = library("pyarrow", NAME)
    rows = index.embeddings  # (n, P)
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE].float()  # (m, P)
        items = index.items[start : start + len(some)]
        columns: list[Sequence[Any]] = [
            arrow.array(range(start, start + len(some)), arrow.int64()),
            arrow.FixedSizeListArray.from_arrays(arrow.array(some.flatten().numpy()), index.projection_dim),
            arrow.array(map(written, items), arrow.string()),
        ]
        for field in list(schema)[3:]:
            mixed = arrow.types.is_binary(field.type)
            values = [None if mixed else columns_of(item).get(field.name) for item in items]
            columns.append(arrow.array(values, field.type))
        yield arrow.RecordBatch.from_arrays(columns, schema=schema)


__all__ = ["Backend"]
