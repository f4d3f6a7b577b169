"""Attention of [CLS] to the patches of an image, alone and with a text (Figure 1, bottom left, of the OneR paper).

A text changes the attention by "simple token sequence concatenation": [CLS], patches and tokens form one sequence. The
[CLS] row of the attention matrix then shows to which patches the text adds attention, and from which it takes it.

Shapes: B pictures, N = h*w patches (row-major), L = 1 + N + tokens + padding positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oner.modeling.vl_outputs import PADDING_TOKEN
from oner.training.private_names import attention_implementation

from .localization import pointing
from .sheets import (
    Panel,
    Row,
    describe,
    draw_scenes,
    evaluating,
    heat_sheet,
    on_device,
    patch_grid,
    pictures_as_seen,
    quarter,
    wrapped,
)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """
    Uses the eager attention kernel, the only one that returns probabilities; afterwards restores the previous one.
    """
    before = attention_implementation(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cls_attention_rows(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str] | None = None,
    layer: int = -1,
    batch_size: int = 32,
) -> list[Tensor]:
    """The attention of [CLS] to every position, averaged over the heads of `layer`: one (L,) per image, on the CPU.

    The positions are [CLS], the N patches, then the tokens of the text, without padding. Each row sums to 1. In models
    with cross-attention it is the text's [CLS], and the row (1 + N,) has no tokens.

    Raises:
        ValueError: the numbers of images and texts differ.
    """
    if texts is not None and len(texts) != len(images):
        raise ValueError(f"expected one text for each picture, got {len(images)} pictures and {len(texts)} texts")
    rows: list[Tensor] = []
    with evaluating(model), eager_attention(model):
        for start in range(0, len(images), batch_size):
            chosen = slice(start, start + batch_size)
            text = {} if texts is None else {"text": list(texts[chosen]), "padding": True, "truncation": True}
            batch = on_device(processor(images=list(images[chosen]), return_tensors="pt", **text), model)

            # the tower without heads, because only it returns attention for all three kinds of input
            outputs = model.base_model(**batch, output_attentions=True)
            crossing = getattr(outputs, "cross_attentions", None) if texts is not None else None
            attentions = crossing or outputs.attentions  # one of (B, heads, L, L) for each layer
            mean = attentions[layer].float().mean(1)[:, 0].cpu()  # (B, L)

            # remove padding, which can only follow the tokens of a joint sequence
            real = (outputs.token_types != PADDING_TOKEN).sum(1).cpu()  # (B,)
            lengths = [mean.shape[1]] * len(mean) if crossing else real.tolist()
            rows += [row[:length] for row, length in zip(mean, lengths, strict=True)]
    return rows


def attention_maps(
    model: Any, processor: Any, images: Sequence[Any], texts: Sequence[str] | None = None, layer: int = -1
) -> Tensor:
    """The patches' part of `cls_attention_rows`: (B, h, w), not renormalised."""
    rows = cls_attention_rows(model, processor, images, texts, layer)
    h, w = patch_grid(processor(images=[images[0]], return_tensors="pt")["pixel_values"], model)
    return torch.stack([row[1 : 1 + h * w] for row in rows]).reshape(-1, h, w)  # (B, h, w)


def cls_attention(model: Any, processor: Any, image: Any, text: str | None = None, layer: int = -1) -> Tensor:
    """Attention (h, w) of [CLS] to the patches of `image`, averaged over the heads of `layer`, with or without `text`
    in the sequence; the rest to a sum of 1 went to [CLS] itself and to the text."""
    return attention_maps(model, processor, [image], None if text is None else [text], layer)[0]


def head_maps(model: Any, processor: Any, images: Sequence[Any], layer: int = -1) -> Tensor:
    """Attention (B, heads, h, w) of [CLS] to the patches of images without text, per head, not renormalised."""
    with evaluating(model), eager_attention(model):
        batch = on_device(processor(images=list(images), return_tensors="pt"), model)
        attention = model.base_model(**batch, output_attentions=True).attentions[layer]  # (B, heads, L, L)
        h, w = patch_grid(batch["pixel_values"], model)
    return attention[:, :, 0, 1 : 1 + h * w].float().cpu().unflatten(-1, (h, w))  # (B, heads, h, w)


def heads_sheet(model: Any, processor: Any, images: Sequence[Any], layer: int = -1) -> Any:
    """A Figure with one row per image: the image, then the attention of [CLS] in each head (SIMLA, Figure 2).

    Below each map is the share of the head's attention on the patches.
    """
    rows = []
    for seen, heads in zip(
        pictures_as_seen(images, processor), head_maps(model, processor, images, layer), strict=True
    ):
        maps = [Panel(seen, heat, f"head {i + 1}", f"{heat.sum():.0%} on patches") for i, heat in enumerate(heads)]
        rows.append([Panel(seen, above="picture"), *maps])
    where = "last layer" if layer == -1 else f"layer {layer}"
    title = f"{describe(model)}: attention of [CLS] to the patches, {where}, head by head; each map on its own scale"
    return heat_sheet(rows, title)


def attention_sheet(
    model: Any, processor: Any, images: Sequence[Any], texts: Sequence[Sequence[str]], layer: int = -1
) -> Any:
    """A Figure with one row per image: the image, [CLS] attention without text, then with each of its texts.

    Below each map is the share of the attention on the patches.
    """
    # all maps in two passes: each image alone, and each with all of its texts
    seen = pictures_as_seen(images, processor)  # (B, H, W, 3)
    pairs = [(i, text) for i, asked in enumerate(texts) for text in asked]
    alone = attention_maps(model, processor, images, layer=layer)
    steered = attention_maps(model, processor, [images[i] for i, _ in pairs], [text for _, text in pairs], layer)

    # one row of panels per image
    rows = [
        [Panel(picture, above="picture"), Panel(picture, heat, "no words", f"{heat.sum():.0%} on patches")]
        for picture, heat in zip(seen, alone, strict=True)
    ]
    for (i, text), heat in zip(pairs, steered, strict=True):
        rows[i].append(Panel(seen[i], heat, "+ " + wrapped(text), f"{heat.sum():.0%} on patches"))

    where = "last layer" if layer == -1 else f"layer {layer}"
    title = (
        f"{describe(model)}: attention of [CLS] to the patches, {where}, mean of heads, alone and with words "
        "in the sequence; blue low, red high, each map on its own scale"
    )
    return heat_sheet(rows, title)


def share_in_quarter(maps: Tensor, asked: Sequence[int]) -> float:
    """Mean share of the patches' attention (B, h, w) in the requested quarter; 1/4 if it is uniform."""
    shares = []
    for one, index in zip(maps, asked, strict=True):
        rows, columns = quarter(*one.shape, index)
        shares.append(float(one[rows, columns].sum() / one.sum()))
    return sum(shares) / len(shares)


class AttentionEvaluator:
    """Measures whether a text draws the attention of [CLS] to its picture among four, and draws attention maps.

    The scenes of four pictures are our way to measure the paper's figure.

    Args:
        rows: `{"image", "captions", "id"}`.
        queries: (image, texts) for the sheet; by default scenes of four with two of their captions.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        queries: Sequence[tuple[Any, Sequence[str]]] | None = None,
        scenes: int = 100,
        shown: int = 5,
        layer: int = -1,
        seed: int = 0,
        name: str = "attention",
    ) -> None:
        self.rows = rows
        self.queries = queries
        self.scenes = scenes
        self.shown = shown
        self.layer = layer
        self.seed = seed
        self.name = name

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "attention of [CLS] in a picture of four, alone and with the caption of one of them",
            "layer": self.layer,
            "heads": "mean",
            "scenes": self.scenes,
            "share": "of the attention that falls on patches; even spread: 0.25",
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Yields the share of attention on the named quarter without and with its caption (uniform: 25 %), how often
        the highest patch is there, the share on the caption itself, and two sheets."""
        scenes = draw_scenes(self.rows, self.scenes, self.seed)
        images = [scene.image for scene in scenes]
        asked = [scene.asked for scene in scenes]
        texts = [scene.words[scene.asked] for scene in scenes]

        # the same scenes, alone and with the caption of one quarter
        alone = attention_maps(model, processor, images, layer=self.layer)
        steered = attention_maps(model, processor, images, texts, self.layer)
        for name, maps in (("without_words", alone), ("with_words", steered)):
            yield f"{self.name}/share_on_named_{name}", share_in_quarter(maps, asked)
            yield f"{self.name}/peak_on_named_{name}", pointing(maps, asked)[0]

        # the attention on the tokens, which are last in a row
        rows = cls_attention_rows(model, processor, images, texts, self.layer)
        patches = alone[0].numel()
        yield f"{self.name}/share_to_words", sum(float(row[1 + patches :].sum()) for row in rows) / len(rows)

        # the sheet: a scene with the captions of one quarter and of the next
        queries = self.queries or [
            (s.image, (s.words[s.asked], s.words[(s.asked + 1) % 4])) for s in scenes[: self.shown]
        ]
        pictures = [image for image, _ in queries]
        texts = [texts for _, texts in queries]
        yield f"{self.name}/sheet", attention_sheet(model, processor, pictures, texts, self.layer)
        yield f"{self.name}/heads_sheet", heads_sheet(model, processor, pictures, self.layer)
