"""Fine-tuning for retrieval: contrast and matching in which all captions of a picture are right (ALBEF, SIMLA).

The losses are the family's own, by default `itc` and `itm` with `match_ids`; a family without a matching head is told
other `losses`, and `rerank_k` 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForPreTraining

from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.masking import UNMASKED
from oner.processing.data.mixture import PairMixture
from oner.processing.data.rows import PairRows
from oner.processing.data.sources import open_rows
from oner.training.evaluation.embedding import check_pictures, spaced
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES, pair_collator

from .finetuning import Task, TaskArguments


@dataclass
class RetrievalArguments(TaskArguments):
    """What is told beside the arguments of the family's objective."""

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


def open_captions(
    sources: Sequence[str], told: RetrievalArguments, data: DataArguments, training: bool
) -> PairRows | list[dict[str, Any]]:
    """
    `.json` files are Karpathy's or ALBEF's, when training each caption a row of its own. Anything else is what
    `open_rows` takes, a row a picture. To evaluate on, captions are rewritten by the rules that hold in training.
    """
    how = {"split": data.split if training else told.eval_split, "bad_rows": "skip" if training else "raise"}
    columns = (data.image_column, data.text_column, data.id_column)
    opened = [
        open_karpathy(source, told.image_folder, captions_apart=training, **how)
        if Path(source).suffix == ".json"
        else open_rows(source, "pairs", *columns, **how)
        for source in sources
    ]
    rows = opened[0] if len(opened) == 1 else PairMixture(opened)
    if training:
        return rows
    check_pictures(rows, rows.name)
    clean = CAPTION_RULES.get(data.caption_rules)
    found = spaced(rows)
    return found if clean is None else [{**row, "captions": [clean(one) for one in row["captions"]]} for row in found]


def evaluator(rows: Sequence[Any], name: str, told: RetrievalArguments) -> RetrievalEvaluator:
    """Both stages, or the first alone."""
    how = {"batch_size": told.eval_batch_size, "name": name, "progress": False}
    if told.rerank_k:
        return RerankingEvaluator(rows, **how, rerank_k=told.rerank_k)
    return RetrievalEvaluator(rows, **how)


RETRIEVAL = Task(
    name="retrieval",
    model=AutoModelForPreTraining,
    arguments=RetrievalArguments,
    open_rows=open_captions,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=evaluator,
)
