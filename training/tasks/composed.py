"""
Fine-tuning for composed image retrieval (CIR): a query of an image and words, embedded together, for another image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from oner.modeling.modeling_oner import OneRModel
from oner.processing.data.composed_rows import PICTURES, References, open_composed
from oner.processing.data.listed_rows import ListedRows
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.training.evaluation.composed_queries import ComposedQueriesEvaluator
from oner.training.evaluation.embedding import picture_key
from oner.training.objectives.composed import ComposedObjective, ComposedObjectiveArguments
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES, task_collator

from .family_models import FamilyModels
from .finetuning import Task, TaskArguments

# the other families embed an image with words as the mean of two embeddings, which such queries cannot train
AutoModelForComposedRetrieval = FamilyModels("that embeds a picture with words in one pass", {"oner": OneRModel})


@dataclass
class ComposedArguments(ComposedObjectiveArguments, TaskArguments):
    """Options of the task, in addition to those of the objective."""


def open_rows(sources: Sequence[str], options: ComposedArguments, data: DataArguments, training: bool) -> ListedRows:
    """Opens the rows. Bad rows are skipped in training, but raise in evaluation."""
    clean = CAPTION_RULES.get(data.caption_rules)
    return open_composed(sources, options.image_folder, clean, "skip" if training else "raise")


def references(processor: VisionLanguageProcessor, config: PreTrainedConfig) -> References:
    """The additional targets of a batch."""
    return References()


def evaluator(rows: Sequence[Any], name: str, options: ComposedArguments) -> ComposedQueriesEvaluator:
    """
    Targets and references of all rows are the gallery, each picture once; the reference is what each query is chosen
    against. Of rows of CIRR it is not searched, as in its protocol; in FashionIQ's, and so in other rows, it is.
    """
    # one place for each picture of an id: what is a reference here may be the target there
    gallery: list[dict[str, Any]] = []
    places: dict[tuple[str, Any], int] = {}

    def place_of(image: Any, identity: Any) -> int:
        place = places.setdefault((picture_key(image), identity), len(gallery))
        if place == len(gallery):
            gallery.append({"image": image, "id": identity})
        return place

    queries = []
    for row in rows:
        target = place_of(row["target_image"], row["id"])
        choices = [target, place_of(row["image"], row["reference_id"])]
        asked = {"image": row["image"], "text": row["text"], "target": target, "choices": choices}
        # a picture that is both, as annotations have by mistake, can be found
        hidden = choices[1] if row.get("leaves_reference") and choices[1] != target else None
        queries.append({**asked, "names": ["target", "reference"], "kind": "query", "hidden": hidden})
    return ComposedQueriesEvaluator(queries, gallery, options.eval_batch_size, name=name, progress=False)


CIR = Task(
    name="cir",
    model=AutoModelForComposedRetrieval,
    arguments=ComposedArguments,
    open_rows=open_rows,
    collator=partial(task_collator, images=PICTURES, targets=references),  # pixel_values (B, 2, 3, H, W)
    evaluator=evaluator,
    objective=ComposedObjective,
)
