"""Pairs of pictures and captions from where they lie, checked before the first step.

A row is {"image": bytes | path | {"bytes", "path"}, "captions": list of str, "id": int | str}. Pictures are not
decoded here. Rows that share an id show the same concept: they are true positives of each other.

Which columns are taken when none are named: for the picture the first of `image`, `file_name`, `image_path`; for the
text the first of `captions`, `caption`, `text`. A text column holds a string or a list of strings a row. The id is
the row number unless a column is named: a column that happens to be called `id` often numbers pictures, not concepts.
"""

import csv
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .vl_sampling import RowKey, concept_id

IMAGE_COLUMNS = ("image", "file_name", "image_path")
TEXT_COLUMNS = ("captions", "caption", "text")
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHOWN = 10  # rows named in an error
CHUNK = 1024  # rows checked at a time: small enough for rows that are copied because of a selection


class PairDataError(ValueError):
    """The data cannot be used; the message names the source, the rows and what is wrong with them."""


def open_pairs(
    source: Any,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> "PairRows | PairStream":
    """Opens and checks a source of pairs.

    Args:
        source: one of
            a folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (column `file_name`, relative to it),
            in itself or in a folder named as the split; or with a file `{split}.parquet`;
            a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a list of files of one kind beside each other (picture
            paths are relative to the file);
            a folder that `datasets` can read; a `datasets` object; a name on the Hub.
        image_column, text_column, id_column: names of the columns; see the top of this file for what None means.
        split: which split, where the source has several.
        streaming: read in sequence without an index; gives a `PairStream`.

    Raises:
        PairDataError: a missing source or column, an ambiguous split, or rows that cannot be used: the first ten with
            their numbers (from 0), and how many there are.
    """
    data, name, folder = _load(source, split, streaming)
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
    kind = PairStream if isinstance(data, datasets.IterableDataset) else PairRows
    return kind(data, columns, name, folder)


class PairRows:
    """Rows by number: `len(rows)`, `rows[i]`, `rows.take([i, j])`. Checked as a whole when it is made."""

    exact_resume = True

    def __init__(self, data: datasets.Dataset, columns: dict[str, str], name: str, folder: str | None = None) -> None:
        self.columns, self.name, self.folder = columns, name, folder
        self.data = _undecoded(data.select_columns(list(dict.fromkeys(columns.values()))), columns["image"])
        _check_rows(self)
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {self.name}, which has {len(self)} rows")
        return self.take([index % len(self)])[0]

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one read."""
        table = self.data[list(indices)]
        images, texts = table[self.columns["image"]], table[self.columns["text"]]
        ids = table[self.columns["id"]] if "id" in self.columns else indices
        return [_row(*parts, self.folder) for parts in zip(images, texts, ids, strict=True)]

    def ids(self) -> np.ndarray:
        """Concept id of every row as a number, (n,) int64: the `groups` of the sampler, the batch's `ids`."""
        if self._ids is None:
            if "id" not in self.columns:
                self._ids = np.arange(len(self), dtype=np.int64)
            else:
                column = (
                    self.data.select_columns([self.columns["id"]]).with_format("arrow")[:].column(0).combine_chunks()
                )
                coded = column.dictionary_encode()
                known = [concept_id(value) for value in coded.dictionary.to_pylist()]
                self._ids = np.array(known, dtype=np.int64)[coded.indices.to_numpy()]
        return self._ids

    def captions(self) -> Iterator[str]:
        """Every caption of every row in order, for instance to train a tokenizer; pictures are not read."""
        for table in self.data.select_columns([self.columns["text"]]).iter(CHUNK):
            for text in table[self.columns["text"]]:
                yield from [text] if isinstance(text, str) else text


class PairStream:
    """Rows in sequence. A run that reads a stream cannot be resumed exactly, which it says when it is opened."""

    exact_resume = False

    def __init__(
        self, data: datasets.IterableDataset, columns: dict[str, str], name: str, folder: str | None = None
    ) -> None:
        self.columns, self.name, self.folder = columns, name, folder
        self.data = _undecoded(data, columns["image"])
        warnings.warn(self.resume_note, stacklevel=3)

    @property
    def resume_note(self) -> str:
        return (
            f"{self.name} is read as a sequential stream: a resumed run can only read on from the beginning and skip, "
            "which is not exact if the source changes its order; open it without streaming for an exact resume"
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, raw in enumerate(self._cells()):
            image, text = raw[self.columns["image"]], raw[self.columns["text"]]
            identity = raw[self.columns["id"]] if "id" in self.columns else number
            reason = _text_reason(text) or _image_reason(image, self.folder) or _id_reason(identity)
            if reason:
                raise PairDataError(_report(self.name, [(number, reason)], 1, None))
            yield _row(image, text, identity, self.folder)

    def _cells(self) -> Iterator[dict[str, Any]]:
        # Not iter(self.data): inside a data worker `datasets` would silently give only that worker's shards.
        for table in self.data.iter(64):
            names = list(table)
            for cells in zip(*table.values(), strict=True):
                yield dict(zip(names, cells, strict=True))


class PairTrainingSet(Dataset):
    """What the DataLoader indexes with the sampler's `RowKey`s: (key, row), the collator's input."""

    def __init__(self, rows: PairRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: RowKey) -> tuple[RowKey, dict[str, Any]]:
        return key, self.rows[key.row]

    def __getitems__(self, keys: Sequence[RowKey]) -> list[tuple[RowKey, dict[str, Any]]]:
        return list(zip(keys, self.rows.take([key.row for key in keys]), strict=True))


class PairTrainingStream(IterableDataset):
    """A stream as whole batches for one process: lists of (key, row), for a DataLoader with `batch_size=None`.

    The global order is the stream's, shuffled in a buffer by a generator of (seed, epoch); process `rank` takes its
    contiguous slice of each global batch and data worker w of W the batches w, w + W, ...: the order depends on
    neither number. Every worker reads the whole stream. The last, incomplete batch of an epoch is dropped.
    """

    def __init__(
        self,
        stream: PairStream,
        batch_size: int,
        total_steps: int,
        seed: int = 0,
        buffer_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"batch of {batch_size} rows, rank {rank} and {world_size} processes do not fit")
        if buffer_size < 1 or not 0 <= start_step <= total_steps:
            raise ValueError(f"got buffer_size {buffer_size}, start_step {start_step} of {total_steps}")
        self.stream, self.batch_size, self.total_steps, self.seed = stream, batch_size, total_steps, seed
        self.buffer_size, self.rank, self.world_size, self.start_step = buffer_size, rank, world_size, start_step

    def __iter__(self) -> Iterator[list[tuple[RowKey, dict[str, Any]]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.batch_size // self.world_size
        for step, epoch, batch in self._batches():
            if step >= self.start_step and (step - self.start_step) % workers == worker:
                mine = batch[self.rank * share : (self.rank + 1) * share]
                yield [(RowKey(number, epoch, step / self.total_steps), row) for number, row in mine]

    def _batches(self) -> Iterator[tuple[int, int, list[tuple[int, dict[str, Any]]]]]:
        """(step, epoch, global batch) from the first step on."""
        step, epoch = 0, 0
        while step < self.total_steps:
            batch, first = [], step
            for item in self._shuffled(epoch):
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield step, epoch, batch
                    batch, step = [], step + 1
                    if step == self.total_steps:
                        return
            if step == first:
                raise PairDataError(f"{self.stream.name}: the stream ended before one batch of {self.batch_size} rows")
            epoch += 1

    def _shuffled(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        buffer = []
        for item in enumerate(self.stream):
            if len(buffer) < self.buffer_size:
                buffer.append(item)
                continue
            place = int(rng.integers(self.buffer_size))
            yield buffer[place]
            buffer[place] = item
        for place in rng.permutation(len(buffer)):
            yield buffer[place]


def _row(image: Any, text: str | list[str], identity: int | str, folder: str | None) -> dict[str, Any]:
    if folder is not None:
        if isinstance(image, str):
            image = os.path.join(folder, image)
        elif isinstance(image, dict) and image.get("bytes") is None:
            image = {**image, "path": os.path.join(folder, image["path"])}
    return {"image": image, "captions": [text] if isinstance(text, str) else list(text), "id": identity}


# Opening


def _load(source: Any, split: str | None, streaming: bool) -> tuple[Any, str, str | None]:
    """(data set or dict of splits, name for messages, folder that picture paths are relative to)."""
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, dict)):  # a DatasetDict is a dict
        return source, f"the given {type(source).__name__}", None
    if isinstance(source, (list, tuple)):
        return _load_files([Path(file) for file in source], streaming)
    if not isinstance(source, (str, os.PathLike)):
        raise PairDataError(f"a source is a path, a list of paths, a name or a data set, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        for place in (path,) if split is None else (path / split, path):
            for table in ("metadata.csv", "metadata.jsonl", "metadata.parquet", f"{split}.parquet"):
                if (place / table).is_file():
                    return _load_files([place / table], streaming)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path)), str(path), None
    elif path.suffix in READERS or path.is_file():
        return _load_files([path], streaming)
    try:
        return datasets.load_dataset(str(source), split=split, streaming=streaming), str(source), None
    except (OSError, ValueError) as error:  # not found, offline, an unknown split, an empty folder
        raise PairDataError(
            f"{source}: not a file, not a folder with metadata.csv, metadata.jsonl or metadata.parquet, and "
            f"`datasets` cannot open it as a folder or a name on the Hub: {error}"
        ) from error


def _load_files(files: list[Path], streaming: bool) -> tuple[Any, str, str]:
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
    if kind == "csv":
        # Every column as text: "NA", "null" and "007" are captions, not missing values or numbers.
        header = _csv_header(files[0])
        options = {"features": datasets.Features({column: datasets.Value("string") for column in header})}
        options |= {"sep": _separator(files[0]), "keep_default_na": False}
    try:
        data = datasets.load_dataset(
            kind, data_files=[str(file) for file in files], split="train", streaming=streaming, **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, pa.ArrowException) as error:
        problems = [problem for file in files if kind != "parquet" for problem in _broken_lines(file, kind)]
        if problems:
            raise PairDataError(_report(name, problems[:SHOWN], len(problems), None)) from error
        raise PairDataError(f"{name}: cannot be read as {kind}: {error.__cause__ or error}") from error
    return data, name, str(files[0].parent)


def _separator(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def _csv_header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=_separator(file))
        header, first = next(reader, []), next(reader, [])
    if not header or len(set(header)) != len(header):
        raise PairDataError(f"{file}: the first line must name the columns, each once; got {header}")
    if len(first) > len(header):  # pandas would take the surplus for row labels and shift every column
        problems = list(_broken_lines(file, "csv"))
        raise PairDataError(_report(str(file), problems[:SHOWN], len(problems), None))
    return header


def _broken_lines(file: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Why a text file could not be read, row by row; used only after reading has failed."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="" if kind == "csv" else None) as lines:
        width, row = None, -1
        for fields in csv.reader(lines, delimiter=_separator(file)) if kind == "csv" else lines:
            if not fields or fields == "\n":
                continue
            if kind == "csv" and width is None:
                width = len(fields)
                continue
            row += 1
            if any("\udc80" <= sign <= "\udcff" for sign in "".join(fields)):
                yield row, "is not UTF-8"
            elif kind == "csv" and len(fields) > width:
                yield row, f"has {len(fields)} fields where the header has {width} (a comma outside quotes?)"
            elif kind == "json":
                try:
                    json.loads(fields)
                except ValueError as error:
                    yield row, f"is not JSON ({error})"


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


def _undecoded(data: Any, image_column: str) -> Any:
    if data.features is not None and isinstance(data.features[image_column], datasets.Image):
        return data.cast_column(image_column, datasets.Image(decode=False))
    return data


# Checking


def _check_rows(rows: PairRows) -> None:
    """One pass over the columns; raises `PairDataError` with the first `SHOWN` bad rows and their number."""
    if not len(rows):
        raise PairDataError(f"{rows.name}: no rows")
    problems, total, start = [], 0, 0
    checks = {"text": _bad_texts, "image": _bad_images, "id": _bad_ids}
    for table in rows.data.with_format("arrow").iter(CHUNK):
        bad = np.zeros(len(table), dtype=bool)
        for role, column in rows.columns.items():
            bad |= checks[role](table[column].combine_chunks(), rows)
        for place in np.flatnonzero(bad)[: SHOWN - len(problems)]:
            raw = {role: _value(table[column][int(place)]) for role, column in rows.columns.items()}
            reasons = [_text_reason(raw["text"]), _image_reason(raw["image"], rows.folder)]
            reasons += [_id_reason(raw["id"])] if "id" in raw else []
            problems.append((start + int(place), "; ".join(filter(None, reasons))))
        total += int(bad.sum())
        start += len(table)
    if total:
        raise PairDataError(_report(rows.name, problems, total, len(rows)))


def _value(scalar: pa.Scalar) -> Any:
    """Python value of a cell; `datasets` stores a column of mixed types as JSON text."""
    value = scalar.as_py()
    return json.loads(value) if isinstance(scalar, pa.ExtensionScalar) and value is not None else value


def _by_reason(array: pa.Array, reason: Any) -> np.ndarray:
    """The slow way, for types that have no vectorised check."""
    return np.array([reason(_value(scalar)) is not None for scalar in array], dtype=bool)


def _blank(array: pa.Array) -> np.ndarray:
    """Null, empty or only white space: (n,) bool."""
    lengths = pc.binary_length(pc.utf8_trim_whitespace(array))
    return pc.fill_null(pc.equal(lengths, 0), True).to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _bad_texts(array: pa.Array, rows: PairRows) -> np.ndarray:
    if _is_text(array.type):
        return _blank(array)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)) or not _is_text(array.type.value_type):
        return _by_reason(array, _text_reason)
    bad = pc.fill_null(pc.equal(pc.list_value_length(array), 0), True).to_numpy(zero_copy_only=False).copy()
    bad[pc.list_parent_indices(array).to_numpy()[_blank(pc.list_flatten(array))]] = True
    return bad


def _text_reason(text: Any) -> str | None:
    """What is wrong with a cell of the text column; None if nothing."""
    if text is None:
        return "the caption is null"
    if isinstance(text, str):
        return None if text.strip() else "the caption is empty"
    if not isinstance(text, (list, tuple)):
        return f"the caption must be a string or a list of strings, got {type(text).__name__} {text!r:.40}"
    if not text:
        return "the list of captions is empty"
    wrong = [_text_reason(one) if one is None or isinstance(one, str) else "not a string" for one in text]
    return next((f"caption {i} of the list: {reason}" for i, reason in enumerate(wrong) if reason), None)


def _bad_images(array: pa.Array, rows: PairRows) -> np.ndarray:
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.fill_null(pc.equal(pc.binary_length(array), 0), True).to_numpy(zero_copy_only=False)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return _by_reason(array, lambda image: _image_reason(image, rows.folder))
    # Most rows carry their bytes: only the others are looked at one by one. A null struct has null fields.
    content = pc.struct_field(array, "bytes")
    empty = _bad_images(content.cast(pa.binary()) if pa.types.is_null(content.type) else content, rows)
    for place in np.flatnonzero(empty):
        empty[place] = _image_reason(_value(array[int(place)]), rows.folder) is not None
    return empty


def _image_reason(image: Any, folder: str | None) -> str | None:
    """What is wrong with a cell of the picture column, without decoding it; None if nothing."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if image is None:
        return "the picture is null"
    if isinstance(image, bytes):
        return None if image else "the picture has 0 bytes"
    if not isinstance(image, str):
        return f"the picture must be bytes, a path or {{bytes, path}}, got {type(image).__name__}"
    path = os.path.join(folder or "", image)
    return None if os.path.isfile(path) else f"no picture file {path}"


def _bad_ids(array: pa.Array, rows: PairRows) -> np.ndarray:
    if _is_text(array.type) or (pa.types.is_integer(array.type) and array.type != pa.uint64()):
        return pc.is_null(array).to_numpy(zero_copy_only=False)
    return _by_reason(array, _id_reason)


def _id_reason(identity: Any) -> str | None:
    if isinstance(identity, str) or (isinstance(identity, int) and not isinstance(identity, bool)):
        fits = isinstance(identity, str) or -(2**63) <= identity < 2**63
        return None if fits else f"the id {identity} does not fit into 64 bits"
    return f"the id must be an int or a string, got {'null' if identity is None else type(identity).__name__}"


def _report(name: str, problems: list[tuple[int, str]], total: int, of: int | None) -> str:
    share = f"{total} of {of} rows" if of is not None else f"{total} row" + "s" * (total > 1)
    lines = [f"{name}: {share} cannot be used (row numbers count from 0)"]
    lines += [f"  row {row}: {reason}" for row, reason in problems]
    if total > len(problems):
        lines.append(f"  ... and {total - len(problems)} more")
    return "\n".join(lines)
