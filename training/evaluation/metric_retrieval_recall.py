"""`evaluate` module: recall@k of retrieval over `oner.training.evaluation.metrics`, fed in chunks.

    metric = evaluate.load(metric_retrieval_recall.__file__, keep_in_memory=True)  # or RetrievalRecall()
    metric.add_batch(predictions=scores, references=positives)  # (q, G) scores, q lists of positive columns
    metric.compute(ks=[1, 5, 10])  # {"recall@1": ..., "chance@1": ..., "median_rank": ..., ...}

Only the counts of a query's `Standing` are stored, not its row of scores, so memory does not grow with Q x G.
"""

from collections.abc import Sequence

import datasets
import torch

from .evaluate_package import evaluate
from .metrics import Standing, chance_recall, ranks, recall, standing

DESCRIPTION = (
    "Share of queries with at least one positive among the k best of the gallery (CLIP_benchmark's recall@k)."
)
INPUTS = """
Args:
    predictions: (queries, gallery) scores, higher is better.
    references: for each query the list of its positives' columns, or the column of its only one.
    ks: cut-offs, default 1, 5, 10.
Returns:
    recall@k and chance@k in [0, 1], median_rank and mean_rank counted from 1, queries. Ties count in expectation.
Example:
    >>> metric.compute(predictions=[[.9, .1], [.8, .2]], references=[[0], [1]], ks=[1])["recall@1"]
    0.5
"""


class RetrievalRecall(evaluate.Metric):
    """Recall@k with several positives a query; `evaluate.Metric` whose rows are standings."""

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": counts, "references": counts}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Reduce scores (q, G) and q lists of positive columns, or q columns, to counts, and store those.

        Raises:
            ValueError: other names given, lengths differ, a positive outside the gallery, or as `metrics.standing`.
        """
        if kwargs or predictions is None or references is None:
            raise ValueError(f"expected predictions and references, got {sorted(kwargs) or 'one of them missing'}")
        scores = torch.as_tensor(predictions)  # (q, G)
        if len(scores) != len(references):
            raise ValueError(f"one list of positives a query: got {len(scores)} queries, {len(references)} lists")

        # lists of columns as a mask, each column checked against the gallery
        positives = torch.zeros(scores.shape, dtype=torch.bool)  # (q, G)
        for row, columns in zip(positives, references, strict=True):
            columns = torch.as_tensor(columns, dtype=torch.long).reshape(-1)
            if len(columns) and (columns.min() < 0 or columns.max() >= scores.shape[1]):
                raise ValueError(f"positive columns must be in 0..{scores.shape[1] - 1}, got {columns.tolist()}")
            row[columns] = True
        self.add_standing(standing(scores, positives))

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One query: scores (G,) and its positive columns."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=[reference], **kwargs)

    def add_standing(self, where: Standing) -> None:
        """Counts that the caller has made already, in chunks, by `metrics.chunked_standing`."""
        evaluate.Metric.add_batch(
            self,
            predictions=torch.stack(where[:3], 1).cpu().numpy(),  # (q, 3)
            references=torch.stack(where[3:], 1).cpu().numpy(),  # (q, 2)
        )

    def _compute(self, predictions, references, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        # the stored counts are a `Standing` again; ranks count from 1 for readers
        stored = torch.cat([torch.as_tensor(predictions), torch.as_tensor(references)], 1)  # (Q, 5)
        where = Standing(*stored.unbind(1))
        rank = ranks(where) + 1
        return {
            **{f"recall@{k}": value for k, value in recall(where, ks).items()},
            **{f"chance@{k}": value for k, value in chance_recall(where, ks).items()},
            "median_rank": rank.quantile(0.5).item(),
            "mean_rank": rank.mean().item(),
            "queries": len(rank),
        }
