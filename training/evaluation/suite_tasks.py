"""The tasks of `oner suite`: probes of images and texts, and zero-shot retrieval.

A task's `run(model, processor)` yields (name, value); a probe's values are means over seeds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch

from oner.processing.data.glue_files import open_text_task
from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.row_checks import PairDataError
from oner.processing.data.sources import open_rows

from .embedding import Column, middle_square, spaced
from .features import Pool, image_features, text_features, text_pair_features
from .image_sets import SETS, digits, open_labelled_images, open_named
from .linear_probe import LinearRecipe, cropped_features, linear_probe
from .probe import Split, numbered_classes, probe
from .retrieval import RetrievalEvaluator

DRAW_SEED = 0  # for the rows chosen by a limit
# R@1 and R@5 in both directions, whose mean is MoMo's zero-shot retrieval score (Tables 2, 4 and 6)
KS = (1, 5)
QUICK = ("emoji_groups", "digits", "supersense", "hypernym", "emoji_retrieval")
# values of a probe that do not depend on the seed
FIXED = ("chance", "knn_accuracy")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SuiteOptions:
    """
    Options of all tasks.

    Attributes:
        data: Folder with `emoji` and `glosses`, as examples/data has them.
        root: Folder of the official files of Table 3's sets.
        download: Whether torchvision may bring those that are missing.
        seeds: Of the rows that choose a probe's strength, and of MAE's head and crops.
        limit: At most so many rows of each part, drawn at random.
        pool: What of a tower's states is a feature.
        linear: MAE's recipe where its probe is wanted too, which reads the training images once an epoch.
    """

    data: str = "examples/data"
    root: str = "data"
    download: bool = False
    seeds: Sequence[int] = (0, 1, 2)
    limit: int | None = None
    pool: Pool = "cls"
    linear: LinearRecipe | None = None
    batch_size: int = 64


class Chosen(Sequence):
    """Selected rows, read lazily, and the labels of all."""

    def __init__(self, rows: Rows, limit: int | None = None) -> None:
        self.rows = rows
        places = np.arange(len(rows))
        if limit is not None and limit < len(rows):
            places = np.sort(np.random.default_rng(DRAW_SEED).choice(places, limit, replace=False))
        self.places: list[int] = places.tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[self.places[index]]

    def labels(self) -> list[Any]:
        """The label of every row; if labels are stored separately, no image is read."""
        known = getattr(self.rows, "labels", None)
        return [self.rows[place]["label"] if known is None else known[place] for place in self.places]


class ProbeEvaluator:
    """
    Logistic regression and kNN on frozen features of rows with an "image" or a "text" (and a "second_text"); of images
    also MAE's probe where it is asked for.

    Attributes:
        by_seed: After a run, each seed's values.
    """

    def __init__(
        self, name: str, train: Rows, test: Rows, kind: Literal["images", "texts"], options: SuiteOptions, **how: Any
    ) -> None:
        self.name = name
        self.train = Chosen(train, options.limit)
        self.test = Chosen(test, options.limit)
        self.kind = kind
        self.options = options
        self.how = how  # of the processor
        self.by_seed: dict[int, dict[str, float]] = {}

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": f"probe of frozen features of {self.kind}",
            "pool": self.options.pool,
            "limit": self.options.limit,
            "seeds": list(self.options.seeds),
            "by_seed": {str(seed): values for seed, values in self.by_seed.items()},
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        train = self._split(model, processor, self.train)
        test = self._split(model, processor, self.test)
        self.by_seed = {seed: self._values(model, processor, train, test, seed) for seed in self.options.seeds}
        for value in next(iter(self.by_seed.values())):
            of_seeds = [values[value] for values in self.by_seed.values()]
            yield f"{self.name}/{value}", mean(of_seeds)
            if len(of_seeds) > 1 and value not in FIXED:
                yield f"{self.name}/{value}_sd", stdev(of_seeds)
        yield f"{self.name}/train_rows", len(train.labels)
        yield f"{self.name}/test_rows", len(test.labels)

    def _split(self, model: Any, processor: Any, rows: Chosen) -> Split:
        options = self.options
        if self.kind == "images":
            images = Column(rows, "image")
            features = image_features(model, processor, images, options.pool, options.batch_size, **self.how)
            return Split(features, rows.labels())

        # one text a row, or two held against each other
        columns = [[row[name] for row in rows] for name in ("text", "second_text")]
        read = [
            text_features(model, processor, texts, options.pool, options.batch_size)
            for texts in columns
            if None not in texts
        ]
        return Split(read[0] if len(read) == 1 else text_pair_features(*read), rows.labels())

    def _values(self, model: Any, processor: Any, train: Split, test: Split, seed: int) -> dict[str, float]:
        values = probe(train, test, seed)
        recipe = self.options.linear
        if self.kind == "images" and recipe is not None:
            classes = numbered_classes(train, test)
            labels = torch.tensor([classes[label] for label in train.labels])  # (n,)
            how = {"pool": self.options.pool, "at_once": self.options.batch_size}
            epochs = cropped_features(model, processor, self.train, labels, recipe.batch_size, seed, **how)
            values |= linear_probe(train, test, recipe, seed, epochs)
        return values


def _file(options: SuiteOptions, *parts: str) -> str:
    path = Path(options.data, *parts)
    if not path.is_file():
        raise PairDataError(
            f"{path}: no such file; expected examples/data of the repository, say --data where it is, or name tasks "
            "that do without"
        )
    return str(path)


def _emoji_groups(test: str) -> Callable[[str, SuiteOptions], ProbeEvaluator]:
    def build(name: str, options: SuiteOptions) -> ProbeEvaluator:
        parts = [open_labelled_images(_file(options, "emoji", f"{part}.parquet"), "group") for part in ("train", test)]
        return ProbeEvaluator(name, *parts, "images", options)

    return build


def _digits(name: str, options: SuiteOptions) -> ProbeEvaluator:
    return ProbeEvaluator(name, digits("train"), digits("test"), "images", options)


def _glosses(name: str, options: SuiteOptions) -> ProbeEvaluator:
    files = [_file(options, "glosses", name, f"{part}.tsv") for part in ("train", "dev")]
    return text_probe(name, name, *files, options)


def _emoji_retrieval(name: str, options: SuiteOptions) -> RetrievalEvaluator:
    rows = open_rows(_file(options, "emoji", "test_style.parquet"), "pairs", None, "captions", "hexcode")
    return RetrievalEvaluator(spaced(rows, options.limit), options.batch_size, KS, name, "first", progress=False)


def _named(name: str, options: SuiteOptions) -> ProbeEvaluator:
    parts = [open_named(name, options.root, part, options.download) for part in ("train", "test")]
    return NamedProbe(name, *parts, "images", options)


class NamedProbe(ProbeEvaluator):
    """Of a set of Table 3: the middle square of an image, as CLIP's and MAE's protocols take it."""

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        self.how = middle_square(model)
        yield from super().run(model, processor)


def image_probe(name: str, train: str, test: str, column: str, options: SuiteOptions) -> ProbeEvaluator:
    """Of any two sources that `open_labelled_images` opens."""
    parts = [open_labelled_images(source, column) for source in (train, test)]
    return ProbeEvaluator(name, *parts, "images", options)


def text_probe(name: str, task: str, train: str, test: str, options: SuiteOptions) -> ProbeEvaluator:
    """
    Of two files of a task on texts, its one or two texts read apart.

    Raises:
        ValueError: a task whose target is a score.
    """
    parts = [open_text_task([source], task) for source in (train, test)]
    if any(isinstance(rows[0]["label"], float) for rows in parts):
        raise ValueError(f"{task} has scores for labels, and a probe needs classes; it can be fine-tuned for")
    return ProbeEvaluator(name, *parts, "texts", options)


def pairs_retrieval(name: str, source: str, options: SuiteOptions) -> RetrievalEvaluator:
    """Of pairs, or the test split of Karpathy's JSON; every caption asks and is asked."""
    rows = open_karpathy(source, None, "test") if source.endswith(".json") else open_rows(source, "pairs")
    return RetrievalEvaluator(spaced(rows, options.limit), options.batch_size, KS, name, progress=False)


# name -> what makes its evaluator of (name, options)
SUITE: dict[str, Callable[[str, SuiteOptions], Any]] = {
    "emoji_groups": _emoji_groups("test_concept"),
    "emoji_groups_style": _emoji_groups("test_style"),
    "digits": _digits,
    "supersense": _glosses,
    "hypernym": _glosses,
    "emoji_retrieval": _emoji_retrieval,
    **dict.fromkeys(SETS, _named),
}
