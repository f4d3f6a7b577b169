"""A tiny model of a family with indexes over a few emoji, for what searches them, and gradio's stand-in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from families import RETRIEVAL, Family
from tiny_repository import emoji_rows, model_of, processor_of

from oner.processing.image_processing_vl import open_image
from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline


def search_of(family: Family, emoji: Path, folder: Path) -> SimpleNamespace:
    """`pipe`, `processor`, `indexes` by name (pictures with names, files, captions), `rows`, and their `pictures`."""
    rows = emoji_rows(emoji)[:24]
    processor = processor_of(family, rows)
    pipe = ImageTextRetrievalPipeline(model=model_of(family, processor, RETRIEVAL), processor=processor, device="cpu")
    pictures = [folder / f"{number}.png" for number in range(len(rows))]
    for row, path in zip(rows, pictures, strict=True):
        open_image(row["image"]).save(path)

    # pictures with the words to show, a folder's items, and captions
    items = [{"image": str(path), "text": row["captions"][0]} for row, path in zip(rows, pictures, strict=True)]
    sources = {
        "named": [{"image": str(path), "item": item} for path, item in zip(pictures, items, strict=True)],
        "files": [str(path) for path in pictures[:12]],
        "words": [{"text": row["captions"][0]} for row in rows],
    }
    indexes = {name: folder / f"index-{name}" for name in sources}
    for name, source in sources.items():
        pipe.index(source, directory=indexes[name], show_progress=False)
    pipe.retrieval_index = None
    return SimpleNamespace(pipe=pipe, indexes=indexes, rows=rows, pictures=pictures, processor=processor)


class Refused(Exception):
    """What stands for `gradio.Error`."""


def fake_gradio() -> Any:
    """A gradio that takes everything; `handlers` are the functions that a page was given, in order."""
    gradio = MagicMock()
    gradio.Error = Refused
    gradio.Gallery = lambda value=None, **options: SimpleNamespace(value=value, select=gradio.select, **options)
    gradio.Blocks.return_value.__enter__.return_value.queue.return_value.launch.return_value = (None, "http://x", None)
    return gradio


def handlers_of(gradio: Any) -> tuple[Any, Any]:
    """The functions that search and that locate, of the page that was built last."""
    return gradio.on.call_args.args[1], gradio.select.call_args.args[0]
