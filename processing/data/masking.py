"""Which words and patches are hidden: pure functions of their arguments and an explicit numpy generator.

Shapes: n words, N patches of a picture, row by row, in a grid of h x w.
"""

import math
from collections.abc import Sequence

import numpy as np

BLOCK_ATTEMPTS = 10  # BEiT's code


def mask_words(
    word_ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    random_specials: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption of a caption's words, without [CLS] and padding.

    Each word is selected independently with `probability` (a short caption may have none selected: the paper is
    silent, and a forced choice would mask words of short captions more often). Of the selected, 80 % become [MASK],
    10 % a random word, 10 % stay.

    Args:
        word_ids: (n,) ids.
        special_ids: ids that a random word must not be.
        random_specials: draw the random word from the whole vocabulary, as ALBEF does.

    Returns:
        corrupted ids (n,) int64, and the selected places (m,) int64 in rising order.

    Raises:
        ValueError: if the probability is outside [0, 1] or no word is left to draw from.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    specials = np.unique(np.asarray([] if random_specials else special_ids, dtype=np.int64))
    if len(specials) and (specials[0] < 0 or specials[-1] >= vocab_size):
        raise ValueError(f"special_ids must lie in [0, {vocab_size}), got {specials.tolist()}")
    if len(specials) >= vocab_size:
        raise ValueError(f"all {vocab_size} ids of the vocabulary are special: no random word is left")
    corrupted = np.array(word_ids, dtype=np.int64)
    n = len(corrupted)
    selected = np.flatnonzero(rng.random(n) < probability)
    action = rng.random(n)[selected]
    drawn = rng.integers(0, vocab_size - len(specials), n)[selected]
    # The r-th id that is not special: r plus the number of special ids at or below it.
    drawn += np.searchsorted(specials - np.arange(len(specials)), drawn, side="right")
    corrupted[selected[action < 0.8]] = mask_token_id
    replaced = (action >= 0.8) & (action < 0.9)
    corrupted[selected[replaced]] = drawn[replaced]
    return corrupted, selected


def mask_patches(n_patches: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Exactly int(n_patches * ratio) patches at random places: (N,) bool, True = masked (MAE's argsort of noise)."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    masked = np.zeros(n_patches, dtype=bool)
    masked[np.argsort(rng.random(n_patches))[: int(n_patches * ratio)]] = True
    return masked


def mask_blocks(
    grid: tuple[int, int],
    target: int,
    rng: np.random.Generator,
    *,
    min_block: int = 16,
    max_aspect: float = 1 / 0.3,
) -> np.ndarray:
    """BEiT's block-wise mask (its algorithm 1, and its code where that differs): rectangles until `target` is reached.

    A rectangle's area is uniform between `min_block` and what is still to be masked, its aspect log-uniform in
    1/max_aspect to max_aspect, its place uniform; it never spans the grid, hides at least one patch more, and never
    more than are still to be masked. Where ten in a row do not fit, the mask is done: `target` may be missed by a few
    patches (of 16 x 16 with 75: 72 or more in 98 of 100 masks, 74.4 on average).

    Args:
        grid: rows and columns of patches.
        target: patches to mask, at most.
        min_block: smallest area drawn; where `target` itself is less, that. 16 belongs to a grid of 14 or 16 a side.

    Returns:
        (N,) bool, True = masked.

    Raises:
        ValueError: if target does not lie in [0, N], min_block or max_aspect is below 1.
    """
    height, width = grid
    if not 0 <= target <= height * width:
        raise ValueError(f"target must be in [0, {height * width}], the patches of {height} x {width}, got {target}")
    if min_block < 1 or max_aspect < 1:
        raise ValueError(f"min_block and max_aspect must be at least 1, got {min_block} and {max_aspect}")
    masked, smallest, spread = np.zeros((height, width), dtype=bool), min(min_block, target), math.log(max_aspect)
    wanted, attempts = target, BLOCK_ATTEMPTS
    while wanted > 0 and attempts > 0:
        attempts -= 1
        # when less is wanted than the smallest block, the area lies between the two
        area = smallest + (wanted - smallest) * rng.random()
        aspect = math.exp(spread * (2 * rng.random() - 1))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows >= height or columns >= width:
            continue
        top, left = rng.integers(height - rows, endpoint=True), rng.integers(width - columns, endpoint=True)
        block = masked[top : top + rows, left : left + columns]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= wanted:
            block[:] = True
            wanted, attempts = wanted - new, BLOCK_ATTEMPTS
    return masked.reshape(-1)


def mim_ratio(progress: float, start: float = 0.1, end: float = 0.5) -> float:
    """Share of masked patches, linear in the progress of the run (paper: .1 at the beginning, .5 at the end)."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return start + (end - start) * progress
