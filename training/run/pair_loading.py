"""Batches of a run, from any step on."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from oner.processing.data.quarantine import StandIns, line_of
from oner.processing.data.rows import PairRows, PairStream
from oner.processing.data.sampling import PairBatchSampler, PairOrder
from oner.processing.data.training_sets import PairTrainingSet, PairTrainingStream
from oner.processing.processing_vl import OneRProcessor
from oner.training.parallel.distributed import rank, sum_over_processes, world_size

from .arguments import Arguments
from .collators import Collator, pair_collator
from .data_workers import outlive_signals_to_the_group
from .opening import quarantine_of


class PairLoader:
    """
    `loader(start_step)` yields this process's batches from that step to the end of the run, the same whether the run
    was ever stopped. A stream is the exception, and says so: `resume_note`.

    A row that cannot be used is replaced and listed in `quarantine.jsonl` in the output directory. `collator` is that
    of rows other than pairs, with which a task is fine-tuned.

    Attributes:
        quarantine (`Quarantine`): That list.
        epoch_steps, total_steps (`int`): Length of an epoch and of the run; a stream's epoch is the whole run.
        resume_note (`str`, *optional*): Why resuming cannot be exact, if it cannot.

    Raises:
        ValueError: a stream without max_steps, or with a warm-up that would last as long as the run.
        BadRowsError: more rows are bad than `max_bad_rows` allows, here or while the batches are read.
    """

    def __init__(
        self,
        arguments: Arguments,
        pairs: PairRows | PairStream,
        processor: OneRProcessor,
        config: PreTrainedConfig,
        collator: Collator | None = None,
    ):
        data, run = arguments.data, arguments.run
        self.arguments, self.pairs = arguments, pairs
        self.quarantine = quarantine_of(pairs, run.output_dir, data.max_bad_rows)
        self.quarantine.check_opening()
        groups = pairs.ids() if data.one_row_per_id and isinstance(pairs, PairRows) else None
        if isinstance(pairs, PairStream):
            if run.max_steps is None:
                raise ValueError("a stream has no length, so the run needs max_steps, got none")
            if run.schedule == "albef":
                raise ValueError("schedule albef falls with each epoch, and a stream has none; expected cosine")
            if run.warmup_steps is None and run.warmup_epochs >= 1:
                raise ValueError(
                    f"warmup_epochs is {run.warmup_epochs}, which would warm up to the end of {run.max_steps} steps; "
                    f"for a stream, warmup_epochs is a share of max_steps below 1"
                )
            self.total_steps, self.epoch_steps = run.max_steps, run.max_steps
            self.resume_note = pairs.resume_note
        else:
            self.mixture = {"groups": groups}
            if data.data_weights is not None:
                self.mixture |= {"sizes": pairs.sizes, "weights": data.data_weights}
            self.epoch_steps = PairOrder(len(pairs), run.batch_size, **self.mixture).steps_per_epoch
            self.total_steps = run.max_steps or round(run.epochs * self.epoch_steps)
            self.resume_note = None
        self.collator = pair_collator(arguments, processor, config) if collator is None else collator

    def __call__(self, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        return self._watched(self._loader_from(start_step), start_step)

    def _watched(self, batches: Iterable[dict[str, Any]], start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, while what they tell of bad rows goes into the quarantine."""
        run, quarantine, device = self.arguments.run, self.quarantine, PartialState().device
        quarantine.begin(start_step)
        if quarantine.opened and quarantine.is_main:
            count, total, path = len(quarantine.opened), quarantine.total, quarantine.path
            warnings.warn(f"{count} of {total} rows cannot be used and will be replaced; see {path}", stacklevel=3)
        earlier = sum_over_processes(quarantine.before if quarantine.is_main else (0, 0), device)
        for step, batch in enumerate(batches, start_step):
            failed = batch.pop("quarantine", [])
            if failed and quarantine.new == (0, 0):
                warnings.warn(f"a row cannot be used: {failed[0]['reason']}; see {quarantine.path}", stacklevel=3)
            quarantine.add(step, [self._line(**row) for row in failed])
            # several processes agree only now and then: the question makes an accelerator wait
            if world_size() == 1 or (step + 1) % run.log_every == 0 or step + 1 == self.total_steps:
                failures, stand_ins = map(sum, zip(earlier, sum_over_processes(quarantine.new, device), strict=True))
                quarantine.check(failures, (step + 1) * run.batch_size + stand_ins)
            yield batch

    def _line(self, row: int, **what: Any) -> dict[str, Any]:
        place = (self.pairs.name, row) if isinstance(self.pairs, PairStream) else self.pairs.where(row)
        return line_of(*place, **what)

    def _loader_from(self, start_step: int) -> DataLoader:
        run = self.arguments.run
        place = {"rank": rank(), "world_size": world_size(), "seed": run.seed, "start_step": start_step}
        if isinstance(self.pairs, PairStream):
            stream = PairTrainingStream(self.pairs, run.batch_size, self.total_steps, **place)
            return self._loader(stream, batch_size=None)
        sampler = PairBatchSampler(
            len(self.pairs), run.batch_size, total_steps=self.total_steps, **self.mixture, **place
        )
        stand_ins = StandIns(self.pairs, sampler.order, self.total_steps)
        return self._loader(PairTrainingSet(self.pairs, stand_ins), batch_sampler=sampler)

    def _loader(self, dataset, **options) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=self.collator,
            num_workers=self.arguments.data.num_workers,
            worker_init_fn=outlive_signals_to_the_group,
            pin_memory=torch.cuda.is_available(),
            # its own, or opening a loader would draw from the generator that a resumed run has just restored
            generator=torch.Generator().manual_seed(self.arguments.run.seed),
            **options,
        )
