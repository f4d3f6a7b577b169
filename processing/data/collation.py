"""Collates rows into a training batch; all random corruption and all replacement of bad rows happens here.

A collator is composed of a reader, which turns rows into examples, a layout, which turns tokens and patches into
tensors, a corruption, which hides some of them, and targets, which add labels.

Shapes: B rows, N patches of an image (row-major), W tokens of the longest text of the batch (at least 1), H ids before
the text (1, or 1+N in the joint layout), n tokens of the batch, M tokens or patches to predict, T tokens of a text,
L maximum number of tokens of a text, k images of a row.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from oner.processing.image_processing_vl import open_image
from oner.processing.vl_captions import caption_reason

from .excluded_images import image_hash
from .layouts import Layout, attention_mask, lay_out, patch_grid, real_slots
from .masking import ALL_PATCHES, Hidden, Keeping, keep_patches
from .quarantine import MAX_ATTEMPTS, SHOWN, BadRow, BadRowsError
from .row_checks import CAPTION, TEXT
from .sampling import RowKey, concept_id


@dataclass
class Example:
    """A row, read and tokenised.

    Attributes:
        key, row: key and content of the row.
        rng: generator for this row at this position of the order only.
        text: the chosen text; empty if none is read.
        views: views of the image by their names in the batch, (3, H, W) each, or (k, 3, H, W).
        tokens: ids of the text, (T,) int64; None if none is read.
        second: the second text of a pair of texts, or None.
    """

    key: RowKey
    row: dict[str, Any]
    rng: np.random.Generator
    text: str = ""
    views: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: np.ndarray | None = None
    second: str | None = None


class Reader:
    """Reads the texts, images or both of a row.

    Args:
        tokenizer: fast tokenizer; its special tokens are neither added nor recognised inside a text. None: no text.
        image_transform: (PIL RGB, numpy generator) -> (3, H, W) float tensor, or several views by their names in the
            batch, `pixel_values` among them. None: no image.
        images: the row's keys of its images; several are stacked, in order.
        text: "captions" draws one of the row's captions. "text" takes the row's text, already cleaned, followed by a
            separator and "second_text" if the row has one.
        max_text_length: L, without [CLS].
        windows: whether to draw one of the ceil(T / L) windows of a longer text, which are aligned except for the
            last, which ends with the text; otherwise the first L tokens are kept.
        clean_caption: rewrites a text before tokenisation, for example `pre_caption`.
        max_pixels: largest image to decode; None keeps the decoder's limit.
        excluded: hashes, from `image_hash`, of images that must not be read.

    Raises:
        ValueError: there is nothing to read, or a length is below 1.
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
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        if tokenizer is None and image_transform is None:
            raise ValueError("a reader needs a tokenizer, an image transform or both, got neither")
        if max_text_length < 1:
            raise ValueError(f"max_text_length must be positive, got {max_text_length}")
        # a copy: calls change the truncation setting of a fast tokenizer, and the run's is published unchanged
        self.tokenizer = copy.deepcopy(tokenizer)
        self.image_transform = image_transform
        self.rule = TEXT if image_transform is None else CAPTION
        self.images = tuple(images)
        self.text = text
        self.max_text_length = max_text_length
        self.windows = windows
        self.clean_caption = clean_caption
        self.excluded = excluded
        self.cap = {} if max_pixels is None else {"max_pixels": max_pixels}

    def read(self, key: RowKey, row: dict[str, Any], rng: np.random.Generator) -> Example | BadRow:
        """A row's text and image, or a `BadRow` with the reason; `tokenize` adds the tokens."""
        example = Example(key, row, rng)

        # a text: always exactly one draw, so that later draws do not depend on the number of texts
        place = rng.random() if self.text == "captions" else 0.0
        if self.tokenizer is not None:
            texts = [row[self.text]] if isinstance(row[self.text], str) else row[self.text]
            if not len(texts):
                return BadRow(f"at least one {self.rule.what} is needed, got an empty list")
            example.text = texts[int(place * len(texts))]
            example.second = row.get("second_text") if self.text == "text" else None
            if (reason := caption_reason(example.text, *self.rule)) is not None:
                return BadRow(reason)

        # images, by further draws
        if self.image_transform is not None:
            views = self._views(row, rng)
            if isinstance(views, BadRow):
                return views
            example.views = views
        return example

    def _views(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor] | BadRow:
        """The views of the row's images, (3, H, W) each, or (k, 3, H, W) for several images."""
        found: list[Mapping[str, torch.Tensor]] = []
        for name in self.images:
            try:
                if self.excluded and image_hash(row[name]) in self.excluded:
                    return BadRow(f"the picture {_called(row[name])} is excluded", excluded=True)
                image = open_image(row[name], **self.cap)
            except (ValueError, OSError) as error:
                return BadRow(f"cannot read the picture {_called(row[name])}: {error}")
            try:
                view = self.image_transform(image, rng)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                return BadRow(f"cannot transform the picture {_called(row[name])} of {image.size}: {error}")
            found.append(view if isinstance(view, Mapping) else {"pixel_values": view})
        if len(found) == 1:
            return dict(found[0])
        return {name: torch.stack([views[name] for views in found]) for name in found[0]}  # (k, 3, H, W)

    def tokenize(self, examples: Sequence[Example | BadRow]) -> list[Example | BadRow]:
        """Tokenises all texts in one call; an example whose text has no tokens becomes a `BadRow`."""
        if self.tokenizer is None:
            return list(examples)
        good = [example for example in examples if isinstance(example, Example)]
        texts = [example.text for example in good]

        # all texts of a batch in one call, truncated to L tokens or to one of their windows
        if self.clean_caption is not None:
            texts = [self.clean_caption(text) for text in texts]
        most = None if self.windows else self.max_text_length
        rows = joined_ids(self.tokenizer, texts, [example.second for example in good], most)
        for example, ids in zip(good, rows, strict=True):
            example.tokens = self._window(ids, example.rng) if self.windows else ids  # (T,) with T at most L
        return [self._with_tokens(example) for example in examples]

    def _with_tokens(self, example: Example | BadRow) -> Example | BadRow:
        if isinstance(example, BadRow) or len(example.tokens):
            return example
        return BadRow(f"no token is left of the {self.rule.what} {example.text[:40]!r}")

    def _window(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random window of a text, (min(T, L),); always exactly one draw."""
        length = self.max_text_length
        count = -(-len(ids) // length)
        start = min(int(rng.random() * count) * length, max(len(ids) - length, 0))
        return ids[start : start + length]


def token_ids(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> list[np.ndarray]:
    """Ids of each text, (T,) int64, truncated to `most`; "[MASK]" in a text is plain text."""
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
        verbose=False,  # no length warning: long texts are split into windows afterwards
    )["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def joined_ids(
    tokenizer: Any, texts: Sequence[str], seconds: Sequence[str | None], most: int | None = None
) -> list[np.ndarray]:
    """
    Ids of each text, or of two joined by [SEP], or by [CLS] for a vocabulary without it; (T,) int64, T at most `most`,
    truncating the longer of two first. The layout adds the leading [CLS].
    """
    first = token_ids(tokenizer, texts, most)
    paired = [place for place, second in enumerate(seconds) if second is not None]
    if not paired:
        return first

    # join the two texts of a row by the separator
    separator = tokenizer.sep_token_id
    separator = tokenizer.cls_token_id if separator is None else separator
    others = token_ids(tokenizer, [seconds[place] for place in paired], most)
    for place, second in zip(paired, others, strict=True):
        first[place] = _joined(first[place], second, separator, most)
    return first


def _joined(first: np.ndarray, second: np.ndarray, separator: int, most: int | None) -> np.ndarray:
    # each text gets half of the room, plus what the other does not use
    room = len(first) + len(second) if most is None else most - 1
    half = room // 2
    kept = min(len(first), max(room - half, room - len(second)))
    return np.concatenate([first[:kept], [separator], second[: room - kept]])  # (T,)


def _called(image: Any) -> str:
    """Name of an image in messages: its path, if any."""
    if isinstance(image, dict):
        image = image.get("path") or image.get("bytes")
    return repr(image) if isinstance(image, str) else f"({type(image).__name__})"


class Corruption(Protocol):
    """Hides tokens and patches of a row: `Replacement`, `Dropping`."""

    def __call__(
        self, tokens: np.ndarray | None, grid: tuple[int, int] | None, progress: float, rng: np.random.Generator
    ) -> Hidden: ...


class Targets(Protocol):
    """The labels of a task."""

    def reason(self, row: dict[str, Any]) -> str | None:
        """The reason why a row has no label to learn from, or None."""
        ...

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Tensors of the batch."""
        ...


class Collator:
    """Turns a list of (RowKey, row) into a batch.

    Every random choice about a row (caption, crop, window, hidden tokens, hidden patches) is drawn from
    `key.generator(seed)`: it does not depend on the row's batch, data worker or process.

    An item may hold a third member, (RowKey, row) pairs of stand-ins, used if the row is bad: its image or text cannot
    be read, its text has no tokens, or its content is a `BadRow`. Without stand-ins a bad row is an error.

    Args:
        reader: turns rows into examples.
        layout: turns examples into tensors.
        corruption: hides tokens and patches; None hides nothing and adds no keys to the batch.
        targets: adds the labels of a task.
        seed: seed of the run.
        source: name of the data, for error messages.
        keeping: share of patches that the model reads; 1 keeps all and adds no key to the batch.

    Raises:
        ValueError: reader and layout disagree on texts, or a corruption or a share of patches lacks the patch size.
    """

    def __init__(
        self,
        reader: Reader,
        layout: Layout,
        corruption: Corruption | None = None,
        targets: Targets | None = None,
        seed: int = 0,
        source: str = "the data set",
        keeping: Keeping = ALL_PATCHES,
    ) -> None:
        if (reader.tokenizer is None) != (layout.special is None):
            wanted = "a layout of texts" if layout.special is None else "a tokenizer"
            raise ValueError(f"{type(layout).__name__} and the reader do not fit: expected {wanted}")
        if corruption is not None and reader.image_transform is not None and layout.patch_size is None:
            raise ValueError("a corruption of images needs the layout's patch_size, got none")
        if keeping.share != 1 and (reader.image_transform is None or layout.patch_size is None):
            raise ValueError(f"{keeping.share} of an image's patches are kept; expected images and their patch_size")
        self.reader = reader
        self.layout = layout
        self.corruption = corruption
        self.targets = targets
        self.seed = seed
        self.source = source
        self.keeping = keeping

    def __call__(self, items: Sequence[tuple]) -> dict[str, Any]:
        """Collates `items`, (RowKey, row) or (RowKey, row, stand-ins).

        Returns:
            for images: pixel_values (B, 3, H, W) float32, or (B, k, 3, H, W), and any other view of the transform;
            for texts: input_ids, attention_mask (B, H+W) int64;
            for hidden tokens: text_index (n,) int64, indices of the tokens in the flat (B, W); mlm_index (M,) int64,
            indices into those n; mlm_labels (M,) int64, the original tokens; and for replaced tokens
            masked_input_ids (B, H+W) int64;
            for hidden patches: bool_masked_pos (B, N) bool; mim_index (M,) int64, their indices in the flat (B, N);
            for kept patches: kept_patches (B, K) int64, ascending indices among the N patches of a row;
            the keys of the targets; ids (B,) int64 concept ids; rows (B,) int64;
            and, if rows were replaced, quarantine: a list of {"row", "epoch", "attempt", "reason", "replaced_by"}, one
            for each bad row that was not known before, with "excluded" if the run must not see it.

        Raises:
            ValueError: a row without stand-ins cannot be used (the message names it), or the image size is not a
                multiple of the patch size.
            BadRowsError: no stand-in can be used either.
        """
        if not items:
            raise ValueError("an empty batch: expected at least one (RowKey, row)")
        examples, replaced = self._examples(items)  # B examples, with bad rows replaced

        # images and their patch grid
        batch: dict[str, Any] = {}
        for name in examples[0].views:
            batch[name] = torch.stack([one.views[name] for one in examples])  # (B, 3, H, W), or (B, k, 3, H, W)
        grid = None
        if batch and self.layout.patch_size is not None:
            grid = patch_grid(batch["pixel_values"], self.layout.patch_size)

        # texts after the layout's head, and hidden tokens and patches
        head = None
        if self.layout.special is not None:
            head = self.layout.head(0 if grid is None else grid[0] * grid[1])  # (H,)
            tokens = [example.tokens for example in examples]
            batch["input_ids"] = lay_out(tokens, head, self.layout.special.pad)  # (B, H+W)
            batch["attention_mask"] = attention_mask(tokens, len(head))  # (B, H+W)
        if self.corruption is not None:
            batch |= self._hidden(examples, head, grid)

        # labels
        if self.targets is not None:
            batch |= self.targets(examples)

        # kept patches, drawn last, so that no other draw of the row depends on them
        if self.keeping.share != 1:
            n_patches = grid[0] * grid[1]
            count = self.keeping.count(n_patches, items[0][0].progress)  # K, the same for all rows
            kept = [keep_patches(n_patches, count, example.rng) for example in examples]
            batch["kept_patches"] = torch.from_numpy(np.stack(kept))  # (B, K)
        ids = [concept_id(example.row.get("id", example.key.row)) for example in examples]
        batch["ids"] = torch.tensor(ids, dtype=torch.int64)  # (B,)
        batch["rows"] = torch.tensor([example.key.row for example in examples], dtype=torch.int64)  # (B,)
        return {**batch, "quarantine": replaced} if replaced else batch

    def _hidden(
        self, examples: Sequence[Example], head: np.ndarray | None, grid: tuple[int, int] | None
    ) -> dict[str, torch.Tensor]:
        """The hidden tokens and patches, packed over the batch."""
        hidden = [self.corruption(one.tokens, grid, one.key.progress, one.rng) for one in examples]
        batch = {}
        if head is not None:
            tokens = [example.tokens for example in examples]
            if hidden[0].tokens is not None:
                changed = [one.tokens for one in hidden]
                batch["masked_input_ids"] = lay_out(changed, head, self.layout.special.pad)  # (B, H+W)
            batch |= _packed_targets(tokens, [one.chosen for one in hidden])
        if grid is not None:
            masked = np.stack([one.patches for one in hidden])
            batch["bool_masked_pos"] = torch.from_numpy(masked)  # (B, N)
            batch["mim_index"] = torch.from_numpy(np.flatnonzero(masked))  # (M,)
        return batch

    def _examples(self, items: Sequence[tuple]) -> tuple[list[Example], list[dict[str, Any]]]:
        """Examples of the items, with bad rows replaced, and the quarantine lines about those rows."""
        replaced: list[dict[str, Any]] = []
        examples = self.reader.tokenize([self._read(key, row) for key, row, *_ in items])
        for place, example in enumerate(examples):
            if isinstance(example, BadRow):
                examples[place] = self._stand_in(items[place], example, replaced)
        return examples, replaced

    def _read(self, key: RowKey, row: dict[str, Any] | BadRow) -> Example | BadRow:
        if isinstance(row, BadRow):
            return row
        if self.targets is not None and (reason := self.targets.reason(row)) is not None:
            return BadRow(reason)
        return self.reader.read(key, row, key.generator(self.seed))

    def _stand_in(self, item: tuple, bad: BadRow, replaced: list[dict[str, Any]]) -> Example:
        """The item's first usable stand-in; appends a line to `replaced` for each row that could not be used."""
        key, _, *stand_ins = item
        if not stand_ins:
            raise ValueError(f"row {key.row} of {self.source}: {bad.reason}")

        # candidates in turn, until one can be used
        failed = [(key.row, bad)]
        for other, row in islice(stand_ins[0], MAX_ATTEMPTS):
            (example,) = self.reader.tokenize([self._read(other, row)])
            if isinstance(example, Example):
                # rows known to be bad are already listed
                replaced += [
                    {
                        "row": number,
                        "epoch": key.epoch,
                        "attempt": attempt,
                        "reason": wrong.reason,
                        "replaced_by": other.row,
                        **({"excluded": True} if wrong.excluded else {}),
                    }
                    for attempt, (number, wrong) in enumerate(failed)
                    if not wrong.known
                ]
                return example
            failed.append((other.row, example))

        # none is usable: the message lists those tried
        lines = "\n".join(f"  row {number}: {wrong.reason}" for number, wrong in failed[:SHOWN])
        raise BadRowsError(
            f"row {key.row} of {self.source} cannot be used, and none of {len(failed) - 1} rows that could stand in "
            f"for it; the first of them all:\n{lines}"
        )


def _packed_targets(tokens: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Indices of the batch's tokens, and of those to predict among them."""
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)  # (B,)
    starts = np.cumsum(lengths) - lengths  # (B,), index of each row's first token
    targets = np.concatenate([places + start for places, start in zip(chosen, starts, strict=True)])  # (M,)
    arrays = {
        "text_index": np.flatnonzero(real_slots(tokens)),  # (n,)
        "mlm_index": targets,
        "mlm_labels": np.concatenate(tokens)[targets],  # (M,)
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
