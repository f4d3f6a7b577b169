"""Pipeline "visual-entailment": does an image entail a text, contradict it, or neither?

pipe = pipeline("visual-entailment", model="runs/snli-ve/model")
pipe("photo.png", text="two people are outside")  # [{"label": "entailment", "score": 0.91}, ...], best first
"""

from typing import Any

import torch

from .pipeline_pairs import PairPipeline, checked_top_k, known_options


class VisualEntailmentPipeline(PairPipeline):
    """For any model with a `classifier`: `model(input_ids, attention_mask, pixel_values)` → logits (n, labels).

    Args (besides `PairPipeline`'s):
        top_k: number of labels in an answer; by default all of `config.id2label`.
    """

    task_name = "visual-entailment"
    model_methods = ("classifier",)

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        known = {"top_k": checked_top_k(top_k), "allow_urls": allow_urls, "num_workers": num_workers}
        options = known_options(self.task_name, known, unknown)

        # the options of preprocess, forward and postprocess
        stages = (("allow_urls", "num_workers"), (), ("top_k",))
        return tuple({name: options[name] for name in names if name in options} for names in stages)

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"scores": self.model(**model_inputs).logits.float().softmax(-1)}  # (n, labels)

    def postprocess(self, model_outputs: dict[str, torch.Tensor], top_k: int | None = None) -> list[list[dict]]:
        """Probabilities (n, labels) → for each pair its {"label", "score"}, best first."""
        names = self.model.config.id2label
        return [
            [{"label": names[place], "score": float(row[place])} for place in row.argsort(descending=True).tolist()][
                :top_k
            ]
            for row in model_outputs["scores"]
        ]


__all__ = ["VisualEntailmentPipeline"]
