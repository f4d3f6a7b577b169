"""Pairs of pictures and captions from where they lie, checked before the first step.

A row is {"image": bytes | path | {"bytes", "path"}, "captions": list of str, "id": int | str}. Pictures are not
decoded here. Rows that share an id show the same concept: they are true positives of each other.

Which columns are taken when none are named: for the picture the first of `image`, `file_name`, `image_path`; for the
text the first of `captions`, `caption`, `text`. A text column holds a string or a list of strings a row. The id is
the row number unless a column is named: a column that happens to be called `id` often numbers pictures, not concepts.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa

from .vl_row_checks import SHOWN, PairDataError, report
from .vl_rows import PairRows, PairStream, PairTable
from .vl_shard_index import ShardColumns
from .vl_shards import PairShards, find_shards
from .vl_text_tables import (
    Fault,
    csv_faults,
    csv_header,
    has_lone_surrogates,
    json_faults,
    separator,
    without_lines,
)
from .vl_training_sets import PairTrainingSet, PairTrainingStream

__all__ = ["PairDataError", "PairRows", "PairStream", "PairTrainingSet", "PairTrainingStream", "open_pairs"]

IMAGE_COLUMNS = ("image", "file_name", "image_path")
TEXT_COLUMNS = ("captions", "caption", "text")
# StopIteration is what `datasets` says of a file without lines; the second line is what its older releases say
UNREADABLE = (
    *(datasets.exceptions.DatasetGenerationError, ValueError, OSError, pa.ArrowException, StopIteration),
    *(TypeError, zipfile.BadZipFile),
)
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_pairs(
    source: Any,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> PairRows | PairStream:
    """Opens and checks a source of pairs.

    Args:
        source: one of
            a folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (column `file_name`, relative to it),
            in itself or in a folder named as the split; or with a file `{split}.parquet`;
            a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a list of files of one kind beside each other (picture
            paths are relative to the file);
            tar shards in webdataset's layout (`vl_shard_index.py`): a `.tar`, a pattern of them (`cc-{000..127}.tar`,
            `cc-*.tar`), a list of them, or a folder that holds them and no metadata;
            a folder that `datasets` can read; a `datasets` object; a name on the Hub.
        image_column, text_column, id_column: names of the columns; see the top of this file for what None means, and
            `ShardColumns` for what they are of shards.
        split: which split, where the source has several.
        streaming: read in sequence without an index; gives a `PairStream`.
        bad_rows: "raise", or "skip": rows that cannot be used keep their numbers and are listed in `PairRows.bad`
            (a stream tells them apart in `PairStream.checked`). A file that cannot be read as a table always raises.

    Raises:
        PairDataError: a missing source or column, an ambiguous split, or rows that cannot be used: the first ten with
            their numbers (from 0), and how many there are.
    """
    if bad_rows not in ("raise", "skip"):
        raise ValueError(f'bad_rows must be "raise" or "skip", got {bad_rows!r}')
    if not _has_metadata(source, split) and (shards := find_shards(source)):
        if streaming:
            raise PairDataError(f"{shards[0]}: shards are read at random places; open them without streaming")
        return PairShards(shards, ShardColumns(image_column, text_column, id_column), bad_rows)
    loaded = _load(source, split, streaming, bad_rows)
    data, name = loaded.data, loaded.name
    if isinstance(data, dict):
        data = _one_split(data, split, name)
    found = data.column_names
    if found is None:  # a stream that does not know its columns
        found = list(next(iter(data), {}))
    columns = {
        "image": _pick(found, image_column, IMAGE_COLUMNS, "pictures", name),
        "text": _pick(found, text_column, TEXT_COLUMNS, "captions", name),
    }
    if id_column is not None:
        columns["id"] = _pick(found, id_column, (), "ids", name)
        if type((data.features or {}).get(id_column)).__name__ == "Json":
            raise PairDataError(
                f"{name}: the id column {id_column!r} mixes types, and `datasets` does not keep 7 and '7' apart; "
                "write all ids as strings or all as integers"
            )
    kind = PairStream if isinstance(data, datasets.IterableDataset) else PairTable
    return kind(data, columns, name, loaded.folder, bad_rows, loaded.reasons)


@dataclass
class Loaded:
    """A data set or a dict of splits, its name for messages, the folder that picture paths are relative to, and what
    is wrong with rows of its files."""

    data: Any
    name: str
    folder: str | None = None
    reasons: dict[int, str] = field(default_factory=dict)


def _load(source: Any, split: str | None, streaming: bool, bad_rows: str) -> Loaded:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, dict)):  # a DatasetDict is a dict
        return Loaded(source, f"the given {type(source).__name__}")
    if isinstance(source, (list, tuple)):
        return _load_files([Path(file) for file in source], streaming, bad_rows)
    if not isinstance(source, (str, os.PathLike)):
        raise PairDataError(f"a source is a path, a list of paths, a name or a data set, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        if table := _metadata(path, split):
            return _load_files([table], streaming, bad_rows)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return Loaded(datasets.load_from_disk(str(path)), str(path))
    elif path.suffix in READERS or path.is_file():
        return _load_files([path], streaming, bad_rows)
    try:
        return Loaded(datasets.load_dataset(str(source), split=split, streaming=streaming), str(source))
    except (OSError, ValueError) as error:  # not found, offline, an unknown split, an empty folder
        raise PairDataError(
            f"{source}: not a file, not a folder with metadata.csv, metadata.jsonl or metadata.parquet, and "
            f"`datasets` cannot open it as a folder or a name on the Hub: {error}"
        ) from error


def _metadata(folder: Path, split: str | None) -> Path | None:
    for place in (folder,) if split is None else (folder / split, folder):
        for table in ("metadata.csv", "metadata.jsonl", "metadata.parquet", f"{split}.parquet"):
            if (place / table).is_file():
                return place / table
    return None


def _has_metadata(source: Any, split: str | None) -> bool:
    return isinstance(source, (str, os.PathLike)) and _metadata(Path(source), split) is not None


def _load_files(files: list[Path], streaming: bool, bad_rows: str) -> Loaded:
    """Table files of one kind, read by `datasets`."""
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise PairDataError(
            f"expected files of one kind out of {sorted(READERS)}, got {[file.name for file in files]}"
        )
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise PairDataError(f"no such file: {', '.join(missing[:SHOWN])}")
    folders = {str(file.parent) for file in files}
    if len(folders) > 1 and kinds != {"parquet"}:
        raise PairDataError(f"files with picture paths must lie in one folder, got {sorted(folders)[:SHOWN]}")
    kind, name, options = kinds.pop(), str(files[0]) + (f" (+{len(files) - 1})" if files[1:] else ""), {}
    count, reasons, read = None, {}, files
    if kind == "csv":
        # Every column as text: "NA", "null" and "007" are captions, not missing values or numbers.
        header = csv_header(files[0])
        options = {"features": datasets.Features({column: datasets.Value("string") for column in header})}
        count, reasons, _ = _faults(name, files, csv_faults, bad_rows)
        options |= {"sep": separator(files[0]), "keep_default_na": False}
        options |= {"encoding_errors": "replace"} if reasons else {}
    elif kind == "json" and any(map(has_lone_surrogates, files)):
        count, reasons, read = _faults(name, files, json_faults, bad_rows)
    try:
        try:
            data = _read(kind, read, streaming, options)
        except UNREADABLE:
            if kind != "json" or reasons:
                raise
            count, reasons, read = _faults(name, files, json_faults, bad_rows)
            if not reasons:
                raise
            data = _read(kind, read, streaming, options)
    except PairDataError:
        raise
    except UNREADABLE as error:
        wrong = str(error.__cause__ or error) or "no rows"
        raise PairDataError(f"{name}: cannot be read as {kind}: {wrong}") from error
    if count is not None and not streaming and len(data) != count:
        raise PairDataError(f"{name}: was read as {len(data)} rows, but has {count}")
    return Loaded(data, name, str(files[0].parent), reasons)


def _read(kind: str, files: list[Path], streaming: bool, options: dict[str, Any]) -> Any:
    return datasets.load_dataset(
        kind, data_files=[str(file) for file in files], split="train", streaming=streaming, **options
    )


def _faults(
    name: str, files: list[Path], find: Callable[[Path], tuple[int, list[Fault]]], bad_rows: str
) -> tuple[int, dict[int, str], list[Path]]:
    """How many rows there are, what is wrong with some, and the files to read instead.

    Raises:
        PairDataError: if a fault reaches beyond its row, every row has one, or rows are not to be skipped.
    """
    start, faults, read = 0, [], []
    for file in files:
        count, found = find(file)
        faults += [fault._replace(row=start + fault.row) for fault in found]
        read.append(without_lines(file, found) if found and find is json_faults else file)
        start += count
    if faults and (bad_rows == "raise" or len(faults) == start or not all(fault.alone for fault in faults)):
        faults.sort(key=lambda fault: fault.alone)  # what makes the file unreadable first
        raise PairDataError(report(name, [fault[:2] for fault in faults[:SHOWN]], len(faults), None))
    return start, {fault.row: fault.reason for fault in faults}, read


def _one_split(data: dict, split: str | None, name: str) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise PairDataError(f"{name} {what}; choose one of {sorted(data)}")
    return data[split]


def _pick(found: list[str], given: str | None, usual: Sequence[str], what: str, name: str) -> str:
    """Name of the column for `what`: the given one, else the first usual one that is there."""
    for column in usual if given is None else (given,):
        if column in found:
            return column
    wanted = f"no column {given!r}" if given is not None else f"none of the columns {', '.join(usual)}"
    raise PairDataError(f"{name}: {wanted} for the {what}; columns found: {', '.join(found)}")
