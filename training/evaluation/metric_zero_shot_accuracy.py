"""`evaluate` module: top-k accuracy of zero-shot classification over `oner.training.evaluation.metrics`, in chunks.

metric = evaluate.load(oner.training.evaluation.metric_zero_shot_accuracy.__file__, keep_in_memory=True)
metric.add_batch(predictions=scores, references=labels)   # (q, C) scores, q labels
metric.compute(ks=[1, 5])                                 # {"top1": ..., "top5": ..., "chance1": ..., "examples": ...}
"""

from collections.abc import Sequence

import datasets
import torch

from .evaluate_package import evaluate
from .metrics import Standing, chance_recall, class_standing, recall

DESCRIPTION = "Share of examples whose class is among the k classes of highest score."
INPUTS = """
Args:
    predictions: (examples, classes) scores, higher is better.
    references: the right class of each example.
    ks: cut-offs, default 1 and 5.
Returns:
    top<k> and chance<k> in [0, 1], examples. Ties count in expectation.
Example:
    >>> metric.compute(predictions=[[.9, .1], [.8, .2]], references=[0, 1], ks=[1])["top1"]
    0.5
"""


class ZeroShotAccuracy(evaluate.Metric):
    """Top-k accuracy; `evaluate.Metric` whose rows are (above, tied) and the number of classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Reduce scores (q, C) and labels (q,) to the standing of the right class, and store that.

        Raises:
            ValueError: other names given, or as `metrics.class_standing`.
        """
        if kwargs or predictions is None or references is None:
            raise ValueError(f"expected predictions and references, got {sorted(kwargs) or 'one of them missing'}")
        where = class_standing(torch.as_tensor(predictions), torch.as_tensor(references))
        evaluate.Metric.add_batch(
            self,
            predictions=torch.stack([where.above, where.tied], 1).cpu().numpy(),  # (q, 2)
            references=where.candidates.cpu().numpy(),  # (q,)
        )

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One example: scores (C,) and its class."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=[reference], **kwargs)

    def _compute(self, predictions, references, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
        above, tied = torch.as_tensor(predictions).unbind(1)  # (Q,) each
        one = torch.ones_like(above)  # a single right class
        where = Standing(above, tied, one, one, torch.as_tensor(references))
        return {
            **{f"top{k}": value for k, value in recall(where, ks).items()},
            **{f"chance{k}": value for k, value in chance_recall(where, ks).items()},
            "examples": len(above),
        }
