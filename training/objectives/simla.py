"""SIMLA's objective: contrast with queues, matching, masked tokens and patches, pseudo-labels (Khan et al., 2022).

A step: the temperature is held in its range; the teacher moves towards the student and embeds images and texts; the
student makes its one pass, in whose middle negatives are drawn by a pure function of its features and the teacher's
keys; the teacher reads what is masked, and what the student made of it, for soft targets; the losses; and after the
optimiser's step the teacher's keys enter the queues. The authors' code embeds by the teacher in the middle of the
student's pass, which gives the same numbers.

B pairs, N patches, T = 1 + W places of a text, D width, P embedding width, V size of the vocabulary, M masked tokens,
K masked patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from oner.training.publishing.model_loading import load_model

from .examples import example_pairs
from .losses import distilled_cross_entropy, distilled_presence, in_full, keyword_targets
from .momentum import MomentumArguments, MomentumDistillation
from .objective import Batch, Example, Representations, Targets

LOSSES = ("itc", "itm", "mlm", "mim", "psl")
# the pass of the student that each loss is made of; contrast is made for all, since negatives are drawn by it
STUDENT_PASSES = {"itm": "match", "mlm": "tokens", "mim": "patches", "psl": "concepts"}
TEACHER_PASSES = {"mlm": "tokens", "mim": "patches"}


@dataclass
class SimlaObjectiveArguments(MomentumArguments):
    """The paper's section 2, and where its code does something else."""

    BOUNDS: ClassVar[dict[str, str]] = {"keywords_per_head": "[1, inf)", "keywords": "[1, inf)"}

    losses: list[str] = field(
        default_factory=lambda: list(LOSSES), metadata={"help": "Any subset of itc, itm, mlm, mim, psl (Table 1)."}
    )
    image_tokenizer: str | None = field(
        default=None, metadata={"help": "Directory or Hub id of the DiscreteVAE whose codes masked patches are."}
    )
    mlm_soft_axis: Literal["vocabulary", "sequence"] = field(
        default="vocabulary",
        metadata={"help": "Where MLM's soft term normalises: vocabulary, or sequence (a slip of SIMLA's code)."},
    )
    mim_text_context: Literal["student", "own"] = field(
        default="student", metadata={"help": "Whose words the teacher's masked picture reads: student (code) or own."}
    )
    psl_image_states: Literal["student", "own"] = field(
        default="student", metadata={"help": "Whose picture the teacher's keywords read: student (code) or own."}
    )
    keywords_per_head: int = field(default=4, metadata={"help": "Places each head votes for (supplement 3: k = 4)."})
    keywords: int = field(default=5, metadata={"help": "Places that win the vote, [CLS] among them (code: 5)."})


class SimlaObjective(MomentumDistillation):
    """
    A batch may bring recorded draws, which are then taken instead of the own: `visual_codes` (B, N), `negative_images`
    and `negative_texts` (B,), `keyword_targets` (B, V).

    Args:
        student (`SimlaForPreTraining`): Unwrapped, with its weights in place; the teacher starts as its copy.
        arguments (`SimlaObjectiveArguments`): Losses and their readings.

    Raises:
        ValueError: what [`MomentumDistillation`] raises; fewer than one keyword; an image tokenizer with other codes
            than the model's.
    """

    def __init__(self, student: nn.Module, arguments: SimlaObjectiveArguments):
        super().__init__(student, arguments, LOSSES, unused=("itm_head", "temperature"))

        # the vote of the keywords
        for name in ("keywords_per_head", "keywords"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"{name} is {getattr(arguments, name)}; expected at least 1")

        # the image tokenizer, whose codes the model's head must know
        self.tokenizer = None
        if "mim" in self.weights and arguments.image_tokenizer is not None:
            self.tokenizer = load_model(AutoModel, arguments.image_tokenizer, dtype=torch.float32)
            self.tokenizer.requires_grad_(False).eval()
            codes = self.tokenizer.config.num_codes
            if codes != self.config.num_visual_codes:
                raise ValueError(
                    f"{arguments.image_tokenizer} has {codes} codes; expected num_visual_codes of the model, "
                    f"{self.config.num_visual_codes}"
                )

    def freeze_unused(self, student: nn.Module) -> None:
        # module -> whether no loss of this run reaches it
        losses = set(self.weights)
        tower = student.simla
        projected = student.config.concept_input == "projected" and "psl" in losses
        token_embeddings = tower.text.embeddings.word_embeddings.weight
        unused = {
            tower.vision_projection: "itc" not in losses and not projected,
            tower.text_projection: "itc" not in losses,
            student.itm_head: "itm" not in losses,
            student.lm_head: "mlm" not in losses,
            student.mim_head: "mim" not in losses,
            student.concept_head: "psl" not in losses,
            tower.text: losses == {"psl"},
        }
        for layer in tower.text.layers:
            unused[layer.cross_attention] = unused[layer.cross_norm] = not losses & {"itm", "mlm", "mim"}

        # the head of masked tokens shares the token embeddings, which the tower still trains
        for module in (module for module, idle in unused.items() if idle):
            for parameter in module.parameters():
                if parameter is not token_embeddings or module is tower.text:
                    parameter.requires_grad_(False)
        student.temperature.requires_grad_("itc" in losses)
        tower.vision.embeddings.mask_token.requires_grad_("mim" in losses)

    @classmethod
    def without_files(cls, arguments: SimlaObjectiveArguments) -> SimlaObjectiveArguments:
        return replace(arguments, image_tokenizer=None)

    @classmethod
    def example_batches(cls, config: PreTrainedConfig, lengths: Sequence[int], example: Example) -> dict[str, Batch]:
        """With random visual codes (B, N): no image tokenizer is rehearsed."""
        batch = example_pairs(config, lengths, example, joint=False)
        generator = torch.Generator().manual_seed(example.seed)
        codes = torch.randint(config.num_visual_codes, batch["bool_masked_pos"].shape, generator=generator)  # (B, N)
        return {cls.portion: {**batch, "visual_codes": codes}}

    def count(self, batch: Batch) -> Batch:
        # what each part of the loss is a mean of
        masked = batch["bool_masked_pos"].sum()
        pairs = torch.full_like(masked, len(batch["input_ids"]))
        counts = {"itm": 3 * pairs, "mlm": torch.full_like(masked, len(batch["mlm_labels"])), "mim": masked}
        counts["psl"] = pairs
        return {name: count for name, count in counts.items() if name in self.weights}

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> Targets:
        """The teacher's keys (B, P) and ids (B,); its image states (B, 1 + N, D), concepts (B, V), codes (B, N)."""
        rows = {"ids": batch["ids"]}  # (B,)
        own = {}

        # codes are the image tokenizer's, whether or not the teacher is asked
        if "mim" in self.weights:
            own["codes"] = self._codes(batch)

        # the teacher's one pass over clean inputs, where any loss reads it
        speaks = {"itc", "itm", "psl"} & set(self.weights) or self._teacher_passes(progress)
        if not speaks:
            return Targets(rows, own)
        passes = ("contrast", "concepts") if "psl" in self.weights else ("contrast",)
        clean = self.teacher(**_clean(batch), passes=passes)
        own["image states"] = clean.image_states  # (B, 1 + N, D)
        if clean.concept_logits is not None:
            own["concepts"] = clean.concept_logits  # (B, V)
        keys = {"key of image": in_full(clean.image_embeds), "key of text": in_full(clean.text_embeds)}
        return Targets({**rows, **keys}, own)

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        """Taken in chunks, a chunk draws its negatives from itself, as each of so many processes would."""
        if counts is None and "itc" not in self.weights:
            return Representations()
        # the student's one pass
        passes = ["contrast"]
        if counts is not None:
            passes += [name for loss, name in STUDENT_PASSES.items() if loss in self.weights]
        choose = partial(self.negatives, batch, targets.rows) if "match" in passes else None
        online = student(
            **_clean(batch),
            **self._masked(batch, passes),
            passes=tuple(passes),
            choose_negatives=choose,
            checked="image states" in targets.own,  # by the teacher, which read the same
        )

        # what meets the rest of the batch, and what each pair pays by itself
        represented = Representations()
        if "itc" in self.weights:
            represented.rows = {"image": online.image_embeds, "text": online.text_embeds}
            represented.common = {"temperature": online.temperature}
        if counts is not None:
            represented.parts = self._parts(online, batch, targets.own, progress, counts)
        return represented

    def _masked(self, batch: Batch, passes: Sequence[str]) -> dict[str, torch.Tensor | None]:
        """Masks and the places of what they hide, for the passes that have any."""
        masked: dict[str, torch.Tensor | None] = {}
        if "tokens" in passes:
            masked["masked_input_ids"] = batch["masked_input_ids"]
            everywhere = self.arguments.mlm_soft_axis == "sequence"
            masked["mlm_places"] = None if everywhere else self._token_places(batch)
        if "patches" in passes:
            masked["bool_masked_pos"] = batch["bool_masked_pos"]
            masked["mim_places"] = _patch_places(batch)
        return masked

    @staticmethod
    def _token_places(batch: Batch) -> torch.Tensor:
        """Masked tokens in the flat (B, T), [CLS] counted. -> (M,)."""
        slots = batch["input_ids"].shape[1] - 1
        flat = batch["text_index"][batch["mlm_index"]]  # (M,) in the flat (B, T - 1)
        return flat + flat // slots + 1  # (M,) in the flat (B, T)

    def _parts(self, online, batch: Batch, own: Batch, progress: float, counts: Batch) -> Batch:
        """What each pair pays by itself: sums over the whole batch's counts."""
        parts = {}
        alpha = self.alpha(progress)

        # does this image belong to that text
        if "itm" in self.weights:
            labels = self.match_labels(batch)  # (3B,)
            parts["itm"] = F.cross_entropy(in_full(online.itm_logits), labels, reduction="sum") / counts["itm"]

        # what the teacher makes of the masked inputs
        soft = self._soft_targets(online, batch, own, progress)
        if "mlm" in self.weights:
            parts["mlm"] = self._masked_tokens(online, soft, batch, alpha, counts["mlm"])
        if "mim" in self.weights:
            codes = own["codes"].flatten()[_patch_places(batch)]  # (K,)
            parts["mim"] = distilled_cross_entropy(
                online.mim_logits, codes, soft.get("mim_logits"), alpha, counts["mim"]
            )

        # which tokens does the image call for
        if "psl" in self.weights:
            keywords = self._keywords(online, batch, own)  # (B, V)
            losses = distilled_presence(online.concept_logits, keywords, own["concepts"], alpha)  # (B,)
            parts["psl"] = losses.sum() / counts["psl"]
        return parts

    def _masked_tokens(self, online, soft: dict, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        logits = online.mlm_logits  # (M, V), or (B, T, V) where the soft term normalises over places
        teacher = soft.get("mlm_logits")
        logs = None
        if self.arguments.mlm_soft_axis == "sequence":
            places = self._token_places(batch)
            if alpha:
                logs = F.log_softmax(in_full(logits), dim=1).flatten(0, 1)[places]  # (M, V)
                teacher = teacher.flatten(0, 1)[places]  # (M, V)
            logits = logits.flatten(0, 1)[places]  # (M, V)
        return distilled_cross_entropy(logits, batch["mlm_labels"], teacher, alpha, count, logs)

    def _teacher_passes(self, progress: float) -> tuple[str, ...]:
        """What the teacher is asked of masked inputs: nothing where soft targets do not count."""
        if not self.alpha(progress):
            return ()
        return tuple(name for loss, name in TEACHER_PASSES.items() if loss in self.weights)

    def _soft_targets(self, online, batch: Batch, own: Batch, progress: float) -> Batch:
        """The teacher's logits of what is masked, from the same masked inputs, maybe with the student's text."""
        passes = self._teacher_passes(progress)
        if not passes:
            return {}
        # the teacher's masked image may read the student's text states
        own_context = self.arguments.mim_text_context == "own" or online.text_context is None
        return self.teacher(
            **_clean(batch),
            **self._masked(batch, passes),
            checked=True,
            passes=passes,
            image_states=own["image states"],
            text_context=None if own_context else online.text_context.detach(),
        )

    def _keywords(self, online, batch: Batch, own: Batch) -> torch.Tensor:
        """The tokens that the image is to be labelled with, (B, V)."""
        if "keyword_targets" in batch:
            return batch["keyword_targets"]
        states = own["image states"] if self.arguments.psl_image_states == "own" else online.image_states.detach()
        output = self.teacher(**_clean(batch), passes=("keywords",), image_states=states, checked=True)
        attention = output.keyword_attention  # (B, heads, T)
        return keyword_targets(
            in_full(attention),
            batch["input_ids"],
            self.config.vocab_size,
            self.config.cls_token_id,
            self.arguments.keywords_per_head,
            self.arguments.keywords,
        )

    @torch.no_grad()
    def _codes(self, batch: Batch) -> torch.Tensor:
        """The image tokenizer's codes of each patch, (B, N)."""
        if "visual_codes" in batch:
            return batch["visual_codes"]
        if self.tokenizer is None or "code_pixel_values" not in batch:
            raise ValueError(
                "mim predicts an image tokenizer's codes: expected image_tokenizer (a DiscreteVAE's directory) with "
                f"code_crop, or visual_codes in the batch; got image_tokenizer {self.arguments.image_tokenizer!r} and "
                f"a batch of {sorted(batch)}"
            )
        return self.tokenizer.get_codebook_indices(batch["code_pixel_values"])

    def to(self, device: torch.device) -> "SimlaObjective":
        super().to(device)
        if self.tokenizer is not None:
            self.tokenizer.to(device)
        return self


def _patch_places(batch: Batch) -> torch.Tensor:
    """Masked patches in the flat (B, N), from the collator, so that no accelerator has to stop for them. -> (K,)."""
    if "mim_index" in batch:
        return batch["mim_index"]
    return batch["bool_masked_pos"].flatten().nonzero().flatten()


def _clean(batch: Batch) -> Batch:
    """Texts (B, T) and their images, nothing masked."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
