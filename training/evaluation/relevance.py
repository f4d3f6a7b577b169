"""Computes the relevance of image patches for the prediction of a masked token (MoMo, Fig. 4).

Chefer et al., "Generic attention-model explainability" (ICCV 2021), equations 5 to 11. Each attention A is reduced to
its positive contribution to the score, the mean over heads of max(A * d score / d A, 0); relevance is propagated
through these from layer to layer.

A decoder of masked words works on the encoder's positions, so its layers count as further layers of one stack. In the
encoder no position attends to a masked one, and [MASK] replaces its state: its attentions there get no gradient, so it
has no relevance before the decoder.

B pairs, H heads, T positions of a text, S of an image, L of both in one sequence, N = h*w patches (row-major).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oner.modeling.vl_layers import SelfAttention
from oner.modeling.vl_outputs import PATCH_TOKEN, without_patches

from .attention import eager_attention, share_in_quarter
from .localization import pointing
from .sheets import Panel, Row, describe, draw_scenes, heat_sheet, on_device, patch_grid, pictures_as_seen, wrapped


def kept_parts(score: Tensor, attentions: Sequence[Tensor]) -> list[Tensor]:
    """Equation 5, A bar of each attention (B, H, Q, K) under a score: (B, Q, K), without gradient."""
    gradients = torch.autograd.grad(score, attentions)
    return [
        (attention * gradient).clamp_min(0).mean(1).detach()
        for attention, gradient in zip(attentions, gradients, strict=True)
    ]


def self_relevance(parts: Sequence[Tensor]) -> Tensor:
    """Equation 6 from layer to layer, R = R + A bar R, from the identity: (B, L, L) each -> (B, L, L)."""
    relevance = torch.eye(parts[0].shape[-1], device=parts[0].device).expand_as(parts[0])
    for part in parts:
        relevance = relevance + part @ relevance
    return relevance


def without_own(relevance: Tensor) -> Tensor:
    """Equations 8 and 9: relevance of other positions, rows normalised to 1, plus identity. (B, L, L) -> (B, L, L)."""
    identity = torch.eye(relevance.shape[-1], device=relevance.device)
    others = relevance - identity
    return others / others.sum(-1, keepdim=True).clamp_min(torch.finfo(others.dtype).tiny) + identity


def crossed_relevance(image: Sequence[Tensor], text: Sequence[Tensor], across: Sequence[Tensor]) -> Tensor:
    """
    Relevance of the image for a text with cross-attention (equations 6, 7 and 10), (B, T, S).

    Args:
        image: A bar of the image's own layers, (B, S, S) each.
        text: A bar of the text's layers, (B, T, T) each; the last of them have cross-attention.
        across: A bar of the cross-attention, (B, T, S) each.
    """
    of_image = without_own(self_relevance(image))  # (B, S, S)
    of_text = torch.eye(text[0].shape[-1], device=text[0].device).expand_as(text[0])  # (B, T, T)
    owed = torch.zeros_like(across[0])  # (B, T, S)
    for number, part in enumerate(text):
        owed = owed + part @ owed
        of_text = of_text + part @ of_text
        reading = number - (len(text) - len(across))
        if reading >= 0:
            owed = owed + without_own(of_text).mT @ across[reading] @ of_image
    return owed


def decoders_of(model: Any) -> list[Any]:
    """The modules between a tower and its MLM head: MoMo's decoders, of which a batch uses one."""
    return [module for name, module in model.named_children() if name.endswith("decoder")]


@contextmanager
def decoder_attentions(model: Any) -> Iterator[list[Tensor]]:
    """The attentions (B, H, L, L) of a model's decoders, layer by layer, as they are computed."""
    attentions: list[Tensor] = []
    layers = [module for decoder in decoders_of(model) for module in decoder.modules()]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: attentions.append(output[1]))
        for layer in layers
        if isinstance(layer, SelfAttention)
    ]
    try:
        yield attentions
    finally:
        for hook in hooks:
            hook.remove()


def masked_relevance(model: Any, batch: dict[str, Tensor], places: Tensor, token_ids: Tensor) -> Tensor:
    """
    Relevance (B, N) of the patches for the logit of a token at a masked place of each text.

    Args:
        model: A family's `...ForMaskedLM`, in eval mode.
        batch: Pairs as its processor makes them, the place masked already.
        places: (B,), index in the text's own positions, [CLS] is 0.
        token_ids: (B,), the original tokens there.

    Raises:
        ValueError: the model is in training mode, in which attention has dropout.
    """
    if model.training:
        raise ValueError("masked_relevance expects a model in eval mode; call eval() first")
    rows = torch.arange(len(places), device=places.device)
    with eager_attention(model), decoder_attentions(model) as decoding, torch.enable_grad():
        if decoders_of(model):
            outputs = model(**batch, output_attentions=True)
            patches = int((batch["input_ids"][0] == model.config.image_token_id).sum())
            logits = without_patches(outputs.logits, outputs.logits.shape[1] - patches)[rows, places]  # (B, V)
        else:
            outputs = model.base_model(**batch, output_attentions=True, return_dict=True)
            patches = int((outputs.token_types[0] == PATCH_TOKEN).sum())
            states = without_patches(outputs.last_hidden_state, outputs.last_hidden_state.shape[1] - patches)
            logits = model.lm_head(states[rows, places])  # (B, V)
        score = logits.gather(1, token_ids[:, None]).sum()

        # rows of a batch are independent, so one backward is enough for all
        attentions = [*outputs.attentions, *decoding]
        crossing = list(getattr(outputs, "cross_attentions", None) or ())
        parts = kept_parts(score, [*attentions, *crossing])

    # one sequence: [CLS], patches, text
    if not crossing:
        relevance = self_relevance(parts)  # (B, L, L)
        source = torch.where(places > 0, places + patches, places)  # (B,)
        return relevance[rows, source, 1 : 1 + patches]

    # the image's layers, the text's, and what these read
    own = parts[: model.config.num_hidden_layers]
    text = parts[model.config.num_hidden_layers : len(attentions)]
    owed = crossed_relevance(own, text, parts[len(attentions) :])  # (B, T, S)
    return owed[rows, places, 1:]


def masked_maps(
    model: Any, processor: Any, images: Sequence[Any], texts: Sequence[str], words: Sequence[int]
) -> Tensor:
    """
    `masked_relevance` of pictures and texts, the token `words[b]` of each text masked: (B, h, w).

    Raises:
        ValueError: a text without such a token.
    """
    tokenizer = processor.tokenizer
    encoded = processor(images=list(images), text=list(texts), padding=True, truncation=True, return_tensors="pt")
    batch = on_device(encoded, model)
    grid = patch_grid(batch["pixel_values"], model)
    patches = grid[0] * grid[1] if model.config.pair_layout == "joint" else 0
    places = torch.tensor(words, device=batch["input_ids"].device) + 1  # behind [CLS]
    if (places < 1).any() or (batch["attention_mask"].sum(1) - patches <= places).any():
        raise ValueError(f"expected a token of each text, got the places {list(words)}")

    # the token, and [MASK] in its place
    rows = torch.arange(len(places), device=places.device)
    token_ids = batch["input_ids"][rows, places + patches]  # (B,)
    masked = batch["input_ids"].clone()
    masked[rows, places + patches] = tokenizer.mask_token_id
    return masked_relevance(model, {**batch, "input_ids": masked}, places, token_ids).unflatten(1, grid)


def relevance_sheet(model: Any, processor: Any, images: Sequence[Any], texts: Sequence[str], most: int = 4) -> Any:
    """A Figure with one row per image: the image, then for each of the first `most` tokens of its text the relevance
    map if it is masked."""
    seen = pictures_as_seen(images, processor)  # (B, H, W, 3)
    lines = []
    for picture, image, text in zip(seen, images, texts, strict=True):
        tokens = processor.tokenizer.convert_ids_to_tokens(processor(text=text)["input_ids"][0, 1:])[:most]
        count = len(tokens)
        maps = masked_maps(model, processor, [image] * count, [text] * count, range(count))  # (count, h, w)
        told = [Panel(picture, heat, f"[MASK] = {token}") for token, heat in zip(tokens, maps, strict=True)]
        lines.append([Panel(picture, above=wrapped(text)), *told])
    return heat_sheet(
        lines, f"{describe(model)}: relevance of patches for each masked word; each map on its own scale"
    )


class RelevanceEvaluator:
    """
    Whether a masked word is read off the thing that it names, in a picture of four things, and a sheet of the maps.

    The scenes of four are this project's measure of the paper's figure.

    Args:
        rows: {"image", "captions", "id"}.
        scenes: How many pictures of four, each with the caption of one of them, a drawn token of it masked.
        shown: Pictures of the sheet, each of their first tokens masked in turn.

    Yields name/read_off_picture, the share of the words that owe the picture anything, and of these
    name/share_on_named and name/peak_on_named (even spread: 25 %); then the sheet.
    """

    def __init__(
        self, rows: Sequence[Row], scenes: int = 100, shown: int = 5, seed: int = 0, batch_size: int = 16
    ) -> None:
        self.rows = rows
        self.scenes = scenes
        self.shown = shown
        self.seed = seed
        self.batch_size = batch_size
        self.name = "relevance"

    @property
    def protocol(self) -> dict[str, Any]:
        """What the numbers mean, for the file of results."""
        return {
            "task": "relevance (Chefer et al.) of a picture of four for a masked word of the caption of one of them",
            "scenes": self.scenes,
            "share": "of the relevance of all patches; even spread: 0.25",
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Mask a word of each scene's caption and yield (name, value)."""
        scenes = draw_scenes(self.rows, self.scenes, self.seed)
        images = [scene.image for scene in scenes]
        texts = [scene.words[scene.asked] for scene in scenes]
        rng = np.random.default_rng(self.seed)
        lengths = [processor(text=text, truncation=True)["input_ids"].shape[1] - 1 for text in texts]
        words = [int(rng.integers(max(1, length))) for length in lengths]
        chunks = [slice(start, start + self.batch_size) for start in range(0, len(texts), self.batch_size)]
        maps = [masked_maps(model, processor, images[part], texts[part], words[part]).cpu() for part in chunks]
        maps = torch.cat(maps)  # (B, h, w)

        # a text that did not look has no place where it looked
        read = maps.flatten(1).sum(1) > 0  # (B,)
        yield f"{self.name}/read_off_picture", float(read.float().mean())
        if read.any():
            asked = [scene.asked for scene, looked in zip(scenes, read.tolist(), strict=True) if looked]
            yield f"{self.name}/share_on_named", share_in_quarter(maps[read], asked)
            yield f"{self.name}/peak_on_named", pointing(maps[read], asked)[0]
        shown = slice(self.shown)
        yield f"{self.name}/sheet", relevance_sheet(model, processor, images[shown], texts[shown])
