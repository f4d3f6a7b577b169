"""Composed retrieval: a picture with words, one sequence, asks for another picture. Not in the papers of the families.

    [NCE(F(I, T), {F(I')} and {F(I)}) + NCE(F(I'), {F(I, T)})] / 2

I is the reference, T says how the target I' differs from it. Targets of other rows are negatives, and so are all
references: what looks as the reference does must not be enough. A reference that is the target of a row is right for
it, as CIRR's and FashionIQ's often are. With `keep_weight` there is also

    keep = mean of 1 - cos(f(x), f0(x)) over pictures and words alone, f0 being the model that the run began with,

so that what was found without queries of two parts is found still.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from oner.modeling.vl_inputs import patch_count
from oner.training.parallel.distributed import gather_with_gradient, gather_without_gradient, rank

from .losses import in_full, info_nce
from .matryoshka import MatryoshkaArguments, NestedWidths, cut
from .objective import Batch, Comparison, Representations, SinglePortion, Targets
from .teacher import EMATeacher


@dataclass
class ComposedObjectiveArguments(MatryoshkaArguments):
    """What a run of composed retrieval chooses."""

    BOUNDS: ClassVar[dict[str, str]] = {"query_temperature": "(0, inf)", "keep_weight": "[0, inf)"}

    query_temperature: float | None = field(
        default=None, metadata={"help": "Divides the cosines; the model's own temperature if none."}
    )
    reference_negatives: bool = field(
        default=True, metadata={"help": "References are wrong answers too, those of other rows among them."}
    )
    keep_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of keep, by which pictures and words alone stay near what they were at the start."},
    )


class ComposedObjective(SinglePortion):
    """
    Over rows of two pictures and a text; `pixel_values` (B, 2, C, H, W) holds the reference, then the target, and
    `reference_ids` (B,) says of which rows, by their `ids`, a reference is the target.

    Args:
        student (`PreTrainedModel`): A tower whose `pooler_output` embeds pictures, and pictures with texts, alike.
        arguments (`ComposedObjectiveArguments`): Or what derives from it.

    Raises:
        ValueError: widths that [`NestedWidths`] refuses.
    """

    def __init__(self, student: nn.Module, arguments: ComposedObjectiveArguments):
        self.arguments = arguments
        self.config = student.config
        self.temperature = arguments.query_temperature or student.config.temperature
        weights = {"composed": 1.0, "keep": arguments.keep_weight}
        self.widths = NestedWidths(arguments, self.config.projection_dim, weights, ("composed",))
        # what nothing reaches: an engine over processes would wait for its gradient for ever
        student.embeddings.patch_mask_token.requires_grad_(False)
        if student.text_projector is not None and not arguments.keep_weight:
            student.text_projector.requires_grad_(False)
        # the model of the start, which follows nobody
        self.teacher = EMATeacher(student, momentum=1.0) if arguments.keep_weight else None

    def count(self, batch: Batch) -> Batch:
        if self.teacher is None:
            return {}
        return {"keep": torch.tensor(3 * len(batch["input_ids"]), device=batch["input_ids"].device)}

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """Ids (B,) of targets and references; where they are kept, embeddings of the start as rows (B, 3, P)."""
        rows = {"ids": batch["ids"]}
        if self.arguments.reference_negatives:
            rows["reference_ids"] = batch["reference_ids"]
        if self.teacher is None:
            return Targets(rows)
        reference, target = batch["pixel_values"].unbind(1)  # (B, C, H, W) each
        pictures = self.teacher(pixel_values=torch.cat([target, reference])).pooler_output  # (2B, P)
        words = self.teacher(**_words(batch, self.config.patch_size)).pooler_output  # (B, P)
        return Targets(rows, {"kept": torch.stack([*pictures.chunk(2), words], 1)})

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        reference, target = batch["pixel_values"].unbind(1)  # (B, C, H, W) each

        # the query in one sequence, and what it is held against
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        query = student(**text, pixel_values=reference).pooler_output  # (B, P)
        if not self.arguments.reference_negatives and self.teacher is None:
            return Representations({"query": query, "target": student(pixel_values=target).pooler_output})
        pictures = student(pixel_values=torch.cat([target, reference])).pooler_output  # (2B, P)
        target, reference = pictures.chunk(2)  # (B, P) each
        rows = {"query": query, "target": target}
        if self.arguments.reference_negatives:
            rows["reference"] = reference
        if self.teacher is None:
            return Representations(rows)

        # what is there alone stays where it was; read in both passes of a batch in chunks, for dropout draws alike
        words = student(**_words(batch, self.config.patch_size)).pooler_output  # (B, P)
        alone = in_full(torch.stack([target, reference, words], 1))  # (B, 3, P)
        if counts is None:
            return Representations(rows)
        moved = 1 - F.cosine_similarity(alone, in_full(targets.own["kept"]), dim=-1)  # (B, 3)
        return Representations(rows, parts={"keep": moved.sum() / counts["keep"]})

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        # what the other processes have, with gradient; G rows of all
        everyone = {name: gather_with_gradient(value) for name, value in rows.items()}  # (G, P) each
        ids = targets["ids"]  # (B,)
        all_ids = gather_without_gradient(ids)  # (G,)
        offset = len(ids) * rank()

        # targets are right for their own id, a reference for whoever asks for that very picture
        keys, key_ids = everyone["target"], all_ids
        if "reference" in everyone:
            keys = torch.cat([keys, everyone["reference"]])  # (2G, P)
            key_ids = torch.cat([all_ids, gather_without_gradient(targets["reference_ids"])])  # (2G,)

        def composed(dim: int | None) -> torch.Tensor:
            query, target = cut(rows["query"], dim), cut(rows["target"], dim)  # (B, P) or (B, dim)
            asked = info_nce(query, cut(keys, dim), self.temperature, ids, key_ids, offset)
            answered = info_nce(target, cut(everyone["query"], dim), self.temperature, ids, all_ids, offset)
            return (asked + answered) / 2

        return Comparison(self.widths.parts("composed", composed))

    def weigh(self, parts: Batch) -> torch.Tensor:
        return sum(self.widths.weights[name] * part for name, part in parts.items())


def _words(batch: Batch, patch_size: int) -> Batch:
    """The words of the joint layout alone: [CLS] and tokens, (B, 1 + W)."""
    behind = 1 + patch_count(batch["pixel_values"][:, 0], patch_size)
    return {
        name: torch.cat([batch[name][:, :1], batch[name][:, behind:]], 1) for name in ("input_ids", "attention_mask")
    }
