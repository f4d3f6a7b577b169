"""The image tokenizer's objective: reconstruction through a relaxed choice of codes, and codes that are all used.

B pictures, K codes.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from oner.training.parallel.distributed import gather_with_gradient

from .losses import in_full
from .objective import Objective, Representations


@dataclass
class DiscreteVAEObjectiveArguments:
    """What DALL-E's appendix A.2 leaves to choose for other pictures than its own."""

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


class DiscreteVAEObjective(Objective):
    """
    `objective(student, batch, progress)` -> (loss, parts): `reconstruction` and `kl` (of each place's codes to uniform
    ones, weighted by the model's `kl_weight`) are means over pictures; `usage` sees the whole batch.

    Args:
        student (`DiscreteVAE`): Unwrapped, with a decoder.
        arguments (`DiscreteVAEObjectiveArguments`): The relaxation.

    Raises:
        ValueError: no decoder; temperatures that are not two numbers above 0; a share or weight out of range.
    """

    def __init__(self, student: nn.Module, arguments: DiscreteVAEObjectiveArguments):
        if not student.config.decoder:
            raise ValueError("a DiscreteVAE learns by reconstruction, but this one has no decoder")
        if len(arguments.temperatures) != 2 or min(arguments.temperatures) <= 0:
            raise ValueError(f"temperatures are {arguments.temperatures}; expected two numbers above 0")
        if not 0 < arguments.temperature_share <= 1:
            raise ValueError(f"temperature_share is {arguments.temperature_share}; expected a share in (0, 1]")
        if arguments.usage_weight < 0:
            raise ValueError(f"usage_weight is {arguments.usage_weight}; expected 0 or more")
        self.arguments = arguments
        self.weights = {"reconstruction": 1.0, "kl": student.config.kl_weight, "usage": arguments.usage_weight}

    def temperature(self, progress: float) -> float:
        """At a share of the run."""
        start, end = self.arguments.temperatures
        passed = min(1.0, progress / self.arguments.temperature_share)
        return end + (start - end) * (1 + math.cos(math.pi * passed)) / 2

    def split(self, batch: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
        batch_size = len(batch["pixel_values"])
        if not 1 <= pieces <= batch_size:
            raise ValueError(f"got a batch of {batch_size} rows to split into {pieces} pieces")
        parts = {name: value.tensor_split(pieces) for name, value in batch.items()}
        return [{name: values[piece] for name, values in parts.items()} for piece in range(pieces)]

    def count(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pictures": torch.full_like(batch["ids"][0], len(batch["pixel_values"]))}

    def represent(
        self,
        student: nn.Module,
        batch: dict[str, torch.Tensor],
        progress: float,
        counts: dict[str, torch.Tensor] | None = None,
    ) -> Representations:
        online = student(
            batch["pixel_values"],
            temperature=self.temperature(progress),
            hard=self.arguments.straight_through,
            return_dict=True,
        )
        # without a weight there is nothing to compare, and a batch in pieces needs one pass only
        used = {"used": in_full(online.logits).softmax(1).mean((2, 3))} if self.arguments.usage_weight else {}
        if counts is None:
            return Representations(rows=used)
        share = len(batch["pixel_values"]) / counts["pictures"]
        return Representations(
            rows=used, parts={"reconstruction": online.reconstruction_loss * share, "kl": online.kl * share}
        )

    def targets(self, student: nn.Module, batch: dict[str, torch.Tensor], progress: float) -> dict[str, torch.Tensor]:
        return {}

    def compare(
        self,
        rows: dict[str, torch.Tensor],
        common: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        progress: float,
    ) -> dict[str, torch.Tensor]:
        if "used" not in rows:
            return {}
        mean = gather_with_gradient(rows["used"]).mean(0)  # (K,)
        return {"usage": math.log(len(mean)) + torch.special.xlogy(mean, mean).sum()}

    def weigh(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(self.weights[name] * part for name, part in parts.items())

    def after_step(self, applied: torch.Tensor | None = None) -> None:
        pass

    def to(self, device: torch.device) -> "DiscreteVAEObjective":
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            raise RuntimeError(f"a DiscreteVAE's objective has no state, got {sorted(state)[:5]}")
