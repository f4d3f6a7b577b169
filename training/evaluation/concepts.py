"""Evaluates which words the concept head predicts for an image, and where (SIMLA, section 2.4; supplement, Figure 2).

The head is trained on a few words of each caption, those with the most attention of the multimodal [CLS]. So it need
not predict all of them, and may predict words that no caption has. The numbers are the shares of its most likely words
that are in the image's captions; the baseline is one list of words for all images.

Shapes: B images, V words of the vocabulary, k predicted words, h x w patches.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oner.processing.image_processing_vl import open_image

from .embedding import batches
from .grounding import as_seen, whole_picture
from .sheets import (
    Panel,
    Row,
    describe,
    evaluating,
    heat_sheet,
    on_device,
    one_of_each_id,
    wrapped,
)


def pixels_of(model: Any, processor: Any, images: Sequence[Any]) -> Tensor:
    """(B, 3, H, W) of whole images, without crop, on the model's device."""
    batch = processor(images=[open_image(image) for image in images], return_tensors="pt", **whole_picture(model))
    return on_device(batch, model)["pixel_values"]


def concept_probabilities(
    model: Any, processor: Any, images: Sequence[Any], batch_size: int = 64, progress: bool = False
) -> Tensor:
    """The concept head's probability of every word, sigmoid of its logits: (B, V), on the CPU; 0 for special tokens.

    Raises:
        TypeError: the model has no `concepts`.
    """
    if not hasattr(model, "concepts"):
        raise TypeError(
            f"concepts need a model with a concept head, such as SimlaForPreTraining, got {type(model).__name__}"
        )
    with evaluating(model):
        probabilities = [
            model.concepts(pixels_of(model, processor, images[chosen])).float().sigmoid().cpu()
            for chosen in batches(len(images), batch_size, "pictures", progress)
        ]

    probabilities = torch.cat(probabilities)  # (B, V)
    probabilities[:, special_ids(processor)] = 0
    return probabilities


def beyond_usual(probabilities: Tensor, usual: Tensor) -> Tensor:
    """Difference (B, V) of the head's logits to the `usual` ones (V,): what is specific to an image, while frequent
    words are likely for every image. Special tokens get -inf."""
    surer = probabilities.logit(1e-6) - usual.logit(1e-6)  # (B, V), the clamp keeps 0 and 1 finite
    return surer.masked_fill(probabilities == 0, -torch.inf)


def special_ids(processor: Any) -> list[int]:
    """The ids of special tokens, which are not words."""
    return sorted({*processor.tokenizer.all_special_ids, processor.image_token_id})


def caption_words(processor: Any, captions: Sequence[str], length: int | None = None) -> set[int]:
    """The token ids of an image's captions as the model reads them, without special tokens."""
    ids = processor(text=list(captions), return_tensors=None, padding=False, max_length=length)["input_ids"]
    return {token for row in ids for token in row} - set(special_ids(processor))


def ranks_of(scores: Tensor, right: Collection[int]) -> Tensor:
    """The sorted ranks (n,), from 1, of the n right tokens among scores (V,); ties are ordered by id."""
    ranks = torch.empty(len(scores), dtype=torch.long)  # (V,)
    # the inverse permutation of the order
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1)
    return ranks[sorted(right)].sort().values


def average_precision(ranks: Tensor) -> float:
    """
    Average precision from sorted ranks (n,), from 1: the mean over right tokens of the share of right ones so far.
    """
    return float((torch.arange(1, len(ranks) + 1) / ranks).mean())


def concept_scores(
    probabilities: Sequence[Tensor], words: Sequence[Collection[int]], ks: Sequence[int]
) -> dict[str, float]:
    """Means over images, from scores (B, V) and the token ids of each image's captions.

    precision@k: share of the k most likely tokens that are in the captions; hit@k: whether any is; recall@k: share of
    the captions' tokens among them; mean_average_precision: over the whole order.
    """
    ranks = [ranks_of(scores, right) for scores, right in zip(probabilities, words, strict=True)]
    values = {"mean_average_precision": sum(map(average_precision, ranks)) / len(ranks)}

    # right ones among the k first of each picture
    for k in ks:
        hits = [int((places <= k).sum()) for places in ranks]
        values[f"precision@{k}"] = sum(hits) / k / len(hits)
        values[f"hit@{k}"] = sum(count > 0 for count in hits) / len(hits)
        values[f"recall@{k}"] = sum(n / len(places) for n, places in zip(hits, ranks, strict=True)) / len(hits)
    return values


def concept_sheet(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    k: int = 5,
    layer: int | None = None,
    usual: Tensor | None = None,
) -> Any:
    """
    A Figure with one row per image: the image and its caption, then the maps of its k most likely tokens.

    Below each map are the token's probability, and whether a caption has the token. With `usual` (V,) the tokens are
    those with the largest difference to it.
    """

    # which k tokens to draw
    images = [row["image"] for row in rows]
    probabilities = concept_probabilities(model, processor, images)
    tokens = (probabilities if usual is None else beyond_usual(probabilities, usual)).topk(k).indices  # (B, k)

    # one map for each: every image is repeated k times
    with evaluating(model):
        pixels = pixels_of(model, processor, images).repeat_interleave(k, 0)  # (B * k, 3, H, W)
        maps = model.ground_concepts(pixels, tokens.flatten().to(pixels.device), layer).float().cpu()  # (B * k, h, w)

    # a line of panels a picture
    panels = []
    for i, row in enumerate(rows):
        seen = as_seen(row["image"])
        in_captions = caption_words(processor, row["captions"])
        line = [Panel(seen, above=wrapped(str(row["captions"][0])))]
        for j, token in enumerate(tokens[i].tolist()):
            below = f"{probabilities[i, token]:.1%}" + (f", usually {usual[token]:.1%}" if usual is not None else "")
            below += " (in a caption)" if token in in_captions else ""
            line.append(Panel(seen, maps[i * k + j], processor.tokenizer.convert_ids_to_tokens(token), below))
        panels.append(line)

    surest = "surest of" if usual is None else "surer of than usual"
    title = (
        f"{describe(model)}: the words that the concept head is {surest}, and Grad-CAM of the visual encoder for "
        "each, each map on its own scale"
    )
    return heat_sheet(panels, title)


class ConceptEvaluator:
    """
    Measures how many of the concept head's most likely tokens are in the captions, and draws where it sees them.

    Args:
        rows: {"image", "captions", "id"}; all captions of a row count.
        ks: Numbers of most likely tokens.
        shown: Images drawn, with five tokens each.
        layer: Layer of the visual encoder, for the maps.

    Yields name/concept_mean_average_precision, name/concept_precision@k, hit@k and recall@k, and the same numbers for
    two other orders of tokens: name/same_words_... uses one order for all images, by mean probability, which is the
    level of a head that only knows token frequencies; name/beyond_usual_... orders tokens by the difference to their
    mean over images. Then two sheets, of the most likely tokens and of those with the largest difference.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        ks: Sequence[int] = (5, 10),
        shown: int = 6,
        seed: int = 0,
        batch_size: int = 64,
        layer: int | None = None,
        name: str = "concepts",
        progress: bool = True,
    ) -> None:
        if not len(rows):
            raise ValueError("there are no rows to evaluate on")
        self.rows = rows
        self.ks = tuple(ks)
        self.shown = shown
        self.seed = seed
        self.batch_size = batch_size
        self.layer = layer
        self.name = name
        self.progress = progress

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "words that the concept head names, against the words of all captions of the picture",
            "words": "tokens of the vocabulary, special ones left out",
            "same_words": "one order of words for all pictures, by mean probability over them",
            "beyond_usual": "words by their logit less that of the mean probability over the pictures",
            "pictures": len(self.rows),
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Evaluates the head on every image and yields (name, value)."""
        # recall is undefined for an image whose captions have no token of the vocabulary
        images = [row["image"] for row in self.rows]
        tokens = [caption_words(processor, row["captions"]) for row in self.rows]
        scored = [place for place, ids in enumerate(tokens) if ids]
        if not scored:
            raise ValueError("no caption has a word that the tokenizer knows")
        probabilities = concept_probabilities(model, processor, images, self.batch_size, self.progress)[scored]
        tokens = [tokens[place] for place in scored]

        # the head's own order, one order for all images, and the order by difference
        usual = probabilities.mean(0)  # (V,)
        orders = {
            "concept": probabilities,
            "same_words": usual.expand_as(probabilities),
            "beyond_usual": beyond_usual(probabilities, usual),
        }
        for kind, scores in orders.items():
            for name, value in concept_scores(scores, tokens, self.ks).items():
                yield f"{self.name}/{kind}_{name}", value

        # images for the sheets
        shown = one_of_each_id(self.rows, self.shown, self.seed)
        k = min(5, probabilities.shape[1])
        yield f"{self.name}/concept_sheet", concept_sheet(model, processor, shown, k, self.layer)
        yield f"{self.name}/beyond_usual_sheet", concept_sheet(model, processor, shown, k, self.layer, usual)


__all__ = ["ConceptEvaluator", "beyond_usual", "concept_probabilities", "concept_scores", "concept_sheet"]
