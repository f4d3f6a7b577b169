"""Pipeline "visual-grounding": where in an image is what a text describes?

    pipe = pipeline("visual-grounding", model="org/simla-base")
    pipe("photo.png", text="the man on the left")  # {"box": {"xmin": ...}, "score": ..., "map": tensor of (h, w)}
    pipe("photo.png", text="a hat", overlay=True)["overlay"].save("where.png")

The model's `ground` computes the map: Grad-CAM of cross-attention (SIMLA, section 3.5), or the similarity of patches
and words in a single tower (OneR, Figure 1); neither was trained on boxes. With `boxes=`, say a detector's, the answer
is the box with the highest score, as in the evaluation on RefCOCO+: the sum of the map inside the box, divided by the
square root of its area. Without, it is the rectangle of patches with the highest score. A score of 0 means that
nothing in the image supports the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from PIL import Image

from .grounding_boxes import overlay_map, rectangle_box, resize_map, score_boxes
from .image_processing_vl import open_image
from .pipeline_pairs import Pair, PairPipeline, gather_pairs, known_options

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Seen:
    """An image's resized pixels (3, h, w), its original (width, height), and the image itself if it is drawn on."""

    pixels: torch.Tensor
    size: tuple[int, int]
    picture: Image.Image | None


class VisualGroundingPipeline(PairPipeline):
    """For any model with `ground(input_ids, attention_mask, pixel_values)` → maps (n, h, w).

    Args (besides `PairPipeline`'s):
        boxes (calls only): candidates, each {"xmin", "ymin", "xmax", "ymax"}, {"box": such a dict} as the
            object-detection pipeline returns, or these four numbers. With several pairs, one list per pair.
        overlay: whether to return "overlay", the image overlaid with the map and the box (False).
        mode, layer: arguments of the model's `ground`.
    """

    task_name = "visual-grounding"
    model_methods = ("ground",)

    def _sanitize_parameters(
        self,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
        overlay: bool | None = None,
        mode: str | None = None,
        layer: int | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        known = {"allow_urls": allow_urls, "num_workers": num_workers}
        known |= {"overlay": overlay, "mode": mode, "layer": layer}
        options = known_options(f"{self.task_name} (with boxes=)", known, unknown)

        # the options of preprocess, forward and postprocess
        stages = (("allow_urls", "num_workers", "overlay"), ("mode", "layer"), ())
        return tuple({name: options[name] for name in names if name in options} for names in stages)

    def __call__(self, inputs: Any = None, *, image: Any = None, boxes: Any = None, **options: Any) -> Any:
        """{"box", "score", "map"} for a single pair, a list for several; with `boxes` also "index", with `overlay`
        also "overlay".

        Raises:
            ValueError: as `PairPipeline`; a candidate is not a box, or there is not one list for each pair.
        """
        # attach the candidates to their pairs
        pairs, single = gather_pairs(inputs, image, options.pop("text", None))
        if boxes is not None:
            boxes, pairs = [boxes] if single else list(boxes), list(pairs)
            if len(boxes) != len(pairs):
                raise ValueError(f"got {len(boxes)} lists of boxes for {len(pairs)} pairs; expected one for each")
            pairs = [{**pair, "boxes": read_boxes(own)} for pair, own in zip(pairs, boxes, strict=True)]
        answers = self.answer(pairs, options.pop("batch_size", None), **options)
        if isinstance(inputs, Iterator):
            return answers
        found = list(answers)
        return found[0] if single else found

    def preprocess(
        self, pairs: list[Pair], allow_urls: bool = False, num_workers: int = 0, overlay: bool = False
    ) -> dict[str, Any]:
        """n pairs → the processor's batch; images are never cropped, even if the processor's default is to crop."""
        # resized without a crop, so that the map covers the whole image
        side = self.model.config.image_size
        whole = {"size": {"height": side, "width": side}, "do_center_crop": False}
        seen = self.read_all([pair["image"] for pair in pairs], allow_urls, num_workers, keep=overlay, **whole)
        pixels, texts = [one.pixels for one in seen], [pair["text"] for pair in pairs]
        batch = self.processor(images=pixels, text=texts, return_tensors="pt", padding=True, **whole)
        return {**batch.to(self.dtype), "seen": seen, "boxes": [pair.get("boxes") for pair in pairs]}

    def read(self, picture: Any, allow_urls: bool = False, keep: bool = False, **options: Any) -> Seen:
        """Also keeps the image's original size, and with `keep` the image itself, to draw on."""
        image = open_image(picture, self.processor.image_processor.max_pixels, allow_urls)
        return Seen(super().read(image, **options), image.size, image if keep else None)

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        seen = model_inputs.pop("seen")
        boxes = model_inputs.pop("boxes")
        return {"maps": self.model.ground(**model_inputs, **options), "seen": seen, "boxes": boxes}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Maps (n, h, w) → for each pair its best box, the score and the map."""
        answers = []
        triples = zip(model_outputs["maps"].float(), model_outputs["seen"], model_outputs["boxes"], strict=True)

        # each map is scaled to the size of its image
        for cells, seen, boxes in triples:
            width, height = seen.size

            # the candidate with the highest score
            candidates = boxes or [rectangle_box(cells, height, width)]
            scores = score_boxes(resize_map(cells, height, width), candidates)  # (boxes,)
            best = int(scores.argmax())
            x, y, across, down = candidates[best]

            # the format of the object-detection pipeline
            answer = {
                "box": dict(zip(CORNERS, (x, y, x + across, y + down), strict=True)),
                "score": float(scores[best]),
                "map": cells,
            }
            answer |= {"index": best} if boxes else {}
            answer |= {"overlay": overlay_map(seen.picture, cells, candidates[best])} if seen.picture else {}
            answers.append(answer)
        return answers


def read_boxes(boxes: Any) -> list[tuple[float, float, float, float]]:
    """Candidates in any accepted form → (x, y, width, height). Raises `ValueError`."""
    if not isinstance(boxes, (list, tuple)) or not boxes:
        raise ValueError(f"boxes must be a list of at least one box, got {boxes!r:.60}")
    read = []
    for place, box in enumerate(boxes):
        # a mapping of corners, a detector's answer that contains one, or four numbers
        corners = box.get("box", box) if isinstance(box, Mapping) else box
        if isinstance(corners, Mapping) and set(CORNERS) <= set(corners):
            corners = [corners[name] for name in CORNERS]
        numbers = isinstance(corners, Sequence) and not isinstance(corners, str) and len(corners) == 4
        if not numbers or not all(isinstance(side, Real) for side in corners):
            raise ValueError(f"box {place}: expected xmin, ymin, xmax, ymax, got {box!r:.80}")
        left, top, right, bottom = map(float, corners)
        if not (left < right and top < bottom):
            raise ValueError(f"box {place}: expected xmin < xmax and ymin < ymax, got {[left, top, right, bottom]}")
        read.append((left, top, right - left, bottom - top))
    return read


__all__ = ["VisualGroundingPipeline"]
