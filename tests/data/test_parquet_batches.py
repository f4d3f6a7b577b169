"""Rows of a parquet file that are read at once: bounded by what repeats, not by how long the file is."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oner.processing.data import parquet_batches
from oner.processing.data.parquet_batches import chunks_of


def rows_at_once(path, table, **how):
    pq.write_table(table, path, **how)
    with pq.ParquetFile(path) as parquet:
        return chunks_of(path, parquet, ["text"])


TEXTS = [f"picture number {row}" for row in range(120_000)]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(parquet_batches, "UNPACKED", 1 << 27)
    monkeypatch.setattr(parquet_batches, "EXPECTED", 1 << 18)


@pytest.mark.parametrize(
    "how",
    [{}, {"compression": "zstd"}, {"data_page_version": "2.0"}, {"use_dictionary": False}, {"version": "1.0"}],
    ids=str,
)
def test_twice_the_rows_are_not_half_at_once(tmp_path, how):
    one, two = (
        rows_at_once(tmp_path / f"{times}.parquet", pa.table({"text": TEXTS[: 60_000 * times]}), **how)
        for times in (1, 2)
    )
    assert one.rows > 100
    assert two.rows == pytest.approx(one.rows, rel=0.25)
    assert two.room > one.room


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_the_longest_entry_of_a_dictionary_counts(tmp_path, codec):
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["b" * 1_000_000]))
    table = pa.table({"text": cells})
    found = rows_at_once(tmp_path / "p.parquet", table, dictionary_pagesize_limit=1 << 22, compression=codec)
    assert found.rows == (1 << 27) // 1_000_004  # four bytes are its length


def test_entries_of_a_list_count(tmp_path):
    cells = pa.array([["b" * 10_000] * 10] * 5000)
    found = rows_at_once(tmp_path / "p.parquet", pa.table({"text": cells}))
    assert found.rows == (1 << 27) // (10 * 10_004)


def test_beginnings_that_repeat_count_as_the_whole_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_batches, "UNPACKED", 1 << 24)
    table = pa.table({"text": ["b" * 10_000 + str(row) for row in range(3000)]})
    how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    found = rows_at_once(tmp_path / "p.parquet", table, **how)
    size = pq.read_metadata(tmp_path / "p.parquet").row_group(0).column(0).total_uncompressed_size
    assert found.rows == (1 << 24) // size


def test_an_empty_file_and_one_without_rows_in_a_group(tmp_path):
    assert rows_at_once(tmp_path / "p.parquet", pa.table({"text": pa.array([], pa.string())})).rows == 1
