"""`oner search`: finds pictures by words, by a picture, or by both as one query.

The index of a folder or table is kept in a hidden directory beside it, that of a run's pictures in the run's
directory. It is used again until a file's name, size or time changes, or the model.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from oner.processing.data.places import expand
from oner.processing.image_processing_vl import open_image
from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline, list_pictures
from oner.processing.retrieval_backend import SearchBackend, build_backend, build_stale, built_backends
from oner.processing.retrieval_filter import columns_of, number_of
from oner.processing.retrieval_index import INDEX_FILE, RetrievalIndexError
from oner.processing.retrieval_sources import is_picture_file
from oner.training.doctor.reading import LOG, read_run
from oner.training.evaluation.contact_sheet import READING, caption_of, draw_sheet, picture_of, save_sheet
from oner.training.publishing.model_loading import load_model
from oner.training.publishing.shipped import find_model, shipped_checkpoint

from .folder import pictures_of
from .table_items import TABLES, TableItems, reading_of


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner search`. Raises `ValueError` before anything is read if --out cannot be written as a picture."""
    if options.out and Path(options.out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out is {options.out!r}; expected the name of a picture, such as answers.png")
    for picture in asked_pictures(options):
        open_image(picture)  # what cannot be read is said before everything is embedded
    place = Path(options.place).resolve()
    of_run = (place / "model" / "config.json").is_file()
    begun = any((place / name).is_file() for name in ("folder.json", LOG))
    if begun and not of_run and not list_pictures(place):
        raise ValueError(f"{options.place}: the run has left no model yet; `oner train` with the same words goes on")
    pipe = load_pipeline(options.model or (place if of_run else shipped_checkpoint()))

    # the index, reused if nothing has changed; with --json its messages go to stderr
    source = pictures_of(place) if of_run else None
    cache = Path(options.index_cache) if options.index_cache else None
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        directory = (index_of_run if of_run else open_index)(pipe, place, cache)
        use_backend(pipe, options.backend, directory)

    # print the answers as JSON, or as a list with a sheet
    query = {key: value for key, value in (("text", options.words), ("image", options.image)) if value}
    answers = ask(pipe, query, options)
    if options.json:
        print(json.dumps([{"rank": rank, **shown(answer)} for rank, answer in enumerate(answers, 1)], indent=1))
    else:
        print(f"\nrank  score  item, of {len(pipe.retrieval_index)} in {(source or place).name}")
        for rank, answer in enumerate(answers, 1):
            path = shown(answer)["path"] or ""
            path = "" if path == str(place) else path  # of a table, the header has said it
            print(f"{rank:4d}  {answer['score']:+.3f}  {caption_of(answer['item'])}  {path}".rstrip())
    if not answers and not options.json:
        print(f"no item meets {' and '.join(options.where)}; their columns: {', '.join(columns(pipe))}")
    elif options.out or not options.json:
        out = options.out or "results.png"
        words = [options.words, options.like and f"like {options.like}", *(said for *_, said in parts_of(options))]
        asked = {**query, "text": " ".join(filter(None, words))} if any(words) else query
        save_sheet(draw_sheet(asked, answers, len(pipe.retrieval_index)), out)
        print(f"\ncontact sheet: {out}", file=sys.stderr if options.json else sys.stdout)
    return 0


def ask(pipe: ImageTextRetrievalPipeline, query: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The answers to a query of words and picture, to a weighted sum of queries, or the neighbours of an item."""
    found = {"top_k": options.top_k, "where": options.where}
    if options.like is not None:
        return pipe.neighbours(named_item(pipe.retrieval_index, options.like), **found)
    if parts := parts_of(options):
        weighted = ([(query, 1.0)] if query else []) + [(one, weight) for one, weight, _ in parts]
        return pipe.combine(weighted, **found)
    return pipe(query, **found, rerank_k=options.rerank, open_item=opened)


def columns(pipe: ImageTextRetrievalPipeline) -> list[str]:
    """What conditions can be on."""
    found = {name for item in getattr(pipe.retrieval_index, "items", ()) for name in columns_of(item)}
    return sorted(found - {READING})


def named_item(index: SearchBackend, said: str) -> Any:
    """The number of an item, given its number, its path, or the item itself; `said` unchanged if there is none."""
    if said.isdecimal():
        return int(said)
    # a place is indexed with its links followed, but not those that lie in it
    folder, name = os.path.split(said)
    paths = (os.path.abspath(said), os.path.join(os.path.realpath(folder), name))
    for item in (*paths, said):
        if (number := index.index_of(item)) is not None:
            return number
    rows = enumerate(getattr(index, "items", ()))
    return next((row for row, item in rows if isinstance(item, dict) and item.get("path") in paths), said)


def asked_pictures(options: argparse.Namespace) -> list[str]:
    """The pictures of the query and of its parts."""
    parts = [query["image"] for query, *_ in parts_of(options) if "image" in query]
    return [options.image, *parts] if options.image else parts


def parts_of(options: argparse.Namespace) -> list[tuple[dict[str, str], float, str]]:
    """The queries to add and subtract, with their weights and labels."""
    parts = []
    for name, kind, sign in (
        ("plus", "text", 1), ("plus_image", "image", 1), ("minus", "text", -1), ("minus_image", "image", -1)
    ):  # fmt: skip
        for said in getattr(options, name):
            weight, value = weighted(said)
            parts.append(({kind: value}, sign * weight, f"{'+' if sign > 0 else '-'} {said}"))
    return parts


def weighted(said: str) -> tuple[float, str]:
    """`0.5:stripes` -> (0.5, "stripes"); without a leading number the weight is 1."""
    before, colon, after = said.partition(":")
    weight = number_of(before) if colon and after else None
    return (1.0, said) if weight is None else (weight, after)


def shown(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with the path of its picture, or of the table that contains it; None without a file."""
    item = answer["item"]
    if isinstance(item, str):
        path = item if os.path.exists(item) else None
    else:
        path = item.get("path", item.get("table")) if isinstance(item, dict) else None
    return {**answer, "path": path}


def opened(item: Any) -> dict[str, Any]:
    """The picture of an item, also from a table; a text as it is.

    Raises:
        ValueError: the picture that the item names cannot be read.
    """
    picture = picture_of(item)
    if picture is not None:
        return {"image": picture}
    if isinstance(item, dict):
        names_one = not item.keys().isdisjoint(("table", "image"))
    else:
        names_one = is_picture_file(str(item))
    if names_one:
        raise ValueError(f"re-ranking cannot read the picture of {item!r:.200}; was it moved or removed?")
    return {"text": caption_of(item)}


def use_backend(pipe: ImageTextRetrievalPipeline, name: str, directory: Path) -> None:
    """Switches to another backend; it is built over the index of `directory` if it is missing or outdated."""
    if name == "exact":
        return
    if name not in built_backends(directory):
        print(f"building {name} over {len(pipe.retrieval_index)} items")
        build_backend(name, directory)
    build_stale(directory)
    pipe.load_index(directory, backend=name)


def load_pipeline(model: str | Path, device: torch.device | None = None) -> ImageTextRetrievalPipeline:
    """The pipeline of a model directory, a run, a shipped checkpoint, or a model on the Hub."""
    source = find_model(model)
    return pipeline(
        "image-text-retrieval",
        model=load_model(AutoModelForZeroShotImageClassification, source),
        processor=AutoProcessor.from_pretrained(source),
        device=device,
    )


def open_index(pipe: ImageTextRetrievalPipeline, source: Path, cache: Path | None) -> Path:
    """Loads a saved index, or the one kept for `source` if nothing has changed, or builds and keeps one.

    Returns:
        Its directory.
    """
    if (source / INDEX_FILE).is_file():
        pipe.load_index(source)
        return source
    rows = TableItems(str(source)) if source.suffix in TABLES else source
    files = list_pictures(source) if source.is_dir() else [str(source)]
    files += rows.files() if isinstance(rows, TableItems) else []
    cache = cache or source.parent / f".{source.name}.oner-index"
    _keep(pipe, [str(source)], files, rows, cache)
    return cache


def index_of_run(pipe: ImageTextRetrievalPipeline, run: Path, cache: Path | None = None) -> Path:
    """As `open_index`, of the folder or the sources that a run was trained on; kept in the run by default."""
    cache = cache or run / "index"
    folder = pictures_of(run)
    if folder is not None:
        return open_index(pipe, folder, cache)
    data = read_run(run).arguments.epoch_of().data
    return index_sources(pipe, [str(one) for one in data.train_data], cache, reading_of(data))


def index_sources(
    pipe: ImageTextRetrievalPipeline, sources: Sequence[str], cache: Path, reading: Mapping[str, str]
) -> Path:
    """As `open_index`, of sources that are opened as `reading` says."""
    tables = [TableItems(source, reading) for source in sources]
    files = [file for source, table in zip(sources, tables, strict=True) for file in _files_of(source) + table.files()]
    names = [*sources, *([dict(reading)] if reading else [])]
    _keep(pipe, names, files, chain.from_iterable(tables), cache)
    return cache


def _files_of(source: str) -> list[str]:
    """The files whose change means a change of the source; empty if there are no local files."""
    if Path(source).is_dir():
        return [str(path) for path in sorted(Path(source).rglob("*")) if path.is_file()]
    found = expand(source)
    return [str(one) for one in (found if isinstance(found, list) else [found]) if Path(one).is_file()]


def _state(name: str) -> list[int]:
    """Size and times of change of a file, of which one cannot be set; nothing of one that is not there."""
    try:
        status = os.stat(name)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _keep(pipe: ImageTextRetrievalPipeline, names: list[Any], files: Sequence[str], rows: Any, cache: Path) -> None:
    listing_file = cache / "indexed_files.json"
    listing = [names, *([name, *_state(name)] for name in files)]
    if listing_file.is_file():
        try:
            if json.loads(listing_file.read_text()) == listing:
                print(f"using the index kept in {pipe.load_index(cache) and cache}")
                return
        except (RetrievalIndexError, ValueError) as error:
            print(f"indexing again: {error}")
            for file in (*cache.glob("embeddings-*.safetensors"), cache / INDEX_FILE):
                file.unlink(missing_ok=True)  # what is left of a damaged index must not be in the way
    there = next(one for one in (cache.absolute(), *cache.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"{cache}, where the index is kept, cannot be written; --index-cache names another place")
    pipe.index(rows, directory=cache)
    listing_file.write_text(json.dumps(listing))
