"""What the engine knows of a family: losses to minimise, something to do around the step, and state to keep.

A step takes one batch of each *portion*: of most families one portion of pairs, of others texts and pairs, say. Each
portion is taken in the order targets, represent, compare, weigh; its gradients add up, and the optimiser steps once.
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
# tensors by name: what a collator makes of rows, and whatever else goes by name between the passes of a step
Batch = dict[str, torch.Tensor]


@dataclass
class Targets:
    """
    What a batch is held against, made before the student's pass and without gradient.

    Attributes:
        rows: By name, (B, ...): what rows of the whole batch are compared with, such as a teacher's keys, and ids.
            Those of a batch in chunks are laid end to end.
        own: By name, (B, ...): what only these rows read, such as a teacher's states; it stays with its chunk.
    """

    rows: Batch = field(default_factory=dict)
    own: Batch = field(default_factory=dict)


@dataclass
class Representations:
    """
    What a pass of the student gives for some rows of a batch.

    Attributes:
        rows: By name, (B, ...) each with gradient: what the loss compares with other rows, of the batch or of other
            processes. Those of a batch in chunks are laid end to end.
        common: By name, what every chunk gives alike, for it belongs to the model and to no row: a temperature.
        parts: By name, 0-dim with gradient: what each row pays by itself, summed over these rows and divided by the
            count of the whole batch, so that the sum over its chunks, and the mean over processes, is the whole's.
    """

    rows: Batch = field(default_factory=dict)
    common: Batch = field(default_factory=dict)
    parts: Batch = field(default_factory=dict)


@dataclass
class Comparison:
    """
    What comparing a whole batch gives.

    Attributes:
        parts: By name, 0-dim: the parts of the loss that see the whole batch.
        kept: By name, what `after_step` takes along, such as the newest keys of a queue; without gradient.
    """

    parts: Batch = field(default_factory=dict)
    kept: Batch = field(default_factory=dict)


class Taken(NamedTuple):
    """A batch taken: its loss with gradient, the parts to log (0-dim, detached), and what `after_step` takes along."""

    loss: torch.Tensor
    parts: Batch
    kept: Batch


class Portion(ABC):
    """
    The losses of one kind of batch. The mean of the processes' losses is the loss of the global batch. `take` takes a
    batch in one pass; `gradient_cache` takes it in chunks, by the very methods that `take` is made of.
    """

    def take(self, student: nn.Module, batch: Batch, progress: float) -> Taken:
        """One pass over a batch. `student` may be wrapped by an engine."""
        # what the batch is held against comes first: the student may need it in the middle of its pass
        targets = self.targets(student, batch, progress)  # rows (B, ...)

        # older torch hands casts of weights that were made without gradient to the pass that needs one
        torch.clear_autocast_cache()

        # the student's one pass, and what of it meets other rows
        online = self.represent(student, batch, targets, progress, mean_counts(self.count(batch)))  # rows (B, ...)
        compared = self.compare(online.rows, online.common, targets.rows, progress)

        # all parts of the loss, 0-dim each
        parts = {**compared.parts, **online.parts}
        return Taken(self.weigh(parts), {name: part.detach() for name, part in parts.items()}, compared.kept)

    def split(self, batch: Batch, chunks: int) -> list[Batch]:
        """A batch on the CPU in `chunks` of consecutive rows, as even as can be."""
        return split_pairs(batch, chunks)

    def count(self, batch: Batch) -> Batch:
        """How many things each of `Representations.parts` is a mean of, 0-dim on the batch's device."""
        return {}

    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """What this batch is held against, of these rows only, without gradient. A teacher speaks here, first."""
        return Targets()

    @abstractmethod
    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        """
        One pass of the student. `counts` holds means over processes of `count` of the whole batch. Without it only
        `rows` and `common` are asked for, and must come out as they do with it: a batch in chunks is represented
        twice, with torch's generators set back in between, and nothing else may draw.
        """

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        """The parts of the loss that see the whole batch; processes gather here, with or without gradient."""
        # of most fine-tuning tasks: no row meets another
        return Comparison()

    @abstractmethod
    def weigh(self, parts: Batch) -> torch.Tensor:
        """The loss, a weighted sum of whichever parts are given."""


@dataclass(frozen=True)
class Example:
    """How much of an example batch is masked: tokens and patches, as shares; the share of patches kept; its seed."""

    mlm_probability: float = 0.15
    mim_ratio: float = 0.3
    seed: int = 0
    image_keep: float = 1.0


class Objective(ABC):
    """
    Student, teachers and losses of one family. It owns no trainable parameter and knows no engine.

    Attributes:
        portions: By name, in the order in which a step takes them. No two name a part, or what they keep, alike.
        teacher: The only one of most families; what an objective has besides, it moves, saves and loads itself.
    """

    portions: Mapping[str, Portion]
    teacher: EMATeacher | None = None

    @classmethod
    def without_files(cls, arguments: Any) -> Any:
        """The same arguments of an objective, less what it would read from disk: `example_batches` bring it along."""
        return arguments

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        """
        A step's batches with random tokens and grey images, as the collators make them of texts of these lengths.

        Raises:
            ValueError: an objective that brings none, such as that of a fine-tuning task.
        """
        raise ValueError(f"{cls.__name__} brings no example batches, so its step cannot be rehearsed")

    @classmethod
    def uninformed(cls, arguments: Any, batch_size: int, processes: int) -> dict[str, float]:
        """
        What parts of the loss come to, in nats, where a model answers by frequencies alone and looks at nothing: by
        name, those of which it can be said. `batch_size` is of all `processes`.
        """
        return {}

    def __call__(self, student: nn.Module, batches: Batch | Mapping[str, Batch], progress: float) -> Taken:
        """
        All of a step but the optimiser and `after_step`, for who has no engine: a batch of each portion by its name,
        or the batch itself where there is one portion.
        """
        self.before_step()
        if len(self.portions) == 1 and not batches.keys() & self.portions.keys():
            batches = dict.fromkeys(self.portions, batches)
        taken = [portion.take(student, batches[name], progress) for name, portion in self.portions.items()]
        parts = {name: part for one in taken for name, part in one.parts.items()}
        kept = {name: value for one in taken for name, value in one.kept.items()}
        return Taken(sum(one.loss for one in taken), parts, kept)

    def before_step(self) -> None:  # noqa: B027  most families have nothing to move
        """Called once before the passes of a step, in one go or in chunks: what has to move before it is taken."""

    def updates(self) -> Sequence["Objective"]:
        """
        What takes a step of the optimiser each, one after the other, within a step of the run: by default all portions
        together. Each has some of this one's portions, and moves before and after its own step.
        """
        return (self,)

    def teachers(self) -> Iterable[EMATeacher]:
        """Teachers that follow the student: an engine that spreads the student over processes spreads them alike."""
        return () if self.teacher is None else (self.teacher,)

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:  # noqa: B027
        """
        Called once after each step of the optimiser: teachers and queues move here.

        Args:
            applied (0-dim): 1 where the update was applied and 0 where it was not, for it held NaN or infinity: then
                nothing may move. It lies on the device, so that asking it makes no accelerator wait. None: applied.
            kept: `Comparison.kept` of all portions.
        """

    def to(self, device: torch.device) -> "Objective":
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def state_dict(self) -> Batch:
        """What a checkpoint holds besides the student, by name."""
        return {} if self.teacher is None else {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}

    def load_state_dict(self, state: Batch) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(under("teacher.", state))

    def begin_with(self, state: Batch) -> list[str]:
        """
        Takes what it has a place for of another run's state, before an engine has it. What of its own that state lacks
        stays as it is. Returns the names taken; raises `RuntimeError` for other shapes, by name.
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
    """The entries of a state whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def objective_classes(family: str) -> tuple[type, type]:
    """The objective of a family and its arguments' dataclass. Raises `ValueError` that lists the known families."""
    if family not in OBJECTIVES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(OBJECTIVES)}")

    # imported only now: a family's objective may import much, and `--help` needs none
    module_name, objective, arguments = OBJECTIVES[family]
    module = import_module(module_name)
    return getattr(module, objective), getattr(module, arguments)


def check_choices(arguments: Any) -> None:
    """Raises `ValueError` for a field of a dataclass that is none of the values that its `Literal` lists."""
    for name, hint in get_type_hints(type(arguments)).items():
        # a dataclass does not check what its type hints say
        if get_origin(hint) is Literal and getattr(arguments, name) not in get_args(hint):
            raise ValueError(f"{name} is {getattr(arguments, name)!r}; expected one of {list(get_args(hint))}")


def build_objective(family: str, student: nn.Module, arguments: Any) -> Objective:
    """The objective over an unwrapped student with its weights in place."""
    return objective_classes(family)[0](student, arguments)
