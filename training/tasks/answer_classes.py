"""
Fine-tuning for question answering as classification over a list of answers: MoMo's VQAv2 (section 4.1), as FLAVA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from oner.modeling.modeling_momo import MomoForVisualQuestionAnswering
from oner.processing.data.listed_rows import ListedRows
from oner.processing.data.task_collation import AnswerClasses
from oner.processing.data.task_rows import open_questions, read_answer_list
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_captions import pre_question
from oner.training.evaluation.answers import ClassifiedAnswers, normalise_answer
from oner.training.objectives.answers import AnswerClassObjective
from oner.training.objectives.task import DistillationArguments
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import task_collator

from .family_models import FamilyModels
from .finetuning import Task, TaskArguments

# transformers' auto class gives models that generate answers in some families; a new family adds its entry
AutoModelForAnswerClasses = FamilyModels(
    "that classifies answers (use --task vqa for models that generate them)", {"momo": MomoForVisualQuestionAnswering}
)


@dataclass
class AnswerClassArguments(DistillationArguments, TaskArguments):
    """Options of the task; the number of classes is that of the answers in `answer_list`."""

    genome_folder: str | None = field(
        default=None, metadata={"help": "Folder of Visual Genome's picture paths; image_folder if none."}
    )
    eval_annotations: list[str] = field(
        default_factory=list, metadata={"help": "VQA v2's annotations of the questions in eval_data, to score by."}
    )
    answer_list: str | None = field(
        default=None, metadata={"help": "JSON list of the possible answers, one class each (FLAVA: 3,129)."}
    )
    answer_folder: str | None = field(
        default=None, metadata={"help": "Folder where each evaluation writes NAME.answers.json for VQA's server."}
    )
    distillation: float = field(
        default=0.0, metadata={"help": "alpha, the weight of a teacher's soft targets; MoMo has none."}
    )


def classes(options: AnswerClassArguments) -> list[str]:
    """The answers in `answer_list`. Raises `ValueError` without a list."""
    if options.answer_list is None:
        raise ValueError("this task classifies answers; expected answer_list, a JSON list of them, got none")
    return read_answer_list(options.answer_list)


def open_rows(
    sources: Sequence[str], options: AnswerClassArguments, data: DataArguments, training: bool
) -> ListedRows:
    return open_questions(
        # VQA v2 has separate files of answers for evaluation; training files contain them in each row
        list(sources) if training else [*sources, *options.eval_annotations],
        options.image_folder,
        options.genome_folder,
        answered=training,
        clean=pre_question if data.caption_rules == "albef" else None,
        bad_rows="skip" if training else "raise",
    )


def targets(processor: VisionLanguageProcessor, config: PreTrainedConfig) -> AnswerClasses:
    return AnswerClasses([config.id2label[number] for number in range(config.num_labels)], normalise_answer)


def evaluator(rows: Sequence[Any], name: str, options: AnswerClassArguments) -> ClassifiedAnswers:
    return ClassifiedAnswers(rows, name=name, batch_size=options.eval_batch_size, folder=options.answer_folder)


ANSWERS = Task(
    name="answers",
    model=AutoModelForAnswerClasses,
    arguments=AnswerClassArguments,
    open_rows=open_rows,
    collator=partial(task_collator, targets=targets),
    evaluator=evaluator,
    objective=AnswerClassObjective,
    labels=classes,
)
