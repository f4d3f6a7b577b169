"""Losses on texts without images in addition to OneR's pairs (Table 4).

The paper does not say which losses it uses on them. Here, by name:

    text_mlm  masked tokens of the text stream, as in a pair
    text_nce  NCE(q(T masked), k(T)): contrast with the teacher's key of the clean text
"""

import torch
from torch import nn

from oner.training.parallel.distributed import gather_without_gradient, rank

from .losses import in_full, info_nce, masked_language_loss
from .matryoshka import NestedWidths, cut
from .objective import Batch, Comparison, Portion, Representations, Targets
from .teacher import EMATeacher

TEXT_LOSSES = ("text_mlm", "text_nce")
READ = ("input_ids", "attention_mask", "text_index")


class UnpairedTexts(Portion):
    """
    A batch of texts, [CLS] and tokens (B, 1 + W), with their masked twin.

    Args:
        widths: Of contrasts, with the weights of all losses of the run.
        temperature: Temperature of the cosines, if the student does not learn it.
        teacher: Computes the keys; if None, the student does.
    """

    def __init__(self, widths: NestedWidths, temperature: float, teacher: EMATeacher | None):
        self.widths = widths
        self.weights = widths.weights_of(TEXT_LOSSES)
        self.temperature = temperature
        self.teacher = teacher

    def count(self, batch: Batch) -> Batch:
        if "text_mlm" not in self.weights:
            return {}
        return {"text_mlm": torch.tensor(len(batch["mlm_labels"]), device=batch["mlm_labels"].device)}

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """Keys (B, P) of clean texts, without predictor."""
        if "text_nce" not in self.weights:
            return Targets()
        network = student if self.teacher is None else self.teacher
        keys = network(**_text(batch), representations=("text",), masked_streams=(), predict=False)
        return Targets({"text": in_full(keys.embeddings["text"])})

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        if counts is None and "text_nce" not in self.weights:
            return Representations()

        # one masked stream for both losses
        words = "text_mlm" in self.weights
        online = student(
            **_text(batch),
            masked_input_ids=batch["masked_input_ids"],
            mlm_index=batch["mlm_index"] if words and counts is not None else None,
            representations=("text",) if "text_nce" in self.weights else (),
            masked_streams=("text",),
        )
        represented = Representations(rows=dict(online.embeddings))  # (B, P)
        if represented.rows and online.logit_scale is not None:
            represented.common = {"logit_scale": online.logit_scale}  # (1,)
        if words and counts is not None:
            loss = masked_language_loss(online.mlm_logits["text"], batch["mlm_labels"], counts["text_mlm"])
            represented.parts = {"text_mlm": loss}
        return represented

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        if "text_nce" not in self.weights:
            return Comparison()
        keys = gather_without_gradient(targets["text"])  # (G, P)
        temperature = (-common["logit_scale"]).exp() if common else self.temperature
        offset = len(targets["text"]) * rank()

        def text_nce(dim: int | None) -> torch.Tensor:
            return info_nce(cut(rows["text"], dim), cut(keys, dim), temperature, offset=offset)

        return Comparison(self.widths.parts("text_nce", text_nce))

    def weigh(self, parts: Batch) -> torch.Tensor:
        return sum(self.weights[name] * part for name, part in parts.items())


def _text(batch: Batch) -> Batch:
    return {name: batch[name] for name in READ}
