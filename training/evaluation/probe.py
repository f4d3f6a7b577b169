"""Linear probe and kNN: how much of a class can be read off features that were never trained for it.

n rows to learn from, m to judge by, D width, C classes. Logistic regression is CLIP's and FLAVA's protocol: L-BFGS,
its strength chosen on rows that are held out of training. kNN is DINO's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

# inverse strengths of the L2 penalty on standardised features
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.1  # of the training rows, to choose the strength
NEIGHBOURS = 20
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Split:
    """
    Labelled features of one part of a set.

    Attributes:
        features: (n, D).
        labels: (n,), any values that can be compared; equal ones are one class.
    """

    features: Tensor
    labels: Sequence[Any]


def probe(train: Split, test: Split, seed: int = 0, strengths: Sequence[float] = STRENGTHS) -> dict[str, float]:
    """
    Both probes of a split, scored on another.

    Returns:
        By name: logistic_accuracy, logistic_mean_recall (CLIP's "mean per class"), logistic_strength, knn_accuracy,
        chance (the commonest class of training, always named).

    Raises:
        ImportError: scikit-learn is missing; the message names the extra that brings it.
        ValueError: no rows, features and labels that differ in number, one class alone, none in common.
    """
    classes = numbered_classes(train, test)
    learned = np.array([classes[label] for label in train.labels])  # (n,)
    asked = np.array([classes[label] for label in test.labels])  # (m,)

    # all of it in double precision: a search by gradient stalls below what fp32 can tell apart
    rows = train.features.double().numpy()  # (n, D)
    questions = test.features.double().numpy()  # (m, D)
    said, strength = logistic(rows, learned, questions, seed, strengths)  # (m,)
    return {
        "logistic_accuracy": float((said == asked).mean()),
        "logistic_mean_recall": mean_recall(said, asked),
        "logistic_strength": strength,
        "knn_accuracy": float((neighbours(rows, learned, questions) == asked).mean()),
        "chance": float((asked == np.bincount(learned).argmax()).mean()),
    }


def numbered_classes(train: Split, test: Split) -> Mapping[Any, int]:
    """The number of each class, by rising label. Raises `ValueError` as `probe`."""
    for what, split in (("training", train), ("test", test)):
        if not len(split.labels):
            raise ValueError(f"there are no rows of {what}")
        if len(split.labels) != len(split.features):
            raise ValueError(f"{len(split.features)} features and {len(split.labels)} labels of {what}")
    # a rare class may have no row to learn from, and is then never named
    if not set(train.labels) & set(test.labels):
        raise ValueError(f"no class in common: training has {_some(train.labels)}, the test {_some(test.labels)}")
    if len(set(train.labels)) < 2:
        raise ValueError(f"all rows of training are of the class {_some(train.labels)}; expected two or more")
    return {label: number for number, label in enumerate(sorted({*train.labels, *test.labels}))}


def _some(labels: Sequence[Any]) -> str:
    return ", ".join(map(repr, sorted(set(labels), key=str)[:5]))


def logistic(
    rows: np.ndarray, labels: np.ndarray, questions: np.ndarray, seed: int, strengths: Sequence[float]
) -> tuple[np.ndarray, float]:
    """
    The classes of `questions` (m,) by logistic regression of rows (n, D), and the strength that was best on a tenth of
    the rows, which the seed holds out. What is judged is the regression of the other nine.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("a probe needs scikit-learn: pip install 'oner[suite]'") from error

    # the same rows of a seed whatever the strength
    order = np.random.default_rng(seed).permutation(len(rows))
    held = max(1, int(HELD_OUT * len(rows)))
    kept = order[held:]
    if len(set(labels[kept])) < 2:
        kept = order  # too few rows to do without any

    best = None
    for strength in strengths:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))
        model.fit(rows[kept], labels[kept])
        score = model.score(rows[order[:held]], labels[order[:held]])
        if best is None or score > best[0]:
            best = (score, strength, model)
    return best[2].predict(questions), best[1]


def neighbours(rows: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """The classes (m,) that the nearest rows by cosine vote for, a vote weighing exp(cosine / 0.07)."""
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(rows))
    # the distance is 1 - cosine; the constant cancels
    model = KNeighborsClassifier(count, metric="cosine", weights=lambda distance: np.exp(-distance / TEMPERATURE))
    return model.fit(rows, labels).predict(questions)


def mean_recall(said: np.ndarray, asked: np.ndarray) -> float:
    """Recall of each class that is asked for, and the mean of them."""
    return float(np.mean([(said[asked == number] == number).mean() for number in np.unique(asked)]))
