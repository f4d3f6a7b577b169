"""Fine-tuning for retrieval: contrast and matching in which all captions of a picture are right (ALBEF, SIMLA).

The losses are the family's own, by default `itc` and `itm` with `match_ids`; a family without a matching head needs
other `losses`, and `rerank_k` 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoModelForPreTraining

from oner.processing.data.captions_apart import CaptionsApart
from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.masking import UNMASKED
from oner.processing.data.mixture import PairMixture
from oner.processing.data.rows import PairRows
from oner.processing.data.sources import open_rows
from oner.training.evaluation.embedding import spaced
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES, pair_collator

from .finetuning import Task, TaskArguments


@dataclass
class RetrievalArguments(TaskArguments):
    """Options beside those of the family's objective."""

    BOUNDS: ClassVar[dict[str, str]] = {"rerank_k": "[0, inf)", "rerank_weight": "[0, inf)"}

    losses: list[str] = field(
        default_factory=lambda: ["itc", "itm"], metadata={"help": "Any subset of those of the family's objective."}
    )
    match_ids: bool = field(
        default=True, metadata={"help": "All captions of a picture are right for it, and never negatives of it."}
    )
    rerank_k: int = field(
        default=128,
        metadata={"help": "Candidates that the matching head orders (COCO 256, Flickr30k 128); 0: no second stage."},
    )
    rerank_score: Literal["logit", "difference", "sum"] = field(
        default="logit",
        metadata={
            "help": "What orders them: the logit for matched (ALBEF, SIMLA), its difference to the other logit, or "
            "cosine / temperature + rerank_weight times that difference."
        },
    )
    rerank_weight: float = field(default=0.25, metadata={"help": "Of the difference in sum."})


def open_captions(
    sources: Sequence[str], options: RetrievalArguments, data: DataArguments, training: bool
) -> PairRows | list[dict[str, Any]]:
    """
    Rows of pairs, to train on or to evaluate on.

    `.json` files are Karpathy's or ALBEF's; in training each of their captions is a row of its own. Anything else is
    what `open_rows` takes, a row a picture, or with `captions_apart` a row a caption. Rows to evaluate on have their
    captions rewritten by the rules of training.
    """
    # a bad row is left out of training, never of a score
    reading = {"split": data.split if training else options.eval_split, "bad_rows": "skip" if training else "raise"}
    columns = (data.image_column, data.text_column, data.id_column)
    opened = [
        open_karpathy(source, options.image_folder, captions_apart=training, **reading)
        if Path(source).suffix == ".json"
        else open_rows(source, "pairs", *columns, **reading)
        for source in sources
    ]
    rows = opened[0] if len(opened) == 1 else PairMixture(opened)

    # in training the collator rewrites captions
    if training:
        return CaptionsApart(rows) if data.captions_apart else rows

    # an evaluator takes them as they are
    clean = CAPTION_RULES.get(data.caption_rules)
    all_rows = spaced(rows)
    if clean is None:
        return all_rows
    return [{**row, "captions": [clean(caption) for caption in row["captions"]]} for row in all_rows]


def evaluator(rows: Sequence[Any], name: str, options: RetrievalArguments) -> RetrievalEvaluator:
    """Both stages, or the first alone."""
    settings = {"batch_size": options.eval_batch_size, "name": name, "progress": False}
    # a family without a matching head has no second stage
    if options.rerank_k:
        second = {"rerank_score": options.rerank_score, "rerank_weight": options.rerank_weight}
        return RerankingEvaluator(rows, **settings, rerank_k=options.rerank_k, **second)
    return RetrievalEvaluator(rows, **settings)


# no objective of its own: the family's pretraining without masks
RETRIEVAL = Task(
    name="retrieval",
    model=AutoModelForPreTraining,
    arguments=RetrievalArguments,
    open_rows=open_captions,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=evaluator,
)
