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


class RowKey(NamedTuple):
    """What a data set and a collator need to know about one place in the order.

    `progress` is the share of the run that is done before this step: step / total_steps, in [0, 1).
    """

    row: int
    epoch: int
    progress: float


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
        return _grouped_batches(codes, counts, batch_size, rng, drop_last)
    steps = _full_steps(n_rows, batch_size, None)
    order = rng.permutation(n_rows).astype(np.int64, copy=False)
    if drop_last:
        return order[: steps * batch_size].reshape(steps, batch_size)
    padded = np.full(-(-n_rows // batch_size) * batch_size, -1, dtype=np.int64)
    padded[:n_rows] = order
    return padded.reshape(-1, batch_size)


def _group_codes(groups: Sequence, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row as a number from 0 (n,), and the size of each group."""
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise ValueError(f"groups must hold one id a row, shape ({n_rows},), got shape {groups.shape}")
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return codes.reshape(-1), counts


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
    low, high = 1, n_rows // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def _grouped_batches(
    codes: np.ndarray, counts: np.ndarray, batch_size: int, rng: np.random.Generator, drop_last: bool
) -> np.ndarray:
    """Rows laid out group after group, dealt to the S batches in turn: a group of at most S rows meets none twice."""
    n_rows = len(codes)
    steps = _full_steps(n_rows, batch_size, counts)
    if not drop_last:
        steps = max(-(-n_rows // batch_size), int(counts.max()))
    rows = rng.permutation(n_rows)
    rank_of_group = rng.permutation(len(counts))
    rows = rows[np.argsort(rank_of_group[codes[rows]], kind="stable")]
    sizes = counts[np.argsort(rank_of_group)]
    place_in_group = np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = rows[place_in_group < steps]
    if drop_last:
        kept = rng.permutation(len(rows))[: steps * batch_size]
        rows = rows[np.sort(kept)]
    dealt = np.full(steps * batch_size, -1, dtype=np.int64)
    dealt[: len(rows)] = rows
    batches = dealt.reshape(batch_size, steps).T
    batches = batches[rng.permutation(steps)]
    batches = rng.permuted(batches, axis=1)
    if not drop_last:
        batches = np.take_along_axis(batches, np.argsort(batches < 0, axis=1, kind="stable"), axis=1)
    return np.ascontiguousarray(batches)


class PairBatchSampler(Sampler[list[RowKey]]):
    """Batches of `RowKey` for one process: the contiguous slice `rank` of every global batch.

    Meant as the `batch_sampler` of a `DataLoader` (which must not be sharded a second time). The concatenation of the
    slices of all ranks is the global batch, so that the order does not depend on the number of processes.

    Args:
        n_rows: rows of the data set.
        batch_size: rows of a step over all processes; a multiple of `world_size`.
        seed: with the epoch, decides the order.
        total_epochs, total_steps: length of the run; exactly one of them.
        groups: optional concept id of each row, one row per concept in a global batch.
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
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        # The group of a row is sorted out once; epochs only shuffle the codes.
        self.groups = None if groups is None else _group_codes(groups, n_rows)[0]
        self.steps_per_epoch = steps_in_epoch(n_rows, batch_size, self.groups)
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
        batches, current = None, -1
        for step in range(self.start_step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != current:
                batches = epoch_batches(self.n_rows, self.batch_size, self.seed, epoch, self.groups)
                current = epoch
            progress = step / self.total_steps
            yield [RowKey(int(row), epoch, progress) for row in batches[place, mine]]
