"""Accuracy of a classifier of pairs, or of a text and two pictures. B rows, C classes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from oner.processing.image_processing_vl import ImageDecodeError, open_image

from .embedding import batches
from .sheets import evaluating, on_device

Row = Mapping[str, Any]


def task_inputs(processor: Any, rows: Sequence[Row], images: Sequence[str] = ("image",)) -> dict[str, torch.Tensor]:
    """
    Texts and pictures of rows as a tower reads pairs: `pixel_values` (B, 3, H, W), or (B, n, 3, H, W) of n keys.

    Raises:
        ImageDecodeError: a picture that cannot be read; the message names it.
    """
    # the processor pairs one picture with each text
    pictures = [[_opened(row[name]) for row in rows] for name in images]
    first = pictures[0]
    inputs = dict(processor(images=first, text=[row["text"] for row in rows], return_tensors="pt"))

    # further pictures of a row stand beside its first
    if len(pictures) > 1:
        others = [processor.image_processor(more, return_tensors="pt")["pixel_values"] for more in pictures[1:]]
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"], *others], dim=1)  # (B, n, 3, H, W)
    return inputs


def _opened(image: Any) -> Any:
    try:
        return open_image(image)
    except ImageDecodeError as error:
        name = image if isinstance(image, str) else f"({type(image).__name__})"
        raise ImageDecodeError(f"picture {name}: {error}") from error


class ClassificationEvaluator:
    """
    How often the likeliest class is the right one.

    Yields name/accuracy, name/recall_CLASS of each class that occurs, and name/chance, the share of the most frequent.

    Args:
        rows: with "text", "label" and the pictures' keys.
        labels: names of the classes by number; C of them.
        images: keys of a row's pictures, in the order that the model expects.

    Raises:
        ValueError: no rows, or a label that is no class.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        labels: Sequence[str],
        name: str = "eval",
        batch_size: int = 64,
        images: Sequence[str] = ("image",),
        progress: bool = False,
    ):
        if len(rows) == 0:
            raise ValueError("there are no rows to evaluate on")
        self.rows = rows
        self.labels = tuple(labels)
        self.name = name
        self.batch_size = batch_size
        self.images = tuple(images)
        self.progress = progress
        self.right = [rows[number]["label"] for number in range(len(rows))]
        if wrong := [label for label in self.right if not 0 <= label < len(self.labels)]:
            raise ValueError(f"label {wrong[0]} is none of the {len(self.labels)} classes {', '.join(self.labels)}")

    @property
    def protocol(self) -> dict[str, Any]:
        """What the numbers mean, for the file of results."""
        return {
            "task": "classification of a text and its picture" + "s" * (len(self.images) > 1),
            "labels": list(self.labels),
            "rows": len(self.rows),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Classify all rows and yield (name, value)."""
        predictions: list[int] = []
        with evaluating(model):
            for chosen in batches(len(self.rows), self.batch_size, "pairs", self.progress):
                rows = [self.rows[number] for number in range(chosen.start, chosen.stop)]
                logits = model(**on_device(task_inputs(processor, rows, self.images), model)).logits  # (B, C)
                if logits.shape[-1] != len(self.labels):
                    raise ValueError(f"the model has {logits.shape[-1]} classes; expected {len(self.labels)}")
                predictions += logits.argmax(-1).tolist()

        hits = [one == other for one, other in zip(predictions, self.right, strict=True)]
        yield f"{self.name}/accuracy", sum(hits) / len(hits)

        # recall of each class, of those that occur
        counts = Counter(self.right)
        right = Counter(label for label, hit in zip(self.right, hits, strict=True) if hit)
        for number, label in enumerate(self.labels):
            if counts[number]:
                yield f"{self.name}/recall_{label}", right[number] / counts[number]

        # always naming the most frequent class is the score to beat
        yield f"{self.name}/chance", max(counts.values()) / len(hits)
