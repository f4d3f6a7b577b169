"""The order of rows as a pure function: (seed, epoch, position) -> row.

No state has to be stored in checkpoints: the step number alone determines the position. A run that starts at step k
reads exactly the rows that an uninterrupted run reads from step k on, for any number of data workers and processes.

Shapes: n rows, S steps per epoch, G global batch, G / world_size rows per process and step.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

EXTRA_TURN = 1 << 61  # above the turns of regular visits


class RowKey(NamedTuple):
    """One position in the order, for the data set and the collator.

    Attributes:
        row: number of the row.
        epoch: epoch of the run.
        progress: share of the run completed before this step: step / total_steps, in [0, 1).
        turn: distinguishes the visits of a row in a run; random choices are drawn from (seed, turn, row), so copies of
            a row in one epoch differ. Equal to the epoch if rows occur once per epoch.
        position: position in the run, step * batch_size + index in the global batch.
    """

    row: int
    epoch: int
    progress: float
    turn: int = -1
    position: int = -1

    def generator(self, seed: int, *more: int) -> np.random.Generator:
        """Generator of all random choices about the row at this position; `more` distinguishes several generators."""
        return np.random.default_rng([seed, self.epoch if self.turn < 0 else self.turn, self.row, *more])


def concept_id(value: int | str) -> int:
    """Concept id as a 63-bit number: integers are kept, strings are hashed, identically in every process."""
    if isinstance(value, str):
        return int.from_bytes(blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"a concept id must be an int or a str, got {type(value).__name__}")
    return int(value)


def steps_in_epoch(n_rows: int, batch_size: int, groups: Sequence | None = None) -> int:
    """Number of full batches per epoch, the same for every epoch; see `epoch_batches`."""
    return _full_steps(n_rows, batch_size, None if groups is None else _group_codes(groups, n_rows)[1])


def epoch_batches(
    n_rows: int,
    batch_size: int,
    seed: int,
    epoch: int,
    groups: Sequence | None = None,
    drop_last: bool = True,
) -> np.ndarray:
    """The batches of one epoch, a pure function of its arguments: (S, batch_size) int64 row numbers.

    Every row occurs at most once. Without `groups`, the n mod batch_size rows at the end of the shuffle are dropped.
    With `groups` (n,), one concept id per row, no batch holds two rows of one group, and S is the largest number of
    full batches that can be formed so; the rows of a group beyond S (a group has at most one row in each batch) and
    those left over after S full batches are dropped at random.

    With `drop_last=False` every row is used, and incomplete batches are padded with -1 at the end. With groups there
    are then max(ceil(n / batch_size), largest group) batches.

    Raises:
        ValueError: the batch is larger than the number of rows or of groups, or an argument is not positive.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    if groups is not None:
        codes, counts = _group_codes(groups, n_rows)
        possible = _full_steps(n_rows, batch_size, counts)
        return _grouped_batches(codes, counts, batch_size, rng, possible if drop_last else None)

    # one shuffle, with the last batch dropped or padded
    steps = _full_steps(n_rows, batch_size, None)
    order = rng.permutation(n_rows).astype(np.int64, copy=False)  # (n,)
    if drop_last:
        return order[: steps * batch_size].reshape(steps, batch_size)  # (S, batch_size)
    padded = np.full(-(-n_rows // batch_size) * batch_size, -1, dtype=np.int64)
    padded[:n_rows] = order
    return padded.reshape(-1, batch_size)  # (ceil(n / batch_size), batch_size)


def _group_codes(groups: Sequence, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Group number of each row, from 0 (n,), and the size of each group."""
    groups = np.asarray(groups)  # (n,)
    if groups.shape != (n_rows,):
        raise ValueError(f"groups must hold one id a row, shape ({n_rows},), got shape {groups.shape}")
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return codes.reshape(-1), counts  # (n,), (groups,)


def _full_steps(n_rows: int, batch_size: int, counts: np.ndarray | None) -> int:
    """Largest S such that S full batches can be formed with at most one row of a group in each.

    S batches can be filled if and only if sum_g min(count_g, S) >= S * batch_size: necessary because a group has at
    most S places, sufficient by the construction of `_grouped_batches`. The left side is concave in S and both sides
    are 0 at S = 0, so the feasible S form an interval, and bisection finds its end.
    """
    if n_rows < 1 or batch_size < 1:
        raise ValueError(f"n_rows and batch_size must be positive, got {n_rows} rows and a batch of {batch_size}")
    if batch_size > n_rows:
        raise ValueError(f"a batch of {batch_size} rows cannot be filled from {n_rows} rows: lower the batch size")
    if counts is None:
        return n_rows // batch_size
    if batch_size > len(counts):
        raise ValueError(
            f"a batch of {batch_size} rows with one row per group cannot be filled from {len(counts)} groups: "
            "lower the batch size or allow several rows of a group in a batch (groups=None)"
        )

    # the largest S that can be filled, by bisection
    low, high = 1, n_rows // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def _grouped_batches(
    codes: np.ndarray, counts: np.ndarray, batch_size: int, rng: np.random.Generator, steps: int | None
) -> np.ndarray:
    """Deals rows, sorted by group, to the S batches in turn: a group of at most S rows has one row per batch at most.

    Forms `steps` full batches, at most `_full_steps`; None uses every row and pads incomplete batches with -1.
    """
    n_rows = len(codes)
    drop_last = steps is not None
    if steps is None:
        steps = max(-(-n_rows // batch_size), int(counts.max()))

    # groups in random order, with the rows of each group adjacent and in random order
    rows = rng.permutation(n_rows)  # (n,)
    rank_of_group = rng.permutation(len(counts))
    rows = rows[np.argsort(rank_of_group[codes[rows]], kind="stable")]
    sizes = counts[np.argsort(rank_of_group)]  # (groups,)
    place_in_group = np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # (n,)

    # a group has at most one row in each batch; surplus rows are dropped at random
    rows = rows[place_in_group < steps]
    if drop_last:
        chosen = rng.permutation(len(rows))[: steps * batch_size]  # (S * batch_size,)
        rows = rows[np.sort(chosen)]

    # dealt in turn: row i goes to batch i mod S, so S consecutive rows are in different batches
    dealt = np.full(steps * batch_size, -1, dtype=np.int64)
    dealt[: len(rows)] = rows
    batches = dealt.reshape(batch_size, steps).T  # (S, batch_size)

    # shuffle batches, and rows within each, so that the order does not depend on groups
    batches = batches[rng.permutation(steps)]
    batches = rng.permuted(batches, axis=1)
    if not drop_last:
        batches = np.take_along_axis(batches, np.argsort(batches < 0, axis=1, kind="stable"), axis=1)
    return np.ascontiguousarray(batches)


class PairOrder:
    """The order of a run of any length: `keys(step)` is the global batch, a pure function of the step.

    Without weights, `epoch_batches` orders one source or several concatenated ones. With `weights`, an epoch of S
    steps visits source k v_k times, its share of the S * batch_size positions (rounded to whole rows, so the shares of
    an epoch are off by less than 1 / (S * batch_size)). Visit j of a source in the run reads position j mod n_k of
    its pass j div n_k, and each pass is a new shuffle of its n_k rows: after any epoch the visits of a source's rows
    differ by at most one. The visits of an epoch are shuffled into its batches.

    With `groups` and weights, S is the number of batches that the groups' mean visits fill. If an epoch visits a group
    more than S times, the surplus is dropped at random and replaced by visits of other groups; shares and evenness
    then hold on average.

    Args:
        n_rows: total number of rows of the concatenated sources.
        batch_size: rows per step over all processes.
        seed: determines the order, together with the epoch.
        groups: optional concept id of each row; a global batch holds at most one row per concept.
        sizes: rows of each source; with `weights` only.
        weights: share of each source, on any positive scale; None reads every row once per epoch.
        together: number of consecutive rows that stay adjacent in one batch; without groups and weights only. A
            remainder at the end of the data is never read.

    Attributes:
        steps_per_epoch: S, the same for every epoch.

    Raises:
        ValueError: the sizes do not match, a share gives a source no row in an epoch, or rows cannot stay together.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int = 0,
        groups: Sequence | None = None,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        together: int = 1,
    ) -> None:
        if weights is not None and (sizes is None or sum(sizes) != n_rows):
            raise ValueError(f"weights need the sizes of the sources, {n_rows} rows in sum, got {sizes}")
        if together > 1 and (groups is not None or weights is not None or batch_size % together):
            raise ValueError(
                f"{together} rows together need a batch that is a multiple of so many, no ids that keep rows apart "
                f"and no weights, got a batch of {batch_size}{', ids' * (groups is not None)}"
                f"{', weights' * (weights is not None)}"
            )
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.seed = seed
        self.together = together
        # group codes are computed once; epochs only shuffle them
        self.groups = None if groups is None else _group_codes(groups, n_rows)[0]
        self.sizes = self.visits = None
        if weights is None:
            self.steps_per_epoch = steps_in_epoch(n_rows // together, batch_size // together, self.groups)
        else:
            steps = _full_steps(n_rows, batch_size, None)
            self.sizes = tuple(map(int, sizes))
            self.visits = shares_of(steps * batch_size, weights, len(self.sizes))
            self.steps_per_epoch = steps if groups is None else self._mean_steps(steps)

        # cache of the last epoch
        self._epoch = -1
        self._batches = None

    def keys(self, step: int, total_steps: int) -> list[RowKey]:
        """The global batch of a step of a run of `total_steps` steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = self._shuffled(epoch)  # rows, turns: (S, batch_size) each
            self._epoch = epoch
        rows, turns = (array[place].tolist() for array in self._batches)
        progress = step / total_steps
        first = step * self.batch_size
        return [
            RowKey(row, epoch, progress, turn, first + number)
            for number, (row, turn) in enumerate(zip(rows, turns, strict=True))
        ]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and turns of an epoch, each (S, batch_size)."""
        if self.visits is None:
            share = self.batch_size // self.together
            firsts = epoch_batches(self.n_rows // self.together, share, self.seed, epoch, self.groups) * self.together
            rows = (firsts[:, :, None] + np.arange(self.together)).reshape(-1, self.batch_size)  # (S, batch_size)
            return rows, np.broadcast_to(np.int64(epoch), rows.shape)

        # weighted sources: distribute the visits of this epoch over its batches
        rows, turns = epoch_visits(self.sizes, self.visits, self.seed, epoch)  # (V,) each
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        if self.groups is None:
            places = rng.permutation(len(rows)).reshape(self.steps_per_epoch, self.batch_size)  # (S, batch_size)
        else:
            rows, turns = self._filled_up(rows, turns, epoch, rng)
            codes, counts = _group_codes(self.groups[rows], len(rows))
            places = _grouped_batches(codes, counts, self.batch_size, rng, self.steps_per_epoch)  # (S, batch_size)
        return rows[places], turns[places]

    def _mean_steps(self, steps: int) -> int:
        """Largest S <= steps that the mean visits of the groups in an epoch fill; see `_full_steps`."""
        # mean number of visits of each group in an epoch
        mean = np.zeros(int(self.groups.max()) + 1)  # (groups,)
        start = 0
        for size, visits in zip(self.sizes, self.visits, strict=True):
            mean += np.bincount(self.groups[start : start + size], minlength=len(mean)) * (visits / size)
            start += size

        # the largest S that these fill, by bisection
        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            # tolerance of half a row for rounding; `_filled_up` adds what an epoch lacks
            fits = np.minimum(mean, middle).sum() + 0.5 >= middle * self.batch_size
            if fits:
                low = middle
            else:
                high = middle - 1
        if low < 1:
            raise ValueError(
                f"with these weights a batch of {self.batch_size} rows with one row per group cannot be filled from "
                f"{len(mean)} groups, {float(np.minimum(mean, 1).sum()):.1f} of which an epoch visits on average; "
                "lower the batch size or allow several rows of a group in a batch (groups=None)"
            )
        return low

    def _filled_up(
        self, rows: np.ndarray, turns: np.ndarray, epoch: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds the visits that S batches lack because some groups happen to have more than S visits."""
        steps = self.steps_per_epoch
        places = steps * self.batch_size
        counts = np.bincount(self.groups[rows], minlength=int(self.groups.max()) + 1)  # (groups,)
        lack = places - int(np.minimum(counts, steps).sum())
        if lack <= 0:
            return rows, turns

        # groups with room, repeated once for each additional visit
        room = np.repeat(np.arange(len(counts)), np.clip(steps - counts, 0, lack))
        chosen = rng.permutation(room)[:lack]

        # a random row of each chosen group, with its own turn
        by_group = np.argsort(self.groups, kind="stable")  # (n,)
        sizes = np.bincount(self.groups)  # (groups,)
        extra = by_group[(np.cumsum(sizes) - sizes)[chosen] + rng.integers(sizes[chosen])]  # (lack,)
        extra_turns = EXTRA_TURN + epoch * places + np.arange(lack)  # (lack,)
        return np.concatenate([rows, extra]), np.concatenate([turns, extra_turns])


def shares_of(places: int, weights: Sequence[float], sources: int) -> tuple[int, ...]:
    """Divides `places` by weight into integers, rounding up the largest remainders (the first of equal ones).

    Raises:
        ValueError: there is not one positive finite weight per source, or a weight is so small that it gives no place.
    """
    shares = checked_shares(weights, sources)
    exact = shares * places  # (sources,)
    whole = np.floor(exact).astype(np.int64)  # (sources,)
    whole[np.argsort(whole - exact, kind="stable")[: places - int(whole.sum())]] += 1
    if whole.min() < 1:
        raise ValueError(f"weights {list(weights)} give a source none of the {places} places of an epoch")
    return tuple(whole.tolist())


def checked_shares(weights: Sequence[float], sources: int) -> np.ndarray:
    """Normalises weights to sum 1, (sources,). Raises `ValueError` unless each source has a positive one."""
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != (sources,) or not np.isfinite(shares).all() or shares.min() <= 0:
        raise ValueError(f"weights must be one positive number for each of {sources} sources, got {list(weights)}")
    return shares / shares.sum()


def epoch_visits(sizes: Sequence[int], visits: Sequence[int], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Visits of an epoch of a mixture, source by source: global row numbers and passes, each (V,) int64.

    Visit j of source k in the run is position j mod n_k of its pass j div n_k; epoch e starts at visit e v_k.
    """
    rows: list[np.ndarray] = []
    passes: list[np.ndarray] = []
    offset = 0
    for source, (size, count) in enumerate(zip(sizes, visits, strict=True)):
        # the visits of this epoch, pass by pass
        first, end = epoch * count, (epoch + 1) * count
        for number in range(first // size, -(-end // size)):
            # the shuffle depends on the pass alone, so an epoch may begin in the middle of a pass
            shuffle = np.random.SeedSequence(seed, spawn_key=(source, number))
            order = np.random.default_rng(shuffle).permutation(size)
            part = order[max(first - number * size, 0) : min(end - number * size, size)]
            rows.append(part + offset)
            passes.append(np.full(len(part), number))
        offset += size
    return np.concatenate(rows).astype(np.int64), np.concatenate(passes).astype(np.int64)


class PairBatchSampler(Sampler[list[RowKey]]):
    """Batches of `RowKey` for one process: slice number `rank` of every global batch.

    Use it as the `batch_sampler` of a `DataLoader` (which must not be sharded again). The slices of all ranks,
    concatenated, are the global batch, so the order does not depend on the number of processes.

    Args:
        n_rows: rows of the data set.
        batch_size: rows per step over all processes; a multiple of `world_size`.
        seed: determines the order, together with the epoch.
        total_epochs, total_steps: length of the run; give exactly one.
        groups, sizes, weights, together: see `PairOrder`.
        rank, world_size: this process among all.
        start_step: step of the run at which iteration begins (resume).

    Raises:
        ValueError: if the sizes do not fit each other.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int = 0,
        total_epochs: int | None = None,
        total_steps: int | None = None,
        groups: Sequence | None = None,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        together: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if (total_epochs is None) == (total_steps is None):
            raise ValueError(f"give one of total_epochs and total_steps, got {total_epochs} and {total_steps}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size} processes")
        if batch_size % world_size:
            raise ValueError(f"the global batch of {batch_size} rows is not a multiple of {world_size} processes")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.order = PairOrder(n_rows, batch_size, seed, groups, sizes, weights, together)
        if batch_size // world_size % together:
            raise ValueError(
                f"{together} rows together cannot share a process: {world_size} take {batch_size // world_size} rows "
                f"each"
            )
        self.steps_per_epoch = self.order.steps_per_epoch

        self.total_steps = int(total_epochs * self.steps_per_epoch) if total_steps is None else int(total_steps)
        if self.total_steps < 1:
            raise ValueError(f"the run has no step: {total_epochs} epochs of {self.steps_per_epoch} steps")
        if not 0 <= start_step <= self.total_steps:
            raise ValueError(f"start_step must be in [0, {self.total_steps}], got {start_step}")
        self.start_step = start_step

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[RowKey]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for step in range(self.start_step, self.total_steps):
            yield self.order.keys(step, self.total_steps)[mine]
