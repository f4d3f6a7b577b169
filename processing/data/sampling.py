"""The order of rows as pure index arithmetic: (seed, epoch, position) -> row.

Nothing here holds a state that a checkpoint would have to carry: the step number is the whole position, so a run
that starts at step k reads the very rows that an unbroken run reads from step k on, with any number of data workers
and of processes.

Shapes: n rows, S steps an epoch, G global batch, G / world_size rows a process and step.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

EXTRA_TURN = 1 << 61  # above the turns of visits that the shares ask for


class RowKey(NamedTuple):
    """What a data set and a collator need to know about one place in the order.

    Attributes:
        row: number of the row.
        epoch: of the run.
        progress: share of the run that is done before this step: step / total_steps, in [0, 1).
        turn: no two places of a run have the same row and turn, so random choices about a row are drawn from
            (seed, turn, row): copies of a row in one epoch get their own. The epoch, if rows occur once an epoch.
        position: place in the run, step * batch_size + place in the global batch.
    """

    row: int
    epoch: int
    progress: float
    turn: int = -1
    position: int = -1

    def generator(self, seed: int, *more: int) -> np.random.Generator:
        """For every random choice about the row at this place; `more` tells several generators apart."""
        return np.random.default_rng([seed, self.epoch if self.turn < 0 else self.turn, self.row, *more])


def concept_id(value: int | str) -> int:
    """Concept id as a 63-bit number: an integer stays, a string becomes a hash that is the same in every process."""
    if isinstance(value, str):
        return int.from_bytes(blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"a concept id must be an int or a str, got {type(value).__name__}")
    return int(value)


def steps_in_epoch(n_rows: int, batch_size: int, groups: Sequence | None = None) -> int:
    """Number of full batches that one epoch gives; see `epoch_batches`. The same for every epoch."""
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
    With `groups` (n,) (one concept id a row) no batch holds two rows of one group, and S is the largest number of
    full batches for which such a division exists; dropped are, at random, the rows of a group beyond S (a group can
    fill one place a batch) and what is left over after S full batches.

    With `drop_last=False` every row is used: a batch that is not full ends in -1. With groups there are then
    max(ceil(n / batch_size), largest group) batches.

    Raises:
        ValueError: if the batch is larger than the number of rows or of groups, or an argument is not positive.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    if groups is not None:
        codes, counts = _group_codes(groups, n_rows)
        possible = _full_steps(n_rows, batch_size, counts)
        return _grouped_batches(codes, counts, batch_size, rng, possible if drop_last else None)

    # one shuffle, whose end is dropped or padded
    steps = _full_steps(n_rows, batch_size, None)
    order = rng.permutation(n_rows).astype(np.int64, copy=False)  # (n,)
    if drop_last:
        return order[: steps * batch_size].reshape(steps, batch_size)  # (S, batch_size)
    padded = np.full(-(-n_rows // batch_size) * batch_size, -1, dtype=np.int64)
    padded[:n_rows] = order
    return padded.reshape(-1, batch_size)  # (ceil(n / batch_size), batch_size)


def _group_codes(groups: Sequence, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row as a number from 0 (n,), and the size of each group."""
    groups = np.asarray(groups)  # (n,)
    if groups.shape != (n_rows,):
        raise ValueError(f"groups must hold one id a row, shape ({n_rows},), got shape {groups.shape}")
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return codes.reshape(-1), counts  # (n,), (groups,)


def _full_steps(n_rows: int, batch_size: int, counts: np.ndarray | None) -> int:
    """Largest S such that S full batches can be formed, a group giving at most one row to each.

    S batches can be filled if and only if sum_g min(count_g, S) >= S * batch_size: necessary because a group has at
    most S places, sufficient by the wrap-around of `_grouped_batches`. The left side is concave in S and both are 0
    at S = 0, so that the feasible S are an interval, found by bisection.
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
    """Rows laid out group after group, dealt to the S batches in turn: a group of at most S rows meets none twice.

    `steps` full batches, at most `_full_steps`; None uses every row, and batches that are not full end in -1.
    """
    n_rows = len(codes)
    drop_last = steps is not None
    if steps is None:
        steps = max(-(-n_rows // batch_size), int(counts.max()))

    # groups in random order, rows of a group beside each other, in random order
    rows = rng.permutation(n_rows)  # (n,)
    rank_of_group = rng.permutation(len(counts))
    rows = rows[np.argsort(rank_of_group[codes[rows]], kind="stable")]
    sizes = counts[np.argsort(rank_of_group)]  # (groups,)
    place_in_group = np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # (n,)

    # a group gives at most one row to each batch; what is too much goes at random
    rows = rows[place_in_group < steps]
    if drop_last:
        chosen = rng.permutation(len(rows))[: steps * batch_size]  # (S * batch_size,)
        rows = rows[np.sort(chosen)]

    # dealt in turn: row i goes to batch i mod S, so that S rows in a row meet nowhere
    dealt = np.full(steps * batch_size, -1, dtype=np.int64)
    dealt[: len(rows)] = rows
    batches = dealt.reshape(batch_size, steps).T  # (S, batch_size)

    # the order of batches, and of rows in each, tells nothing of groups
    batches = batches[rng.permutation(steps)]
    batches = rng.permuted(batches, axis=1)
    if not drop_last:
        batches = np.take_along_axis(batches, np.argsort(batches < 0, axis=1, kind="stable"), axis=1)
    return np.ascontiguousarray(batches)


class PairOrder:
    """The order of a run of any length: `keys(step)` is the global batch, a pure function of the step.

    One source, or several one after the other without weights: `epoch_batches`. With `weights`, an epoch of S steps
    visits source k v_k times, v_k being its share of the S * batch_size places (rounded to whole rows, so that the
    shares of an epoch are off by less than 1 / (S * batch_size)). The j-th visit of a source in the run reads place
    j mod n_k of its pass j div n_k, and each pass is a new shuffle of its n_k rows: after any epoch the rows of a
    source have been visited equally often, or once more. The visits of an epoch are shuffled into its batches.

    With `groups` and weights, S is what the mean visits of the groups fill. Only where an epoch visits a group more
    than S times, the surplus is dropped, at random, and as many visits of other groups are added: shares and
    evenness then hold on average.

    Args:
        n_rows: rows of all sources together, numbered one source after the other.
        batch_size: rows of a step over all processes.
        seed: with the epoch, decides the order.
        groups: optional concept id of each row, one row per concept in a global batch.
        sizes: rows of each source; with `weights` only.
        weights: share of each source, any positive scale; None walks every row once an epoch.
        together: so many rows that follow each other are in a batch together, beside each other; without groups and
            weights only. Rows that are left at the end of the data are never read.

    Attributes:
        steps_per_epoch: S, the same for every epoch.

    Raises:
        ValueError: if the sizes do not fit each other, a share gives a source no row in an epoch, or rows cannot be
            together.
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
        # The group of a row is sorted out once; epochs only shuffle the codes.
        self.groups = None if groups is None else _group_codes(groups, n_rows)[0]
        self.sizes = self.visits = None
        if weights is None:
            self.steps_per_epoch = steps_in_epoch(n_rows // together, batch_size // together, self.groups)
        else:
            steps = _full_steps(n_rows, batch_size, None)
            self.sizes = tuple(map(int, sizes))
            self.visits = shares_of(steps * batch_size, weights, len(self.sizes))
            self.steps_per_epoch = steps if groups is None else self._mean_steps(steps)

        # the epoch that was asked for last
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

        # weighted sources: the visits of this epoch, put into batches
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
        # how often an epoch visits each group on average
        mean = np.zeros(int(self.groups.max()) + 1)  # (groups,)
        start = 0
        for size, visits in zip(self.sizes, self.visits, strict=True):
            mean += np.bincount(self.groups[start : start + size], minlength=len(mean)) * (visits / size)
            start += size

        # the largest S that they fill, by bisection
        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            # half a row for rounding: rows are whole, and what an epoch lacks is filled up anyway
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
        """The visits, and as many more as S batches lack because some groups by chance have more than S of them."""
        steps = self.steps_per_epoch
        places = steps * self.batch_size
        counts = np.bincount(self.groups[rows], minlength=int(self.groups.max()) + 1)  # (groups,)
        lack = places - int(np.minimum(counts, steps).sum())
        if lack <= 0:
            return rows, turns

        # groups with room for more, once for each visit more that they can take
        room = np.repeat(np.arange(len(counts)), np.clip(steps - counts, 0, lack))
        chosen = rng.permutation(room)[:lack]

        # a random row of each group that was chosen, under turns of its own
        by_group = np.argsort(self.groups, kind="stable")  # (n,)
        sizes = np.bincount(self.groups)  # (groups,)
        extra = by_group[(np.cumsum(sizes) - sizes)[chosen] + rng.integers(sizes[chosen])]  # (lack,)
        extra_turns = EXTRA_TURN + epoch * places + np.arange(lack)  # (lack,)
        return np.concatenate([rows, extra]), np.concatenate([turns, extra_turns])


def shares_of(places: int, weights: Sequence[float], sources: int) -> tuple[int, ...]:
    """`places` divided by weight into whole numbers, the largest remainders rounded up (the first of equal ones).

    Raises:
        ValueError: not one positive finite weight a source, or one so small that it gives no place.
    """
    shares = checked_shares(weights, sources)
    exact = shares * places  # (sources,)
    whole = np.floor(exact).astype(np.int64)  # (sources,)
    whole[np.argsort(whole - exact, kind="stable")[: places - int(whole.sum())]] += 1
    if whole.min() < 1:
        raise ValueError(f"weights {list(weights)} give a source none of the {places} places of an epoch")
    return tuple(whole.tolist())


def checked_shares(weights: Sequence[float], sources: int) -> np.ndarray:
    """Weights on any scale as shares of 1, (sources,). Raises `ValueError` unless there is a positive one for each."""
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != (sources,) or not np.isfinite(shares).all() or shares.min() <= 0:
        raise ValueError(f"weights must be one positive number for each of {sources} sources, got {list(weights)}")
    return shares / shares.sum()


def epoch_visits(sizes: Sequence[int], visits: Sequence[int], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The visits of an epoch of a mixture, source after source: global row numbers and passes, each (V,) int64.

    Visit j of source k in the run is place j mod n_k of its pass j div n_k; epoch e holds the visits from e v_k on.
    """
    rows: list[np.ndarray] = []
    passes: list[np.ndarray] = []
    offset = 0
    for source, (size, count) in enumerate(zip(sizes, visits, strict=True)):
        # the visits of this epoch, pass by pass
        first, end = epoch * count, (epoch + 1) * count
        for number in range(first // size, -(-end // size)):
            # a shuffle that depends on the pass alone, so that an epoch may begin in its middle
            shuffle = np.random.SeedSequence(seed, spawn_key=(source, number))
            order = np.random.default_rng(shuffle).permutation(size)
            part = order[max(first - number * size, 0) : min(end - number * size, size)]
            rows.append(part + offset)
            passes.append(np.full(len(part), number))
        offset += size
    return np.concatenate(rows).astype(np.int64), np.concatenate(passes).astype(np.int64)


class PairBatchSampler(Sampler[list[RowKey]]):
    """Batches of `RowKey` for one process: the contiguous slice `rank` of every global batch.

    Meant as the `batch_sampler` of a `DataLoader` (which must not be sharded a second time). The concatenation of the
    slices of all ranks is the global batch, so that the order does not depend on the number of processes.

    Args:
        n_rows: rows of the data set.
        batch_size: rows of a step over all processes; a multiple of `world_size`.
        seed: with the epoch, decides the order.
        total_epochs, total_steps: length of the run; exactly one of them.
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
