"""CODIS' objective: alignment across and within modalities, codes by optimal transport, matching, masked tokens.

A step (Duan et al., 2022, Algorithm 1): the temperature is held in its range; the teacher moves towards the student
and embeds images and texts; the student makes its one pass; plans of transport between features and codes are made
without gradient; the losses; and after the optimiser's step the teacher's keys enter the queues. `losses: [itc, itm,
mlm]` over a model without codebook is ALBEF's step (Li et al., 2021).

B pairs, T = 1 + W places of a text, P embedding width, K codes, M masked tokens, V vocabulary, Q rows of a queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from oner.training.parallel.sharding import is_zero_3, own_part

from .examples import example_pairs
from .losses import distilled_cross_entropy, in_full
from .momentum import ACROSS, MomentumArguments, MomentumDistillation
from .objective import Batch, Comparison, Example, Representations, Targets
from .transport import codes_used, plan_entropy, transport_plan

LOSSES = ("itc", "ica", "code", "itm", "mlm")
# what each loss of alignment holds against what: across modalities (ALBEF), and within them too (equation 5)
WITHIN = (("image", "image"), ("text", "text"))
TERMS = {"itc": ACROSS, "ica": (*ACROSS, *WITHIN)}


@dataclass
class CodisObjectiveArguments(MomentumArguments):
    """The paper's section 3, and what it leaves open."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "ipot_beta": "(0, inf)",
        "ipot_outer": "[1, inf)",
        "ipot_inner": "[1, inf)",
    }

    losses: list[str] = field(
        default_factory=lambda: ["ica", "code", "itm", "mlm"],
        metadata={"help": "Any subset of itc (across modalities, ALBEF) or ica (within them too), code, itm, mlm."},
    )
    alignment_targets: Literal["albef", "soft"] = field(
        default="albef",
        metadata={
            "help": "albef: keys of the batch and the queue, one-hot mixed with the teacher's. soft: the queue's keys "
            "alone, the teacher's distribution alone (as equation 4 and Algorithm 1 print it); alignment then reads "
            "neither match_ids nor distillation."
        },
    )
    alignment_reduction: Literal["half", "sum", "mean"] = field(
        default="half",
        metadata={"help": "Of the terms of alignment: half their sum (ALBEF's scale), sum (equation 5), mean (TCL)."},
    )
    plan: Literal["own", "swapped", "text"] = field(
        default="own",
        metadata={
            "help": "Whose plan teaches a modality its codes: its own (equation 3, Algorithm 1), the other's (text of "
            "figure 3), or the text's for both (equation 2)."
        },
    )
    plan_rows: Literal["normalised", "raw"] = field(
        default="normalised", metadata={"help": "A plan's rows as targets: of sum 1, or 1 / N as they come."}
    )
    code_features: Literal["teacher", "student"] = field(
        default="teacher", metadata={"help": "Whose features the codes move to, and plans are made of (Table 4)."}
    )
    ipot_beta: float = field(default=0.5, metadata={"help": "Step of the proximal point (GOT's code)."})
    ipot_outer: int = field(default=50, metadata={"help": "Proximal steps (GOT's code)."})
    ipot_inner: int = field(default=1, metadata={"help": "Scalings in each (GOT's code; Algorithm 2 leaves it open)."})
    distil_mlm: bool = field(
        default=True, metadata={"help": "Soft targets for masked tokens too (ALBEF); equation 8 has none."}
    )


class CodisObjective(MomentumDistillation):
    """
    The log names beside the losses `codes_used`, the share of codes that are nearest to any feature of the batch among
    those that could be, and `plan_entropy`, in nats: codes that collapse show there first.

    Args:
        student (`CodisForPreTraining`): Unwrapped, with its weights in place; the teacher starts as its copy.
        arguments (`CodisObjectiveArguments`): Losses and their readings.

    Raises:
        ValueError: what [`MomentumDistillation`] raises; codes of a model that has none; a transport
            that makes no step.
    """

    contrasts = frozenset(TERMS)

    def __init__(self, student: nn.Module, arguments: CodisObjectiveArguments):
        super().__init__(student, arguments, LOSSES, unused=("itm_head", "temperature", "codebook"))
        if "code" in self.weights and not self.config.num_codes:
            raise ValueError("the loss code needs a codebook; expected num_codes of the model above 0")
        self.transport = partial(
            transport_plan, beta=arguments.ipot_beta, outer=arguments.ipot_outer, inner=arguments.ipot_inner
        )
        # refused now, and not at the first step
        self.transport(torch.ones(1, 1, device="cpu"))  # also where a rehearsal builds all on meta

    def freeze_unused(self, student: nn.Module) -> None:
        # module -> whether no loss of this run reaches it
        losses = set(self.weights)
        tower = student.codis
        aligned = losses & {"itc", "ica", "code"}
        unused = {
            tower.vision_projection: not aligned,
            tower.text_projection: not aligned,
            student.itm_head: "itm" not in losses,
            student.lm_head: "mlm" not in losses,
        }
        if student.codebook is not None:
            unused[student.codebook] = "code" not in losses
        for layer in tower.text.layers[tower.text.first_fusion :]:
            unused[layer] = not losses & {"itm", "mlm"}

        # the head of masked tokens shares the token embeddings, which the tower still trains
        token_embeddings = tower.text.embeddings.word_embeddings.weight
        for module in (module for module, idle in unused.items() if idle):
            for parameter in module.parameters():
                if parameter is not token_embeddings:
                    parameter.requires_grad_(False)
        student.temperature.requires_grad_(bool(aligned))

    @classmethod
    def uninformed(cls, arguments: Any, batch_size: int, processes: int) -> dict[str, float]:
        """As of ALBEF's losses; alignment has the contrast of each of its terms."""
        known = super().uninformed(arguments, batch_size, processes)
        scales = {"half": 0.5, "sum": 1.0, "mean": 1 / len(TERMS["ica"])}
        terms = scales[arguments.alignment_reduction] * len(TERMS["ica"])
        return {**known, "ica": terms * known["itc"]}

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        return {cls.portion: example_pairs(config, lengths, example, joint=False)}

    @torch.no_grad()
    def before_step(self) -> None:
        super().before_step()
        if "code" in self.weights and self.config.code_norm == "step":
            codes = self.student.codebook.weight
            if is_zero_3(codes):
                raise ValueError("code_norm step needs whole codes, and ZeRO-3 cuts them; expected code_norm forward")
            mine = own_part(codes)  # whole rows, of all codes or of this process's
            mine.copy_(F.normalize(mine, dim=-1))

    def count(self, batch: Batch) -> Batch:
        # what each part of the loss is a mean of
        tokens = torch.full_like(batch["ids"][0], len(batch["mlm_labels"])) if "mlm" in self.weights else None
        counts = {"itm": torch.full_like(batch["ids"][0], 3 * len(batch["ids"])), "mlm": tokens}
        return {name: count for name, count in counts.items() if name in self.weights}

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """The teacher's keys (B, P) and ids (B,); its image states (B, S, D)."""
        clean = self.teacher(**_clean(batch), passes=("contrast",))
        keys = {"key of image": in_full(clean.image_embeds), "key of text": in_full(clean.text_embeds)}
        return Targets({"ids": batch["ids"], **keys}, {"image states": clean.image_states})

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        """Taken in chunks, a chunk draws its negatives from itself, as each of so many processes would."""
        losses = set(self.weights)
        if counts is None and not losses & {"itc", "ica", "code"}:
            return Representations()

        # the student's one pass
        passes = ["contrast"]
        if "code" in losses:
            passes.append("codes")
        if counts is not None:
            passes += [name for loss, name in (("itm", "match"), ("mlm", "tokens")) if loss in losses]
        keys = (targets.rows["key of image"], targets.rows["key of text"])
        online = student(
            **_clean(batch),
            **(self._masked(batch) if "tokens" in passes else {}),
            passes=tuple(passes),
            choose_negatives=partial(self.negatives, batch, targets.rows) if "match" in passes else None,
            keys=keys if self.arguments.code_features == "teacher" else None,
            checked=True,  # by the teacher, which read the same
        )

        # what meets the rest of the batch, and what each pair pays by itself
        represented = Representations()
        if losses & {"itc", "ica", "code"}:
            represented.rows = {"image": online.image_embeds, "text": online.text_embeds}
            represented.common = {"temperature": online.temperature}
        if "code" in losses:
            represented.rows |= {
                "image codes": online.image_codes,
                "text codes": online.text_codes,
                "image key codes": online.image_key_codes,
                "text key codes": online.text_key_codes,
            }
        if counts is not None:
            represented.parts = self._parts(online, batch, targets.own, progress, counts)
        return represented

    @staticmethod
    def _masked(batch: Batch) -> Batch:
        """Masked texts, and masked tokens in the flat (B, T), [CLS] counted: (M,)."""
        slots = batch["input_ids"].shape[1] - 1
        flat = batch["text_index"][batch["mlm_index"]]  # (M,) in the flat (B, T - 1)
        return {"masked_input_ids": batch["masked_input_ids"], "mlm_places": flat + flat // slots + 1}

    def _parts(self, online, batch: Batch, own: Batch, progress: float, counts: Batch) -> Batch:
        """What each pair pays by itself: sums over the whole batch's counts."""
        parts = {}
        # does this image belong to that text
        if "itm" in self.weights:
            labels = self.match_labels(batch)  # (3B,)
            parts["itm"] = F.cross_entropy(in_full(online.itm_logits), labels, reduction="sum") / counts["itm"]

        # masked tokens, by what stood there and by what the teacher makes of them
        if "mlm" in self.weights:
            alpha = self.alpha(progress) if self.arguments.distil_mlm else 0.0
            soft = None
            if alpha:
                masked = {**_clean(batch), **self._masked(batch)}
                soft = self.teacher(**masked, passes=("tokens",), image_states=own["image states"], checked=True)
            parts["mlm"] = distilled_cross_entropy(
                online.mlm_logits, batch["mlm_labels"], soft and soft.mlm_logits, alpha, counts["mlm"]
            )
        return parts

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        """Alignment against this process's keys and the queues, and codes of this process's batch."""
        compared = Comparison()
        for loss in TERMS:
            if loss in self.weights:
                alignment = partial(self._alignment, loss, rows, common, targets, progress)
                compared.parts |= self.widths.parts(loss, alignment)
                compared.kept = self.newest(targets)
        if "code" in self.weights:
            compared.parts |= self._codes(rows, common["temperature"])
        return compared

    def _alignment(
        self, loss: str, rows: Batch, common: Batch, targets: Batch, progress: float, dim: int | None
    ) -> torch.Tensor:
        """Equations 4 and 5, or ALBEF's 2 to 4, over the first `dim` coordinates; over all if None."""
        soft = self.arguments.alignment_targets == "soft"
        alpha = 1.0 if soft else self.alpha(progress)
        terms = [
            self.contrast(name, other, rows, common, targets, alpha, queue_only=soft, dim=dim)
            for name, other in TERMS[loss]
        ]
        scale = {"half": 0.5, "sum": 1.0, "mean": 1 / len(terms)}[self.arguments.alignment_reduction]
        return scale * torch.stack(terms).sum()

    def _codes(self, rows: Batch, temperature: torch.Tensor) -> Batch:
        """Equations 1 to 3: codes move to the features that are sent to them, features learn where theirs are sent."""
        costs = {name: 1 - in_full(rows[f"{name} key codes"]) for name in ("image", "text")}  # (B, K)
        plans = {name: self.transport(cost) for name, cost in costs.items()}  # (B, K)
        loss = sum((plans[name] * cost).sum() for name, cost in costs.items())  # trains the codes alone

        # whose plan teaches whom
        teaches = {
            "own": {"image": "image", "text": "text"},
            "swapped": {"image": "text", "text": "image"},
            "text": {"image": "text", "text": "text"},
        }[self.arguments.plan]
        for name, other in teaches.items():
            share = plans[other] * (len(plans[other]) if self.arguments.plan_rows == "normalised" else 1)  # (B, K)
            logs = F.log_softmax(in_full(rows[f"{name} codes"]) / temperature, dim=1)  # (B, K)
            loss = loss - (share * logs).sum(1).mean()

        # what shows a collapse
        watched = [(codes_used(1 - costs[name]), plan_entropy(plans[name])) for name in costs]
        used, entropy = (torch.stack(values).mean() for values in zip(*watched, strict=True))
        return {"code": loss, "codes_used": used.detach(), "plan_entropy": entropy}


def _clean(batch: Batch) -> Batch:
    """Texts (B, T) and their images, nothing masked."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
