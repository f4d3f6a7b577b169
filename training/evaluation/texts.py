"""Evaluates a model that was fine-tuned for a task on texts. n rows, B rows of a batch, C classes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from oner.processing.data.collation import joined_ids
from oner.processing.data.glue_files import text_task
from oner.processing.data.layouts import SeparateLayout, SpecialTokens, attention_mask, lay_out

from .embedding import batches
from .metric_text_task import TextTaskMetric
from .sheets import evaluating, on_device


class TextTaskEvaluator:
    """
    Evaluates predicted classes or scores with the metrics of the task.

    Yields name/accuracy; of MRPC and QQP also name/f1 and name/accuracy_f1_mean; of STS-B name/pearson, name/spearman
    and name/correlation_mean instead; and of classes name/chance, the share of the most frequent.

    Args:
        rows: With "text", "second_text" and "label", as `open_text_task` gives them.
        task: Of `TEXT_TASKS`.

    Raises:
        ValueError: no rows, an unknown task.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], task: str, name: str = "eval", batch_size: int = 64) -> None:
        if len(rows) == 0:
            raise ValueError("there are no rows to evaluate on")
        self.rows = rows
        self.task = task
        self.kind = text_task(task)
        self.name = name
        self.batch_size = batch_size

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {"task": f"texts alone: {self.task}", "metric": self.kind.metric, "rows": len(self.rows)}

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Evaluates all rows and yields (name, value)."""
        classes = len(self.kind.labels) or 1
        metric = TextTaskMetric(self.kind.metric, keep_in_memory=True)
        layout = SeparateLayout(SpecialTokens.of(model.config, processor.tokenizer))
        right = [self.rows[place]["label"] for place in range(len(self.rows))]
        with evaluating(model):
            for chosen in batches(len(self.rows), self.batch_size, "texts", False):
                rows = [self.rows[place] for place in range(chosen.start, chosen.stop)]
                logits = model(**on_device(text_inputs(rows, model, processor, layout), model)).logits  # (B, C)
                if logits.shape[-1] != classes:
                    raise ValueError(
                        f"the model has {logits.shape[-1]} labels; expected {classes}, those of {self.task}"
                    )
                said = logits[:, 0].float() if classes == 1 else logits.argmax(-1)  # (B,)
                metric.add_batch(predictions=said.tolist(), references=right[chosen])

        for name, value in metric.compute().items():
            yield f"{self.name}/{name}", value
        # the baseline: always predict the most frequent class
        if classes > 1:
            yield f"{self.name}/chance", max(Counter(right).values()) / len(right)


def text_inputs(
    rows: Sequence[Mapping[str, Any]], model: Any, processor: Any, layout: SeparateLayout
) -> dict[str, torch.Tensor]:
    """Rows as they are laid out in training: input_ids, attention_mask (B, 1 + W)."""
    texts = [row["text"] for row in rows]
    seconds = [row["second_text"] for row in rows]
    tokens = joined_ids(processor.tokenizer, texts, seconds, model.config.max_text_length)
    head = layout.head(0)  # (1,)
    return {
        "input_ids": lay_out(tokens, head, layout.special.pad),  # (B, 1 + W)
        "attention_mask": attention_mask(tokens, len(head)),  # (B, 1 + W)
    }
