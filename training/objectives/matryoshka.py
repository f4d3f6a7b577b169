"""Contrast of the first coordinates too, so that embeddings can be cut (Matryoshka: Kusupati et al., 2022).

    L = c_P L(P) + sum over widths d < P of c_d L(d)                                        equation 1

L(d) is a contrast over the first d of P coordinates, of both sides, as unit vectors again; the paper's c are all 1.
Own code, since sentence-transformers' `MatryoshkaLoss` wraps its own losses, without a teacher's keys and queues.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from .losses import in_full


@dataclass
class MatryoshkaArguments:
    """Widths at which every contrast of a run is taken."""

    BOUNDS: ClassVar[dict[str, str]] = {"matryoshka_dims": "[1, inf)", "matryoshka_weights": "[0, inf)"}

    matryoshka_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Widths d, increasing, at which contrasts are taken over the first d coordinates too, so that "
            "embeddings can be cut to them; none by default."
        },
    )
    matryoshka_weights: list[float] = field(
        default_factory=list, metadata={"help": "Weight of each of matryoshka_dims; 1 where none is given."}
    )


class NestedWidths:
    """
    The widths at which the contrasts of a run are taken: the model's own, and those of `matryoshka_dims`.

    Args:
        arguments (`MatryoshkaArguments`): Or what derives from it.
        width: P, the model's own.
        weights: Of the run's losses, by name.
        contrasts: Which of those losses are contrasts of embeddings.

    Attributes:
        contrasts (`list[str]`): The contrasts among the run's losses.
        narrow (`dict[int, float]`): Width below P -> weight.
        weights (`dict[str, float]`): Of the parts of the loss, by name: those of the losses, and of `NAME@WIDTH`.

    Raises:
        ValueError: widths that do not increase, or are none of 1 to P; as many weights as there are not widths; widths
            of a run without contrast.
    """

    def __init__(
        self, arguments: MatryoshkaArguments, width: int, weights: Mapping[str, float], contrasts: Collection[str]
    ):
        # what is asked must be possible
        dims, asked = arguments.matryoshka_dims, arguments.matryoshka_weights
        if list(dims) != sorted(set(dims)) or not all(1 <= dim <= width for dim in dims):
            raise ValueError(
                f"matryoshka_dims are {dims}; expected increasing widths from 1 to the model's projection_dim, {width}"
            )
        if asked and len(asked) != len(dims):
            raise ValueError(f"matryoshka_weights are {asked}; expected one for each of matryoshka_dims {dims}")
        shared = [name for name in weights if name in contrasts]
        if dims and not shared:
            raise ValueError(
                f"matryoshka_dims are {dims}, but none of the losses {list(weights)} is a contrast of embeddings; "
                f"expected one of {sorted(contrasts)} among them"
            )

        # the model's own width is always there, and is not counted twice
        self.contrasts = shared
        self.narrow = dict(zip(dims, asked or [1.0] * len(dims), strict=True))
        whole = self.narrow.pop(width, 1.0)
        self.weights = {name: weight * whole if name in shared else weight for name, weight in weights.items()}
        for dim, share in self.narrow.items():
            self.weights |= {at_width(name, dim): weights[name] * share for name in shared}

    def parts(self, name: str, contrast: Callable[[int | None], torch.Tensor]) -> dict[str, torch.Tensor]:
        """One contrast at every width: `contrast` gives it, 0-dim, of what is `cut` to a width, None for its own."""
        return {name: contrast(None), **{at_width(name, dim): contrast(dim) for dim in self.narrow}}

    def weights_of(self, losses: Collection[str]) -> dict[str, float]:
        """Of some of the losses, at every width."""
        return {name: weight for name, weight in self.weights.items() if name.partition("@")[0] in losses}


def at_width(name: str, dim: int) -> str:
    """The part of the loss that is a contrast over the first `dim` coordinates."""
    return f"{name}@{dim}"


def cut(rows: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The first `dim` coordinates as unit vectors, (R, P) -> (R, dim); of None all of them, as they are."""
    return rows if dim is None else F.normalize(in_full(rows[:, :dim]), dim=1)
