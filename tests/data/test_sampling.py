"""The order of rows: a pure function of (seed, epoch), the same for any number of processes and any start."""

import numpy as np
import pytest

from oner.processing.data.sampling import PairBatchSampler, RowKey, concept_id, epoch_batches, steps_in_epoch


def emoji_like_groups(n=6185, kinds=1259, seed=0):
    return np.random.default_rng(seed).integers(0, kinds, n)


@pytest.mark.parametrize("n, size", [(10, 3), (64, 64), (1000, 7), (5, 1)])
def test_an_epoch_uses_each_row_at_most_once(n, size):
    batches = epoch_batches(n, size, seed=1, epoch=0)
    assert batches.shape == (n // size, size) and batches.dtype == np.int64
    assert len(np.unique(batches)) == batches.size and batches.min() >= 0 and batches.max() < n


def test_the_order_is_a_function_of_seed_and_epoch():
    first = epoch_batches(100, 10, seed=3, epoch=2)
    assert np.array_equal(first, epoch_batches(100, 10, seed=3, epoch=2))
    assert not np.array_equal(first, epoch_batches(100, 10, seed=3, epoch=3))
    assert not np.array_equal(first, epoch_batches(100, 10, seed=4, epoch=2))


def test_the_order_does_not_change_between_versions():
    # Recorded: a change here breaks the exact resume of every run that was started before it.
    assert epoch_batches(10, 5, seed=0, epoch=0).tolist() == [[4, 6, 2, 7, 3], [5, 9, 0, 8, 1]]
    assert epoch_batches(10, 3, seed=0, epoch=1, groups=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]).tolist() == [
        [3, 6, 5],
        [4, 7, 0],
        [8, 1, 2],
    ]


def test_without_drop_last_every_row_is_used_and_short_batches_end_in_minus_one():
    batches = epoch_batches(10, 4, seed=0, epoch=0, drop_last=False)
    assert batches.shape == (3, 4) and batches[-1, 2:].tolist() == [-1, -1]
    assert sorted(batches[batches >= 0]) == list(range(10))
    groups = [0] * 5 + [1] * 3 + [2] * 2
    batches = epoch_batches(10, 3, seed=0, epoch=0, groups=groups, drop_last=False)
    assert len(batches) == 5 and sorted(batches[batches >= 0]) == list(range(10))
    for batch in batches:
        real = batch[batch >= 0]
        assert len({groups[row] for row in real}) == len(real)
        assert (np.diff((batch < 0).astype(int)) >= 0).all()  # fillers only at the end


@pytest.mark.parametrize("size", [2, 64, 128, 512, 1200])
def test_no_batch_holds_two_rows_of_a_group(size):
    groups = emoji_like_groups()
    batches = epoch_batches(len(groups), size, seed=5, epoch=1, groups=groups)
    assert len(np.unique(batches)) == batches.size
    of_batch = np.sort(groups[batches], axis=1)
    assert (np.diff(of_batch, axis=1) != 0).all()
    assert len(batches) == steps_in_epoch(len(groups), size, groups)


def brute_force_steps(counts, size):
    """Greedy oracle: always take from the `size` fullest groups; known to be optimal for this problem."""
    counts, steps = sorted(counts, reverse=True), 0
    while sum(count > 0 for count in counts) >= size:
        counts = sorted([count - 1 for count in counts[:size]] + counts[size:], reverse=True)
        steps += 1
    return steps


def test_as_many_full_batches_as_possible():
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(1, 12, size=rng.integers(2, 9))
        groups = np.repeat(np.arange(len(counts)), counts)
        size = int(rng.integers(1, len(counts) + 1))
        assert steps_in_epoch(len(groups), size, groups) == brute_force_steps(counts.tolist(), size)


def test_every_row_has_its_turn_over_the_epochs():
    groups = emoji_like_groups(600, 60)
    seen = np.concatenate([epoch_batches(600, 32, 0, epoch, groups).ravel() for epoch in range(12)])
    used = np.bincount(seen, minlength=600)
    assert used.min() >= 6  # 18 batches of 32 use 576 of 600 rows an epoch: 11.5 of 12 times on average


def test_groups_may_be_strings():
    batches = epoch_batches(6, 2, 0, 0, groups=["a", "a", "b", "b", "c", "c"])
    assert batches.shape == (3, 2)


def test_five_million_rows():
    batches = epoch_batches(5_000_000, 4096, 0, 0)
    assert batches.shape == (1220, 4096) and len(np.unique(batches)) == batches.size


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 11), "a batch of 11 rows cannot be filled from 10 rows"),
        ((10, 0), "must be positive, got 10 rows and a batch of 0"),
        ((0, 1), "must be positive, got 0 rows"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        epoch_batches(*arguments, seed=0, epoch=0)


def test_more_rows_a_batch_than_groups_is_refused():
    with pytest.raises(ValueError, match="one row per group cannot be filled from 2 groups"):
        epoch_batches(6, 3, 0, 0, groups=[0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"one id a row, shape \(6,\), got shape \(2,\)"):
        epoch_batches(6, 3, 0, 0, groups=[0, 1])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_of_all_processes_make_the_global_batch(world_size, grouped):
    options = {"n_rows": 300, "batch_size": 16, "seed": 7, "total_epochs": 2}
    options["groups"] = emoji_like_groups(300, 40) if grouped else None
    whole = list(PairBatchSampler(**options))
    parts = [list(PairBatchSampler(**options, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def test_a_start_in_the_middle_gives_the_same_keys():
    options = {"n_rows": 50, "batch_size": 8, "seed": 1, "total_steps": 20}
    whole = list(PairBatchSampler(**options))
    assert len(whole) == 20 and PairBatchSampler(**options).steps_per_epoch == 6
    for start in (0, 1, 5, 6, 7, 19, 20):
        sampler = PairBatchSampler(**options, start_step=start)
        assert list(sampler) == whole[start:] and len(sampler) == 20 - start
        assert list(sampler) == whole[start:]  # iterating leaves nothing behind


@pytest.mark.parametrize("together", [2, 4])
def test_rows_together_are_beside_each_other_in_every_batch(together):
    sampler = PairBatchSampler(n_rows=51, batch_size=8, total_steps=12, together=together)
    assert sampler.steps_per_epoch == 6
    batches = np.array([[key.row for key in batch] for batch in sampler])  # (12, 8)
    firsts = batches[:, ::together]
    assert (firsts % together == 0).all()
    for place in range(together):
        assert np.array_equal(batches[:, place::together], firsts + place)

    # an epoch reads each once, in an order of its own
    for epoch in np.split(batches, 2):
        assert len(set(epoch.flat)) == 48 and epoch.max() < 51
    assert not np.array_equal(batches[:6], batches[6:])


def test_keys_carry_epoch_and_progress():
    whole = list(PairBatchSampler(n_rows=10, batch_size=5, total_epochs=2))
    assert [batch[0].epoch for batch in whole] == [0, 0, 1, 1]
    assert [batch[0].progress for batch in whole] == [0.0, 0.25, 0.5, 0.75]
    assert isinstance(whole[0][0], RowKey) and all(type(key.row) is int for key in whole[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"world_size": 3}, "batch of 8 rows is not a multiple of 3 processes"),
        ({"rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"total_steps": None}, "one of total_epochs and total_steps"),
        ({"total_epochs": 1}, "one of total_epochs and total_steps"),
        ({"total_steps": 0}, "the run has no step"),
        ({"start_step": 21}, r"start_step must be in \[0, 20\], got 21"),
        ({"together": 3}, "3 rows together need a batch that is a multiple of so many, .* got a batch of 8$"),
        ({"together": 2, "groups": list(range(50))}, "no ids that keep rows apart .* got a batch of 8, ids$"),
        ({"together": 4, "world_size": 4}, "4 rows together cannot share a process: 4 take 2 rows each"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PairBatchSampler(**{"n_rows": 50, "batch_size": 8, "total_steps": 20, **change})


def test_concept_ids():
    assert concept_id(17) == 17 and concept_id(np.int32(-2)) == -2
    assert concept_id("1F302") == 5770404249786917189 and concept_id("1F303") != concept_id("1F302")
    assert 0 <= concept_id("1F302") < 2**63
    for wrong in (True, 1.5, None):
        with pytest.raises(TypeError, match="a concept id must be an int or a str"):
            concept_id(wrong)
