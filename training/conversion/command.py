"""`oner convert`: converts official checkpoints to model directories and back."""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from oner.processing.data.augmentation import NORMALIZATIONS
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import tokenizer_from_vocab
from oner.training.publishing.placing import scratch_beside, set_modes
from oner.training.publishing.public import plain

from .checkpoints import Conversion, from_official, to_official
from .dalle import convert_dalle
from .families import OFFICIAL
from .reading import read_weights
from .report import ConversionReport

OBJECTIVE, REPORT = "objective.safetensors", "conversion.json"
# origin -> family: ALBEF is CODIS without its codebook
FAMILY_OF = {"albef": "codis", "simla": "simla"}


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner convert`: converts and prints the report. If it raises `ValueError` or `OSError`, nothing was written."""
    if rest:
        raise ValueError(f"unknown arguments {list(rest)}; `oner convert --help` lists those there are")
    report = _write_official(options) if options.target else SOURCES[options.origin](options)
    print(report.describe())
    print(f"written: {options.destination}")
    return 0


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    fields = {}
    for given in options.fields:
        name, found, value = given.partition("=")
        if not found:
            raise ValueError(f"--set got {given!r}; expected NAME=VALUE")

        # parsed as JSON if possible, else taken as text
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    if options.heads is not None:
        fields["num_attention_heads"] = options.heads
    return fields


def _from_official(options: argparse.Namespace) -> ConversionReport:
    fields, tokenizer = _fields(options), None

    # the special ids come from the vocabulary, since no shape determines them
    if options.tokenizer is not None:
        tokenizer = tokenizer_from_vocab(options.tokenizer)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "mask", "image")}
        ids["sep_token_id"] = tokenizer.get_vocab().get("[SEP]")
        fields = {**ids, **fields}
    state = read_weights(options.source)
    done = from_official(
        state,
        options.family or FAMILY_OF[options.origin],
        image_size=options.image_size,
        draw_missing=options.draw_missing,
        fold_token_types=options.fold_token_types,
        **fields,
    )

    # a vocabulary of another size belongs to another model
    if tokenizer is not None and len(tokenizer) != done.config.vocab_size:
        raise ValueError(
            f"{options.tokenizer} has {len(tokenizer)} tokens; expected {done.config.vocab_size}, one for each row of "
            "the checkpoint's word embeddings"
        )
    _into_place(Path(options.destination), lambda scratch: _save(done, options.seed, tokenizer, scratch))
    return done.report


def _save(done: Conversion, seed: int, tokenizer: Any, directory: Path) -> None:
    # a model that the file fills completely is not initialised first: that would take longer than everything else
    begins = any(name.partition(".")[0] not in done.absent_heads for name in done.report.missing)
    torch.manual_seed(seed)
    with torch.device("cpu" if begins else "meta"):
        model = done.model_class(done.config)
    model.load_state_dict(done.weights, strict=False, assign=not begins)
    # heads that the file lacks are not saved, so that loading the model warns that they are random
    absent = tuple(f"{module}." for module in done.absent_heads)
    model.save_pretrained(directory, state_dict=_without(model, absent))
    if done.objective:
        # cloned, because safetensors refuses tensors that share memory
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in done.objective.items()}, directory / OBJECTIVE
        )
    _write_report(done.report, directory)

    # the processor, so that the directory accepts raw images and texts
    if tokenizer is not None:
        size = {"height": done.config.image_size, "width": done.config.image_size}
        mean, std = (list(values) for values in NORMALIZATIONS["clip"])
        pictures = VisionLanguageImageProcessor(
            size=size, patch_size=done.config.patch_size, image_mean=mean, image_std=std
        )
        joint = done.config.pair_layout == "joint"
        options = {"max_text_length": done.config.max_text_length, "joint_layout": joint}
        VisionLanguageProcessor(pictures, tokenizer, **options).save_pretrained(directory)


def _without(model: PreTrainedModel, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(modules or ("\0",))}


def _from_dalle(options: argparse.Namespace) -> ConversionReport:
    model, report = convert_dalle(options.source, options.decoder)

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)
        _write_report(report, scratch)

    _into_place(Path(options.destination), write)
    return report


def _write_report(report: ConversionReport, directory: Path) -> None:
    (directory / REPORT).write_text(json.dumps(plain(dataclasses.asdict(report)), indent=1) + "\n", encoding="utf-8")


def _into_place(destination: Path, write: Callable[[Path], None]) -> None:
    """
    Writes to a directory beside `destination` and renames it. Raises `FileExistsError` if there are files already.
    """
    # existing files are not overwritten
    destination = destination.absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} already exists; expected a new or empty directory")
    with scratch_beside(destination) as scratch:
        write(scratch)
        set_modes(scratch)
        os.replace(scratch, destination)  # replaces only an empty directory


def _model_weights(directory: Path, family: str) -> dict[str, torch.Tensor]:
    """The file's weights in fp32, not a loaded model's, whose missing heads would be random."""
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a model's configuration: {error}") from error
    if found != family:
        raise ValueError(f"{directory} holds a model of the family {found!r}; expected {family!r}")
    weights = {name: tensor.float() for name, tensor in read_weights(directory / "model.safetensors").items()}
    prefix = OFFICIAL[family].prefix
    if not any(name.startswith(f"{prefix}.") for name in weights):  # of a bare tower
        weights = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
    return weights


def _write_official(options: argparse.Namespace) -> ConversionReport:
    destination = Path(options.destination).absolute()
    if destination.exists():
        raise FileExistsError(f"{destination} already exists; expected a new file")
    family = FAMILY_OF[options.target]
    weights = _model_weights(Path(options.source), family)

    # teacher and queues, from --objective or from the model directory
    path = Path(options.objective) if options.objective else Path(options.source) / OBJECTIVE
    objective = None
    if options.objective or path.is_file():
        objective = read_weights(path)
    state, report = to_official(weights, family, objective)

    # written to a directory beside it first, so that an existing file is always complete
    with scratch_beside(destination) as scratch:
        written = scratch / destination.name
        torch.save({"model": {name: tensor.detach().clone() for name, tensor in state.items()}}, written)
        _check_written(written, state)
        os.replace(written, destination)
    return report


def _check_written(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Reads the file back. Raises `OSError` with the names of tensors that differ."""
    found = read_weights(path)
    lost = [name for name, tensor in state.items() if name not in found or not torch.equal(found[name], tensor)]
    if lost or len(found) != len(state):
        raise OSError(
            f"{path}: reading it back gave other tensors than were written: {lost[:10]}, {len(found)} tensors; "
            f"expected {len(state)}"
        )


# origin -> its converter
SOURCES: dict[str, Callable[[argparse.Namespace], ConversionReport]] = {
    "simla": _from_official,
    "albef": _from_official,
    "dalle": _from_dalle,
}
