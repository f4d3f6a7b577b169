"""Shows the images and texts nearest to the most used codes of a codebook, and measures whether they share codes.

A family has a codebook if its pretraining model has a module `codebook` that maps unit features (R, P) of images or
texts to their cosines (R, K) with the codes; None means no codebook.

Shapes: B pictures, C texts, K codes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .embedding import Column, embed_images, embed_texts
from .sheets import Panel, Row, describe, evaluating, heat_sheet, pictures_as_seen, wrapped


def has_codebook(model: Any) -> bool:
    """Whether the model has a codebook."""
    return getattr(model, "codebook", None) is not None


def code_cosines(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosines of images (B, K) and of texts (C, K) with the codes, on the CPU.

    Raises:
        TypeError: the model has no codebook.
    """
    if not has_codebook(model):
        raise TypeError(f"expected a model with a codebook, such as CodisForPreTraining, got {type(model).__name__}")
    found = (
        embed_images(model, processor, images, batch_size, progress),
        embed_texts(model, processor, texts, batch_size, progress),
    )
    with evaluating(model):
        image, text = (model.codebook(features.to(model.dtype)).float().cpu() for features in found)
    return image, text


def usage(cosines: Tensor) -> Tensor:
    """Number of rows for which each code is the nearest. (R, K) -> (K,)."""
    return torch.bincount(cosines.argmax(1), minlength=cosines.shape[1])


def code_scores(image: Tensor, text: Tensor) -> dict[str, float]:
    """
    From the cosines (B, K) of paired images and texts: the share of codes that are nearest to an image, to a text, to
    both; how often an image and its text have the same nearest code, and how often with shuffled texts.
    """
    of_pictures, of_texts = usage(image), usage(text)  # (K,)
    return {
        "used_by_pictures": (of_pictures > 0).double().mean().item(),
        "used_by_texts": (of_texts > 0).double().mean().item(),
        "used_by_both": ((of_pictures > 0) & (of_texts > 0)).double().mean().item(),
        "agreement": (image.argmax(1) == text.argmax(1)).double().mean().item(),
        "agreement_chance": (of_pictures.double() @ of_texts.double()).item() / len(image) ** 2,
    }


def code_sheet(
    model: Any, processor: Any, rows: Sequence[Row], image: Tensor, text: Tensor, codes: int = 6, nearest: int = 4
) -> Any:
    """A Figure with one row for each of the most used codes: the nearest images, and the nearest texts.

    Args:
        rows: The rows of the cosines `image` and `text` (B, K); a row's text is its first caption.
    """
    captions = [str(row["captions"][0]) for row in rows]
    of_pictures, of_texts = usage(image), usage(text)  # (K,)
    panels = []
    for code in (of_pictures + of_texts).topk(min(codes, image.shape[1])).indices.tolist():
        # images, each with its own caption below
        places = image[:, code].topk(min(nearest, len(rows))).indices.tolist()
        seen = pictures_as_seen([rows[place]["image"] for place in places], processor)  # (nearest, H, W, 3)
        line = [
            Panel(picture, below=f"{wrapped(captions[place])}\n{image[place, code]:.2f}")
            for picture, place in zip(seen, places, strict=True)
        ]
        used = f"code {code}: {of_pictures[code]} pictures, {of_texts[code]} texts"
        line[0] = Panel(line[0].picture, above=used, below=line[0].below)

        # texts; of equal ones the first
        first: dict[str, int] = {}
        for place in text[:, code].argsort(descending=True, stable=True).tolist():
            first.setdefault(captions[place], place)
        shown = list(first.items())[:nearest]
        words = [f"{wrapped(caption)}  {text[place, code]:.2f}" for caption, place in shown]
        panels.append([*line, Panel(None, words="\n\n".join(words))])
    title = (
        f"{describe(model)}: the codes that are nearest of most, with the pictures and the texts that lie nearest to "
        f"them, and their cosines"
    )
    return heat_sheet(panels, title)


class CodeEvaluator:
    """
    Measures whether images and their texts share codes, and draws a sheet of the most used ones.

    Args:
        rows: {"image", "captions"}; the first caption of a row is its text.
        shown: Number of codes drawn, with four images and four texts each.

    Yields name/code_used_by_pictures, _texts and _both, name/code_agreement and _agreement_chance, then a sheet.
    """

    def __init__(
        self, rows: Sequence[Row], shown: int = 6, batch_size: int = 64, name: str = "codes", progress: bool = True
    ) -> None:
        if not len(rows):
            raise ValueError("there are no rows to evaluate on")
        self.rows = rows
        self.shown = shown
        self.batch_size = batch_size
        self.name = name
        self.progress = progress

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "nearest codes of pictures and of their first captions, by cosine",
            "used": "share of all codes that are the nearest of any",
            "agreement": "pairs whose picture and text have one nearest code; chance: texts dealt out anew",
            "pictures": len(self.rows),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Assigns every row to its codes and yields (name, value)."""
        texts = [str(row["captions"][0]) for row in self.rows]
        images = Column(self.rows, "image")
        image, text = code_cosines(model, processor, images, texts, self.batch_size, self.progress)
        for name, value in code_scores(image, text).items():
            yield f"{self.name}/code_{name}", value
        yield f"{self.name}/code_sheet", code_sheet(model, processor, self.rows, image, text, self.shown)


__all__ = ["CodeEvaluator", "code_cosines", "code_scores", "code_sheet", "has_codebook", "usage"]
