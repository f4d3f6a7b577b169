"""SIMLA's objective: contrast with queues, matching, masked words and patches, pseudo-labels (Khan et al., 2022).

A step, in the order of the authors' code: the temperature is held in its range; the teacher moves towards the student;
the teacher embeds pictures and texts; the student makes its one pass, negatives drawn in its middle; the teacher makes
the soft targets; and after the optimiser's step the teacher's embeddings enter the queues.

B pairs, N patches, T = 1 + W places of a text, P embedding width, V words, M masked words, K masked patches.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from oner.processing.data.chunks import split_pairs
from oner.training.parallel.distributed import gather_without_gradient
from oner.training.parallel.sharding import own_part
from oner.training.publishing.model_loading import load_model

from .feature_queue import FeatureQueue
from .layout import as_read
from .losses import in_full
from .losses_distilled import (
    distilled_contrast,
    distilled_cross_entropy,
    distilled_presence,
    draw_negatives,
    keyword_targets,
)
from .objective import Objective, Representations
from .teacher import EMATeacher

LOSSES = ("itc", "itm", "mlm", "mim", "psl")
# the pass of the student that each loss is made of; contrast is made for all, since negatives are drawn by it
STUDENT_PASSES = {"itm": "match", "mlm": "tokens", "mim": "patches", "psl": "concepts"}
TEACHER_PASSES = {"mlm": "tokens", "mim": "patches"}
Batch = dict[str, torch.Tensor]


@dataclass
class SimlaObjectiveArguments:
    """The paper's section 2, and where its code does something else."""

    losses: list[str] = field(
        default_factory=lambda: list(LOSSES), metadata={"help": "Any subset of itc, itm, mlm, mim, psl (Table 1)."}
    )
    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Weight of each loss by name; 1 where not given (equation 10)."}
    )
    ema_momentum: float = field(default=0.995, metadata={"help": "Momentum of the teacher (section 2.5)."})
    distillation: float = field(default=0.4, metadata={"help": "alpha, the weight of soft targets (section 2.5)."})
    distillation_ramp: float = field(
        default=1 / 30,
        metadata={"help": "Share of the run in which alpha rises from 0 (section 2.5: the first of 30 epochs)."},
    )
    queue_size: int = field(default=65536, metadata={"help": "M, keys that each queue holds (section 2.5)."})
    match_ids: bool = field(
        default=False, metadata={"help": "Keys of one id are positives of each other in ITC (ALBEF's fine-tuning)."}
    )
    enqueue_ids: bool = field(
        default=True,
        metadata={"help": "Queues keep ids, for match_ids; SIMLA's fine-tuning code forgets to, and has false."},
    )
    image_tokenizer: str | None = field(
        default=None, metadata={"help": "Directory or Hub id of the DiscreteVAE whose codes masked patches are."}
    )
    mlm_soft_axis: str = field(
        default="vocabulary",
        metadata={"help": "Where MLM's soft term normalises: vocabulary, or sequence (a slip of SIMLA's code)."},
    )
    mim_text_context: str = field(
        default="student", metadata={"help": "Whose words the teacher's masked picture reads: student (code) or own."}
    )
    psl_image_states: str = field(
        default="student", metadata={"help": "Whose picture the teacher's keywords read: student (code) or own."}
    )
    keywords_per_head: int = field(default=4, metadata={"help": "Places each head votes for (supplement 3: k = 4)."})
    keywords: int = field(default=5, metadata={"help": "Places that win the vote, [CLS] among them (code: 5)."})


CHOICES = {
    "mlm_soft_axis": ("vocabulary", "sequence"),
    "mim_text_context": ("student", "own"),
    "psl_image_states": ("student", "own"),
}


class SimlaObjective(Objective):
    """
    `objective(student, batch, progress)` -> (loss, parts); `after_step()` fills the queues.

    A batch may bring recorded draws, which are then taken instead of the own: `visual_codes` (B, N), `negative_images`
    and `negative_texts` (B,), `keyword_targets` (B, V).

    Args:
        student (`SimlaForPreTraining`): Unwrapped, with its weights in place; the teacher starts as its copy.
        arguments (`SimlaObjectiveArguments`): Losses and their readings.

    Raises:
        ValueError: unknown losses, none, or one twice; weights of other losses; shares and choices out of range; an
            image tokenizer with other codes than the model's.
    """

    def __init__(self, student: nn.Module, arguments: SimlaObjectiveArguments):
        self.arguments, self.config, self.student = arguments, student.config, student
        self.weights = _checked_weights(arguments)
        self._freeze_unused(student)
        self.teacher = EMATeacher(student, arguments.ema_momentum, unused=("itm_head", "temperature"))
        self.queue = None
        if "itc" in self.weights:
            self.queue = FeatureQueue(("image", "text"), arguments.queue_size, self.config.projection_dim)
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
        # the teacher's embeddings of the batch at hand: negatives need them in the middle of the student's pass
        self._kept: tuple[Batch, dict[str, torch.Tensor]] | None = None
        self._newest: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None

    def _freeze_unused(self, student: nn.Module) -> None:
        # a parameter that no loss reaches would make a data-parallel engine wait for its gradient for ever
        losses, tower = set(self.weights), student.simla
        projected = student.config.concept_input == "projected" and "psl" in losses
        words = tower.text.embeddings.word_embeddings.weight
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
        for module in (module for module, idle in unused.items() if idle):
            for parameter in module.parameters():
                if parameter is not words or module is tower.text:
                    parameter.requires_grad_(False)
        student.temperature.requires_grad_("itc" in losses)
        tower.vision.embeddings.mask_token.requires_grad_("mim" in losses)

    def alpha(self, progress: float) -> float:
        """The weight of soft targets at this share of the run."""
        ramp = self.arguments.distillation_ramp
        return self.arguments.distillation * (min(1.0, progress / ramp) if ramp else 1.0)

    @torch.no_grad()
    def before_step(self) -> None:
        own_part(self.student.temperature).clamp_(*self.config.temperature_range)
        self.teacher.update()
        self._kept = None

    def split(self, batch: Batch, pieces: int) -> list[Batch]:
        return split_pairs(batch, pieces)

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        masked = batch["bool_masked_pos"].sum()
        pairs = torch.full_like(masked, len(batch["input_ids"]))
        counts = {"itm": 3 * pairs, "mlm": torch.full_like(masked, len(batch["mlm_labels"])), "mim": masked}
        counts["psl"] = pairs
        return {name: count for name, count in counts.items() if name in self.weights}

    def represent(
        self, student: nn.Module, batch: Batch, progress: float, counts: dict[str, torch.Tensor] | None = None
    ) -> Representations:
        """Taken in pieces, a piece draws its negatives from itself, as each of so many processes would."""
        if counts is None and "itc" not in self.weights:
            return Representations()
        passes = ["contrast"]
        if counts is not None:
            passes += [name for loss, name in STUDENT_PASSES.items() if loss in self.weights]
        labels = {}

        def choose(
            images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            negatives, labels["itm"] = self._negatives(student, batch, images, texts, temperature)
            return negatives

        online = student(
            **self._clean(batch), **self._masked(batch, passes), passes=tuple(passes), choose_negatives=choose
        )
        rows = {"image": online.image_embeds, "text": online.text_embeds}
        common = {"temperature": online.temperature}
        if "itc" not in self.weights:
            rows, common = {}, {}
        if counts is None:
            return Representations(rows, common)
        return Representations(rows, common, self._parts(student, online, labels, batch, self.alpha(progress), counts))

    def _clean(self, batch: Batch) -> Batch:
        """Texts (B, T) and their pictures."""
        batch = as_read(batch, self.config)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def _masked(self, batch: Batch, passes: list[str]) -> dict[str, torch.Tensor | None]:
        """Masks and the places of what they hide, for the passes that have any."""
        masked: dict[str, torch.Tensor | None] = {}
        if "tokens" in passes:
            masked["masked_input_ids"] = as_read(batch, self.config)["masked_input_ids"]
            everywhere = self.arguments.mlm_soft_axis == "sequence"
            masked["mlm_places"] = None if everywhere else self._word_places(batch)
        if "patches" in passes:
            masked["bool_masked_pos"] = batch["bool_masked_pos"]
            masked["mim_places"] = _patch_places(batch)
        return masked

    @staticmethod
    def _word_places(batch: Batch) -> torch.Tensor:
        """Masked words in the flat (B, T), [CLS] counted. -> (M,)."""
        slots = batch["input_ids"].shape[1] - 1 - batch["bool_masked_pos"].shape[1]
        flat = batch["text_index"][batch["mlm_index"]]
        return flat + flat // slots + 1

    def _parts(
        self, student, online, labels: Batch, batch: Batch, alpha: float, counts: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What each pair pays by itself: sums over the whole batch's counts."""
        parts = {}
        if "itm" in self.weights:
            parts["itm"] = F.cross_entropy(in_full(online.itm_logits), labels["itm"], reduction="sum") / counts["itm"]
        soft = self._soft_targets(student, online, batch, alpha)
        if "mlm" in self.weights:
            parts["mlm"] = self._masked_words(online, soft, batch, alpha, counts["mlm"])
        if "mim" in self.weights:
            codes = self._codes(batch).flatten()[_patch_places(batch)]
            parts["mim"] = distilled_cross_entropy(
                online.mim_logits, codes, soft.get("mim_logits"), alpha, counts["mim"]
            )
        if "psl" in self.weights:
            targets = self._keywords(online, batch)
            concepts = self._keys(student, batch)["concepts"]
            parts["psl"] = distilled_presence(online.concept_logits, targets, concepts, alpha).sum() / counts["psl"]
        return parts

    def _masked_words(self, online, soft: dict, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        logits, teacher, logs = online.mlm_logits, soft.get("mlm_logits"), None
        if self.arguments.mlm_soft_axis == "sequence":
            places = self._word_places(batch)
            if alpha:
                logs = F.log_softmax(in_full(logits), dim=1).flatten(0, 1)[places]
                teacher = teacher.flatten(0, 1)[places]
            logits = logits.flatten(0, 1)[places]
        return distilled_cross_entropy(logits, batch["mlm_labels"], teacher, alpha, count, logs)

    def _soft_targets(self, student, online, batch: Batch, alpha: float) -> dict[str, torch.Tensor]:
        """The teacher's logits of what is masked, from the same masked inputs."""
        passes = [name for loss, name in TEACHER_PASSES.items() if loss in self.weights]
        if not alpha or not passes:
            return {}
        own_context = self.arguments.mim_text_context == "own" or online.text_context is None
        return self.teacher(
            **self._clean(batch),
            **self._masked(batch, passes),
            checked=True,
            passes=tuple(passes),
            image_states=self._keys(student, batch)["image states"],
            text_context=None if own_context else online.text_context.detach(),
        )

    def _keywords(self, online, batch: Batch) -> torch.Tensor:
        """The words that the picture is to be labelled with, (B, V)."""
        if "keyword_targets" in batch:
            return batch["keyword_targets"]
        own = self.arguments.psl_image_states == "own"
        states = None if own else online.image_states.detach()
        clean = self._clean(batch)
        made = self.teacher(**clean, passes=("keywords",), image_states=states, checked=True)
        return keyword_targets(
            in_full(made.keyword_attention),
            clean["input_ids"],
            self.config.vocab_size,
            self.config.cls_token_id,
            self.arguments.keywords_per_head,
            self.arguments.keywords,
        )

    @torch.no_grad()
    def _codes(self, batch: Batch) -> torch.Tensor:
        """The image tokenizer's words of each patch, (B, N)."""
        if "visual_codes" in batch:
            return batch["visual_codes"]
        if self.tokenizer is None or "code_pixel_values" not in batch:
            raise ValueError(
                "mim predicts an image tokenizer's codes: expected image_tokenizer (a DiscreteVAE's directory) with "
                f"code_crop, or visual_codes in the batch; got image_tokenizer {self.arguments.image_tokenizer!r} and "
                f"a batch of {sorted(batch)}"
            )
        return self.tokenizer.get_codebook_indices(batch["code_pixel_values"])

    @torch.no_grad()
    def _negatives(
        self, student: nn.Module, batch: Batch, images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """
        A hard negative picture of each text, then a text of each picture, never of the own id; and what ITM is to
        answer for the three of them (3B,), -100 where a pair has no negative.
        """
        ids = batch["ids"]
        allowed = ids[:, None] != ids[None, :]
        allowed.fill_diagonal_(False)
        if "negative_images" in batch and "negative_texts" in batch:
            chosen = batch["negative_images"], batch["negative_texts"]
            possible = [torch.ones_like(ids, dtype=torch.bool)] * 2
        else:
            keys = self._keys(student, batch)
            toward_images = (in_full(texts) @ in_full(keys["image"]).T / temperature).softmax(1)
            toward_texts = (in_full(images) @ in_full(keys["text"]).T / temperature).softmax(1)
            drawn = [draw_negatives(weights, allowed) for weights in (toward_images, toward_texts)]
            chosen, possible = tuple(columns for columns, _ in drawn), [found for _, found in drawn]
        negatives = [torch.where(found, 0, -100) for found in possible]
        return chosen, torch.cat([torch.ones_like(ids), *negatives])

    @torch.no_grad()
    def _keys(self, student: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The teacher's embeddings and states of the batch at hand, made once."""
        if self._kept is None or self._kept[0] is not batch:
            passes = ("contrast", "concepts") if "psl" in self.weights else ("contrast",)
            made = self.teacher(**self._clean(batch), passes=passes, checked=True)
            keys = {"image": made.image_embeds, "text": made.text_embeds, "image states": made.image_states}
            self._kept = (batch, {**keys, "concepts": made.concept_logits})
        return self._kept[1]

    @torch.no_grad()
    def targets(self, student: nn.Module, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        """The teacher's embeddings (B, P); ids (B,)."""
        targets = {"ids": batch["ids"]}
        if "itc" in self.weights:
            keys = self._keys(student, batch)
            targets |= {f"key of {name}": in_full(keys[name]) for name in ("image", "text")}
        self._kept = None  # nothing is held between steps
        return targets

    def compare(
        self, rows: dict[str, torch.Tensor], common: dict[str, torch.Tensor], targets: Batch, progress: float
    ) -> dict[str, torch.Tensor]:
        """ITC against this process's keys and the queues (equations 2 to 4)."""
        if "itc" not in self.weights:
            return {}
        own = {name: targets[f"key of {name}"] for name in ("image", "text")}
        ids, positives = targets["ids"], None
        if self.arguments.match_ids:
            positives = ids[:, None] == torch.cat([ids, self.queue.ids])[None, :]
        losses = []
        for name, other in (("image", "text"), ("text", "image")):
            keys = torch.cat([own[other], self.queue.rows[other].to(own[other].dtype)])
            losses.append(
                distilled_contrast(rows[name], own[name], keys, common["temperature"], self.alpha(progress), positives)
            )
        # the code that forgets them leaves the ids of an empty place
        kept_ids = ids if self.arguments.enqueue_ids else torch.full_like(ids, -100)
        gathered = {name: gather_without_gradient(value) for name, value in own.items()}
        self._newest = (gathered, gather_without_gradient(kept_ids))
        return {"itc": torch.stack(losses).mean()}

    def weigh(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(self.weights[name] * part for name, part in parts.items())

    def teachers(self) -> tuple[EMATeacher, ...]:
        return (self.teacher,)

    def after_step(self, applied: torch.Tensor | None = None) -> None:
        if self._newest is not None:
            self.queue.push(*self._newest, applied)
            self._newest = None

    def to(self, device: torch.device) -> "SimlaObjective":
        self.teacher.to(device)
        for part in (self.queue, self.tokenizer):
            if part is not None:
                part.to(device)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        if self.queue is not None:
            state |= {f"queue.{name}": value for name, value in self.queue.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.teacher.load_state_dict(under("teacher."))
        if self.queue is not None:
            self.queue.load_state_dict(under("queue."))


def _checked_weights(arguments: SimlaObjectiveArguments) -> dict[str, float]:
    """The weight of each loss. Raises `ValueError`."""
    losses = arguments.losses
    if not losses or any(name not in LOSSES for name in losses):
        raise ValueError(f"losses are {losses}; expected a non-empty subset of {list(LOSSES)}")
    if len(set(losses)) < len(losses):
        raise ValueError(f"losses are {losses}; expected each once (loss_weights makes one count more)")
    weights = arguments.loss_weights or {}
    if foreign := [name for name in weights if name not in losses]:
        raise ValueError(f"loss_weights name {foreign}, which are not among the losses {losses}")
    for name, known in CHOICES.items():
        if getattr(arguments, name) not in known:
            raise ValueError(f"{name} is {getattr(arguments, name)!r}; expected one of {list(known)}")
    for name in ("distillation", "distillation_ramp"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}; expected a share in [0, 1]")
    for name in ("keywords_per_head", "keywords"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}; expected at least 1")
    return {name: float(weights.get(name, 1.0)) for name in LOSSES if name in losses}


def _patch_places(batch: Batch) -> torch.Tensor:
    """Masked patches in the flat (B, N), from the collator, so that no accelerator has to stop for them. -> (K,)."""
    if "mim_index" in batch:
        return batch["mim_index"]
    return batch["bool_masked_pos"].flatten().nonzero().flatten()
