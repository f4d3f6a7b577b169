"""Fine-tuning for grounding of referring expressions without boxes: RefCOCO+ (SIMLA, section 3.5; ALBEF's protocol).

It trains retrieval of whole images by expressions: contrastive loss and matching, with all expressions of an image as
positives. Boxes are used only for evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from transformers import AutoModelForPreTraining

from oner.processing.data.grounding_files import open_grounding, read_boxes
from oner.processing.data.listed_rows import ListedRows
from oner.processing.data.masking import UNMASKED
from oner.processing.data.row_checks import PairDataError
from oner.training.evaluation.grounding import GroundingEvaluator
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES, pair_collator

from .finetuning import Task, TaskArguments


@dataclass
class GroundingArguments(TaskArguments):
    """Options of the task, in addition to those of the family's objective."""

    BOUNDS: ClassVar[dict[str, str]] = {"cam_layer": "[0, inf)"}

    losses: list[str] = field(
        default_factory=lambda: ["itc", "itm"],
        metadata={"help": "Any subset of the losses of the family's objective."},
    )
    match_ids: bool = field(
        default=True, metadata={"help": "Treat all expressions of a picture as its positives, never as negatives."}
    )
    refs: str | None = field(
        default=None, metadata={"help": "refs(unc).json: the referred objects, REFER's pickle converted to JSON."}
    )
    instances: str | None = field(default=None, metadata={"help": "instances.json: COCO's boxes of the objects."})
    detections: str | None = field(default=None, metadata={"help": "dets.json: the boxes to choose from."})
    cam_mode: str = field(
        default="itm",
        metadata={"help": "itm: cross-attention by the matching logit; itc: the picture's by the cosine."},
    )
    cam_layer: int | None = field(
        default=None, metadata={"help": "Layer of Grad-CAM, from 0; the configuration's grounding_layer if none."}
    )


def open_rows(
    sources: Sequence[str], options: GroundingArguments, data: DataArguments, training: bool
) -> ListedRows | list[dict[str, Any]]:
    """Opens ALBEF's lists of expressions; for evaluation with boxes, and only those of `eval_split` if it is set."""
    # training: expressions and whole images, no boxes
    clean = CAPTION_RULES.get(data.caption_rules)
    if training:
        return open_grounding(list(sources), options.image_folder, clean=clean, bad_rows="skip")

    # evaluation needs all three files
    files = {name: getattr(options, name) for name in ("refs", "instances", "detections")}
    if missing := [name for name, path in files.items() if path is None]:
        raise PairDataError(f"evaluation needs boxes: expected refs, instances and detections, got no {missing}")
    rows = open_grounding(list(sources), options.image_folder, read_boxes(**files), clean)

    # one file holds all splits
    if options.eval_split is None:
        return rows
    # a plain list, since `ListedRows` has already checked the rows
    chosen = [row for row in rows.rows if row["split"] == options.eval_split]
    if not chosen:
        splits = sorted({row["split"] for row in rows.rows})
        raise PairDataError(f"{rows.name}: no expressions of split {options.eval_split!r}; it has {splits}")
    return chosen


def evaluator(rows: Sequence[Any], name: str, options: GroundingArguments) -> GroundingEvaluator:
    return GroundingEvaluator(
        rows,
        options.eval_batch_size,
        mode=options.cam_mode,
        layer=options.cam_layer,
        name=name,
        progress=False,
    )


# it uses the objective of the family's pretraining, without masking
GROUNDING = Task(
    name="grounding",
    model=AutoModelForPreTraining,
    arguments=GroundingArguments,
    open_rows=open_rows,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=evaluator,
)
