"""Rows that cannot be used: their replacement by stand-ins, and the list of them on disk.

Shapes: G rows of a global batch, t groups in it, n rows of all sources.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from .sampling import PairOrder, RowKey

FILE = "quarantine.jsonl"
SHOWN = 10  # rows named in an error
CHUNK = 1024  # candidates computed at once
MAX_ATTEMPTS = 100  # stand-ins tried for one position of a batch
STAND_IN_TURN = 1 << 62  # above all turns of the order, so that stand-ins have their own random draws


class BadRowsError(ValueError):
    """More rows are bad than the run allows, or no stand-in is left for a position. The message lists them.

    The constructor takes only a message, so that a data-loading worker can re-raise the error.
    """


@dataclass(frozen=True)
class BadRow:
    """Replaces the content of a row that cannot be read.

    `known`: the row was found bad when the source was opened, and is already listed. `excluded`: the row is good, but
    the run must not see it; it is listed, but does not count as a bad row.
    """

    reason: str
    known: bool = False
    excluded: bool = False


class StandIns:
    """The stand-ins for each position of the order, used if its own row is bad.

    The candidates are a pure function of (seed, position, attempt): the same after a resume and for any number of data
    workers and processes, without communication. If the order keeps one row per id in a batch, the other rows of the
    bad row's id come first. Then come all ids (or rows) outside the batch, in a shuffled order dealt to the G
    positions in turn, so that two positions never take the same one; with weighted sources, ids with rows in the bad
    row's source come first. Last, if ids may repeat, come rows of the batch itself. A position has no candidate only
    if ids may not repeat, the bad row's id has no other row, and fewer than G ids are outside the batch.

    Args:
        rows: the rows of `PairTrainingSet`, with `reason(row)` and `take(rows)`.
        order: order of the run.
        total_steps: length of the run.
    """

    def __init__(self, rows: Any, order: PairOrder, total_steps: int) -> None:
        self.rows = rows
        self.order = order
        self.total_steps = total_steps
        # without groups, every row is its own group
        self.groups = order.groups
        self.n_groups = order.n_rows if self.groups is None else int(self.groups.max()) + 1

        # caches: the last batch, and rows by group
        self._step = -1
        self._batch = np.zeros(0, dtype=np.int64)
        self._by_group: np.ndarray | None = None

    def __call__(self, key: RowKey) -> Iterator[tuple[RowKey, dict[str, Any] | BadRow]]:
        """Candidates for the position of `key`, read one at a time, without rows known to be bad."""
        for row in self.candidates(key):
            if self.rows.reason(row) is None:
                yield key._replace(row=row, turn=STAND_IN_TURN + key.position), read_rows(self.rows, [row])[0]

    def candidates(self, key: RowKey) -> Iterator[int]:
        """Row numbers, each at most once, without the row of `key`."""
        rng = np.random.default_rng(np.random.SeedSequence(self.order.seed, spawn_key=(STAND_IN_TURN, key.position)))

        # other rows of the same id
        if self.groups is not None:
            own = self._members(int(self.groups[key.row]))
            yield from rng.permutation(own[own != key.row]).tolist()

        # groups outside the batch; with weighted sources, first those with rows in the same source
        source = self._source_of(key.row)
        for inside in (True, False) if source is not None else (None,):
            for group in self._dealt(key.position):
                rows = self._members(group)
                if inside is not None:
                    rows = rows[((rows >= source.start) & (rows < source.stop)) == inside]
                yield from rng.permutation(rows).tolist()

        # without ids, a row of the batch may occur twice
        if self.groups is None:
            batch = self._taken_at(key.position // self.order.batch_size)
            yield from rng.permutation(batch[batch != key.row]).tolist()

    def _dealt(self, position: int) -> Iterator[int]:
        """The groups outside the batch that are dealt to a position, in order."""
        step, place = divmod(position, self.order.batch_size)
        taken = self._taken_at(step)  # (t,)
        count = self.n_groups
        stride = self.order.batch_size
        # number -> (factor * number + start) mod count visits every group once, as factor and count are coprime
        rng = np.random.default_rng(np.random.SeedSequence(self.order.seed, spawn_key=(STAND_IN_TURN, 1, step)))
        start = int(rng.integers(count))
        factor = int(rng.integers(count)) | 1
        while gcd(factor, count) != 1:
            factor += 2

        # skip the numbers that give groups of the batch, when mapping rank -> number
        numbers_taken = np.sort((taken - start) % count * pow(factor, -1, count) % count)  # (t,)
        skipped = numbers_taken - np.arange(len(taken))  # (t,)
        for first in range(place, count - len(taken), stride * CHUNK):
            end = min(first + stride * CHUNK, count - len(taken))
            ranks = np.arange(first, end, stride, dtype=np.int64)  # (CHUNK,)
            numbers = ranks + np.searchsorted(skipped, ranks, side="right")  # (CHUNK,)
            yield from ((factor % count * numbers + start) % count).tolist()

    def _taken_at(self, step: int) -> np.ndarray:
        """Distinct groups of the global batch."""
        batch = self._batch_at(step)
        return np.unique(batch if self.groups is None else self.groups[batch])

    def _batch_at(self, step: int) -> np.ndarray:
        """Rows of the global batch, (G,)."""
        if step != self._step:
            keys = self.order.keys(step, self.total_steps)
            self._step = step
            self._batch = np.array([key.row for key in keys], dtype=np.int64)  # (G,)
        return self._batch

    def _members(self, group: int) -> np.ndarray:
        """Rows of a group."""
        if self.groups is None:
            return np.array([group], dtype=np.int64)
        if self._by_group is None:
            self._by_group = np.argsort(self.groups, kind="stable")  # (n,), rows group after group
            self._ends = np.cumsum(np.bincount(self.groups, minlength=self.n_groups))  # (groups,)
        return self._by_group[self._ends[group - 1] if group else 0 : self._ends[group]]

    def _source_of(self, row: int) -> range | None:
        """Rows of the weighted source that contains `row`; None without weights."""
        if self.order.sizes is None:
            return None
        ends = np.cumsum(self.order.sizes)  # (sources,)
        source = int(np.searchsorted(ends, row, side="right"))
        return range(int(ends[source] - self.order.sizes[source]), int(ends[source]))


def read_rows(rows: Any, numbers: Sequence[int]) -> list[dict[str, Any] | BadRow]:
    """`rows.take`, except that a row that cannot be read becomes a `BadRow` and does not affect the others."""
    # rows known to be bad are not read
    known = {number: reason for number in numbers if (reason := rows.reason(number)) is not None}
    wanted = [number for number in numbers if number not in known]

    # all others in one read, or one by one if that fails
    try:
        read = dict(zip(wanted, rows.take(wanted), strict=True)) if wanted else {}
    except (OSError, ValueError, EOFError) as error:
        if len(wanted) == 1:
            read = {wanted[0]: BadRow(f"cannot be read: {type(error).__name__}: {error}")}
        else:
            read = {number: read_rows(rows, [number])[0] for number in wanted}
    return [BadRow(known[number], known=True) if number in known else read[number] for number in numbers]


class Watch:
    """Monitors the share of bad rows of one portion of a run.

    At opening the share may not exceed `max_bad_rows`; during training it may exceed it by three standard deviations
    of a binomial count (at 1 %, 4 rows of the first 100).

    Args:
        max_bad_rows: maximum share, from 0 (none) to 1 (any).
        opened: (source, row, reason) of the rows found bad at opening.
        total: rows of the portion; None for a stream, which is not checked at opening.
        unit: what the steps read, as the message calls it: rows, or pairs where a row is one for each caption.

    Attributes:
        before, new: (failed rows, those of them that were stand-ins) before the start and since.
    """

    def __init__(
        self,
        max_bad_rows: float,
        opened: Iterable[tuple[str, int, str]] = (),
        total: int | None = None,
        unit: str = "rows",
    ) -> None:
        if not 0 <= max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows is {max_bad_rows}; expected a share in [0, 1]")
        self.max_bad_rows = max_bad_rows
        self.total = total
        self.unit = unit
        self.opened = [line_of(*row) for row in opened]
        self.opened_share = len(self.opened) / total if total else 0.0
        self.before = (0, 0)
        self.new = (0, 0)
        self.last: list[dict[str, Any]] = []


class Quarantine:
    """The list of bad rows of a run, `quarantine.jsonl`, and the check of their share.

    A line is {"portion", "source", "row", "epoch", "step", "attempt", "reason", "replaced_by"}. `row` counts within
    its source; `attempt` is 0 for a row of the order and k for its k-th stand-in; `replaced_by` is the row that was
    used, counted over all sources. Rows found bad at opening come first, once, with null in all fields of a step; then
    there is one line each time that a row fails in a step. Lines of rows that the run must not see also have
    "excluded".

    Args:
        directory: output directory of the run.
        watches: a `Watch` per portion; all portions of a run share one list.
        is_main: whether this is the first process, which writes the opening's lines and truncates the file on resume.
    """

    def __init__(self, directory: str | os.PathLike, watches: Mapping[str, Watch], is_main: bool = True) -> None:
        self.path = Path(directory) / FILE
        self.watches = dict(watches)
        self.is_main = is_main

    def check_opening(self) -> None:
        """Raises `BadRowsError` if too large a share was found bad at opening, after writing the file."""
        for watch in self.watches.values():
            if watch.opened_share <= watch.max_bad_rows:
                continue
            if self.is_main:
                self._write([line for line in read_quarantine(self.path) if line["step"] is not None])
            raise BadRowsError(
                f"{len(watch.opened)} of {watch.total} rows cannot be used, more than "
                f"max_bad_rows={watch.max_bad_rows} allows; {self.path} lists them all, the first:\n"
                f"{listed(watch.opened[:SHOWN])}"
            )

    def begin(self, start_step: int) -> None:
        """Restores the file to its state at `start_step`: later steps will be run again."""
        earlier = [line for line in read_quarantine(self.path) if line["step"] is not None]
        earlier = [line for line in earlier if line["step"] < start_step]
        for name, watch in self.watches.items():
            mine = [line for line in earlier if line.get("portion") == name]
            watch.before = counted(mine)
            watch.new = (0, 0)
            watch.last = mine[-SHOWN:]
        if self.is_main:
            self._write(earlier)

    def add(self, portion: str, step: int, lines: Iterable[dict[str, Any]]) -> None:
        """Appends the lines of a portion in a step; `lines` are from `line_of`, without the step."""
        lines = [{"portion": portion, **line, "step": step} for line in lines]
        if not lines:
            return
        watch = self.watches[portion]
        failed, stand_ins = counted(lines)
        watch.new = watch.new[0] + failed, watch.new[1] + stand_ins
        watch.last = (watch.last + lines)[-SHOWN:]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one unbuffered append, because several processes write to one list
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(map(dumped, lines)).encode())

    def check(self, portion: str, bad: int, seen: int) -> None:
        """Raises `BadRowsError` if `bad` of the `seen` rows (or pairs), over all processes, exceed the limit."""
        watch = self.watches[portion]

        # the share that bad rows at opening have left, plus three standard deviations
        left = max(watch.max_bad_rows - watch.opened_share, 0.0)
        if bad > left * seen + 3 * sqrt(left * seen):
            at_opening = f", beside {len(watch.opened)} of {watch.total} rows at opening" if watch.opened else ""
            raise BadRowsError(
                f"{bad} of {seen} {watch.unit} could not be used{at_opening}; more than "
                f"max_bad_rows={watch.max_bad_rows} allows. {self.path} lists them all, the last that this process "
                f"met:\n{listed(watch.last)}"
            )

    def _write(self, earlier: list[dict[str, Any]]) -> None:
        """Atomically writes the opening's lines and `earlier`; removes the file if there are none."""
        opened = [{"portion": name, **line} for name, watch in self.watches.items() for line in watch.opened]
        if not opened and not earlier:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{FILE}.tmp")
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(map(dumped, [*opened, *earlier]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)


def line_of(
    source: str,
    row: int,
    reason: str,
    epoch: int | None = None,
    attempt: int | None = None,
    replaced_by: int | None = None,
    **marks: bool,
) -> dict[str, Any]:
    """A line of the list, without its step, which is unknown here or does not exist."""
    place = {"source": source, "row": int(row), "epoch": epoch, "step": None, "attempt": attempt}
    return {**place, "reason": reason, "replaced_by": replaced_by, **marks}


def counted(lines: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Number of rows that failed, and of stand-ins among them, without excluded rows."""
    failed = [line for line in lines if not line.get("excluded")]
    return len(failed), sum(line["attempt"] > 0 for line in failed)


def dumped(line: dict[str, Any]) -> str:
    # ASCII, because a reason may quote lone surrogates, which cannot be encoded
    return json.dumps(line) + "\n"


def read_quarantine(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a list; empty if there is no file. A last line truncated by a crash is ignored."""
    try:
        content = Path(path).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    *whole, _ = content.split("\n")
    return [json.loads(line) for line in whole if line]


def listed(lines: Sequence[dict[str, Any]]) -> str:
    """Formats lines for a message."""
    return "\n".join(f"  row {line['row']} of {line['source']}: {line['reason']}" for line in lines)
