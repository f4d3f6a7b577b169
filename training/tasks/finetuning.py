"""What a task of fine-tuning is: its rows, batches, model, objective and scores; the table of tasks.

`examples/finetune.py` trains a task and `examples/evaluate.py` scores it, both by its entry here alone. A task's
arguments, one dataclass, hold all that is its own: of the objective, of the data and of the evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from oner.processing.data.captions_apart import CaptionsApart
from oner.processing.data.rows import PairRows
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.training.evaluation.embedding import check_pictures, spaced
from oner.training.objectives.objective import Objective, build_objective, objective_classes
from oner.training.publishing.model_loading import load_model
from oner.training.run.adapters import add_lora
from oner.training.run.arguments import Arguments, DataArguments
from oner.training.run.collators import Collator
from oner.training.run.loading import quarantine_of
from oner.training.run.optimization import checkpoint_activations

# task -> module and name of its `Task`; a new task adds its line here
TASKS = {
    "retrieval": ("oner.training.tasks.retrieval", "RETRIEVAL"),
    "cir": ("oner.training.tasks.composed", "CIR"),
    "vqa": ("oner.training.tasks.answers", "VQA"),
    "answers": ("oner.training.tasks.answer_classes", "ANSWERS"),
    "entailment": ("oner.training.tasks.classification", "ENTAILMENT"),
    "assignment": ("oner.training.tasks.assignment", "ASSIGNMENT"),
    "nlvr2": ("oner.training.tasks.classification", "NLVR2"),
    "grounding": ("oner.training.tasks.grounding", "GROUNDING"),
    "glue": ("oner.training.tasks.glue", "GLUE"),
}


@dataclass
class TaskArguments:
    """The options that every task has; a task's own arguments derive from it, all fields with defaults."""

    BOUNDS: ClassVar[dict[str, str]] = {"eval_limit": "[1, inf)", "eval_batch_size": "[1, inf)"}

    task: str = field(default="retrieval", metadata={"help": "What to fine-tune for; `--task` decides."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What the annotations' picture paths are relative to; if none, their file."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of eval_data, where one annotation file holds several."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows of each set, evenly spaced; all if none."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Pictures a batch when evaluating."})


class Evaluator(Protocol):
    """`run(model, processor)` yields (name, number or picture), names begin with "NAME/"; `protocol` says of what."""

    name: str
    protocol: dict[str, Any]

    def run(self, model: PreTrainedModel, processor: VisionLanguageProcessor) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True)
class Task:
    """
    One entry of the table.

    Attributes:
        name: Its key in `TASKS`.
        model: An auto class (or any class with its `from_pretrained`) of what is trained and evaluated.
        arguments: Dataclass of the task, derived from `TaskArguments`; it is `Arguments.objective` of the run.
        open_rows: (sources, task arguments, data arguments, training) -> rows by number, checked; bad rows keep their
            numbers and stand in `PairRows.bad` when training, and raise `PairDataError` otherwise. Annotations become
            a `ListedRows`; to evaluate on, a list of rows will do. Training sources are opened together, evaluation's
            one by one.
        collator: (arguments, processor, model's configuration) -> what makes a batch of (RowKey, row, stand-ins)
            items, all random choices about a row from `key.generator(seed)`.
        evaluator: (rows, name, task arguments) -> `Evaluator`; shows no progress bar of its own.
        objective: Called as `objective(student, arguments.objective)`. None: that of the family's pretraining, whose
            own arguments then stand beside the task's, which may have other defaults for them.
        load: As `load_model(model, source, draws_heads=True, config=..., dtype=...)`, where a task has more to do to
            begin from a pretrained model that lacks its heads: a decoder that starts as the encoder's copy. It must
            leave alone what `source` holds of them.
        labels: (task arguments) -> the classes that the model is to have, where the arguments decide them; one for a
            score.
    """

    name: str
    model: Any
    arguments: type[TaskArguments]
    open_rows: Callable[[Sequence[str], Any, DataArguments, bool], PairRows | Sequence[Any]]
    collator: Callable[[Arguments, VisionLanguageProcessor, PreTrainedConfig], Collator]
    evaluator: Callable[[Any, str, Any], Evaluator]
    objective: Callable[[PreTrainedModel, Any], Objective] | None = None
    load: Callable[..., PreTrainedModel] | None = None
    labels: Callable[[Any], Sequence[str]] | None = None


def find_task(name: str) -> Task:
    """The entry of a task, whose module is imported now. Raises `ValueError` that lists the known tasks."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    # imported on demand, so that a task pays for its own imports alone
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)


def task_arguments(task: Task, family: str) -> type[TaskArguments]:
    """The dataclass to fill for a run of a task; with the fields of the family's objective where it trains by that."""
    if task.objective is not None:
        return task.arguments
    # the task's fields come first in the order of bases, so its defaults win
    return make_dataclass(task.arguments.__name__, [], bases=(task.arguments, objective_classes(family)[1]))


def task_objective(task: Task, student: PreTrainedModel, options: TaskArguments) -> Objective:
    """The objective over an unwrapped student with its weights in place."""
    if task.objective is not None:
        return task.objective(student, options)
    return build_objective(student.config.model_type, student, options)


def open_task_rows(task: Task, arguments: Arguments) -> PairRows:
    """
    The rows to train on, those found bad left to the quarantine.

    Raises:
        ValueError: no `initial_model`, without which there is nothing to train them with; `captions_apart` for a task
            that has no captions.
        PairDataError: data that cannot be read as the task's rows.
        BadRowsError: more of them are bad than `max_bad_rows` allows.
    """
    if arguments.model.initial_model is None:
        raise ValueError("fine-tuning begins from a pretrained model directory; expected initial_model, got none")

    # rows keep their numbers; the quarantine leaves the bad ones out
    rows = task.open_rows(arguments.data.train_data, arguments.objective, arguments.data, True)
    if arguments.data.captions_apart and not isinstance(rows, CaptionsApart):
        raise ValueError(f"captions_apart is for pretraining and retrieval; the rows of {task.name} have no captions")
    quarantine_of(arguments, {"pairs": rows}).check_opening()
    return rows


def build_evaluator(task: Task, source: str, options: TaskArguments, data: DataArguments) -> Evaluator:
    """
    The task's evaluator of a source of rows, named after it. Raises `PairDataError` for a row that is bad, and for a
    picture that cannot be read: a run would else end where it evaluates, and again whenever it is resumed.
    """
    # the same rows each time, however few
    rows: Any = task.open_rows([source], options, data, False)
    pictures = rows.pictures if isinstance(rows, PairRows) else ("image",)
    if pictures:
        check_pictures(rows, source, pictures, spaced(range(len(rows)), options.eval_limit))
    if options.eval_limit is not None:
        rows = spaced(rows, options.eval_limit)
    return task.evaluator(rows, Path(source).stem, options)


def load_task_model(task: Task, arguments: Arguments, config: PreTrainedConfig) -> PreTrainedModel:
    """
    The student in fp32 from `initial_model`: heads that it never had are drawn by `seed`, learned positions of
    another image size are brought to this one and learned on.

    Raises:
        ModelDirectoryError: the directory is damaged, or lacks weights of its tower or a part of a head.
    """
    # heads are drawn by torch's generator
    model = arguments.model
    torch.manual_seed(arguments.run.seed)
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels(arguments.objective)))
        config.label2id = {name: number for number, name in config.id2label.items()}
    options: dict[str, Any] = {"config": config, "dtype": torch.float32}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation

    # from the pretrained model, by the task's way to begin if it has one
    if task.load is not None:
        student = task.load(model.initial_model, **options)
    else:
        student = load_model(task.model, model.initial_model, draws_heads=True, **options)

    # positions of the image size that it was pretrained at
    tower = student.base_model
    if hasattr(tower, "resize_positions") and config.position_image_size != config.image_size:
        tower.resize_positions(config.image_size)

    if model.lora is not None:
        add_lora(student, model.lora)
    if model.gradient_checkpointing:
        checkpoint_activations(student)
    return student
