"""A OneR small enough to check by hand, and batches for it in the processor's layout.

B pairs, N = 16 patches of 4 pixels, W word slots, L = 1 + N + W, D = 32.
"""

import torch

from oner import OneRConfig

CLS, IMAGE, MASK, FIRST_WORD, VOCAB = 3, 1, 4, 5, 50
# arguments of examples/pretrain.py, with real pictures and a model of some thousand weights
SHRUNK = {
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "projection_hidden_size": 32,
        "projection_dim": 16,
        "max_text_length": 16,
    },
}
RUN = {"losses": ["itc", "cmc", "mlm", "mim"]}
PAIRED = ("itc", "xmc", "cic", "cmc", "mlm", "mim")
# no batch norm, in which a row sees the others
APART = {"head_norm": "layer", "stem": "linear"}
DRAWN = {"attention_dropout": 0.1}
OBJECTIVE = {}


def tiny_config(**overrides) -> OneRConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "max_text_length": 12,
        "projection_dim": 8,
        "projection_hidden_size": 16,
        "cls_token_id": CLS,
        "image_token_id": IMAGE,
        "mask_token_id": MASK,
    }
    return OneRConfig(**{**fields, **overrides})


def randomised(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Biases and norms away from 0 and 1, so that a forgotten one shows. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim == 1 and not name.endswith(("logit_scale", "temperature")):
                parameter.add_(noise * 0.1)
    return model


def joint_batch(lengths: list[int], slots: int | None = None, seed: int = 0, dtype=torch.float32) -> dict:
    """Pairs of a 16-pixel picture and a caption of each length, with masked words and patches. Clean ids in (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    batch, patches, slots = len(lengths), 16, slots or max(1, *lengths)
    ids = torch.zeros(batch, 1 + patches + slots, dtype=torch.long)
    ids[:, 0], ids[:, 1 : 1 + patches] = CLS, IMAGE
    for row, length in enumerate(lengths):
        words = torch.randint(FIRST_WORD, VOCAB, (max(lengths),), generator=generator)[:length]
        ids[row, 1 + patches : 1 + patches + length] = words
    mask = (torch.arange(slots) < torch.tensor(lengths)[:, None]).long()
    text_index = mask.flatten().nonzero().flatten()
    # every third word is a target; rows keep theirs whatever the padding
    mlm_index = torch.arange(len(text_index))[1::3]
    words = ids[:, 1 + patches :].flatten()
    masked_words = words.clone()
    masked_words[text_index[mlm_index]] = MASK
    masked_ids = ids.clone()
    masked_ids[:, 1 + patches :] = masked_words.view(batch, slots)
    noise = torch.rand(batch, patches, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones(batch, 1 + patches, dtype=torch.long), mask], dim=1),
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype),
        "masked_input_ids": masked_ids,
        "bool_masked_pos": noise.argsort(1) < 5,  # five patches of each picture
        "text_index": text_index,
        "mlm_index": mlm_index,
        "mlm_labels": words[text_index[mlm_index]],
        "ids": torch.arange(batch),
    }


make_batch = joint_batch


def joined(parts: list[dict]) -> dict:
    """Batches of several processes as one, rows end to end, with the places of words counted from its beginning."""
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, source in (("text_index", "input_ids"), ("mlm_index", "text_index")):
        slots = [part[source][:, 17:].numel() if source == "input_ids" else len(part[source]) for part in parts]
        starts = [sum(slots[:number]) for number in range(len(parts))]
        batch[name] = torch.cat([part[name] + start for part, start in zip(parts, starts, strict=True)])
    return batch


def in_one_process(objective, student, parts: list[dict], progress: float) -> tuple[torch.Tensor, dict]:
    """The mean of the losses of processes that hold `parts`: one batch of all, for each gathers the others' keys."""
    loss, told, kept = objective(student, joined(parts), progress)
    objective.after_step(kept=kept)
    return loss, told


def stand_ins() -> dict[str, str]:
    """OneR reads nothing beside its data."""
    return {}


def text_of(batch: dict, name: str = "input_ids") -> dict:
    """The captions alone, as [CLS] and words."""
    keep = torch.tensor([0, *range(17, batch["input_ids"].shape[1])])
    return {"input_ids": batch[name][:, keep], "attention_mask": batch["attention_mask"][:, keep]}


def naive_attention(attention, queries, states, key_mask):
    """Multi-head attention, one head after another. (B, L, D), (B, L', D), (B, L') bool -> (B, L, D)."""
    width, d = queries.shape[-1], attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    heads = []
    for start in range(0, width, d):
        rows = [slice(part * width + start, part * width + start + d) for part in range(3)]
        q = queries @ weight[rows[0]].T + bias[rows[0]]
        k = states @ weight[rows[1]].T + bias[rows[1]]
        v = states @ weight[rows[2]].T + bias[rows[2]]
        scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(~key_mask[:, None, :], float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias


def naive_layer(layer, states, context, key_mask):
    """One pre-norm block with keys and values from `context`, which is normed here too."""
    states = states + naive_attention(layer.attention, layer.norm1(states), layer.norm1(context), key_mask)
    inner = layer.norm2(states) @ layer.feed_forward.fc1.weight.T + layer.feed_forward.fc1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return states + inner @ layer.feed_forward.fc2.weight.T + layer.feed_forward.fc2.bias
