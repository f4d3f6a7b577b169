"""What dropping tokens saves: MoMo's steps, compared with the same steps that drop almost nothing.

The expected time follows from the number of tokens: for the encoder, the share that is visible; for a step, also what
decoders (all tokens) and heads (the dropped ones) read. The products inside attention, which shrink quadratically, are
not counted.

B rows, N = 196 patches, D width of the encoder, E of a decoder.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from oner import MomoConfig, MomoForPreTraining
from oner.modeling.vl_ragged import Joined, Ragged, complement
from oner.training.cost.flops import wait_for
from oner.training.objectives.examples import Example
from oner.training.objectives.momo import DECODES, MomoObjective, MomoObjectiveArguments

Batch = dict[str, torch.Tensor]
# (loss, rows, masked share of tokens, of patches) of the stages (sections 3.1 and 4.1)
KINDS = {"images": ("mim", 16, 0.0, 0.75), "texts": ("mlm", 32, 0.15, 0.0), "pairs": ("cmm", 12, 0.75, 0.75)}
LENGTHS = (24, 96, 60, 36, 80, 48, 72, 90)  # lengths of texts in tokens, in turn


class VisibleStep:
    """
    Forward and backward for one kind of rows; without the optimiser, whose cost does not depend on tokens.

    Args:
        fields: Changes to the paper's model at DeiT's tiny width: 12 layers of width 192, decoders of 4 by 128.
    """

    def __init__(self, kind: str, device: torch.device, half: bool, **fields: Any):
        self.kind, self.device, self.half = kind, device, half
        self.loss = KINDS[kind][0]
        fields = {"vocab_size": 8000, "max_text_length": 96, "decoders": [DECODES[self.loss]], **fields}
        self.config = MomoConfig.from_size("tiny", **fields)
        torch.manual_seed(0)
        self.model = MomoForPreTraining(self.config).to(device).train()
        if device.type == "cpu":
            self.model.set_attn_implementation("eager")  # docs/performance.md
        self.objective = MomoObjective(self.model, MomoObjectiveArguments(losses=[self.loss]))

    def batch(self, drops: bool, rows: int | None = None) -> Batch:
        """A batch that drops its stage's shares, or only one patch per image and one token in total."""
        _, usual, words, patches = KINDS[self.kind]
        most = self.config.max_text_length
        lengths = [min(LENGTHS[row % len(LENGTHS)], most) for row in range(rows or usual)]
        if not drops:
            words, patches = 1 / sum(lengths), 1.5 / (self.config.image_size // self.config.patch_size) ** 2
        made = MomoObjective.example_batches(self.config, lengths, Example(words, patches))[self.kind]
        return {name: value.to(self.device) for name, value in made.items()}

    def step(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.objective(self.model, batch, 0.5).loss
        loss.backward()
        self.model.zero_grad()

    def encoder(self, batch: Batch) -> None:
        """Forward from pixels and ids to the states of visible tokens, and backward."""
        tower = self.model.momo
        rows = len(batch["ids"])
        parts = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if "pixel_values" in batch:
                patches = Ragged.of_rectangle(tower.embeddings.embed_patches(batch["pixel_values"]))  # B * N
                parts.append(patches.keep(complement(batch["mim_index"], len(patches.row))))
            if "text_index" in batch:
                head = 1 + (batch["bool_masked_pos"].shape[1] if "pixel_values" in batch else 0)
                ids = batch["input_ids"][:, head:]  # (B, W)
                slots = batch["text_index"] % ids.shape[1]  # (n,)
                tokens = tower.embeddings.embed_tokens(ids.flatten()[batch["text_index"]], slots)  # (n, D)
                words = Ragged(tokens, batch["text_index"] // ids.shape[1], rows)
                parts.append(words.keep(complement(batch["mlm_index"], len(tokens))))
            seen = Joined.of(parts).whole
            ((cls, states),) = tower.encode_visible([(tower.embeddings.embed_cls(rows)[:, 0], seen)])
        (cls.float().sum() + states.float().sum()).backward()
        self.model.zero_grad()

    def tokens(self, batch: Batch) -> dict[str, int]:
        """The number of tokens that the encoder, a decoder, and the heads for pixels and for words read."""
        rows, images, texts = len(batch["ids"]), "pixel_values" in batch, "text_index" in batch
        masked = {"pixels": len(batch["mim_index"]) if images else 0, "words": len(batch["mlm_index"]) if texts else 0}
        patches = batch["bool_masked_pos"].numel() if images else 0
        decoded = rows + patches + (len(batch["text_index"]) if texts else 0)
        return {"encoder": decoded - sum(masked.values()), "decoder": decoded, "patches": patches, **masked}

    def work(self, batch: Batch) -> float:
        """Multiply-adds of a forward pass, except for the products inside attention."""
        c, tokens = self.config, self.tokens(batch)
        pixels = c.patch_size**2 * c.num_channels
        head = c.decoder_hidden_size * c.hidden_size + c.hidden_size * c.vocab_size
        return (
            tokens["patches"] * pixels * c.hidden_size
            + tokens["encoder"] * c.num_hidden_layers * 12 * c.hidden_size**2
            + tokens["encoder"] * c.hidden_size * c.decoder_hidden_size
            + tokens["decoder"] * c.decoder_num_hidden_layers * 12 * c.decoder_hidden_size**2
            + tokens["pixels"] * c.decoder_hidden_size * pixels
            + tokens["words"] * head
        )


def seconds_of(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call; on a CPU, CPU time of the process, so that other processes do not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait_for(device)
    start = clock()
    function()
    wait_for(device)
    return clock() - start


def measure_visible(device: torch.device, half: bool, repeats: int = 5) -> dict[str, dict[str, float]]:
    """
    By kind of rows: `encoder_share`, the share of tokens that are visible, `step_share`, the share of a step's
    multiply-adds, and the measured shares of time (`encoder_time`, `step_time`), medians over alternating rounds.
    """
    found = {}
    for kind in KINDS:
        run = VisibleStep(kind, device, half)
        batches = {"dropped": run.batch(True), "whole": run.batch(False)}
        seconds: dict[tuple[str, str], list[float]] = {}
        for turn in range(repeats + 1):
            for what, call in (("encoder", run.encoder), ("step", run.step)):
                for way, batch in batches.items():
                    took = seconds_of(lambda call=call, batch=batch: call(batch), device)
                    if turn:  # the first round is warm-up
                        seconds.setdefault((what, way), []).append(took)
        read = {way: run.tokens(batch)["encoder"] for way, batch in batches.items()}
        median = {case: statistics.median(times) for case, times in seconds.items()}
        found[kind] = {
            "encoder_share": read["dropped"] / read["whole"],
            "encoder_time": median["encoder", "dropped"] / median["encoder", "whole"],
            "step_share": run.work(batches["dropped"]) / run.work(batches["whole"]),
            "step_time": median["step", "dropped"] / median["step", "whole"],
            **{f"{what}_{way}_seconds": value for (what, way), value in median.items()},
        }
    return found
