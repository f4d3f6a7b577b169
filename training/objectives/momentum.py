"""Momentum distillation: contrast with queues, hard negatives and soft targets by an EMA teacher (ALBEF, section 3.3).

What SIMLA and every family descended from ALBEF share. B pairs, P embedding width, D width.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from oner.training.parallel.distributed import gather_without_gradient
from oner.training.parallel.sharding import own_part

from .feature_queue import NO_ID, FeatureQueue
from .losses import distilled_contrast, draw_negatives, in_full
from .matryoshka import MatryoshkaArguments, NestedWidths, cut
from .objective import Batch, Comparison, SinglePortion, check_choices, under
from .teacher import EMATeacher

# each modality against the other's keys
ACROSS = (("image", "text"), ("text", "image"))


@dataclass
class MomentumArguments(MatryoshkaArguments):
    """Teacher, queues, and what counts as a positive."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "loss_weights": "[0, inf)",
        "ema_momentum": "[0, 1]",
        "distillation": "[0, 1]",
        "distillation_ramp": "[0, 1]",
        "queue_size": "[1, inf)",
    }

    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Weight of each loss by name; 1 where not given (equation 10)."}
    )
    ema_momentum: float = field(default=0.995, metadata={"help": "Momentum of the teacher (section 2.5)."})
    distillation: float = field(default=0.4, metadata={"help": "alpha, the weight of soft targets (section 2.5)."})
    distillation_ramp: float = field(
        default=1 / 30,
        metadata={"help": "Share of the run in which alpha rises from 0 (section 2.5: the first of 30 epochs)."},
    )
    queue_size: int = field(default=65536, metadata={"help": "M, keys that each queue holds (section 2.5)."})
    match_ids: bool = field(
        default=False, metadata={"help": "Keys of one id are positives of each other in ITC (ALBEF's fine-tuning)."}
    )
    enqueue_ids: bool = field(
        default=True,
        metadata={"help": "Queues keep ids, for match_ids; SIMLA's fine-tuning code forgets to, and has false."},
    )


class MomentumDistillation(SinglePortion):
    """
    One portion, pairs. The temperature is held in its range and the teacher moves before a step, the queues after it.
    A subclass asks the teacher in `targets` and makes the student's pass in `represent`. Its rows are "image" and
    "text" (B, P), its targets "key of image", "key of text" (B, P) and "ids" (B,); all but ids are unit vectors. What
    is common is the `temperature`.

    A batch may bring recorded draws, `negative_images` and `negative_texts` (B,), which are taken instead of the own.

    Args:
        student: Unwrapped, with its weights in place and a `temperature`; the teacher starts as its copy.
        arguments (`MomentumArguments`): Or what derives from it, with `losses`.
        known: Every loss of the family.
        unused: Submodules of the student that the teacher is not asked for.

    Raises:
        ValueError: unknown losses, none, or one twice; weights of other losses; shares out of range; widths that
            [`NestedWidths`] refuses.
    """

    # losses that read the queues
    contrasts = frozenset({"itc"})

    def __init__(self, student: nn.Module, arguments: Any, known: Sequence[str], unused: tuple[str, ...] = ()):
        self.arguments = arguments
        self.config = student.config
        self.student = student
        self.weights = checked_weights(arguments, known)
        check_choices(arguments)
        for name in ("distillation", "distillation_ramp"):
            if not 0 <= getattr(arguments, name) <= 1:
                raise ValueError(f"{name} is {getattr(arguments, name)}; expected a share in [0, 1]")

        # the teacher copies the student once it is known what of it is trained
        self.freeze_unused(student)
        self.teacher = EMATeacher(student, arguments.ema_momentum, unused=unused)

        # keys of past steps, for the contrast alone
        self.queue = None
        if self.contrasts & set(self.weights):
            self.queue = FeatureQueue(("image", "text"), arguments.queue_size, self.config.projection_dim)

        # contrasts of embeddings that are cut, each a part of the loss by itself
        self.widths = NestedWidths(arguments, self.config.projection_dim, self.weights, self.contrasts)
        self.weights = self.widths.weights

    @abstractmethod
    def freeze_unused(self, student: nn.Module) -> None:
        """Takes the gradient from what no loss reaches: a data-parallel engine would wait for it for ever."""

    @classmethod
    def uninformed(cls, arguments: Any, batch_size: int, processes: int) -> dict[str, float]:
        """
        Contrast at the logarithm of its keys, this process's and the queue's; matching at the entropy of its labels,
        as of a head that always gives their frequencies: "no" to two in three.
        """
        yes = cls.match_labels({"ids": torch.arange(2)}).float().mean()  # (), over (3B,)
        entropy = torch.special.entr(torch.stack([yes, 1 - yes])).sum().item()
        return {"itc": math.log(batch_size // processes + arguments.queue_size), "itm": entropy}

    def alpha(self, progress: float) -> float:
        """The weight of soft targets at this share of the run."""
        ramp = self.arguments.distillation_ramp
        return self.arguments.distillation * (min(1.0, progress / ramp) if ramp else 1.0)

    @torch.no_grad()
    def before_step(self) -> None:
        own_part(self.student.temperature).clamp_(*self.config.temperature_range)
        self.teacher.update()

    @torch.no_grad()
    def negatives(
        self, batch: Batch, keys: Batch, images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        A hard negative image of each text, then a text of each image, never of the own id: columns (B,) each.

        Args:
            keys: The teacher's, made before the student's pass, which asks for negatives in its middle.
            images, texts (`(B, P)`): The student's features.
        """
        if recorded(batch):
            return batch["negative_images"], batch["negative_texts"]
        allowed = strangers(batch["ids"])  # (B, B)

        # drawn by the student's features and the teacher's keys, images first
        drawn = []
        for queries, key in ((texts, "key of image"), (images, "key of text")):
            weights = (in_full(queries) @ keys[key].T / temperature).softmax(1)  # (B, B)
            drawn.append(draw_negatives(weights, allowed)[0])  # (B,)
        return tuple(drawn)

    @staticmethod
    def match_labels(batch: Batch) -> torch.Tensor:
        """Yes for the pairs, no for each text's and each image's negative, -100 where a pair has none. -> (3B,)."""
        ids = batch["ids"]
        possible = torch.ones_like(ids, dtype=torch.bool) if recorded(batch) else strangers(ids).any(1)  # (B,)
        negatives = torch.where(possible, 0, -100)  # (B,)
        return torch.cat([torch.ones_like(ids), negatives, negatives])  # (3B,)

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        """ITC against this process's keys and the queues (equations 2 to 4); the newest keys are for the queues."""
        if "itc" not in self.weights:
            return Comparison()
        alpha = self.alpha(progress)

        def itc(dim: int | None) -> torch.Tensor:
            losses = [self.contrast(name, other, rows, common, targets, alpha, dim=dim) for name, other in ACROSS]
            return torch.stack(losses).mean()

        return Comparison(self.widths.parts("itc", itc), self.newest(targets))

    def contrast(
        self,
        name: str,
        other: str,
        rows: Batch,
        common: Batch,
        targets: Batch,
        alpha: float,
        queue_only: bool = False,
        dim: int | None = None,
    ) -> torch.Tensor:
        """
        One side against the keys of another, or of its own: this process's (B, P), then the queue's (M, P). 0-dim.

        Args:
            alpha: The weight of soft targets.
            queue_only: Against the queue's keys alone, among which no row has its own.
            dim: Over the first coordinates alone; all if None.
        """
        # who is right for whom
        own = cut(targets[f"key of {other}"], dim)  # (B, P), or (B, dim) here and below
        ids = targets["ids"]  # (B,)
        positives = None
        if self.arguments.match_ids and not queue_only:
            positives = ids[:, None] == torch.cat([ids, self.queue.ids])[None, :]  # (B, B + M)

        # the other's keys
        keys = cut(self.queue.rows[other].to(own.dtype), dim)  # (M, P)
        if not queue_only:
            keys = torch.cat([own, keys])  # (B + M, P)
        teacher = cut(targets[f"key of {name}"], dim)  # (B, P)
        return distilled_contrast(cut(rows[name], dim), teacher, keys, common["temperature"], alpha, positives)

    def newest(self, targets: Batch) -> Batch:
        """Keys (G, P) and ids (G,) of all processes, for the queues."""
        ids = targets["ids"]
        # the code that forgets them leaves the ids of an empty place
        ids = ids if self.arguments.enqueue_ids else torch.full_like(ids, NO_ID)
        own = {"image": targets["key of image"], "text": targets["key of text"], "ids": ids}
        return {name: gather_without_gradient(value) for name, value in own.items()}

    def weigh(self, parts: Batch) -> torch.Tensor:
        """What is no loss of this run is only watched."""
        return sum(self.weights[name] * part for name, part in parts.items() if name in self.weights)

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:
        if self.queue is not None and kept:
            self.queue.push({name: kept[name] for name in ("image", "text")}, kept["ids"], applied)

    def to(self, device: torch.device) -> "MomentumDistillation":
        if self.queue is not None:
            self.queue.to(device)
        return super().to(device)

    def state_dict(self) -> Batch:
        queue = {} if self.queue is None else self.queue.state_dict()
        return {**super().state_dict(), **{f"queue.{name}": value for name, value in queue.items()}}

    def load_state_dict(self, state: Batch) -> None:
        super().load_state_dict(state)
        if self.queue is not None:
            self.queue.load_state_dict(under("queue.", state))

    def begin_with(self, state: Batch) -> list[str]:
        taken = super().begin_with(state)
        queue = under("queue.", state)
        if self.queue is None or not queue:
            return taken
        self.queue.load_state_dict(queue)
        return [*taken, *(f"queue.{name}" for name in queue)]


def checked_weights(arguments: Any, known: Sequence[str]) -> dict[str, float]:
    """The weight of each loss of `arguments.losses`, in the order of `known`. Raises `ValueError`."""
    losses = arguments.losses
    if not losses or any(name not in known for name in losses):
        raise ValueError(f"losses are {losses}; expected a non-empty subset of {list(known)}")
    if len(set(losses)) < len(losses):
        raise ValueError(f"losses are {losses}; expected each once (loss_weights makes one count more)")
    weights = arguments.loss_weights or {}
    if foreign := [name for name in weights if name not in losses]:
        raise ValueError(f"loss_weights name {foreign}, which are not among the losses {losses}")
    return {name: float(weights.get(name, 1.0)) for name in known if name in losses}


def recorded(batch: Batch) -> bool:
    """Whether the batch brings its negatives."""
    return "negative_images" in batch and "negative_texts" in batch


def strangers(ids: torch.Tensor) -> torch.Tensor:
    """Which columns are of another id, (B, B) bool; a row is never a stranger to itself."""
    return (ids[:, None] != ids[None, :]).fill_diagonal_(False)
