"""The rows that a run trains on, and its batches from any step on: each portion's own rows, order and batch size."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from oner.processing.data.captions_apart import CaptionsApart
from oner.processing.data.mixture import open_mixture
from oner.processing.data.quarantine import Quarantine, StandIns, Watch, line_of
from oner.processing.data.row_checks import ROLES
from oner.processing.data.rows import PairRows, PairStream
from oner.processing.data.sampling import PairBatchSampler, PairOrder
from oner.processing.data.training_sets import PairTrainingSet, PairTrainingStream
from oner.training.objectives.objective import Batch
from oner.training.parallel.distributed import rank, sum_over_processes, world_size

from .arguments import Arguments, DataArguments
from .collators import Collator
from .data_workers import Waiting, outlive_signals_to_the_group, patiently

Rows = PairRows | PairStream


def open_training_rows(data: DataArguments) -> Rows:
    """
    The training rows of a portion, of its kind, columns checked; those found bad are left to the quarantine.

    Raises:
        PairDataError: data that cannot be read as rows of the kind; names the file and what is wrong.
    """
    # columns that the kind does not have are not looked for
    roles = ROLES[data.kind]
    rows = open_mixture(
        data.train_data,
        data.kind,
        data.image_column if "image" in roles else None,
        data.text_column if "text" in roles else None,
        data.id_column,
        split=data.split,
        streaming=data.streaming,
        bad_rows="skip",
        weights=data.data_weights,
        config=data.data_config,
        revision=data.data_revision,
    )
    return CaptionsApart(rows) if data.captions_apart else rows


def open_portions(arguments: Arguments) -> dict[str, Rows]:
    """
    The rows of each portion of a run, columns checked, and bad ones left to the quarantine.

    Raises:
        PairDataError: data that cannot be read as rows; names the file and what is wrong.
        BadRowsError: too many rows are bad. quarantine.jsonl in the output directory lists them.
    """
    # the check lists what is bad before anything is built
    rows = {name: open_training_rows(options.data) for name, options in arguments.portions().items()}
    quarantine_of(arguments, rows).check_opening()
    return rows


def quarantine_of(arguments: Arguments, rows: Mapping[str, Rows]) -> Quarantine:
    """The list of bad rows of a run over these portions, with those that are known already."""
    portions = arguments.portions()
    watches = {name: _watch(one, portions[name].data.max_bad_rows) for name, one in rows.items()}
    return Quarantine(arguments.run.output_dir, watches, is_main=rank() == 0)


def _watch(rows: Rows, max_bad_rows: float) -> Watch:
    if isinstance(rows, PairStream):
        return Watch(max_bad_rows)

    # rows of an open data set are known by their file and place
    opened = [(*rows.where(row), reason) for row, reason in sorted(rows.bad.items())]
    return Watch(max_bad_rows, opened, len(rows))


class RunLoader:
    """
    `loader(start_step)` yields this process's batches by portion from that step to the end of the run, the same
    whether the run was ever stopped, and a `Waiting` now and then while its data workers bring none. A stream is the
    exception, and says so: `resume_note`.

    A row that cannot be used is replaced and listed in `quarantine.jsonl` in the output directory.

    Args:
        arguments (`Arguments`): The run's.
        rows, collators: Of each portion that the arguments name.

    Attributes:
        quarantine (`Quarantine`): That list.
        epoch_steps, total_steps (`int`): Length of an epoch, which one portion defines, and of the run; a stream's
            epoch is the whole run.
        resume_note (`str`, *optional*): Why resuming cannot be exact, if it cannot.

    Raises:
        ValueError: other portions than the arguments name; what [`PortionLoader`] raises.
        BadRowsError: more rows are bad than `max_bad_rows` allows, here or while the batches are read.
    """

    def __init__(self, arguments: Arguments, rows: Mapping[str, Rows], collators: Mapping[str, Collator]):
        portions = arguments.portions()
        if not portions.keys() == rows.keys() == collators.keys():
            raise ValueError(
                f"got rows of {sorted(rows)} and collators of {sorted(collators)}; expected {sorted(portions)}"
            )

        # bad rows that are known before the first step count already
        self.quarantine = quarantine_of(arguments, rows)
        self.quarantine.check_opening()
        self.portions = {
            name: PortionLoader(name, options, rows[name], collators[name], self.quarantine)
            for name, options in portions.items()
        }

        # an epoch is one portion's; the run's length follows from it
        epoch = self.portions[arguments.run.epoch_portion or next(iter(portions))]
        self.epoch_steps = epoch.epoch_steps
        self.total_steps = arguments.run.max_steps or round(arguments.run.epochs * self.epoch_steps)
        if self.total_steps < 1:
            raise ValueError(
                f"epochs is {arguments.run.epochs}, less than one of the {self.epoch_steps} steps that an epoch has; "
                f"expected more, or max_steps"
            )
        notes = [
            portion.rows.resume_note for portion in self.portions.values() if isinstance(portion.rows, PairStream)
        ]
        self.resume_note = "\n".join(notes) or None

    def __call__(self, start_step: int) -> Iterator[dict[str, Batch] | Waiting]:
        self.quarantine.begin(start_step)
        batches = {name: portion.batches(start_step, self.total_steps) for name, portion in self.portions.items()}
        for _ in range(start_step, self.total_steps):
            step: dict[str, Batch] = {}
            for name, portion in batches.items():
                while isinstance(batch := next(portion), Waiting):
                    yield batch
                step[name] = batch
            yield step


class PortionLoader:
    """
    One portion's batches.

    Args:
        name (`str`): The portion's.
        arguments (`Arguments`): The portion's own: its data, batch size, repeat and seed.
        rows, collator: What it reads, and what makes batches of that.
        quarantine (`Quarantine`): The run's.

    Attributes:
        epoch_steps (`int`): Steps in which it reads its rows `repeat` times; a stream's are all of the run's.

    Raises:
        ValueError: a stream without max_steps, or with a warm-up that would last as long as the run.
    """

    def __init__(self, name: str, arguments: Arguments, rows: Rows, collator: Collator, quarantine: Quarantine):
        self.name = name
        self.arguments = arguments
        self.rows = rows
        self.collator = collator
        self.quarantine = quarantine
        data = arguments.data
        run = arguments.run

        # a stream has no length: its epoch is the run
        if isinstance(rows, PairStream):
            _check_stream(arguments)
            self.epoch_steps = run.max_steps
            return

        # the order of rows: how a mixture is drawn, and which rows may not meet in a batch
        self.mixture = {"groups": _groups(rows, data), "together": data.rows_together}
        if data.data_weights is not None:
            self.mixture |= {"sizes": rows.sizes, "weights": data.data_weights}
        order = PairOrder(len(rows), run.batch_size, **self.mixture)
        self.epoch_steps = run.repeat * order.steps_per_epoch

    def batches(self, start_step: int, total_steps: int) -> Iterator[Batch | Waiting]:
        """From a step to the end, while what the batches tell of bad rows goes into the quarantine."""
        run = self.arguments.run
        watch = self.quarantine.watches[self.name]
        device = PartialState().device
        path = self.quarantine.path

        # rows that were found bad at the opening, said once
        if watch.opened and self.quarantine.is_main:
            count = len(watch.opened)
            warnings.warn(
                f"{count} of {watch.total} rows cannot be used and will be replaced; see {path}", stacklevel=4
            )
        earlier = sum_over_processes(watch.before if self.quarantine.is_main else (0, 0), device)

        # each batch, less the list of rows that it replaced
        step = start_step
        told = False
        loader = self._loader(start_step, total_steps)
        for batch in patiently(loader, self.rows.name) if loader.num_workers else loader:
            if isinstance(batch, Waiting):
                yield batch
                continue
            failed = batch.pop("quarantine", [])
            if failed and not told:
                warnings.warn(f"a row cannot be used: {failed[0]['reason']}; see {path}", stacklevel=4)
                told = True
            self.quarantine.add(self.name, step, [self._line(**row) for row in failed])
            # several processes agree only now and then: the question makes an accelerator wait
            if world_size() == 1 or (step + 1) % run.log_every == 0 or step + 1 == total_steps:
                failures, stand_ins = map(sum, zip(earlier, sum_over_processes(watch.new, device), strict=True))
                self.quarantine.check(self.name, failures, (step + 1) * run.batch_size + stand_ins)
            yield batch
            step += 1

    def _line(self, row: int, **what: Any) -> dict[str, Any]:
        place = (self.rows.name, row) if isinstance(self.rows, PairStream) else self.rows.where(row)
        return line_of(*place, **what)

    def _loader(self, start_step: int, total_steps: int) -> DataLoader:
        # this process's share of each batch, from `start_step` on
        run = self.arguments.run
        place = {"rank": rank(), "world_size": world_size(), "seed": run.seed, "start_step": start_step}
        if isinstance(self.rows, PairStream):
            dataset = PairTrainingStream(self.rows, run.batch_size, total_steps, **place)
            options = {"batch_size": None}
        else:
            sampler = PairBatchSampler(
                len(self.rows), run.batch_size, total_steps=total_steps, **self.mixture, **place
            )
            dataset = PairTrainingSet(self.rows, StandIns(self.rows, sampler.order, total_steps))
            options = {"batch_sampler": sampler}
        return DataLoader(
            dataset,
            collate_fn=self.collator,
            num_workers=self.arguments.data.num_workers,
            worker_init_fn=outlive_signals_to_the_group,
            pin_memory=torch.cuda.is_available(),
            # its own, or opening a loader would draw from the generator that a resumed run has just restored
            generator=torch.Generator().manual_seed(run.seed),
            **options,
        )


def _groups(rows: PairRows, data: DataArguments) -> np.ndarray | None:
    """What a batch may hold one row of only, (n,): an id, or an image whose captions are apart."""
    if data.one_row_per_id:
        return rows.ids()
    if not data.captions_apart or data.image_repeats:
        return None
    # captions may be apart in the table already; ids are then of pictures, unless a column says what they are of
    return rows.images() if rows.has_ids else rows.ids()


class Awaited:
    """The items of `batches`, while it is counted for how many seconds whoever reads them waited for the next."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        asked = time.perf_counter()
        for batch in self.batches:
            self.seconds += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def take(self) -> float:
        """The seconds since the last call."""
        seconds = self.seconds
        self.seconds = 0.0
        return seconds


def _check_stream(arguments: Arguments) -> None:
    run = arguments.run
    if run.max_steps is None:
        raise ValueError("a stream has no length, so the run needs max_steps, got none")
    if run.schedule == "albef":
        raise ValueError("schedule albef falls with each epoch, and a stream has none; expected cosine")
    # a warm-up in epochs is a share of the run for a stream
    if run.warmup_steps is None and run.warmup_epochs >= 1:
        raise ValueError(
            f"warmup_epochs is {run.warmup_epochs}, which would warm up to the end of {run.max_steps} steps; "
            f"for a stream, warmup_epochs is a share of max_steps below 1"
        )
