"""Reads text tasks in the official TSV format of GLUE (Wang et al., 2019), and two tasks of this project.

A row is {"text", "second_text" or None, "label": class index or score, "id"}. Fields are separated by tabs, and
quotation marks have no special meaning.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from oner.processing.vl_captions import caption_reason

from .listed_rows import ListedRows
from .places import regular
from .row_checks import PairDataError
from .task_files import RowFault
from .text_tables import is_utf8

# WordNet's lexicographer files, as `lexnames` numbers them
SUPERSENSES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip

# metrics of MoMo's Tables 2 and 3
Metric = Literal["accuracy", "f1", "correlation"]


@dataclass(frozen=True)
class TextTask:
    """
    A task on texts alone.

    Attributes:
        texts: Columns of its one or two texts.
        target: Column of the label.
        labels: Class names in the files, by index; empty if the target is a score.
        names: Readable class names, if the files have numbers.
        metric: Accuracy; accuracy and F1 of class 1; or correlations of a score.
    """

    texts: tuple[str, ...]
    target: str = "label"
    labels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    metric: Metric = "accuracy"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names or self.labels


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TEXT_TASKS = {
    "mnli": TextTask(SENTENCES, "gold_label", ("entailment", "neutral", "contradiction")),
    "mrpc": TextTask(("#1 String", "#2 String"), "Quality", ("0", "1"), ("not_equivalent", "equivalent"), "f1"),
    "qqp": TextTask(
        ("question1", "question2"), "is_duplicate", ("0", "1"), ("not_duplicate", "duplicate"), metric="f1"
    ),
    "sst2": TextTask(("sentence",), labels=("0", "1"), names=("negative", "positive")),
    "qnli": TextTask(("question", "sentence"), labels=ENTAILMENT),
    "rte": TextTask(SENTENCES, labels=ENTAILMENT),
    "stsb": TextTask(SENTENCES, "score", metric="correlation"),
    # from WordNet's glosses, examples/data/glosses
    "hypernym": TextTask(SENTENCES, labels=ENTAILMENT),
    "supersense": TextTask(("sentence",), labels=SUPERSENSES),
}


def text_task(name: str) -> TextTask:
    """A task by its name. Raises `ValueError` that lists them."""
    if name not in TEXT_TASKS:
        raise ValueError(f"unknown task of texts {name!r}; expected one of {', '.join(TEXT_TASKS)}")
    return TEXT_TASKS[name]


def open_text_task(
    sources: Sequence[str],
    name: str,
    clean: Callable[[str], str] | None = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Rows of one or several files of a task, with their labels.

    Args:
        name: A key of `TEXT_TASKS`.
        clean: Rewrites each text, as for captions.
        bad_rows: As in `ListedRows`.

    Raises:
        PairDataError: a file cannot be read or lacks a column, or rows are bad; the message gives their numbers.
    """
    task = text_task(name)
    rows = [row for source in sources for row in _rows(source, task, clean)]
    numbered = [{**row, "id": number} for number, row in enumerate(rows)]
    called = str(sources[0]) + (f" (+{len(sources) - 1})" if len(sources) > 1 else "")
    return ListedRows(numbered, called, lambda row: row["fault"], bad_rows, images=())


def _rows(source: str, task: TextTask, clean: Callable[[str], str] | None) -> Iterator[dict[str, Any]]:
    try:
        content = regular(source).read_bytes()
    except OSError as error:
        raise PairDataError(f"{source}: cannot be read: {error.strerror or error}") from error

    # find the columns; the test sets of GLUE have no labels
    first, *lines = content.decode("utf-8-sig", errors="surrogateescape").split("\n")
    header = first.rstrip("\r").split("\t")
    if missing := [column for column in (*task.texts, task.target) if column not in header]:
        raise PairDataError(
            f"{source}: no column {missing[0]!r}; found {', '.join(header)}"[:400] + "; expected the official TSV "
            "file of a split that has its labels, train or dev"
        )
    for line in lines:
        if line.strip():
            yield _row(line.rstrip("\r").split("\t"), header, task, clean)


def _row(
    cells: Sequence[str], header: Sequence[str], task: TextTask, clean: Callable[[str], str] | None
) -> dict[str, Any]:
    """The row of a line; for a bad line, an empty row whose "fault" gives the reason."""
    empty: dict[str, Any] = {"text": "", "second_text": None, "label": 0}
    try:
        if len(cells) != len(header):
            raise RowFault(f"has {len(cells)} fields where the header has {len(header)}")
        named = dict(zip(header, cells, strict=True))
        texts = [_text(named[column], clean) for column in task.texts]
        label = _label(named[task.target], task)
    except RowFault as fault:
        return {**empty, "fault": str(fault).encode("utf-8", "backslashreplace").decode()}
    return {"text": texts[0], "second_text": texts[1] if len(texts) > 1 else None, "label": label, "fault": None}


def _text(text: str, clean: Callable[[str], str] | None) -> str:
    if not is_utf8(text):
        raise RowFault("is not UTF-8")
    if reason := caption_reason(text):
        raise RowFault(reason.replace("the caption", "the text", 1))
    cleaned = text if clean is None else clean(text)
    if not cleaned:
        raise RowFault(f"no word is left of the text {text!r:.40}")
    return cleaned


def _label(cell: str, task: TextTask) -> int | float:
    # a class by its name
    if task.labels:
        if cell not in task.labels:
            raise RowFault(f"the label must be one of {', '.join(task.labels)}"[:200] + f", got {cell!r:.40}")
        return task.labels.index(cell)
    # or a score
    try:
        score = float(cell)
    except ValueError:
        score = float("nan")
    if not np.isfinite(score):
        raise RowFault(f"the score must be a number, got {cell!r:.40}")
    return score


__all__ = ["SUPERSENSES", "TEXT_TASKS", "TextTask", "open_text_task", "text_task"]
