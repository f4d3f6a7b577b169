"""Text assignment, a stage between pretraining and NLVR2: to which of two images does a text belong (ALBEF's code)?

It needs only image-text pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from oner.modeling.modeling_codis import CodisForTextAssignment
from oner.modeling.modeling_simla_tasks import SimlaForTextAssignment
from oner.processing.data.masking import UNMASKED
from oner.training.evaluation.classification import task_inputs
from oner.training.evaluation.embedding import batches, numbered, row_ids
from oner.training.evaluation.sheets import evaluating, on_device
from oner.training.objectives.assignment import AssignmentObjective, AssignmentObjectiveArguments, assign
from oner.training.run.collators import pair_collator

from .classification import load_second_layers
from .family_models import FamilyModels
from .finetuning import Task, TaskArguments
from .retrieval import open_captions

AutoModelForTextAssignment = FamilyModels(
    "of text assignment", {"codis": CodisForTextAssignment, "simla": SimlaForTextAssignment}
)
load_assignment = partial(load_second_layers, AutoModelForTextAssignment)


@dataclass
class AssignmentArguments(AssignmentObjectiveArguments, TaskArguments):
    """Options of the task. Its data are pairs as in pretraining, or Karpathy's or ALBEF's caption files."""


class AssignmentEvaluator:
    """
    Measures how often the model recognises a text's own image, or its absence, among two that are drawn from a batch
    as in training.

    Yields name/accuracy, over the rows for which two other images could be drawn.

    Raises:
        ValueError: there are fewer than three rows.
    """

    def __init__(self, rows: Sequence[Any], name: str, options: AssignmentArguments, seed: int = 0):
        if len(rows) < 3:
            raise ValueError(f"{name}: got {len(rows)} rows; expected at least three different pictures")
        self.rows = rows
        self.name = name
        self.options = options
        self.seed = seed

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "text assignment to one of two pictures or neither",
            "rows": len(self.rows),
            "drawn from batches of": self.options.eval_batch_size,
            "own picture": self.options.own_picture,
        }

    def run(self, model: PreTrainedModel, processor: Any) -> Iterator[tuple[str, float]]:
        """Evaluates and yields (name, value)."""
        # seeded, so that the same images are drawn each time
        (ids,) = numbered(row_ids(self.rows))  # (n,)
        hits: list[bool] = []
        with evaluating(model), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for chosen in batches(len(self.rows), self.options.eval_batch_size, "pairs", False):
                # the other images are drawn from the batch
                rows = [self.rows[number] for number in range(chosen.start, chosen.stop)]
                inputs = task_inputs(processor, [{**row, "text": row["captions"][0]} for row in rows])
                batch = on_device({**inputs, "ids": ids[chosen]}, model)

                # rows for which no images could be drawn have a negative label
                logits, labels = assign(model, batch, self.options.own_picture, self.options.draw_temperature)
                hits += (logits.argmax(-1) == labels)[labels >= 0].tolist()
        yield f"{self.name}/accuracy", sum(hits) / max(len(hits), 1)


ASSIGNMENT = Task(
    name="assignment",
    model=AutoModelForTextAssignment,
    arguments=AssignmentArguments,
    open_rows=open_captions,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=AssignmentEvaluator,
    objective=AssignmentObjective,
    load=load_assignment,
    from_hub=True,
)
