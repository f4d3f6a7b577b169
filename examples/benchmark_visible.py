"""What dropping tokens saves: MoMo's steps that drop, beside the same steps that drop next to nothing.

What time should do, tokens say: of the encoder alone the share that is visible; of a step also what decoders and heads
read, which is all tokens and the dropped ones. Attention's own products, which fall with the square, are left out.

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
# (loss, rows, masked share of tokens, of patches), as the stages have it (sections 3.1 and 4.1)
KINDS = {"images": ("mim", 16, 0.0, 0.75), "texts": ("mlm", 32, 0.15, 0.0), "pairs": ("cmm", 12, 0.75, 0.75)}
LENGTHS = (24, 96, 60, 36, 80, 48, 72, 90)  # tokens of texts, in turn


class VisibleStep:
    """
    The pass of one kind of rows, forward and backward; what an optimiser costs depends on no token.

    Args:
        fields: Over the paper's model at DeiT's tiny width: 12 layers of 192, decoders of 4 by 128.
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
        """One that drops its stage's shares, or a patch of each image and a token of all texts."""
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
        """From pixels and ids to the states of what is seen, and back."""
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
        """How many the encoder reads, a decoder reads, and heads of pixels and of words."""
        rows, images, texts = len(batch["ids"]), "pixel_values" in batch, "text_index" in batch
        masked = {"pixels": len(batch["mim_index"]) if images else 0, "words": len(batch["mlm_index"]) if texts else 0}
        patches = batch["bool_masked_pos"].numel() if images else 0
        decoded = rows + patches + (len(batch["text_index"]) if texts else 0)
        return {"encoder": decoded - sum(masked.values()), "decoder": decoded, "patches": patches, **masked}

    def work(self, batch: Batch) -> float:
        """Multiply-adds of a forward, but those of attention's own products."""
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
    """Of a call: on a CPU the time that the process got, whatever else runs there."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait_for(device)
    start = clock()
    function()
    wait_for(device)
    return clock() - start


def measure_visible(device: torch.device, half: bool, repeats: int = 5) -> dict[str, dict[str, float]]:
    """
    By kind of rows: `encoder_share` of its tokens that are seen and `step_share` of a step's multiply-adds, each with
    what the time did (`encoder_time`, `step_time`), medians of turns that alternate.
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
                    if turn:  # the first chooses kernels
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
