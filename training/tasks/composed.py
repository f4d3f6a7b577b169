"""Fine-tuning for composed image retrieval (CIR): a picture and words, embedded as one, ask for another picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from oner.modeling.modeling_oner import OneRModel
from oner.processing.data.composed_rows import PICTURES, open_composed
from oner.processing.data.listed_rows import ListedRows
from oner.training.evaluation.composed_queries import ComposedQueriesEvaluator
from oner.training.objectives.composed import ComposedObjective, ComposedObjectiveArguments
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES, task_collator

from .family_models import FamilyModels
from .finetuning import Task, TaskArguments

# the other families answer a picture with words by the mean of two embeddings, which no query can train
AutoModelForComposedRetrieval = FamilyModels("that embeds a picture with words in one pass", {"oner": OneRModel})


@dataclass
class ComposedArguments(ComposedObjectiveArguments, TaskArguments):
    """Options beside those of the objective."""


def open_rows(sources: Sequence[str], options: ComposedArguments, data: DataArguments, training: bool) -> ListedRows:
    """`open_composed` by the options. A bad row is left out of training, never of a score."""
    clean = CAPTION_RULES.get(data.caption_rules)
    return open_composed(sources, options.image_folder, clean, "skip" if training else "raise")


def evaluator(rows: Sequence[Any], name: str, options: ComposedArguments) -> ComposedQueriesEvaluator:
    """Targets and references of all rows are the gallery, as in CIRR; the reference is what each is chosen against."""
    rows = list(rows)
    gallery = [{"image": row["target_image"], "id": row["id"]} for row in rows]
    gallery += [{"image": row["image"], "id": f"reference {number}"} for number, row in enumerate(rows)]
    queries = [
        {
            **{key: row[key] for key in ("image", "text")},
            "target": number,
            "choices": [number, len(rows) + number],
            "names": ["target", "reference"],
            "kind": "query",
        }
        for number, row in enumerate(rows)
    ]
    return ComposedQueriesEvaluator(queries, gallery, options.eval_batch_size, name=name, progress=False)


CIR = Task(
    name="cir",
    model=AutoModelForComposedRetrieval,
    arguments=ComposedArguments,
    open_rows=open_rows,
    collator=partial(task_collator, images=PICTURES, targets=None),  # pixel_values (B, 2, 3, H, W)
    evaluator=evaluator,
    objective=ComposedObjective,
)
