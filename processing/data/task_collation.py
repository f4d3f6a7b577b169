"""Rows of a task to a training batch: pictures, the text in the joint layout, and a label or answers.

B rows, N patches of a picture, W words of the longest text, R answers of all rows, A tokens of the longest answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from oner.processing.image_processing_vl import open_image

from .collation import NO_WORDS, Example, PairCollator
from .quarantine import BadRow
from .sampling import RowKey, concept_id


class TaskCollator(PairCollator):
    """
    As `PairCollator`, of rows with "text" and one picture or several, and without any masking. Every random choice
    about a row is drawn from `key.generator(seed)`, and a row that cannot be used is replaced likewise.

    Args:
        images: the keys of a row's pictures. One gives `pixel_values` (B, 3, H, W), several (B, n, 3, H, W), in order;
            the layout has the places of one.
        *args, **options: of `PairCollator`. A text is taken as the row has it: its reader has cleaned it.
    """

    def __init__(self, *args: Any, images: Sequence[str] = ("image",), **options: Any) -> None:
        super().__init__(*args, **{**options, "mask_text": False, "mask_image": False, "clean_caption": None})
        self.images = tuple(images)

    def __call__(self, items: Sequence[tuple]) -> dict[str, Any]:
        """
        Batch of `items`, (RowKey, row) or (RowKey, row, stand-ins).

        Returns:
            input_ids, attention_mask (B, 1+N+W) int64; pixel_values; ids, rows (B,) int64; what `targets` adds; and
            quarantine as `PairCollator`, where rows were replaced.

        Raises:
            ValueError, BadRowsError: as `PairCollator`.
        """
        if not items:
            raise ValueError("an empty batch: expected at least one (RowKey, row)")
        quarantine: list[dict[str, Any]] = []
        examples = self._with_words([self._read(key, row) for key, row, *_ in items])
        for place, example in enumerate(examples):
            if isinstance(example, BadRow):
                examples[place] = self._stand_in(items[place], example, quarantine)
        pixels = torch.stack([example.pixels["pixel_values"] for example in examples])
        height, width = self._grid(pixels)
        words = [example.words for example in examples]
        layout = self._lay_out(words, words, [NO_WORDS] * len(words), height * width)
        batch: dict[str, Any] = {name: layout[name] for name in ("input_ids", "attention_mask")}
        batch["pixel_values"] = pixels
        batch["ids"] = torch.tensor([concept_id(example.row["id"]) for example in examples])
        batch["rows"] = torch.tensor([example.key.row for example in examples])
        batch |= self.targets(examples)
        if quarantine:
            batch["quarantine"] = quarantine
        return batch

    def targets(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """What the rows say is right: `labels` (B,) int64."""
        return {"labels": torch.tensor([example.row["label"] for example in examples])}

    def _read(self, key: RowKey, row: dict[str, Any] | BadRow) -> Example | BadRow:
        if isinstance(row, BadRow):
            return row
        rng, views = key.generator(self.seed), []
        cap = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        for name in self.images:
            try:
                image = open_image(row[name], **cap)
            except (ValueError, OSError) as error:
                return BadRow(f"cannot read the picture {row[name]!r:.80}: {error}")
            try:
                view = self.image_transform(image, rng)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                return BadRow(f"cannot transform the picture {row[name]!r:.80} of {image.size}: {error}")
            views.append(view["pixel_values"] if isinstance(view, Mapping) else view)
        pixels = views[0] if len(views) == 1 else torch.stack(views)
        return Example(key, row, rng, row["text"], {"pixel_values": pixels})


class AnswerCollator(TaskCollator):
    """
    Of questions, with every different answer of a row, weighed by the share of people who gave it.

    Args:
        end_token_id: ends an answer.
        max_answer_length: words kept of an answer.
    """

    def __init__(self, *args: Any, end_token_id: int, max_answer_length: int = 30, **options: Any) -> None:
        super().__init__(*args, **options)
        self.end_token_id, self.max_answer_length = end_token_id, max_answer_length

    def targets(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """
        answer_ids, answer_mask (R, A) int64, the answers of a row one after the other; answer_weights (R,) float32;
        answers_per_question (B,) int64.
        """
        shares = [weigh_answers(example.row["answers"], example.row["weight"]) for example in examples]
        ids, mask = encode_answers(
            self.tokenizer,
            [answer for share in shares for answer in share],
            self.cls_token_id,
            self.end_token_id,
            self.pad_token_id,
            self.max_answer_length,
        )
        return {
            "answer_ids": ids,
            "answer_mask": mask,
            "answer_weights": torch.tensor([weight for share in shares for weight in share.values()]),
            "answers_per_question": torch.tensor([len(share) for share in shares]),
        }

    def _read(self, key: RowKey, row: dict[str, Any] | BadRow) -> Example | BadRow:
        if not isinstance(row, BadRow) and not weigh_answers(row["answers"], row["weight"]):
            return BadRow("there is no answer to learn")
        return super()._read(key, row)


def weigh_answers(answers: Sequence[str], weight: float = 1.0) -> dict[str, float]:
    """Different answers in their order, and the share of all that says so, times `weight`; blank ones are left out."""
    shares: dict[str, float] = {}
    for answer in answers:
        if answer.strip():
            shares[answer] = shares.get(answer, 0.0) + weight / len(answers)
    return shares


def encode_answers(
    tokenizer: Any, answers: Sequence[str], start: int, end: int, pad: int, max_length: int = 30
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Start, words, end, padding: ids and mask (R, A) int64. No special token is read inside an answer.

    Raises:
        ValueError: an answer of which no word is left.
    """
    rows = tokenizer(
        list(answers),
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    if empty := [answer for answer, row in zip(answers, rows, strict=True) if not row]:
        raise ValueError(f"no word is left of the answer {empty[0]!r:.40}")
    lengths = np.array([len(row) + 2 for row in rows])
    ids = np.full((len(rows), lengths.max()), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : lengths[place]] = [start, *row, end]
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def split_answers(batch: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    """A batch of `AnswerCollator` in `pieces` of consecutive rows, as even as can be, each with its own answers.

    Raises:
        ValueError: more pieces than rows.
    """
    per_question = batch["answers_per_question"]
    count, packed = len(per_question), ("answer_ids", "answer_mask", "answer_weights")
    if not 1 <= pieces <= count:
        raise ValueError(f"got a batch of {count} rows to split into {pieces} pieces; expected 1 to {count}")
    ends = [0, *per_question.cumsum(0).tolist()]
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [
        {
            name: value[ends[first] : ends[last]] if name in packed else value[first:last]
            for name, value in batch.items()
        }
        for first, last in zip(edges[:-1], edges[1:], strict=True)
    ]


__all__ = ["AnswerCollator", "TaskCollator", "encode_answers", "split_answers", "weigh_answers"]
