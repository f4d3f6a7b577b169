"""Retrieval: images query captions (TR), captions query images (IR), image + caption query images (OneR, Fig 1).

Shapes: n images, m captions, P width of the projection. Scores are cosines; all values are in [0, 1] except ranks
(from 1) and the gap. Positives are rows with the same concept id; a row without id is a separate concept, which is the
protocol of COCO and Flickr (ALBEF, CLIP_benchmark).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .embedding import (
    Column,
    Gallery,
    PictureRows,
    Row,
    embed_images,
    embed_pairs,
    embed_texts,
    numbered,
    picture_key,
    row_ids,
)
from .metric_retrieval_recall import RetrievalRecall
from .metrics import centroid_distance, chunked_standing


def ask(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ks: Sequence[int],
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """The `RetrievalRecall` metric of queries (Q, P) against a gallery (G, P), in chunks; see `chunked_standing`."""
    keys = [
        ids if ids is None else ids.to(queries.device) for ids in (query_ids, gallery_ids, query_keys, gallery_keys)
    ]
    metric = RetrievalRecall(keep_in_memory=True)
    metric.add_standing(chunked_standing(queries, gallery, *keys, chunk_size=chunk_size))
    return metric.compute(ks=list(ks))


def caption_table(
    rows: Sequence[Row], captions: Literal["all", "first"], clean: Callable[[str], str] | None = None
) -> tuple[list[str], list[int]]:
    """The captions of rows, rewritten by `clean`, and the row index of each.

    A caption that an earlier row of the same concept already has is omitted: several drawings of one concept
    share their captions, and a gallery full of copies would measure nothing. Within a row nothing is omitted.

    Raises:
        ValueError: a row without captions.
    """
    texts = []
    owners = []
    seen = set()
    for number, (row, concept) in enumerate(zip(rows, row_ids(rows), strict=True)):
        # the row's captions as used in queries
        own = list(row["captions"])[: 1 if captions == "first" else None]
        own = own if clean is None else [clean(text) for text in own]
        if not own:
            raise ValueError(f"row {number} has no captions")

        # keep those that no earlier row of the concept has
        new = [text for text in own if (concept, text) not in seen]
        seen.update((concept, text) for text in own)
        texts += new
        owners += [number] * len(new)
    return texts, owners


class RetrievalEvaluator:
    """Text and image retrieval over `rows`, each an image with one or more captions; rows with the same
    image and concept are merged, with the captions of all.

    TR: each image ranks all captions; any caption of its concept is right. IR: each caption ranks all images;
    any image of its concept is right. `captions`: use "all" captions of a row, or only the "first".
    `clean_caption` rewrites them first, as in training.

    Yields name/tr_r@k, name/ir_r@k, their chance (name/tr_chance@k ...), the median ranks, name/r_mean (mean over both
    directions and all k, ALBEF's r_mean) and name/gap, the distance between the centroids of images and captions.
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
    ):
        if captions not in ("all", "first"):
            raise ValueError(f'captions must be "all" or "first", got {captions!r}')
        if len(rows) == 0:
            raise ValueError("there are no rows to evaluate on")
        self.rows = PictureRows(rows)
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.name = name
        self.captions = captions
        self.chunk_size = chunk_size
        self.progress = progress
        self.clean_caption = clean_caption

        # a caption has the concept of its row
        described = [
            {"captions": own, "id": concept} for own, concept in zip(self.rows.captions, self.rows.ids, strict=True)
        ]
        self.texts, owners = caption_table(described, captions, clean_caption)
        (self.image_ids,) = numbered(self.rows.ids)  # (n,)
        self.text_ids = self.image_ids[torch.tensor(owners)]  # (m,)

    @property
    def protocol(self) -> dict[str, Any]:
        """The evaluation protocol, for the results file."""
        return {
            "task": "image-text retrieval, dot products of normalised embeddings, no re-ranking",
            "captions": self.captions,
            **({} if self.clean_caption is None else {"captions_rewritten_by": self.clean_caption.__name__}),
            "pictures": len(self.rows),
            "texts": len(self.texts),
            "concepts": len(self.image_ids.unique()),
            "positives": "same concept id; captions that rows of one concept share stand in the gallery once",
            "ties": "expectation over orders of equal scores",
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Embed both modalities and yield (name, value)."""
        yield from self.numbers(*self.embed(model, processor))

    def embed(self, model: Any, processor: Any) -> tuple[Tensor, Tensor]:
        """Embeddings of the images (n, P) and the captions (m, P), normalised."""
        images = embed_images(model, processor, Column(self.rows, "image"), self.batch_size, self.progress)
        return images, embed_texts(model, processor, self.texts, 4 * self.batch_size, self.progress)

    def numbers(self, images: Tensor, captions: Tensor) -> Iterator[tuple[str, float]]:
        """The scores of embeddings (n, P) and (m, P), as (name, value)."""
        # image queries against captions, caption queries against images
        directions = {
            "tr": ask(images, captions, self.image_ids, self.text_ids, self.ks, chunk_size=self.chunk_size),
            "ir": ask(captions, images, self.text_ids, self.image_ids, self.ks, chunk_size=self.chunk_size),
        }
        for direction, values in directions.items():
            for k in self.ks:
                yield f"{self.name}/{direction}_r@{k}", values[f"recall@{k}"]
                yield f"{self.name}/{direction}_chance@{k}", values[f"chance@{k}"]
            yield f"{self.name}/{direction}_median_rank", values["median_rank"]

        # one number for both directions, and the modality gap
        recalls = [values[f"recall@{k}"] for values in directions.values() for k in self.ks]
        yield f"{self.name}/r_mean", sum(recalls) / len(recalls)
        yield f"{self.name}/gap", centroid_distance(images, captions)


class MultimodalRetrievalEvaluator:
    """Does image + caption retrieve other images of its concept better than the image or the caption alone?

    Queries are `query_rows` in three forms: f(I, T) with image and caption as one sequence, f(I), and f(T). With
    `captions="first"` a row gives one query, with `"all"` one per caption. The gallery is the images of
    `gallery_rows` (default: the same rows), f(I) or with `gallery="both"` f(I, T). Rows that show the same image of a
    concept are one there. The query's own image is excluded; any other image of its concept is right. Queries whose
    concept has no other image are left out.

    Yields name/multimodal_both_r@k, ..._image_r@k, ..._text_r@k, ..._chance@k, the median ranks, and ..._queries.
    """

    def __init__(
        self,
        query_rows: Sequence[Row],
        gallery_rows: Sequence[Row] | None = None,
        batch_size: int = 64,
        ks: Sequence[int] = (1, 5, 10),
        name: str = "eval",
        gallery: Literal["image", "both"] = "image",
        chunk_size: int = 1024,
        progress: bool = True,
        captions: Literal["all", "first"] = "first",
    ):
        if captions not in ("all", "first"):
            raise ValueError(f'captions must be "all" or "first", got {captions!r}')
        if gallery not in ("image", "both"):
            raise ValueError(f'gallery must be "image" or "both", got {gallery!r}')
        self.query_rows = query_rows
        self.gallery_rows = query_rows if gallery_rows is None else gallery_rows
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.name = name
        self.gallery = gallery
        self.chunk_size = chunk_size
        self.progress = progress
        self.captions = captions

        # the gallery's images of each concept; equal keys mean the same image
        query_keys = [picture_key(row["image"]) for row in self.query_rows]
        gallery_keys = [picture_key(row["image"]) for row in self.gallery_rows]
        pictures: dict[Any, set[str]] = {}
        gallery_concepts = row_ids(self.gallery_rows, "gallery")
        concepts = row_ids(self.query_rows, "query")
        for concept, key in zip(gallery_concepts, gallery_keys, strict=True):
            pictures.setdefault(concept, set()).add(key)
        entries = list(zip(gallery_concepts, gallery_keys, strict=True))
        first = dict(zip(reversed(entries), reversed(range(len(entries))), strict=True))
        self.searched = sorted(first.values())  # each picture of a concept once, in G places

        # rows that have something to retrieve
        self.asked = [
            number
            for number, (concept, key) in enumerate(zip(concepts, query_keys, strict=True))
            if pictures.get(concept, set()) - {key}
        ]
        if not self.asked:
            raise ValueError(
                f"none of the {len(query_rows)} query rows has another picture of its concept among the "
                f"{len(self.gallery_rows)} gallery rows: rows of one concept must share an id"
            )

        # a query is an image, by its index in `asked`, and one of its captions
        of_rows = [self.query_rows[number]["captions"] for number in self.asked]
        of_rows = [texts[:1] if captions == "first" else texts for texts in of_rows]
        self.texts = [text for texts in of_rows for text in texts]
        self.pictures = [place for place, texts in enumerate(of_rows) for _ in texts]

        # equal ids are right, equal keys are excluded: (Q,) and (G,) each
        asking = [self.asked[place] for place in self.pictures]
        searched_concepts, searched_keys = zip(*(entries[number] for number in self.searched), strict=True)
        self.query_ids, self.gallery_ids = numbered([concepts[number] for number in asking], searched_concepts)
        self.query_keys, self.gallery_keys = numbered([query_keys[number] for number in asking], searched_keys)

    @property
    def protocol(self) -> dict[str, Any]:
        """The evaluation protocol, for the results file."""
        return {
            "task": "pictures of the same concept from picture + caption, picture alone, caption alone",
            "queries": len(self.texts),
            "pictures": len(self.asked),
            "pictures_left_out": len(self.query_rows) - len(self.asked),
            "gallery": len(self.searched),
            "gallery_embedding": {"image": "f(I)", "both": "f(I, T)"}[self.gallery],
            "captions": self.captions,
            "excluded": "the query's own picture",
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Embed the gallery once and the queries in three forms, and yield (name, value)."""
        # the gallery, (G, P)
        options = {"batch_size": self.batch_size, "progress": self.progress}
        searched = Column(self.gallery_rows, "image", self.searched)
        if self.gallery == "both":
            gallery_texts = [self.gallery_rows[number]["captions"][0] for number in self.searched]
            gallery = embed_pairs(model, processor, searched, gallery_texts, **options)
        elif isinstance(self.gallery_rows, Gallery):  # which keeps those of all its rows
            gallery = self.gallery_rows.vectors(model, processor, **options)[self.searched]
        else:
            gallery = embed_images(model, processor, searched, **options)

        # the queries, (Q, P) each; an image with several captions is embedded once for f(I)
        pictures = Column(self.query_rows, "image", self.asked)
        asking = Column(self.query_rows, "image", [self.asked[place] for place in self.pictures])
        queries = {
            "both": embed_pairs(model, processor, asking, self.texts, **options),
            "image": embed_images(model, processor, pictures, **options)[self.pictures],
            "text": embed_texts(model, processor, self.texts, **options),
        }

        # every kind of query against the same gallery; chance is the same for all
        matching = (self.query_ids, self.gallery_ids, self.ks, self.query_keys, self.gallery_keys, self.chunk_size)
        for kind, embeddings in queries.items():
            values = ask(embeddings, gallery, *matching)
            for k in self.ks:
                yield f"{self.name}/multimodal_{kind}_r@{k}", values[f"recall@{k}"]
            yield f"{self.name}/multimodal_{kind}_median_rank", values["median_rank"]
        for k in self.ks:
            yield f"{self.name}/multimodal_chance@{k}", values[f"chance@{k}"]
        yield f"{self.name}/multimodal_queries", values["queries"]
