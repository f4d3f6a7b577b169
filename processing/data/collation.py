"""Rows to a training batch: the only place where data are corrupted at random, and where bad rows are replaced.

Shapes: B pairs, N patches of a picture (row-major), Lt words of the longest caption of the batch (at least 1),
n words of the whole batch, M words or patches with a target. Joint layout of a row: [CLS] [IMG]*N w1 ... wT [PAD]*.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from oner.processing.image_processing_vl import open_image
from oner.processing.vl_captions import caption_reason

from .masking import mask_blocks, mask_patches, mask_words, mim_ratio
from .quarantine import MAX_ATTEMPTS, SHOWN, BadRow, BadRowsError
from .sampling import RowKey, concept_id

NO_WORDS = np.zeros(0, dtype=np.int64)
MIM_MASKINGS = ("random", "blocks")


@dataclass
class Example:
    """A row whose caption is chosen and whose picture is decoded; `words` are the caption's ids, (T,).

    `pixels` holds the views of the picture by their names in the batch.
    """

    key: RowKey
    row: dict[str, Any]
    rng: np.random.Generator
    caption: str
    pixels: Mapping[str, torch.Tensor]
    words: np.ndarray = field(default_factory=NO_WORDS.copy)


class PairCollator:
    """Turns a list of (RowKey, row) into the batch that `OneRForPreTraining` and its objective take.

    Every random choice about a row (which caption, crop, masked words, masked patches) is drawn from
    `key.generator(seed)`: it does not depend on the row's batch, data worker or process.

    An item may hold a third member, (RowKey, row) pairs of those that stand in for the row if it cannot be used: its
    picture is none, its caption no text or without words, or a `BadRow` holds its place. Without it that is an error.

    Args:
        tokenizer: fast tokenizer; its special tokens are neither added nor recognised inside a caption.
        image_transform: (PIL RGB, numpy generator) -> (3, H, W) float tensor, or several views by their names in the
            batch, `pixel_values` among them: each is stacked.
        image_token_id, cls_token_id, mask_token_id, pad_token_id: ids of the layout.
        vocab_size: a random replacement is drawn below it, special ids excluded.
        patch_size: side of a square patch; must divide H and W.
        max_text_length: words kept of a caption, without [CLS].
        seed: seed of the run.
        mlm_probability: share of words with a target.
        mim_ratio: share of masked patches at the beginning and at the end of the run.
        mim_masking: "random" patches, or "blocks" as BEiT, which may fall short of the share by a few patches.
        mim_min_block: patches of the smallest block; where that is more than all to be masked, those.
        mask_text, mask_image: switch the corruption off (the twin then equals the clean ids, no patch is masked).
        random_specials: a random word may be a special token, as in ALBEF.
        clean_caption: rewrites a caption before it is tokenised, as `pre_caption` does.
        max_pixels: largest picture that is decoded; None keeps the decoder's own cap.
        source: name of the data, for error messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        *,
        image_token_id: int,
        cls_token_id: int,
        mask_token_id: int,
        pad_token_id: int,
        vocab_size: int,
        patch_size: int,
        max_text_length: int = 64,
        seed: int = 0,
        mlm_probability: float = 0.15,
        mim_ratio: tuple[float, float] = (0.1, 0.5),
        mim_masking: str = "random",
        mim_min_block: int = 16,
        mask_text: bool = True,
        mask_image: bool = True,
        random_specials: bool = False,
        clean_caption: Callable[[str], str] | None = None,
        max_pixels: int | None = None,
        source: str = "the data set",
    ) -> None:
        layout = {"image": image_token_id, "cls": cls_token_id, "mask": mask_token_id, "pad": pad_token_id}
        if len(set(layout.values())) < 4 or min(layout.values()) < 0 or max(layout.values()) >= vocab_size:
            raise ValueError(f"special ids must be four different ids in [0, {vocab_size}), got {layout}")
        if max_text_length < 1:
            raise ValueError(f"max_text_length must be positive, got {max_text_length}")
        if mim_masking not in MIM_MASKINGS:
            raise ValueError(f"mim_masking must be one of {MIM_MASKINGS}, got {mim_masking!r}")
        if mim_min_block < 1:
            raise ValueError(f"mim_min_block must be positive, got {mim_min_block}")
        self.tokenizer, self.image_transform = tokenizer, image_transform
        self.image_token_id, self.cls_token_id = image_token_id, cls_token_id
        self.mask_token_id, self.pad_token_id = mask_token_id, pad_token_id
        self.vocab_size, self.patch_size, self.max_text_length = vocab_size, patch_size, max_text_length
        self.seed, self.mlm_probability, self.mim_ratio = seed, mlm_probability, tuple(mim_ratio)
        self.mim_masking, self.mim_min_block, self.clean_caption = mim_masking, mim_min_block, clean_caption
        self.mask_text, self.mask_image, self.random_specials = mask_text, mask_image, random_specials
        self.max_pixels, self.source = max_pixels, source
        known = {i for i in getattr(tokenizer, "all_special_ids", []) if 0 <= i < vocab_size}
        self.special_ids = sorted(known | set(layout.values()))

    def __call__(self, items: Sequence[tuple]) -> dict[str, Any]:
        """Batch of `items`, (RowKey, row) or (RowKey, row, stand-ins).

        Returns:
            input_ids, attention_mask, masked_input_ids (B, 1+N+Lt) int64; pixel_values (B, 3, H, W) float32 and any
            other view of the transform; bool_masked_pos (B, N) bool; mim_index (M,) int64, the masked patches' places
            in a flat (B, N); text_index (n,) int64, the places of the words in a flat (B, Lt);
            mlm_index (M,) int64, places among those n words; mlm_labels (M,) int64, the words that stood there;
            ids (B,) int64 concept ids; rows (B,) int64; and, if rows were replaced, quarantine: a list of
            {"row", "epoch", "attempt", "reason", "replaced_by"}, one for each row that could not be used and was not
            known to be bad.

        Raises:
            ValueError: if a row without stand-ins cannot be used (the message names it), or a picture ends in a size
                that patches do not fit.
            BadRowsError: no stand-in can be used either.
        """
        if not items:
            raise ValueError("an empty batch: expected at least one (RowKey, row)")
        quarantine: list[dict[str, Any]] = []
        examples = self._with_words([self._read(key, row) for key, row, *_ in items])
        for place, example in enumerate(examples):
            if isinstance(example, BadRow):
                examples[place] = self._stand_in(items[place], example, quarantine)
        views = {name: torch.stack([one.pixels[name] for one in examples]) for name in examples[0].pixels}
        grid = self._grid(views["pixel_values"])
        corrupted, selected, patches = [], [], []
        for example in examples:
            changed, places = self._mask_words(example.words, example.rng)
            corrupted.append(changed)
            selected.append(places)
            patches.append(self._mask_patches(grid, example.key.progress, example.rng))
        words = [example.words for example in examples]
        batch: dict[str, Any] = {**self._lay_out(words, corrupted, selected, grid[0] * grid[1]), **views}
        batch["bool_masked_pos"] = torch.from_numpy(np.stack(patches))
        batch["mim_index"] = torch.from_numpy(np.flatnonzero(patches))
        ids = [concept_id(example.row.get("id", example.key.row)) for example in examples]
        batch["ids"] = torch.tensor(ids, dtype=torch.int64)
        batch["rows"] = torch.tensor([example.key.row for example in examples], dtype=torch.int64)
        if quarantine:
            batch["quarantine"] = quarantine
        return batch

    def _read(self, key: RowKey, row: dict[str, Any] | BadRow) -> Example | BadRow:
        """A row's caption and picture, or why there are none."""
        if isinstance(row, BadRow):
            return row
        rng = key.generator(self.seed)
        captions = [row["captions"]] if isinstance(row["captions"], str) else row["captions"]
        if not len(captions):
            return BadRow("at least one caption is needed, got an empty list")
        # one draw whatever their number, so that later draws do not depend on it
        caption = captions[int(rng.random() * len(captions))]
        reason = caption_reason(caption)
        if reason is not None:
            return BadRow(reason)
        cap = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        try:
            image = open_image(row["image"], **cap)
        except (ValueError, OSError) as error:
            return BadRow(f"cannot read the picture {_name(row['image'])}: {error}")
        try:
            pixels = self.image_transform(image, rng)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            return BadRow(f"cannot transform the picture {_name(row['image'])} of {image.size}: {error}")
        return Example(key, row, rng, caption, pixels if isinstance(pixels, Mapping) else {"pixel_values": pixels})

    def _with_words(self, examples: list[Example | BadRow]) -> list[Example | BadRow]:
        """The examples with their captions as ids; a caption without any is bad."""
        good = [example for example in examples if isinstance(example, Example)]
        words = iter(self._words([example.caption for example in good]) if good else [])
        done = []
        for example in examples:
            if isinstance(example, Example):
                example.words = next(words)
                if not len(example.words):
                    example = BadRow(f"no word is left of the caption {example.caption[:40]!r}")
            done.append(example)
        return done

    def _stand_in(self, item: tuple, bad: BadRow, quarantine: list[dict[str, Any]]) -> Example:
        """The first of the item's stand-ins that can be used; `quarantine` learns of the rows that could not."""
        key, _, *stand_ins = item
        if not stand_ins:
            raise ValueError(f"row {key.row} of {self.source}: {bad.reason}")
        failed = [(key.row, bad)]
        for other, row in islice(stand_ins[0], MAX_ATTEMPTS):
            (example,) = self._with_words([self._read(other, row)])
            if isinstance(example, Example):
                quarantine += [
                    {
                        "row": number,
                        "epoch": key.epoch,
                        "attempt": attempt,
                        "reason": wrong.reason,
                        "replaced_by": other.row,
                    }
                    for attempt, (number, wrong) in enumerate(failed)
                    if not wrong.known
                ]
                return example
            failed.append((other.row, example))
        lines = "\n".join(f"  row {number}: {wrong.reason}" for number, wrong in failed[:SHOWN])
        raise BadRowsError(
            f"row {key.row} of {self.source} cannot be used, and none of {len(failed) - 1} rows that could stand in "
            f"for it; the first of them all:\n{lines}"
        )

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        height, width = pixels.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"pictures of {height}x{width} cannot be cut into patches of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def _words(self, captions: list[str]) -> list[np.ndarray]:
        """Ids of each caption, (T,) with 0 <= T <= max_text_length; the text "[MASK]" in a caption is plain text."""
        if self.clean_caption is not None:
            captions = [self.clean_caption(caption) for caption in captions]
        encoded = self.tokenizer(
            captions,
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=self.max_text_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]

    def _mask_words(self, words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if not self.mask_text:
            return words, np.zeros(0, dtype=np.int64)
        return mask_words(
            words,
            rng,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
            probability=self.mlm_probability,
            random_specials=self.random_specials,
        )

    def _mask_patches(self, grid: tuple[int, int], progress: float, rng: np.random.Generator) -> np.ndarray:
        n_patches = grid[0] * grid[1]
        if not self.mask_image:
            return np.zeros(n_patches, dtype=bool)
        ratio = mim_ratio(progress, *self.mim_ratio)
        if self.mim_masking == "blocks":
            return mask_blocks(grid, int(n_patches * ratio), rng, min_block=self.mim_min_block)
        return mask_patches(n_patches, ratio, rng)

    def _lay_out(
        self, words: list[np.ndarray], corrupted: list[np.ndarray], selected: list[np.ndarray], n_patches: int
    ) -> dict[str, torch.Tensor]:
        """The joint rows, clean and corrupted, and the places of the words and of their targets."""
        lengths = np.array([len(ids) for ids in words], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        longest, head = max(1, int(lengths.max())), 1 + n_patches
        real = np.arange(longest) < lengths[:, None]  # (B, Lt)
        ids = np.full((len(words), head + longest), self.pad_token_id, dtype=np.int64)
        ids[:, 0], ids[:, 1:head] = self.cls_token_id, self.image_token_id
        twin, mask = ids.copy(), np.ones(ids.shape, dtype=np.int64)
        packed = np.concatenate(words)
        ids[:, head:][real] = packed
        twin[:, head:][real] = np.concatenate(corrupted)
        mask[:, head:] = real
        targets = np.concatenate([places + start for places, start in zip(selected, starts, strict=True)])
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "masked_input_ids": twin,
            "text_index": np.flatnonzero(real),
            "mlm_index": targets,
            "mlm_labels": packed[targets],
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _name(image: Any) -> str:
    """What to call a picture in a message: its path where it has one."""
    if isinstance(image, dict):
        image = image.get("path") or image.get("bytes")
    return f"({type(image).__name__})" if image is None or not isinstance(image, str) else repr(image)
