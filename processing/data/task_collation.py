"""Targets of the tasks: labels, or weighted answers.

B rows, R answers of all rows, A tokens of the longest answer, C answer classes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .collation import Example, token_ids
from .layouts import SpecialTokens


class Labels:
    """Targets of rows with a "label"."""

    def reason(self, row: dict[str, Any]) -> str | None:
        """None: every row has its label."""
        return None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`labels` (B,) int64."""
        return {"labels": torch.tensor([example.row["label"] for example in examples])}  # (B,)


class Answers:
    """
    Targets of questions: each distinct answer of a row, weighted by the share of annotators who gave it.

    Args:
        tokenizer: tokenizer of the answers.
        special: its special ids; [CLS] starts an answer.
        end_token_id: id that ends an answer.
        max_answer_length: maximum number of tokens of an answer.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens, end_token_id: int, max_answer_length: int = 30) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self.end_token_id = end_token_id
        self.max_answer_length = max_answer_length

    def reason(self, row: dict[str, Any]) -> str | None:
        """A row needs at least one answer that is not blank."""
        return None if weigh_answers(row["answers"], row["weight"]) else "there is no answer to learn"

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """
        answer_ids, answer_mask (R, A) int64, with the answers of a row adjacent; answer_weights (R,) float32;
        answers_per_question (B,) int64.
        """
        # each distinct answer once, with its share
        shares = [weigh_answers(example.row["answers"], example.row["weight"]) for example in examples]
        ids, mask = encode_answers(
            self.tokenizer,
            [answer for share in shares for answer in share],
            self.special.cls,
            self.end_token_id,
            self.special.pad,
            self.max_answer_length,
        )  # (R, A) each
        return {
            "answer_ids": ids,
            "answer_mask": mask,
            "answer_weights": torch.tensor([weight for share in shares for weight in share.values()]),  # (R,)
            "answers_per_question": torch.tensor([len(share) for share in shares]),  # (B,)
        }


class AnswerClasses:
    """
    Targets of questions: VQA's score of each answer class. Answers outside the classes are dropped.

    Args:
        classes: the possible answers.
        normalise: normalises answers as the score does.
    """

    def __init__(self, classes: Sequence[str], normalise: Callable[[str], str]) -> None:
        self.normalise = normalise
        # of classes with the same normal form, the first counts
        self.places: dict[str, int] = {}
        for place, one in enumerate(classes):
            self.places.setdefault(normalise(one), place)
        self.count = len(classes)

    def reason(self, row: dict[str, Any]) -> str | None:
        """A row needs at least one answer that is not blank."""
        return None if any(answer.strip() for answer in row["answers"]) else "there is no answer to learn"

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`labels` (B, C) float32 in [0, 1], times the row's weight; all 0 if no answer of the row is a class."""
        labels = torch.zeros(len(examples), self.count)  # (B, C)
        for number, example in enumerate(examples):
            answers = example.row["answers"]
            for answer, votes in Counter(map(self.normalise, answers)).items():
                if (place := self.places.get(answer)) is not None:
                    labels[number, place] = example.row["weight"] * vote_accuracy(votes, len(answers))
        return {"labels": labels}


def vote_accuracy(votes: int, people: int) -> float:
    """
    VQA's accuracy of an answer given by `votes` of the annotators: min(votes of the others / 3, 1), averaged over the
    annotator left out. A single answer, as in Visual Genome, is right.
    """
    if people == 1:
        return float(votes)
    agreeing = votes * min((votes - 1) / 3, 1.0)
    return (agreeing + (people - votes) * min(votes / 3, 1.0)) / people


def weigh_answers(answers: Sequence[str], weight: float = 1.0) -> dict[str, float]:
    """Distinct answers in order, with their share of all answers times `weight`, without blank ones."""
    shares: dict[str, float] = {}
    # blank answers count in the total, so that the shares of the others do not grow
    for answer in answers:
        if answer.strip():
            shares[answer] = shares.get(answer, 0.0) + weight / len(answers)
    return shares


def encode_answers(
    tokenizer: Any, answers: Sequence[str], start: int, end: int, pad: int, max_length: int = 30
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Start, tokens, end, padding: ids and mask (R, A) int64. Special tokens in an answer's text are plain text.

    Raises:
        ValueError: an answer has no tokens.
    """
    rows = token_ids(tokenizer, answers, max_length)
    if empty := [answer for answer, row in zip(answers, rows, strict=True) if not len(row)]:
        raise ValueError(f"no token is left of the answer {empty[0]!r:.40}")

    # [CLS], tokens, [SEP], padding to the longest
    lengths = np.array([len(row) + 2 for row in rows])  # (R,)
    ids = np.full((len(rows), lengths.max()), pad, dtype=np.int64)  # (R, A)
    for place, row in enumerate(rows):
        ids[place, : lengths[place]] = [start, *row, end]
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)  # (R, A)
    return torch.from_numpy(ids), torch.from_numpy(mask)


__all__ = ["AnswerClasses", "Answers", "Labels", "encode_answers", "vote_accuracy", "weigh_answers"]
