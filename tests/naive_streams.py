"""What each stream of OneR's packed step is given, and its crossed streams layer by layer, each alone."""

import torch
from tiny_oner import naive_layer, text_of

from oner import OneRForPreTraining


def three_kinds(batch: dict, masked: bool) -> dict[str, dict]:
    """What `OneRModel` would be given for each stream of the step."""
    ids = "masked_input_ids" if masked else "input_ids"
    patches = {"pixel_values": batch["pixel_values"]}
    if masked:
        patches["bool_masked_pos"] = batch["bool_masked_pos"]
    joint = {"input_ids": batch[ids], "attention_mask": batch["attention_mask"]}
    return {"image": patches, "text": text_of(batch, ids), "image_text": {**joint, **patches}}


def masks_of(batch: dict) -> dict[str, torch.Tensor]:
    joint, text = batch["attention_mask"].bool(), text_of(batch)["attention_mask"].bool()
    return {"image": joint[:, :17], "text": text, "image_text": joint}


def crossed_states(model: OneRForPreTraining, batch: dict, masked: bool) -> dict[str, torch.Tensor]:
    """F(I|T) and F(T|I) layer by layer, with the contexts the configuration names (equation 3)."""
    kinds, masks, config = three_kinds(batch, masked), masks_of(batch), model.config
    own = {}
    for name in ("image", "text"):
        inputs = {"input_ids": None, "attention_mask": None, "pixel_values": None, **kinds[name]}
        own[name], _ = model.oner.embeddings(**inputs)
    crossed = dict(own)
    key_masks = {name: masks[name].clone() for name in own}
    if not config.context_cls:
        for mask in key_masks.values():
            mask[:, 0] = False
    for number, layer in enumerate(model.oner.layers):
        last = number == len(model.oner.layers) - 1
        before, own_before = crossed, own
        contexts = before if config.context_states == "co_attention" else own_before
        crossed = {}
        for x, y in (("image", "text"), ("text", "image")):
            if config.context_states == "last_layer" and not last:
                crossed[x] = naive_layer(layer, before[x], before[x], masks[x])
            else:
                crossed[x] = naive_layer(layer, before[x], contexts[y], key_masks[y])
        own = {name: naive_layer(layer, state, state, masks[name]) for name, state in own_before.items()}
    return {name: model.oner.norm(state) for name, state in crossed.items()}
