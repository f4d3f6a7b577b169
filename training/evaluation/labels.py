"""Opens pictures with class numbers instead of captions, for zero-shot classification with given class names.

Sources: a folder with one folder of pictures per class, a table of pictures and numbers (`.parquet`, `.csv`, `.tsv`,
`.jsonl`), a saved data set, or a name on the Hub. A number is the index of the class in the list of names; folders are
numbered in alphabetical order, as in `datasets`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from oner.processing.data.row_checks import SHOWN, report
from oner.processing.data.sources import PairDataError, PairRows, open_rows
from oner.processing.data.text_tables import csv_names, csv_rows

from .prompts import ClassName

LABEL_COLUMNS = ("label", "labels")
IMAGE_COLUMNS = ("image", "img", "file_name", "image_path")
TABLES = {".parquet": "parquet", ".jsonl": "json"}
CSV = (".csv", ".tsv")
NAME_COLUMN = "oner_class_name"


def open_labelled(
    source: str,
    class_names: Sequence[ClassName],
    image_column: str | None = None,
    label_column: str | None = None,
) -> PairRows:
    """Rows {"image", "captions": [name of its class], "id": its number}.

    Raises:
        PairDataError: the source or column does not exist, there are several splits, or a class is not in 0..C-1.
    """
    # the columns of pictures and class numbers
    data, folder = load_source(source)
    image_column = find_column(data, image_column, IMAGE_COLUMNS, "pictures", source)
    label_column = find_column(data, label_column, LABEL_COLUMNS, "class numbers", source)

    # if the data set names its classes, its numbers refer to these names
    kind = data.features[label_column]
    if isinstance(kind, datasets.ClassLabel) and kind.num_classes != len(class_names):
        raise PairDataError(
            f"{source}: its {kind.num_classes} classes ({', '.join(kind.names[:5])}, ...) are numbered among "
            f"themselves, but {len(class_names)} class names are given: name exactly its classes, in its order"
        )

    # a class is called by the first of its synonyms
    numbers = class_numbers(data[label_column], len(class_names), f"{source}, column {label_column!r}")
    first = [name if isinstance(name, str) else name[0] for name in class_names]

    # rows of pairs, whose caption is the class and whose concept id is its number
    images = pictures_of(data, image_column, folder)
    columns = {"id": numbers, NAME_COLUMN: [first[number] for number in numbers]}
    for name, values in columns.items():
        images = images.add_column(name, values)
    return open_rows(images, "pairs", image_column, NAME_COLUMN, "id")


def pictures_of(data: datasets.Dataset, image_column: str, folder: str | None) -> datasets.Dataset:
    """The column of pictures; paths in a table are relative to its folder."""
    images = data.select_columns([image_column])
    if isinstance(images.features[image_column], datasets.Value) and folder is not None:
        paths = [os.path.join(folder, path) for path in images[image_column]]
        images = datasets.Dataset.from_dict({image_column: paths})
    return images


def class_numbers(values: Sequence[Any], count: int, where: str) -> list[int]:
    """The values as ints; strings of digits are accepted, since a CSV file has only strings.

    Raises:
        PairDataError: a value is not a whole number in 0..count-1; names the first such row, and how many there are.
    """
    numbers = []
    wrong = []
    for row, value in enumerate(values):
        # True is an int in Python, but not a class
        whole = isinstance(value, int) and not isinstance(value, bool)
        whole = whole or (isinstance(value, str) and value.strip().isdecimal())
        number = int(value) if whole else -1
        if not 0 <= number < count:
            wrong.append((row, value))
        numbers.append(number)
    if wrong:
        row, value = wrong[0]
        raise PairDataError(
            f"{where}: with {count} class names a class must be a whole number in 0..{count - 1}, got {value!r} in "
            f"row {row}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    return numbers


def load_source(source: str) -> tuple[datasets.Dataset, str | None]:
    """
    Rows of a source and the folder of its picture paths; None if the rows contain the pictures. Cells of a `.csv` or
    `.tsv` are texts as written, so the labels "NA", "1" and "01" are three classes.

    Raises:
        PairDataError: it cannot be opened, or has several splits.
    """
    # the kind of source: a table, a saved data set, folders of pictures, else a name on the Hub
    path = Path(source)
    if path.suffix in CSV and path.is_file():
        return read_csv(path), str(path.parent)
    folder = None
    try:
        if path.suffix in TABLES and path.is_file():
            kind = TABLES[path.suffix]
            folder = str(path.parent)
            data = datasets.load_dataset(kind, data_files=[str(path)], split="train")
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
        elif path.is_dir() and not any(path.glob("metadata.*")) and any(entry.is_dir() for entry in path.iterdir()):
            files = {"train": str(path.resolve() / "**")}  # one split, whatever the folders are called
            data = datasets.load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
        else:
            data = datasets.load_dataset(source)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise PairDataError(f"{source}: `datasets` cannot open it: {error.__cause__ or error}") from error

    # several splits, without a choice
    if isinstance(data, dict):
        if len(data) != 1:
            raise PairDataError(f"{source} has the splits {sorted(data)}: name the files or the folder of one")
        (data,) = data.values()
    return data, folder


def read_csv(path: Path) -> datasets.Dataset:
    """
    The cells of a csv as texts. Not by `datasets`: its reader takes "NA" and "none" for missing, and "01" for 1.

    Raises:
        PairDataError: as `csv_rows`, or a row is not UTF-8.
    """
    rows = list(csv_rows(path))
    if wrong := [(place, row) for place, row in enumerate(rows) if isinstance(row, str)]:
        raise PairDataError(report(str(path), wrong[:SHOWN], len(wrong), len(rows)))
    columns = {name: [row[name] for row in rows] for name in csv_names(path)}
    return datasets.Dataset.from_dict(columns, datasets.Features(dict.fromkeys(columns, datasets.Value("string"))))


def find_column(data: datasets.Dataset, name: str | None, usual: Sequence[str], what: str, source: str) -> str:
    """The column of that name, or the first of the usual ones. Raises `PairDataError` if there is none."""
    for column in usual if name is None else (name,):
        if column in data.column_names:
            return column
    wanted = f"none of the columns {', '.join(usual)}" if name is None else f"no column {name!r}"
    raise PairDataError(f"{source}: {wanted} for the {what}; columns found: {', '.join(data.column_names)}")
