"""Pipeline "image-question-answering": generated or ranked answers to questions about an image.

    pipe = pipeline("image-question-answering", model="runs/vqa/model")
    pipe("photo.png", question="what colour is the apple")                          # [{"answer": "red", "score": ...}]
    pipe("photo.png", question="what colour is it", candidates=["red", "green"])    # both, the likelier first

Without candidates, the model generates one answer; its score is the geometric mean of its tokens' probabilities. With
candidates, the model ranks them; the scores are a softmax over the log-likelihoods of the ranked candidates, in which
the first token counts twice unless `count_first_token_twice` is False (ALBEF's and SIMLA's code counts it twice).

A model that classifies over a fixed list of answers returns the most likely of them, or of the candidates among them;
each score is the probability of that answer alone, so scores need not sum to 1.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .pipeline_pairs import Pair, PairPipeline, checked_top_k, known_options
from .vl_captions import caption_reason

TOP_K = 5
RANKED = 128  # candidates ranked by the whole answer, out of those ranked by its first token (ALBEF, SIMLA)


class VisualQuestionAnsweringPipeline(PairPipeline):
    """For models with `generate_answers` and `rank_answers` (`vl_task_heads.AnswerGeneration`), or `answer_scores`.

    Args (besides `PairPipeline`'s):
        candidates: answers to choose from, for all questions; None generates an answer, or uses the model's own list.
        top_k: maximum number of answers to a question (5), unless one is generated.
        max_new_tokens, num_beams: for generated answers.
        count_first_token_twice: for ranked candidates (True); False ranks by the likelihood of the whole answer.
    """

    # not "visual-question-answering": transformers 5 removed that task, and its `pipeline` refuses the name even if
    # something is registered under it
    task_name = "image-question-answering"
    model_methods = ("generate_answers", "rank_answers")
    text_name = "question"

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        return None if hasattr(model, "answer_scores") else super().lacks(model)

    def _sanitize_parameters(
        self,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        count_first_token_twice: bool | None = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        known = {
            "candidates": None if candidates is None else read_candidates(candidates),
            "top_k": checked_top_k(top_k),
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "count_first_token_twice": count_first_token_twice,
            "allow_urls": allow_urls,
            "num_workers": num_workers,
        }
        options = known_options(self.task_name, known, unknown)

        # the options of preprocess, forward and postprocess
        stages = (
            ("allow_urls", "num_workers", "candidates"),
            ("max_new_tokens", "num_beams", "count_first_token_twice"),
            ("candidates", "top_k"),
        )
        return tuple({name: options[name] for name in names if name in options} for names in stages)

    def preprocess(
        self,
        pairs: list[Pair],
        allow_urls: bool = False,
        num_workers: int = 0,
        candidates: list[str] | None = None,
    ) -> dict[str, Any]:
        """n pairs → the processor's batch, and the ids and mask of the candidates (K, A), or their classes (K,)."""
        batch = super().preprocess(pairs, allow_urls, num_workers)
        if hasattr(self.model, "answer_scores"):
            return batch | {"places": self.places_of(candidates)}
        return batch if candidates is None else batch | self.lay_out_answers(candidates)

    def places_of(self, candidates: list[str] | None) -> torch.Tensor:
        """The class indices of the candidates, or of all answers that the model knows. (K,). Raises `ValueError`."""
        places = {str(answer): place for place, answer in self.model.config.id2label.items()}
        if foreign := [answer for answer in candidates or () if answer not in places]:
            raise ValueError(f"candidates {foreign[:5]} are none of the {len(places)} answers that the model knows")
        return torch.tensor(list(places.values()) if candidates is None else [places[one] for one in candidates])

    def lay_out_answers(self, answers: list[str]) -> dict[str, torch.Tensor]:
        """[CLS], tokens, the end token, padding, as in training. (K, A)."""
        laid_out = self.processor(text=answers, return_tensors=None, padding=False)["input_ids"]
        rows = [torch.tensor([*row, self.answer_end]) for row in laid_out]  # (A,) each
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.model.config.pad_token_id or 0
        )  # (K, A)
        lengths = torch.tensor([len(row) for row in rows])
        return {"candidate_ids": ids, "candidate_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    @property
    def answer_end(self) -> int:
        """The token that ends an answer: [SEP], or [CLS] if the vocabulary has no [SEP]."""
        config = self.model.config
        end = getattr(config, "sep_token_id", None)
        return config.cls_token_id if end is None else end

    def _forward(
        self, model_inputs: dict[str, Any], count_first_token_twice: bool = True, **writing: Any
    ) -> dict[str, torch.Tensor]:
        # scores of the candidates' classes
        if "places" in model_inputs:
            places = model_inputs.pop("places")  # (K,)
            scores = self.model.answer_scores(**model_inputs)[:, places]  # (n, K)
            best = scores.sort(descending=True)
            return {"indices": places[best.indices], "scores": best.values}

        # log-likelihoods of the ranked answers -> scores that sum to 1
        if "candidate_ids" in model_inputs:
            how = {"k": RANKED, "count_first_token_twice": count_first_token_twice}
            ranking = self.model.rank_answers(**model_inputs, **how)
            return {"indices": ranking.indices, "scores": ranking.scores.softmax(-1)}

        # or one generated answer
        written = self.model.generate_answers(**model_inputs, **{"length_penalty": 1.0, **writing})
        return {"sequences": written.sequences, "scores": written.scores.exp()}

    def postprocess(
        self, model_outputs: dict[str, torch.Tensor], candidates: list[str] | None = None, top_k: int | None = None
    ) -> list[list[dict[str, Any]]]:
        """Indices (n, k), or tokens (n, A) → for each question its answers {"answer", "score"}, best first."""
        scores = model_outputs["scores"].float().tolist()

        # classes or candidates by index, or tokens up to the end
        if "indices" in model_outputs:
            chosen = model_outputs["indices"].tolist()
            names = self.model.config.id2label if hasattr(self.model, "answer_scores") else candidates
            return [
                [{"answer": names[i], "score": s} for i, s in zip(*row, strict=True)][: top_k or TOP_K]
                for row in zip(chosen, scores, strict=True)
            ]
        written = [self._words(row) for row in model_outputs["sequences"].tolist()]
        return [[{"answer": words, "score": score}] for words, score in zip(written, scores, strict=True)]

    def _words(self, ids: list[int]) -> str:
        """Decodes the tokens before the end token."""
        ids = ids[: ids.index(self.answer_end)] if self.answer_end in ids else ids
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def read_candidates(candidates: Any) -> list[str]:
    """Returns the candidates as a list. Raises `ValueError` unless they are a list of valid answers."""
    if not isinstance(candidates, (list, tuple)) or not candidates:
        raise ValueError(f"candidates must be a list of at least one answer, got {candidates!r:.60}")
    for place, answer in enumerate(candidates):
        if (reason := caption_reason(answer)) is not None:
            raise ValueError(f"candidate {place} cannot be read: {reason}")
    return list(candidates)


__all__ = ["VisualQuestionAnsweringPipeline"]
