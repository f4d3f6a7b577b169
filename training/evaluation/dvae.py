"""Evaluates an image tokenizer: the error of its reconstructions, and how many codes it uses.

B images, side of S pixels, N positions of an image, K codes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oner.modeling.modeling_dvae import DiscreteVAE
from oner.processing.image_processing_vl import open_image

from .sheets import evaluating

GAP = 6  # pixels between tiles
ZOOM = 4  # enlargement of pictures on the sheet


def read_pictures(rows: Sequence[dict[str, Any]], size: int) -> Tensor:
    """The rows' images, resized to squares by Lanczos: (B, 3, S, S) in [0, 1]."""
    images = [open_image(row["image"]).resize((size, size), Image.Resampling.LANCZOS) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, S, S, 3)
    return pixels.permute(0, 3, 1, 2) / 255  # (B, 3, S, S)


def code_perplexity(codes: Tensor, num_codes: int) -> tuple[int, float]:
    """
    For codes of any shape: the number of different codes, and exp of the entropy of their frequencies, at most K.
    """
    frequencies = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()  # (K,)

    # entr is -p log p, and 0 at p = 0
    return int((frequencies > 0).sum()), torch.special.entr(frequencies).sum().exp().item()


class ReconstructionEvaluator:
    """
    `run(model)` yields (NAME/measure, number): `squared_error`, the mean over values in [0, 1] for images
    reconstructed
    from their codes; `error_of_constant`, that of the best single colour; their ratio `times_better`; `codes_used` and
    `perplexity` of the codes.

    Args:
        rows: Rows of images, as from `open_rows`.
        name: Name of the set.
        size: Side of the images; the model's own if None.
        batch_size: Images per batch.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], name: str, size: int | None = None, batch_size: int = 128):
        if not len(rows):
            raise ValueError(f"{name}: no pictures to evaluate on")
        self.rows = rows
        self.name = name
        self.size = size
        self.batch_size = batch_size

    @property
    def protocol(self) -> dict[str, Any]:
        return {"pictures": len(self.rows), "pixels": self.size, "resize": "squeezed, Lanczos"}

    def run(self, model: DiscreteVAE, processor: None = None) -> Iterator[tuple[str, float]]:
        # sums over all values, from which all measures are computed
        self.size = self.size or model.config.image_size
        error = squares = count = 0.0
        colours = torch.zeros(3, dtype=torch.float64)
        codes = []
        with evaluating(model):
            for start in range(0, len(self.rows), self.batch_size):
                stop = min(start + self.batch_size, len(self.rows))
                pictures = read_pictures([self.rows[place] for place in range(start, stop)], self.size)  # (b, 3, S, S)
                indices = model.get_codebook_indices(pictures.to(model.device))  # (b, N)
                drawn = model.decode(indices).cpu()  # (b, 3, S, S)
                error += (drawn - pictures).double().square().sum().item()
                squares += pictures.double().square().sum().item()
                colours += pictures.double().sum((0, 2, 3))
                count += pictures.numel()
                codes.append(indices.cpu())

        # squared error of the mean colour; times 3, since a channel has a third of all values
        constant = (squares - 3 * (colours.square().sum().item() / count)) / count

        used, perplexity = code_perplexity(torch.cat(codes), model.config.num_codes)
        measures = {
            "squared_error": error / count,
            "error_of_constant": constant,
            "times_better": constant / (error / count),
            "codes_used": used,
            "perplexity": perplexity,
        }
        yield from ((f"{self.name}/{measure}", value) for measure, value in measures.items())


def reconstruction_sheet(model: DiscreteVAE, rows: Sequence[dict[str, Any]], columns: int = 12) -> Image.Image:
    """Images, each with its reconstruction below, in rows of `columns`, enlarged without smoothing."""
    size = model.config.image_size
    pictures = read_pictures(rows, size)
    with evaluating(model):
        drawn = model.decode(model.get_codebook_indices(pictures.to(model.device))).cpu()

    # each column has an image above its reconstruction
    cell = size * ZOOM + GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell + GAP, lines * (2 * cell + GAP) + GAP), "#d8d5ce")

    for place, pair in enumerate(zip(pictures, drawn, strict=True)):
        line, column = divmod(place, columns)
        for below, picture in enumerate(pair):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((size * ZOOM,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * cell, GAP + line * (2 * cell + GAP) + below * (cell - GAP // 2)))
    return sheet
