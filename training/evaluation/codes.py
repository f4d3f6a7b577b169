"""What lies at a codebook's codes? For the most used ones the nearest pictures and the nearest texts, side by side.

A family has a codebook if its pretraining model has a module `codebook` that takes unit features (R, P) of pictures or
texts to their cosines (R, K) with the codes; None is none.

Shapes: B pictures, C texts, K codes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .embedding import Column, embed_images, embed_texts
from .sheets import Panel, Row, describe, evaluating, heat_sheet, pictures_as_seen, wrapped


def has_codebook(model: Any) -> bool:
    """Whether the model declares one."""
    return getattr(model, "codebook", None) is not None


def code_cosines(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosines of pictures (B, K) and of texts (C, K) with the codes, on the CPU.

    Raises:
        TypeError: a model without a codebook.
    """
    if not has_codebook(model):
        raise TypeError(f"expected a model with a codebook, as CodisForPreTraining has it, got {type(model).__name__}")
    found = (
        embed_images(model, processor, images, batch_size, progress),
        embed_texts(model, processor, texts, batch_size, progress),
    )
    with evaluating(model):
        image, text = (model.codebook(features.to(model.dtype)).float().cpu() for features in found)
    return image, text


def usage(cosines: Tensor) -> Tensor:
    """How many rows have each code as their nearest. (R, K) -> (K,)."""
    return torch.bincount(cosines.argmax(1), minlength=cosines.shape[1])


def code_scores(image: Tensor, text: Tensor) -> dict[str, float]:
    """
    Of pairs, their cosines (B, K) twice: the share of codes that are nearest of any picture, of any text, of both; how
    often a picture and its text have one nearest code, and how often they would if texts were dealt out anew.
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
    """A Figure with a line for each of the most used codes: the pictures nearest to it, and the texts.

    Args:
        rows: Of the cosines `image` and `text` (B, K); a row's text is its first caption.
    """
    captions = [str(row["captions"][0]) for row in rows]
    of_pictures, of_texts = usage(image), usage(text)  # (K,)
    panels = []
    for code in (of_pictures + of_texts).topk(min(codes, image.shape[1])).indices.tolist():
        # pictures, each with its own caption beneath
        places = image[:, code].topk(min(nearest, len(rows))).indices.tolist()
        seen = pictures_as_seen([rows[place]["image"] for place in places], processor)  # (nearest, H, W, 3)
        line = [
            Panel(picture, below=f"{wrapped(captions[place])}\n{image[place, code]:.2f}")
            for picture, place in zip(seen, places, strict=True)
        ]
        used = f"code {code}: {of_pictures[code]} pictures, {of_texts[code]} texts"
        line[0] = Panel(line[0].picture, above=used, below=line[0].below)

        # texts, of equal ones the first
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
    Whether pictures and their texts meet at the same codes, and a sheet of the most used ones.

    Args:
        rows: {"image", "captions"}; the first caption of a row is its text.
        shown: Codes drawn, with four pictures and four texts each.

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
        """What the numbers mean, for the file of results."""
        return {
            "task": "nearest codes of pictures and of their first captions, by cosine",
            "used": "share of all codes that are the nearest of any",
            "agreement": "pairs whose picture and text have one nearest code; chance: texts dealt out anew",
            "pictures": len(self.rows),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Send every row to its codes and yield (name, value)."""
        texts = [str(row["captions"][0]) for row in self.rows]
        images = Column(self.rows, "image")
        image, text = code_cosines(model, processor, images, texts, self.batch_size, self.progress)
        for name, value in code_scores(image, text).items():
            yield f"{self.name}/code_{name}", value
        yield f"{self.name}/code_sheet", code_sheet(model, processor, self.rows, image, text, self.shown)


__all__ = ["CodeEvaluator", "code_cosines", "code_scores", "code_sheet", "has_codebook", "usage"]
