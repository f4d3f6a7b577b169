"""Fine-tuning to ground expressions without boxes: RefCOCO+ (SIMLA, section 3.5; ALBEF's protocol).

Training is that of retrieval, of whole pictures by expressions: contrast and matching in which all expressions of a
picture are right. Boxes are read to evaluate only.
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
    """Options beside those of the family's objective."""

    BOUNDS: ClassVar[dict[str, str]] = {"cam_layer": "[0, inf)"}

    losses: list[str] = field(
        default_factory=lambda: ["itc", "itm"], metadata={"help": "Any subset of those of the family's objective."}
    )
    match_ids: bool = field(
        default=True, metadata={"help": "All expressions of a picture are right for it, and never negatives of it."}
    )
    refs: str | None = field(
        default=None, metadata={"help": "refs(unc).json: what is referred to, of REFER's pickle written as JSON."}
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
    """ALBEF's lists of expressions; to evaluate on, with boxes, and of one split if `eval_split` names it."""
    # to train on: expressions and whole pictures, no boxes
    clean = CAPTION_RULES.get(data.caption_rules)
    if training:
        return open_grounding(list(sources), options.image_folder, clean=clean, bad_rows="skip")

    # to evaluate on: all three files
    files = {name: getattr(options, name) for name in ("refs", "instances", "detections")}
    if missing := [name for name, path in files.items() if path is None]:
        raise PairDataError(f"grounding is scored by boxes: expected refs, instances and detections, got no {missing}")
    rows = open_grounding(list(sources), options.image_folder, read_boxes(**files), clean)

    # one file holds all splits
    if options.eval_split is None:
        return rows
    # rows without their `ListedRows`, which has done its checks
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


# no objective of its own: the family's pretraining without masks
GROUNDING = Task(
    name="grounding",
    model=AutoModelForPreTraining,
    arguments=GroundingArguments,
    open_rows=open_rows,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=evaluator,
)
