"""The functions of a search page, without its layout: search, previews of the answers, and maps of the words.

    page = SearchPage(pipe, {"photos": "photos-index", "art": "art-index"})
    answer = page.search("photos", "made of glass", picture="photo.png")
    answer.found[0].name, answer.found[0].score
    page.preview(answer.found[0].item)           # a small image of it
    page.locate(answer.words, answer.found[0].item).map

`oner serve` and the Spaces that it writes build their page on this class; both serve many users at once.
"""

import copy
import os
import textwrap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from .grounding_boxes import overlay_map
from .image_processing_vl import ImageDecodeError, open_image
from .pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from .pipeline_visual_grounding import VisualGroundingPipeline

# pixels of the longer side
PREVIEW = 320
LARGE = 512
MOST = 60  # maximum number of answers to one query
# modes of `ground`, as described to the user
MAPS = {"itc": "Grad-CAM of the contrast", "cosine": "cosines of patches and words"}


@dataclass(frozen=True)
class Found:
    """
    One answer.

    Attributes:
        score: The cosine.
        item: The item as stored in the index.
        name: Its caption or file name.
        place: The path, or the table and the row; "" for a text.
    """

    score: float
    item: Any
    name: str
    place: str


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        found: The answers, best first.
        words: The text of the query; "" for a query by image alone.
        remark: A sentence on what was searched, and on tokens that the model does not know.
    """

    found: list[Found]
    words: str
    remark: str


@dataclass(frozen=True)
class Located:
    """
    Attributes:
        picture: The answer's image, its longer side LARGE pixels; None for a text.
        map: The image overlaid with the map of the words; None if there is none.
        remark: What the map shows, or why there is none.
    """

    picture: Image.Image | None
    map: Image.Image | None
    remark: str


def caption_of(item: Any) -> str:
    """The item's text, the stem of its path, or the item itself as a str."""
    if isinstance(item, Mapping):
        return str(item.get("text") or (caption_of(item["image"]) if "image" in item else item))
    return Path(item).stem if isinstance(item, str) and Path(item).suffix else str(item)


def place_of(item: Any) -> str:
    """The location of an item's image, for display; "" if the item has none."""
    if isinstance(item, Mapping):
        return f"{item['table']}, row {item['row']}" if "table" in item else str(item.get("image", ""))
    return item if isinstance(item, str) and Path(item).suffix else ""


def picture_of(item: Any, folder: str | os.PathLike = "") -> Image.Image | None:
    """The image that an item names, relative to `folder`; None for a text, or if the file cannot be read."""
    source = item.get("image") if isinstance(item, Mapping) else item
    try:
        return open_image(os.path.join(folder, source)) if isinstance(source, str) else None
    except ImageDecodeError:
        return None


class SearchPage:
    """
    Answers queries from any thread: the model runs one query at a time, everything else runs in parallel.

    Args:
        pipe: Pipeline with the model; its own index, if any, is not changed.
        indexes: Display name -> directory of a saved index.
        open_item: Maps an item to its image, or None.

    Raises:
        ValueError: there is no index.
        IndexMismatchError, IndexFileError: an index was made by another model, or cannot be read.
    """

    def __init__(
        self,
        pipe: ImageTextRetrievalPipeline,
        indexes: Mapping[str, str | os.PathLike],
        open_item: Callable[[Any], Image.Image | None] = picture_of,
    ):
        if not indexes:
            raise ValueError("a search page needs at least one index, got none")
        self.open_item = open_item
        self.pipe = pipe
        self.model_name = pipe.model_name

        # one pipeline per index, all sharing one model
        self._searches = {name: copy.copy(pipe) for name in indexes}
        for name, directory in indexes.items():
            self._searches[name].load_index(directory)

        parts = {"model": pipe.model, "processor": pipe.processor, "device": pipe.device}
        self._ground = VisualGroundingPipeline(**parts) if hasattr(pipe.model, "ground") else None
        # calls change the tokenizer's padding setting, so two at once would interfere
        self._reading = threading.Lock()

    @property
    def sizes(self) -> dict[str, int]:
        """Number of items in each index, by name."""
        return {name: len(pipe.retrieval_index) for name, pipe in self._searches.items()}

    def search(self, index: str, words: str | None = "", picture: Any = None, top_k: int = 12) -> Answer:
        """
        Finds the nearest items of an index to a text, an image (a path, PIL, bytes), or both as one query.

        Raises:
            ValueError: there is no such index, the query is empty, or its text or image cannot be read.
        """
        if index not in self._searches:
            raise ValueError(f"there is no index {index!r}; expected one of {list(self._searches)}")
        words = " ".join((words or "").split())
        query = ({"text": words} if words else {}) | ({} if picture is None else {"image": picture})
        if not query:
            raise ValueError("nothing was asked: give words, a picture, or both")

        # the model runs under the lock; the index is searched in parallel
        pipe = self._searches[index]
        with self._reading:
            inputs = pipe.preprocess([query])
            unknown = pipe.unknown_words([words or None], inputs)
            output = pipe.forward(inputs)
        embeddings = torch.nn.functional.normalize(output["embeddings"].float(), dim=-1)  # (1, P)
        count = min(max(1, int(top_k)), MOST)
        (answers,) = pipe.postprocess({"embeddings": embeddings}, top_k=count)

        # the answers for display
        found = [
            Found(answer["score"], answer["item"], caption_of(answer["item"]), place_of(answer["item"]))
            for answer in answers
        ]
        kind = "words and a picture as one query" if len(query) == 2 else "words" if words else "a picture"
        remark = f"The {len(found)} nearest of {len(pipe.retrieval_index)} by {kind}."
        for one in unknown:
            remark += f" Words of it that the vocabulary lacks: {one.lost} of {one.total} tokens are unknown."
        return Answer(found, words, remark)

    def preview(self, item: Any) -> Image.Image:
        """A preview of an item: its image, at most PREVIEW pixels wide and high, or a card with its text."""
        picture = self.open_item(item)
        if picture is None:
            return text_card(caption_of(item))
        picture = picture.copy()  # `thumbnail` works in place, and the image may be shared
        picture.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        return picture

    def locate(self, words: str, item: Any) -> Located:
        """The item's image, and the image overlaid with the map of the words if the model supports it."""
        picture = self.open_item(item)
        if picture is None:
            return Located(None, None, "There is no picture to show.")
        scale = LARGE / max(picture.size)
        large = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
        if not words:
            return Located(large, None, "A map shows where words are, and the query had none.")
        if self._ground is None:
            return Located(large, None, f"{type(self.pipe.model).__name__} makes no maps.")

        # if there are several modes, use the contrastive one, which ranked the answers
        modes = self.pipe.model.grounding_modes
        mode = "itc" if "itc" in modes else modes[0]
        with self._reading:
            cells = self._ground(picture, text=words, mode=mode)["map"]  # (h, w)
        return Located(large, overlay_map(large, cells), f"Red: what speaks for the words ({MAPS.get(mode, mode)}).")


def text_card(words: str) -> Image.Image:
    """A white card with the words, truncated to fit."""
    card = Image.new("RGB", (PREVIEW, PREVIEW), "white")
    lines = "\n".join(textwrap.wrap(words, 26, max_lines=9, placeholder=" …"))
    centre = (PREVIEW // 2, PREVIEW // 2)
    ImageDraw.Draw(card).multiline_text(centre, lines, "#22252a", ImageFont.load_default(20), "mm", align="center")
    return card


__all__ = ["Answer", "Found", "Located", "SearchPage", "caption_of", "picture_of", "place_of"]
