"""Rows for PyTorch's DataLoader: indexed by the sampler's keys, or a stream of whole batches."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .quarantine import STAND_IN_TURN, BadRow, StandIns, read_rows
from .row_checks import PairDataError, report
from .rows import PairRows, PairStream
from .sampling import RowKey


class PairTrainingSet(Dataset):
    """A data set indexed by the sampler's `RowKey`s: items are (key, row), the collator's input.

    With `stand_ins` an item is (key, row, stand-ins), which are read lazily, and a row that cannot be read is a
    `BadRow`; without them it is an error.
    """

    def __init__(self, rows: PairRows, stand_ins: StandIns | None = None) -> None:
        self.rows = rows
        self.stand_ins = stand_ins

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: RowKey) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[RowKey]) -> list[tuple]:
        numbers = [key.row for key in keys]
        if self.stand_ins is None:
            return list(zip(keys, self.rows.take(numbers), strict=True))
        return list(zip(keys, read_rows(self.rows, numbers), map(self.stand_ins, keys), strict=True))


class PairTrainingStream(IterableDataset):
    """A stream of whole batches for one process: lists of (key, row), for a DataLoader with `batch_size=None`.

    The global order is the stream's, shuffled in a buffer with a generator of (seed, epoch). Process `rank` takes its
    slice of each global batch, and data worker w of W takes batches w, w + W, ...; the order does not depend on the
    numbers of processes and workers. Every worker reads the whole stream. An incomplete last batch of an epoch is
    dropped.

    If the stream was opened with `bad_rows="skip"`, an item is (key, row, stand-ins), with a `BadRow` for a bad row;
    stand-ins are the rows of the previous global batch, then those in the buffer.
    """

    def __init__(
        self,
        stream: PairStream,
        batch_size: int,
        total_steps: int,
        seed: int = 0,
        buffer_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"batch of {batch_size} rows, rank {rank} and {world_size} processes do not fit")
        if buffer_size < 1 or not 0 <= start_step <= total_steps:
            raise ValueError(f"got buffer_size {buffer_size}, start_step {start_step} of {total_steps}")
        self.stream = stream
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.seed = seed
        self.buffer_size = buffer_size
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[tuple]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        skipping = self.stream.bad_rows == "skip"
        before: list = []
        for step, epoch, batch, coming in self._batches():
            # all workers read all batches, and each yields every W-th
            if step >= self.start_step and (step - self.start_step) % workers == worker:
                first = step * self.batch_size + mine.start
                progress = step / self.total_steps
                keys = [RowKey(row[0], epoch, progress, -1, first + place) for place, row in enumerate(batch[mine])]
                extra = (((self._stand_ins(key, before, coming),) if skipping else ()) for key in keys)
                yield [(key, row, *more) for key, (_, row), more in zip(keys, batch[mine], extra, strict=True)]
            before = batch if skipping else []

    def _batches(self) -> Iterator[tuple[int, int, list, list]]:
        """Yields (step, epoch, global batch, rows in the buffer) from the first step on."""
        step = epoch = 0
        while step < self.total_steps:
            batch: list = []
            first = step
            for item, buffer in self._shuffled(epoch):
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield step, epoch, batch, list(buffer)
                    batch = []
                    step += 1
                    if step == self.total_steps:
                        return
            if step == first:
                raise PairDataError(f"{self.stream.name}: the stream ended before one batch of {self.batch_size} rows")
            epoch += 1

    def _shuffled(self, epoch: int) -> Iterator[tuple[tuple[int, dict[str, Any] | BadRow], list]]:
        """Yields each row, with the rows that are in the buffer."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        buffer: list = []

        # each new row replaces a random row of the buffer, which is yielded
        for item in self._read():
            if len(buffer) < self.buffer_size:
                buffer.append(item)
                continue
            place = int(rng.integers(self.buffer_size))
            chosen = buffer[place]
            buffer[place] = item
            yield chosen, buffer

        # the remaining rows, in random order
        buffer = [buffer[place] for place in rng.permutation(len(buffer))]
        while buffer:
            yield buffer.pop(0), buffer

    def _read(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        for number, row, reason in self.stream.checked():
            if reason and self.stream.bad_rows == "raise":
                raise PairDataError(report(self.stream.name, [(number, reason)], 1, None))
            yield number, BadRow(reason) if reason else row

    def _stand_ins(self, key: RowKey, before: list, coming: list) -> Iterator[tuple[RowKey, dict[str, Any]]]:
        """Good rows of the previous batch, then of the buffer, starting at the position of `key`."""
        place = key.position % self.batch_size
        turn = STAND_IN_TURN + key.position
        for number, row in chain(before[place:], before[:place], coming[place:], coming[:place]):
            if not isinstance(row, BadRow):
                yield key._replace(row=number, turn=turn), row
