"""Fine-tuning for classification of pairs: SNLI-VE, and NLVR2's sentences about two images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from oner.modeling.modeling_codis import CodisForTextAssignment, CodisForVisualReasoning
from oner.modeling.modeling_simla_tasks import SimlaForTextAssignment, SimlaForVisualReasoning
from oner.processing.data.listed_rows import ListedRows
from oner.processing.data.task_rows import ENTAILMENT_LABELS, REASONING_LABELS, open_entailment, open_reasoning
from oner.processing.vl_captions import pre_caption
from oner.training.evaluation.classification import ClassificationEvaluator
from oner.training.objectives.classification import ClassificationObjective
from oner.training.objectives.task import DistillationArguments
from oner.training.publishing.model_loading import load_model
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import task_collator

from .family_models import FamilyModels
from .finetuning import Task, TaskArguments

TWO_PICTURES = ("image", "second_image")


@dataclass
class EntailmentArguments(DistillationArguments, TaskArguments):
    """
    Options of the task. Soft targets have their full weight from the first step (ALBEF's code: no warm-up of alpha).
    """


@dataclass
class ReasoningArguments(DistillationArguments, TaskArguments):
    distillation_ramp: float = field(
        default=1 / 10, metadata={"help": "Share of the run during which alpha rises from 0 (the first of 10 epochs)."}
    )


def load_second_layers(auto: FamilyModels, source: str, **options: Any) -> PreTrainedModel:
    """Loads a model of two images; its second layers are copies of the first unless `source` has both."""
    # a pretrained model has only the first layers, a model of text assignment has both
    model = load_model(auto, source, draws_heads=True, **options)
    if not TWO_PICTURE_MODELS & set(AutoConfig.from_pretrained(source).architectures or ()):
        model.initialise_from(load_model(AutoModel, source, draws_heads=True, **options))
    return model


# transformers has no auto class for two images
AutoModelForVisualReasoning = FamilyModels(
    "of two pictures", {"codis": CodisForVisualReasoning, "simla": SimlaForVisualReasoning}
)
load_reasoning = partial(load_second_layers, AutoModelForVisualReasoning)
# class names as in a configuration's `architectures`
TWO_PICTURE_MODELS = {
    model.__name__
    for model in (
        CodisForTextAssignment, CodisForVisualReasoning, SimlaForTextAssignment, SimlaForVisualReasoning,
    )
}  # fmt: skip


def open_rows(
    sources: Sequence[str],
    options: TaskArguments,
    data: DataArguments,
    training: bool,
    read: Callable[..., ListedRows],
) -> ListedRows:
    # bad rows are skipped in training, but raise in evaluation
    clean = pre_caption if data.caption_rules == "albef" else None
    return read(sources, options.image_folder, clean=clean, bad_rows="skip" if training else "raise")


def evaluator(
    rows: Sequence[Any],
    name: str,
    options: TaskArguments,
    labels: Sequence[str],
    images: Sequence[str] = ("image",),
) -> ClassificationEvaluator:
    return ClassificationEvaluator(rows, labels, name, options.eval_batch_size, images)


ENTAILMENT = Task(
    name="entailment",
    model=AutoModelForSequenceClassification,
    arguments=EntailmentArguments,
    open_rows=partial(open_rows, read=open_entailment),
    collator=task_collator,
    evaluator=partial(evaluator, labels=ENTAILMENT_LABELS),
    objective=ClassificationObjective,
)
NLVR2 = Task(
    name="nlvr2",
    model=AutoModelForVisualReasoning,
    arguments=ReasoningArguments,
    open_rows=partial(open_rows, read=open_reasoning),
    collator=partial(task_collator, images=TWO_PICTURES),  # pixel_values (B, 2, 3, H, W)
    evaluator=partial(evaluator, labels=REASONING_LABELS, images=TWO_PICTURES),
    objective=ClassificationObjective,
    load=load_reasoning,
)
