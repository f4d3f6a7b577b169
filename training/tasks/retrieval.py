"""Fine-tuning for retrieval: contrastive loss and matching, with all captions of an image as positives (ALBEF, SIMLA).

The losses are the family's own, by default `itc` and `itm` with `match_ids`. A family without a matching head needs
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
    """Options of the task, in addition to those of the family's objective."""

    BOUNDS: ClassVar[dict[str, str]] = {"rerank_k": "[0, inf)", "rerank_weight": "[0, inf)"}

    losses: list[str] = field(
        default_factory=lambda: ["itc", "itm"],
        metadata={"help": "Any subset of the losses of the family's objective."},
    )
    match_ids: bool = field(
        default=True, metadata={"help": "Treat all captions of a picture as its positives, never as negatives."}
    )
    rerank_k: int = field(
        default=128,
        metadata={"help": "Candidates re-ranked by the matching head (COCO 256, Flickr30k 128); 0: no re-ranking."},
    )
    rerank_score: Literal["logit", "difference", "sum"] = field(
        default="logit",
        metadata={
            "help": "Score for re-ranking: the logit for matched (ALBEF, SIMLA), its difference to the other logit, "
            "or "
            "cosine / temperature + rerank_weight times that difference."
        },
    )
    rerank_weight: float = field(default=0.25, metadata={"help": "Weight of the difference if rerank_score is sum."})


def open_captions(
    sources: Sequence[str], options: RetrievalArguments, data: DataArguments, training: bool
) -> PairRows | list[dict[str, Any]]:
    """
    Opens rows of pairs, for training or evaluation.

    `.json` files are Karpathy's or ALBEF's; in training each of their captions becomes a row. Any other source is read
    by `open_rows`, one row per image, or with `captions_apart` one row per caption. In evaluation the captions are
    rewritten by the rules of training.
    """
    # bad rows are skipped in training, but raise in evaluation
    reading = {"split": data.split if training else options.eval_split, "bad_rows": "skip" if training else "raise"}
    on_hub = {"config": data.data_config, "revision": data.data_revision} if training else {}
    columns = (data.image_column, data.text_column, data.id_column)
    opened = [
        open_karpathy(source, options.image_folder, captions_apart=training, **reading)
        if Path(source).suffix == ".json"
        else open_rows(source, "pairs", *columns, **reading, **on_hub)
        for source in sources
    ]
    rows = opened[0] if len(opened) == 1 else PairMixture(opened)

    # in training the collator rewrites captions
    if training:
        return CaptionsApart(rows) if data.captions_apart else rows

    # for an evaluator they are rewritten here
    clean = CAPTION_RULES.get(data.caption_rules)
    all_rows = spaced(rows)
    if clean is None:
        return all_rows
    return [{**row, "captions": [clean(caption) for caption in row["captions"]]} for row in all_rows]


def evaluator(rows: Sequence[Any], name: str, options: RetrievalArguments) -> RetrievalEvaluator:
    """Retrieval with re-ranking, or without if `rerank_k` is 0."""
    settings = {"batch_size": options.eval_batch_size, "name": name, "progress": False}
    # a family without a matching head cannot re-rank
    if options.rerank_k:
        second = {"rerank_score": options.rerank_score, "rerank_weight": options.rerank_weight}
        return RerankingEvaluator(rows, **settings, rerank_k=options.rerank_k, **second)
    return RetrievalEvaluator(rows, **settings)


# it uses the objective of the family's pretraining, without masking
RETRIEVAL = Task(
    name="retrieval",
    model=AutoModelForPreTraining,
    arguments=RetrievalArguments,
    open_rows=open_captions,
    collator=partial(pair_collator, masking=UNMASKED),
    evaluator=evaluator,
    from_hub=True,
)
