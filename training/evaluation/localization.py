"""Zero-shot localisation: which patches of an image are close to a text (Figures 1, 3, 6-8, 10, 11 of OneR's paper).

The cosines are those of `vl_localization`, here for any model with states of images and texts.

Shapes: B images, N = h*w patches (row-major), L positions ([CLS] first), D width.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oner.modeling.vl_localization import mean_of_words, patch_word_cosine

from .sheets import (
    Panel,
    Row,
    describe,
    draw_scenes,
    evaluating,
    heat_sheet,
    images_and_texts,
    on_device,
    patch_grid,
    pictures_as_seen,
    quarter,
    wrapped,
)


def similarity_maps(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: str | Sequence[str],
    batch_size: int = 64,
    image_size: int | None = None,
) -> Tensor:
    """Raw cosines (B, h, w), on the CPU, of the patches of image i with text i; a single str is used for all images.

    An `image_size` other than the processor's gives a finer or coarser grid, with interpolated positions. Above the
    model's own it looks better but localises worse, because nothing was trained at it; a warning says so.

    Raises:
        ValueError: the numbers of images and texts differ, or a text has no tokens.
    """
    texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
    if len(images) != len(texts) or not texts:
        raise ValueError(f"expected one text for each picture, got {len(images)} pictures and {len(texts)} texts")
    options = _resized(image_size)
    if image_size is not None and image_size > model.config.image_size:
        warnings.warn(
            f"maps at {image_size} pixels of a model made for {model.config.image_size}: the grid is finer, and where "
            f"it points is less often right; train at {image_size} for that",
            stacklevel=2,
        )
    interpolated = {} if image_size is None else {"interpolate_pos_encoding": True}
    maps = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            # images and texts of the batch, in separate tensors
            chosen = slice(start, start + batch_size)
            pixels = on_device(processor(images=list(images[chosen]), return_tensors="pt", **options), model)
            pixels = pixels["pixel_values"]  # (b, 3, H, W)
            text = on_device(processor(text=texts[chosen], return_tensors="pt", padding=True, truncation=True), model)
            h, w = patch_grid(pixels, model)

            # final states of two passes, those of images without [CLS]
            outputs = model.get_image_features(pixel_values=pixels, **interpolated)
            patches = outputs.last_hidden_state[:, 1:]  # (b, N, D)
            states = model.get_text_features(
                input_ids=text["input_ids"], attention_mask=text["attention_mask"]
            ).last_hidden_state  # (b, L, D)
            cosines = patch_word_cosine(patches, mean_of_words(states, text["attention_mask"]))  # (b, N)
            maps.append(cosines.reshape(-1, h, w).cpu())
    return torch.cat(maps)


def _resized(image_size: int | None) -> dict[str, Any]:
    return {} if image_size is None else {"size": {"height": image_size, "width": image_size}}


def pointing(maps: Tensor, asked: Sequence[int]) -> tuple[float, float]:
    """Share of maps (B, h, w) whose highest patch lies in the requested quarter, and the mean of the map inside
    that quarter minus its mean over the whole image."""
    height, width = maps.shape[1:]
    hits = 0
    lifts = 0.0
    for one, index in zip(maps, asked, strict=True):
        rows, columns = quarter(height, width, index)
        inside = torch.zeros(height, width, dtype=torch.bool)  # (h, w)
        inside[rows, columns] = True
        hits += bool(inside.flatten()[one.argmax()])
        lifts += float(one[inside].mean() - one.mean())
    return hits / len(maps), lifts / len(maps)


def localization_sheet(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[Sequence[str]],
    image_size: int | None = None,
    note: str = "",
) -> Any:
    """A figure with one row per image: the image, then its map for each of its texts; `note` ends the title.

    The range of raw cosines is shown under each map, because colours are min-max scaled per map.
    """
    # every image with each of its texts
    seen = pictures_as_seen(images, processor, **_resized(image_size))
    pairs = [(i, text) for i, asked in enumerate(texts) for text in asked]
    asked = [images[i] for i, _ in pairs]
    maps = similarity_maps(model, processor, asked, [text for _, text in pairs], image_size=image_size)

    # one line of panels per image
    rows = [[Panel(picture, above="picture")] for picture in seen]
    for (i, text), heat in zip(pairs, maps, strict=True):
        rows[i].append(Panel(seen[i], heat, wrapped(text), f"cosine {heat.min():.2f} to {heat.max():.2f}"))

    title = (
        f"{describe(model)}: zero-shot localisation. Cosine of the final patch states "
        f"with the mean final word state; blue low, red high, each map on its own scale{note and '. ' + note}"
    )
    return heat_sheet(rows, title)


class LocalizationEvaluator:
    """How often the map of a caption has its maximum on the caption's image among four (chance 25 %), and sheets of
    maps.

    Scenes of four images are this project's measure; the paper shows its maps without a measure.

    Args:
        rows: `{"image", "captions", "id"}`.
        queries: (image, texts) for a sheet of the caller's choice, else images of `rows` with their
            own caption and two of other images.
        scenes: number of four-image scenes to score.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        queries: Sequence[tuple[Any, Sequence[str]]] | None = None,
        scenes: int = 200,
        shown: int = 5,
        seed: int = 0,
        name: str = "localization",
    ) -> None:
        self.rows = rows
        self.queries = queries
        self.scenes = scenes
        self.shown = shown
        self.seed = seed
        self.name = name

    @property
    def protocol(self) -> dict[str, Any]:
        """The evaluation protocol, for the results file."""
        return {
            "task": "pointing at one of four pictures by its caption: does the highest patch lie on it",
            "map": "cosine of final patch states with the mean of the final word states of a text-only pass",
            "scenes": self.scenes,
            "caption": "first",
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Yields the pointing accuracy, its chance level, the mean lift in cosine, and two sheets."""
        # the caption of one quarter, for the whole scene
        scenes = draw_scenes(self.rows, self.scenes, self.seed)
        asked = [scene.asked for scene in scenes]
        texts = [scene.words[scene.asked] for scene in scenes]
        accuracy, lift = pointing(similarity_maps(model, processor, [s.image for s in scenes], texts), asked)
        yield f"{self.name}/pointing_accuracy", accuracy
        yield f"{self.name}/pointing_chance", 0.25
        yield f"{self.name}/cosine_lift", lift

        # images with several texts
        images, asked_of = images_and_texts(self.queries, self.rows, self.shown, self.seed)
        note = "First map: its own caption; the others: of other pictures" if self.queries is None else ""
        yield f"{self.name}/sheet", localization_sheet(model, processor, images, asked_of, note=note)

        # some of the scenes, each with all four captions
        note = f"Over {len(scenes)} scenes the highest patch lies on the named picture in {accuracy:.0%} (chance 25%)"
        shown = scenes[: self.shown]
        pictures = [scene.image for scene in shown]
        captions = [scene.words for scene in shown]
        yield f"{self.name}/scenes_sheet", localization_sheet(model, processor, pictures, captions, note=note)
