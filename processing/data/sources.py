"""Rows from where they lie, checked before the first step: pairs of images and captions, images alone, texts alone.

A row is {"image": bytes | path | {"bytes", "path"}, "captions": list of str, "id": int | str}; see `rows.py`. Images
are not decoded here. Rows that share an id show the same concept: they are true positives of each other.

Which columns are taken when none are named: for the image the first of `image`, `file_name`, `image_path`; for the
text the first of `captions`, `caption`, `text`. A text column holds a string or a list of strings a row. The id is
the row number unless a column is named: a column that happens to be called `id` often numbers images, not concepts.
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa

from .row_checks import ROLES, SHOWN, Kind, PairDataError, report
from .rows import PairRows, PairStream, PairTable
from .shard_index import ShardColumns
from .shards import PairShards, find_shards
from .text_tables import (
    Fault,
    csv_faults,
    csv_header,
    has_lone_surrogates,
    json_faults,
    line_faults,
    separator,
    without_blank_lines,
    without_lines,
)
from .training_sets import PairTrainingSet, PairTrainingStream

__all__ = ["PairDataError", "PairRows", "PairStream", "PairTrainingSet", "PairTrainingStream", "open_rows"]

# the usual names of the column of a role
USUAL = {"image": ("image", "file_name", "image_path"), "text": ("captions", "caption", "text"), "id": ()}
NOUNS = {"image": "pictures", "text": "captions", "id": "ids"}
# StopIteration is what `datasets` says of a file without lines; the second line is what its older releases say
UNREADABLE = (
    *(datasets.exceptions.DatasetGenerationError, ValueError, OSError, pa.ArrowException, StopIteration),
    *(TypeError, zipfile.BadZipFile),
)
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_rows(
    source: Any,
    kind: Kind = "pairs",
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> PairRows | PairStream:
    """Opens and checks a source of rows.

    Args:
        source: one of
            a folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (column `file_name`, relative to it),
            in itself or in a folder named as the split; or with a file `{split}.parquet`;
            a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a list of files of one kind beside each other (image
            paths are relative to the file);
            tar shards in webdataset's layout (`shard_index.py`): a `.tar`, a pattern of them (`cc-{000..127}.tar`,
            `cc-*.tar`), a list of them, or a folder that holds them and no metadata;
            a folder that `datasets` can read; a `datasets` object; a name on the Hub;
            of images, a folder of image files, at any depth, in itself or in a folder named as the split;
            of texts, a `.txt` file, a list of them, or a folder of them without tables: a line a text, UTF-8, blank
            lines left out.
        kind: "pairs", "images" or "texts". Columns that rows of the kind do not have are not read.
        image_column, text_column, id_column: names of the columns; see the top of this file for what None means, and
            `ShardColumns` for what they are of shards.
        split: which split, where the source has several.
        streaming: read in sequence without an index; gives a `PairStream`.
        bad_rows: "raise", or "skip": rows that cannot be used keep their numbers and are listed in `PairRows.bad`
            (a stream tells them apart in `PairStream.checked`). A file that cannot be read as a table always raises.

    Raises:
        ValueError: another kind, or a column of what rows of the kind do not have.
        PairDataError: a missing source or column, an ambiguous split, or rows that cannot be used: the first ten with
            their numbers (from 0), and how many there are.
    """
    named = {"image": image_column, "text": text_column, "id": id_column}
    _check(kind, named, bad_rows, split)

    # shards bring their own index
    if not _has_metadata(source, split) and (shards := find_shards(source)):
        _whole(str(shards[0]), split)
        if streaming:
            raise PairDataError(f"{shards[0]}: shards are read at random places; open them without streaming")
        return PairShards(shards, ShardColumns(image_column, text_column, id_column, kind), bad_rows)

    # anything else is a table that `datasets` reads
    loaded = _load(source, kind, split, streaming, bad_rows)
    data = loaded.data
    name = loaded.name
    if isinstance(data, dict):
        data = _one_split(data, split, name)

    # its columns by role
    found = data.column_names
    if found is None:  # a stream that does not know its columns
        found = list(next(iter(data), {}))
    columns = {role: loaded.columns.get(role) or _pick(found, named[role], role, name) for role in ROLES[kind]}
    if id_column is not None:
        columns["id"] = _pick(found, id_column, "id", name)
        if type((data.features or {}).get(id_column)).__name__ == "Json":
            raise PairDataError(
                f"{name}: the id column {id_column!r} mixes types, and `datasets` does not keep 7 and '7' apart; "
                "write all ids as strings or all as integers"
            )
    rows = PairStream if isinstance(data, datasets.IterableDataset) else PairTable
    return rows(data, columns, name, loaded.folder, bad_rows, loaded.reasons)


def _check(kind: str, named: dict[str, str | None], bad_rows: str, split: str | None) -> None:
    if bad_rows not in ("raise", "skip"):
        raise ValueError(f'bad_rows must be "raise" or "skip", got {bad_rows!r}')
    if split is not None and (split in ("", ".", "..") or "/" in split or "\\" in split):
        raise PairDataError(f"a split is a name, got {split!r}")
    if kind not in ROLES:
        raise ValueError(f"kind must be one of {', '.join(ROLES)}, got {kind!r}")
    for role in ("image", "text"):
        if named[role] is not None and role not in ROLES[kind]:
            raise ValueError(f"rows of {kind} have no {role}, got {role}_column {named[role]!r}")


def _whole(name: str, split: str | None) -> None:
    """Refuses a split of what has none, and would be read whole under any name; under "train" it may be."""
    if split not in (None, "train"):
        raise PairDataError(f"{name} has no split {split!r}: it is one set of rows; leave split out")


@dataclass
class Loaded:
    """What a source holds.

    Attributes:
        data: a data set, or a dict of splits.
        name: for messages.
        folder: what image paths are relative to.
        reasons: what is wrong with rows of its files.
        columns: by role, where files without columns were read.
    """

    data: Any
    name: str
    folder: str | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)


def _load(source: Any, kind: Kind, split: str | None, streaming: bool, bad_rows: str) -> Loaded:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, dict)):  # a DatasetDict is a dict
        if not isinstance(source, dict) and str(source.split) != split:
            _whole(f"the given {type(source).__name__}", split)
        return Loaded(source, f"the given {type(source).__name__}")
    if isinstance(source, (list, tuple)):
        _whole(f"a list of {len(source)} files", split)
        return _load_files([Path(file) for file in source], kind, streaming, bad_rows)
    if not isinstance(source, (str, os.PathLike)):
        raise PairDataError(f"a source is a path, a list of paths, a name or a data set, got {type(source).__name__}")

    # a folder with a table, a saved data set, or nothing but files
    path = Path(source)
    if path.is_dir():
        if table := _metadata(path, split):
            if table.parent == path and table.stem != split:
                _whole(str(table), split)
            return _load_files([table], kind, streaming, bad_rows)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if not isinstance(saved, dict):
                _whole(str(path), split)
            return Loaded(saved, str(path))
        inside = path / split if split is not None and (path / split).is_dir() else path
        if kind == "images" and (images := _bare_images(inside)):
            _whole(str(path), None if inside != path else split)
            data = datasets.Dataset.from_dict({"image": images})
            data = data.to_iterable_dataset() if streaming else data
            return Loaded(data, str(inside), columns={"image": "image"})
        if kind == "texts" and (texts := _bare_texts(inside)):
            _whole(str(path), None if inside != path else split)
            return _load_files(texts, kind, streaming, bad_rows)

    # a file, or what `datasets` knows by this name
    elif path.suffix in READERS or path.is_file():
        _whole(str(path), split)
        return _load_files([path], kind, streaming, bad_rows)
    try:
        return Loaded(datasets.load_dataset(str(source), split=split, streaming=streaming), str(source))
    except (OSError, ValueError) as error:  # not found, offline, an unknown split, an empty folder
        raise PairDataError(
            f"{source}: not a file, not a folder with metadata.csv, metadata.jsonl or metadata.parquet, and "
            f"`datasets` cannot open it as a folder or a name on the Hub: {error}"
        ) from error


def _metadata(folder: Path, split: str | None) -> Path | None:
    for place in (folder,) if split is None else (folder / split, folder):
        for table in (*TABLES, f"{split}.parquet"):
            if (place / table).is_file():
                return place / table
    return None


def _has_metadata(source: Any, split: str | None) -> bool:
    return isinstance(source, (str, os.PathLike)) and _metadata(Path(source), split) is not None


def _bare_images(folder: Path) -> list[str]:
    """The image files of a folder, at any depth; none where parquet files may hold them."""
    from oner.processing.pipeline_image_text_retrieval import list_pictures  # it imports transformers' pipelines

    return [] if any(folder.glob("*.parquet")) else list_pictures(folder)


def _bare_texts(folder: Path) -> list[Path]:
    """The `.txt` files of a folder that has no tables."""
    formats = {READERS[file.suffix] for file in folder.iterdir() if file.suffix in READERS}
    return sorted(folder.glob("*.txt")) if formats == {"text"} else []


def _load_files(files: list[Path], kind: Kind, streaming: bool, bad_rows: str) -> Loaded:
    """Table files of one format, read by `datasets`."""
    known = [ending for ending in READERS if ending != ".txt" or kind == "texts"]
    formats = {READERS[file.suffix] if file.suffix in known else None for file in files}
    if len(formats) != 1 or None in formats:
        raise PairDataError(f"expected files of one kind out of {sorted(known)}, got {[file.name for file in files]}")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise PairDataError(f"no such file: {', '.join(missing[:SHOWN])}")
    (form,) = formats

    # image paths are relative to the one folder of all files
    folders = {str(file.parent) for file in files}
    if len(folders) > 1 and form != "parquet" and kind != "texts":
        raise PairDataError(f"files with picture paths must lie in one folder, got {sorted(folders)[:SHOWN]}")
    name = str(files[0]) + (f" (+{len(files) - 1})" if files[1:] else "")

    # rows, counted where their format lets rows be swallowed
    data, count, reasons = _read_checked(form, files, name, streaming, bad_rows)
    if form == "text":
        data = without_blank_lines(data)
    if count is not None and not streaming and len(data) != count:
        raise PairDataError(f"{name}: was read as {len(data)} rows, but has {count}")
    columns = {"text": "text"} if form == "text" else {}
    return Loaded(data, name, str(files[0].parent), reasons, columns)


def _read_checked(
    form: str, files: list[Path], name: str, streaming: bool, bad_rows: str
) -> tuple[Any, int | None, dict[int, str]]:
    """The data, how many rows it must have if that was counted, and what is wrong with some."""
    count = None
    reasons = {}
    read = files
    options: dict[str, Any] = {}

    # what is wrong with it, found by stricter readers than those of `datasets`
    if form == "csv":
        # every column as text: "NA", "null" and "007" are captions, not missing values or numbers
        header = csv_header(files[0])
        options = {"features": datasets.Features({column: datasets.Value("string") for column in header})}
        count, reasons, _ = _faults(name, files, csv_faults, bad_rows)
        options |= {"sep": separator(files[0]), "keep_default_na": False}
    elif form == "text":
        count, reasons, _ = _faults(name, files, line_faults, bad_rows)
        options = {"encoding": "utf-8-sig"}
    elif form == "json" and any(map(has_lone_surrogates, files)):
        count, reasons, read = _faults(name, files, json_faults, bad_rows)
    if form != "json" and reasons:
        options |= {"encoding_errors": "replace"}

    # lines of JSON are looked at only if they cannot be read
    try:
        try:
            data = _read(form, read, streaming, options)
        except UNREADABLE:
            if form != "json" or reasons:
                raise
            count, reasons, read = _faults(name, files, json_faults, bad_rows)
            if not reasons:
                raise
            data = _read(form, read, streaming, options)
    except PairDataError:
        raise
    except UNREADABLE as error:
        wrong = str(error.__cause__ or error) or "no rows"
        raise PairDataError(f"{name}: cannot be read as {form}: {wrong}") from error
    return data, count, reasons


def _read(form: str, files: list[Path], streaming: bool, options: dict[str, Any]) -> Any:
    # `datasets` keeps what it read by path and time of change; a file that was replaced may have kept both, but not
    # the time at which the system changed its entry
    known = [(status.st_size, status.st_ino, status.st_ctime_ns) for status in map(os.stat, files)]
    name = blake2b(repr(known).encode(), digest_size=8).hexdigest()
    paths = [str(file) for file in files]
    return datasets.load_dataset(form, name, data_files=paths, split="train", streaming=streaming, **options)


def _faults(
    name: str, files: list[Path], find: Callable[[Path], tuple[int, list[Fault]]], bad_rows: str
) -> tuple[int, dict[int, str], list[Path]]:
    """How many rows there are, what is wrong with some, and the files to read instead.

    Raises:
        PairDataError: if a fault reaches beyond its row, every row has one, or rows are not to be skipped.
    """
    start = 0  # rows of the files before
    faults, read = [], []
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


def _pick(found: list[str], given: str | None, role: str, name: str) -> str:
    """Name of the column for a role: the given one, else the first usual one that is there."""
    for column in USUAL[role] if given is None else (given,):
        if column in found:
            return column
    wanted = f"no column {given!r}" if given is not None else f"none of the columns {', '.join(USUAL[role])}"
    raise PairDataError(f"{name}: {wanted} for the {NOUNS[role]}; columns found: {', '.join(found)}")
