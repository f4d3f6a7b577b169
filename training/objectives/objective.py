"""The interface between engine and family: losses to minimise, hooks around the step, and state to save.

A step takes one batch of each *portion*: most families have one portion, pairs; others have, for example, texts and
pairs. Each portion is processed in the order targets, represent, compare, weigh; gradients are accumulated, and the
optimiser steps once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import nn
from transformers import PreTrainedConfig

from oner.processing.data.chunks import split_pairs
from oner.training.parallel.distributed import mean_counts

from .teacher import EMATeacher

# family -> module of the objective and of its arguments; a new family adds its line here
OBJECTIVES = {
    "codis": ("oner.training.objectives.codis", "CodisObjective", "CodisObjectiveArguments"),
    "momo": ("oner.training.objectives.momo", "MomoObjective", "MomoObjectiveArguments"),
    "oner": ("oner.training.objectives.oner", "OneRObjective", "OneRObjectiveArguments"),
    "simla": ("oner.training.objectives.simla", "SimlaObjective", "SimlaObjectiveArguments"),
}
# tensors by name: the output of a collator, and whatever else is passed by name between the parts of a step
Batch = dict[str, torch.Tensor]


@dataclass
class Targets:
    """
    The targets of a batch, computed before the student's pass and without gradient.

    Attributes:
        rows: By name, (B, ...): tensors that rows of the whole batch are compared with, such as a teacher's keys, and
            ids. For a batch in chunks, they are concatenated.
        own: By name, (B, ...): tensors that only these rows need, such as a teacher's states; they stay with their
            chunk.
    """

    rows: Batch = field(default_factory=dict)
    own: Batch = field(default_factory=dict)


@dataclass
class Representations:
    """
    The output of a student pass for some rows of a batch.

    Attributes:
        rows: By name, (B, ...) each with gradient: tensors that the loss compares with other rows, of the batch or of
            other processes. For a batch in chunks, they are concatenated.
        common: By name, values that are the same for every chunk because they belong to the model: a temperature.
        parts: By name, 0-dim with gradient: losses that each row contributes by itself, summed over these rows and
            divided by the count of the whole batch, so that the sum over chunks and the mean over processes is the
            value for the whole batch.
    """

    rows: Batch = field(default_factory=dict)
    common: Batch = field(default_factory=dict)
    parts: Batch = field(default_factory=dict)


@dataclass
class Comparison:
    """
    The result of comparing a whole batch.

    Attributes:
        parts: By name, 0-dim: the parts of the loss that need the whole batch.
        kept: By name, tensors for `after_step`, such as the newest keys of a queue; without gradient.
    """

    parts: Batch = field(default_factory=dict)
    kept: Batch = field(default_factory=dict)


class Taken(NamedTuple):
    """Result for a batch: its loss with gradient, the parts to log (0-dim, detached), and tensors for `after_step`."""

    loss: torch.Tensor
    parts: Batch
    kept: Batch


class Portion(ABC):
    """
    The losses of one kind of batch. The mean of the processes' losses is the loss of the global batch. `take`
    processes a batch in one pass; `gradient_cache` processes it in chunks, with the same methods that `take` calls.
    """

    def take(self, student: nn.Module, batch: Batch, progress: float) -> Taken:
        """One pass over a batch. `student` may be wrapped by an engine."""
        # targets come first: the student may need them in the middle of its pass
        targets = self.targets(student, batch, progress)  # rows (B, ...)

        # older torch reuses weight casts made without gradient in the pass that needs a gradient
        torch.clear_autocast_cache()

        # one student pass, then the comparison with other rows
        online = self.represent(student, batch, targets, progress, mean_counts(self.count(batch)))  # rows (B, ...)
        compared = self.compare(online.rows, online.common, targets.rows, progress)

        # all parts of the loss, 0-dim each
        parts = {**compared.parts, **online.parts}
        return Taken(self.weigh(parts), {name: part.detach() for name, part in parts.items()}, compared.kept)

    def split(self, batch: Batch, chunks: int) -> list[Batch]:
        """Splits a batch on the CPU into `chunks` of consecutive rows, as even as possible."""
        return split_pairs(batch, chunks)

    def count(self, batch: Batch) -> Batch:
        """The number of terms that each of `Representations.parts` averages, 0-dim on the batch's device."""
        return {}

    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """The targets of these rows, without gradient. Called first; a teacher runs here."""
        return Targets()

    @abstractmethod
    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        """
        One student pass. `counts` are the means over processes of `count` for the whole batch. Without it only
        `rows` and `common` are needed, and must be the same as with it: a batch in chunks is represented
        twice, with torch's generators reset in between, and no other randomness is allowed.
        """

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        """The parts of the loss that need the whole batch; processes gather here, with or without gradient."""
        # for most fine-tuning tasks, rows are independent
        return Comparison()

    @abstractmethod
    def weigh(self, parts: Batch) -> torch.Tensor:
        """The loss: a weighted sum of the given parts."""


@dataclass(frozen=True)
class Example:
    """Masking of an example batch: shares of masked tokens and patches, share of patches kept, and seed."""

    mlm_probability: float = 0.15
    mim_ratio: float = 0.3
    seed: int = 0
    image_keep: float = 1.0


class Objective(ABC):
    """
    Student, teachers and losses of one family. It has no trainable parameters and does not depend on the engine.

    Attributes:
        portions: By name, in the order of a step. Names of parts and of kept tensors are unique across portions.
        teacher: The single teacher of most families; an objective updates, saves and loads any other state itself.
    """

    portions: Mapping[str, Portion]
    teacher: EMATeacher | None = None

    @classmethod
    def without_files(cls, arguments: Any) -> Any:
        """
        The objective's arguments without files to read from disk, whose contents `example_batches` provide instead.
        """
        return arguments

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        """
        The batches of a step with random tokens and grey images, as the collators make them for texts of these
        lengths.

        Raises:
            ValueError: the objective has none, such as that of a fine-tuning task.
        """
        raise ValueError(f"{cls.__name__} brings no example batches, so its step cannot be rehearsed")

    @classmethod
    def uninformed(cls, arguments: Any, batch_size: int, processes: int) -> dict[str, float]:
        """
        The values of parts of the loss, in nats, for a model that predicts frequencies without looking at its input:
        by name, where this is known. `batch_size` is that of all `processes`.
        """
        return {}

    def __call__(self, student: nn.Module, batches: Batch | Mapping[str, Batch], progress: float) -> Taken:
        """
        A whole step except the optimiser and `after_step`, for use without an engine: a batch for each portion by
        name, or just the batch if there is one portion.
        """
        self.before_step()
        if len(self.portions) == 1 and not batches.keys() & self.portions.keys():
            batches = dict.fromkeys(self.portions, batches)
        taken = [portion.take(student, batches[name], progress) for name, portion in self.portions.items()]
        parts = {name: part for one in taken for name, part in one.parts.items()}
        kept = {name: value for one in taken for name, value in one.kept.items()}
        return Taken(sum(one.loss for one in taken), parts, kept)

    def before_step(self) -> None:  # noqa: B027  most families have nothing to move
        """Called once before the passes of a step, whole or in chunks, for updates that must come before it."""

    def updates(self) -> Sequence["Objective"]:
        """
        Objectives that each take an optimiser step, one after the other, within a step of the run: by default all
        portions together. Each has some of this one's portions, and its hooks are called before and after its own
        step.
        """
        return (self,)

    def compares(self) -> bool:
        """Whether a loss of the run compares embeddings, without which search means nothing; True where none says."""
        widths = getattr(self, "widths", None)
        return widths is None or bool(widths.contrasts)

    def teachers(self) -> Iterable[EMATeacher]:
        """Teachers that follow the student: an engine that shards the student shards them in the same way."""
        return () if self.teacher is None else (self.teacher,)

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:  # noqa: B027
        """
        Called once after each optimiser step: teachers and queues are updated here.

        Args:
            applied (0-dim): 1 if the update was applied, 0 if it was skipped because of NaN or infinity: then
                nothing may change. It stays on the device, to avoid a synchronisation. None: applied.
            kept: `Comparison.kept` of all portions.
        """

    def to(self, device: torch.device) -> "Objective":
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def state_dict(self) -> Batch:
        """The state that a checkpoint saves besides the student, by name."""
        return {} if self.teacher is None else {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}

    def load_state_dict(self, state: Batch) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(under("teacher.", state))

    def begin_with(self, state: Batch) -> list[str]:
        """
        Loads matching entries of another run's state, before an engine wraps the objective. Entries that this state
        lacks keep their values. Returns the loaded names; raises `RuntimeError` with names for different shapes.
        """
        if self.teacher is None:
            return []
        own = {f"teacher.{name}": value for name, value in self.teacher.model.state_dict().items()}
        taken = {name: state[name] for name in own if name in state}
        self.teacher.load_state_dict(under("teacher.", {**own, **taken}))
        return list(taken)


class SinglePortion(Objective, Portion):
    """An objective with one portion, itself: `portion` is its name."""

    portion = "pairs"

    @property
    def portions(self) -> dict[str, Portion]:
        return {self.portion: self}


def under(prefix: str, state: Batch) -> Batch:
    """The entries of a state whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def objective_classes(family: str) -> tuple[type, type]:
    """The objective class of a family and its arguments' dataclass. Raises `ValueError` with the known families."""
    if family not in OBJECTIVES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(OBJECTIVES)}")

    # imported only here: an objective may import much, and `--help` needs none of it
    module_name, objective, arguments = OBJECTIVES[family]
    module = import_module(module_name)
    return getattr(module, objective), getattr(module, arguments)


def check_choices(arguments: Any) -> None:
    """Raises `ValueError` for a dataclass field with a value that is not in its `Literal`."""
    for name, hint in get_type_hints(type(arguments)).items():
        # dataclasses do not check type hints
        if get_origin(hint) is Literal and getattr(arguments, name) not in get_args(hint):
            raise ValueError(f"{name} is {getattr(arguments, name)!r}; expected one of {list(get_args(hint))}")


def build_objective(family: str, student: nn.Module, arguments: Any) -> Objective:
    """Builds the objective for an unwrapped student whose weights are loaded."""
    return objective_classes(family)[0](student, arguments)
