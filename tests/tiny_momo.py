"""A MoMo small enough to check by hand: OneR's little pairs, of which masked words and patches are not seen.

B pairs, N = 16 patches of 4 pixels, W word slots, D = 32, decoders of 16, V = 50 tokens.
"""

import torch
from tiny_oner import CLS, IMAGE, MASK, VOCAB, joint_batch

from oner import MomoConfig

# losses of a batch of pairs; others read texts or images
PAIRED = ("itc", "cmm", "itm")
# arguments of examples/pretrain.py, with real images and a model of some thousand weights
SHRUNK = {
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "image_size": 32,
        "projection_dim": 16,
        "max_text_length": 16,
    },
}
RUN = {
    "model_config": {**SHRUNK["model_config"], "decoders": ["pair"], "save_decoders": True},
    "losses": list(PAIRED),
    "corruption": "drop",
    "mlm_probability": 0.5,
    "mim_ratio": [0.75, 0.75],
}
OBJECTIVE = {"losses": list(PAIRED)}
# nothing is drawn but negatives, and those are recorded in a batch
APART = {"attention_dropout": 0.0}
DRAWN = {"attention_dropout": 0.1}


def tiny_config(**overrides) -> MomoConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "max_text_length": 12,
        "projection_dim": 8,
        "save_decoders": True,
        "cls_token_id": CLS,
        "image_token_id": IMAGE,
        "mask_token_id": MASK,
    }
    return MomoConfig(**{**fields, **overrides})


def make_batch(
    lengths: list[int], slots: int | None = None, seed: int = 0, dtype=torch.float32, draws: bool = True
) -> dict:
    """`joint_batch` without replaced words; with `draws` a negative image and text of every row, never its own."""
    batch = joint_batch(lengths, slots, seed, dtype)
    del batch["masked_input_ids"]
    rows = torch.arange(len(lengths))
    if draws:
        generator = torch.Generator().manual_seed(1000 + seed)
        for name in ("negative_images", "negative_texts"):
            step = torch.randint(1, max(2, len(rows)), (len(rows),), generator=generator)
            batch[name] = (rows + step) % len(rows)
    return batch


def in_one_process(objective, student, parts: list[dict], progress: float) -> tuple[torch.Tensor, dict]:
    """
    The mean of the losses of processes that hold `parts`: each has its own negatives, and contrast sees all rows.
    """
    (portion,) = objective.portions.values()
    counts = [portion.count(part) for part in parts]
    mean = {name: sum(count[name] for count in counts) / len(parts) for name in counts[0]}
    objective.before_step()
    made = [
        portion.represent(student, part, portion.targets(student, part, progress), progress, mean) for part in parts
    ]
    rows = {name: torch.cat([one.rows[name] for one in made]) for name in made[0].rows}
    ids = {"ids": torch.cat([part["ids"] for part in parts])}
    compared = portion.compare(rows, made[0].common, ids, progress)
    own = {name: sum(one.parts[name] for one in made) / len(parts) for name in made[0].parts}
    told = {**compared.parts, **own}
    return portion.weigh(told), {name: part.detach() for name, part in told.items()}


def stand_ins() -> dict[str, str]:
    """A run reads nothing beside its data."""
    return {}


__all__ = [
    "APART", "DRAWN", "OBJECTIVE", "PAIRED", "RUN", "SHRUNK", "in_one_process", "make_batch", "stand_ins",
    "tiny_config",
]  # fmt: skip
