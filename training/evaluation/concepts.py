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
        found = [
            model.concepts(pixels_of(model, processor, images[part])).float().sigmoid().cpu()
            for part in batches(len(images), batch_size, "pictures", progress)
        ]
    found = torch.cat(found)
    found[:, special_ids(processor)] = 0
    return found


def beyond_usual(probabilities: Tensor, usual: Tensor) -> Tensor:
    """How much surer than usual (V,) the head is of every word, as a difference of logits (B, V): what sets a picture
    apart, where frequent words are sure of every picture. Special tokens get -inf."""
    surer = probabilities.logit(1e-6) - usual.logit(1e-6)
    return surer.masked_fill(probabilities == 0, -torch.inf)


def special_ids(processor: Any) -> list[int]:
    """Tokens that are no words."""
    return sorted({*processor.tokenizer.all_special_ids, processor.image_token_id})


def caption_words(processor: Any, captions: Sequence[str], length: int | None = None) -> set[int]:
    """The tokens of a picture's captions as the model reads them, special ones left out."""
    ids = processor(text=list(captions), return_tensors=None, padding=False, max_length=length)["input_ids"]
    return {token for row in ids for token in row} - set(special_ids(processor))


def ranks_of(scores: Tensor, right: Collection[int]) -> Tensor:
    """The places from 1, in falling order, of the right words among all scores (V,); of equal ones the first first."""
    ranks = torch.empty(len(scores), dtype=torch.long)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1)
    return ranks[sorted(right)].sort().values


def average_precision(ranks: Tensor) -> float:
    """The mean over the right words of the share of right ones up to each, of their sorted places (n,) from 1."""
    return float((torch.arange(1, len(ranks) + 1) / ranks).mean())


def concept_scores(
    probabilities: Sequence[Tensor], words: Sequence[Collection[int]], ks: Sequence[int]
) -> dict[str, float]:
    """Means over pictures, of (B, V) and each picture's caption words.

    precision@k: share of the k words named that are in the captions; hit@k: whether any is; recall@k: share of the
    captions' words among them; mean_average_precision, over all words.
    """
    ranks = [ranks_of(scores, right) for scores, right in zip(probabilities, words, strict=True)]
    values = {"mean_average_precision": sum(map(average_precision, ranks)) / len(ranks)}
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
    A Figure with one row for each picture: the picture and its caption, then the maps of its k likeliest words, or of
    those that are likeliest beyond what is `usual` (V,), with their probability, and whether a caption says them too.
    """
    images = [row["image"] for row in rows]
    found = concept_probabilities(model, processor, images)
    words = (found if usual is None else beyond_usual(found, usual)).topk(k).indices  # (B, k)
    with evaluating(model):
        pixels = pixels_of(model, processor, images).repeat_interleave(k, 0)
        maps = model.ground_concepts(pixels, words.flatten().to(pixels.device), layer).float().cpu()
    tokens, panels = processor.tokenizer.convert_ids_to_tokens, []
    for i, row in enumerate(rows):
        seen, said = as_seen(row["image"]), caption_words(processor, row["captions"])
        line = [Panel(seen, above=wrapped(str(row["captions"][0])))]
        for j, word in enumerate(words[i].tolist()):
            sure = f"{found[i, word]:.1%}" + (f", usually {usual[word]:.1%}" if usual is not None else "")
            sure += " (in a caption)" if word in said else ""
            line.append(Panel(seen, maps[i * k + j], tokens(word), sure))
        panels.append(line)
    surest = "surest of" if usual is None else "surer of than usual"
    title = (
        f"{describe(model)}: the words that the concept head is {surest}, and Grad-CAM of the visual encoder for "
        "each, each map on its own scale"
    )
    return heat_sheet(panels, title)


class ConceptEvaluator:
    """
    How many of the words that the concept head names are in the captions, and a sheet of where it sees them.

    Args:
        rows: {"image", "captions", "id"}; every caption of a row counts.
        ks: how many words are taken as named.
        shown: pictures drawn, with five words each.
        layer: of the visual encoder, for the maps.

    Yields name/concept_mean_average_precision, name/concept_precision@k, hit@k and recall@k; the same as
    name/same_words_..., of one list of words for all pictures, ordered by their mean probability over them: a head
    that only knows which words are frequent is no better; and as name/beyond_usual_..., of words ordered by how much
    surer of them the head is than on average over the pictures. Two sheets, of the surest words and beyond the usual.
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
        self.rows, self.ks, self.shown, self.seed = rows, tuple(ks), shown, seed
        self.batch_size, self.layer, self.name, self.progress = batch_size, layer, name, progress

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
        images = [row["image"] for row in self.rows]
        words = [caption_words(processor, row["captions"]) for row in self.rows]
        kept = [place for place, said in enumerate(words) if said]
        if not kept:
            raise ValueError("no caption has a word that the tokenizer knows")
        found = concept_probabilities(model, processor, images, self.batch_size, self.progress)[kept]
        words = [words[place] for place in kept]
        usual = found.mean(0)
        kinds = {"concept": found, "same_words": usual.expand_as(found), "beyond_usual": beyond_usual(found, usual)}
        for kind, asked in kinds.items():
            for name, value in concept_scores(asked, words, self.ks).items():
                yield f"{self.name}/{kind}_{name}", value
        shown = one_of_each_id(self.rows, self.shown, self.seed)
        k = min(5, found.shape[1])
        yield f"{self.name}/concept_sheet", concept_sheet(model, processor, shown, k, self.layer)
        yield f"{self.name}/beyond_usual_sheet", concept_sheet(model, processor, shown, k, self.layer, usual)


__all__ = ["ConceptEvaluator", "beyond_usual", "concept_probabilities", "concept_scores", "concept_sheet"]
