"""`evaluate` module: GLUE's metrics of a task, as MoMo's Tables 2 and 3 report them.

    metric = evaluate.load(metric_text_task.__file__, "f1", keep_in_memory=True)  # or TextTaskMetric("f1")
    metric.compute(predictions=[1, 0, 1], references=[1, 1, 1])  # {"accuracy": ..., "f1": ..., ...}

`evaluate.load("glue")` fetches a script from the Hub, which a machine without network cannot; this one computes the
same by scikit-learn and scipy.
"""

import warnings

import datasets
import numpy as np

from .evaluate_package import evaluate

KINDS = ("accuracy", "f1", "correlation")
DESCRIPTION = "Accuracy; accuracy, F1 of class 1 and their mean; or Pearson's and Spearman's correlation."
INPUTS = """
Args:
    predictions, references: (rows,) classes, or scores for "correlation".
Returns:
    By the configuration: accuracy; accuracy, f1, accuracy_f1_mean; pearson, spearman, correlation_mean. Predictions
    that are all alike correlate with nothing: 0.
Example:
    >>> metric.compute(predictions=[0, 1], references=[0, 0])["accuracy"]
    0.5
"""


class TextTaskMetric(evaluate.Metric):
    """`evaluate.Metric` of the configurations accuracy, f1 and correlation. Raises `ValueError` for another."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in KINDS:
            raise ValueError(f"unknown metric {self.config_name!r}; expected one of {', '.join(KINDS)}")
        value = datasets.Value("float64" if self.config_name == "correlation" else "int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        said = np.asarray(predictions)  # (n,)
        right = np.asarray(references)  # (n,)
        if self.config_name == "correlation":
            return correlations(said, right)
        accuracy = float((said == right).mean())
        if self.config_name == "accuracy":
            return {"accuracy": accuracy}
        from sklearn.metrics import f1_score

        f1 = float(f1_score(right, said, zero_division=0.0))
        return {"accuracy": accuracy, "f1": f1, "accuracy_f1_mean": (accuracy + f1) / 2}


def correlations(said: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's of (n,) and (n,), and their mean."""
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        # of constants: NaN, and a warning
        warnings.simplefilter("ignore")
        values = {"pearson": pearsonr(said, right)[0], "spearman": spearmanr(said, right)[0]}
    values = {name: float(np.nan_to_num(value)) for name, value in values.items()}
    return {**values, "correlation_mean": (values["pearson"] + values["spearman"]) / 2}
