"""What a search page does, without the page: answers with their pictures, and where in a picture the words are.

    page = SearchPage(pipe, {"photos": "photos-index", "art": "art-index"})
    answer = page.search("photos", "made of glass", picture="photo.png")
    answer.found[0].name, answer.found[0].score
    page.preview(answer.found[0].item)           # a small picture of it
    page.locate(answer.words, answer.found[0].item).map

`oner serve` and the Spaces that it writes lay a page out over this one; both serve many users at once.
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
MOST = 60  # answers to one query
# ways to a map, as a reader is told
MAPS = {"itc": "Grad-CAM of the contrast", "cosine": "cosines of patches and words"}


@dataclass(frozen=True)
class Found:
    """
    One answer.

    Attributes:
        score: The cosine.
        item: What the index holds of it.
        name: Its caption, or how its file is called.
        place: The path, or the table and the row; "" of a text.
    """

    score: float
    item: Any
    name: str
    place: str


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        found: Best first.
        words: What was asked by words, "" if by a picture alone.
        remark: In a sentence, what was searched, and which words the model cannot read.
    """

    found: list[Found]
    words: str
    remark: str


@dataclass(frozen=True)
class Located:
    """
    Attributes:
        picture: The answer's picture, LARGE pixels wide or high; None of a text.
        map: It under the map of the words; None where there is none.
        remark: What the map shows, or why there is none.
    """

    picture: Image.Image | None
    map: Image.Image | None
    remark: str


def caption_of(item: Any) -> str:
    """The words of an item, a path's stem, or the item as it is."""
    if isinstance(item, Mapping):
        return str(item.get("text") or (caption_of(item["image"]) if "image" in item else item))
    return Path(item).stem if isinstance(item, str) and Path(item).suffix else str(item)


def place_of(item: Any) -> str:
    """Where an item's picture lies, as one reads it; "" where it says nothing of that."""
    if isinstance(item, Mapping):
        return f"{item['table']}, row {item['row']}" if "table" in item else str(item.get("image", ""))
    return item if isinstance(item, str) and Path(item).suffix else ""


def picture_of(item: Any, folder: str | os.PathLike = "") -> Image.Image | None:
    """The picture that an item names, a relative path from `folder`; None of a text, and of one that is gone."""
    source = item.get("image") if isinstance(item, Mapping) else item
    try:
        return open_image(os.path.join(folder, source)) if isinstance(source, str) else None
    except ImageDecodeError:
        return None


class SearchPage:
    """
    Answers queries of any thread: the model reads one at a time, everything else goes on beside it.

    Args:
        pipe: With the model; its own index, if it has one, is left alone.
        indexes: Directories of saved indexes, by the name that the page calls them.
        open_item: From an item to its picture, or None.

    Raises:
        ValueError: there is no index.
        IndexMismatchError, IndexFileError: one was made by another model, or cannot be read.
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

        # a pipeline for each index, all over one model
        self._searches = {name: copy.copy(pipe) for name in indexes}
        for name, directory in indexes.items():
            self._searches[name].load_index(directory)

        parts = {"model": pipe.model, "processor": pipe.processor, "device": pipe.device}
        self._ground = VisualGroundingPipeline(**parts) if hasattr(pipe.model, "ground") else None
        # a tokenizer's padding is a setting of its own, which calls change: two at once would read each other's
        self._reading = threading.Lock()

    @property
    def sizes(self) -> dict[str, int]:
        """How much each index holds, by name."""
        return {name: len(pipe.retrieval_index) for name, pipe in self._searches.items()}

    def search(self, index: str, words: str | None = "", picture: Any = None, top_k: int = 12) -> Answer:
        """
        The nearest of an index, by words, by a picture (a path, PIL, bytes), or by both as one query.

        Raises:
            ValueError: no such index, nothing asked, or a text or picture that cannot be read.
        """
        if index not in self._searches:
            raise ValueError(f"there is no index {index!r}; expected one of {list(self._searches)}")
        words = " ".join((words or "").split())
        query = ({"text": words} if words else {}) | ({} if picture is None else {"image": picture})
        if not query:
            raise ValueError("nothing was asked: give words, a picture, or both")

        # the model reads, alone; the index is searched beside others
        pipe = self._searches[index]
        with self._reading:
            inputs = pipe.preprocess([query])
            unknown = pipe.unknown_words([words or None], inputs)
            output = pipe.forward(inputs)
        embeddings = torch.nn.functional.normalize(output["embeddings"].float(), dim=-1)  # (1, P)
        count = min(max(1, int(top_k)), MOST)
        (answers,) = pipe.postprocess({"embeddings": embeddings}, top_k=count)

        # as it is shown
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
        """What stands for an item: its picture, at most PREVIEW pixels wide and high, else a card with its words."""
        picture = self.open_item(item)
        if picture is None:
            return text_card(caption_of(item))
        picture = picture.copy()  # `thumbnail` works in place, and the picture may be kept elsewhere
        picture.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        return picture

    def locate(self, words: str, item: Any) -> Located:
        """The item's picture, and it under the map of the words where the model can make one."""
        picture = self.open_item(item)
        if picture is None:
            return Located(None, None, "There is no picture to show.")
        scale = LARGE / max(picture.size)
        large = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
        if not words:
            return Located(large, None, "A map shows where words are, and the query had none.")
        if self._ground is None:
            return Located(large, None, f"{type(self.pipe.model).__name__} makes no maps.")

        # by the contrast, which ranked the answers, where there are several ways
        modes = self.pipe.model.grounding_modes
        mode = "itc" if "itc" in modes else modes[0]
        with self._reading:
            cells = self._ground(picture, text=words, mode=mode)["map"]  # (h, w)
        return Located(large, overlay_map(large, cells), f"Red: what speaks for the words ({MAPS.get(mode, mode)}).")


def text_card(words: str) -> Image.Image:
    """A white card with words, as many as fit."""
    card = Image.new("RGB", (PREVIEW, PREVIEW), "white")
    lines = "\n".join(textwrap.wrap(words, 26, max_lines=9, placeholder=" …"))
    centre = (PREVIEW // 2, PREVIEW // 2)
    ImageDraw.Draw(card).multiline_text(centre, lines, "#22252a", ImageFont.load_default(20), "mm", align="center")
    return card


__all__ = ["Answer", "Found", "Located", "SearchPage", "caption_of", "picture_of", "place_of"]
