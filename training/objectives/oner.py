"""OneR's objective: image-text, mixup, contextual-invariance and contextual-mixup contrast, with masked modelling.

With q the online network (projector, predictor), k the EMA teacher (projector), and mix = (F(I) + F(T)) / 2:

    ITC = [NCE(q(I), k(T)) + NCE(q(T), k(I))] / 2                        equation 1
    XMC =  NCE(q(mix), k(mix))                                           equation 2
    CIC = [NCE(q(c), k(mix)) + NCE(q(mix), k(c))] / 2                    equation 3, c = (F(I|T) + F(T|I)) / 2
    CMC = [NCE(q(I,T), k(mix)) + NCE(q(mix), k(I,T))] / 2                equation 4

Texts without images have their own losses, in `oner_texts` (Table 4). Streams that predict no patches may read only
some of them (`image_keep`; Li et al., FLIP, 2023, section 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from oner.modeling.modeling_oner import MAX_LOGIT_SCALE
from oner.processing.data.masking import Keeping
from oner.training.parallel.distributed import gather_with_gradient, gather_without_gradient, rank
from oner.training.parallel.sharding import own_part

from .examples import example_pairs
from .losses import in_full, info_nce, masked_image_loss, masked_language_loss
from .matryoshka import MatryoshkaArguments, NestedWidths, cut
from .objective import Batch, Comparison, Example, Portion, Representations, SinglePortion, Targets
from .oner_texts import TEXT_LOSSES, UnpairedTexts
from .teacher import EMATeacher

logger = logging.get_logger(__name__)

# ctr(A, B): which online representation is contrasted with which teacher representation
CONTRASTS = {
    "itc": (("image", "text"), ("text", "image")),
    "xmc": (("mix", "mix"),),
    "cic": (("context", "mix"), ("mix", "context")),
    "cmc": (("image_text", "mix"), ("mix", "image_text")),
}
# the streams in which a masked loss is computed
READS = {"mlm": ("text", "image_text"), "mim": ("image", "image_text")}
LOSSES = (*CONTRASTS, *READS, *TEXT_LOSSES)


@dataclass
class OneRObjectiveArguments(MatryoshkaArguments):
    """Choices that the paper's section "One Representation" and appendix C leave open."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "loss_weights": "[0, inf)",
        "ema_momentum": "[0, 1]",
        "image_keep": "(0, 1]",
        "image_keep_until": "[0, 1]",
    }

    losses: list[str] = field(
        default_factory=lambda: ["itc", "cmc", "mlm", "mim"],
        metadata={
            "help": "Any subset of itc, xmc, cic, cmc, mlm, mim (Tables 1, 6 and 7); text_mlm and text_nce read a "
            "portion `texts` of unpaired texts in addition to `pairs` (Table 4)."
        },
    )
    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Weight of each loss by name; default 1 (the paper gives none)."}
    )
    ema_momentum: float = field(default=0.996, metadata={"help": "Constant momentum of the teacher (appendix C)."})
    teacher: bool = field(
        default=True,
        metadata={"help": "Keys from the EMA teacher; false: from the student, without gradient."},
    )
    match_ids: bool = field(
        default=False,
        metadata={"help": "Rows with the same id are positives of each other, not only the pair."},
    )
    scale_by_temperature: bool = field(
        default=False, metadata={"help": "Multiply InfoNCE by 2T as MoCo-v3 does; not in the paper's equations."}
    )
    gather_gradient: bool = field(
        default=False,
        metadata={"help": "Gather keys from all processes with gradient, as in CLIP; needs teacher: false."},
    )
    contrast_masked: bool = field(
        default=True,
        metadata={"help": "Contrast masked inputs in the same pass (appendix C); false: clean ones in extra streams."},
    )
    masked_streams: list[str] = field(
        default_factory=lambda: ["image", "text", "image_text"],
        metadata={"help": "Streams with masked modelling (Fig. 5: all three)."},
    )
    norm_pixels: bool = field(default=True, metadata={"help": "Normalise MIM targets by patch, as public MAE."})
    image_keep: float = field(
        default=1.0,
        metadata={
            "help": "Share of each image's patches, drawn anew each time, that the streams read (FLIP); streams with "
            "masked patches read all."
        },
    )
    image_keep_until: float = field(
        default=1.0, metadata={"help": "Share of the run after which all patches are read, as FLIP does at the end."}
    )
    keep_in_keys: bool = field(
        default=False,
        metadata={"help": "Teacher keys from the kept patches too; false: from whole images, as in search."},
    )

    @property
    def keeping(self) -> Keeping:
        """Which patches the collator keeps."""
        return Keeping(self.image_keep, self.image_keep_until)


class OneRObjective(SinglePortion):
    """
    One portion of pairs, and one of texts without images if a loss uses them. A learnable scale is clamped to its
    bound around a step, and `after_step` updates the teacher.

    Args:
        student (`OneRForPreTraining`): Unwrapped, with weights loaded; the teacher starts as its copy.
        arguments (`OneRObjectiveArguments`): Losses and their options.

    Raises:
        ValueError: an unknown loss or stream, none at all, one twice, or a loss that the model's heads or the masked
            streams cannot serve; losses of texts alone; widths that [`NestedWidths`] refuses; patches kept for streams
            that predict some.
    """

    def __init__(self, student: nn.Module, arguments: OneRObjectiveArguments):
        self.arguments = arguments
        self.config = student.config
        self.student = student

        # check the losses: known, each once, and supported by this model's heads
        unknown = [name for name in arguments.losses if name not in LOSSES]
        if unknown or not arguments.losses:
            raise ValueError(f"losses are {arguments.losses}; expected a non-empty subset of {list(LOSSES)}")
        if len(set(arguments.losses)) < len(arguments.losses):
            raise ValueError(f"losses are {arguments.losses}; expected each once (loss_weights makes one count more)")
        if not set(arguments.losses) - set(TEXT_LOSSES):
            raise ValueError(
                f"losses are {arguments.losses}, all of unpaired texts; expected one of pairs beside them"
            )
        self.contrasts = [name for name in arguments.losses if name in CONTRASTS]
        if self.config.two_heads and any(name != "itc" for name in self.contrasts):
            raise ValueError(f"two_heads serves itc alone (Fig. 2c), got {self.contrasts}")
        weights = arguments.loss_weights or {}
        if foreign := [name for name in weights if name not in arguments.losses]:
            raise ValueError(f"loss_weights name {foreign}, which are not among the losses {arguments.losses}")
        self.weights = {name: float(weights.get(name, 1.0)) for name in arguments.losses}
        if arguments.gather_gradient and arguments.teacher:
            raise ValueError("gather_gradient needs teacher: false, since a teacher's keys carry no gradient")
        self._check_masked_streams()
        if arguments.image_keep != 1 and "mim" in self.weights and arguments.contrast_masked:
            raise ValueError(
                f"image_keep is {arguments.image_keep}, and mim predicts patches in the streams of contrast; expected "
                f"losses without mim, or contrast_masked: false, which gives it streams of its own"
            )

        # the representations that the contrasts need from the student, and from the model that computes keys
        pairs = [pair for name in self.contrasts for pair in CONTRASTS[name]]
        self.queries = tuple(sorted({query for query, _ in pairs}))
        self.keys = tuple(sorted({key for _, key in pairs}))
        if "cic" in self.contrasts and self._context_is_mix():
            logger.warning(
                "CIC equals XMC under this configuration: a [CLS] that attends Y's own states is Y's own [CLS], so "
                "F(I|T) = F(T). Set context_states to co_attention or last_layer, context_cls to false, or pooling "
                "to mean."
            )

        # contrastive losses on truncated embeddings, each a separate part of the loss
        self.widths = NestedWidths(arguments, self.config.projection_dim, self.weights, (*CONTRASTS, "text_nce"))
        self.weights = self.widths.weights

        # the teacher copies the student without the parts that keys do not need
        self._freeze_unused(student)
        self.teacher = None
        if arguments.teacher and (self.contrasts or "text_nce" in self.weights):
            unused = ("predictor", "text_predictor", "lm_head", "pixel_head")
            self.teacher = EMATeacher(student, arguments.ema_momentum, unused=unused)

        # texts without pictures
        of_texts = self.widths.weights_of(TEXT_LOSSES)
        self.texts = UnpairedTexts(self.widths, self.config.temperature, self.teacher) if of_texts else None

    @property
    def portions(self) -> dict[str, Portion]:
        return {self.portion: self} if self.texts is None else {self.portion: self, "texts": self.texts}

    def _context_is_mix(self) -> bool:
        config = self.config
        return config.pooling == "cls" and config.context_states == "own" and config.context_cls

    def _check_masked_streams(self) -> None:
        streams_asked = self.arguments.masked_streams
        known = sorted({stream for streams in READS.values() for stream in streams})
        if unknown := [stream for stream in streams_asked if stream not in known]:
            raise ValueError(f"unknown masked_streams {unknown}; expected any of {known}")
        for name, streams in READS.items():
            if name in self.weights and not set(streams) & set(streams_asked):
                raise ValueError(f"{name} needs one of {list(streams)}, but masked_streams are {streams_asked}")

    def _freeze_unused(self, student: nn.Module) -> None:
        # a data-parallel engine would wait for ever for the gradient of a parameter that no loss uses

        # without contrast, the heads for its embeddings
        if not self.contrasts and "text_nce" not in self.weights:
            for head in (
                student.predictor,
                student.text_predictor,
                student.oner.projector,
                student.oner.text_projector,
            ):
                if head is not None:
                    head.requires_grad_(False)
            if student.config.learnable_temperature:
                student.logit_scale.requires_grad_(False)
            if self._masked_streams() == ("text",):
                student.oner.embeddings.stem.requires_grad_(False)

        # without masked tokens, the head except for the matrix tied to the embeddings
        if not self.weights.keys() & {"mlm", "text_mlm"}:
            token_embeddings = student.oner.embeddings.word_embeddings.weight
            for parameter in student.lm_head.parameters():
                if parameter is not token_embeddings:
                    parameter.requires_grad_(False)

        # without masked patches, their head and the mask token
        if "mim" not in self.weights:
            student.pixel_head.requires_grad_(False)
            student.oner.embeddings.patch_mask_token.requires_grad_(False)

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        texts = example_pairs(config, lengths, example, joint=False)
        pictures = ("pixel_values", "bool_masked_pos", "mim_index")
        return {
            cls.portion: example_pairs(config, lengths, example),
            "texts": {name: value for name, value in texts.items() if name not in pictures},
        }

    @classmethod
    def uninformed(cls, arguments: OneRObjectiveArguments, batch_size: int, processes: int) -> dict[str, float]:
        """Contrastive losses: the logarithm of the number of keys of all processes; not if they are scaled."""
        if arguments.scale_by_temperature:
            return {}
        return {name: math.log(batch_size) for name in CONTRASTS}

    def count(self, batch: Batch) -> Batch:
        masked = batch["bool_masked_pos"].sum()
        counts = {"mlm": torch.full_like(masked, len(batch["mlm_labels"])), "mim": masked}
        return {name: counts[name] for name in READS if name in self.weights}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        if counts is None and not self.contrasts:
            return Representations()
        # streams of masked modelling alone can be left out where no dropout is drawn over all streams at once
        masks_alone = counts is not None or self.config.attention_dropout > 0
        online = student(
            **_clean(batch),
            **self._kept(batch),
            masked_input_ids=batch["masked_input_ids"] if "mlm" in self.weights else None,
            mlm_index=batch["mlm_index"] if "mlm" in self.weights and counts is not None else None,
            bool_masked_pos=batch["bool_masked_pos"] if "mim" in self.weights else None,
            representations=self.queries,
            masked_streams=self._masked_streams() if masks_alone else (),
            contrast_masked=self.arguments.contrast_masked,
            checked=bool(targets.rows.keys() - {"ids"}),  # by whoever made the keys, who read the same
        )

        # queries, and keys by the student itself if they carry gradient
        rows = dict(online.embeddings)  # (B, P) each
        if self.arguments.gather_gradient and self.contrasts:
            options = {"representations": self.keys, "masked_streams": (), "predict": False}
            keys = student(**_clean(batch), **self._kept(batch, keys=True), **options, checked=True)  # (B, P) each
            rows.update({f"key of {name}": value for name, value in keys.embeddings.items()})
        common = {}
        if self.contrasts and online.logit_scale is not None:
            common["logit_scale"] = online.logit_scale  # (1,)
        return Representations(rows, common, {} if counts is None else self._masked_parts(online, batch, counts))

    def _masked_parts(self, online, batch: Batch, counts: Batch) -> Batch:
        parts = {}

        # the mean over streams; each reads the same masked tokens or patches
        if "mlm" in self.weights:
            losses = [
                masked_language_loss(logits, batch["mlm_labels"], counts["mlm"])
                for logits in online.mlm_logits.values()
            ]
            parts["mlm"] = torch.stack(losses).mean()
        if "mim" in self.weights:
            losses = [
                masked_image_loss(
                    prediction,
                    batch["pixel_values"],
                    batch["bool_masked_pos"],
                    self.config.patch_size,
                    self.arguments.norm_pixels,
                    counts["mim"],
                )
                for prediction in online.pixel_predictions.values()
            ]
            parts["mim"] = torch.stack(losses).mean()
        return parts

    def _kept(self, batch: Batch, keys: bool = False) -> Batch:
        """The patches to read if not all, for queries or for keys."""
        if self.arguments.image_keep == 1 or (keys and not self.arguments.keep_in_keys):
            return {}
        if "kept_patches" not in batch:
            raise ValueError(
                f"image_keep is {self.arguments.image_keep}, and the batch has no kept_patches; expected those of a "
                f"collator that was told the same"
            )
        return {"kept_patches": batch["kept_patches"]}  # (B, K)

    def _masked_streams(self) -> tuple[str, ...]:
        """The streams that a masked loss needs; others are skipped."""
        reads = {stream for name, streams in READS.items() if name in self.weights for stream in streams}
        return tuple(name for name in self.arguments.masked_streams if name in reads)

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """Keys (B, P) by name, from clean inputs, without predictor; ids (B,)."""
        targets = {"ids": batch["ids"]}
        if self.contrasts and not self.arguments.gather_gradient:
            # the teacher, or the student itself
            network = student if self.teacher is None else self.teacher
            options = {"representations": self.keys, "masked_streams": (), "predict": False}
            keys = network(**_clean(batch), **self._kept(batch, keys=True), **options)  # (B, P) each
            targets.update({f"key of {name}": in_full(value) for name, value in keys.embeddings.items()})
        return Targets(targets)

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        if not self.contrasts:
            return Comparison()

        # keys of all processes, with or without gradient
        gather = gather_with_gradient if self.arguments.gather_gradient else gather_without_gradient
        side = rows if self.arguments.gather_gradient else targets
        keys = {name: gather(in_full(side[f"key of {name}"])) for name in self.keys}  # (G, P) each
        ids = targets["ids"]
        offset = len(ids) * rank()
        query_ids, key_ids = None, None
        if self.arguments.match_ids:
            query_ids = ids  # (B,)
            key_ids = gather_without_gradient(ids)  # (G,)
        temperature = (-common["logit_scale"]).exp() if common else self.config.temperature

        # each contrast is the mean of its directions
        def contrast(name: str, dim: int | None) -> torch.Tensor:
            losses = [
                info_nce(cut(rows[query], dim), cut(keys[key], dim), temperature, query_ids, key_ids, offset)
                for query, key in CONTRASTS[name]
            ]
            loss = torch.stack(losses).mean()
            if self.arguments.scale_by_temperature:
                loss = (loss * 2 * temperature).squeeze()  # a learnable one has shape (1,)
            return loss

        parts = {}
        for name in self.contrasts:
            parts |= self.widths.parts(name, partial(contrast, name))
        return Comparison(parts)

    def weigh(self, parts: Batch) -> torch.Tensor:
        return sum(self.weights[name] * part for name, part in parts.items())

    @torch.no_grad()
    def before_step(self) -> None:
        # in place, as CLIP does: clamped in the loss it would get no gradient and never decrease
        if self.config.learnable_temperature:
            own_part(self.student.logit_scale).clamp_(max=MAX_LOGIT_SCALE)

    def after_step(self, applied: torch.Tensor | None = None, kept: Batch | None = None) -> None:
        self.before_step()  # what is saved is held too
        if self.teacher is not None:
            self.teacher.update(applied)


def _clean(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "text_index")}
