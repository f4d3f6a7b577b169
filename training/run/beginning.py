"""A run that begins with a teacher and queues beside the student's weights, as the official scripts begin.

`oner convert` leaves them in objective.safetensors beside the model. A teacher goes the way of its student: a decoder
that begins as the tower's copy is a copy of the teacher's tower in the teacher, and positions are resized alike.
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
# what says that a run begins without what lies there
NOTHING = "none"

logger = logging.get_logger(__name__)


def objective_file(model: ModelArguments) -> Path | None:
    """
    Where the teacher and the queues are to be had: `initial_objective`, or what lies beside the weights of a local
    `initial_model`. Raises `ValueError` for an objective without its model.
    """
    if model.initial_objective == NOTHING:
        return None
    if model.initial_objective is None:
        beside = None if model.initial_model is None else Path(model.initial_model) / OBJECTIVE
        return beside if beside is not None and beside.is_file() else None
    if model.initial_model is None:
        raise ValueError(
            f"initial_objective is {model.initial_objective!r}, the teacher of a model; expected initial_model, "
            f"got none"
        )
    path = Path(model.initial_objective)
    return path / OBJECTIVE if path.is_dir() else path


def begin_objective(objective: Objective, arguments: Arguments, load: Callable[[Arguments], PreTrainedModel]) -> None:
    """
    Gives an objective over a fresh student, before an engine has them, its teacher and its queues, and says what it
    took. Nothing where the run has no such file.

    Args:
        load: Makes the student of a run's arguments.

    Raises:
        ValueError: a file that cannot be read, is damaged, or is of another model.
    """
    path = objective_file(arguments.model)
    if path is None:
        return
    given = read_weights(path)
    if damage := damage_of(given):
        raise ValueError(f"{path}: {damage}")

    # floats in the teacher's precision, and the teacher as the student was made
    given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    made = {}
    if teacher := under("teacher.", given):
        made = {f"teacher.{name}": value for name, value in _loaded(teacher, arguments, load, path).items()}
    queues = {name: value for name, value in given.items() if not name.startswith("teacher.")}
    try:
        taken = objective.begin_with({**made, **queues})
    except RuntimeError as error:
        raise ValueError(
            f"{path} is of another run: {error}; initial_objective {NOTHING} begins without it"
        ) from error

    # what of the file found no place is named
    left = sorted(given.keys() - set(taken))
    if rank() == 0:
        used = len(given) - len(left)
        logger.warning(f"begins with {used} tensors of {path}; left over: {left or 'nothing'}")


def _loaded(teacher: Batch, arguments: Arguments, load: Callable, path: Path) -> Batch:
    """The state of a model that is made as the student was, of the teacher's weights where there are any."""
    # a tower's own names stand for another model here, whose weights would be passed over
    source = arguments.model.initial_model
    student = read_weights(source)
    if not teacher.keys() & student.keys():
        raise ValueError(f"{path} holds no teacher of {source}, which has no {list(teacher)[:5]}")
    with tempfile.TemporaryDirectory(prefix="teacher-") as scratch, torch.random.fork_rng():
        # what the teacher lacks, a head that makes no targets say, is the student's
        AutoConfig.from_pretrained(source).save_pretrained(scratch)
        weights = {name: value.contiguous().clone() for name, value in {**student, **teacher}.items()}
        save_file(weights, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        return load(replace(arguments, model=replace(arguments.model, initial_model=scratch))).state_dict()
