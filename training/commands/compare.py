"""`oner compare`: compares the retrieval of several models on the same rows in one table.

Any model with `get_text_features` and `get_image_features` works: ours, and transformers' CLIP, SigLIP and others.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, PreTrainedModel

from oner.training.evaluation.beside import SHEETS, Named
from oner.training.evaluation.results import checkpoint_facts, library_versions, model_facts
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.evaluation.suite import model_name
from oner.training.publishing.model_card import markdown_table
from oner.training.publishing.model_loading import load_model
from oner.training.publishing.public import plain
from oner.training.publishing.shipped import find_model

from .evaluate import read

KS = (1, 5, 10)
DIRECTIONS = {"tr": "picture → text", "ir": "text → picture"}
GUESSING = "guessing"


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the table, and writes it with its numbers."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluators = build(options)
    options.models = list(map(find_model, options.models))
    results = [result for source in options.models for result in measure(source, evaluators, options.device)]
    found = "\n\n".join(table(split, results) for split in evaluators)
    print(f"\n{found}")
    for path in write(Path(options.output), found, results, evaluators, options):
        print(path)
    for path in draw(options, evaluators):
        print(path)
    return 0


def build(a: argparse.Namespace) -> dict[str, RetrievalEvaluator]:
    """A retrieval evaluator per source, by name. Raises `ValueError` if two sources have the same name."""
    evaluators: dict[str, RetrievalEvaluator] = {}
    for source in a.data:
        split = Path(source).stem
        if split in evaluators:
            raise ValueError(f"two sources would share the name {split!r} in the table; rename one")
        rows = read(source, a, a.limit)
        evaluators[split] = RetrievalEvaluator(rows, a.batch_size, KS, split, a.captions, progress=False)
    return evaluators


def load(source: str, device: str) -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode and its processor."""
    model = load_model(AutoModelForZeroShotImageClassification, source).to(device).eval()
    return model, AutoProcessor.from_pretrained(source)


def measure(source: str, evaluators: dict[str, RetrievalEvaluator], device: str) -> Iterator[dict[str, Any]]:
    """Evaluates one model on each split; the seconds are the time to decode and embed everything."""
    model, processor = load(source, device)
    for split, evaluator in evaluators.items():
        started = time.perf_counter()
        images, captions = (side.cpu() for side in evaluator.embed(model, processor))  # (n, P), (m, P)
        seconds = time.perf_counter() - started
        values = {name.removeprefix(f"{split}/"): value for name, value in evaluator.numbers(images, captions)}
        print(f"{model_name(source)} on {split}: {seconds:.1f} s", flush=True)
        yield {
            "model": source,
            "split": split,
            "seconds": seconds,
            "values": values,
            "checkpoint": checkpoint_facts(source),
            **model_facts(model),
        }


def draw(a: argparse.Namespace, evaluators: dict[str, RetrievalEvaluator]) -> Iterator[Path]:
    """Draws the requested sheets for each split, with all models side by side: compare_SPLIT_KIND.png."""
    if not a.sheets:
        return
    models = [Named(name, *load(source, a.device)) for name, source in zip(names_of(a.models), a.models, strict=True)]
    for split, evaluator in evaluators.items():
        for kind in a.sheets:
            path = Path(a.output) / f"compare_{split}_{kind}.png"
            SHEETS[kind](models, evaluator.rows).savefig(path)
            yield path


def table(split: str, results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one row per model with recall in per cent, and one for guessing."""
    own = [result for result in results if result["split"] == split]
    columns = [(direction, k) for direction in DIRECTIONS for k in KS]
    names = names_of([result["model"] for result in own])
    lines = [
        [
            name,
            result["class"],
            *(f"{100 * result['values'][f'{direction}_r@{k}']:.1f}" for direction, k in columns),
            f"{result['seconds']:.1f}",
            f"{result['parameters'] / 1e6:.1f}",
        ]
        for name, result in zip(names, own, strict=True)
    ]
    chance = [f"{100 * own[0]['values'][f'{direction}_chance@{k}']:.1f}" for direction, k in columns]
    heads = [f"{DIRECTIONS[direction]} R@{k}" for direction, k in columns]
    heads = [split, "class", *heads, "seconds", "M parameters"]
    return markdown_table(heads, [*lines, [GUESSING, "", *chance, "", ""]])


def names_of(sources: Sequence[str]) -> list[str]:
    """Names of the models in the table: that of the directory, or the whole path if two have the same name."""
    short = [model_name(source) for source in sources]
    return [source if short.count(name) > 1 else name for source, name in zip(sources, short, strict=True)]


def write(
    folder: Path,
    found: str,
    results: Sequence[dict[str, Any]],
    evaluators: dict[str, RetrievalEvaluator],
    a: argparse.Namespace,
) -> tuple[Path, Path]:
    """Writes compare.md, the tables, and compare.json, the numbers with everything needed to reproduce them."""
    folder.mkdir(parents=True, exist_ok=True)
    protocols = {split: evaluator.protocol for split, evaluator in evaluators.items()}
    told = {name: value for name, value in vars(a).items() if value is not None}
    machine = {"device": a.device, "threads": torch.get_num_threads()}
    content = {
        "arguments": told, "protocols": protocols, "machine": machine, "versions": library_versions(),
        "results": list(results),
    }  # fmt: skip
    sizes = ", ".join(f"{name}: {one['pictures']} pictures, {one['texts']} texts" for name, one in protocols.items())
    note = f"{sizes}. Recall in per cent; seconds to embed all of it, on {a.device}, {machine['threads']} thread(s)."
    markdown = folder / "compare.md"
    markdown.write_text(f"# Models compared\n{note}\n\n{found}\n", encoding="utf-8")
    numbers = folder / "compare.json"
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    numbers.write_text(text + "\n", encoding="utf-8")
    return markdown, numbers
