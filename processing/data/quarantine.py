"""Rows that cannot be used: who stands in for a bad row, and the list of them on disk.

Shapes: G rows of a global batch, t groups that they are of, n rows of all sources.
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
CHUNK = 1024  # candidates looked at together
MAX_ATTEMPTS = 100  # rows in turn that may fail for one place of a batch
STAND_IN_TURN = 1 << 62  # above any turn of the order: a stand-in's random draws are those of no row's own turn


class BadRowsError(ValueError):
    """More rows cannot be used than the run allows, or none is left for a place. The message lists them.

    Takes one message, so that it survives being re-raised out of a data-loading worker.
    """


@dataclass(frozen=True)
class BadRow:
    """Takes the place of a row's content where it cannot be read.

    `known`: the row was found bad when the source was opened, and is in the list already. `excluded`: nothing is wrong
    with it, but the run may not see it; it is listed, and counts for no share of bad rows.
    """

    reason: str
    known: bool = False
    excluded: bool = False


class StandIns:
    """For each place of the order, the rows that stand there if its own cannot be used.

    The candidates are a pure function of (seed, position of the place, attempt): the same after a resume and for any
    number of data workers and processes, which need not talk to each other. First come, where the order keeps one row
    per id in a batch, the other rows of the bad row's own id. Then all ids (or rows) that are not in the batch, in a
    shuffled order that is dealt to the G places in turn, so that two places never take the same one; of a weighted
    source, first those that have rows in it. Last, where ids may occur twice, rows of the batch itself. A place can be
    left without any only where ids may not occur twice, the bad row's id has no other row, and fewer than G ids are
    outside the batch.

    Args:
        rows: what `PairTrainingSet` reads: `reason(row)` and `take(rows)`.
        order: of the run.
        total_steps: length of the run.
    """

    def __init__(self, rows: Any, order: PairOrder, total_steps: int) -> None:
        self.rows = rows
        self.order = order
        self.total_steps = total_steps
        # without groups every row is a group of its own
        self.groups = order.groups
        self.n_groups = order.n_rows if self.groups is None else int(self.groups.max()) + 1

        # kept from call to call: the batch that was asked about last, and rows by group
        self._step = -1
        self._batch = np.zeros(0, dtype=np.int64)
        self._by_group: np.ndarray | None = None

    def __call__(self, key: RowKey) -> Iterator[tuple[RowKey, dict[str, Any] | BadRow]]:
        """Candidates for the place of `key`, read one at a time; rows known to be bad are left out."""
        for row in self.candidates(key):
            if self.rows.reason(row) is None:
                yield key._replace(row=row, turn=STAND_IN_TURN + key.position), read_rows(self.rows, [row])[0]

    def candidates(self, key: RowKey) -> Iterator[int]:
        """Row numbers, each at most once, without the row of `key`."""
        rng = np.random.default_rng(np.random.SeedSequence(self.order.seed, spawn_key=(STAND_IN_TURN, key.position)))

        # other rows of its own id
        if self.groups is not None:
            own = self._members(int(self.groups[key.row]))
            yield from rng.permutation(own[own != key.row]).tolist()

        # groups outside the batch; of a weighted source, those with rows in it first
        source = self._source_of(key.row)
        for inside in (True, False) if source is not None else (None,):
            for group in self._dealt(key.position):
                rows = self._members(group)
                if inside is not None:
                    rows = rows[((rows >= source.start) & (rows < source.stop)) == inside]
                yield from rng.permutation(rows).tolist()

        # without ids a row of the batch may occur twice
        if self.groups is None:
            batch = self._taken_at(key.position // self.order.batch_size)
            yield from rng.permutation(batch[batch != key.row]).tolist()

    def _dealt(self, position: int) -> Iterator[int]:
        """The groups outside the batch that are dealt to a place, in its order."""
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

        # the numbers that give groups of the batch are left out: rank -> number skips those below it
        numbers_taken = np.sort((taken - start) % count * pow(factor, -1, count) % count)  # (t,)
        skipped = numbers_taken - np.arange(len(taken))  # (t,)
        for first in range(place, count - len(taken), stride * CHUNK):
            end = min(first + stride * CHUNK, count - len(taken))
            ranks = np.arange(first, end, stride, dtype=np.int64)  # (CHUNK,)
            numbers = ranks + np.searchsorted(skipped, ranks, side="right")  # (CHUNK,)
            yield from ((factor % count * numbers + start) % count).tolist()

    def _taken_at(self, step: int) -> np.ndarray:
        """Groups of the rows of the global batch, each once."""
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
        """Rows of the weighted source that `row` is of; None where there are no weights to keep."""
        if self.order.sizes is None:
            return None
        ends = np.cumsum(self.order.sizes)  # (sources,)
        source = int(np.searchsorted(ends, row, side="right"))
        return range(int(ends[source] - self.order.sizes[source]), int(ends[source]))


def read_rows(rows: Any, numbers: Sequence[int]) -> list[dict[str, Any] | BadRow]:
    """`rows.take`, in which a row that cannot be read does not take the others down."""
    # rows that are known to be bad are not even tried
    known = {number: reason for number in numbers if (reason := rows.reason(number)) is not None}
    wanted = [number for number in numbers if number not in known]

    # all the others in one read, and one by one if that fails
    try:
        read = dict(zip(wanted, rows.take(wanted), strict=True)) if wanted else {}
    except (OSError, ValueError, EOFError) as error:
        if len(wanted) == 1:
            read = {wanted[0]: BadRow(f"cannot be read: {type(error).__name__}: {error}")}
        else:
            read = {number: read_rows(rows, [number])[0] for number in wanted}
    return [BadRow(known[number], known=True) if number in known else read[number] for number in numbers]


class Watch:
    """The share of bad rows of one portion of a run.

    More of the rows seen may be bad than `max_bad_rows` allows only as far as chance would make it: at opening not at
    all, in steps by three standard deviations of a binomial count (at 1 %, 4 rows of the first 100).

    Args:
        max_bad_rows: share, from 0 (none) to 1 (any).
        opened: (source, row, reason) of the rows found bad at opening.
        total: rows of the portion; None for a stream, which is not checked at opening.

    Attributes:
        before, new: (rows that failed, those of them that were to stand in for others) before the start and since.
    """

    def __init__(
        self, max_bad_rows: float, opened: Iterable[tuple[str, int, str]] = (), total: int | None = None
    ) -> None:
        if not 0 <= max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows is {max_bad_rows}; expected a share in [0, 1]")
        self.max_bad_rows = max_bad_rows
        self.total = total
        self.opened = [line_of(*row) for row in opened]
        self.opened_share = len(self.opened) / total if total else 0.0
        self.before = (0, 0)
        self.new = (0, 0)
        self.last: list[dict[str, Any]] = []


class Quarantine:
    """The list of bad rows of a run, `quarantine.jsonl`, and the watch over their share.

    A line is {"portion", "source", "row", "epoch", "step", "attempt", "reason", "replaced_by"}. `row` counts within
    its source; `attempt` is 0 for a row of the order and k for the k-th row that was to stand in for one;
    `replaced_by` is the row that did, counted over all sources. Rows found bad when the data were opened come first,
    once, with null for everything that belongs to a step; then comes a line each time that a row fails in a step. That
    of a row which the run may not see has "excluded" beside these.

    Args:
        directory: of the run's output.
        watches: by portion; all portions of a run share the one list.
        is_main: on the first process, which writes the lines of the opening and cuts the file at a resume.
    """

    def __init__(self, directory: str | os.PathLike, watches: Mapping[str, Watch], is_main: bool = True) -> None:
        self.path = Path(directory) / FILE
        self.watches = dict(watches)
        self.is_main = is_main

    def check_opening(self) -> None:
        """Raises `BadRowsError` if too large a share was found bad at opening, with the file written all the same."""
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
        """Brings the file to what it was at `start_step`: later lines are those of steps that will be run again."""
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
        """Appends what happened to a portion in a step: `line_of` without the step."""
        lines = [{"portion": portion, **line, "step": step} for line in lines]
        if not lines:
            return
        watch = self.watches[portion]
        failed, stand_ins = counted(lines)
        watch.new = watch.new[0] + failed, watch.new[1] + stand_ins
        watch.last = (watch.last + lines)[-SHOWN:]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One unbuffered write at the end of the file, wherever that is by now: several processes keep one list.
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(map(dumped, lines)).encode())

    def check(self, portion: str, bad: int, seen: int) -> None:
        """Raises `BadRowsError` if `bad` of the `seen` rows of all processes' steps are more than the run allows."""
        watch = self.watches[portion]

        # what of the share the opening has left, and three deviations more
        left = max(watch.max_bad_rows - watch.opened_share, 0.0)
        if bad > left * seen + 3 * sqrt(left * seen):
            at_opening = f", beside {len(watch.opened)} of {watch.total} at opening" if watch.opened else ""
            raise BadRowsError(
                f"{bad} of {seen} rows could not be used{at_opening}; more than max_bad_rows={watch.max_bad_rows} "
                f"allows. {self.path} lists them all, the last that this process met:\n{listed(watch.last)}"
            )

    def _write(self, earlier: list[dict[str, Any]]) -> None:
        """The opening's lines and these, written beside and renamed; no file if there is none."""
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
    """A line of the list, of a step that is not known yet or of none."""
    place = {"source": source, "row": int(row), "epoch": epoch, "step": None, "attempt": attempt}
    return {**place, "reason": reason, "replaced_by": replaced_by, **marks}


def counted(lines: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many rows failed, and how many of them were to stand in for others; not those that may not be seen."""
    failed = [line for line in lines if not line.get("excluded")]
    return len(failed), sum(line["attempt"] > 0 for line in failed)


def dumped(line: dict[str, Any]) -> str:
    # ASCII: a reason may quote the very surrogates that no encoding takes
    return json.dumps(line) + "\n"


def read_quarantine(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a list; none if there is no file. A last line that a crash cut short is left out."""
    try:
        content = Path(path).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    *whole, _ = content.split("\n")
    return [json.loads(line) for line in whole if line]


def listed(lines: Sequence[dict[str, Any]]) -> str:
    """Lines for people."""
    return "\n".join(f"  row {line['row']} of {line['source']}: {line['reason']}" for line in lines)
