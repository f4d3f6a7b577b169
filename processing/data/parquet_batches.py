"""How many rows of a parquet file can be read at once, so that they fit in memory whatever the file unpacks into.

A column chunk is as long as its metadata says, except for what repeats: an entry of its dictionary, which each row can
name, or the beginning of a text (DELTA_BYTE_ARRAY). pyarrow does not tell the size of a dictionary, so it is read from
the header of its page.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

UNPACKED = 1 << 30  # maximum bytes of the rows read at once, if each is the longest that it can be
MOST_TIMES = 100  # maximum expansion factor of a file, beyond UNPACKED bytes
EXPECTED = 32 << 20  # bytes of the rows read at once, if all are equally long
PREFIXED = "DELTA_BYTE_ARRAY"
REPEATING = {PREFIXED, "RLE_DICTIONARY", "PLAIN_DICTIONARY"}
# a page header is a Thrift struct: field 1 (i32) is 2 for a dictionary, field 2 (i32) its unpacked size
HEADER = b"\x15\x04\x15"
VARINT = 5  # maximum bytes of an i32


class Chunks(NamedTuple):
    """
    Attributes:
        room: Bytes that the columns can become before the file is refused.
        rows: That can be read at once, 1 or more.
    """

    room: int
    rows: int


def chunks_of(file: Path, parquet: pq.ParquetFile, columns: Sequence[str]) -> Chunks:
    """What the column chunks of a file say of its rows."""
    size = 0
    rows = math.inf
    with open(file, "rb") as stream:
        for group, chunk in _chunks(parquet, columns):
            size += chunk.total_uncompressed_size
            # a row that holds a list has several entries
            entries = math.ceil(chunk.num_values / max(1, group.num_rows))
            most = UNPACKED // max(1, entries * _longest(chunk, stream))
            mean = EXPECTED * group.num_rows // max(1, chunk.total_uncompressed_size)
            rows = min(rows, most, mean)
    return Chunks(MOST_TIMES * size + UNPACKED, int(max(1, min(rows, parquet.metadata.num_rows))))


def _chunks(parquet: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Row groups and column chunks; a struct or list has chunks called `column.part`."""
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        for place in range(group.num_columns):
            chunk = group.column(place)
            if chunk.path_in_schema.split(".")[0] in columns:
                yield group, chunk


def _longest(chunk: Any, stream: Any) -> int:
    """The most bytes that a repeated entry can have: of the dictionary, or of the chunk if that is not known."""
    if not REPEATING & {*chunk.encodings}:
        return 0
    if PREFIXED in chunk.encodings or not chunk.dictionary_page_offset:
        return chunk.total_uncompressed_size
    stream.seek(chunk.dictionary_page_offset)
    header = stream.read(len(HEADER) + VARINT)
    return _number(header[len(HEADER) :]) if header.startswith(HEADER) else chunk.total_uncompressed_size


def _number(varint: bytes) -> int:
    """Of seven bits a byte, the lowest first, zigzag."""
    value = 0
    for place, byte in enumerate(varint):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return value >> 1


__all__ = ["MOST_TIMES", "Chunks", "chunks_of"]
