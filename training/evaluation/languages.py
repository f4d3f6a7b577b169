"""Evaluates retrieval in several languages: between pictures and texts, and between texts of two languages.

Shapes: n rows, P width of the projection.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .embedding import Column, Row, embed_images, embed_texts, numbered, row_ids
from .retrieval import ask


class LanguagesEvaluator:
    """Recall of each language, between pictures and texts and between texts of two languages.

    The captions of a row are ordered by language, with equally many of each; the first of each language is the query.
    A text that rows of one concept share is in the gallery once.

    Args:
        languages: In the order of the captions; the others are compared with the first.

    Yields name/de/tr_r@k (pictures ask German texts), name/de/ir_r@k (the other way), name/de/tt_r@k (German texts
    ask those of each other language, in the mean), and name/de/of_en, the mean of tr and ir at the largest k over
    English's; name/of_en is the mean over all languages but the first.

    Raises:
        ValueError: there are no rows or fewer than two languages, a language is repeated, or a row's number of
            captions
            is not a multiple of the number of languages.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        languages: Sequence[str],
        batch_size: int = 64,
        ks: Sequence[int] = (1, 5, 10),
        name: str = "eval",
        progress: bool = True,
    ) -> None:
        if len(rows) == 0:
            raise ValueError("there are no rows to evaluate on")
        if len(languages) < 2 or len(set(languages)) < len(languages):
            raise ValueError(f"languages must be two or more different ones, got {', '.join(languages) or 'none'}")
        self.rows = rows
        self.languages = tuple(languages)
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.name = name
        self.progress = progress
        self.texts = self._by_language()

    def _by_language(self) -> list[tuple[list[str], list[int]]]:
        """Texts of each language, and their rows."""
        texts: list[dict[tuple, int]] = [{} for _ in self.languages]
        for number, (row, concept) in enumerate(zip(self.rows, row_ids(self.rows), strict=True)):
            captions = row["captions"]
            each, rest = divmod(len(captions), len(self.languages))
            if rest or not each:
                raise ValueError(
                    f"row {number} has {len(captions)} captions; expected equally many in each of "
                    f"{', '.join(self.languages)}"
                )
            for own, text in zip(texts, captions[::each], strict=True):
                own.setdefault((concept, text), number)
        return [([text for _, text in own], list(own.values())) for own in texts]

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "retrieval by language, dot products of normalised embeddings",
            "languages": list(self.languages),
            "pictures": len(self.rows),
            "texts": {language: len(own) for language, (own, _) in zip(self.languages, self.texts, strict=True)},
            "positives": "same concept id",
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Embeds both sides and yields (name, value)."""
        (ids,) = numbered(row_ids(self.rows))
        images = embed_images(model, processor, Column(self.rows, "image"), self.batch_size, self.progress)  # (n, P)
        texts = [
            (embed_texts(model, processor, own, 4 * self.batch_size, self.progress), ids[torch.tensor(owners)])
            for own, owners in self.texts
        ]
        recalls = []
        for number, language in enumerate(self.languages):
            values = dict(self._language(images, ids, texts, number))
            recalls.append((values[f"tr_r@{max(self.ks)}"] + values[f"ir_r@{max(self.ks)}"]) / 2)
            yield from ((f"{self.name}/{language}/{what}", value) for what, value in values.items())

        # relative to the first language, unless its recall is 0
        if recalls[0] > 0:
            shares = [recall / recalls[0] for recall in recalls[1:]]
            first = self.languages[0]
            for language, share in zip(self.languages[1:], shares, strict=True):
                yield f"{self.name}/{language}/of_{first}", share
            yield f"{self.name}/of_{first}", sum(shares) / len(shares)

    def _language(
        self, images: Tensor, ids: Tensor, texts: Sequence[tuple[Tensor, Tensor]], number: int
    ) -> Iterator[tuple[str, float]]:
        """What one language finds, and what finds it."""
        own, own_ids = texts[number]
        tr = ask(images, own, ids, own_ids, self.ks)
        ir = ask(own, images, own_ids, ids, self.ks)
        others = [
            ask(own, other, own_ids, other_ids, self.ks)
            for place, (other, other_ids) in enumerate(texts)
            if place != number
        ]
        for k in self.ks:
            yield f"tr_r@{k}", tr[f"recall@{k}"]
            yield f"ir_r@{k}", ir[f"recall@{k}"]
            yield f"tt_r@{k}", sum(one[f"recall@{k}"] for one in others) / len(others)
        yield f"chance@{max(self.ks)}", ir[f"chance@{max(self.ks)}"]
