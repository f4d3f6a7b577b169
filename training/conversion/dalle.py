"""Converts DALL-E's public tokenizer, `encoder.pkl` and `decoder.pkl`, to a `DiscreteVAE`.

Each file is a pickled module of the package `dall_e`. It is read with torch's weights-only unpickler, which replaces
every class named in the file by an empty stand-in that only stores its attributes. The package is not needed, and no
code from the file runs.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from oner.modeling.configuration_dvae import DiscreteVAEConfig
from oner.modeling.modeling_dvae import GROUPS, DiscreteVAE

from .reading import CheckpointFileError
from .report import ConversionReport, MissingWeightsError

# the classes that the two files name, each replaced by a stand-in
NAMES = (
    *(f"dall_e.{part}.{part.title()}{suffix}" for part in ("encoder", "decoder") for suffix in ("", "Block")),
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
# DALL-E's name -> ours, both without the leading "encoder." or "decoder."
RENAMED = (
    (re.compile(r"blocks\.input"), "input"),
    (re.compile(r"blocks\.output\.conv"), "output"),
    (re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.id_path"), "groups.{}.{}.skip"),
    (re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.res_path\.conv_(\d+)"), "groups.{}.{}.convs.{}"),
)
LEAVES = {"w": "weight", "b": "bias"}
SHOWN = 5


class StandIn:
    """Replaces a pickled module: it has the module's attributes and none of its code."""

    def __init__(self, *args: object, **kwargs: object):
        pass


def convert_dalle(
    encoder_file: str | os.PathLike, decoder_file: str | os.PathLike | None = None
) -> tuple[DiscreteVAE, ConversionReport]:
    """
    Loads the tokenizer in fp32, in evaluation mode, with the sizes of the tensors.

    Args:
        encoder_file: `encoder.pkl` (cdn.openai.com/dall-e), or its state dict as `.pth` or `.safetensors`.
        decoder_file: `decoder.pkl`, likewise. Without it the model encodes images but cannot decode codes.

    Raises:
        CheckpointFileError: a file is missing, cannot be read, holds something else, or is the wrong one of the two.
        MissingWeightsError: weights are missing or have inconsistent shapes; names them.
    """
    files = {"encoder": Path(encoder_file)} | ({"decoder": Path(decoder_file)} if decoder_file is not None else {})
    state = {}
    report = ConversionReport()
    fields = {"decoder": "decoder" in files}

    # rename the weights and read the sizes, file by file
    for part, path in files.items():
        weights = read_dalle(path)
        _check_part(path, part, weights)
        for name, tensor in weights.items():
            if here := _renamed(name):
                report.used[f"{part}.{name}"] = f"{part}.{here}"
                state[f"{part}.{here}"] = tensor.float()
            else:
                report.left_over[f"{part}.{name}"] = "no weight of DALL-E's layout has this name"
        fields |= _sizes(path, part, weights)

    # the shapes that a model of these sizes expects, without allocating memory
    config = DiscreteVAEConfig(**fields)
    with torch.device("meta"):
        model = DiscreteVAE(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    shapes = {
        name: f"{tuple(tensor.shape)}, expected {wanted.get(name, 'none: the layout ends before it')}"
        for name, tensor in state.items()
        if wanted.get(name) != tuple(tensor.shape)
    }
    if missing or shapes:
        raise MissingWeightsError(
            f"{', '.join(map(str, files.values()))}: missing {missing[:SHOWN]}, of other shapes "
            f"{dict(list(shapes.items())[:SHOWN])} ({len(missing)} and {len(shapes)} in all)"
        )
    model.load_state_dict(state, assign=True)
    if "decoder" not in files:
        report.notes.append("No decoder was given: the model can encode images into codes, but not decode codes.")
    return model.eval(), report


def read_dalle(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of one file by name, on the CPU: from a pickled module, a state dict (at the top or under
    "state_dict"), or `.safetensors`.

    Raises:
        CheckpointFileError: the file does not exist, cannot be read, or names other classes than DALL-E's modules.
    """
    # safetensors files contain no code
    path = Path(source)
    if not path.is_file():
        raise CheckpointFileError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointFileError(f"{path}: cannot be read as safetensors: {error}") from error

    # the weights-only unpickler, with stand-ins for the classes that it would refuse
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in NAMES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle's error, OSError, EOFError, RuntimeError and more, depending on the bytes
        raise CheckpointFileError(
            f"{path}: is not DALL-E's encoder or decoder, or cannot be read: {_reason(error)}"
        ) from error

    # a module, a state dict, or a nested state dict
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    weights = dict(_tensors(content)) if isinstance(content, StandIn) else content
    if not isinstance(weights, Mapping) or not weights or not all(map(torch.is_tensor, weights.values())):
        raise CheckpointFileError(f"{path}: expected DALL-E's encoder or decoder, or its tensors by name")
    return {str(name): tensor.detach() for name, tensor in weights.items()}


def _reason(error: Exception) -> str:
    """The cause in torch's message, without its advice to trust the file."""
    told = str(error)
    if named := re.search(r"Unsupported global: GLOBAL (\S+)", told):
        return f"it names {named[1]}, which is not a part of them"
    if "Only persistent_load of storage" in told:
        return (
            "a whole module in torch's format before 1.6, which torch cannot read without its code; load it where "
            "`dall_e` is installed and save its state_dict()"
        )
    # pickle's own error, which this package does not import
    if type(error).__name__ == "UnpicklingError" or not told.strip():
        return "its bytes are not a torch checkpoint"
    return told.strip().splitlines()[0].partition(". ")[0]


def _tensors(module: object, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """What `named_parameters` and `named_buffers` of the replaced module would give."""
    held = vars(module)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (held.get(kind) or {}).items():
            if tensor is not None:
                yield f"{prefix}{name}", tensor
    for name, child in (held.get("_modules") or {}).items():
        if isinstance(child, StandIn):
            yield from _tensors(child, f"{prefix}{name}.")


def _renamed(name: str) -> str | None:
    # DALL-E's numbers start at 1, ours at 0
    stem, _, leaf = name.rpartition(".")
    for pattern, here in RENAMED:
        if leaf in LEAVES and (match := pattern.fullmatch(stem)):
            return f"{here.format(*(int(number) - 1 for number in match.groups()))}.{LEAVES[leaf]}"
    return None


def _check_part(path: Path, part: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises unless the weights are of `part`: an encoder starts with 7 x 7 kernels, a decoder with 1 x 1."""
    for name in ("blocks.input.w", "blocks.output.conv.w", "blocks.group_1.block_1.res_path.conv_1.w"):
        if name not in weights or weights[name].ndim != 4:
            raise CheckpointFileError(
                f"{path}: has no kernel {name}, expected in DALL-E's {part}; found {sorted(weights)[:SHOWN]}"
            )
    found = "decoder" if weights["blocks.input.w"].shape[-1] == 1 else "encoder"
    if found != part:
        raise CheckpointFileError(f"{path}: is a {found}; expected the {part}")


def _sizes(path: Path, part: str, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The configuration fields that the tensors of a part determine."""
    # the highest numbers in the names give the counts
    places = [re.match(r"blocks\.group_(\d+)\.block_(\d+)\.", name) for name in weights]
    groups, blocks = (max(int(place[number]) for place in places if place) for number in (1, 2))
    if groups != GROUPS:
        raise CheckpointFileError(f"{path}: has {groups} groups of blocks; expected DALL-E's {GROUPS}")

    # kernels are (out, in, side, side)
    first, last = weights["blocks.input.w"].shape, weights["blocks.output.conv.w"].shape
    if part == "decoder":
        return {"codebook_dim": first[0]}
    return {"hidden_size": first[0], "num_channels": first[1], "num_codes": last[0], "blocks_per_group": blocks}


__all__ = ["StandIn", "convert_dalle", "read_dalle"]
