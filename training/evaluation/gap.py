"""Measures the modality gap: how far images, texts and image + text are apart in one space (Figure 4 of OneR's paper).

All measures use L2-normalised retrieval embeddings of the same rows. In a space without a gap, the centroids coincide,
the distributions are the same, paired cosines are far above unpaired ones, and no classifier can tell an image from a
text.

Shapes: B rows, P projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .embedding import embed_images, embed_pairs, embed_texts, numbered, row_ids
from .metrics import centroid_distance
from .sheets import Row, describe, new_figure, one_of_each_id

KINDS = ("image", "text", "both")
# colour, marker and name of each kind in figures
LOOKS = {
    "image": ("#2f6fdb", "o", "image"), "text": ("#e0452b", "s", "text"), "both": ("#2ca25f", "^", "image + text")
}  # fmt: skip


def embed_rows(model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 64) -> dict[str, Tensor]:
    """Normalised embeddings (B, P), on the CPU, of each row's image ("image"), first caption ("text"), and both in one
    sequence ("both")."""
    images = [row["image"] for row in rows]
    texts = [str(row["captions"][0]) for row in rows]
    return {
        "image": embed_images(model, processor, images, batch_size).cpu(),
        "text": embed_texts(model, processor, texts, batch_size).cpu(),
        "both": embed_pairs(model, processor, images, texts, batch_size).cpu(),
    }


def paired_cosines(image: Tensor, text: Tensor, ids: Sequence[Any] | None = None) -> tuple[float, float]:
    """Mean cosine of image i with text i, and of images with texts of other ids; inputs (B, P) are normalised.

    Raises:
        ValueError: there are no unpaired rows to compare with.
    """
    cosines = image.double() @ text.double().T  # (B, B)

    # an unpaired text has another id, not just another row
    (codes,) = numbered(range(len(image)) if ids is None else ids)  # (B,)
    foreign = codes[:, None] != codes[None, :]  # (B, B)
    if not foreign.any():
        raise ValueError("unpaired cosines need rows of at least 2 different ids, got 1")
    return float(cosines.diagonal().mean()), float(cosines[foreign].mean())


def _halves(first: Tensor, second: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for fitting and for testing; row i of both clouds is in the same half."""
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"expected two clouds of the same size, at least 4 rows, got {len(first)} and {len(second)}")
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    return order[: len(order) // 2], order[len(order) // 2 :]


def _accuracy(first: Tensor, second: Tensor) -> float:
    """Balanced accuracy of scores that should be positive for `first` and negative for `second`; ties count half."""
    right = torch.cat([first.sign(), -second.sign()])
    return float((right + 1).mean() / 2)


def centroid_separability(first: Tensor, second: Tensor, seed: int = 0) -> float:
    """Accuracy of a nearest-centroid classifier of two clouds, (B, P) each: fitted on one half of the rows, tested on
    the other. .5 means that the centroids coincide, 1 that they separate the clouds."""
    fit, judge = _halves(first, second, seed)
    first, second = first.double(), second.double()

    # the nearer centroid is given by the side of the plane halfway between them
    one, other = first[fit].mean(0), second[fit].mean(0)  # (P,)
    direction = one - other
    middle = (one + other) / 2
    return _accuracy((first[judge] - middle) @ direction, (second[judge] - middle) @ direction)


def linear_separability(first: Tensor, second: Tensor, seed: int = 0, ridge: float = 1e-2) -> float:
    """Like `centroid_separability`, with a ridge classifier in closed form, which also finds gaps of small variance.

    It is stricter, since any trace of the modality counts. `ridge` is relative to the mean variance.
    """
    fit, judge = _halves(first, second, seed)
    first, second = first.double(), second.double()

    # centred points, +1 for one cloud and -1 for the other
    points = torch.cat([first[fit], second[fit]])  # (B, P), B / 2 of each cloud
    middle = points.mean(0)
    points = points - middle
    sides = torch.cat([torch.ones(len(fit)), -torch.ones(len(fit))]).double()  # (B,)

    # (X'X + ridge I) w = X'y; the floor keeps the ridge positive where all points coincide
    gram = points.T @ points  # (P, P)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    direction = torch.linalg.lstsq(gram, points.T @ sides[:, None]).solution[:, 0]  # (P,)
    return _accuracy((first[judge] - middle) @ direction, (second[judge] - middle) @ direction)


def frechet_share(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance (Dowson and Landau 1982, as in FID) of two centred clouds (n, P) and (m, P), as a
    share of their variance: 1 - 2 tr (A^1/2 B A^1/2)^1/2 / (tr A + tr B), with covariances A and B. 0: equal
    covariances; 1: no direction in common.

    `centroid_distance` measures what centring removes. For two samples of one distribution the value is above 0, and
    higher for smaller samples.
    """
    first = first.double() - first.double().mean(0)
    second = second.double() - second.double().mean(0)

    # A = X'X / n and B = Y'Y / m: the trace of the root is the sum of the singular values of X Y' / (n m)^1/2
    common = torch.linalg.svdvals(first @ second.T).sum() / (len(first) * len(second)) ** 0.5  # of (n, m)
    variance = first.square().sum() / len(first) + second.square().sum() / len(second)
    return float(1 - 2 * common / variance) if variance > 0 else 0.0


def distribution_gap(first: Tensor, second: Tensor, seed: int = 0) -> tuple[float, float]:
    """How much two clouds (B, P) of the same rows differ apart from their centroids, and how much two samples of one
    cloud do: `frechet_share` of half of one with the other half of the other, and of the two halves of each, both
    averaged over two. The second value is the baseline: what a space without a gap would give.

    arXiv 2604.00279 also splits the modality gap into a centroid gap and a distribution gap, and finds that the second
    predicts how useful a space is. Its formula was not available: this measures the same part in another way.
    """
    one, other = _halves(first, second, seed)
    across = frechet_share(first[one], second[other]) + frechet_share(first[other], second[one])
    within = frechet_share(first[one], first[other]) + frechet_share(second[one], second[other])
    return across / 2, within / 2


def gap_measures(
    embeddings: Mapping[str, Tensor], ids: Sequence[Any] | None = None, seed: int = 0
) -> dict[str, float]:
    """Every number of the gap from normalised `embeddings` "image", "text" and "both", (B, P) each.

    Distances between the centroids of any two kinds, how much the distributions of images and texts differ apart from
    that, mean paired and unpaired cosine, and the two separabilities (.5: no gap).
    """
    image, text, both = (embeddings[kind] for kind in KINDS)
    paired, unpaired = paired_cosines(image, text, ids)
    across, within = distribution_gap(image, text, seed)
    return {
        "image_text": float(centroid_distance(image, text)),
        "image_both": float(centroid_distance(image, both)),
        "text_both": float(centroid_distance(text, both)),
        "distribution": across,
        "distribution_within": within,
        "cosine_paired": paired,
        "cosine_unpaired": unpaired,
        "centroid_separability": centroid_separability(image, text, seed),
        "linear_separability": linear_separability(image, text, seed),
    }


def tsne(vectors: Tensor, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008) of (B, P) in two dimensions, (B, 2), from a PCA start.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra to install.
        ValueError: there are not more points than the perplexity.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'oner[plots]'") from error
    if len(vectors) <= perplexity:
        raise ValueError(f"t-SNE needs more points than its perplexity of {perplexity:g}, got {len(vectors)}")
    # one job and a PCA start, for reproducible figures
    drawn = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed, n_jobs=1)
    return torch.from_numpy(drawn.fit_transform(vectors.double().numpy())).float()


def draw_clouds(axes: Any, points: Mapping[str, Tensor], links: int) -> None:
    """Clouds (B, 2) of some of `KINDS` on matplotlib `axes`, in the paper's colours; lines join `links` pairs."""
    for one, two in zip(points["image"][:links].tolist(), points["text"][:links].tolist(), strict=True):
        axes.plot(*zip(one, two, strict=True), color="0.6", linewidth=0.5, zorder=1)
    for kind, place in points.items():
        colour, marker, label = LOOKS[kind]
        axes.scatter(
            place[:, 0].numpy(), place[:, 1].numpy(), s=13, c=colour, marker=marker, alpha=0.7, linewidths=0,
            label=label, zorder=2,
        )  # fmt: skip

    # t-SNE's axes have no unit
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(color="0.8", linewidth=0.6)


def gap_figure(embeddings: Mapping[str, Tensor], title: str, note: str = "", links: int = 25, seed: int = 0) -> Any:
    """A Figure with the t-SNE of images, texts and both, in the paper's colours; thin lines join `links` pairs.

    Args:
        embeddings: Normalised, "image", "text" and "both", (B, P) each.
        note: Text below the figure, for the numbers.
    """
    # one t-SNE for all three clouds, so that their points can be compared
    count = len(embeddings["image"])
    points = tsne(torch.cat([embeddings[kind] for kind in KINDS]), min(30.0, (3 * count - 1) / 3), seed)
    image, text, both = points.split(count)  # (B, 2) each

    figure = new_figure(7.0, 7.2)
    axes = figure.add_axes((0.03, 0.12, 0.94, 0.79))
    draw_clouds(axes, {"image": image, "text": text, "both": both}, links)
    axes.legend(  # below the plot, so that it hides no points
        loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=9, frameon=False, markerscale=1.8
    )
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.text(0.5, 0.02, note, ha="center", va="bottom", fontsize=8, color="0.3", parse_math=False)
    return figure


class GapEvaluator:
    """Yields the measures of the modality gap and its t-SNE figure.

    Args:
        rows: `{"image", "captions", "id"}`; one row per id is used if there are enough ids, so that captions do not
            repeat.
        count: Number of embedded rows.
        drawn: Number of rows in the t-SNE figure.
    """

    def __init__(
        self, rows: Sequence[Row], count: int = 500, drawn: int = 300, seed: int = 0, name: str = "gap"
    ) -> None:
        self.rows = rows
        self.count = count
        self.drawn = drawn
        self.seed = seed
        self.name = name

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "modality gap of normalised retrieval embeddings of pictures, first captions, and both",
            "rows": min(self.count, len(self.rows)),
            "distance": "Euclidean, of centroids",
            "distribution": "squared Fréchet distance of centred pictures and texts, a share of their variance, half "
            "of the rows each; distribution_within: of two halves of one modality",
            "cosine_unpaired": "pictures with captions of other ids",
            "separability": "balanced accuracy on a held-out half; 0.5: no gap",
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Yields every entry of `gap_measures`, then the figure."""
        # the numbers, over all rows
        rows = one_of_each_id(self.rows, self.count, self.seed)
        embeddings = embed_rows(model, processor, rows)
        measures = gap_measures(embeddings, row_ids(rows), self.seed)
        yield from ((f"{self.name}/{key}", value) for key, value in measures.items())

        # the figure, for fewer rows, with the numbers below it
        drawn = {kind: vectors[: self.drawn] for kind, vectors in embeddings.items()}
        title = f"{describe(model)}\nt-SNE of {len(drawn['image'])} rows; lines join some pictures with their captions"
        note = (
            f"distance of centroids: image-text {measures['image_text']:.2f}, "
            f"image-both {measures['image_both']:.2f}, text-both {measures['text_both']:.2f}; "
            f"distribution {measures['distribution']:.2f}, "
            f"within one modality {measures['distribution_within']:.2f}\n"
            f"cosine paired {measures['cosine_paired']:.2f}, unpaired {measures['cosine_unpaired']:.2f}; "
            f"nearest centroid tells image from text in {measures['centroid_separability']:.0%} (no gap: 50%)"
        )
        yield f"{self.name}/tsne", gap_figure(drawn, title, note, seed=self.seed)
