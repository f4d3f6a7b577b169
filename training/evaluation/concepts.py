"""Which words does the concept head see in a picture, and where? (SIMLA, section 2.4; supplement, Figure 2)

The head was trained on a few words of each caption, those that the multimodal [CLS] attends most, so that it need not
name all of them, and may name what no caption says. The numbers ask how many of the words it is surest of are in the
picture's captions; a list of words that is the same for every picture is what to compare them with.

Shapes: B pictures, V words of the vocabulary, k words named, h x w patches.
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
    """(B, 3, H, W) of whole pictures, on the model's device."""
    batch = processor(images=[open_image(image) for image in images], return_tensors="pt", **whole_picture(model))
    return on_device(batch, model)["pixel_values"]


def concept_probabilities(
    model: Any, processor: Any, images: Sequence[Any], batch_size: int = 64, progress: bool = False
) -> Tensor:
    """What the concept head thinks of every word, sigmoid of its logits: (B, V), on the CPU; special tokens get 0.

    Raises:
        TypeError: a model without `concepts`.
    """
    if not hasattr(model, "concepts"):
        raise TypeError(
            f"concepts need a model with a concept head, as SimlaForPreTraining, got {type(model).__name__}"
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
    """How much surer than usual (V,) the head is of every word, as a difference of logits (B, V): what sets a picture
    apart, where frequent words are sure of every picture. Special tokens get -inf."""
    surer = probabilities.logit(1e-6) - usual.logit(1e-6)  # (B, V), the clamp keeps 0 and 1 finite
    return surer.masked_fill(probabilities == 0, -torch.inf)


def special_ids(processor: Any) -> list[int]:
    """The ids of special tokens, which name nothing."""
    return sorted({*processor.tokenizer.all_special_ids, processor.image_token_id})


def caption_words(processor: Any, captions: Sequence[str], length: int | None = None) -> set[int]:
    """The token ids of a picture's captions as the model reads them, without special ones."""
    ids = processor(text=list(captions), return_tensors=None, padding=False, max_length=length)["input_ids"]
    return {token for row in ids for token in row} - set(special_ids(processor))


def ranks_of(scores: Tensor, right: Collection[int]) -> Tensor:
    """The sorted ranks (n,), from 1, of the n right tokens among scores (V,); of equal scores the lower id leads."""
    ranks = torch.empty(len(scores), dtype=torch.long)  # (V,)
    # the inverse permutation of the order
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1)
    return ranks[sorted(right)].sort().values


def average_precision(ranks: Tensor) -> float:
    """Average precision from the sorted ranks (n,), from 1: at each right token the share of right ones so far."""
    return float((torch.arange(1, len(ranks) + 1) / ranks).mean())


def concept_scores(
    probabilities: Sequence[Tensor], words: Sequence[Collection[int]], ks: Sequence[int]
) -> dict[str, float]:
    """Means over pictures, from scores (B, V) and the token ids of each picture's captions.

    precision@k: share of the k tokens named that are in the captions; hit@k: whether any is; recall@k: share of the
    captions' tokens among them; mean_average_precision: over the whole order.
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
    A Figure with one row for each picture: the picture and its caption, then the maps of its k likeliest tokens.

    Under each map stands the token's probability, and whether a caption has it too. With `usual` (V,) the tokens are
    those likeliest beyond it.
    """

    # which k tokens to draw
    images = [row["image"] for row in rows]
    probabilities = concept_probabilities(model, processor, images)
    tokens = (probabilities if usual is None else beyond_usual(probabilities, usual)).topk(k).indices  # (B, k)

    # a map for each: every picture is repeated k times
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
    How many of the tokens that the concept head names are in the captions, and a sheet of where it sees them.

    Args:
        rows: {"image", "captions", "id"}; every caption of a row counts.
        ks: how many tokens are taken as named.
        shown: pictures drawn, with five tokens each.
        layer: of the visual encoder, for the maps.

    Yields name/concept_mean_average_precision, name/concept_precision@k, hit@k and recall@k, and the same numbers for
    two other orders of tokens. name/same_words_... has one order for all pictures, by mean probability: a head that
    only knows which tokens are frequent is no better. name/beyond_usual_... orders tokens by how much surer of them
    the head is than on average over the pictures. Then two sheets, of the surest tokens and of those beyond the usual.
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
        """What the numbers mean, for the file of results."""
        return {
            "task": "words that the concept head names, against the words of all captions of the picture",
            "words": "tokens of the vocabulary, special ones left out",
            "same_words": "one order of words for all pictures, by mean probability over them",
            "beyond_usual": "words by their logit less that of the mean probability over the pictures",
            "pictures": len(self.rows),
            "seed": self.seed,
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Ask the head of every picture and yield (name, value)."""
        # recall is not defined for a picture whose captions have no token of the vocabulary
        images = [row["image"] for row in self.rows]
        tokens = [caption_words(processor, row["captions"]) for row in self.rows]
        scored = [place for place, ids in enumerate(tokens) if ids]
        if not scored:
            raise ValueError("no caption has a word that the tokenizer knows")
        probabilities = concept_probabilities(model, processor, images, self.batch_size, self.progress)[scored]
        tokens = [tokens[place] for place in scored]

        # the head's own order, the order that is the same for all pictures, and the difference of the two
        usual = probabilities.mean(0)  # (V,)
        orders = {
            "concept": probabilities,
            "same_words": usual.expand_as(probabilities),
            "beyond_usual": beyond_usual(probabilities, usual),
        }
        for kind, scores in orders.items():
            for name, value in concept_scores(scores, tokens, self.ks).items():
                yield f"{self.name}/{kind}_{name}", value

        # pictures to look at
        shown = one_of_each_id(self.rows, self.shown, self.seed)
        k = min(5, probabilities.shape[1])
        yield f"{self.name}/concept_sheet", concept_sheet(model, processor, shown, k, self.layer)
        yield f"{self.name}/beyond_usual_sheet", concept_sheet(model, processor, shown, k, self.layer, usual)


__all__ = ["ConceptEvaluator", "beyond_usual", "concept_probabilities", "concept_scores", "concept_sheet"]
