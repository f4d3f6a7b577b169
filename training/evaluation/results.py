"""Writes results to files, each number with everything needed to reproduce it.

`<directory>/results/<name>.json` holds
    values      name -> number
    protocol    task, split, counts, templates: whatever the evaluator's `protocol` states, and the caller adds
    checkpoint  directory and the SHA-256 of every weights file in it, or name and commit on the Hub
    model       class, parameters, resolution, patch size
    versions    of python and the libraries that take part
    date        UTC
"""

import datetime
import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from oner.training.publishing.digests import sha256_of
from oner.training.publishing.public import plain

LIBRARIES = ("oner", "torch", "torchvision", "transformers", "tokenizers", "datasets", "evaluate", "timm", "pillow")


def checkpoint_facts(directory: str | Path) -> dict[str, Any]:
    """The path of the weights and the digest of each file; for a name on the Hub, the loaded commit.

    Raises:
        FileNotFoundError: the directory holds no `*.safetensors`, or there is neither a directory nor a commit.
    """
    # a name on the Hub
    if not Path(directory).is_dir():
        # the cache folder of the loaded files is named after the commit
        config = try_to_load_from_cache(str(directory), "config.json")
        if not isinstance(config, str):
            raise FileNotFoundError(f"{directory} is no directory, and nothing of that name was loaded from the Hub")
        return {"name": str(directory), "commit": Path(config).parent.name}

    # a directory
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no *.safetensors: a result must say which weights it is of")
    return {"path": str(directory), "sha256": {file.name: sha256_of(file) for file in files}}


def model_facts(model: Any) -> dict[str, Any]:
    """Class, number of parameters, and the image size used for the numbers."""
    config = model.config
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "image_size": getattr(config, "image_size", None),
        "patch_size": getattr(config, "patch_size", None),
    }


def library_versions() -> dict[str, str]:
    """Versions of python and of the installed libraries among `LIBRARIES`."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def results_directory(told: str, source: str) -> Path:
    """
    The default directory of results: the model directory, or runs/NAME for a shipped model or one on the Hub, whose
    directories are not written to.
    """
    return Path(source) if Path(told).exists() else Path("runs") / told


def write_results(
    path: str | Path,
    values: Mapping[str, float],
    protocol: Mapping[str, Any],
    model: Any = None,
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Writes one file of results and returns its content.

    Args:
        path: the JSON file; folders above it are made.
        values: name -> finite number.
        protocol: what was done; must name the "split".
        model: adds its `model_facts`.
        checkpoint: the model's directory or Hub name, adds its `checkpoint_facts`.

    Raises:
        ValueError: no values, a value that is not finite, or a protocol without "split".
    """
    # refuse numbers without a split, and those that JSON cannot represent
    if "split" not in protocol:
        raise ValueError(f'the protocol must name the "split", got {sorted(protocol)}')
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong or not values:
        raise ValueError(f"values must be finite numbers, got {wrong or 'none'}")

    # values, protocol, model, versions, date
    content: dict[str, Any] = {"values": dict(values), "protocol": dict(protocol)}
    if checkpoint is not None:
        content["checkpoint"] = checkpoint_facts(checkpoint)
    if model is not None:
        content["model"] = model_facts(model)
    content["versions"] = library_versions()
    content["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = plain(content)  # no path of this machine and no secret
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return content


def read_results(directory: str | Path) -> dict[str, dict[str, Any]]:
    """
    name -> content of every `results/<name>.json` of a model directory that `write_results` wrote, of the weights that
    are there, if any: an export over an earlier one leaves what was measured of that where it is.
    """
    # other files may lie there, such as the training's configuration
    files = sorted((Path(directory) / "results").glob("*.json"))
    contents = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    contents = {name: content for name, content in contents.items() if {"values", "protocol"} <= content.keys()}
    weights = {file.name: sha256_of(file) for file in Path(directory).glob("*.safetensors")}
    return {
        name: content
        for name, content in contents.items()
        if not weights or content.get("checkpoint", {}).get("sha256", weights) == weights
    }
