"""`oner suite MODEL...`: runs the downstream suite, which is the same for all families, and prints one table."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from oner.training.publishing.model_loading import load_model
from oner.training.publishing.public import plain
from oner.training.publishing.shipped import find_model

from .features import Pool
from .image_sets import SETS
from .linear_probe import LinearRecipe
from .results import results_directory, write_results
from .retrieval import RetrievalEvaluator
from .suite_tasks import QUICK, SUITE, SuiteOptions, image_probe, pairs_retrieval, text_probe

GROUPS = {"quick": QUICK, "table3": tuple(SETS)}
PROBES = ("logistic_accuracy", "logistic_mean_recall", "knn_accuracy", "linear_accuracy", "chance")
RETRIEVALS = ("tr_r@1", "tr_r@5", "ir_r@1", "ir_r@5", "r_mean")
HEADINGS = {
    "logistic_accuracy": "logistic regression",
    "logistic_mean_recall": "mean per class",
    "knn_accuracy": "kNN",
    "linear_accuracy": "MAE's probe",
    "r_mean": "mean of the four",
    "tr_r@1": "TR@1", "tr_r@5": "TR@5", "ir_r@1": "IR@1", "ir_r@5": "IR@5",
}  # fmt: skip
# model -> task -> values
Results = dict[str, dict[str, dict[str, float]]]


def run(a: argparse.Namespace, rest: Sequence[str]) -> int:
    """
    The tasks on each model; results/suite.md and results/suite.TASK.json in its directory, or in --output, which then
    has one table of all. Returns 0.

    Raises:
        ValueError: an unknown task, data that are not there, a damaged model.
    """
    named, a.models = a.models, list(map(find_model, a.models))
    check_choices(a)
    evaluators = dict(build(a, options_of(a)))
    found: Results = {}
    for told, source in zip(named, a.models, strict=True):
        name = model_name(source)
        directory = results_directory(told, source) if a.output is None else Path(a.output, name)
        found[name] = measure(source, directory, evaluators, a.device)
        write_table(directory, {name: found[name]}, a)
    if a.output is not None:
        write_table(Path(a.output), found, a)
    print(table(found))
    return 0


def check_choices(a: argparse.Namespace) -> None:
    """Raises `ValueError` for choices that no parser of the standard library checks here."""
    if a.pool not in get_args(Pool):
        raise ValueError(f"--pool is {a.pool!r}; expected one of {', '.join(get_args(Pool))}")
    if len({model_name(source) for source in a.models}) < len(a.models):
        raise ValueError(f"two models would share a name in the table: {', '.join(map(model_name, a.models))}")
    own = own_names(a)
    if twice := sorted({name for name in own if own.count(name) > 1 or name in task_names(a)}):
        raise ValueError(f"several sets would share the name {', '.join(twice)}, and the results of one would be lost")


def options_of(a: argparse.Namespace) -> SuiteOptions:
    recipe = LinearRecipe(epochs=a.linear_epochs, batch_size=a.linear_batch_size) if a.linear else None
    return SuiteOptions(a.data, a.root, a.download, tuple(a.seeds), a.limit, a.pool, recipe, a.batch_size)


def own_names(a: argparse.Namespace) -> list[str]:
    """What the user's own data are called."""
    return [name for name, *_ in (*(a.images or ()), *(a.texts or ()), *(a.pairs or ()))]


def task_names(a: argparse.Namespace) -> list[str]:
    """The tasks asked for, with those of each group in its place, each once."""
    asked = a.tasks or ([] if own_names(a) else ["quick"])
    return list(dict.fromkeys(one for group in asked for one in GROUPS.get(group, (group,))))


def build(a: argparse.Namespace, options: SuiteOptions) -> Iterator[tuple[str, Any]]:
    """The evaluators asked for, by name: those of the table and of its groups, then those of the user's own data."""
    for name in task_names(a):
        if name not in SUITE:
            raise ValueError(f"unknown task {name!r}; expected one of {', '.join([*GROUPS, *SUITE])}")
        yield name, SUITE[name](name, options)
    for name, *told in a.images or ():
        yield name, image_probe(name, *told, options)
    for name, *told in a.texts or ():
        yield name, text_probe(name, *told, options)
    for name, source in a.pairs or ():
        yield name, pairs_retrieval(name, source, options)


def model_name(source: str) -> str:
    """What a table calls a model: its directory's name; of `RUN/model`, as a run leaves it, the run's."""
    parts = [part for part in str(source).split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


def measure(
    source: str, directory: Path, evaluators: Mapping[str, Any], device: str | None
) -> dict[str, dict[str, float]]:
    """Every task's values of one model, each written to `directory`/results as it comes."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(source)
    # a tower that never learned a contrast has features all the same
    tower = load_model(AutoModel, source, draws_heads=True).to(device).eval()
    retrieves = any(isinstance(evaluator, RetrievalEvaluator) for evaluator in evaluators.values())
    whole = load_model(AutoModelForZeroShotImageClassification, source).to(device).eval() if retrieves else None

    found = {}
    for name, evaluator in evaluators.items():
        model = whole if isinstance(evaluator, RetrievalEvaluator) else tower
        values = {key.removeprefix(f"{name}/"): value for key, value in evaluator.run(model, processor)}
        protocol = {**evaluator.protocol, "split": name}
        write_results(directory / "results" / f"suite.{name}.json", values, protocol, model, source)
        found[name] = values
        print(f"{model_name(source)} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    return found


def table(found: Results) -> str:
    """Markdown: a line for each task and model, in per cent, probes and retrieval apart; ± is over seeds."""
    probes = [(task, model) for model in found for task in found[model] if "chance" in found[model][task]]
    retrievals = [(task, model) for model in found for task in found[model] if "r_mean" in found[model][task]]
    parts = []
    for places, columns in ((probes, PROBES), (retrievals, RETRIEVALS)):
        if places:
            present = [name for name in columns if any(name in found[model][task] for task, model in places)]
            lines = [_line(found[model][task], task, model, present) for task, model in sorted(places)]
            heads = ["task", "model", *(HEADINGS.get(name, name) for name in present)]
            parts.append("\n".join([_cells(heads), "|---" * len(heads) + "|", *lines]))
    return "\n\n".join(parts)


def _line(values: Mapping[str, float], task: str, model: str, columns: Sequence[str]) -> str:
    told = []
    for name in columns:
        deviation = f" ± {100 * values[f'{name}_sd']:.1f}" if f"{name}_sd" in values else ""
        told.append(f"{100 * values[name]:.1f}{deviation}" if name in values else "")
    return _cells([task, model, *told])


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_table(directory: Path, found: Results, a: argparse.Namespace) -> None:
    """results/suite.md and results/suite_table.json: the table, how it was made, and the numbers behind it."""
    folder = directory / "results"
    folder.mkdir(parents=True, exist_ok=True)
    how = plain({name: value for name, value in vars(a).items() if value not in (None, False)})
    told = ", ".join(f"{name} {value}" for name, value in sorted(how.items()))
    text = f"# Downstream suite\nPer cent; ± over seeds. `oner suite` with {told}.\n\n{table(found)}\n"
    (folder / "suite.md").write_text(text, encoding="utf-8")
    content = json.dumps({"arguments": how, "models": found}, indent=1) + "\n"
    (folder / "suite_table.json").write_text(content, encoding="utf-8")
