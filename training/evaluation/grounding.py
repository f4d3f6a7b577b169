"""Evaluates weakly supervised grounding with Grad-CAM maps of expressions (SIMLA, section 3.5, Table 5).

On RefCOCO+ the map selects one of a detector's boxes, which is correct if its IoU with the object's box is at least .5
(ALBEF's and SIMLA's evaluation). For data without boxes, four images form a scene with known quarters.

Shapes: B images, h x w patches, H x W pixels, T positions of a text ([CLS] first), n boxes (x, y, width, height).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oner.processing.data.row_checks import PairDataError
from oner.processing.grounding_boxes import box_iou, rectangle_box, resize_map, score_boxes
from oner.processing.image_processing_vl import open_image

from .embedding import batches
from .localization import pointing
from .sheets import (
    Panel,
    Row,
    describe,
    draw_scenes,
    evaluating,
    heat_sheet,
    images_and_texts,
    on_device,
    wrapped,
)

# maps of matching and of contrast are both reported
OTHER = {"itm": "itc", "itc": "itm"}
RIGHT = "lime"
CHOSEN = "red"


def whole_picture(model: Any) -> dict[str, Any]:
    """Processor options that resize the whole picture to the model's square, as in the official test, so that a map
    covers all of it."""
    side = model.config.image_size
    return {"size": {"height": side, "width": side}, "do_center_crop": False}


def grounding_maps(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Maps of the model's `ground` (B, h, w), on the CPU, for image i with text i; `options` are mode, layer and pool.

    Raises:
        TypeError: the model has no `ground`.
        ValueError: the numbers of images and texts differ, or there are none.
    """
    if not hasattr(model, "ground"):
        raise TypeError(f"grounding needs a model with ground(), got {type(model).__name__}")
    if len(images) != len(texts) or not len(texts):
        raise ValueError(f"expected one text for each picture, got {len(images)} pictures and {len(texts)} texts")

    # each image with its text, resized to a square
    maps = []
    with evaluating(model):
        for chosen in batches(len(texts), batch_size, "pairs", progress):
            batch = processor(
                images=[open_image(image) for image in images[chosen]],
                text=list(texts[chosen]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                **whole_picture(model),
            )
            maps.append(model.ground(**on_device(batch, model), **options).float().cpu())  # (b, h, w)
    return torch.cat(maps)


@dataclass(frozen=True)
class Choice:
    """The detector's box that a map selected, whether it is correct, and how many boxes would be correct."""

    index: int
    iou: float
    candidates: int
    right_candidates: int

    @property
    def right(self) -> bool:
        return self.iou >= 0.5


def choose_box(
    cells: Tensor, size: tuple[int, int], boxes: Sequence[Sequence[float]], truth: Sequence[float]
) -> Choice:
    """
    Selects the box with the highest score among `boxes`, from a map (h, w) resized to the image's `size` (H, W); for
    equal scores the first.

    (If no box scores above 0, the official code keeps the box of the previous expression; here the highest wins.)
    """
    # the object's box is not used for the selection
    scores = score_boxes(resize_map(cells, *size), boxes)  # (n,)
    index = int(scores.argmax())

    # only for judging it
    overlaps = [box_iou(truth, box) for box in boxes]
    return Choice(index, overlaps[index], len(boxes), sum(iou >= 0.5 for iou in overlaps))


def as_seen(image: Any) -> Tensor:
    """An image in its own shape, (H, W, 3) in [0, 1], for a panel."""
    # a copy, since Pillow's pixels are read-only
    return torch.from_numpy(np.asarray(open_image(image)).copy()).float() / 255


class GroundingEvaluator:
    """
    RefCOCO+'s accuracies with the boxes of a detector.

    Args:
        rows: From `open_grounding` with boxes: {"image", "captions", "split", "box", "size", "boxes"}.
        mode, layer, pool: Of the model's `ground`; maps of the other mode use its default layer.
        shown: Number of expressions drawn, evenly spaced.

    Yields for every split in the rows, with the names of the official log: name/val_d (testA_d, testB_d), the
    accuracy; name/val_d_itc (or _itm), that of the other mode's maps; name/val_chance, the accuracy of a random box;
    name/val_reachable, the share of expressions for which the detector has a correct box; name/val_expressions; and a
    sheet.

    Raises:
        PairDataError: rows have no boxes.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int = 32,
        mode: str = "itm",
        layer: int | None = None,
        pool: str = "padded",
        shown: int = 10,
        name: str = "grounding",
        progress: bool = True,
    ) -> None:
        if not len(rows) or any(key not in rows[0] for key in ("split", "box", "size", "boxes")):
            raise PairDataError(
                "grounding is scored on expressions with boxes; give the referred objects, COCO's instances and the "
                "detector's boxes (refs, instances, detections)"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.shown = shown
        self.name = name
        self.progress = progress
        self.options = {"mode": mode, "layer": layer, "pool": pool}

    @property
    def protocol(self) -> dict[str, Any]:
        """What the numbers mean, for the file of results."""
        return {
            "task": "referring expressions, weakly supervised: the box of a detector that a Grad-CAM map chooses",
            "map": f"Grad-CAM, {self.options}, bicubic to the picture's size",
            "score": "sum inside the box / area ** 0.5",
            "right": "inclusive-pixel IoU with the object's box >= 0.5",
            "expressions": len(self.rows),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Grounds every expression and yields (name, value), a sheet last."""
        # expressions to draw, evenly spaced
        choices: dict[str, list[Choice]] = {}
        others: dict[str, list[bool]] = {}
        other = OTHER[self.options["mode"]]
        count = min(self.shown, len(self.rows))
        drawn = {number * len(self.rows) // count for number in range(count)}

        # select a box for every expression
        panels = []
        for chosen in batches(len(self.rows), self.batch_size, "expressions", self.progress):
            rows = [self.rows[number] for number in range(chosen.start, chosen.stop)]
            images = [row["image"] for row in rows]
            texts = [row["captions"][0] for row in rows]
            maps = grounding_maps(model, processor, images, texts, len(rows), **self.options)
            beside = grounding_maps(model, processor, images, texts, len(rows), mode=other, pool=self.options["pool"])
            for number, (row, cells, second) in enumerate(zip(rows, maps, beside, strict=True), chosen.start):
                choice = choose_box(cells, row["size"], row["boxes"], row["box"])
                choices.setdefault(row["split"], []).append(choice)
                right = choose_box(second, row["size"], row["boxes"], row["box"]).right
                others.setdefault(row["split"], []).append(right)
                if number in drawn:
                    panels.append(self._panel(row, cells, choice))

        # results per split, with chance and the detector's upper bound
        for split, of_split in choices.items():
            count = len(of_split)
            yield f"{self.name}/{split}_d", sum(choice.right for choice in of_split) / count
            yield f"{self.name}/{split}_d_{other}", sum(others[split]) / count
            chance = sum(choice.right_candidates / choice.candidates for choice in of_split) / count
            yield f"{self.name}/{split}_chance", chance
            yield f"{self.name}/{split}_reachable", sum(choice.right_candidates > 0 for choice in of_split) / count
            yield f"{self.name}/{split}_expressions", float(count)

        # five panels per row
        if panels:
            title = f"{describe(model)}: Grad-CAM of expressions. Green: the object. Red: the box chosen, if another"
            try:
                yield f"{self.name}/sheet", heat_sheet([panels[at : at + 5] for at in range(0, len(panels), 5)], title)
            except ImportError as error:  # evaluations during training need only the numbers
                warnings.warn(f"no sheet of expressions: {error}", stacklevel=2)

    @staticmethod
    def _panel(row: Row, cells: Tensor, choice: Choice) -> Panel:
        boxes = ((row["boxes"][choice.index][:4], CHOSEN), (row["box"], RIGHT))
        return Panel(as_seen(row["image"]), cells, wrapped(row["captions"][0]), f"IoU {choice.iou:.2f}", boxes)


def grounding_sheet(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[Sequence[str]],
    note: str = "",
    **options: Any,
) -> Any:
    """A Figure with one row per image: the image, then its map for each of its texts, with the highest-scoring
    rectangle of patches; `note` ends the title."""
    # every image with each of its texts
    pairs = [(i, text) for i, asked in enumerate(texts) for text in asked]
    maps = grounding_maps(model, processor, [images[i] for i, _ in pairs], [text for _, text in pairs], **options)

    # one row of panels per image
    seen = [as_seen(image) for image in images]
    rows = [[Panel(picture, above="picture")] for picture in seen]
    for (i, text), cells in zip(pairs, maps, strict=True):
        box = rectangle_box(cells, *seen[i].shape[:2])
        rows[i].append(Panel(seen[i], cells, wrapped(text), f"highest {cells.max():.1e}", ((box, CHOSEN),)))

    by = (
        "the picture's attention by the cosine"
        if options.get("mode") == "itc"
        else "cross-attention by the matching score"
    )
    title = (
        f"{describe(model)}: where the words are. Grad-CAM of {by}, each map on its own scale; red: the best "
        f"rectangle{note and '. ' + note}"
    )
    return heat_sheet(rows, title)


def word_sheet(model: Any, processor: Any, image: Any, text: str, layer: int | None = None) -> Any:
    """A Figure with the image and the map of each token of `text`, in order (ALBEF's visualisation)."""
    # one map per token, not their mean
    with evaluating(model):
        batch = processor(images=[open_image(image)], text=[text], return_tensors="pt", **whole_picture(model))
        maps = model.ground(**on_device(batch, model), layer=layer, pool="none")[0].float().cpu()  # (T, h, w)

    # the tokens of the text; the sequence may also contain image placeholders
    ids = batch["input_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[ids != processor.image_token_id].tolist())

    # each map is min-max normalised, so its peak relative to the highest shows how strong it is
    seen = as_seen(image)
    top = maps.max().clamp_min(1e-30)
    panels = [Panel(seen, above="picture")]
    for token, cells in zip(tokens, maps, strict=True):
        panels.append(Panel(seen, cells, token, f"highest {cells.max() / top:.0%} of all"))
    title = f"{describe(model)}: Grad-CAM of each token of “{text}”, each map on its own scale"
    return heat_sheet([panels[at : at + 6] for at in range(0, len(panels), 6)], title)


class SceneGroundingEvaluator:
    """
    Grounding without box annotations: scenes of four images, and the caption of one of them.

    These scenes are our own measure; the paper uses RefCOCO+. A model trained on single images has never seen one.

    Args:
        rows: {"image", "captions", "id"}.
        queries: (picture, texts to ask of it) for a sheet of the caller's choice, else pictures of `rows` with their
            own caption and two foreign ones.
        mode, layer: of the model's `ground`; maps of the other mode are of its usual layer.

    Yields name/pointing_accuracy (the highest patch lies on the named picture) and name/box_accuracy (its quarter is
    the best of four boxes), both with chance 0.25; name/itc_pointing_accuracy and name/itc_box_accuracy, the same by
    the maps of the other mode (or itm_...); a sheet of words, one of single tokens, and one of scenes.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        queries: Sequence[tuple[Any, Sequence[str]]] | None = None,
        scenes: int = 200,
        shown: int = 5,
        seed: int = 0,
        batch_size: int = 32,
        mode: str = "itm",
        layer: int | None = None,
        name: str = "grounding",
    ) -> None:
        self.rows = rows
        self.queries = queries
        self.scenes = scenes
        self.shown = shown
        self.seed = seed
        self.batch_size = batch_size
        self.name = name
        self.options = {"mode": mode, "layer": layer}

    @property
    def protocol(self) -> dict[str, Any]:
        """What the numbers mean, for the file of results."""
        return {
            "task": "pointing at one of four pictures by its caption",
            "map": f"Grad-CAM, {self.options}",
            "scenes": self.scenes,
            "caption": "first",
            "chance": 0.25,
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Grounds the requested caption in every scene and yields (name, value)."""
        # maps of the requested caption in each scene
        scenes = draw_scenes(self.rows, self.scenes, self.seed)
        asked = [scene.asked for scene in scenes]
        images = [scene.image for scene in scenes]
        texts = [scene.words[scene.asked] for scene in scenes]
        maps = grounding_maps(model, processor, images, texts, self.batch_size, **self.options)

        # the quarter of the highest patch, and the quarter that is the best box
        pointed, boxed = _quarters(maps, asked)
        yield f"{self.name}/pointing_accuracy", pointed
        yield f"{self.name}/box_accuracy", boxed
        yield f"{self.name}/scene_chance", 0.25

        # the same for the other mode
        other = OTHER[self.options["mode"]]
        beside = grounding_maps(model, processor, images, texts, self.batch_size, mode=other)
        for what, value in zip(("pointing", "box"), _quarters(beside, asked), strict=True):
            yield f"{self.name}/{other}_{what}_accuracy", value

        # images with several texts
        pictures, asked_of = images_and_texts(self.queries, self.rows, self.shown, self.seed)
        note = "First map: its own caption; the others: of other pictures" if self.queries is None else ""
        yield f"{self.name}/sheet", grounding_sheet(model, processor, pictures, asked_of, note, **self.options)

        # only cross-attention gives maps of single tokens; the longest caption has the most
        if self.options["mode"] == "itm":
            longest = max(range(len(pictures)), key=lambda i: len(asked_of[i][0].split()))
            sheet = word_sheet(model, processor, pictures[longest], asked_of[longest][0], self.options["layer"])
            yield f"{self.name}/words_sheet", sheet

        # some of the scenes, each with all four captions
        note = f"Over {len(scenes)} scenes the highest patch lies on the named picture in {pointed:.0%} (chance 25%)"
        shown = scenes[: self.shown]
        pictures = [scene.image for scene in shown]
        captions = [scene.words for scene in shown]
        yield f"{self.name}/scenes_sheet", grounding_sheet(model, processor, pictures, captions, note, **self.options)


def _quarters(maps: Tensor, asked: Sequence[int]) -> tuple[float, float]:
    """
    How often the highest patch of a map (B, h, w) is in the requested quarter, and how often that is the best box.
    """
    best = sum(_best_quarter(cells) == index for cells, index in zip(maps, asked, strict=True))
    return pointing(maps, asked)[0], best / len(maps)


def _best_quarter(cells: Tensor) -> int:
    """The quarter (0 1 / 2 3) of a map with the highest score as a box."""
    side = 256.0
    quarters = [(x, y, side / 2, side / 2) for y in (0, side / 2) for x in (0, side / 2)]
    return int(score_boxes(resize_map(cells, int(side), int(side)), quarters).argmax())


__all__ = [
    "GroundingEvaluator",
    "SceneGroundingEvaluator",
    "choose_box",
    "grounding_maps",
    "grounding_sheet",
    "word_sheet",
]
