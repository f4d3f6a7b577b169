"""Pipeline "image-text-matching": does a text belong to an image?

    pipe = pipeline("image-text-matching", model="org/simla-base")
    pipe("photo.png", text="a red apple")                # {"score": 0.98, "text": "a red apple"}
    pipe("photo.png", text=["a red apple", "a tree"])    # a list: one answer per text

Unlike a cosine, the score is a probability, from a model that reads both together (ALBEF, SIMLA: the ITM head).
"""

from typing import Any

import torch

from .pipeline_pairs import Pair, PairPipeline, known_options


class ImageTextMatchingPipeline(PairPipeline):
    """
    For any model with `matching_context(pixel_values)`, and `match(input_ids, attention_mask, image_states=,
    context_index=)` → logits (n, 2), the second for "matched".
    """

    task_name = "image-text-matching"
    model_methods = ("match", "matching_context")

    def _sanitize_parameters(
        self, allow_urls: bool | None = None, num_workers: int | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        return known_options(self.task_name, {"allow_urls": allow_urls, "num_workers": num_workers}, unknown), {}, {}

    def preprocess(self, pairs: list[Pair], allow_urls: bool = False, num_workers: int = 0) -> dict[str, Any]:
        """n pairs → texts (n, T), the distinct images (c, 3, H, W), and for each text the index of its image (n,)."""
        # each image once, however many texts it is compared with
        places: dict[int, int] = {}
        index = [places.setdefault(id(pair["image"]), len(places)) for pair in pairs]
        first = [index.index(place) for place in range(len(places))]
        pictures = self.read_all([pairs[row]["image"] for row in first], allow_urls, num_workers)
        texts = [pair["text"] for pair in pairs]
        return {
            **self.processor(text=texts, return_tensors="pt", padding=True),
            "pixel_values": self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.dtype),
            "context_index": torch.tensor(index),
            "texts": texts,
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        states = self.model.matching_context(model_inputs["pixel_values"])  # (c, S, D)
        logits = self.model.match(
            model_inputs["input_ids"],
            model_inputs["attention_mask"],
            image_states=states,
            context_index=model_inputs["context_index"],
        )  # (n, 2)
        return {"scores": logits.float().softmax(-1)[:, 1], "texts": model_inputs["texts"]}  # (n,)

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Probabilities (n,) → {"score", "text"} for each pair."""
        pairs = zip(model_outputs["scores"].tolist(), model_outputs["texts"], strict=True)
        return [{"score": score, "text": text} for score, text in pairs]


__all__ = ["ImageTextMatchingPipeline"]
