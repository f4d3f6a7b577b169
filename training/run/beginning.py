"""Starts a run with the teacher and queues of an earlier one, in addition to the student's weights.

`oner convert` writes them to objective.safetensors beside the model. The teacher is initialised like the student: if
the student's decoder starts as a copy of its tower, the teacher's is a copy of the teacher's tower, and positions are
resized in both.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from oner.training.conversion.reading import read_weights
from oner.training.objectives.objective import Batch, Objective, under
from oner.training.parallel.distributed import rank
from oner.training.publishing.model_loading import damage_of

from .arguments import Arguments, ModelArguments

OBJECTIVE = "objective.safetensors"
# value of initial_objective that ignores a file beside the model
NOTHING = "none"

logger = logging.get_logger(__name__)


def objective_file(model: ModelArguments) -> Path | None:
    """
    The file of teacher and queues: `initial_objective`, or the one beside the weights of a local `initial_model`.
    Raises `ValueError` for an objective without its model.
    """
    if model.initial_objective == NOTHING:
        return None
    if model.initial_objective is None:
        beside = None if model.initial_model is None else Path(model.initial_model) / OBJECTIVE
        return beside if beside is not None and beside.is_file() else None
    if model.initial_model is None:
        raise ValueError(
            f"initial_objective is {model.initial_objective!r}, the teacher of a model; expected initial_model too, "
            "got none"
        )
    path = Path(model.initial_objective)
    return path / OBJECTIVE if path.is_dir() else path


def begin_objective(objective: Objective, arguments: Arguments, load: Callable[[Arguments], PreTrainedModel]) -> None:
    """
    Loads teacher and queues into a new objective, before the engine wraps it, and logs which tensors were used. Does
    nothing if the run has no such file.

    Args:
        load: Builds the student from a run's arguments.

    Raises:
        ValueError: the file cannot be read, is damaged, or belongs to another model.
    """
    path = objective_file(arguments.model)
    if path is None:
        return
    given = read_weights(path)
    if damage := damage_of(given):
        raise ValueError(f"{path}: {damage}")

    # floats in fp32, and the teacher built in the same way as the student
    given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    made = {}
    if teacher := under("teacher.", given):
        made = {f"teacher.{name}": value for name, value in _loaded(teacher, arguments, load, path).items()}
    queues = {name: value for name, value in given.items() if not name.startswith("teacher.")}
    try:
        taken = objective.begin_with({**made, **queues})
    except RuntimeError as error:
        raise ValueError(
            f"{path} belongs to another run: {error}; set initial_objective {NOTHING} to start without it"
        ) from error

    # unused tensors are listed
    left = sorted(given.keys() - set(taken))
    if rank() == 0:
        used = len(given) - len(left)
        logger.warning(f"starts with {used} tensors of {path}; left over: {left or 'nothing'}")


def _loaded(teacher: Batch, arguments: Arguments, load: Callable, path: Path) -> Batch:
    """The state of a model built like the student, with the teacher's weights where there are any."""
    # without a common name the weights belong to another model and would be ignored
    source = arguments.model.initial_model
    student = read_weights(source)
    if not teacher.keys() & student.keys():
        raise ValueError(f"{path} contains no teacher of {source}, which has no {list(teacher)[:5]}")
    with tempfile.TemporaryDirectory(prefix="teacher-") as scratch, torch.random.fork_rng():
        # weights that the teacher lacks, such as heads that make no targets, are the student's
        AutoConfig.from_pretrained(source).save_pretrained(scratch)
        weights = {name: value.contiguous().clone() for name, value in {**student, **teacher}.items()}
        save_file(weights, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        return load(replace(arguments, model=replace(arguments.model, initial_model=scratch))).state_dict()
