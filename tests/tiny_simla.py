"""A SIMLA small enough to check by hand, and batches for it: the pairs of `tiny_oner` with codes and draws.

B pairs, N = 16 patches of 4 pixels, W word slots, D = 32, V = 50 words, 24 visual codes. Dropout is off: `DROPOUT`
are the fields that turn on the paper's.
"""

import atexit
import shutil
import tempfile
from functools import cache

import torch
from tiny_oner import CLS, IMAGE, MASK, VOCAB, joint_batch, randomised, text_of

from oner import DiscreteVAE, DiscreteVAEConfig, SimlaConfig

SEP, CODES = 2, 24
DROPOUT = {"hidden_dropout": 0.1, "text_attention_dropout": 0.1}
# arguments of examples/pretrain.py, with real pictures and a model of some thousand weights
SHRUNK = {
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_text_layers": 2,
        "max_position_embeddings": 32,
        "image_size": 32,
        "projection_dim": 16,
        "num_visual_codes": CODES,
        "max_text_length": 16,
    },
    "queue_size": 32,
}
RUN = {"losses": ["itc", "itm", "mlm", "mim", "psl"], "code_crop": "common"}
# nothing is drawn but negatives, and those are recorded in a batch
APART = {"hidden_dropout": 0.0, "text_attention_dropout": 0.0}
DRAWN = DROPOUT
OBJECTIVE = {"queue_size": 32}
# twelve layers of text, as the official code has them in fixed places (the last is its layer 11)
OFFICIAL_DEPTH = {"num_text_layers": 12}

__all__ = [
    "APART",
    "CLS",
    "CODES",
    "DRAWN",
    "DROPOUT",
    "IMAGE",
    "MASK",
    "OBJECTIVE",
    "OFFICIAL_DEPTH",
    "RUN",
    "SEP",
    "SHRUNK",
    "VOCAB",
    "in_one_process",
    "make_batch",
    "picture_for_codes",
    "randomised",
    "simla_batch",
    "stand_ins",
    "text_of",
    "tiny_config",
]


def tiny_config(**overrides) -> SimlaConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_text_layers": 3,
        "text_attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 32,
        "max_text_length": 12,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 8,
        "num_visual_codes": CODES,
        "answer_decoder_layers": 2,
        "grounding_layer": 1,
        "cls_token_id": CLS,
        "image_token_id": IMAGE,
        "sep_token_id": SEP,
        "mask_token_id": MASK,
    }
    return SimlaConfig(**{**fields, **overrides})


def simla_batch(
    lengths: list[int],
    slots: int | None = None,
    seed: int = 0,
    dtype=torch.float32,
    codes: bool = True,
    draws: bool = True,
    num_visual_codes: int = CODES,
) -> dict:
    """
    `tiny_oner.joint_batch` without its placeholders: texts (B, 1 + W) beside the pixels. With `codes` a code for each
    patch (B, N), with `draws` a negative picture and a negative text of every row, never the row itself, and the
    keywords of each caption, its first four words, as (B, V).
    """
    batch = joint_batch(lengths, slots, seed, dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.arange(len(lengths))
    if codes:
        batch["visual_codes"] = torch.randint(num_visual_codes, (len(rows), 16), generator=generator)
    if draws:
        for name in ("negative_images", "negative_texts"):
            step = torch.randint(1, max(2, len(rows)), (len(rows),), generator=generator)
            batch[name] = (rows + step) % len(rows)
        words = batch["input_ids"][:, 17:]
        first = words * (torch.arange(words.shape[1]) < 4)
        keywords = torch.zeros(len(rows), VOCAB, dtype=torch.bool).scatter_(1, first, True)
        keywords[:, 0] = False
        batch["keyword_targets"] = keywords
    kept = torch.tensor([0, *range(17, batch["input_ids"].shape[1])])
    laid_out = ("input_ids", "attention_mask", "masked_input_ids")
    return {name: value[:, kept] if name in laid_out else value for name, value in batch.items()}


make_batch = simla_batch


def in_one_process(objective, student, parts: list[dict], progress: float) -> tuple[torch.Tensor, dict]:
    """
    The mean of the losses of processes that hold `parts`: each has its own keys, its own negatives and the same queue,
    into which all keys go in the order of the processes.
    """
    counts = [objective.count(part) for part in parts]
    mean = {name: sum(count[name] for count in counts) / len(parts) for name in counts[0]}
    objective.before_step()
    losses, told, kept = [], [], []
    for part in parts:
        targets = objective.targets(student, part, progress)
        online = objective.represent(student, part, targets, progress, mean)
        compared = objective.compare(online.rows, online.common, targets.rows, progress)
        told.append({**compared.parts, **online.parts})
        losses.append(objective.weigh(told[-1]))
        kept.append(compared.kept)
    for newest in kept:
        objective.after_step(kept=newest)
    average = {name: sum(one[name].detach() for one in told) / len(parts) for name in told[0]}
    return sum(losses) / len(parts), average


@cache
def stand_ins() -> dict[str, str]:
    """What a run reads beside its data, made as small as the model: an image tokenizer of as many codes."""
    folder = tempfile.mkdtemp(prefix="tiny-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DiscreteVAEConfig(
            num_codes=CODES, hidden_size=8, blocks_per_group=1, codebook_dim=8, image_size=16, decoder=False
        )
        DiscreteVAE(config).save_pretrained(folder)
    return {"image_tokenizer": folder}


def picture_for_codes(batch: dict, seed: int = 0) -> torch.Tensor:
    """Pictures for an image tokenizer, of eight pixels a patch: (B, 3, 32, 32) in [0, 1]."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.rand(len(batch["input_ids"]), 3, 32, 32, generator=generator)
