"""Writes a search page as a Hub Space: a directory that runs there, or anywhere with `python app.py`.

    app.py                 the page
    oner_page/             a copy of the code, so that the Space does not need oner installed
    indexes/NAME/          embeddings, and thumbnails of their pictures
    model/                 the model, unless it is loaded from the Hub by name
    requirements.txt, README.md

No file contains a local path: answers show captions, or the file names of pictures.
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
from .origins import PROVENANCE, attributions_of
from .placing import put_in_place, scratch_beside, set_modes
from .public import public_text

PAGE = "oner_page"
GRADIO = "6.31.0"  # if gradio is not installed: the release that the page was tested with
# imports of the copied code and of the model's code
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
# files copied from a model directory, beside those that name the makers of its data
MODEL_FILES = ("*.safetensors", "*.json", "README.md", "LICENSE*", PROVENANCE)
QUALITY = 90  # of JPEG files
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
    Content of a Space.

    Attributes:
        model: A model directory, or a name on the Hub.
        indexes: Directories of saved indexes by name.
        open_item: Opens the picture of an item of an index.
        limit: Maximum number of items per index; of a larger index evenly spaced items are taken.
    """

    model: str
    indexes: Mapping[str, Path]
    open_item: Callable[[Any], Image.Image | None]
    title: str = "Search by words, by a picture, or by both"
    limit: int = 500


def write_space(space: Space, directory: str | Path, pipe: Any) -> dict[str, int]:
    """
    Writes the directory of a Space; returns the number of items per index.

    Args:
        pipe: The retrieval pipeline of the same model.

    Raises:
        FileExistsError: `directory` is not empty.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists; expected a new or empty directory to write a Space into")
    with scratch_beside(directory) as scratch:
        # first the code, then model and indexes
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

        # the app, its requirements and the Space's card
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
    """Copies the files of a model, and adds its code, which shipped checkpoints lack."""
    (target / PROVENANCE).parent.mkdir(parents=True)
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            # without digests, since write_code below changes the configurations
            if file.name != "digests.json":
                shutil.copyfile(file, target / file.relative_to(source))
    for name, content in attributions_of(source).items():
        (target / name).write_bytes(content)
    write_code(pipe.model, target, pipe.processor)
    gate_configurations(target)


def write_index(
    source: Path, space: Path, name: str, open_item: Callable[[Any], Image.Image | None], limit: int
) -> int:
    """Writes an index with its pictures into `space`; returns the number of items. Of more than `limit` items, evenly
    spaced ones are taken; items whose picture is missing are kept as captions."""
    index = RetrievalIndex.load(source)
    kept = range(len(index)) if len(index) <= limit else [i * len(index) // limit for i in range(limit)]
    folder = space / "indexes" / name
    (folder / "pictures").mkdir(parents=True)

    # a thumbnail of each picture, named by its number in the index
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

    # the same embeddings, with the new items
    small = RetrievalIndex(index.projection_dim, None, index.fingerprint, index.dtype)
    small.add(index.embeddings[list(kept)], items)  # (kept, P)
    small.save(folder)
    return len(small)


def installed(name: str, otherwise: str) -> str:
    """The installed version of a distribution without its local part, else `otherwise`."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return otherwise


def requirements() -> str:
    """Requirements of a Space besides gradio: the versions installed here, or later ones."""
    return "".join(f"{name}>={version(name).partition('+')[0]}\n" for name in NEEDED)


def readme(space: Space, held: Mapping[str, int], model: str | None) -> str:
    """The Space's card: the header for the Hub, and a short text."""
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
        "Search by words, by a picture, or by both as one query; click an answer to see where in it the words are. "
        f"Answered by {model or 'the model in `model/`'} from:\n\n{listed}\n\n"
        "The pictures belong to their creators, whose licences apply here too. Made with oner; `python app.py` serves "
        "the page anywhere.\n"
    )
