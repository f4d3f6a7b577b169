"""Rows to examples: a text is chosen, images are decoded and transformed, texts become tokens; bad rows say why.

Shapes: T tokens of a text, L the most that a batch takes of one, H = W side of an image, k images of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from oner.processing.image_processing_vl import open_image
from oner.processing.vl_captions import caption_reason

from .quarantine import BadRow
from .row_checks import CAPTION, TEXT
from .sampling import RowKey


@dataclass
class Example:
    """A row as the collator takes it.

    Attributes:
        key, row: which row, and its content.
        rng: draws for this row at this place of the order, and for nothing else.
        text: as chosen; empty where none is read.
        views: views of the image by their names in the batch, (3, H, W) each, or (k, 3, H, W).
        tokens: ids of the text, (T,) int64; None where none is read.
    """

    key: RowKey
    row: dict[str, Any]
    rng: np.random.Generator
    text: str = ""
    views: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: np.ndarray | None = None


class Reader:
    """Reads texts, images or both of a row.

    Args:
        tokenizer: fast tokenizer; its special tokens are neither added nor recognised inside a text. None: no text.
        image_transform: (PIL RGB, numpy generator) -> (3, H, W) float tensor, or several views by their names in the
            batch, `pixel_values` among them. None: no image.
        images: the row's keys of its images; several are stacked, in order.
        text: "captions": one of the row's is drawn. "text": the row's own, which its source has cleaned.
        max_text_length: L, without [CLS].
        windows: a text of more tokens is cut into ceil(T / L) windows of L, aligned but for the last, which reaches
            back to be full, and one of them is drawn; without, the first L tokens are kept.
        clean_caption: rewrites a text before it is tokenised, as `pre_caption` does.
        max_pixels: largest image that is decoded; None keeps the decoder's own cap.

    Raises:
        ValueError: nothing to read, or a length below 1.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_transform: Callable[[Image.Image, np.random.Generator], Any] | None = None,
        *,
        images: Sequence[str] = ("image",),
        text: Literal["captions", "text"] = "captions",
        max_text_length: int = 64,
        windows: bool = False,
        clean_caption: Callable[[str], str] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if tokenizer is None and image_transform is None:
            raise ValueError("a reader needs a tokenizer, an image transform or both, got neither")
        if max_text_length < 1:
            raise ValueError(f"max_text_length must be positive, got {max_text_length}")
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.rule = TEXT if image_transform is None else CAPTION
        self.images = tuple(images)
        self.text = text
        self.max_text_length = max_text_length
        self.windows = windows
        self.clean_caption = clean_caption
        self.cap = {} if max_pixels is None else {"max_pixels": max_pixels}

    def read(self, key: RowKey, row: dict[str, Any], rng: np.random.Generator) -> Example | BadRow:
        """A row's text and image, or why there are none; its tokens come with those of others."""
        example = Example(key, row, rng)
        # one draw whatever their number, even where none is read, so that later draws do not depend on it
        place = rng.random() if self.text == "captions" else 0.0

        # a text, chosen before it is checked: what is not chosen may be bad
        if self.tokenizer is not None:
            texts = [row[self.text]] if isinstance(row[self.text], str) else row[self.text]
            if not len(texts):
                return BadRow(f"at least one {self.rule.what} is needed, got an empty list")
            example.text = texts[int(place * len(texts))]
            if (reason := caption_reason(example.text, *self.rule)) is not None:
                return BadRow(reason)

        if self.image_transform is not None:
            views = self._views(row, rng)
            if isinstance(views, BadRow):
                return views
            example.views = views
        return example

    def _views(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor] | BadRow:
        """Each view of the row's images, (3, H, W), or (k, 3, H, W) of several."""
        views: list[Mapping[str, torch.Tensor]] = []
        for name in self.images:
            try:
                image = open_image(row[name], **self.cap)
            except (ValueError, OSError) as error:
                return BadRow(f"cannot read the picture {_called(row[name])}: {error}")
            try:
                view = self.image_transform(image, rng)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                return BadRow(f"cannot transform the picture {_called(row[name])} of {image.size}: {error}")
            views.append(view if isinstance(view, Mapping) else {"pixel_values": view})
        if len(views) == 1:
            return dict(views[0])
        return {name: torch.stack([one[name] for one in views]) for name in views[0]}  # (k, 3, H, W) each

    def tokenize(self, examples: Sequence[Example | BadRow]) -> list[Example | BadRow]:
        """The examples with their texts as ids, in one call of the tokenizer; a text without any is bad."""
        if self.tokenizer is None:
            return list(examples)

        # one call for the whole batch
        good = [example for example in examples if isinstance(example, Example)]
        texts = [example.text for example in good]
        if self.clean_caption is not None:
            texts = [self.clean_caption(text) for text in texts]
        most = None if self.windows else self.max_text_length
        for example, ids in zip(good, token_ids(self.tokenizer, texts, most), strict=True):
            example.tokens = self._window(ids, example.rng) if self.windows else ids  # (T,), T <= L
        return [self._with_tokens(example) for example in examples]

    def _with_tokens(self, example: Example | BadRow) -> Example | BadRow:
        if isinstance(example, BadRow) or len(example.tokens):
            return example
        return BadRow(f"no token is left of the {self.rule.what} {example.text[:40]!r}")

    def _window(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One of the windows of a text, (min(T, L),); one draw, whatever the text."""
        # ceil(T / L) windows; the last reaches back to be full
        length = self.max_text_length
        count = -(-len(ids) // length)
        start = min(int(rng.random() * count) * length, max(len(ids) - length, 0))
        return ids[start : start + length]


def token_ids(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> list[np.ndarray]:
    """Ids of each text, (T,) int64, the first `most`; the text "[MASK]" in a text is plain text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=most is not None,
        max_length=most,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # of texts that are cut into windows afterwards
    )["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]  # (T,) each


def _called(image: Any) -> str:
    """What to call an image in a message: its path where it has one."""
    if isinstance(image, dict):
        image = image.get("path") or image.get("bytes")
    return repr(image) if isinstance(image, str) else f"({type(image).__name__})"
