"""`oner serve`: serves a page to search indexes by words, by a picture, or by both; or writes it as a Space."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from oner.processing.retrieval_index import INDEX_FILE
from oner.processing.retrieval_page import SearchPage
from oner.training.evaluation.contact_sheet import picture_of
from oner.training.evaluation.sheets import describe
from oner.training.publishing.shipped import find_model
from oner.training.publishing.space import Space, write_space
from oner.training.publishing.space_layout import build_page, import_gradio, look

from .search import index_of_run, load_pipeline, open_index


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Serves until Ctrl-C, or writes a Space."""
    if options.write_space is not None:
        write_page(options, options.write_space)
        print(f"try it: python {options.write_space}/app.py")
        print(f"publish it: hf upload OWNER/NAME {options.write_space} --repo-type space")
        return 0
    import_gradio()  # before loading the model, so that a missing gradio is reported at once
    _, pipe, indexes = open_search(options)

    # gradio chooses a port if none is given
    page = SearchPage(pipe, indexes, picture_of)
    blocks = build_page(page, options.title, describe(pipe.model))
    _, address, _ = blocks.launch(
        server_name=options.host, server_port=options.port, quiet=True, prevent_thread_lock=True, **look()
    )
    print(f"search page: {address}", flush=True)
    blocks.block_thread()
    return 0


def open_search(options: argparse.Namespace) -> tuple[str, ImageTextRetrievalPipeline, dict[str, Path]]:
    """
    The directory of `options.model`, its pipeline, and the indexes by name: `options.indexes`, or the run's, which is
    brought up to date with its pictures and its model as `oner search RUN` does.
    """
    place = Path(options.model)
    model = find_model(place)
    pipe = load_pipeline(model)
    if not options.indexes:
        return model, pipe, named({place.resolve(): index_of_run(pipe, place.resolve())})
    sources = [Path(one).resolve() for one in options.indexes]
    return model, pipe, named({source: index_directory(pipe, source) for source in sources})


def write_page(options: argparse.Namespace, directory: str | Path) -> None:
    """Writes the directory of a Space, and prints a line per index."""
    model, pipe, indexes = open_search(options)
    space = Space(model, indexes, picture_of, options.title, options.limit)
    for name, count in write_space(space, directory, pipe).items():
        print(f"{name}: {count} items" + ", evenly spaced; --limit takes more" * (count == options.limit))


def index_directory(pipe: ImageTextRetrievalPipeline, source: Path) -> Path:
    """The directory of a saved index, or of the one kept beside a folder or table, built if needed."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or file; expected a saved index, a folder, or a table")
    if (source / INDEX_FILE).is_file():
        return source
    return open_index(pipe, source, None)


def named(directories: dict[Path, Path]) -> dict[str, Path]:
    """Directories by the names of their sources; equal names get a number."""
    indexes: dict[str, Path] = {}
    for source, directory in directories.items():
        name = source.stem
        number = 2
        while name in indexes:
            name = f"{source.stem} {number}"
            number += 1
        indexes[name] = directory
    return indexes
