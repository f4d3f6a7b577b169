"""Grad-CAM of attention: the patches that made a pair match, or made the model detect a concept.

SIMLA, section 3.5 and the supplement's Figure 2; the formula is ALBEF's and SIMLA's code. With attention A and a
score, the map is A * max(d score / d A, 0): attended positions whose attention increases the score.

B pairs, H heads, T positions of a text ([CLS] first), N = h*w patches, L queries, S keys, V vocabulary size.
"""

from collections.abc import Callable

import torch
from torch import nn

from .vl_inputs import check_inputs
from .vl_layers import Watch

MODES = ("itm", "itc")
POOLS = ("padded", "real", "tokens", "none")


def attention_gradcam(attention: nn.Module, score: Callable[[Watch], torch.Tensor]) -> torch.Tensor:
    """
    A * max(d score / d A, 0), where `score(watch)` passes `watch` to its layers and runs `attention` once. The scores
    are summed; rows of a batch do not mix. -> (B, H, L, S), detached; works under `no_grad`.
    """
    watch = Watch(attention)
    with torch.enable_grad():
        total = score(watch).float().sum()
        if len(watch.weights) != 1:
            raise RuntimeError(f"the score made {len(watch.weights)} passes through the attention layer; expected 1")

        # differentiates back to A only, not the layers below
        (weights,) = watch.weights
        (gradient,) = torch.autograd.grad(total, weights)
    return (weights * gradient.clamp_min(0)).detach()


def chosen_layer(layers: nn.ModuleList, layer: int | None, default: int) -> nn.Module:
    """Layer number `layer`, from 0 (negative: from the end); None gives `default`, or the last of fewer layers.

    Raises:
        ValueError: there is no such layer.
    """
    if layer is None:
        return layers[min(default, len(layers) - 1)]
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer is {layer}; expected one of the model's {len(layers)}, from 0")
    return layers[layer]


def fusion_layer(text: nn.Module, layer: int | None, default: int) -> nn.Module:
    """`chosen_layer` among all layers of a `TextEncoder`.

    Raises:
        ValueError: there is no such layer, or it has no cross-attention.
    """
    chosen = chosen_layer(text.layers, layer, default)
    if chosen.cross_attention is None:
        raise ValueError(f"layer {layer} reads no image; expected one from {text.first_fusion} on")
    return chosen


def pool_positions(maps: torch.Tensor, mask: torch.Tensor, pool: str) -> torch.Tensor:
    """
    Pools maps of text positions, zeroed at padding: (B, T, h, w), `mask` (B, T) -> (B, h, w); "none" does not pool.

    "padded": the mean over all T, including [CLS] and padding (official code: the scale of a map then depends on the
    longest text of the batch, the ranking of boxes does not); "real": over [CLS] and tokens; "tokens": over tokens.
    """
    maps = maps * mask[..., None, None].to(maps.dtype)
    if pool == "none":
        return maps
    if pool == "padded":
        return maps.mean(1)

    # the mean over a text's own positions, independent of the batch
    kept = mask.clone()
    if pool == "tokens":
        kept[:, 0] = 0
    kept = kept.to(maps.dtype)
    return torch.einsum("bthw,bt->bhw", maps, kept) / kept.sum(1).clamp_min(1)[:, None, None]


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or, if it was created under `inference_mode`, a copy that autograd accepts."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


class GroundedMatching:
    """Mixin for a dual encoder with a matching head, beside `RetrievalFeatures` and `ImageTextMatching`: `ground`."""

    grounding_modes = MODES

    def ground(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        layer: int | None = None,
        mode: str = "itm",
        pool: str = "padded",
    ) -> torch.Tensor:
        r"""
        Locates texts in images (section 3.5): Grad-CAM maps (B, h, w), non-negative, without a fixed scale.

        Args:
            input_ids, attention_mask (`(B, T)`): The texts.
            pixel_values (`(B, C, H, W)`): The images.
            layer: From 0; `config.grounding_layer` by default.
            mode: "itm": cross-attention of `layer`, by the logit that the pair matches. "itc": self-attention of the
                visual encoder's [CLS] in its `layer`, by the contrastive similarity of the pair.
            pool: How the maps of the text's positions become one ("itm" only), see `pool_positions`; "none" gives
                each position's, (B, T, h, w), in the order [CLS], tokens.

        Raises:
            ValueError: the model is in training mode, there are no images, or the mode, pool or layer does not exist.
        """
        _check_request(self, mode, pool, pixel_values)
        with torch.inference_mode(False), torch.no_grad():
            input_ids, attention_mask, pixel_values = map(_plain, (input_ids, attention_mask, pixel_values))
            check_inputs(self.tower, input_ids, attention_mask, pixel_values)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
            grid = _grid(pixel_values, self.config.patch_size)

            # self-attention of the visual encoder
            if mode == "itc":
                return self._ground_by_contrast(input_ids, mask, pixel_values, layer).unflatten(1, grid)

            # cross-attention from text positions to patches
            states = self.tower.vision(pixel_values)  # (B, 1 + N, D)
            attention = fusion_layer(self.tower.text, layer, self.config.grounding_layer).cross_attention
            cam = attention_gradcam(
                attention, lambda watch: self.matching_logits(input_ids, mask, states, watch=watch)[:, 1]
            )
            maps = cam[..., 1:].mean(1).unflatten(2, grid)  # (B, H, T, 1 + N) -> (B, T, h, w)
            return pool_positions(maps, mask, pool)

    def _ground_by_contrast(
        self, text_ids: torch.Tensor, text_mask: torch.Tensor, pixel_values: torch.Tensor, layer: int | None
    ) -> torch.Tensor:
        """Grad-CAM of each pair's cosine divided by the temperature. -> (B, N)"""
        tower, temperature = self.tower, self.temperature.detach()
        text = tower.embed_texts(tower.encode_texts(text_ids, text_mask))  # (B, P)

        def score(watch: Watch) -> torch.Tensor:
            image = tower.embed_images(tower.vision(pixel_values, watch=watch))  # (B, P)
            return (image * text).sum(-1) / temperature  # (B,)

        attention = chosen_layer(tower.vision.layers, layer, self.config.grounding_layer).attention
        return attention_gradcam(attention, score)[:, :, 0, 1:].mean(1)  # (B, H, N) -> (B, N)


def _check_request(model: nn.Module, mode: str, pool: str, pixel_values: torch.Tensor | None) -> None:
    if model.training:
        raise ValueError("ground() expects a model in eval mode, whose attention has no dropout; call eval() first")
    if pixel_values is None:
        raise ValueError("ground() expects pixel_values, got None")
    if mode not in MODES or pool not in POOLS:
        raise ValueError(f"expected mode of {MODES} and pool of {POOLS}, got {mode!r} and {pool!r}")


class GroundedConcepts:
    """Mixin beside `RetrievalFeatures`, for a model with a `concept_head` on the image's [CLS]."""

    def concepts(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        """The concept head's logits (B, V) for images alone (section 2.4): the tokens detected in them."""
        check_inputs(self.tower, None, None, pixel_values)
        return self.concept_logits(pixel_values)

    def concept_logits(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """`concepts` without input checks. (B, C, H, W) -> (B, V)."""
        states = self.tower.vision(pixel_values, **kwargs)  # (B, 1 + N, D)
        projected = self.config.concept_input == "projected"
        return self.concept_head(self.tower.embed_images(states) if projected else states[:, 0])

    def ground_concepts(
        self, pixel_values: torch.FloatTensor, token_ids: torch.LongTensor, layer: int | None = None
    ) -> torch.Tensor:
        """
        Locates a token that the concept head detects in an image (supplement, Figure 2): Grad-CAM (B, h, w) of the
        visual encoder's [CLS] attention. The paper does not name the layer; the default is `config.grounding_layer`.

        Args:
            pixel_values (`(B, C, H, W)`): The images.
            token_ids (`(B,)`): One token id per image.

        Raises:
            ValueError: the model is in training mode, the numbers of tokens and images differ, or there is no such
                layer.
        """
        if self.training:
            raise ValueError("ground_concepts() expects a model in eval mode; call eval() first")
        if token_ids.shape != (len(pixel_values),):
            raise ValueError(f"expected one token id a picture, got {tuple(token_ids.shape)} for {len(pixel_values)}")
        check_inputs(self.tower, None, None, pixel_values)
        attention = chosen_layer(self.tower.vision.layers, layer, self.config.grounding_layer).attention
        with torch.inference_mode(False):
            pixel_values, token_ids = _plain(pixel_values), _plain(token_ids)
            cam = attention_gradcam(
                attention, lambda watch: self.concept_logits(pixel_values, watch=watch).gather(1, token_ids[:, None])
            )
        maps = cam[:, :, 0, 1:].mean(1)  # (B, H, 1 + N, 1 + N) -> (B, N)
        return maps.unflatten(1, _grid(pixel_values, self.config.patch_size))


__all__ = ["GroundedConcepts", "GroundedMatching", "attention_gradcam"]
