"""Checks the arguments of a run: ranges of values, and combinations that exclude each other."""

import dataclasses
import os
from typing import Any

from oner.processing.data.bounds import check_bounds
from oner.processing.data.same_pictures import ROW

from .arguments import Arguments, DataArguments, ModelArguments, RunArguments


def check(arguments: Arguments) -> None:
    """Raises `ValueError` for values out of range (`BOUNDS`), empty strings, and conflicting values."""
    for part in (arguments.model, arguments.run, arguments.objective):
        _check_values(part)
    _check_model(arguments.model)
    for portion in arguments.portions().values():
        _check_values(portion.data)
        # a portion's seed is derived, and exceeds the range for a given one
        _check_values(dataclasses.replace(portion.run, seed=arguments.run.seed))
        _check_data(portion.data)
        _check_batches(portion.run)
    arguments.epoch_of()
    _check_run(arguments.run)
    if not any(portion.data.num_workers for portion in arguments.portions().values()):
        _check_without_workers(arguments.run)


def _check_values(part: Any) -> None:
    check_bounds(part)
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ValueError(f"{one.name} is {value!r}; expected a non-empty string, or leave it out")


def _check_model(model: ModelArguments) -> None:
    # a vocabulary comes from one place
    options = ("tokenizer", "lower_case", "strip_accents", "limit_alphabet")
    given = [name for name in options if getattr(model, name) is not None]
    if model.initial_model is not None and given:
        raise ValueError(
            f"{', '.join(given)} cannot be combined with initial_model, whose tokenizer is kept; drop one"
        )


def _check_data(data: DataArguments) -> None:
    # the sources and their weights
    if not data.train_data:
        raise ValueError("train_data is empty; expected files, a folder, or the name of a data set")
    if data.data_weights is not None and len(data.data_weights) != len(data.train_data):
        raise ValueError(
            f"data_weights is {data.data_weights}; expected one for each of the {len(data.train_data)} in train_data"
        )

    # options that exclude each other
    if data.one_row_per_id and (data.id_column == ROW or (data.id_column is None and data.kind != "pairs")):
        raise ValueError(
            f"one_row_per_id needs ids: id_column, or pairs whose pictures are the ids; got {data.id_column}"
        )
    if data.captions_apart and (data.streaming or data.kind != "pairs"):
        raise ValueError(
            f"captions_apart needs rows of pairs by number, got kind {data.kind}{' as a stream' * data.streaming}"
        )
    if data.one_row_per_id and data.streaming:
        raise ValueError("one_row_per_id needs all ids at the start, which a stream cannot give; drop one of the two")
    apart = ("streaming", "captions_apart", "one_row_per_id", "data_weights")
    if data.rows_together > 1 and (others := [name for name in apart if getattr(data, name)]):
        raise ValueError(f"rows_together is {data.rows_together}, which cannot be combined with {', '.join(others)}")


def _check_batches(run: RunArguments) -> None:
    if run.gradient_cache_chunks > run.batch_size:
        raise ValueError(
            f"gradient_cache_chunks is {run.gradient_cache_chunks}; expected 1 to the batch_size of {run.batch_size}"
        )


def _check_run(run: RunArguments) -> None:
    if os.path.exists(run.output_dir) and not os.path.isdir(run.output_dir):
        raise ValueError(f"output_dir is {run.output_dir!r}, which is not a directory")
    if run.schedule == "albef" and run.warmup_steps is None and run.warmup_epochs:
        raise ValueError(
            f"warmup_epochs is {run.warmup_epochs}, but schedule albef warms up for warmup_steps (2000 if none); "
            "expected warmup_steps, or warmup_epochs 0"
        )
    if run.schedule == "albef" and (run.warmup_steps or 0) % 100:
        raise ValueError(f"warmup_steps is {run.warmup_steps}; expected a multiple of 100 with schedule albef")


def _check_without_workers(run: RunArguments) -> None:
    # the default is not what anybody asked for
    if run.data_timeout not in (None, RunArguments.data_timeout):
        raise ValueError(
            f"data_timeout is {run.data_timeout}, but a run without data workers reads batches itself and cannot stop "
            "waiting for them; expected num_workers of 1 or more, or no data_timeout"
        )
