"""Scenes and composed queries as rows of parquet.

Scenes, {split}.parquet: the columns that `oner.open_rows` reads (`image`, `captions`, `id`), and annotations. The
column `concepts` lists what the image shows, in any arrangement: as `id_column`, it makes images of the same things
positives.

Composed queries, {split}_queries.parquet and {split}_gallery.parquet: `target` and `choices` of a query are numbers of
rows in the gallery, first the target, second the redrawn reference; `names` gives the role of each choice.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scenes_captions import draw_captions
from scenes_concepts import concept_table
from scenes_drawing import render
from scenes_languages import translate
from scenes_layout import Layout, generator
from scenes_queries import query
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from scenes import Scene

ROWS_A_GROUP = 2048  # of a parquet file's row groups


def as_row(made: "Scene", languages: Sequence[str] = ()) -> dict[str, Any]:
    """A scene as a row. With languages, it also has the same captions in columns such as `captions_de`, and all of
    them with the English ones in `captions_all`."""
    # The same captions in each language.
    translated = {
        f"captions_{language}": [translate(caption.statement, language) for caption in made.captions]
        for language in languages
    }
    if translated:
        translated["captions_all"] = made.texts + [text for texts in translated.values() for text in texts]
    return translated | {
        "id": made.id,
        "image": picture_cell(made.image, made.id),
        "text": made.texts[0],
        "captions": made.texts,
        "concepts": "+".join(sorted(made.concepts)),
        "names": [concept_table()[hexcode].name for hexcode in made.concepts],
        "objects": [{**vars(thing), "box": list(thing.box)} for thing in made.objects],
        "relations": [{"subject": one, "relation": how, "object": other} for one, how, other in made.relations],
        "hard_captions": [hard.text for hard in made.hard],
        "hard_kinds": [hard.kind for hard in made.hard],
        "hard_of": [hard.of for hard in made.hard],
        "background": made.layout.background.colour,
        "pattern": made.layout.background.pattern,
        "license": licences(made.layout),
    }


def query_rows(index: int, seed: int, split: str, size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Composed query `index` and its gallery."""
    made = query(seed, split, index)
    gallery = [
        _pictured(layout, f"{made.id}-{number}", size) | {"name": name}
        for number, (layout, name) in enumerate(zip(made.gallery, made.names, strict=True))
    ]
    asked = _pictured(made.reference, made.id, size)
    caption = asked.pop("text")
    return asked | {
        "text": made.words,
        "kind": made.kind,
        "reference_text": caption,
        "names": list(made.names),
    }, gallery


def triple_row(index: int, seed: int, split: str, size: int) -> dict[str, Any]:
    """Composed query `index` with its target in the row, for training; other choices are not drawn."""
    made = query(seed, split, index)
    asked = _pictured(made.reference, made.id, size)
    target = _pictured(made.gallery[0], f"{made.id}-0", size)
    return {
        "id": made.id,
        "image": asked["image"],
        "text": made.words,
        "target_image": target["image"],
        "kind": made.kind,
        "license": licences(made.reference, made.gallery[0]),
    }


def write_queries(
    folder: Path, split: str, queries: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]], total: int
) -> None:
    """Writes both files of composed queries in one pass; the queries are kept in memory until the gallery is done."""
    asked: list[dict[str, Any]] = []

    def gallery() -> Iterator[dict[str, Any]]:
        filled = 0
        for one, pictures in queries:
            asked.append(one | {"target": filled, "choices": list(range(filled, filled + len(pictures)))})
            filled += len(pictures)
            yield from pictures

    write_rows(folder / f"{split}_gallery.parquet", gallery(), None)
    write_rows(folder / f"{split}_queries.parquet", asked, total)


def in_order(make: Callable[[int], Any], total: int, workers: int) -> Iterable[Any]:
    """`make(0)`, `make(1)` ... in order, computed by several processes; the results do not depend on their number."""
    if workers <= 1:
        yield from map(make, range(total))
        return
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        yield from processes.imap(make, range(total), chunksize=64)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], total: int | None) -> None:
    """Writes a parquet file of rows atomically."""
    part, writer, waiting = path.with_suffix(".part"), None, []

    def flush() -> None:
        nonlocal writer
        table = pa.Table.from_pylist(waiting, writer.schema if writer else None)
        writer = writer or pq.ParquetWriter(part, table.schema)
        writer.write_table(table)
        waiting.clear()

    # A row group at a time; the first one determines the schema.
    for made in tqdm(rows, path.name, total, unit=" rows", mininterval=1):
        waiting.append(made)
        if len(waiting) == ROWS_A_GROUP:
            flush()
    if waiting or writer is None:
        flush()
    writer.close()
    os.replace(part, path)


def picture_cell(image: Image.Image, name: str) -> dict[str, Any]:
    """An image as `datasets` stores it."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": f"{name}.png"}


def licences(*layouts: Layout) -> str:
    """The licences of all drawings in the layouts."""
    return " AND ".join(sorted({group.sprite.license for layout in layouts for group in layout.groups}))


def _pictured(layout: Layout, name: str, size: int) -> dict[str, Any]:
    return {
        "id": name,
        "image": picture_cell(render(layout, size), name),
        "text": draw_captions(generator("query captions", 0, name, 0), layout, 1)[0].text,
        "concepts": "+".join(sorted(layout.concepts)),
        "license": licences(layout),
    }
