"""Momentum distillation: contrast with queues, hard negatives and soft targets by an EMA teacher (ALBEF, section 3.3).

Shared by SIMLA and all families based on ALBEF. B pairs, P embedding width, D width.
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

# each modality is contrasted with the keys of the other
ACROSS = (("image", "text"), ("text", "image"))


@dataclass
class MomentumArguments(MatryoshkaArguments):
    """Options of teacher, queues and positives."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "loss_weights": "[0, inf)",
        "ema_momentum": "[0, 1]",
        "distillation": "[0, 1]",
        "distillation_ramp": "[0, 1]",
        "queue_size": "[1, inf)",
    }

    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Weight of each loss by name; default 1 (equation 10)."}
    )
    ema_momentum: float = field(default=0.995, metadata={"help": "Momentum of the teacher (section 2.5)."})
    distillation: float = field(default=0.4, metadata={"help": "alpha, the weight of soft targets (section 2.5)."})
    distillation_ramp: float = field(
        default=1 / 30,
        metadata={"help": "Share of the run over which alpha rises from 0 (section 2.5: one of 30 epochs)."},
    )
    queue_size: int = field(default=65536, metadata={"help": "M, number of keys in each queue (section 2.5)."})
    match_ids: bool = field(
        default=False,
        metadata={"help": "Keys with the same id are positives in ITC (ALBEF's fine-tuning)."},
    )
    enqueue_ids: bool = field(
        default=True,
        metadata={"help": "Queues store ids, for match_ids; false reproduces a bug of SIMLA's fine-tuning code."},
    )


class MomentumDistillation(SinglePortion):
    """
    One portion, pairs. Before a step, the temperature is clamped and the teacher updated; after it, the queues are.
    A subclass runs the teacher in `targets` and the student in `represent`. Its rows are "image" and
    "text" (B, P), its targets "key of image", "key of text" (B, P) and "ids" (B,); all but ids are unit vectors. What
    is common is the `temperature`.

    A batch may contain recorded draws, `negative_images` and `negative_texts` (B,), which replace random ones.

    Args:
        student: Unwrapped, with weights loaded and a `temperature`; the teacher starts as its copy.
        arguments (`MomentumArguments`): Or a subclass, with `losses`.
        known: Every loss of the family.
        unused: Submodules of the student that the teacher does not need.

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

        # the teacher copies the student after unused parts are frozen
        self.freeze_unused(student)
        self.teacher = EMATeacher(student, arguments.ema_momentum, unused=unused)

        # keys of past steps, for the contrast alone
        self.queue = None
        if self.contrasts & set(self.weights):
            self.queue = FeatureQueue(("image", "text"), arguments.queue_size, self.config.projection_dim)

        # contrastive losses on truncated embeddings, each a separate part of the loss
        self.widths = NestedWidths(arguments, self.config.projection_dim, self.weights, self.contrasts)
        self.weights = self.widths.weights

    @abstractmethod
    def freeze_unused(self, student: nn.Module) -> None:
        """Freezes parameters that no loss uses: a data-parallel engine would wait for ever for their gradients."""

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
        A hard negative image for each text, and a text for each image, never with the same id: columns (B,) each.

        Args:
            keys: The teacher's keys, computed before the student's pass, which needs negatives in its middle.
            images, texts (`(B, P)`): The student's features.
        """
        if recorded(batch):
            return batch["negative_images"], batch["negative_texts"]
        allowed = strangers(batch["ids"])  # (B, B)

        # drawn by similarity of the student's features and the teacher's keys, images first
        drawn = []
        for queries, key in ((texts, "key of image"), (images, "key of text")):
            weights = (in_full(queries) @ keys[key].T / temperature).softmax(1)  # (B, B)
            drawn.append(draw_negatives(weights, allowed)[0])  # (B,)
        return tuple(drawn)

    @staticmethod
    def match_labels(batch: Batch) -> torch.Tensor:
        """Labels: yes for pairs, no for each text's and image's negative, -100 if a pair has none. -> (3B,)."""
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
        One modality against the keys of another, or of its own: this process's (B, P), then the queue's (M, P). 0-dim.

        Args:
            alpha: Weight of soft targets.
            queue_only: Only the queue's keys, which do not contain the row's own.
            dim: Use only the first `dim` coordinates; all if None.
        """
        # positives of each query
        own = cut(targets[f"key of {other}"], dim)  # (B, P), or (B, dim) here and below
        ids = targets["ids"]  # (B,)
        positives = None
        if self.arguments.match_ids and not queue_only:
            positives = ids[:, None] == torch.cat([ids, self.queue.ids])[None, :]  # (B, B + M)
            # an empty place is nobody's, whatever number a row may have for its id
            positives[:, len(ids) :] &= self.queue.ids != NO_ID

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
        """Values that are not losses of this run are only logged."""
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
    """Whether the batch contains recorded negatives."""
    return "negative_images" in batch and "negative_texts" in batch


def strangers(ids: torch.Tensor) -> torch.Tensor:
    """Which columns have a different id, (B, B) bool."""
    return (ids[:, None] != ids[None, :]).fill_diagonal_(False)
