"""Evaluates the accuracy of a classifier of image-text pairs, or of a text with two images. B rows, C classes."""

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
    Model inputs for the texts and images of rows: `pixel_values` (B, 3, H, W), or (B, n, 3, H, W) for n keys.

    Raises:
        ImageDecodeError: an image cannot be read; the message names it.
    """
    # the processor pairs one image with each text
    pictures = [[_opened(row[name]) for row in rows] for name in images]
    first = pictures[0]
    inputs = dict(processor(images=first, text=[row["text"] for row in rows], return_tensors="pt"))

    # further images of a row are stacked with its first
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
    Measures how often the most likely class is correct.

    Yields name/accuracy, name/recall_CLASS for each class that occurs, and name/chance, the share of the most
    frequent.

    Args:
        rows: With "text", "label" and the keys in `images`.
        labels: Names of the C classes by number.
        images: Keys of a row's images, in the order that the model expects.

    Raises:
        ValueError: there are no rows, or a label is not a class.
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
            raise ValueError(f"label {wrong[0]} is not one of the {len(self.labels)} classes {', '.join(self.labels)}")

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "classification of a text and its picture" + "s" * (len(self.images) > 1),
            "labels": list(self.labels),
            "rows": len(self.rows),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Classifies all rows and yields (name, value)."""
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

        # recall of each class that occurs
        counts = Counter(self.right)
        right = Counter(label for label, hit in zip(self.right, hits, strict=True) if hit)
        for number, label in enumerate(self.labels):
            if counts[number]:
                yield f"{self.name}/recall_{label}", right[number] / counts[number]

        # the baseline: always predict the most frequent class
        yield f"{self.name}/chance", max(counts.values()) / len(hits)
