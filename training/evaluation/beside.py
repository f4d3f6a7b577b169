"""Sheets that compare several models: where each finds a text in an image (OneR, Figures 3 and 6), and how images and
texts are distributed in each space (Figure 4: two systems, or the start and the end of a run).

Shapes: B pictures, N = h*w patches, P projection.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPModel

from oner.modeling.vl_localization import patch_word_cosine
from oner.processing.image_processing_vl import open_image

from .embedding import batches, embed_images, embed_texts, row_ids
from .gap import draw_clouds, paired_cosines, tsne
from .grounding import as_seen, grounding_maps
from .metrics import centroid_distance
from .sheets import (
    Panel,
    Row,
    evaluating,
    heat_sheet,
    new_figure,
    on_device,
    one_of_each_id,
    patch_grid,
    pictures_as_seen,
    wrapped,
)


class Named(NamedTuple):
    """A model with its processor, and its name on the sheet."""

    name: str
    model: Any
    processor: Any


def clip_maps(
    model: CLIPModel, processor: Any, images: Sequence[Any], texts: Sequence[str], batch_size: int = 32
) -> Tensor:
    """Cosines (B, h, w), on the CPU, for transformers' CLIP. Patch states go through the last norm and the projection,
    as [CLS] does, since they are not in the space of texts before."""
    maps = []
    with evaluating(model):
        for chosen in batches(len(texts), batch_size, "pairs", False):
            batch = processor(
                images=list(images[chosen]),
                text=list(texts[chosen]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            batch = on_device(batch, model)
            pixels = batch.pop("pixel_values")  # (b, 3, H, W)

            # states of the vision tower in the space of both
            states = model.vision_model(pixels).last_hidden_state[:, 1:]  # (b, N, D)
            patches = model.visual_projection(model.vision_model.post_layernorm(states))  # (b, N, P)
            words = model.get_text_features(**batch).pooler_output  # (b, P)
            cosines = patch_word_cosine(patches, words)  # (b, N)
            maps.append(cosines.unflatten(1, patch_grid(pixels, model.vision_model)).cpu())
    return torch.cat(maps)


def map_columns(named: Named, images: Sequence[Any], texts: Sequence[str]) -> Iterator[list[Panel]]:
    """Panels of each image as the model sees it, with its map: one column for each of the model's grounding modes.

    Raises:
        TypeError: the model is neither transformers' CLIP nor has `ground`.
    """
    if hasattr(named.model, "ground"):
        seen = [as_seen(image) for image in images]  # (H, W, 3) each, all of it under the map
        for mode in named.model.grounding_modes:
            maps = grounding_maps(named.model, named.processor, images, texts, mode=mode)
            yield column(f"{named.name}\n{mode}", seen, maps)
    elif isinstance(named.model, CLIPModel):
        seen = pictures_as_seen(images, named.processor)  # (B, H, W, 3), cut to a square
        yield column(f"{named.name}\ncosine", seen, clip_maps(named.model, named.processor, images, texts))
    else:
        raise TypeError(f"maps need a model with ground(), or CLIP; {named.name} is a {type(named.model).__name__}")


def column(title: str, seen: Sequence[Tensor], maps: Tensor) -> list[Panel]:
    """Panels of images with maps (B, h, w), and the range of each map below it."""
    return [
        Panel(image, heat, title, f"{heat.min():.2f} to {heat.max():.2f}")
        for image, heat in zip(seen, maps, strict=True)
    ]


def maps_beside(models: Sequence[Named], rows: Sequence[Row], count: int = 6, seed: int = 0) -> Any:
    """A Figure with one row for each of `count` images with different ids: the image and its first caption, then the
    map of each model, on its own scale."""
    chosen = one_of_each_id(rows, count, seed)
    images = [open_image(row["image"]) for row in chosen]
    texts = [str(row["captions"][0]) for row in chosen]
    columns = [[Panel(as_seen(image), above=wrapped(text)) for image, text in zip(images, texts, strict=True)]]
    for named in models:
        columns += map_columns(named, images, texts)
    lines = list(zip(*columns, strict=True))
    return heat_sheet(lines, "Where each model sees the caption; blue low, red high, each map on its own scale")


def gaps_beside(models: Sequence[Named], rows: Sequence[Row], count: int = 300, links: int = 25, seed: int = 0) -> Any:
    """A Figure with the t-SNE of images and first captions of `count` rows with different ids in each model's space.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than two rows with different ids.
    """
    chosen = one_of_each_id(rows, count, seed)
    captions = [str(row["captions"][0]) for row in chosen]
    figure = new_figure(4.2 * len(models), 4.8)
    for place, named in enumerate(models):
        image = embed_images(named.model, named.processor, [row["image"] for row in chosen], 64).cpu()  # (B, P)
        text = embed_texts(named.model, named.processor, captions, 64).cpu()  # (B, P)
        points = tsne(torch.cat([image, text]), min(30.0, (2 * len(chosen) - 1) / 3), seed)
        axes = figure.add_subplot(1, len(models), place + 1)
        draw_clouds(axes, dict(zip(("image", "text"), points.split(len(chosen)), strict=True)), links)

        paired, unpaired = paired_cosines(image, text, row_ids(chosen))
        axes.set_title(named.name, fontsize=10, parse_math=False)
        axes.set_xlabel(
            f"centroids {centroid_distance(image, text):.2f} apart; cosine paired {paired:.2f}, others {unpaired:.2f}",
            fontsize=8,
        )
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


# values of `oner compare --sheets`
SHEETS = {"maps": maps_beside, "gap": gaps_beside}
