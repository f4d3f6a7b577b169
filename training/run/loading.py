"""
Opens the training rows of a run and yields its batches from any step on; each portion has its own rows and order.
"""

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
    Opens the training rows of a portion and checks their columns; bad rows are handed to the quarantine.

    Raises:
        PairDataError: the data cannot be read as rows of the portion's kind; names the file and the problem.
    """
    # only the columns of this kind of rows
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
    Opens the rows of each portion of a run and checks their columns; bad rows are handed to the quarantine.

    Raises:
        PairDataError: the data cannot be read as rows; names the file and the problem.
        BadRowsError: too many rows are bad. quarantine.jsonl in the output directory lists them.
    """
    # bad rows are listed before anything is built
    rows = {name: open_training_rows(options.data) for name, options in arguments.portions().items()}
    quarantine_of(arguments, rows).check_opening()
    return rows


def quarantine_of(arguments: Arguments, rows: Mapping[str, Rows]) -> Quarantine:
    """The quarantine of a run over these portions, with the bad rows known so far."""
    portions = arguments.portions()
    watches = {name: _watch(one, portions[name].data.max_bad_rows) for name, one in rows.items()}
    return Quarantine(arguments.run.output_dir, watches, is_main=rank() == 0)


def _watch(rows: Rows, max_bad_rows: float) -> Watch:
    if isinstance(rows, PairStream):
        return Watch(max_bad_rows)

    # bad rows are listed with their file and position
    opened = [(*rows.where(row), reason) for row, reason in sorted(rows.bad.items())]
    if isinstance(rows, CaptionsApart):
        # a bad row is one pair beside all those of a good one, so its share is of the rows, not of the pairs
        return Watch(max_bad_rows, opened, len(rows.rows), unit="pairs")
    return Watch(max_bad_rows, opened, len(rows))


class RunLoader:
    """
    `loader(start_step)` yields this process's batches by portion from that step to the end of the run, and a `Waiting`
    from time to time while its data workers give none. The batches do not depend on whether the run was stopped,
    except for streamed data: see `resume_note`.

    A row that cannot be used is replaced and listed in `quarantine.jsonl` in the output directory.

    Args:
        arguments (`Arguments`): The run's.
        rows, collators: For each portion in the arguments.

    Attributes:
        quarantine (`Quarantine`): The list of bad rows.
        epoch_steps, total_steps (`int`): Length of an epoch, defined by one portion, and of the run; with streamed
            data, an epoch is the whole run.
        resume_note (`str`, *optional*): Why resuming is not exact, if it is not.

    Raises:
        ValueError: the portions differ from those in the arguments; see also [`PortionLoader`].
        BadRowsError: more rows are bad than `max_bad_rows` allows, now or while batches are read.
    """

    def __init__(self, arguments: Arguments, rows: Mapping[str, Rows], collators: Mapping[str, Collator]):
        portions = arguments.portions()
        if not portions.keys() == rows.keys() == collators.keys():
            raise ValueError(
                f"got rows of {sorted(rows)} and collators of {sorted(collators)}; expected {sorted(portions)}"
            )

        # bad rows known before the first step count too
        self.quarantine = quarantine_of(arguments, rows)
        self.quarantine.check_opening()
        self.portions = {
            name: PortionLoader(name, options, rows[name], collators[name], self.quarantine)
            for name, options in portions.items()
        }

        # one portion defines the epoch and the length of the run
        epoch = self.portions[arguments.run.epoch_portion or next(iter(portions))]
        self.epoch_steps = epoch.epoch_steps
        self.total_steps = arguments.run.max_steps or round(arguments.run.epochs * self.epoch_steps)
        if self.total_steps < 1:
            raise ValueError(
                f"epochs is {arguments.run.epochs}, less than one step (an epoch has {self.epoch_steps}); expected "
                "more, or max_steps"
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

    def trial(self) -> dict[str, Batch]:
        """
        This process's batches of the first step, to try a step with. Their bad rows are neither counted nor listed, so
        `quarantine.jsonl` of a run that is about to resume stays as it is.
        """
        return {name: portion.trial(self.total_steps) for name, portion in self.portions.items()}


class PortionLoader:
    """
    The batches of one portion.

    Args:
        name (`str`): Name of the portion.
        arguments (`Arguments`): The portion's own: data, batch size, repeat and seed.
        rows, collator: Its rows, and the collator for their batches.
        quarantine (`Quarantine`): The run's.

    Attributes:
        epoch_steps (`int`): Steps to read its rows `repeat` times; for streamed data all steps of the run.
    """

    def __init__(self, name: str, arguments: Arguments, rows: Rows, collator: Collator, quarantine: Quarantine):
        self.name = name
        self.arguments = arguments
        self.rows = rows
        self.collator = collator
        self.quarantine = quarantine
        data = arguments.data
        run = arguments.run

        # streamed data have no length: the epoch is the run
        if isinstance(rows, PairStream):
            _check_stream(arguments)
            self.epoch_steps = run.max_steps
            return

        # the order of rows: weights of a mixture, and rows that must not be in the same batch
        self.mixture = {"groups": _groups(rows, data), "together": data.rows_together}
        if data.data_weights is not None:
            self.mixture |= {"sizes": rows.sizes, "weights": data.data_weights}
        order = PairOrder(len(rows), run.batch_size, **self.mixture)
        self.epoch_steps = run.repeat * order.steps_per_epoch

    def batches(self, start_step: int, total_steps: int) -> Iterator[Batch | Waiting]:
        """Yields the batches from a step to the end, and records their bad rows in the quarantine."""
        run = self.arguments.run
        watch = self.quarantine.watches[self.name]
        device = PartialState().device
        path = self.quarantine.path

        # warn once of rows that were bad at the opening
        if watch.opened and self.quarantine.is_main:
            count = len(watch.opened)
            warnings.warn(
                f"{count} of {watch.total} rows cannot be used and will be replaced; see {path}", stacklevel=4
            )
        earlier = sum_over_processes(watch.before if self.quarantine.is_main else (0, 0), device)

        # each batch, without its list of replaced rows
        step = start_step
        told = False
        for batch in self._read(start_step, total_steps):
            if isinstance(batch, Waiting):
                yield batch
                continue
            failed = batch.pop("quarantine", [])
            if failed and not told:
                warnings.warn(f"a row cannot be used: {failed[0]['reason']}; see {path}", stacklevel=4)
                told = True
            self.quarantine.add(self.name, step, [self._line(**row) for row in failed])
            # several processes check only at log lines, since it synchronises accelerators
            if world_size() == 1 or (step + 1) % run.log_every == 0 or step + 1 == total_steps:
                failures, stand_ins = map(sum, zip(earlier, sum_over_processes(watch.new, device), strict=True))
                self.quarantine.check(self.name, failures, (step + 1) * run.batch_size + stand_ins)
            yield batch
            step += 1

    def trial(self, total_steps: int) -> Batch:
        """The first batch; the quarantine hears nothing of its bad rows."""
        batch = next(one for one in self._read(0, total_steps) if not isinstance(one, Waiting))
        batch.pop("quarantine", None)
        return batch

    def _read(self, start_step: int, total_steps: int) -> Iterator[Batch | Waiting]:
        """The batches from a step to the end, with their lists of replaced rows."""
        loader = self._loader(start_step, total_steps)
        return patiently(loader, self.rows.name) if loader.num_workers else iter(loader)

    def _line(self, row: int, **what: Any) -> dict[str, Any]:
        place = (self.rows.name, row) if isinstance(self.rows, PairStream) else self.rows.where(row)
        return line_of(*place, **what)

    def _loader(self, start_step: int, total_steps: int) -> DataLoader:
        # this process's part of each batch, from `start_step` on
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
            # its own generator: otherwise a loader would use the global one that a resumed run has just restored
            generator=torch.Generator().manual_seed(run.seed),
            **options,
        )


def _groups(rows: PairRows, data: DataArguments) -> np.ndarray | None:
    """Group of each row, (n,), of which a batch may contain only one: its id, or its image with captions_apart."""
    if data.one_row_per_id:
        return rows.ids()
    if not data.captions_apart or data.image_repeats:
        return None
    # captions may be apart in the table already; ids are then of pictures, unless a column says what they are of
    return rows.images() if rows.has_ids else rows.ids()


class Awaited:
    """Yields the items of `batches` and counts the seconds spent waiting for them."""

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
        raise ValueError("streamed data have no length, so the run needs max_steps, got none")
    if run.schedule == "albef":
        raise ValueError("schedule albef depends on epochs, which streamed data do not have; expected cosine")
    # for streamed data, warmup_epochs is a share of the run
    if run.warmup_steps is None and run.warmup_epochs >= 1:
        raise ValueError(
            f"warmup_epochs is {run.warmup_epochs}, so that the warm-up would last all {run.max_steps} steps; "
            f"for streamed data, warmup_epochs is a share of max_steps below 1"
        )
