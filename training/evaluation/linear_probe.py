"""MAE's linear probe: batch norm without affine and a linear layer, trained by LARS on a frozen tower (MAE, A.1).

n images, D width, C classes. The tower sees a new random crop of each image in each epoch; training the head on
precomputed features is much faster and slightly less accurate.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from oner.processing.data.augmentation import Crop, TrainingImageTransform
from oner.processing.image_processing_vl import open_image

from .features import Pool, pooled
from .probe import Split, mean_recall, numbered_classes
from .sheets import evaluating, on_device

# MAE's code: torchvision's RandomResizedCrop with its own range, and a flip
PROBE_CROP = Crop(crop_scale=[0.08, 1.0], horizontal_flip=0.5)
# (epoch) -> batches of features (b, D) and classes (b,) of all rows, in a new order each time
Epochs = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LinearRecipe:
    """MAE's settings; the rate is `base_learning_rate` * batch / 256, with a batch of at most the number of rows."""

    base_learning_rate: float = 0.1
    batch_size: int = 16_384
    epochs: int = 90
    warmup_epochs: int = 10
    momentum: float = 0.9
    init_std: float = 0.01

    def rate(self, epoch: float, batch_size: int) -> float:
        """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine to 0."""
        peak = self.base_learning_rate * batch_size / 256
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return peak * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class ProbeHead(nn.Sequential):
    """Batch normalisation, then a linear layer. (b, D) -> (b, C)."""

    def __init__(self, width: int, classes: int, init_std: float = 0.01) -> None:
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes))
        nn.init.trunc_normal_(self[1].weight, std=init_std)
        nn.init.zeros_(self[1].bias)


def lars(head: ProbeHead, momentum: float = 0.9) -> Lars:
    """LARS without decay: the matrix's step is scaled by its norm, the bias's is not (MAE's code)."""
    linear = head[1]
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias]}]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=0.001)


def fit_head(epochs: Epochs, width: int, classes: int, rows: int, recipe: LinearRecipe, seed: int = 0) -> ProbeHead:
    """Trains the head for `recipe.epochs` and returns it in eval mode; weights are initialised with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ProbeHead(width, classes, recipe.init_std)
    optimiser = lars(head, recipe.momentum)
    size = min(recipe.batch_size, rows)
    steps = math.ceil(rows / size)
    for epoch in range(recipe.epochs):
        for step, (features, labels) in enumerate(epochs(epoch)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(epoch + step / steps, size)
            # a single row has no variance for the normalisation
            if len(features) < 2:
                continue
            loss = F.cross_entropy(head(features), labels)  # (b, C), (b,)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return head.eval()


def fixed_features(features: Tensor, labels: Tensor, batch_size: int, seed: int = 0) -> Epochs:
    """Epochs of precomputed features (n, D)."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(len(features)))
        for chosen in order.split(batch_size):
            yield features[chosen], labels[chosen]

    return batches


def cropped_features(
    tower: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    labels: Tensor,
    batch_size: int,
    seed: int = 0,
    pool: Pool = "cls",
    at_once: int = 64,
) -> Epochs:
    """Epochs of features of new crops; the tower reads `at_once` images per pass. `labels` (n,)."""
    colours = processor.image_processor
    transform = TrainingImageTransform(tower.config.image_size, PROBE_CROP, colours.image_mean, colours.image_std)

    def encode(epoch: int, chosen: Sequence[int]) -> Tensor:
        # each image has its own generator, independent of its batch
        drawn = [(rows[place]["image"], np.random.default_rng((seed, epoch, place))) for place in chosen]
        views = torch.stack([transform(open_image(image), generator) for image, generator in drawn])  # (b, 3, H, W)
        return pooled(tower(**on_device({"pixel_values": views}, tower)), pool).cpu()  # (b, D)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng((seed, epoch)).permutation(len(rows)).tolist()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            with evaluating(tower):
                parts = [encode(epoch, chosen[first : first + at_once]) for first in range(0, len(chosen), at_once)]
            yield torch.cat(parts), labels[chosen]

    return batches


def linear_probe(
    train: Split, test: Split, recipe: LinearRecipe | None = None, seed: int = 0, epochs: Epochs | None = None
) -> dict[str, float]:
    """
    The head that learns from `epochs`, or from the features of `train` as they are, scored on another split.

    Returns:
        By name: linear_accuracy, linear_mean_recall.

    Raises:
        ValueError: as `probe.probe`.
    """
    recipe = LinearRecipe() if recipe is None else recipe
    classes = numbered_classes(train, test)
    if epochs is None:
        learned = torch.tensor([classes[label] for label in train.labels])  # (n,)
        epochs = fixed_features(train.features, learned, recipe.batch_size, seed)
    head = fit_head(epochs, test.features.shape[1], len(classes), len(train.labels), recipe, seed)

    # predictions for the other split
    with torch.no_grad():
        said = head(test.features).argmax(-1).numpy()  # (m,)
    asked = np.array([classes[label] for label in test.labels])  # (m,)
    return {"linear_accuracy": float((said == asked).mean()), "linear_mean_recall": mean_recall(said, asked)}
