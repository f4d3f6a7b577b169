"""MoMo's objective: masked images, masked texts, pairs masked in both, global contrast, matching (Chada et al., 2023).

    MIM  squared error of masked patches, of images                                              equation 1
    MLM  cross-entropy of masked tokens, of texts                                                equation 2
    CMM  both, of pairs, from what is seen of both                                               equation 3
    ITC  global contrast: images and texts of all processes, with the gradient of all            equation 4
    ITM  does this text belong to that image? Negatives are drawn by the similarities of ITC     section 3.1

Losses decide what a step is made of: MIM reads a batch of images, MLM one of texts, the others one of pairs. Gradients
of all add up to one step of the optimiser (CMGA, section 3.5).

B rows, N patches, n tokens of a batch, K masked patches, M masked tokens, P embedding width, G rows of all processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from oner.modeling.vl_embeddings import patchify
from oner.training.parallel.distributed import gather_with_gradient, gather_without_gradient, rank
from oner.training.parallel.sharding import own_part

from .examples import example_pairs
from .losses import draw_negatives, in_full, info_nce, masked_language_loss
from .matryoshka import MatryoshkaArguments, NestedWidths, cut
from .momentum import MomentumDistillation, checked_weights, recorded, strangers
from .objective import Batch, Comparison, Example, Objective, Portion, Representations, Targets, check_choices

LOSSES = ("mlm", "mim", "itc", "cmm", "itm")
# the decoder that a loss needs
DECODES = {"mim": "image", "mlm": "text", "cmm": "pair"}
# each modality is contrasted with the keys of the other; equation 4 prints the first alone
DIRECTIONS = (("image", "text"), ("text", "image"))


@dataclass
class MomoObjectiveArguments(MatryoshkaArguments):
    """What section 3 leaves to choose."""

    BOUNDS: ClassVar[dict[str, str]] = {"loss_weights": "[0, inf)"}

    losses: list[str] = field(
        default_factory=lambda: ["mlm", "itc", "cmm", "itm"],
        metadata={
            "help": "Any of mim, mlm, itc, cmm, itm. Stage 1: mim; 2: mim, mlm; 3: mlm, itc, cmm, itm. A step has a "
            "portion `images` with mim, `texts` with mlm, `pairs` with the others."
        },
    )
    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Weight of each loss by name; default 1 (the paper gives none)."}
    )
    norm_pixels: bool = field(
        default=True, metadata={"help": "Targets of masked patches normalised by patch, as public MAE."}
    )
    contrast: Literal["both", "image_to_text"] = field(
        default="both",
        metadata={"help": "Directions of itc: both (FLAVA), or image_to_text, as equation 4 prints it."},
    )
    match_ids: bool = field(
        default=False, metadata={"help": "Rows of one id are positives of each other in itc, not only the own pair."}
    )
    itm_masked: bool = field(
        default=False, metadata={"help": "itm reads what cmm sees of a pair (FLAVA), which is cheaper than all of it."}
    )
    cmga: bool = field(
        default=True,
        metadata={
            "help": "Gradients of all portions make one step of the optimiser (section 3.5); false: each its own, one "
            "after the other (Table 6)."
        },
    )


class MomoPortion(Portion):
    """One kind of rows, `name`, and the losses of it that the run has."""

    name: str
    losses: tuple[str, ...]

    def __init__(self, config: PreTrainedConfig, arguments: MomoObjectiveArguments, widths: NestedWidths):
        self.config = config
        self.arguments = arguments
        self.widths = widths
        self.weights = widths.weights_of(self.losses)

    def weigh(self, parts: Batch) -> torch.Tensor:
        """What is no loss by itself is only watched."""
        return sum(self.weights[name] * part for name, part in parts.items() if name in self.weights)

    def pixel_loss(self, predictions: torch.Tensor, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """MAE's, of predictions of the masked patches alone: (K, p*p*C) -> 0-dim, a sum over patches by `count`."""
        if len(predictions) == 0:
            return in_full(predictions).sum() * 0.0
        targets = patchify(in_full(batch["pixel_values"]), self.config.patch_size).flatten(0, 1)  # (B * N, p*p*C)
        targets = targets.index_select(0, _masked_patches(batch))  # (K, p*p*C)
        if self.arguments.norm_pixels:
            mean = targets.mean(-1, keepdim=True)  # (K, 1)
            variance = targets.var(-1, keepdim=True)  # (K, 1), unbiased
            targets = (targets - mean) / (variance + 1e-6).sqrt()
        return (in_full(predictions) - targets).square().mean(-1).sum() / count


class Texts(MomoPortion):
    """Masked texts."""

    name = "texts"
    losses = ("mlm",)

    def count(self, batch: Batch) -> Batch:
        return {"mlm": _number(len(batch["mlm_labels"]), batch)}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        if counts is None:
            return Representations()
        made = student(**_visible(batch), passes=("text",))
        loss = masked_language_loss(made.mlm_logits["text"], batch["mlm_labels"], counts["mlm"])
        return Representations(parts={"mlm": loss})


class Images(MomoPortion):
    """Masked images."""

    name = "images"
    losses = ("mim",)

    def count(self, batch: Batch) -> Batch:
        return {"mim": batch["bool_masked_pos"].sum()}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        if counts is None:
            return Representations()
        made = student(**_visible(batch), passes=("image",))
        return Representations(parts={"mim": self.pixel_loss(made.pixel_predictions["image"], batch, counts["mim"])})


class Pairs(MomoPortion):
    """
    Pairs: masked in both, contrast, matching. A batch may bring recorded draws, `negative_images` and `negative_texts`
    (B,), which are taken instead of the own.
    """

    name = "pairs"
    losses = ("itc", "cmm", "itm")

    def count(self, batch: Batch) -> Batch:
        counts = {}
        if "cmm" in self.weights:
            counts["patches"] = batch["bool_masked_pos"].sum()
            counts["words"] = _number(len(batch["mlm_labels"]), batch)
        if "itm" in self.weights:
            counts["itm"] = _number(3 * len(batch["input_ids"]), batch)
        return counts

    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        return Targets({"ids": batch["ids"]})

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        """Taken in chunks, a chunk draws its negatives from itself, as each of so many processes would."""
        if counts is None and "itc" not in self.weights:
            return Representations()

        # masked modelling can be left out where no dropout is drawn over all passes at once
        whole = counts is not None
        passes = []
        if "cmm" in self.weights and (whole or self.config.attention_dropout > 0):
            passes.append("pair")
        if "itc" in self.weights or "itm" in self.weights:
            passes.append("contrast")
        if "itm" in self.weights and whole:
            passes.append("match")
        made = student(
            **_visible(batch),
            passes=tuple(passes),
            choose_negatives=partial(self.negatives, batch),
            match_masked=self.arguments.itm_masked,
        )

        # what meets the rest of the batch, and what each pair pays by itself
        represented = Representations()
        if "itc" in self.weights:
            represented.rows = dict(made.embeddings)  # (B, P) each
            represented.common = {"logit_scale": made.logit_scale}  # (1,)
        if whole:
            represented.parts = self._parts(made, batch, counts)
        return represented

    def _parts(self, made, batch: Batch, counts: Batch) -> Batch:
        parts = {}
        if "cmm" in self.weights:
            pixels = self.pixel_loss(made.pixel_predictions["pair"], batch, counts["patches"])
            words = masked_language_loss(made.mlm_logits["pair"], batch["mlm_labels"], counts["words"])
            parts["cmm"] = pixels + words
            parts |= {"cmm_pixels": pixels.detach(), "cmm_words": words.detach()}
        if "itm" in self.weights:
            labels = MomentumDistillation.match_labels(batch)  # (3B,)
            parts["itm"] = F.cross_entropy(in_full(made.itm_logits), labels, reduction="sum") / counts["itm"]
        return parts

    @torch.no_grad()
    def negatives(
        self, batch: Batch, images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A hard negative image of each text, then a text of each image, never of the own id. (B, P) -> (B,) twice."""
        if recorded(batch):
            return batch["negative_images"], batch["negative_texts"]
        allowed = strangers(batch["ids"])  # (B, B)
        logits = in_full(images) @ in_full(texts).T / in_full(temperature)  # (B, B)
        return tuple(draw_negatives(side.softmax(1), allowed)[0] for side in (logits.T, logits))

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        """ITC against the embeddings of all processes."""
        if "itc" not in self.weights:
            return Comparison()
        ids = targets["ids"]  # (B,)
        offset = len(ids) * rank()
        query_ids, key_ids = None, None
        if self.arguments.match_ids:
            query_ids = ids
            key_ids = gather_without_gradient(ids)  # (G,)

        # each side against the other's keys
        temperature = (-common["logit_scale"]).exp()  # (1,)
        directions = DIRECTIONS if self.arguments.contrast == "both" else DIRECTIONS[:1]
        keys = {key: gather_with_gradient(in_full(rows[key])) for _, key in directions}  # (G, P) each

        def itc(dim: int | None) -> torch.Tensor:
            losses = [
                info_nce(cut(rows[query], dim), cut(keys[key], dim), temperature, query_ids, key_ids, offset)
                for query, key in directions
            ]
            return torch.stack(losses).mean()

        return Comparison(self.widths.parts("itc", itc))


PORTIONS = (Texts, Images, Pairs)


class MomoObjective(Objective):
    """
    A portion for each kind of rows that the losses read; the learnable temperature is held in its range.

    Args:
        student (`MomoForPreTraining`): Unwrapped, with its weights in place.
        arguments (`MomoObjectiveArguments`): Losses and their readings.

    Raises:
        ValueError: unknown losses, none, or one twice; weights of other losses; a loss without its decoder; widths
            that [`NestedWidths`] refuses.
    """

    def __init__(self, student: nn.Module, arguments: MomoObjectiveArguments):
        self.arguments = arguments
        self.config = student.config
        self.student = student
        weights = checked_weights(arguments, LOSSES)
        check_choices(arguments)
        # contrasts of embeddings that are cut are parts of the loss by themselves
        self.widths = NestedWidths(arguments, self.config.projection_dim, weights, ("itc",))
        self.weights = self.widths.weights
        needed = [DECODES[name] for name in self.weights if name in DECODES]
        if missing := [kind for kind in needed if kind not in self.config.decoders]:
            raise ValueError(
                f"losses are {arguments.losses}, which need decoders {needed}; the model has "
                f"{list(self.config.decoders)}: add {missing} to decoders of its configuration"
            )
        parts = (kind(self.config, arguments, self.widths) for kind in PORTIONS)
        self.portions = {portion.name: portion for portion in parts if portion.weights}
        self._freeze_unused(student)

    def _freeze_unused(self, student: nn.Module) -> None:
        # a data-parallel engine would wait for ever for the gradient of a parameter that no loss uses
        losses = set(self.weights)
        tower = student.momo
        unused = {
            tower.embeddings.stem: losses == {"mlm"},
            tower.image_projection: "itc" not in losses,
            tower.text_projection: "itc" not in losses,
            student.itm_head: "itm" not in losses,
            student.lm_head: not losses & {"mlm", "cmm"},
        }

        # the decoders of other losses; one that is shared may have no use for pixels
        for loss, kind in DECODES.items():
            for name in (f"{kind}_decoder", f"{kind}_image_decoder", f"{kind}_text_decoder"):
                if (decoder := getattr(student, name, None)) is not None:
                    unused[decoder] = loss not in losses
        if (shared := getattr(student, "shared_decoder", None)) is not None:
            unused[shared] = not losses & DECODES.keys()
            unused[shared.pixel_head] = not losses & {"mim", "cmm"}

        # the head of words shares the token embeddings, which the tower still trains: [CLS] is one of them
        token_embeddings = tower.embeddings.word_embeddings.weight
        for module in (module for module, idle in unused.items() if idle):
            for parameter in module.parameters():
                if parameter is not token_embeddings:
                    parameter.requires_grad_(False)
        student.logit_scale.requires_grad_("itc" in losses)

    def updates(self) -> Sequence[Objective]:
        """All portions at once (CMGA), or one after the other."""
        return (self,) if self.arguments.cmga else tuple(PortionAlone(self, name) for name in self.portions)

    @torch.no_grad()
    def before_step(self) -> None:
        # in place, as CLIP does: clamped in the loss it would get no gradient and never come back
        low, high = self.config.temperature_range
        own_part(self.student.logit_scale).clamp_(-math.log(high), -math.log(low))

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:
        self.before_step()  # what is saved is held too

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        """Of every portion, whichever the run has."""
        pairs = example_pairs(config, lengths, example)
        texts = example_pairs(config, lengths, example, joint=False)
        read = {
            "texts": ("input_ids", "attention_mask", "text_index", "mlm_index", "mlm_labels", "ids", "rows"),
            "images": ("pixel_values", "bool_masked_pos", "mim_index", "ids", "rows"),
        }
        made = {name: {part: texts[part] for part in parts} for name, parts in read.items()}
        return {**made, "pairs": {name: value for name, value in pairs.items() if name != "masked_input_ids"}}

    @classmethod
    def uninformed(cls, arguments: MomoObjectiveArguments, batch_size: int, processes: int) -> dict[str, float]:
        """Contrast at the logarithm of its keys, which are all processes'; matching as `MomentumDistillation` says."""
        yes = MomentumDistillation.match_labels({"ids": torch.arange(2)}).float().mean()  # (), over (3B,)
        entropy = torch.special.entr(torch.stack([yes, 1 - yes])).sum().item()
        return {"itc": math.log(batch_size), "itm": entropy}


class PortionAlone(Objective):
    """One portion of an objective, for which the optimiser takes a step of its own."""

    def __init__(self, whole: MomoObjective, name: str):
        self.whole = whole
        self.portions = {name: whole.portions[name]}

    def before_step(self) -> None:
        self.whole.before_step()

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:
        self.whole.after_step(applied, kept)


def _number(value: int, batch: Batch) -> torch.Tensor:
    """0-dim, where the batch is."""
    return torch.tensor(value, device=batch["input_ids"].device)


def _masked_patches(batch: Batch) -> torch.Tensor:
    """Their places in the flat (B, N), from the collator, so that no accelerator has to stop for them. -> (K,)."""
    if "mim_index" in batch:
        return batch["mim_index"]
    return batch["bool_masked_pos"].flatten().nonzero().flatten()


def _visible(batch: Batch) -> Batch:
    """What the model reads of a batch. Raises `ValueError` for tokens that were replaced instead of dropped."""
    # where none is masked, as in fine-tuning, the copy is the batch's own ids
    if "masked_input_ids" in batch and len(batch["mlm_index"]):
        raise ValueError(
            "the batch brings masked_input_ids, in which masked tokens were replaced, and MoMo's encoder does not see "
            "them at all (section 3.3); expected none: set corruption to drop"
        )
    names = (
        "input_ids", "attention_mask", "pixel_values", "bool_masked_pos", "text_index", "mlm_index", "mim_index",
    )  # fmt: skip
    return {name: batch[name] for name in names if name in batch}
