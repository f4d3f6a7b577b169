"""Describes a run before its first step, exports its model after the last, and defines the exit status.

`prepare_publication` checks before the first step as much of the export as possible.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from oner.training.parallel.distributed import rank
from oner.training.publishing.hub import check_stored_dtype, export_model
from oner.training.publishing.origins import Origins, check_repo_id, read_origins
from oner.training.publishing.placing import check_replaceable, clear_leftovers

from .adapters import trained, without_adapters
from .arguments import Arguments
from .launch import choose_precision, engine_of
from .loading import RunLoader

# exit status of a run that a signal stopped: EX_TEMPFAIL of sysexits.h, "try again later"
STOPPED = 75


def describe(arguments: Arguments, model: PreTrainedModel, loader: RunLoader, accelerator: Accelerator) -> str:
    """Describes the run in one or two lines."""
    # model, origin, length, device
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start = arguments.model
    origin = f"-{start.size}" if start.initial_model is None else f" from {start.initial_model}"
    learn = "" if start.lora is None else f" of which {trained(model) / 1e6:.2f} M are trained"
    line = (
        f"{model.config.model_type}{origin}, {millions:.1f} M parameters{learn}, "
        f"{loader.total_steps} steps of {_rows(arguments)} on {accelerator.num_processes} x "
        f"{accelerator.device.type} by {engine_of(accelerator)}, "
        f"precision {choose_precision(arguments.run.mixed_precision)}"
    )
    return line if loader.resume_note is None else f"{line}\n{loader.resume_note}"


def _rows(arguments: Arguments) -> str:
    return " and ".join(f"{options.run.batch_size} {name}" for name, options in arguments.portions().items())


@dataclasses.dataclass(frozen=True)
class Publication:
    """
    Settings of the exported model directory, determined before the first step.

    Attributes:
        directory: Its path.
        dtype: dtype of its weights.
        origins: Data, attributions, and the models that the run starts from.
    """

    directory: Path
    dtype: torch.dtype
    origins: Origins


def prepare_publication(arguments: Arguments) -> Publication:
    """
    Checks what would otherwise fail after the last step, and removes leftovers of a killed export.

    Raises:
        ValueError: the dtype, name or attribution file cannot be published; two evaluation sets have the same name.
        FileExistsError: the place of the model contains something other than an exported model.
    """
    run, begin = arguments.run, arguments.model
    dtype = getattr(torch, run.export_dtype, run.export_dtype)
    check_stored_dtype(dtype)
    check_repo_id(run.repo_id)

    # results of sets with the same name would overwrite each other
    names = [Path(source).stem for source in run.eval_data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"eval_data has several sets called {twice}; expected different names, which identify them on cards"
        )

    # the place
    directory = (Path(run.output_dir) / "model").resolve()
    check_replaceable(directory)
    if rank() == 0:
        clear_leftovers(directory)
    starts = [begin.initial_model, begin.initial_vision, begin.initial_text]
    attributions = [one.data.attribution for one in arguments.portions().values()]
    origins = read_origins(
        [source for source in starts if source is not None],
        _training_sets(arguments),
        dict.fromkeys(file for file in attributions if file is not None),
    )
    return Publication(directory, dtype, origins)


def export(
    publication: Publication,
    arguments: Arguments,
    model: PreTrainedModel,
    processor: Any,
    metrics: dict[str, float],
    evaluators: list,
    compares: bool = True,
) -> Path:
    """
    The model directory, with its card, from the student's weights; evaluators tell their `name` and `protocol`, and
    where no loss `compares` embeddings the card says what that means.
    """
    # under what the numbers were measured, for the card
    protocol = {
        "seed": arguments.run.seed,
        "weights": "student",
        "resolution": model.config.image_size,
        **{evaluator.name: evaluator.protocol for evaluator in evaluators},
    }
    if not compares:
        losses = ", ".join(arguments.objective.losses)
        protocol["pictures and texts"] = (
            f"no loss of this run ({losses}) compared their embeddings: unless the model that it began with had "
            "learned to, search and matching answer by chance"
        )
    return export_model(
        without_adapters(model),
        processor,
        publication.directory,
        metrics=metrics,
        protocol=protocol,
        training_config=arguments.to_dict(),
        origins=publication.origins,
        license=arguments.run.licence,
        languages=arguments.run.language,
        dtype=publication.dtype,
        repo_id=arguments.run.repo_id,
    )


def _training_sets(arguments: Arguments) -> list[dict[str, str]]:
    """The card's table of data."""
    sets = []
    for portion in arguments.portions().values():
        data = portion.data
        terms = {"licence": data.data_licence, "attribution": data.attribution and Path(data.attribution).name}
        sets += [{"name": name, **{key: value for key, value in terms.items() if value}} for name in data.train_data]
    return sets
