"""
Fine-tuning on texts: GLUE's tasks except CoLA and WNLI (MoMo's Tables 2 and 3), and two tasks on WordNet glosses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oner.modeling.modeling_codis import CodisForSequenceClassification
from oner.modeling.modeling_momo import MomoForSequenceClassification
from oner.modeling.modeling_oner import OneRForSequenceClassification
from oner.modeling.modeling_simla_tasks import SimlaForSequenceClassification
from oner.processing.data.glue_files import open_text_task, text_task
from oner.processing.data.listed_rows import ListedRows
from oner.processing.vl_captions import pre_caption
from oner.training.evaluation.texts import TextTaskEvaluator
from oner.training.objectives.classification import TextObjective
from oner.training.objectives.task import DistillationArguments
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import text_task_collator

from .family_models import FamilyModels
from .finetuning import Task, TaskArguments

# transformers' auto class for texts is used for visual entailment in some families; a new family adds its entry
AutoModelForTexts = FamilyModels(
    "for texts alone",
    {
        "codis": CodisForSequenceClassification,
        "momo": MomoForSequenceClassification,
        "oner": OneRForSequenceClassification,
        "simla": SimlaForSequenceClassification,
    },
)


@dataclass
class GlueArguments(DistillationArguments, TaskArguments):
    glue_task: str = field(
        default="sst2",
        metadata={"help": "mnli, mrpc, qqp, sst2, qnli, rte, stsb; or of WordNet's glosses: hypernym, supersense."},
    )
    distillation: float = field(
        default=0.0, metadata={"help": "alpha, the weight of a teacher's soft targets; GLUE's protocols use none."}
    )


def labels(options: GlueArguments) -> Sequence[str]:
    """The task's classes; a single one for a score."""
    return text_task(options.glue_task).class_names or ("score",)


def open_texts(sources: Sequence[str], options: GlueArguments, data: DataArguments, training: bool) -> ListedRows:
    # bad rows are skipped in training, but raise in evaluation
    clean = pre_caption if data.caption_rules == "albef" else None
    return open_text_task(sources, options.glue_task, clean, "skip" if training else "raise")


def evaluator(rows: Sequence[Any], name: str, options: GlueArguments) -> TextTaskEvaluator:
    return TextTaskEvaluator(rows, options.glue_task, name, options.eval_batch_size)


GLUE = Task(
    name="glue",
    model=AutoModelForTexts,
    arguments=GlueArguments,
    open_rows=open_texts,
    collator=text_task_collator,
    evaluator=evaluator,
    objective=TextObjective,
    labels=labels,
)
