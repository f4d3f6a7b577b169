"""What a run says of itself: a line before the first step, a model directory after the last, an exit status."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from oner.training.publishing.hub import export_model

from .arguments import Arguments
from .launch import choose_precision, engine_of
from .loading import RunLoader

# exit status of a run that a signal stopped: EX_TEMPFAIL of sysexits.h, "try again later"
STOPPED = 75


def describe(arguments: Arguments, model: PreTrainedModel, loader: RunLoader, accelerator: Accelerator) -> str:
    """What is about to happen, in a line or two."""
    # what, from where, how long, on what
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start = arguments.model
    origin = f"-{start.size}" if start.initial_model is None else f" from {start.initial_model}"
    line = (
        f"{model.config.model_type}{origin}, {millions:.1f} M parameters, "
        f"{loader.total_steps} steps of {_rows(arguments)} on {accelerator.num_processes} x "
        f"{accelerator.device.type} by {engine_of(accelerator)}, "
        f"precision {choose_precision(arguments.run.mixed_precision)}"
    )
    return line if loader.resume_note is None else f"{line}\n{loader.resume_note}"


def _rows(arguments: Arguments) -> str:
    return " and ".join(f"{options.run.batch_size} {name}" for name, options in arguments.portions().items())


def export(
    arguments: Arguments,
    model: PreTrainedModel,
    processor: Any,
    metrics: dict[str, float],
    evaluators: list,
) -> Path:
    """The model directory, with its card, from the student's weights; evaluators tell their `name` and `protocol`."""
    # under what the numbers were measured, for the card
    protocol = {
        "seed": arguments.run.seed,
        "weights": "student",
        "resolution": model.config.image_size,
        **{evaluator.name: evaluator.protocol for evaluator in evaluators},
    }
    directory = export_model(
        model,
        processor,
        Path(arguments.run.output_dir) / "model",
        metrics=metrics,
        protocol=protocol,
        training_config=arguments.to_dict(),
        data=_training_sets(arguments),
        dtype=getattr(torch, arguments.run.export_dtype),
    )
    if arguments.data.attribution is not None:
        shutil.copy(arguments.data.attribution, directory)
    return directory


def _training_sets(arguments: Arguments) -> list[dict[str, str]]:
    """The card's table of data."""
    sets = []
    for portion in arguments.portions().values():
        data = portion.data
        terms = {"licence": data.data_licence, "attribution": data.attribution and Path(data.attribution).name}
        sets += [{"name": name, **{key: value for key, value in terms.items() if value}} for name in data.train_data]
    return sets
