"""A search page as a Space of the Hub: a directory that runs there, or by `python app.py` anywhere.

    app.py                 the page
    oner_page/             the code it is made of, copied, so that a Space needs no installed oner
    indexes/NAME/          embeddings, and beside them the pictures that they stand for, small
    model/                 the model, unless it comes from the Hub by its name
    requirements.txt, README.md

No file names a place of this machine: answers show captions, or what a picture's file is called.
"""

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from oner.processing.retrieval_index import RetrievalIndex
from oner.processing.retrieval_page import LARGE, SearchPage, caption_of

from . import space_layout
from .hub import copy_code, gate_configurations, write_code
from .placing import put_in_place, scratch_beside, set_modes
from .public import public_text

PAGE = "oner_page"
GRADIO = "6.31.0"  # where it is not installed, the release that the page was tried with
# what the copied code imports, and the code that travels with a model
NEEDED = (
    "filelock",
    "huggingface-hub",
    "numpy",
    "pillow",
    "safetensors",
    "torch",
    "torchvision",
    "tqdm",
    "transformers",
)
# of a model directory what is read, and what its makers ask for
MODEL_FILES = ("*.safetensors", "*.json", "README.md", "ATTRIBUTION.md", "LICENSE*")
QUALITY = 90  # of the JPEG files
APP = '''"""A page to search pictures. Written by `oner serve --write-space`; `python app.py` serves it."""

from functools import partial
from pathlib import Path

from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from {page}.pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from {page}.retrieval_page import SearchPage, picture_of
from {page}.space_layout import build_page, look

HERE = Path(__file__).resolve().parent
MODEL = {model}
INDEXES = {indexes}

pipe = ImageTextRetrievalPipeline(
    model=AutoModelForZeroShotImageClassification.from_pretrained(MODEL, trust_remote_code=True),
    processor=AutoProcessor.from_pretrained(MODEL, trust_remote_code=True),
)
page = SearchPage(pipe, {{name: HERE / "indexes" / name for name in INDEXES}}, partial(picture_of, folder=HERE))
demo = build_page(page, {title!r}, {shown!r})

if __name__ == "__main__":
    demo.launch(**look())
'''


@dataclass(frozen=True)
class Space:
    """
    What a Space shows.

    Attributes:
        model: A model directory, or a name on the Hub.
        indexes: Directories of saved indexes by name.
        open_item: From an item of theirs to its picture.
        limit: Items of each index that go along; of more, evenly spaced ones.
    """

    model: str
    indexes: Mapping[str, Path]
    open_item: Callable[[Any], Image.Image | None]
    title: str = "Search by words, by a picture, or by both"
    limit: int = 500


def write_space(space: Space, directory: str | Path, pipe: Any) -> dict[str, int]:
    """
    Writes the directory of a Space; returns how many items of each index it holds.

    Args:
        pipe: The retrieval pipeline of the same model.

    Raises:
        FileExistsError: `directory` holds something.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there already; expected a new or empty directory to write a Space into")
    with scratch_beside(directory) as scratch:
        # code, then what it reads
        (scratch / PAGE).mkdir()
        copy_code([SearchPage], scratch / PAGE)
        shutil.copyfile(space_layout.__file__, scratch / PAGE / "space_layout.py")
        (scratch / PAGE / "__init__.py").write_text('"""Copied from oner: a search page."""\n', encoding="utf-8")
        of_hub = not Path(space.model).is_dir()
        if not of_hub:
            copy_model(Path(space.model), scratch / "model", pipe)
        held = {
            name: write_index(Path(place), scratch, name, space.open_item, space.limit)
            for name, place in space.indexes.items()
        }

        # the page that Spaces start, and what they are told of it
        shown = space.model if of_hub else Path(public_text(str(Path(space.model).resolve()))).name
        app = APP.format(
            title=space.title,
            page=PAGE,
            model=json.dumps(space.model) if of_hub else 'str(HERE / "model")',
            indexes=json.dumps(list(held), ensure_ascii=False),
            shown=shown,
        )
        (scratch / "app.py").write_text(app, encoding="utf-8")
        (scratch / "requirements.txt").write_text(requirements(), encoding="utf-8")
        (scratch / "README.md").write_text(readme(space, held, shown if of_hub else None), encoding="utf-8")
        set_modes(scratch)
        put_in_place(scratch, directory)
    return held


def copy_model(source: Path, target: Path, pipe: Any) -> None:
    """What a model is read from, with its code, which checkpoints that ship do not carry."""
    target.mkdir()
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            # digests are of the files as they were; the code below adds to the configurations
            if file.name != "digests.json":
                shutil.copyfile(file, target / file.name)
    write_code(pipe.model, target, pipe.processor)
    gate_configurations(target)


def write_index(
    source: Path, space: Path, name: str, open_item: Callable[[Any], Image.Image | None], limit: int
) -> int:
    """An index with its pictures, into `space`; returns how many items it holds. Of more than `limit` items evenly
    spaced ones go along; those whose picture is gone go as words."""
    index = RetrievalIndex.load(source)
    kept = range(len(index)) if len(index) <= limit else [i * len(index) // limit for i in range(limit)]
    folder = space / "indexes" / name
    (folder / "pictures").mkdir(parents=True)

    # each picture small, under its place in the index
    items = []
    for number, place in enumerate(kept):
        item = index.items[place]
        text = public_text(caption_of(item))
        picture = open_item(item)
        if picture is None:
            items.append(text)
            continue
        picture = picture.copy()
        picture.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
        path = folder / "pictures" / f"{number:05d}.jpg"
        picture.convert("RGB").save(path, quality=QUALITY)
        items.append({"image": path.relative_to(space).as_posix(), "text": text})

    # the same rows of the same space, under the new items
    small = RetrievalIndex(index.projection_dim, None, index.fingerprint, index.dtype)
    small.add(index.embeddings[list(kept)], items)  # (kept, P)
    small.save(folder)
    return len(small)


def installed(name: str, otherwise: str) -> str:
    """The release of a distribution that is installed, without its local part."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return otherwise


def requirements() -> str:
    """What a Space installs beside gradio: the releases that the page was written with, or later ones."""
    return "".join(f"{name}>={version(name).partition('+')[0]}\n" for name in NEEDED)


def readme(space: Space, held: Mapping[str, int], model: str | None) -> str:
    """The Space's card: the header that the Hub reads, and a few words."""
    header: dict[str, Any] = {
        "title": space.title[:60],
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": installed("gradio", GRADIO),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "app_file": "app.py",
        "pinned": False,
        "models": [model] if model else [],
    }
    listed = "\n".join(f"- {name}: {count} items" for name, count in held.items())
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n# {space.title}\n\n"
        "Ask by words, by a picture, or by both as one query; click an answer to see where in it the words are. "
        f"Answered by {model or 'the model in `model/`'} from:\n\n{listed}\n\n"
        "The pictures belong to their makers, whose licences hold here too. Made with oner; `python app.py` serves "
        "the page anywhere.\n"
    )
