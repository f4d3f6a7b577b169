"""Defines a fine-tuning task by its rows, batches, model, objective and evaluation; and lists all tasks.

`examples/finetune.py` trains a task and `examples/evaluate.py` evaluates it, both using only its entry here. A task's
arguments are one dataclass with its options for objective, data and evaluation.
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

# task -> module and name of its `Task`; a new task adds its entry here
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
    """The options of every task; a task's own arguments derive from it. All fields have defaults."""

    BOUNDS: ClassVar[dict[str, str]] = {"eval_limit": "[1, inf)", "eval_batch_size": "[1, inf)"}

    task: str = field(default="retrieval", metadata={"help": "What to fine-tune for; `--task` decides."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder of the annotations' picture paths; that of their file if none."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of eval_data, if one annotation file contains several."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Number of rows of each set to evaluate on, evenly spaced; all if none."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Batch size in evaluation."})


class Evaluator(Protocol):
    """
    `run(model, processor)` yields (name, number or picture), with names "NAME/..."; `protocol` says how measured.
    """

    name: str
    protocol: dict[str, Any]

    def run(self, model: PreTrainedModel, processor: VisionLanguageProcessor) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True)
class Task:
    """
    A fine-tuning task.

    Attributes:
        name: Its key in `TASKS`.
        model: Auto class (or any class with `from_pretrained`) of the trained and evaluated model.
        arguments: The task's dataclass, derived from `TaskArguments`; the run has it as `Arguments.objective`.
        open_rows: (sources, task arguments, data arguments, training) -> checked rows by number. In training, bad rows
            keep their numbers and are listed in `PairRows.bad`; in evaluation they raise `PairDataError`. Annotations
            become `ListedRows`; for evaluation a list of rows is enough. Training sources are opened together,
            evaluation sources one by one.
        collator: (arguments, processor, model's configuration) -> collator of (RowKey, row, stand-ins) items, which
            makes all random choices for a row with `key.generator(seed)`.
        evaluator: (rows, name, task arguments) -> `Evaluator`, without a progress bar.
        objective: Called as `objective(student, arguments.objective)`. If None, the objective of the family's
            pretraining is used; its arguments are then added to the task's, which may set other defaults for them.
        load: Replaces `load_model(model, source, draws_heads=True, config=..., dtype=...)` if missing heads need more
            than random initialisation, such as a decoder copied from the encoder. It must not change heads that
            `source` has.
        labels: (task arguments) -> the model's classes, if the arguments determine them; a single one for a score.
        from_hub: Whether its training rows may be a data set on the Hub, with `data_config` and `data_revision`.
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
    from_hub: bool = False


def find_task(name: str) -> Task:
    """Imports and returns a task. Raises `ValueError` that lists the known tasks."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    # imported on demand, so that a run only imports its own task
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)


def task_arguments(task: Task, family: str) -> type[TaskArguments]:
    """The dataclass of a task's arguments, with those of the family's objective if the task uses that objective."""
    if task.objective is not None:
        return task.arguments
    # the task is the first base, so its defaults take precedence
    return make_dataclass(task.arguments.__name__, [], bases=(task.arguments, objective_classes(family)[1]))


def task_objective(task: Task, student: PreTrainedModel, options: TaskArguments) -> Objective:
    """The objective of a task for an unwrapped student with loaded weights."""
    if task.objective is not None:
        return task.objective(student, options)
    return build_objective(student.config.model_type, student, options)


def open_task_rows(task: Task, arguments: Arguments) -> PairRows:
    """
    The training rows; bad rows are handed to the quarantine.

    Raises:
        ValueError: there is no `initial_model`; an option is set that this task does not read.
        PairDataError: the data cannot be read as rows of the task.
        BadRowsError: there are more bad rows than `max_bad_rows` allows.
    """
    if arguments.model.initial_model is None:
        raise ValueError("fine-tuning starts from a pretrained model directory; expected initial_model, got none")

    # options of pretraining that would change nothing here
    data = arguments.data
    unread = {"streaming": data.streaming, "data_weights": data.data_weights}
    unread["eval_captions"] = arguments.run.eval_captions != "all"
    if not task.from_hub:
        unread |= {"data_config": data.data_config, "data_revision": data.data_revision}
    if names := [name for name, value in unread.items() if value]:
        raise ValueError(f"fine-tuning for {task.name} does not read {', '.join(names)}; leave them out")

    # rows keep their numbers; the quarantine skips bad ones
    rows = task.open_rows(arguments.data.train_data, arguments.objective, arguments.data, True)
    if arguments.data.captions_apart and not isinstance(rows, CaptionsApart):
        raise ValueError(f"captions_apart is for pretraining and retrieval; the rows of {task.name} have no captions")
    quarantine_of(arguments, {"pairs": rows}).check_opening()
    return rows


def build_evaluator(task: Task, source: str, options: TaskArguments, data: DataArguments) -> Evaluator:
    """
    The task's evaluator for a source of rows, named after it. Raises `PairDataError` for a bad row or an unreadable
    picture: otherwise the run would fail at its first evaluation, and again each time it is resumed.
    """
    # with a limit, the same rows each time
    rows: Any = task.open_rows([source], options, data, False)
    pictures = rows.pictures if isinstance(rows, PairRows) else ("image",)
    if pictures:
        check_pictures(rows, source, pictures, spaced(range(len(rows)), options.eval_limit))
    if options.eval_limit is not None:
        rows = spaced(rows, options.eval_limit)
    return task.evaluator(rows, Path(source).stem, options)


def load_task_model(task: Task, arguments: Arguments, config: PreTrainedConfig) -> PreTrainedModel:
    """
    Loads the student in fp32 from `initial_model`. Missing heads are initialised at random with `seed`; learned
    positions of another image size are resized to this one.

    Raises:
        ModelDirectoryError: the directory is damaged, or lacks weights of the tower or a part of a head.
    """
    # missing heads use torch's generator
    model = arguments.model
    torch.manual_seed(arguments.run.seed)
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels(arguments.objective)))
        config.label2id = {name: number for number, name in config.id2label.items()}
    options: dict[str, Any] = {"config": config, "dtype": torch.float32}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation

    # load the pretrained model, with the task's own function if it has one
    if task.load is not None:
        student = task.load(model.initial_model, **options)
    else:
        student = load_model(task.model, model.initial_model, draws_heads=True, **options)

    # resize positions if it was pretrained at another image size
    tower = student.base_model
    if hasattr(tower, "resize_positions") and config.position_image_size != config.image_size:
        tower.resize_positions(config.image_size)

    if model.lora is not None:
        add_lora(student, model.lora)
    if model.gradient_checkpointing:
        checkpoint_activations(student)
    return student
