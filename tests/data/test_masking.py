"""Masks of tokens and patches: shares, exact counts, purity; what is dropped instead of replaced."""

import math
import random

import numpy as np
import pytest

from oner.processing.data.masking import (
    Dropping,
    Masking,
    mask_blocks,
    mask_patches,
    mask_tokens,
    mim_ratio,
    whole_share,
)

VOCABULARY, SPECIALS, MASK = 1000, (0, 1, 100, 101, 103), 103


def masked(n=400_000, seed=0, **options):
    tokens = np.random.default_rng(99).integers(200, VOCABULARY, n)
    options = {"mask_token_id": MASK, "vocab_size": VOCABULARY, "special_ids": SPECIALS, **options}
    return tokens, *mask_tokens(tokens, np.random.default_rng(seed), **options)


def test_shares_are_15_percent_and_80_10_10():
    tokens, corrupted, chosen = masked()
    n, m = len(tokens), len(chosen)
    assert abs(m / n - 0.15) < 5 * np.sqrt(0.15 * 0.85 / n)
    now, before = corrupted[chosen], tokens[chosen]
    hidden, kept = (now == MASK).mean(), (now == before).mean()
    # One random token in (vocabulary - specials) is the old token by chance.
    chance = 0.1 / (VOCABULARY - len(SPECIALS))
    for share, expected in ((hidden, 0.8), (kept, 0.1 + chance), (1 - hidden - kept, 0.1 - chance)):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / m)


def test_tokens_that_are_not_chosen_stay():
    tokens, corrupted, chosen = masked(5000)
    rest = np.setdiff1d(np.arange(5000), chosen)
    assert np.array_equal(corrupted[rest], tokens[rest])
    assert (np.diff(chosen) > 0).all() and corrupted.dtype == chosen.dtype == np.int64


def test_random_tokens_cover_the_vocabulary_without_specials_evenly():
    tokens = np.full(400_000, 500)
    corrupted, _ = mask_tokens(
        tokens, np.random.default_rng(1), mask_token_id=7, vocab_size=20, special_ids=(0, 3, 4, 19), probability=1.0
    )
    drawn = corrupted[(corrupted != 7) & (corrupted != 500)]
    counts = np.bincount(drawn, minlength=20)
    assert counts[[0, 3, 4, 19]].sum() == 0
    allowed = [i for i in range(20) if i not in (0, 3, 4, 19, 7)]  # 7 is hidden behind the mask itself
    assert abs(counts[allowed] / (400_000 * 0.1 / 16) - 1).max() < 0.1


def test_always_mask_hides_the_same_tokens_and_nothing_else():
    tokens, corrupted, chosen = masked(5000, always_mask=True)
    assert np.array_equal(chosen, masked(5000)[2]) and (corrupted[chosen] == MASK).all()
    assert np.array_equal(np.delete(corrupted, chosen), np.delete(tokens, chosen))


def test_random_specials_restores_albef():
    tokens, corrupted, chosen = masked(probability=1.0, random_specials=True)
    assert np.isin(corrupted[chosen], [0, 1, 100, 101]).sum() > 50
    tokens, corrupted, chosen = masked(probability=1.0)
    assert np.isin(corrupted[chosen], [0, 1, 100, 101]).sum() == 0


def test_the_input_is_left_alone_and_the_draw_repeats():
    tokens, corrupted, chosen = masked(50)
    again = masked(50)
    assert np.array_equal(corrupted, again[1]) and np.array_equal(chosen, again[2])
    assert tokens.max() < VOCABULARY and np.array_equal(tokens, again[0])
    assert not np.array_equal(masked(5000, seed=1)[2], masked(5000, seed=2)[2])


def test_edges_of_token_masking():
    for n, probability, expected in ((0, 0.15, 0), (5, 0.0, 0), (5, 1.0, 5)):
        tokens, corrupted, chosen = masked(n, probability=probability)
        assert len(corrupted) == n and len(chosen) == expected
    with pytest.raises(ValueError, match="probability must be in .0, 1., got 1.5"):
        masked(5, probability=1.5)
    with pytest.raises(ValueError, match="special_ids must lie in"):
        masked(5, special_ids=(VOCABULARY,))
    with pytest.raises(ValueError, match="no random token is left"):
        masked(5, vocab_size=2, special_ids=(0, 1))


@pytest.mark.parametrize("n, ratio", [(196, 0.1), (196, 0.5), (64, 0.33), (1, 0.9), (10, 0.0), (10, 1.0)])
def test_exactly_the_share_of_patches_is_masked(n, ratio):
    mask = mask_patches(n, ratio, np.random.default_rng(0))
    assert mask.shape == (n,) and mask.dtype == bool and mask.sum() == int(n * ratio)


def test_every_patch_is_masked_equally_often():
    rng = np.random.default_rng(0)
    share = np.mean([mask_patches(64, 0.25, rng) for _ in range(20_000)], axis=0)
    assert abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)


def test_ratio_rises_linearly():
    assert [mim_ratio(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.3, 0.5])
    assert mim_ratio(0.25, start=0.75, end=0.75) == 0.75
    with pytest.raises(ValueError, match="progress must be in .0, 1., got -0.1"):
        mim_ratio(-0.1)
    with pytest.raises(ValueError, match="ratio must be in .0, 1., got 1.1"):
        mask_patches(4, 1.1, np.random.default_rng(0))


def naive_blocks(target, smallest=16, side=16):
    """BEiT's algorithm cell by cell, with python's generator: the number of masked patches."""
    hidden = set()
    while len(hidden) < target:
        for _ in range(10):
            area = random.uniform(smallest, target - len(hidden))
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < side and columns < side:
                top, left = random.randint(0, side - rows), random.randint(0, side - columns)
                new = {(top + i, left + j) for i in range(rows) for j in range(columns)} - hidden
                if 0 < len(new) <= target - len(hidden):
                    hidden |= new
                    break
        else:
            break
    return len(hidden)


def test_blocks_hide_as_many_patches_as_beits():
    """16 x 16, target 75, blocks of 16: SIMLA's. The rare masks that stop early are as rare as in the naive one."""
    rng = np.random.default_rng(0)
    counts = np.array([mask_blocks((16, 16), 75, rng).sum() for _ in range(4000)])
    naive = np.array([naive_blocks(75) for _ in range(4000)])
    assert counts.max() == 75 and counts.mean() == pytest.approx(74.4, abs=0.1)
    for fewest, share in ((75, 0.63), (74, 0.868), (72, 0.968), (68, 0.998)):
        error = 5 * np.sqrt(share * (1 - share) / 4000)
        assert (counts >= fewest).mean() == pytest.approx(share, abs=error)
        assert (naive >= fewest).mean() == pytest.approx(share, abs=error)


def test_a_mask_of_one_block_is_a_rectangle_of_its_area_and_aspect():
    rng, aspects = np.random.default_rng(1), []
    for _ in range(500):
        grid = mask_blocks((20, 30), 40, rng, min_block=40).reshape(20, 30)
        rows, columns = np.flatnonzero(grid.any(1)), np.flatnonzero(grid.any(0))
        block = grid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if block.all():  # not always: what rounding left over may hold another
            aspects.append(math.log(block.shape[0] / block.shape[1]))
            assert 32 <= block.size <= 40
    limit = math.log(1 / 0.3) + 0.2  # sides are rounded
    assert len(aspects) > 200 and -limit < min(aspects) < -1 and 1 < max(aspects) < limit
    square = mask_blocks((20, 30), 36, rng, min_block=36, max_aspect=1.0).reshape(20, 30)
    assert square.any(0).sum() == square.any(1).sum() == 6 and square.sum() == 36


def test_blocks_cluster_where_random_patches_do_not():
    def neighbours(make):
        """Share of masked patches whose right neighbour is masked too."""
        rng, shares = np.random.default_rng(2), []
        for _ in range(200):
            grid = make(rng).reshape(16, 16)
            shares.append((grid[:, :-1] & grid[:, 1:]).sum() / grid.sum())
        return np.mean(shares)

    assert neighbours(lambda rng: mask_blocks((16, 16), 75, rng)) > 0.7
    assert neighbours(lambda rng: mask_patches(256, 75 / 256, rng)) < 0.35


def test_blocks_of_small_grids_and_their_edges():
    rng = np.random.default_rng(3)
    for smallest, least in ((16, 3.9), (2, 3.95), (1, 3.99)):
        counts = [mask_blocks((4, 4), 4, rng, min_block=smallest).sum() for _ in range(500)]
        assert max(counts) == 4 and np.mean(counts) > least
    assert mask_blocks((4, 4), 0, rng).sum() == 0 and mask_blocks((1, 9), 3, rng).sum() == 0
    mask = mask_blocks((4, 6), 24, rng, min_block=1)
    assert mask.shape == (24,) and mask.dtype == bool and 12 < mask.sum() <= 24
    state = np.random.get_state()[1].copy()
    assert np.array_equal(*(mask_blocks((16, 16), 75, np.random.default_rng(5)) for _ in range(2)))
    assert np.array_equal(np.random.get_state()[1], state)
    with pytest.raises(ValueError, match=r"target must be in \[0, 16\], the patches of 4 x 4, got 17"):
        mask_blocks((4, 4), 17, rng)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 2"):
        mask_blocks((4, 4), 4, rng, min_block=0, max_aspect=2)


# Dropping


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.29, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 20, 100, 512])
def test_exactly_the_floor_of_the_share_is_dropped(n_tokens, ratio):
    dropping = Dropping(Masking(mlm_probability=ratio, mim_ratio=[ratio, ratio], corruption="drop"))
    hidden = dropping(np.arange(n_tokens), (14, 14), 0.3, np.random.default_rng(n_tokens))
    # the floor of the decimal number, by whole numbers
    percent = round(100 * ratio)
    assert len(hidden.chosen) == min(n_tokens * percent // 100, n_tokens - 1)
    assert hidden.patches.shape == (196,) and hidden.patches.sum() == 196 * percent // 100
    assert hidden.tokens is None and (np.diff(hidden.chosen) > 0).all()
    assert set(hidden.chosen.tolist()) <= set(range(n_tokens))


def test_a_share_is_that_of_its_decimals():
    assert int(0.29 * 100) == 28 and whole_share(100, 0.29) == 29
    assert all(whole_share(n, r / 100) == n * r // 100 for n in range(600) for r in range(101))


def test_every_token_and_patch_is_dropped_equally_often():
    dropping, rng = Dropping(Masking(0.25, [0.75, 0.75], corruption="drop")), np.random.default_rng(0)
    tokens, patches, count = np.zeros(20), np.zeros(16), 20_000
    for _ in range(count):
        hidden = dropping(np.arange(20), (4, 4), 0.0, rng)
        tokens[hidden.chosen] += 1
        patches += hidden.patches
    for share, expected in ((tokens / count, 0.25), (patches / count, 0.75)):
        assert abs(share - expected).max() < 5 * np.sqrt(0.25 * 0.75 / count)


def test_a_row_of_one_kind_draws_for_that_kind_alone():
    dropping = Dropping(Masking(0.5, [0.5, 0.5], corruption="drop"))
    text = dropping(np.arange(8), None, 0.0, np.random.default_rng(1))
    image = dropping(None, (4, 4), 0.0, np.random.default_rng(1))
    assert text.patches is None and len(text.chosen) == 4
    assert image.chosen is None and image.patches.sum() == 8
    both = dropping(np.arange(8), (4, 4), 0.0, np.random.default_rng(1))
    assert np.array_equal(both.chosen, text.chosen) and both.patches.sum() == 8
