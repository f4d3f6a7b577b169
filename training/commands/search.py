"""`oner search` and `oner index`: pictures by words, by a picture, or by both as one query.

The index of a folder or table is kept in a hidden directory beside it, that of a run's pictures in the run, and used
again until a file's name, size or time changes, or the model does.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from oner.processing.data.places import expand
from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline, list_pictures
from oner.processing.retrieval_index import INDEX_FILE, RetrievalIndexError
from oner.training.doctor.reading import read_run
from oner.training.evaluation.contact_sheet import caption_of, draw_sheet, save_sheet
from oner.training.publishing.model_loading import load_model
from oner.training.run.shipped import shipped_checkpoint

from .folder import pictures_of
from .table_items import TABLES, TableItems


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner search`."""
    place = Path(options.place).resolve()
    of_run = (place / "model" / "config.json").is_file()
    pipe = load_pipeline(options.model or (place / "model" if of_run else shipped_checkpoint()))

    # the index, kept from the last time if nothing has changed
    source = pictures_of(place) if of_run else None
    cache = Path(options.index_cache) if options.index_cache else place / "index" if of_run else None
    if of_run and source is None:
        index_sources(pipe, [str(one) for one in read_run(place).arguments.epoch_of().data.train_data], cache)
    else:
        open_index(pipe, source or place, cache)

    # the answers as a list and as a sheet
    query = {key: value for key, value in (("text", options.words), ("image", options.image)) if value}
    answers = pipe(query, top_k=options.top_k)
    print(f"\nrank  score  item, of {len(pipe.retrieval_index)} in {(source or place).name}")
    for rank, answer in enumerate(answers, 1):
        print(f"{rank:4d}  {answer['score']:+.3f}  {caption_of(answer['item'])}")
    save_sheet(draw_sheet(query, answers, len(pipe.retrieval_index)), options.out)
    print(f"\ncontact sheet: {options.out}")
    return 0


def load_pipeline(model: str | Path) -> ImageTextRetrievalPipeline:
    """The pipeline of a model directory, or of a name on the Hub."""
    return pipeline(
        "image-text-retrieval",
        model=load_model(AutoModelForZeroShotImageClassification, str(model)),
        processor=AutoProcessor.from_pretrained(model),
    )


def open_index(pipe: ImageTextRetrievalPipeline, source: Path, cache: Path | None) -> None:
    """Loads a saved index, or the one kept for `source` if nothing changed since, or builds and keeps it."""
    if (source / INDEX_FILE).is_file():
        pipe.load_index(source)
        return
    files = list_pictures(source) if source.is_dir() else [str(source)]
    rows = TableItems(str(source)) if source.suffix in TABLES else source
    _keep(pipe, [str(source)], files, rows, cache or source.parent / f".{source.name}.oner-index")


def index_sources(pipe: ImageTextRetrievalPipeline, sources: Sequence[str], cache: Path) -> None:
    """As `open_index`, of the sources that a run was trained on."""
    files = [file for source in sources for file in _files_of(source)]
    _keep(pipe, list(sources), files, chain.from_iterable(map(TableItems, sources)), cache)


def _files_of(source: str) -> list[str]:
    """Files whose change is a change of the source; none of what is no file here."""
    if Path(source).is_dir():
        return [str(path) for path in sorted(Path(source).rglob("*")) if path.is_file()]
    found = expand(source)
    return [str(one) for one in (found if isinstance(found, list) else [found]) if Path(one).is_file()]


def _keep(pipe: ImageTextRetrievalPipeline, names: list[str], files: Sequence[str], rows: Any, cache: Path) -> None:
    listing_file = cache / "indexed_files.json"
    listing = [names, *([name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns] for name in files)]
    if listing_file.is_file():
        try:
            if json.loads(listing_file.read_text()) == listing:
                print(f"using the index kept in {pipe.load_index(cache) and cache}")
                return
        except (RetrievalIndexError, ValueError) as error:
            print(f"indexing again: {error}")
            for file in (*cache.glob("embeddings-*.safetensors"), cache / INDEX_FILE):
                file.unlink(missing_ok=True)  # what is left of a damaged index must not be in the way
    pipe.index(rows, directory=cache)
    listing_file.write_text(json.dumps(listing))
