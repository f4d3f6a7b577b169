"""Rows of composed retrieval: a reference image and a text that describe a target image.

Every row is {"image", "target_image", "text", "id", "reference_id"}. The id is the target's, so rows with one target
are positives of each other. A reference that is also some row's target has that target's id, because it answers that
row. Images are paths or encoded bytes. Rows of CIRR also have "leaves_reference": its protocol removes a query's own
reference from the gallery, FashionIQ's does not.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch

from oner.processing.vl_captions import caption_reason

from .collation import Example
from .listed_rows import ListedRows
from .places import located
from .row_checks import PairDataError, id_reason
from .same_pictures import picture_digest
from .sampling import concept_id
from .task_files import Broken, RowFault, field, find_file, first_field, forget_files, read_json

PICTURES = ("image", "target_image")
GALLERY = "_gallery.parquet"
QUERIES = "_queries.parquet"
Row = dict[str, Any]


def open_composed(
    sources: Sequence[str],
    folder: str | None = None,
    clean: Callable[[str], str] | None = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Args:
        sources: each one of

            a parquet table with columns `image`, `text`, `target_image`, and `id` if different images are one target;
            without it each target image is its own;
            `NAME_queries.parquet` with `NAME_gallery.parquet` beside it, whose row `target` is the target;
            CIRR's JSON, a list of {"reference", "target_hard", "caption"} with images NAME.png;
            FashionIQ's JSON, a list of {"candidate", "target", "captions"} with images NAME.jpg, whose two captions
            are joined by "and".
        folder: folder that image paths are relative to; by default that of the source.
        clean: rewrites each text.
        bad_rows: as in `ListedRows`.

    Raises:
        PairDataError: a file is none of these, or rows are bad; the message gives their numbers.
    """
    forget_files()
    rows: list[Row] = []
    for source in sources:
        read = _of_table if Path(source).suffix == ".parquet" else _of_annotations
        for row in read(source, folder):
            text = row["text"]
            if clean is not None and isinstance(text, str):
                text = clean(text)
            rows.append({**row, "text": text})
    _identify(rows)
    return ListedRows(rows, ", ".join(sources), _reason, bad_rows, PICTURES)


def _identify(rows: Sequence[Row]) -> None:
    """Sets the ids of each row's two images, in place: the given id, else one derived from the image."""
    answers: dict[int, Any] = {}  # digest of a target -> its id
    for number, row in enumerate(rows):
        digest = picture_digest(row["target_image"])
        if row["id"] is None:
            row["id"] = f"row {number}" if digest is None else f"picture {digest}"
        if digest is not None and id_reason(row["id"]) is None:
            answers.setdefault(digest, row["id"])
    for number, row in enumerate(rows):
        digest = picture_digest(row["image"])
        alone = f"reference {number}" if digest is None else f"picture {digest}"
        row["reference_id"] = answers.get(digest, alone)


def _reason(row: Mapping[str, Any]) -> str | None:
    """Why a row is bad, apart from its images."""
    return row.get("fault") or caption_reason(row["text"], "text") or id_reason(row["id"])


class References:
    """Targets of the references: the concept id of each, which is that of a row whose target it is, if any."""

    def reason(self, row: dict[str, Any]) -> str | None:
        """None: every row has its reference."""
        return None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`reference_ids` (B,) int64, comparable with the batch's `ids`, which are those of the targets."""
        return {"reference_ids": torch.tensor([concept_id(one.row["reference_id"]) for one in examples])}  # (B,)


def _of_table(source: str, folder: str | None) -> Iterator[Row]:
    """Rows of a parquet file; the targets of a file of queries are read from the gallery beside it."""
    path = Path(source)
    home = folder or str(path.parent)
    try:
        columns = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise PairDataError(f"{source}: cannot be read as parquet: {error}") from error

    # queries name a row of their gallery
    if path.name.endswith(QUERIES) and "target" in columns:
        _expect(source, columns, ("image", "text", "target"))
        gallery = path.with_name(path.name.removesuffix(QUERIES) + GALLERY)
        if not gallery.is_file():
            raise PairDataError(f"{source}: expected its gallery beside it, {gallery}, and there is no such file")
        pictures = pq.read_table(gallery, columns=["image"])["image"]  # a column of cells, decoded one by one
        for query in pq.read_table(path, columns=["image", "text", "target"]).to_pylist():
            number = query["target"]
            fault = _target_reason(number, gallery.name, len(pictures))
            target = None if fault else pictures[number].as_py()
            yield {**_cells(home, query["image"], target), "text": query["text"], "id": None, "fault": fault}
        return

    # a table that holds both pictures
    _expect(source, columns, ("image", "text", "target_image"))
    wanted = ["image", "text", "target_image", *(["id"] if "id" in columns else [])]
    for row in pq.read_table(path, columns=wanted).to_pylist():
        yield {**_cells(home, row["image"], row["target_image"]), "text": row["text"], "id": row.get("id")}


def _target_reason(number: Any, gallery: str, count: int) -> str | None:
    """Why a query's target, a row of a gallery of `count` rows, is invalid; None if it is valid."""
    if number is None:
        return "the target is null"
    if isinstance(number, bool) or not isinstance(number, int):
        return f"the target must be a row of {gallery}, got {type(number).__name__} {number!r:.40}"
    return None if 0 <= number < count else f"the target is row {number}, and {gallery} has {count} rows"


def _expect(source: str, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if several := [name for name in wanted if columns.count(name) > 1]:
        raise PairDataError(f"{source}: several columns are called {several[0]!r}; expected one of that name")
    if lacking := [name for name in wanted if name not in columns]:
        raise PairDataError(
            f"{source}: expected the columns {', '.join(wanted)}, got a table without {', '.join(lacking)}: "
            f"{', '.join(columns)}"
        )


def _cells(home: str, *cells: Any) -> Row:
    """The two images of a row; a cell is bytes, a path, or a mapping of `datasets` with either."""
    found = [(cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell for cell in cells]
    placed = [located(os.path.join(home, cell)) if isinstance(cell, str) else cell for cell in found]
    return dict(zip(PICTURES, placed, strict=True))


def _of_annotations(source: str, folder: str | None) -> Iterator[Row]:
    """Rows of CIRR's or FashionIQ's JSON; a bad row gives the reason in "fault"."""
    content = read_json(source)
    if not isinstance(content, list):
        raise PairDataError(f"{source}: expected CIRR's or FashionIQ's list of queries, got {type(content).__name__}")
    home = folder or str(Path(source).parent)
    for record in content:
        try:
            if isinstance(record, Broken) or not isinstance(record, Mapping):
                raise RowFault(f"expected an object, got {record!r:.80}")
            yield _annotated(record, home)
        except RowFault as fault:
            yield {"image": None, "target_image": None, "text": "", "id": None, "fault": str(fault)}


def _annotated(record: Mapping[str, Any], home: str) -> Row:
    reference = first_field(record, ("reference", "candidate"), (str,))
    target = first_field(record, ("target_hard", "target"), (str,))
    if "captions" in record:
        texts = field(record, "captions", (list,))
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RowFault(f"'captions' must be a list of texts, got {texts!r:.80}")
        text = " and ".join(texts)
    else:
        text = field(record, "caption", (str,))
    pictures = (
        find_file(home, f"{name}.png", f"{name}.jpg", f"{name.split('-')[0]}/{name}.png")
        for name in (reference, target)
    )
    left_out = {"leaves_reference": True} if "target_hard" in record else {}
    return {**dict(zip(PICTURES, pictures, strict=True)), "text": text, "id": None, **left_out}


__all__ = ["PICTURES", "References", "open_composed"]
