"""Sheets for queries of an image and words together (Figure 1, bottom right, of the OneR paper): "mixture input can
control image retrieval by combining the information from two modalities". Query f(I, T), gallery f(I), zero-shot.

Shapes: Q queries, G gallery pictures, P projection, K nearest.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oner.processing.image_processing_vl import open_image

from .embedding import Column, embed_images, embed_pairs, embed_texts, gallery_vectors, row_ids
from .sheets import Row, describe, new_figure, one_of_each_id, wrapped

WAYS = ("picture", "words", "both")


def composed_queries(
    model: Any, processor: Any, images: Sequence[Any], texts: Sequence[str], batch_size: int = 64
) -> dict[str, Tensor]:
    """L2-normalised embeddings (Q, P) of each query: its image, its words, and both in one sequence."""
    return {
        "picture": embed_images(model, processor, images, batch_size).cpu(),
        "words": embed_texts(model, processor, texts, batch_size).cpu(),
        "both": embed_pairs(model, processor, images, texts, batch_size).cpu(),
    }


def nearest(
    queries: Tensor, gallery: Tensor, count: int, hidden: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and indices (Q, K) of the `count` nearest of `gallery` (G, P), best first; ties in gallery order.

    Args:
        hidden: For each query the index in the gallery that it must not find, such as itself.

    Raises:
        ValueError: the gallery is smaller than `count`.
    """
    scores = queries @ gallery.T  # (Q, G)
    if hidden is not None:
        scores[torch.arange(len(scores)), torch.tensor(hidden)] = -torch.inf
    if count > len(gallery) - (hidden is not None):
        raise ValueError(f"cannot find the {count} nearest in a gallery of {len(gallery)}")

    # a stable sort, since topk does not define the order of ties
    best = scores.sort(dim=-1, descending=True, stable=True)
    return best.values[:, :count], best.indices[:, :count]


def composed_sheet(
    title: str,
    images: Sequence[Any],
    texts: Sequence[str],
    found: Mapping[str, tuple[Tensor, Tensor]],
    gallery: Sequence[Any],
    right: Mapping[str, Sequence[Sequence[bool]]] | None = None,
    same: Sequence[int] | None = None,
) -> Any:
    """A Figure with three rows for each query: the results for its image, its text, and both.

    Args:
        images, texts: the queries.
        found: for each way "picture", "words", "both" the (scores, places) of `nearest`, (Q, K) each.
        gallery: pictures, by place.
        right: for each way, whether a find shares the query's id: framed in green.
        same: how many pictures of the gallery could be framed, for each query.
    """
    shown = found["both"][1].shape[1]

    figure = new_figure(1.0 * (shown + 2.6), 3.75 * len(images) + 0.55)
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=10, parse_math=False)

    # three rows per query and a narrow one between queries; columns: the query's image, a label, the results
    grid = figure.add_gridspec(
        4 * len(images) - 1, shown + 2, left=0.02, right=0.985, bottom=0.2 / height, top=1 - 0.6 / height,
        width_ratios=[2.0, 0.6] + [1] * shown, height_ratios=([1, 1, 1, 0.22] * len(images))[:-1],
        hspace=0.28, wspace=0.1,
    )  # fmt: skip

    # one block per query: its image and text on the left
    for query, (image, text) in enumerate(zip(images, texts, strict=True)):
        top = 4 * query
        axes = figure.add_subplot(grid[top : top + 3, 0])
        _picture(axes, image, "0.3")
        beside = "" if same is None else f"\n{same[query]} of its id to be found"
        axes.set_xlabel("“" + wrapped(text, 20, 3) + "”" + beside, fontsize=9, parse_math=False)

        # and on the right one row of results for each kind of query
        for line, way in enumerate(WAYS):
            label = figure.add_subplot(grid[top + line, 1])
            label.axis("off")
            label.text(0.5, 0.5, way, ha="center", va="center", fontsize=8, color="0.3", rotation=90)
            scores, places = (values[query].tolist() for values in found[way])
            for column, (score, place) in enumerate(zip(scores, places, strict=True)):
                hit = right is not None and right[way][query][column]
                axes = figure.add_subplot(grid[top + line, 2 + column])
                _picture(axes, gallery[place], "#1a9641" if hit else "0.8", 2.2 if hit else 0.6)
                axes.set_xlabel(f"{score:.2f}", fontsize=6.5, labelpad=1, color="0.35")
    return figure


def _picture(axes: Any, image: Any, colour: str, line: float = 0.6) -> None:
    axes.imshow(open_image(image), interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=line)


class ComposedEvaluator:
    """Draws sheets of the results for image, text, and both; `MultimodalRetrievalEvaluator` gives the numbers.

    Args:
        rows: the queries, `{"image", "captions", "id"}`; the first caption is asked.
        gallery: the rows searched, by default `rows` themselves; then a query's own picture is hidden from it.
        queries: (picture, text) of the caller's choice for the second sheet, else pictures of `rows`, each with the
            caption of another.
        shown: queries a sheet.
        found: pictures a line.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        gallery: Sequence[Row] | None = None,
        queries: Sequence[tuple[Any, str]] | None = None,
        shown: int = 4,
        found: int = 8,
        seed: int = 0,
        name: str = "composed",
    ) -> None:
        self.rows = rows
        self.gallery = gallery
        self.queries = queries
        self.shown = shown
        self.found = found
        self.seed = seed
        self.name = name

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """
        Yields a sheet of queries with own captions, results with the same id in green, and a sheet of other words.
        """
        # the gallery; a query in it must not find itself
        gallery = self.rows if self.gallery is None else self.gallery
        pictures = Column(gallery, "image")
        ids = row_ids(gallery)
        vectors = gallery_vectors(model, processor, gallery).cpu()  # (G, P)
        queries = one_of_each_id(_Numbered(self.rows), self.shown, self.seed)
        hidden = [row["place"] for row in queries] if self.gallery is None else None

        # images with their own captions; a result is right if it has the query's id
        images = [row["image"] for row in queries]
        texts = [str(row["captions"][0]) for row in queries]
        own = composed_queries(model, processor, images, texts)
        results = {way: nearest(own[way], vectors, self.found, hidden) for way in WAYS}
        right = {
            way: [[ids[j] == row.get("id") for j in line] for row, line in zip(queries, lines.tolist(), strict=True)]
            for way, (_, lines) in results.items()
        }
        same = [max(0, ids.count(row.get("id")) - (hidden is not None)) for row in queries]
        title = f"{describe(model)}: nearest of {len(pictures)} pictures by picture, caption, both (green: same id)"
        yield f"{self.name}/sheet", composed_sheet(title, images, texts, results, pictures, right, same)

        # images with other texts: there is no right answer, the sheet is judged by eye
        mixed = self.queries or list(zip(images, texts[1:] + texts[:1], strict=True))
        images = [image for image, _ in mixed]
        texts = [text for _, text in mixed]
        free = composed_queries(model, processor, images, texts)
        own_places = hidden if self.queries is None else None
        results = {way: nearest(free[way], vectors, self.found, own_places) for way in WAYS}
        title = f"{describe(model)}: nearest of {len(pictures)} pictures by picture, other words, both in one sequence"
        yield f"{self.name}/other_words_sheet", composed_sheet(title, images, texts, results, pictures)


class _Numbered(Sequence):
    """Rows with their index."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return {**self.rows[index], "place": index}
