"""Prepares a run on a folder of pictures: reads captions, holds out a tenth, chooses batch size and epochs.

Captions come from a table in the folder (`metadata.csv`, or the only .csv, .tsv, .jsonl or .parquet), whose columns
the line may name, else from the lines of NAME.txt beside NAME.png, else from the picture's file name, else from the
name of its folder.
"""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from oner.processing.data.augmentation import names_a_side
from oner.processing.data.same_pictures import picture_digest
from oner.processing.data.sources import TABLES, open_rows
from oner.processing.pipeline_image_text_retrieval import list_pictures
from oner.training.evaluation.embedding import picture_fault
from oner.training.publishing.shipped import shipped_checkpoint, shipped_config
from oner.training.run.parsing import read_config

CONFIG = "oner_folder"
FEWEST = 20  # pictures below which a tenth is no measure of anything
HELD_OUT = 0.1
SIDES = 0.05  # of captions that name a side, from which on no picture is mirrored
BATCH = 128
# training pairs in total, and the range of epochs
PAIRS, EPOCHS = 10_000, (3, 60)
# file names given by cameras, scanners and phones
NAMELESS = set(
    "dsc dscn dscf img image images pano photo photos pic picture pxl scan screenshot untitled vid wa".split()
)
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("image_column", "text_column", "id_column")  # of the folder's table, which the written pairs do not keep
SCHEMA = {"captions": pa.list_(pa.string()), "id": pa.int64()}


class FolderError(ValueError):
    """The folder cannot be trained on; the message says what is missing."""


@dataclass(frozen=True)
class Pair:
    """
    Attributes:
        image: A path, or the bytes of a file.
        captions: One or more.
        picture: A key that is equal for equal pictures.
        concept: The row's id in the table; None unless the line names a column of ids.
    """

    image: str | bytes
    captions: list[str]
    picture: Hashable
    concept: Hashable | None = None


def folder_line(folder: str, line: Sequence[str]) -> list[str]:
    """
    Writes a folder's pairs and configuration to the directory of its run, and returns the run's command line: that
    configuration, overridden by `line`. The same call again resumes the run.

    Raises:
        FolderError: there are no pictures, too few, or none with captions.
    """
    place = Path(folder).resolve()
    told, rest = told_first(place, line)
    output = told.output_dir
    pairs = read_folder(place, **{name: getattr(told, name) for name in COLUMNS})
    train, held_out = hold_out(pairs, told.seed)
    for sentence in describe(place, pairs, len(held_out)):
        print(sentence)

    # the pairs, beside what the run leaves
    ids = concepts(pairs)
    tables = {
        output / f"{name}.parquet": table_of([pairs[row] for row in rows], [ids[row] for row in rows])
        for name, rows in (("pairs", train), ("held_out", held_out))
    }
    if not {"--allow_changes", "--allow-changes"} & set(rest):
        check_unchanged(place, output, tables)
    output.mkdir(parents=True, exist_ok=True)
    for path, table in tables.items():
        write_pairs(path, table)
    _write(output / "folder.json", json.dumps({"folder": str(place)}))

    # the values chosen here, which the caller's own file overrides
    file = told.config or CONFIG
    base = Path(file).resolve() if Path(file).is_file() else shipped_config(file)
    own = {} if told.config is None else read_config(file)
    ships = json.loads((shipped_checkpoint() / "config.json").read_text(encoding="utf-8"))["model_type"]
    family = told.family or own.get("family") or ships
    if family != ships and told.config is None:
        raise FolderError(f"--family {family}: {CONFIG} is of {ships}; expected --config too, one of {family}'s")
    low, high = EPOCHS
    chosen = {
        # a model of another family, or of a size that is told, begins at random
        "initial_model": str(shipped_checkpoint()) if family == ships and told.size is None else None,
        "batch_size": min(BATCH, len(train)),
        "epochs": min(high, max(low, round(PAIRS / len(train)))),
        "resume": "auto",
        **mirroring(pairs),
        # of the pairs that the shipped file names
        "data_licence": None,
        "attribution": None,
    }
    values = {
        "base": str(base),
        **{name: value for name, value in chosen.items() if name not in own},
        "train_data": [str(output / "pairs.parquet")],
        "eval_data": [str(output / "held_out.parquet")],
        "image_column": "image",
        "text_column": "captions",
        "id_column": "id",
        "output_dir": str(output),
        "seed": told.seed,
        **{name: getattr(told, name) for name in ("family", "size") if getattr(told, name) is not None},
    }
    _write(output / "run.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return ["--config", str(output / "run.yaml"), *rest]


def mirroring(pairs: Sequence[Pair]) -> dict[str, float]:
    """No picture is mirrored where captions often name a side, which a mirrored one would contradict."""
    captions = [caption for pair in pairs for caption in pair.captions]
    named = sum(map(names_a_side, captions))
    if named < SIDES * len(captions):
        return {}
    print(f"{named} of {len(captions)} captions name a side, left or right: pictures are not mirrored")
    return {"horizontal_flip": 0.0}


def told_first(folder: Path, line: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What decides of the run of a folder, and the rest of the line. Raises `FolderError`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--output_dir", "--output-dir", type=Path, default=Path("runs") / folder.name)
    first.add_argument("--seed", type=int, default=0)
    first.add_argument("--family")
    first.add_argument("--size")
    for name in COLUMNS:
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    told, rest = first.parse_known_args(line)
    if told.output_dir.is_file():
        raise FolderError(f"--output_dir {told.output_dir} is a file; expected a directory, new or of this run")
    return told, rest


def pictures_of(run: str | Path) -> Path | None:
    """The folder that a run was trained on; None for other data. Raises `FolderError` if it no longer exists."""
    note = Path(run) / "folder.json"
    if not note.is_file():
        return None
    folder = Path(json.loads(note.read_text(encoding="utf-8"))["folder"])
    if not folder.is_dir():
        raise FolderError(
            f"{run} was trained on {folder}, which is gone; give its new place: `oner search --index PLACE`, "
            f"`oner serve RUN PLACE`"
        )
    return folder


def read_folder(folder: Path, **columns: str | None) -> list[Pair]:
    """The folder's pairs, in the order of file names or of its table, whose `COLUMNS` may be named."""
    named = {name: column for name, column in columns.items() if column is not None}
    if (table := find_table(folder)) is not None:
        rows = open_rows(table, "pairs", bad_rows="skip", **named)
        bad = {number: reason for number in range(len(rows)) if (reason := rows.reason(number)) is not None}
        tell_left_out(
            [f"row {number}: {reason}" for number, reason in bad.items()], len(rows), f"rows of {table.name}"
        )
        with_ids = "id_column" in named
        pairs = [_of_row(rows[number], with_ids) for number in range(len(rows)) if number not in bad]
    elif named:
        told = ", ".join(f"--{name} {column}" for name, column in named.items())
        raise FolderError(f"{folder}: there is no table in it; expected one for {told}")
    else:
        pictures = list_pictures(folder)
        if not pictures:
            raise FolderError(f"{folder}: there is no picture in it, and no table of any")
        named = [(path, captions_of(Path(path), folder)) for path in pictures]
        pairs = [Pair(path, captions, _digest(path)) for path, captions in named if captions]
        if not pairs:
            raise FolderError(
                f"{folder}: not one of {len(pictures)} pictures has a name that says what it shows, the first is "
                f"{Path(pictures[0]).name}; expected red_apple.png, a folder for each thing (apple/1.png), NAME.txt "
                f"beside NAME.png, or metadata.csv with the columns file_name and text"
            )
        if len(pairs) < len(pictures):
            print(f"{len(pictures) - len(pairs)} of {len(pictures)} pictures have no words in their names: left out")
    pairs = readable(pairs)
    if (different := len({pair.picture for pair in pairs})) < FEWEST:
        raise FolderError(
            f"{folder}: {different} different pictures that can be read and have captions; expected {FEWEST} or more"
        )
    return pairs


def readable(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose picture can be read; of the others it is said how many, and what is wrong with the first."""
    with ThreadPoolExecutor() as threads:
        reasons = list(threads.map(picture_fault, [pair.image for pair in pairs]))
    tell_left_out([reason for reason in reasons if reason is not None], len(pairs), "pictures")
    return [pair for pair, reason in zip(pairs, reasons, strict=True) if reason is None]


def tell_left_out(reasons: Sequence[str], total: int, what: str) -> None:
    """Prints how many of what was found are no good, and why the first is not."""
    if reasons:
        print(f"{len(reasons)} of {total} {what} cannot be used: left out; the first: {reasons[0]}")


def find_table(folder: Path) -> Path | None:
    """The table of a folder's captions. Raises `FolderError` if there are several and none is called metadata."""
    for name in TABLES:
        if (folder / name).is_file():
            return folder / name
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS]
    if len(tables) > 1:
        raise FolderError(
            f"{folder}: {', '.join(path.name for path in tables)} are all tables; expected one, or one called "
            f"metadata{tables[0].suffix}"
        )
    return tables[0] if tables else None


def _of_row(row: Mapping[str, Any], with_ids: bool) -> Pair:
    image = row["image"]
    if isinstance(image, Mapping):
        image = image.get("bytes") or image["path"]
    return Pair(image, list(row["captions"]), _digest(image), row["id"] if with_ids else None)


def _digest(image: str | bytes) -> Hashable:
    """Equal for equal files, whatever they are called."""
    try:
        return picture_digest(Path(image).read_bytes() if isinstance(image, str) else image)
    except OSError:
        return image


def captions_of(picture: Path, folder: Path) -> list[str]:
    """
    The captions of a picture that no table names; none where its name has no words.

    Raises:
        FolderError: a file of captions that is not UTF-8, whose letters would be others.
    """
    beside = picture.with_suffix(".txt")
    if beside.is_file():
        try:
            lines = beside.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise FolderError(f"{beside}: is not UTF-8 (byte {error.start}); save it so") from error
        if texts := [line.strip() for line in lines if line.strip()]:
            return texts

    # the file name, then the names of the folders above it, up to the given one
    inside = [parent.name for parent in picture.parents if folder in parent.parents]
    return next(([words] for words in map(words_of, [picture.stem, *inside]) if words), [])


def words_of(name: str) -> str:
    """The words of a file's name: "red-apple_03" is "red apple", "IMG_2041" is "", and so is a digest."""
    name = os.fsencode(name).decode("utf-8", "replace")  # of another encoding, as old archives have them
    tokens = re.split(r"[\s_\-.+,()\[\]]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    telling = [token for token in tokens if any(letter.isalpha() for letter in token) and not _is_code(token)]
    return " ".join(telling) if any(token.lower() not in NAMELESS for token in telling) else ""


def _is_code(token: str) -> bool:
    """Whether a token has no meaning: a digest, or a camera's DSC01234."""
    camera = re.fullmatch(r"([A-Za-z]+)\d+", token)
    digest = re.fullmatch(r"(?=.*\d)[0-9a-fA-F]{6,}", token)
    return digest is not None or (camera is not None and camera[1].lower() in NAMELESS)


def concepts(pairs: Sequence[Pair]) -> list[int]:
    """An id for each pair: equal if their table says so, else if they share a caption or a picture, directly or
    through other pairs."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for number, pair in enumerate(pairs):
        shared = [("picture", pair.picture), *(("caption", " ".join(one.lower().split())) for one in pair.captions)]
        for key in shared if pair.concept is None else [("concept", pair.concept)]:
            parent[root(key)] = root(number)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(number), len(numbers)) for number in range(len(pairs))]


def hold_out(pairs: Sequence[Pair], seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training pairs, and of the pairs of a tenth of the pictures, held out by `seed`."""
    # chosen by a digest of the picture, so that an added picture moves few others
    drawn = {pair.picture: hashlib.sha256(f"{seed}/{pair.picture}".encode()).digest() for pair in pairs}
    chosen = set(sorted(drawn, key=drawn.__getitem__)[: max(1, round(HELD_OUT * len(drawn)))])
    train = [number for number, pair in enumerate(pairs) if pair.picture not in chosen]
    return train, [number for number, pair in enumerate(pairs) if pair.picture in chosen]


def describe(folder: Path, pairs: Sequence[Pair], held_out: int) -> Iterator[str]:
    """Sentences about the pairs that were found."""
    first = pairs[0]
    name = Path(first.image).name if isinstance(first.image, str) else "the first picture"
    yield f"{folder}: {len(pairs)} pairs, {held_out} held out; {name} is {first.captions[0]!r}"
    counted = Counter(pair.captions[0].lower() for pair in pairs)
    if repeated := len(pairs) - len(counted):
        most, times = counted.most_common(1)[0]
        yield (
            f"{repeated} of {len(pairs)} captions repeat an earlier one ({most!r} occurs {times} times): such "
            f"pictures are positives for each other's captions, and no text query can tell them apart"
        )


def check_unchanged(folder: Path, output: Path, tables: Mapping[Path, pa.Table]) -> None:
    """Raises `FolderError` where a run has learned from other pairs, which stay beside it."""
    if not any(output.glob("checkpoint-*")):
        return
    if any(path.is_file() and not pq.read_table(path).equals(table) for path, table in tables.items()):
        raise FolderError(
            f"{folder}: its pictures or captions are others than when {output} began; --output_dir begins a new run, "
            f"--allow_changes goes on with this one"
        )


def table_of(pairs: Sequence[Pair], ids: Sequence[int]) -> pa.Table:
    """Pairs as a table: pictures, captions, and what counts as one thing."""
    # a column is of bytes or of paths, and these are UTF-8
    images = [pair.image for pair in pairs]
    if any(isinstance(image, bytes) or not _is_utf8(image) for image in images):
        images = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
    columns = {
        "image": pa.array(images),
        "captions": pa.array([pair.captions for pair in pairs], SCHEMA["captions"]),
        "id": pa.array(ids, SCHEMA["id"]),
    }
    return pa.table(columns)


def write_pairs(path: Path, table: pa.Table) -> None:
    """A table of pairs, unless the same is there already."""
    if path.is_file() and pq.read_table(path).equals(table):
        return
    # all processes of a launch write the same file
    part = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, part)
    os.replace(part, path)


def _is_utf8(name: str) -> bool:
    return name == name.encode("utf-8", "replace").decode("utf-8")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
