"""Evaluates visual question answering with VQA v2's accuracy, and writes answers in the format of its server."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from oner.modeling.vl_task_heads import answer_end
from oner.processing.data.task_collation import encode_answers, vote_accuracy

from .classification import task_inputs
from .embedding import batches
from .sheets import evaluating, on_device

Row = Mapping[str, Any]

# punctuation, numbers and contractions as in the VQA evaluation (vqaEval.py)
MARKS = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# contractions that are other words without their apostrophe (well, were, shed, its) are not restored, so not listed
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspelt(word: str) -> Iterator[str]:
    """The word without one or more of its apostrophes."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    for count in range(1, len(places) + 1):
        for left_out in combinations(places, count):
            yield "".join(letter for place, letter in enumerate(word) if place not in left_out)


# misspelt form -> contraction
CONTRACTIONS = {key: word for word in CONTRACTED for key in _misspelt(word)}


def normalise_answer(answer: str) -> str:
    """
    The answer in the form that the VQA evaluation compares.

    A punctuation mark is removed if it is next to a space or if the answer has a number like 1,000; otherwise it
    becomes a space. A period is removed unless a digit follows. Then the text is lower-cased, numbers up to ten become
    digits, articles are removed, and contractions get their apostrophes.
    """

    # punctuation, tested on the original answer, not on what remains of it
    text = answer
    for mark in MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or THOUSANDS.search(answer) else " ")

    # digits for numbers, no articles, apostrophes restored
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, answers: Sequence[str]) -> float:
    """
    VQA's accuracy in [0, 1]: min(people who gave this answer / 3, 1), averaged over leaving out one person at a time.

    `answers` has one answer per person. All are normalised unless they are identical, as in the official evaluation.
    A single answer, which the official formula never counts because nobody else gave it, is right, as in training.
    Raises `ValueError` without answers.
    """
    if not answers:
        raise ValueError("there are no human answers to compare with")
    answer = _one_line(answer)
    answers = [_one_line(one) for one in answers]
    if len(set(answers)) > 1:
        answer = normalise_answer(answer)
        answers = [normalise_answer(one) for one in answers]

    return vote_accuracy(sum(one.lower() == answer.lower() for one in answers), len(answers))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


class AnswerEvaluator:
    """
    Answers every question: chooses one of the candidates or, without candidates, generates an answer.

    Yields name/accuracy and the accuracy for each kind of question given in the rows (name/accuracy_yes_no, _number,
    _other), both over the rows with answers; and name/questions, the number of questions answered.

    Args:
        rows: With "image", "text", "id", and "answers" for scoring.
        candidates: Possible answers (VQA: a list of 3,192, `answer_list.json`); None: any.
        k: Candidates whose full likelihood is computed (ALBEF: 128).
        count_first_token_twice: See `rank_answers`.
        num_beams: Beams for generation without candidates.
        folder: For `NAME.answers.json`, a list of {"question_id", "answer"}.

    Raises:
        ValueError: there are no rows, or neither answers for scoring nor a folder for writing.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        candidates: Sequence[str] | None = None,
        name: str = "eval",
        batch_size: int = 16,
        k: int = 128,
        count_first_token_twice: bool = True,
        num_beams: int = 1,
        folder: str | None = None,
        progress: bool = False,
    ):
        if len(rows) == 0:
            raise ValueError("there are no rows to evaluate on")
        self.rows = rows
        self.name = name
        self.batch_size = batch_size
        self.progress = progress
        self.candidates = None if candidates is None else list(candidates)
        self.k = k
        self.count_first_token_twice = count_first_token_twice
        self.num_beams = num_beams
        self.folder = folder

        # pictures are paths or bytes, not decoded, so all rows fit in memory
        self.asked = [rows[number] for number in range(len(rows))]
        if folder is None and not any(row["answers"] for row in self.asked):
            raise ValueError(
                f"{name}: no question has answers for scoring, and there is no folder to write answers to"
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        options = {"answers": "written by the decoder", "num_beams": self.num_beams}
        if self.candidates is not None:
            options = {
                "answers": f"ranked out of {len(self.candidates)}, {self.k} of them in full",
                "first token counted twice": self.count_first_token_twice,
            }
        return {"task": "visual question answering, VQA accuracy", "questions": len(self.asked), **options}

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Answer all questions, write the answers, and yield (name, value)."""
        answers: list[str] = []
        with evaluating(model):
            tokens = self._candidate_tokens(model, processor)
            for rows in batches(len(self.asked), self.batch_size, "questions", self.progress):
                inputs = on_device(task_inputs(processor, self.asked[rows]), model)
                answers += self._rank(model, inputs, tokens) if tokens else self._write(model, processor, inputs)

        if self.folder is not None:
            self._save(answers)
        # each scored question counts in total and for its kind
        scores: dict[str, list[float]] = {}
        for row, answer in zip(self.asked, answers, strict=True):
            if not row["answers"]:
                continue
            score = answer_accuracy(answer, row["answers"])
            scores.setdefault("accuracy", []).append(score)
            if kind := row.get("kind"):
                key = f"accuracy_{re.sub('[^a-z]+', '_', kind.lower())}"
                scores.setdefault(key, []).append(score)
        for key, values in sorted(scores.items()):
            yield f"{self.name}/{key}", sum(values) / len(values)
        yield f"{self.name}/questions", float(len(answers))

    def _candidate_tokens(self, model: Any, processor: Any) -> dict[str, torch.Tensor]:
        if self.candidates is None:
            return {}
        config = model.config
        ids, mask = encode_answers(
            processor.tokenizer, self.candidates, config.cls_token_id, answer_end(config), config.pad_token_id or 0
        )
        return on_device({"candidate_ids": ids, "candidate_mask": mask}, model)

    def _rank(self, model: Any, inputs: dict[str, torch.Tensor], tokens: dict[str, torch.Tensor]) -> list[str]:
        ranking = model.rank_answers(
            **inputs, **tokens, k=self.k, count_first_token_twice=self.count_first_token_twice
        )  # indices (B, k), best first
        return [self.candidates[place] for place in ranking.indices[:, 0].tolist()]

    def _write(self, model: Any, processor: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
        sequences = model.generate_answers(**inputs, num_beams=self.num_beams).sequences.tolist()  # (B, T)
        # tokens after the end token are padding
        end = answer_end(model.config)
        tokens = [row[: row.index(end)] if end in row else row for row in sequences]
        return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _save(self, answers: list[str]) -> None:
        path = Path(self.folder) / f"{self.name}.answers.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = zip(self.asked, answers, strict=True)
        entries = [{"question_id": row["id"], "answer": answer} for row, answer in pairs]
        path.write_text(json.dumps(entries, ensure_ascii=False) + "\n", encoding="utf-8")


class ClassifiedAnswers(AnswerEvaluator):
    """Like `AnswerEvaluator`, for a model whose `logits` (B, C) classify the answers in its configuration."""

    @property
    def protocol(self) -> dict[str, Any]:
        return {**super().protocol, "answers": "the likeliest of the model's classes"}

    def _write(self, model: Any, processor: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
        logits = model(**inputs).logits  # (B, C)
        return [model.config.id2label[place] for place in logits.argmax(-1).tolist()]
