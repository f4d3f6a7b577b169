"""Opens sources of rows and checks them before the first step: pairs of images and captions, images, or texts.

A row is {"image": bytes | path | {"bytes", "path"}, "captions": list of str, "id": int | str}; see `rows.py`. Images
are not decoded here. Rows that share an id show the same concept: they are positives of each other.

Default columns: for the image the first of `image`, `file_name`, `image_path`; for the text the first of `captions`,
`caption`, `text`. A text column holds a string or a list of strings per row.

Without an id column, pairs with the same image (by path or bytes) share an id, and a warning gives their number; rows
of other kinds get their row number. A column named `id` is not used by default, because it often numbers captions or
images, not concepts.
"""

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from .places import expand, regular
from .row_checks import ROLES, SHOWN, Kind, PairDataError, rule_of
from .rows import PairRows, PairStream, PairTable
from .same_pictures import ROW
from .shard_index import ShardColumns
from .shards import PairShards, find_shards
from .table_files import read_tables
from .training_sets import PairTrainingSet, PairTrainingStream

__all__ = ["PairDataError", "PairRows", "PairStream", "PairTrainingSet", "PairTrainingStream", "open_rows"]

# default column names of each role
USUAL = {"image": ("image", "file_name", "image_path"), "text": ("captions", "caption", "text"), "id": ()}
NOUNS = {"image": "pictures", "text": "captions", "id": "ids"}
# COCO's texts in a list of objects, which `plain_texts` extracts
INSIDE = re.compile(r"(.+?)(?:\[\])?\.raw")
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
    config: str | None = None,
    revision: str | None = None,
) -> PairRows | PairStream:
    """Opens and checks a source of rows.

    Args:
        source: one of
            a folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (column `file_name`, relative to it),
            in itself or in a subfolder named after the split; or with a file `{split}.parquet`;
            a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a list of files of one kind in one folder (image paths
            are relative to the file);
            tar shards in webdataset's layout (`shard_index.py`): a `.tar`, a pattern of them (`cc-{000..127}.tar`,
            `cc-*.tar`), a list of them, or a folder that holds them and no metadata;
            a file pattern (`data/*.parquet`), unless a file has that name; `hf://datasets/NAME/FILE`, or a pattern;
            a folder that `datasets` can read; a `datasets` object; a name on the Hub;
            for images, a folder of image files, at any depth, or its subfolder named after the split;
            for texts, a `.txt` file, a list of them, or a folder of them without tables: UTF-8, one text per line,
            ignoring blank lines.
        kind: "pairs", "images" or "texts". Columns that this kind does not have are not read.
        image_column, text_column, id_column: names of the columns; see the module docstring for defaults, and
            `ShardColumns` for shards. The id_column "__row__" makes each row its own concept.
        split: the split to read, if the source has several.
        streaming: read sequentially without an index; returns a `PairStream`.
        bad_rows: "raise", or "skip": bad rows keep their numbers and are listed in `PairRows.bad` (for a stream, see
            `PairStream.checked`). A file that cannot be read as a table always raises.
        config, revision: configuration of a data set on the Hub, and its branch, tag or commit.

    Raises:
        ValueError: the kind is unknown, or a column is named that this kind does not have.
        PairDataError: a source or column is missing, the split is ambiguous, or rows are bad; the message gives the
            first ten with their numbers (from 0), and the number of bad rows.
    """
    rows_apart = id_column == ROW
    id_column = None if rows_apart else id_column
    named = {"image": image_column, "text": text_column, "id": id_column}
    _check(kind, named, bad_rows, split)

    # expand patterns; shards have their own index
    source = expand(source)
    if not _has_metadata(source, split) and (shards := find_shards(source)):
        _whole(str(shards[0]), split)
        if streaming:
            raise PairDataError(f"{shards[0]}: shards are read at random places; open them without streaming")
        return PairShards(shards, ShardColumns(image_column, text_column, id_column, kind), bad_rows, rows_apart)

    # anything else is a table: files, or a data set of `datasets`
    loaded = _load(source, kind, named, split, streaming, {"name": config, "revision": revision})
    data = _one_split(loaded.data, split, loaded.name) if isinstance(loaded.data, dict) else loaded.data
    columns = loaded.columns or _columns_of(data, kind, named, loaded.name)
    rows = PairStream if isinstance(data, datasets.IterableDataset) else PairTable
    return rows(data, columns, loaded.name, loaded.folder, bad_rows, loaded.reasons, rows_apart)


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
    """Rejects a split of a source without splits, except "train", because it would be read as a whole."""
    if split not in (None, "train"):
        raise PairDataError(f"{name} has no split {split!r}: it is one set of rows; leave split out")


@dataclass
class Loaded:
    """A loaded source.

    Attributes:
        data: a data set, or a dict of splits.
        name: name in messages.
        folder: folder that image paths are relative to.
        reasons: {row number: why it is bad}, from reading its files.
        columns: by role, if already known from reading its files.
    """

    data: Any
    name: str
    folder: str | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)


def _load(
    source: Any,
    kind: Kind,
    named: dict[str, str | None],
    split: str | None,
    streaming: bool,
    options: dict[str, str | None],
) -> Loaded:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, dict)):  # a DatasetDict is a dict
        if not isinstance(source, dict) and str(source.split) != split:
            _whole(f"the given {type(source).__name__}", split)
        return Loaded(source, f"the given {type(source).__name__}")
    if isinstance(source, (list, tuple)):
        _whole(f"a list of {len(source)} files", split)
        return _load_files([Path(file) for file in source], kind, named, streaming)
    if not isinstance(source, (str, os.PathLike)):
        raise PairDataError(f"a source is a path, a list of paths, a name or a data set, got {type(source).__name__}")

    # a folder with a table, a saved data set, or plain files
    path = Path(source)
    if path.is_dir():
        if table := _metadata(path, split):
            if table.parent == path and table.stem != split:
                _whole(str(table), split)
            return _load_files([table], kind, named, streaming)
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
            return _load_files(texts, kind, named, streaming)
        if glob.has_magic(str(path)):
            raise PairDataError(
                f"{path}: no metadata.csv, metadata.jsonl or metadata.parquet in it, and `datasets` takes its name "
                "for a pattern; name the files in it, or call it without [ ] * ?"
            )

    # a file, or a name that `datasets` can load
    elif path.suffix.lower() in READERS or path.exists():
        _whole(str(path), split)
        return _load_files([path], kind, named, streaming)
    return _load_by_name(str(source), split, streaming, {key: one for key, one in options.items() if one is not None})


def _load_by_name(source: str, split: str | None, streaming: bool, options: dict[str, str]) -> Loaded:
    try:
        return Loaded(datasets.load_dataset(source, split=split, streaming=streaming, **options), source)
    except Exception as error:  # its readers raise many types
        reason = str(error) or type(error).__name__
        hint = "; data_config names one" if "onfig name is missing" in reason else ""
        raise PairDataError(
            f"{source}: not a file, not a folder with metadata.csv, metadata.jsonl or metadata.parquet, and "
            f"`datasets` cannot open it as a folder or a name on the Hub: {reason}{hint}"
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
    """The image files of a folder, at any depth; empty if there are parquet files, which may hold images."""
    from oner.processing.pipeline_image_text_retrieval import list_pictures  # it imports transformers' pipelines

    return [] if any(folder.glob("*.parquet")) else list_pictures(folder)


def _bare_texts(folder: Path) -> list[Path]:
    """The `.txt` files of a folder without tables."""
    formats = {READERS[file.suffix.lower()] for file in folder.iterdir() if file.suffix.lower() in READERS}
    return sorted(folder.glob("*.txt")) if formats == {"text"} else []


def _load_files(files: list[Path], kind: Kind, named: dict[str, str | None], streaming: bool) -> Loaded:
    """Table files of one format."""
    known = [ending for ending in READERS if ending != ".txt" or kind == "texts"]
    formats = {READERS[file.suffix.lower()] if file.suffix.lower() in known else None for file in files}
    if len(formats) != 1 or None in formats:
        raise PairDataError(f"expected files of one kind out of {sorted(known)}, got {[file.name for file in files]}")
    for file in files:
        regular(file)
    (form,) = formats

    # image paths are relative to the files' common folder
    folders = {str(file.parent) for file in files}
    if len(folders) > 1 and form != "parquet" and kind != "texts":
        raise PairDataError(f"files with picture paths must lie in one folder, got {sorted(folders)[:SHOWN]}")
    name = str(files[0]) + (f" (+{len(files) - 1})" if files[1:] else "")

    # the only column of plain lines needs no name
    chosen = named if form != "text" else {**named, "text": None}
    table = read_tables(form, files, lambda found: _columns(found, kind, chosen, name), rule_of(ROLES[kind]), name)
    data = table.data.to_iterable_dataset() if streaming else table.data
    return Loaded(data, name, str(files[0].parent), table.reasons, table.columns)


def _columns(found: list[str], kind: Kind, named: dict[str, str | None], name: str) -> dict[str, str]:
    """The column of each role of this kind, and of the id if it is named."""
    roles = [*ROLES[kind], *(("id",) if named["id"] is not None else ())]
    return {role: _pick(found, named[role], role, name) for role in roles}


def _one_split(data: dict, split: str | None, name: str) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise PairDataError(f"{name} {what}; choose one of {sorted(data)}")
    return data[split]


def _columns_of(data: Any, kind: Kind, named: dict[str, str | None], name: str) -> dict[str, str]:
    """The columns of a data set of `datasets`, by role."""
    found = data.column_names
    if found is None:  # a stream that does not know its columns
        found = list(next(iter(data), {}))
    columns = _columns(found, kind, named, name)
    if type((data.features or {}).get(named["id"])).__name__ == "Json":
        raise PairDataError(
            f"{name}: the id column {named['id']!r} mixes types, and `datasets` does not keep 7 and '7' apart; "
            "write all ids as strings or all as integers"
        )
    return columns


def _pick(found: list[str], given: str | None, role: str, name: str) -> str:
    """Name of the column for a role: the given one, else the first default that exists."""
    for column in USUAL[role] if given is None else (given,):
        if column in found:
            return column
    if role == "text" and given is not None and (inside := INSIDE.fullmatch(given)) and inside[1] in found:
        return inside[1]
    wanted = f"no column {given!r}" if given is not None else f"none of the columns {', '.join(USUAL[role])}"
    raise PairDataError(f"{name}: {wanted} for the {NOUNS[role]}; columns found: {', '.join(found)}")
