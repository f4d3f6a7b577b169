"""The image tokenizer's objective: reconstruction through a relaxed choice of codes, and codes that are all used.

B pictures, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from oner.training.parallel.distributed import gather_with_gradient

from .examples import grey_images
from .losses import in_full
from .objective import Batch, Comparison, Example, Representations, SinglePortion, Targets


@dataclass
class DiscreteVAEObjectiveArguments:
    """What DALL-E's appendix A.2 leaves to choose for other pictures than its own."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "temperatures": "(0, inf)",
        "temperature_share": "(0, 1]",
        "usage_weight": "[0, inf)",
    }

    temperatures: list[float] = field(
        default_factory=lambda: [1.0, 0.0625],
        metadata={"help": "Of the Gumbel-softmax at the start and the end: half a cosine (DALL-E: 1 to 1/16)."},
    )
    temperature_share: float = field(
        default=0.05, metadata={"help": "Share of the run over which the temperature falls (DALL-E: 150 k of 3 M)."}
    )
    straight_through: bool = field(
        default=False, metadata={"help": "The drawn code goes forward, and only the gradient is that of the soft one."}
    )
    usage_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(mean of all places' codes || uniform), in nats: above 0 for small runs, in which a "
            "few codes else serve for everything. Not DALL-E's."
        },
    )


class DiscreteVAEObjective(SinglePortion):
    """
    One portion, images: `reconstruction` and `kl` (of each place's codes to uniform ones, weighted by the model's
    `kl_weight`) are means over images; `usage` sees the whole batch.

    Args:
        student (`DiscreteVAE`): Unwrapped, with a decoder.
        arguments (`DiscreteVAEObjectiveArguments`): The relaxation.

    Raises:
        ValueError: no decoder; temperatures that are not two numbers above 0; a share or weight out of range.
    """

    portion = "images"

    def __init__(self, student: nn.Module, arguments: DiscreteVAEObjectiveArguments):
        if not student.config.decoder:
            raise ValueError("a DiscreteVAE learns by reconstruction, but this one has no decoder")
        if len(arguments.temperatures) != 2 or min(arguments.temperatures) <= 0:
            raise ValueError(f"temperatures are {arguments.temperatures}; expected two numbers above 0")
        if not 0 < arguments.temperature_share <= 1:
            raise ValueError(f"temperature_share is {arguments.temperature_share}; expected a share in (0, 1]")
        if arguments.usage_weight < 0:
            raise ValueError(f"usage_weight is {arguments.usage_weight}; expected 0 or more")

        # weights by name of the part
        self.arguments = arguments
        self.weights = {"reconstruction": 1.0, "kl": student.config.kl_weight, "usage": arguments.usage_weight}

    def temperature(self, progress: float) -> float:
        """At a share of the run."""
        start, end = self.arguments.temperatures
        passed = min(1.0, progress / self.arguments.temperature_share)
        return end + (start - end) * (1 + math.cos(math.pi * passed)) / 2

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        rows = torch.arange(len(lengths))
        return {cls.portion: {"pixel_values": grey_images(config, len(lengths)), "ids": rows, "rows": rows}}

    def split(self, batch: Batch, chunks: int) -> list[Batch]:
        # consecutive rows, sizes differing by one at most
        batch_size = len(batch["pixel_values"])
        if not 1 <= chunks <= batch_size:
            raise ValueError(f"got a batch of {batch_size} rows to split into {chunks} chunks")
        parts = {name: value.tensor_split(chunks) for name, value in batch.items()}
        return [{name: values[chunk] for name, values in parts.items()} for chunk in range(chunks)]

    def count(self, batch: Batch) -> Batch:
        return {"images": torch.full_like(batch["ids"][0], len(batch["pixel_values"]))}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        # without counts only what meets other rows is asked for, and that is the usage alone
        if counts is None and not self.arguments.usage_weight:
            return Representations()

        # codes drawn by the relaxed choice, and the images they reconstruct
        online = student(
            batch["pixel_values"],
            temperature=self.temperature(progress),
            hard=self.arguments.straight_through,
            return_dict=True,
        )

        # how often each code is used in an image, over all its places
        used = {}
        if self.arguments.usage_weight:
            used["used"] = in_full(online.logits).softmax(1).mean((2, 3))  # (B, K)
        if counts is None:
            return Representations(rows=used)

        # a chunk's mean, for its share of the batch
        share = len(batch["pixel_values"]) / counts["images"]
        return Representations(
            rows=used, parts={"reconstruction": online.reconstruction_loss * share, "kl": online.kl * share}
        )

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        if "used" not in rows:
            return Comparison()
        mean = gather_with_gradient(rows["used"]).mean(0)  # (K,)

        # KL to the uniform choice: log K less the entropy of the mean
        return Comparison({"usage": math.log(len(mean)) + torch.special.xlogy(mean, mean).sum()})

    def weigh(self, parts: Batch) -> torch.Tensor:
        return sum(self.weights[name] * part for name, part in parts.items())

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:
        pass

    def to(self, device: torch.device) -> "DiscreteVAEObjective":
        return self

    def state_dict(self) -> Batch:
        return {}

    def load_state_dict(self, state: Batch) -> None:
        if state:
            raise RuntimeError(f"a DiscreteVAE's objective has no state, got {sorted(state)[:5]}")
