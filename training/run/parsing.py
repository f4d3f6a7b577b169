"""Parses a run's arguments from a flat YAML file and the command line, which takes precedence."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, HfArgumentParser

from oner.processing.data.places import regular
from oner.training.objectives.objective import OBJECTIVES, objective_classes
from oner.training.publishing.model_loading import check_place
from oner.training.publishing.shipped import find_model, shipped_config

from .argument_checks import check
from .arguments import DATA, Arguments, ModelArguments, RunArguments, data_arguments, flat, hints_of
from .values import fit, read_json

# what a file says of its data, by either name, which is not said of others
OF_THE_PAIRS = ("data_licence", "attribution")
DATA_NAMES = ("train_data", "portions")


def read_config(path: str | Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    A flat YAML file, or one that ships under this name; `base: other.yaml` (relative to it, or one that ships) is read
    first and overridden. What a base says of its data's makers and terms is not said of other data. Raises
    `ValueError`.
    """
    path = Path(path) if os.path.lexists(path) else shipped_config(str(path)) or Path(path)
    if path.resolve() in below:
        raise ValueError(f"{path}: is its own base, by way of {', '.join(map(str, below))}")

    # this file's own values
    try:
        values = yaml.safe_load(regular(path).read_text(encoding="utf-8")) or {}
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deep to be read; expected a mapping of argument names") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of argument names, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values

    # override the base's values; model_config is merged field by field
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {base!r:.80}; expected another file's path")
    beside = path.parent / base
    merged = read_config(beside if beside.exists() else shipped_config(base) or beside, (*below, path.resolve()))
    if isinstance(merged.get("model_config"), dict) and isinstance(values.get("model_config"), dict):
        values["model_config"] = {**merged["model_config"], **values["model_config"]}
    if any(name in values for name in DATA_NAMES):
        merged = {name: value for name, value in merged.items() if name not in OF_THE_PAIRS}
    return {**merged, **values}


class ListParser(HfArgumentParser):
    """Accepts a list option without values, such as `--eval_data`, as an empty list."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        if options.get("nargs") == "+":
            options["nargs"] = "*"
        return super().add_argument(*names, **options)


def parse_arguments(argv: Sequence[str] | None = None, objective: type | None = None, **defaults: Any) -> Arguments:
    """
    Parses `--config FILE.yaml`, and `--name value` for everything to override.

    Args:
        objective: Dataclass to fill instead of the family's, for example a task's. All its fields have defaults, and
            their names differ from those of the other three.
        defaults: Values of arguments given neither in the file nor on the command line.

    Raises:
        ValueError: there are unknown arguments or values out of range.
        SystemExit: argparse reports an error, or `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    # a first pass, for the arguments that determine the dataclasses
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--family")
    first.add_argument("--initial_model", "--initial-model")
    known, rest = first.parse_known_args(argv)

    # the family determines the dataclass of the objective
    values = read_config(known.config) if known.config else {}
    family = known.family or values.get("family") or defaults.get("family")
    if objective is None:
        family = family or family_of(known.initial_model or values.get("initial_model"))
        objective = objective_classes(family)[1]
    kinds = [ModelArguments, *DATA, RunArguments, objective]
    parser = ListParser(kinds, allow_abbrev=False)
    hints = hints_of(*kinds)

    # with other data than its own, the file's licence and attribution do not apply
    named = {word[2:].split("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    if named.intersection(DATA_NAMES):
        values = {name: value for name, value in values.items() if name not in OF_THE_PAIRS}

    # the file's values become defaults, below the command line's
    if foreign := sorted(set(values) - set(hints)):
        close = difflib.get_close_matches(foreign[0], hints, 1)
        meant = f"did you mean {close[0]}?" if close else "`--help-all` lists those there are"
        raise ValueError(f"{known.config}: unknown arguments {foreign}; {meant}")
    values = {name: fit(name, value, hints[name], known.config) for name, value in values.items()}
    initial = {} if known.initial_model is None else {"initial_model": known.initial_model}
    parser.set_defaults(**{**defaults, **values, **initial, "family": family})

    # fill the dataclasses, and parse JSON given on the command line
    model, *data, run, own = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    values = {name: value for part in data for name, value in flat(part).items()}
    if not values["data_weights"]:
        values["data_weights"] = None
    arguments = Arguments(model, data_arguments(values), run, own)
    for part in (arguments.model, arguments.run, arguments.objective):
        for name in ("model_config", "portions", "loss_weights"):
            if isinstance(getattr(part, name, None), str):
                setattr(part, name, read_json(name, getattr(part, name)))
    if arguments.model.initial_model is not None:
        arguments.model.initial_model = find_model(arguments.model.initial_model)
    check(arguments)
    return arguments


def family_of(initial_model: str | None) -> str:
    """The family of a model: a directory, a shipped one, or one on the Hub. Raises `ValueError` if none is named."""
    if initial_model is None:
        raise ValueError(f"which family? expected --family, or `family` in the file, out of {', '.join(OBJECTIVES)}")
    check_place(find_model(initial_model))
    return AutoConfig.from_pretrained(find_model(initial_model)).model_type
