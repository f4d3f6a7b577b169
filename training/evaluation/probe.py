"""Linear probe and kNN: how well classes can be predicted from frozen features.

n training rows, m test rows, D width, C classes. Logistic regression follows CLIP's and FLAVA's protocol: L-BFGS, with
the strength chosen on held-out training rows. kNN follows DINO's.
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
        labels: (n,), any comparable values; equal ones are one class.
    """

    features: Tensor
    labels: Sequence[Any]


def probe(train: Split, test: Split, seed: int = 0, strengths: Sequence[float] = STRENGTHS) -> dict[str, float]:
    """
    Trains both probes on a split and scores them on another.

    Returns:
        By name: logistic_accuracy, logistic_mean_recall (CLIP's "mean per class"), logistic_strength, knn_accuracy,
        chance (the commonest class of training, always named).

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra to install.
        ValueError: there are no rows, the numbers of features and labels differ, there is a single class, or the
            splits
            have no class in common.
    """
    classes = numbered_classes(train, test)
    learned = np.array([classes[label] for label in train.labels])  # (n,)
    asked = np.array([classes[label] for label in test.labels])  # (m,)

    # in double precision, since L-BFGS stalls at the resolution of fp32
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
    """The number of each class, in order of labels. Raises `ValueError` like `probe`."""
    for what, split in (("training", train), ("test", test)):
        if not len(split.labels):
            raise ValueError(f"there are no rows of {what}")
        if len(split.labels) != len(split.features):
            raise ValueError(f"{len(split.features)} features and {len(split.labels)} labels of {what}")
    # a rare class may have no training row, and is then never predicted
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
    Predicts the classes of `questions` (m,) by logistic regression on rows (n, D), and returns the strength that was
    best on a tenth of the rows, held out by the seed. The regression is trained on the other nine tenths.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("a probe needs scikit-learn: pip install 'oner[suite]'") from error

    # the same held-out rows for all strengths
    order = np.random.default_rng(seed).permutation(len(rows))
    held = max(1, int(HELD_OUT * len(rows)))
    kept = order[held:]
    if len(set(labels[kept])) < 2:
        kept = order  # too few rows to hold out any

    best = None
    for strength in strengths:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))
        model.fit(rows[kept], labels[kept])
        score = model.score(rows[order[:held]], labels[order[:held]])
        if best is None or score > best[0]:
            best = (score, strength, model)
    return best[2].predict(questions), best[1]


def neighbours(rows: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """kNN predictions (m,) by cosine, with votes weighted by exp(cosine / 0.07)."""
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(rows))
    # the distance is 1 - cosine; the constant cancels
    model = KNeighborsClassifier(count, metric="cosine", weights=lambda distance: np.exp(-distance / TEMPERATURE))
    return model.fit(rows, labels).predict(questions)


def mean_recall(said: np.ndarray, asked: np.ndarray) -> float:
    """Mean recall over the classes that occur in `asked`."""
    return float(np.mean([(said[asked == number] == number).mean() for number in np.unique(asked)]))
