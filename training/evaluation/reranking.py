"""Evaluates retrieval in two stages: dot products select k candidates per query, and a matching head re-ranks them.

The protocol of ALBEF's and SIMLA's code is `rerank_score="logit"`: the score of a candidate is the head's logit for
"matched", not a probability, without the first stage's score. Only its difference to the other logit is trained;
"difference" uses that, the log-odds. "sum" adds the weighted difference to cosine / temperature, which helps small
models whose matching head has hardly started to learn (docs/ambiguities.md).

The official code gives all other items one lower score; here they follow the candidates in the order of the first
stage, which gives the same R@k up to k without ties.

It works with any model that has `get_image_features`, `get_text_features`, `matching_context(pixel_values)`, which is
what
texts read of images, and `match(input_ids, attention_mask, image_states=..., context_index=...)` -> (R, 2), index 1 =
matched; for "sum" also a `temperature`.

Shapes: n pictures, m captions of which u differ, k candidates, R pairs of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .embedding import Column, Row, batches, opened
from .metric_retrieval_recall import RetrievalRecall
from .metrics import match_ids, standing
from .retrieval import RetrievalEvaluator
from .sheets import evaluating, on_device

RerankScore = Literal["logit", "difference", "sum"]


@dataclass(frozen=True)
class Matched:
    """The candidates of both directions, with their cosines and matching logits.

    Attributes:
        best: their places in the gallery, (n, k) and (m, k), by "tr" and "ir".
        cosines: likewise.
        logits: not matched, matched: (n, k, 2) and (m, k, 2).
        temperature: of the model's contrast.
    """

    best: dict[str, Tensor]
    cosines: dict[str, Tensor]
    logits: dict[str, Tensor]
    temperature: float

    def scores(self, direction: str, score: RerankScore, weight: float) -> Tensor:
        """Scores that re-rank the candidates, (Q, k)."""
        logits = self.logits[direction]
        if score == "logit":
            return logits[..., 1]
        difference = logits[..., 1] - logits[..., 0]  # (Q, k)
        if score == "difference":
            return difference
        return self.cosines[direction] / self.temperature + weight * difference


class RerankingEvaluator(RetrievalEvaluator):
    """
    `RetrievalEvaluator`, and the same numbers after its best `rerank_k` are re-ranked by the matching head.

    A pair that is a candidate in both directions is matched once. Pictures are encoded again, `image_batch_size` at a
    time, and all pairs of a batch are matched before the next one, to limit the memory for their states.

    Yields what `RetrievalEvaluator` does, name/rerank_tr_r@k, name/rerank_ir_r@k, name/rerank_tr_median_rank ...,
    name/rerank_r_mean, and name/rerank_tr_reach ..., the share of queries with a right answer among their candidates:
    the highest recall that any order of them can have.

    Args:
        rerank_k: candidates of a query; COCO 256, Flickr30k 128 (ALBEF, SIMLA). More than there are means all.
        rerank_score: "logit" (ALBEF, SIMLA), "difference" of the two logits, or "sum": cosine over the temperature and
            `rerank_weight` times the difference.
        rerank_weight: of the difference in "sum".
        pair_batch_size: pairs that pass the matching head together.
        others: see `RetrievalEvaluator`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int = 64,
        ks: Sequence[int] = (1, 5, 10),
        name: str = "eval",
        captions: Literal["all", "first"] = "all",
        chunk_size: int = 1024,
        progress: bool = True,
        clean_caption: Callable[[str], str] | None = None,
        rerank_k: int = 128,
        rerank_score: RerankScore = "logit",
        rerank_weight: float = 0.25,
        image_batch_size: int = 32,
        pair_batch_size: int = 256,
    ):
        super().__init__(rows, batch_size, ks, name, captions, chunk_size, progress, clean_caption)
        if min(rerank_k, image_batch_size, pair_batch_size) < 1:
            raise ValueError(
                f"rerank_k, image_batch_size and pair_batch_size must be at least 1, "
                f"got {rerank_k}, {image_batch_size} and {pair_batch_size}"
            )
        if rerank_score not in get_args(RerankScore):
            raise ValueError(f"rerank_score must be one of {get_args(RerankScore)}, got {rerank_score!r}")
        self.rerank_k = rerank_k
        self.rerank_score = rerank_score
        self.rerank_weight = rerank_weight
        self.image_batch_size = image_batch_size
        self.pair_batch_size = pair_batch_size

        # equal captions are merged, so that they tie exactly
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        self.unique = list(numbers)
        self.text_numbers = torch.tensor([numbers[text] for text in self.texts])

    @property
    def protocol(self) -> dict[str, Any]:
        by = {
            "logit": "the logit of the matching head",
            "difference": "the difference of the matching head's logits",
            "sum": f"cosine / temperature + {self.rerank_weight:g} times the difference of the matching head's logits",
        }
        second = f"the best {self.rerank_k} of each query ordered by {by[self.rerank_score]}"
        return {
            **super().protocol,
            "task": f"image-text retrieval in two stages: dot products of normalised embeddings; {second}",
            "rerank_k": self.rerank_k,
            "rerank_score": self.rerank_score,
            "beyond_rerank_k": "behind the candidates, in the order of the first stage",
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """
        Raises:
            ValueError: the model has no `match`, or for "sum" no `temperature`.
        """
        needed = ("match", "temperature") if self.rerank_score == "sum" else ("match",)
        if missing := [name for name in needed if not hasattr(model, name)]:
            raise ValueError(f"{type(model).__name__} cannot re-rank: expected a model with `{missing[0]}`")
        images, captions = (side.cpu() for side in self.embed(model, processor))
        yield from self.numbers(images, captions)
        matched = self.matched(model, processor, images, captions)
        yield from self.reranked(images, captions, matched, self.rerank_score)

    def matched(self, model: Any, processor: Any, images: Tensor, captions: Tensor) -> Matched:
        """The candidates of embeddings (n, P) and (m, P), each pair of them matched once."""
        # candidates in both directions, (n, k) and (m, k), as numbers of pairs
        best = {"tr": self._candidates(images, captions), "ir": self._candidates(captions, images)}
        pairs = {
            "tr": self._pair(torch.arange(len(images))[:, None], best["tr"]),
            "ir": self._pair(best["ir"], torch.arange(len(captions))[:, None]),
        }

        # each pair once; sorted, so that the pairs of a batch of pictures are adjacent
        keys = torch.cat([side.flatten() for side in pairs.values()]).unique()  # (R,)
        logits = self.match(model, processor, keys // len(self.unique), keys % len(self.unique))  # (R, 2)

        # cosine and matching logits of each candidate
        temperature = getattr(model, "temperature", torch.nan)
        sides = {"tr": (images, captions), "ir": (captions, images)}
        return Matched(
            best,
            {way: self._cosines(*sides[way], best[way]) for way in best},
            {way: logits[torch.searchsorted(keys, pairs[way])] for way in best},
            float(temperature.detach()) if isinstance(temperature, Tensor) else temperature,
        )

    def reranked(
        self, images: Tensor, captions: Tensor, matched: Matched, score: RerankScore
    ) -> Iterator[tuple[str, float]]:
        """The numbers of the second stage over embeddings (n, P) and (m, P)."""
        sides = {"tr": (images, captions), "ir": (captions, images)}
        ids = {"tr": (self.image_ids, self.text_ids), "ir": (self.text_ids, self.image_ids)}
        recalls = []
        for direction in ("tr", "ir"):
            scores = matched.scores(direction, score, self.rerank_weight)  # (Q, k)
            values = self._ask(*sides[direction], *ids[direction], matched.best[direction], scores)
            recalls += [values[f"recall@{k}"] for k in self.ks]
            for k in self.ks:
                yield f"{self.name}/rerank_{direction}_r@{k}", values[f"recall@{k}"]
            yield f"{self.name}/rerank_{direction}_median_rank", values["median_rank"]
            yield f"{self.name}/rerank_{direction}_reach", values["reach"]
        yield f"{self.name}/rerank_r_mean", sum(recalls) / len(recalls)

    def match(self, model: Any, processor: Any, pictures: Tensor, texts: Tensor) -> Tensor:
        """The head's logits of each pair, (R, 2) fp32: `pictures` are sorted numbers of rows, `texts` of texts."""
        # all texts are tokenised once, and truncated to the longest of each batch
        text = processor(text=self.unique, padding=True, truncation=True, return_tensors="pt")  # (u, L)
        lengths = text["attention_mask"].sum(1)
        logits = torch.empty(len(pictures), 2)

        column = Column(self.rows, "image")
        with evaluating(model):
            for rows in batches(len(self.rows), self.image_batch_size, "re-ranking", self.progress):
                # the pairs of these pictures, which may have none
                first, last = torch.searchsorted(pictures, torch.tensor([rows.start, rows.stop])).tolist()
                if first == last:
                    continue
                loaded = processor(images=opened(column[rows], rows.start), return_tensors="pt")
                pixels = on_device(loaded, model)["pixel_values"]
                states = model.matching_context(pixels)  # (b, S, D)

                # pairs sorted by length, to avoid padding
                order = first + lengths[texts[first:last]].argsort(stable=True)
                for pair in order.split(self.pair_batch_size):
                    longest = int(lengths[texts[pair]].max())
                    batch = {name: text[name][texts[pair], :longest] for name in ("input_ids", "attention_mask")}
                    index = (pictures[pair] - rows.start).to(states.device)
                    matched = model.match(**on_device(batch, model), image_states=states, context_index=index)
                    logits[pair] = matched.float().cpu()  # (r, 2)
        if not logits.isfinite().all():
            raise ValueError(f"{int((~logits.isfinite()).sum())} of {len(logits)} matching logits are not finite")
        return logits

    def _candidates(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """The gallery's best for each query by dot product, (Q, k)."""
        k = min(self.rerank_k, len(gallery))
        return torch.cat([(chunk @ gallery.T).topk(k, dim=1).indices for chunk in queries.split(self.chunk_size)])

    def _cosines(self, queries: Tensor, gallery: Tensor, best: Tensor) -> Tensor:
        """Those of the candidates, (Q, k)."""
        chunks = zip(queries.split(self.chunk_size), best.split(self.chunk_size), strict=True)
        return torch.cat([(chunk @ gallery.T).gather(1, places) for chunk, places in chunks])

    def _pair(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """A number for each pair of a picture and a text, which orders them by picture; shapes are broadcast."""
        return pictures * len(self.unique) + self.text_numbers[captions]

    def _ask(
        self, queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, best: Tensor, scores: Tensor
    ) -> dict[str, float]:
        """The metric of queries whose candidates `best` (Q, k) have `scores` (Q, k); and `reach`."""
        metric = RetrievalRecall(keep_in_memory=True)
        reached = 0
        for start in range(0, len(queries), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            cosines = (queries[rows] @ gallery.T).double()  # (q, G)
            # cosines span 2, so 3 below the least candidate is below them all; in double they stay apart
            floor = scores[rows].double().amin(1, keepdim=True) - 3
            final = (cosines + floor).scatter(1, best[rows], scores[rows].double())

            positives = match_ids(query_ids[rows], gallery_ids)
            metric.add_standing(standing(final, positives))
            reached += int(positives.gather(1, best[rows]).any(1).sum())
        return {**metric.compute(ks=list(self.ks)), "reach": reached / len(queries)}
