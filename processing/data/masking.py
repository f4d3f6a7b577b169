"""Masking of tokens and patches: options, two corruptions, and pure functions of an explicit numpy generator.

Shapes: T tokens of a text, m of them chosen, N patches of an image, row-major, in a grid of h x w.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np

from .bounds import check_bounds
from .layouts import SpecialTokens

BLOCK_ATTEMPTS = 10  # BEiT's code
ROUNDING = 1e-9  # .29 * 100 is 28.999999999999996 in floats and must give 29 tokens


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class Masking:
    """Masking options, by their flat names in a configuration.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    BOUNDS: ClassVar[dict[str, str]] = {
        "mlm_probability": "[0, 1]",
        "mim_ratio": "[0, 1]",
        "mim_min_block": "[1, inf)",
    }

    mlm_probability: float = field(default=0.15, metadata=_help("Share of tokens to predict."))
    mim_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5],
        metadata=_help("Share of masked patches at the start and the end of the run, linear in progress."),
    )
    mim_masking: Literal["random", "blocks"] = field(
        default="random",
        metadata=_help("random patches, or blocks as BEiT, which may fall short of the share by a few patches."),
    )
    mim_min_block: int = field(
        default=16, metadata=_help("Patches of the smallest block; of 14 x 14 or 16 x 16, BEiT's and SIMLA's is 16.")
    )
    mlm_replacement: Literal["bert", "mask"] = field(
        default="bert",
        metadata=_help("What takes a chosen token's place: [MASK] 80 %, a random token, itself; or always [MASK]."),
    )
    random_specials: bool = field(
        default=False, metadata=_help("A random token may be a special one, as in ALBEF's code.")
    )
    corruption: Literal["replace", "drop"] = field(
        default="replace", metadata=_help("replace: [MASK] and others take their places (BERT); drop: cut out (MAE).")
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if len(self.mim_ratio) != 2:
            raise ValueError(f"mim_ratio is {self.mim_ratio}; expected two numbers in [0, 1]")
        for name in ("mim_masking", "mlm_replacement", "corruption"):
            choices = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, choices))}")
        if self.corruption == "drop" and self.mim_masking == "blocks":
            raise ValueError("corruption drop takes exact numbers of patches, got mim_masking 'blocks'")


UNMASKED = Masking(mlm_probability=0.0, mim_ratio=[0.0, 0.0])


class Hidden(NamedTuple):
    """The hidden tokens and patches of a row.

    Attributes:
        tokens: ids of the corrupted copy, (T,) int64; None if there is no copy or no text.
        chosen: indices of the tokens to predict, (m,) int64, ascending; None without a text.
        patches: (N,) bool, True = hidden; None without an image.
    """

    tokens: np.ndarray | None
    chosen: np.ndarray | None
    patches: np.ndarray | None


class Replacement:
    """BERT's 80/10/10 replacement of tokens, and masked patches that keep their positions."""

    def __init__(self, masking: Masking, special: SpecialTokens) -> None:
        self.masking = masking
        self.special = special

    def __call__(
        self, tokens: np.ndarray | None, grid: tuple[int, int] | None, progress: float, rng: np.random.Generator
    ) -> Hidden:
        """Masks a row, given its tokens (T,), its patch grid and the completed share of the run."""
        changed = chosen = patches = None
        if tokens is not None:
            changed, chosen = mask_tokens(
                tokens,
                rng,
                mask_token_id=self.special.mask,
                vocab_size=self.special.vocab_size,
                special_ids=self.special.ids,
                probability=self.masking.mlm_probability,
                random_specials=self.masking.random_specials,
                always_mask=self.masking.mlm_replacement == "mask",
            )  # (T,), (m,)
        if grid is not None:
            patches = self._patches(grid, mim_ratio(progress, *self.masking.mim_ratio), rng)  # (N,)
        return Hidden(changed, chosen, patches)

    def _patches(self, grid: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
        # BEiT's blocks may mask a few patches fewer than the share; random masks are exact
        n_patches = grid[0] * grid[1]
        if self.masking.mim_masking == "blocks":
            if self.masking.mim_min_block > n_patches:
                least = self.masking.mim_min_block
                raise ValueError(f"mim_min_block is {least}; expected at most the {n_patches} patches of an image")
            return mask_blocks(grid, int(n_patches * ratio), rng, min_block=self.masking.mim_min_block)
        return mask_patches(n_patches, ratio, rng)


class Dropping:
    """MAE's masking for both modalities (MoMo, section 3.1): hidden tokens and patches are dropped, without a copy.

    Drops exactly floor(r T) tokens and floor(r N) patches of a row, with the shares r of `masking`; a text keeps at
    least one token.
    """

    def __init__(self, masking: Masking) -> None:
        self.masking = masking

    def __call__(
        self, tokens: np.ndarray | None, grid: tuple[int, int] | None, progress: float, rng: np.random.Generator
    ) -> Hidden:
        """Masks a row; arguments as in `Replacement`."""
        chosen = patches = None
        if tokens is not None:
            count = whole_share(len(tokens), self.masking.mlm_probability)
            chosen = np.flatnonzero(choose(len(tokens), min(count, len(tokens) - 1), rng))  # (m,)
        if grid is not None:
            n_patches = grid[0] * grid[1]
            ratio = mim_ratio(progress, *self.masking.mim_ratio)
            patches = choose(n_patches, whole_share(n_patches, ratio), rng)  # (N,)
        return Hidden(None, chosen, patches)


def whole_share(count: int, ratio: float) -> int:
    """floor(ratio * count), computed for the decimal ratio, without float error."""
    return math.floor(ratio * count + ROUNDING)


def choose(count: int, chosen: int, rng: np.random.Generator) -> np.ndarray:
    """Chooses `chosen` of `count` positions at random (MAE's argsort of noise): (count,) bool."""
    mask = np.zeros(count, dtype=bool)
    mask[np.argsort(rng.random(count))[:chosen]] = True
    return mask


class Keeping(NamedTuple):
    """Share of an image's patches that the model reads, and the share of the run after which it reads all."""

    share: float = 1.0
    until: float = 1.0

    def count(self, n_patches: int, progress: float) -> int:
        """K = floor(share N), at least 1; N once `progress` reaches `until`."""
        return max(1, whole_share(n_patches, self.share)) if progress < self.until else n_patches


ALL_PATCHES = Keeping()


def keep_patches(n_patches: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending indices of `count` random patches: (K,) int64."""
    return np.flatnonzero(choose(n_patches, count, rng))


def mask_tokens(
    token_ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    random_specials: bool = False,
    always_mask: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption of a text's tokens, without [CLS] and padding.

    Each token is chosen independently with `probability` (a short caption may have none chosen: OneR's paper does not
    say, and forcing one would mask tokens of short captions more often). Of the chosen tokens, 80 % become [MASK],
    10 % a random token, and 10 % are unchanged.

    Args:
        token_ids: (T,) ids.
        special_ids: ids that are excluded from random tokens.
        random_specials: draw the random token from the whole vocabulary, as ALBEF does.
        always_mask: replace all chosen tokens by [MASK], one reading of CODIS' section 3.4.

    Returns:
        corrupted ids (T,) int64, and the chosen indices (m,) int64, ascending.

    Raises:
        ValueError: the probability is outside [0, 1], or there is no token to draw from.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    specials = np.unique(np.asarray([] if random_specials else special_ids, dtype=np.int64))
    if len(specials) and (specials[0] < 0 or specials[-1] >= vocab_size):
        raise ValueError(f"special_ids must lie in [0, {vocab_size}), got {specials.tolist()}")
    if len(specials) >= vocab_size:
        raise ValueError(f"all {vocab_size} ids of the vocabulary are special: no random token is left")

    # draw for every token, so that draws do not depend on which tokens are chosen
    corrupted = np.array(token_ids, dtype=np.int64)  # (T,)
    count = len(corrupted)
    chosen = np.flatnonzero(rng.random(count) < probability)  # (m,)
    action = rng.random(count)[chosen]  # (m,)
    drawn = rng.integers(0, vocab_size - len(specials), count)[chosen]  # (m,)
    # the r-th id that is not special: r plus the number of special ids at or below it
    drawn += np.searchsorted(specials - np.arange(len(specials)), drawn, side="right")  # (m,), ids of the vocabulary

    # 80 % [MASK], 10 % random, 10 % unchanged
    if always_mask:
        corrupted[chosen] = mask_token_id
        return corrupted, chosen
    corrupted[chosen[action < 0.8]] = mask_token_id
    random = (action >= 0.8) & (action < 0.9)
    corrupted[chosen[random]] = drawn[random]
    return corrupted, chosen


def mask_patches(n_patches: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Masks exactly int(n_patches * ratio) random patches: (N,) bool, True = masked."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    return choose(n_patches, int(n_patches * ratio), rng)


def mask_blocks(
    grid: tuple[int, int],
    target: int,
    rng: np.random.Generator,
    *,
    min_block: int = 16,
    max_aspect: float = 1 / 0.3,
) -> np.ndarray:
    """BEiT's block-wise mask (its algorithm 1, and its code where that differs): rectangles until `target` is reached.

    A rectangle's area is uniform between `min_block` and the number of patches still to mask, its aspect ratio
    log-uniform in 1/max_aspect to max_aspect, its position uniform. It is smaller than the grid on each side and must
    mask at least one new patch, but not more than are still to mask. After ten failed attempts in a row the mask is
    complete, so it may be a few patches short of `target` (16 x 16 with 75: 72 or more in 98 of 100 masks, 74.4 on
    average).

    Args:
        grid: rows and columns of patches.
        target: maximum number of patches to mask.
        min_block: smallest area drawn, or `target` if that is smaller. 16 is for a grid of side 14 or 16.

    Returns:
        (N,) bool, True = masked.

    Raises:
        ValueError: target is not in [0, N], or min_block or max_aspect is below 1.
    """
    height, width = grid
    if not 0 <= target <= height * width:
        raise ValueError(f"target must be in [0, {height * width}], the patches of {height} x {width}, got {target}")
    if min_block < 1 or max_aspect < 1:
        raise ValueError(f"min_block and max_aspect must be at least 1, got {min_block} and {max_aspect}")
    masked = np.zeros((height, width), dtype=bool)  # (h, w)
    smallest = min(min_block, target)
    spread = math.log(max_aspect)
    wanted = target
    attempts = BLOCK_ATTEMPTS
    while wanted > 0 and attempts > 0:
        attempts -= 1

        # a rectangle's area and shape
        # if fewer patches are left than the smallest block, the area lies between the two
        area = smallest + (wanted - smallest) * rng.random()
        aspect = math.exp(spread * (2 * rng.random() - 1))
        rows = round(math.sqrt(area * aspect))
        columns = round(math.sqrt(area / aspect))
        if rows >= height or columns >= width:
            continue

        # its position; it is accepted if it masks new patches, but not too many
        top = rng.integers(height - rows, endpoint=True)
        left = rng.integers(width - columns, endpoint=True)
        block = masked[top : top + rows, left : left + columns]  # (rows, columns), a view
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= wanted:
            block[:] = True
            wanted -= new
            attempts = BLOCK_ATTEMPTS
    return masked.reshape(-1)  # (N,)


def mim_ratio(progress: float, start: float = 0.1, end: float = 0.5) -> float:
    """Share of masked patches, linear in the progress of the run (OneR: .1 at the start, .5 at the end)."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return start + (end - start) * progress
