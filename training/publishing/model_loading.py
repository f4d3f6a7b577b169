"""Loads models strictly: either all weights are read, or an error names the file and the keys.

transformers initialises missing weights at random and only warns. Here that is an error, except for whole heads that
an earlier training stage did not have; a warning names these.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .digests import sha256_of
from .origins import may_be_on_the_hub
from .shipped import meant

logger = logging.get_logger(__name__)

DIGESTS = "digests.json"
# the files that define a model; the card, the results and the pictures may change
READ = ("*.safetensors", "*.json")
SHOWN = 10
EXPECTED = "expected a directory with config.json and model.safetensors, as a run leaves it, or a name on the Hub"


class ModelDirectoryError(RuntimeError):
    """A model directory that is damaged or belongs to another model; the message names the file, or the keys."""


def write_digests(directory: str | Path) -> Path:
    """Writes digests.json with the SHA-256 of each file that defines the model."""
    path = Path(directory) / DIGESTS
    digests = {file.name: sha256_of(file) for file in _files(path.parent) if file.name != DIGESTS}
    path.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    return path


def check_directory(directory: str | Path) -> None:
    """
    Reads the JSON files and the headers of the weights, and compares all files with digests.json if it exists.

    Raises:
        ModelDirectoryError: names the first file that is missing, unreadable or changed.
    """
    # all files must be readable; a header gives the length of its file, so truncation is detected
    directory = Path(directory)
    for file in _files(directory):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                with safe_open(file, framework="pt") as weights:
                    weights.keys()
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelDirectoryError(f"{file}: cannot be read: {error}") from error

    # if the export wrote digests, all bytes must be the same
    if not (directory / DIGESTS).is_file():
        return
    digests = json.loads((directory / DIGESTS).read_text(encoding="utf-8"))
    if not isinstance(digests, dict) or "config.json" not in digests:
        raise ModelDirectoryError(f"{directory / DIGESTS}: expected digests by name of file, got {digests!r:.80}")
    for name, digest in digests.items():
        if not (directory / name).is_file():
            raise ModelDirectoryError(f"{directory / name}: missing")
        if sha256_of(directory / name) != digest:
            raise ModelDirectoryError(
                f"{directory / name}: was changed since the export; if you changed it on purpose, remove {DIGESTS} "
                "beside it"
            )


def check_place(source: str | Path) -> None:
    """
    Looks for config.json, which every model has, in a directory or on the Hub.

    Raises:
        ModelDirectoryError: there is none, no such directory, or no such name.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ModelDirectoryError(f"{source}: there is no config.json in it; {EXPECTED}")
        return
    # a name without an owner that is nearly that of a shipped model is a slip
    slip = "/" not in str(source) and meant(source, neighbours=False)
    if isinstance(source, Path) or slip or not may_be_on_the_hub(source):
        raise ModelDirectoryError(f"{source}: no such directory; {EXPECTED}{meant(source)}")
    try:
        cached_file(source, "config.json")
    except OSError as error:
        lost = ", which cannot be reached" if "couldn't connect" in str(error) else ""
        raise ModelDirectoryError(
            f"{source}: no such directory, and nothing of that name came from the Hub{lost}; {EXPECTED}{meant(source)}"
        ) from error


def load_model(auto: type, source: str | Path, draws_heads: bool = False, **options: Any) -> PreTrainedModel:
    """
    `auto.from_pretrained(source, **options)`, which must find all weights of the model and only sound ones.

    Args:
        auto: An auto class such as `AutoModel`.
        source: A directory, which is checked first, or a name on the Hub.
        draws_heads (`bool`): Initialise heads at random of which the source has no weight, and name them in a warning.
            A second stage that starts from a published tower needs this.

    Raises:
        ModelDirectoryError: the directory does not exist or a file is damaged; keys are missing, unexpected or of
            another shape; weights contain NaN or infinity, or are all zero.
    """
    # damage is found before transformers opens anything
    check_place(source)
    if Path(source).is_dir():
        check_directory(source)

    # different shapes do not raise at the first one, so that all are reported below
    try:
        model, report = auto.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (SafetensorError, RuntimeError) as error:
        raise ModelDirectoryError(f"{source}: {error}") from error

    # every weight must be present with its shape; only whole heads may be random
    if mismatched := report["mismatched_keys"]:
        shapes = {name: f"{tuple(got)}, expected {tuple(wanted)}" for name, got, wanted in sorted(mismatched)[:SHOWN]}
        raise ModelDirectoryError(f"{source}: wrong shapes {shapes}")
    missing = set(report["missing_keys"])
    if draws_heads:
        drawn = _whole_heads(model, missing)
        if drawn:
            logger.warning(f"{source} has no weights for {sorted(drawn)}: drawn at random")
        missing = {name for name in missing if name.partition(".")[0] not in drawn}

    # weights of heads that this class does not have are fine
    foreign = set(report["unexpected_keys"]) - _known_keys(model.config, report["unexpected_keys"])
    if missing or foreign:
        raise ModelDirectoryError(
            f"{source}: missing keys {sorted(missing)[:SHOWN]}, unexpected keys {sorted(foreign)[:SHOWN]}"
        )
    if damage := damage_of(model.state_dict()):
        raise ModelDirectoryError(f"{source}: {damage}")
    return model


def damage_of(weights: Mapping[str, torch.Tensor]) -> str:
    """
    Names the weights that contain NaN or infinity, or only zeros, as after a bad cast or a diverged run; "" if there
    are none. A bias or a token may be all zeros, a weight or a table may not. Quantised weights are not checked.
    """
    damaged = {}
    for name, value in weights.items():
        if type(value) is not torch.Tensor or not value.is_floating_point() or value.is_meta or not value.numel():
            continue

        # both are NaN if any value is
        low, high = (end.item() for end in value.aminmax())
        table = name.endswith("weight") or (value.ndim > 1 and value.shape[-2] > 1)
        if math.isnan(low):
            damaged[name] = "NaN"
        elif math.isinf(low) or math.isinf(high):
            damaged[name] = "infinity"
        elif table and low == high == 0:
            damaged[name] = "only zeros"
    if not damaged:
        return ""
    return f"{len(damaged)} damaged weights {dict(list(damaged.items())[:SHOWN])}; expected finite ones, not all 0"


def _files(directory: Path) -> list[Path]:
    return sorted(file for pattern in READ for file in directory.glob(pattern))


def _whole_heads(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Names of the heads of which every weight is missing; weights tied to the tower do not count."""
    state = model.state_dict()
    prefix = model.base_model_prefix
    # tied weights share the tower's memory
    towers = {value.data_ptr() for name, value in state.items() if name.partition(".")[0] == prefix}
    own: dict[str, set[str]] = {}
    for name, value in state.items():
        if value.data_ptr() not in towers:
            own.setdefault(name.partition(".")[0], set()).add(name)
    return {head for head, names in own.items() if head != prefix and names <= missing}


def _known_keys(config: PreTrainedConfig, keys: Iterable[str]) -> set[str]:
    """The keys of the family's pretraining model, with and without the tower's prefix; empty if `keys` is empty."""
    if not keys:
        return set()
    with torch.device("meta"):
        full = AutoModelForPreTraining.from_config(copy.deepcopy(config))
    prefix = f"{full.base_model_prefix}."
    names = set(full.state_dict())
    return names | {name.removeprefix(prefix) for name in names}
