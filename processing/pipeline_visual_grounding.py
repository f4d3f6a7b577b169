"""Pipeline "visual-grounding": where in a picture is what a text says?

    pipe = pipeline("visual-grounding", model="org/simla-base")
    pipe("photo.png", text="the man on the left")  # {"box": {"xmin": ...}, "score": ..., "map": tensor of (h, w)}
    pipe("photo.png", text="a hat", overlay=True)["overlay"].save("where.png")

The map is Grad-CAM of the model's cross-attention (SIMLA, section 3.5); no box was needed to train it. With `boxes=`,
say of a detector, the box is one of them, by the score that RefCOCO+ is evaluated with: the map's sum inside over the
root of the area. Without, it is the rectangle of patches that scores highest. A score of 0 says that nothing in the
picture was found to speak for the text.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from .grounding_boxes import overlay_map, rectangle_box, resize_map, score_boxes
from .pipeline_pairs import Pair, PairPipeline, gather_pairs, known_options

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VisualGroundingPipeline(PairPipeline):
    """Any model with `ground(input_ids, attention_mask, pixel_values)` → maps (n, h, w).

    Args (besides `PairPipeline`'s):
        boxes: candidates, each {"xmin", "ymin", "xmax", "ymax"}, {"box": such a dict} as the object-detection
            pipeline answers, or these four numbers. With several pairs, one list of candidates for each.
        overlay: whether an answer has "overlay", the picture under its map with the box drawn in (False).
        mode, layer: of the model's `ground`.
    """

    task_name = "visual-grounding"
    model_methods = ("ground",)

    def _sanitize_parameters(
        self,
        allow_urls: bool | None = None,
        overlay: bool | None = None,
        mode: str | None = None,
        layer: int | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        known = {"allow_urls": allow_urls, "overlay": overlay, "mode": mode, "layer": layer}
        options = known_options(f"{self.task_name} (with boxes=)", known, unknown)

        # the options of preprocess, forward and postprocess
        stages = (("allow_urls",), ("mode", "layer"), ("overlay",))
        return tuple({name: options[name] for name in names if name in options} for names in stages)

    def __call__(self, inputs: Any = None, *, image: Any = None, boxes: Any = None, **options: Any) -> Any:
        """{"box", "score", "map"} for one pair, else a list of them; also "index" with `boxes`, and "overlay".

        Raises:
            ValueError: as `PairPipeline`; candidates that are no boxes, or not one list for each pair.
        """
        # candidates go with their pairs
        pairs, single = gather_pairs(inputs, image, options.pop("text", None))
        if boxes is not None:
            boxes = [boxes] if single else list(boxes)
            if len(boxes) != len(pairs):
                raise ValueError(f"got {len(boxes)} lists of boxes for {len(pairs)} pairs; expected one for each")
            pairs = [{**pair, "boxes": read_boxes(own)} for pair, own in zip(pairs, boxes, strict=True)]
        answers = self.answer(pairs, options.pop("batch_size", None), **options)
        return answers[0] if single else answers

    def preprocess(self, pairs: list[Pair], allow_urls: bool = False) -> dict[str, Any]:
        """n pairs → the processor's batch; pictures are seen whole, also where the processor would crop them."""
        pictures = [self._open(pair["image"], allow_urls) for pair in pairs]

        # one size without a crop, so that the map covers the picture
        side = self.model.config.image_size
        batch = self.processor(
            images=pictures,
            text=[pair["text"] for pair in pairs],
            size={"height": side, "width": side},
            do_center_crop=False,
            return_tensors="pt",
            padding=True,
        )
        return {**batch.to(self.dtype), "pictures": pictures, "boxes": [pair.get("boxes") for pair in pairs]}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        pictures = model_inputs.pop("pictures")
        boxes = model_inputs.pop("boxes")
        return {"maps": self.model.ground(**model_inputs, **options), "pictures": pictures, "boxes": boxes}

    def postprocess(self, model_outputs: dict[str, Any], overlay: bool = False) -> list[dict[str, Any]]:
        """Maps (n, h, w) → for each pair the best box, its score, and the map."""
        answers = []
        triples = zip(model_outputs["maps"].float(), model_outputs["pictures"], model_outputs["boxes"], strict=True)

        # each map at the size of its own picture
        for cells, picture, boxes in triples:
            width, height = picture.size

            # the candidate that scores highest
            candidates = boxes or [rectangle_box(cells, height, width)]
            scores = score_boxes(resize_map(cells, height, width), candidates)  # (boxes,)
            best = int(scores.argmax())
            x, y, across, down = candidates[best]

            # as the object-detection pipeline answers
            answer = {
                "box": dict(zip(CORNERS, (x, y, x + across, y + down), strict=True)),
                "score": float(scores[best]),
                "map": cells,
            }
            answer |= {"index": best} if boxes else {}
            answer |= {"overlay": overlay_map(picture, cells, candidates[best])} if overlay else {}
            answers.append(answer)
        return answers


def read_boxes(boxes: Any) -> list[tuple[float, float, float, float]]:
    """Candidates of any accepted form → (x, y, width, height). Raises `ValueError`."""
    if not isinstance(boxes, (list, tuple)) or not boxes:
        raise ValueError(f"boxes must be a list of at least one box, got {boxes!r:.60}")
    read = []
    for place, box in enumerate(boxes):
        # corners in a mapping, a detector's answer that holds one, or four numbers
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
