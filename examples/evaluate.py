"""Evaluate a model directory: a table on the screen, numbers in results/, pictures in pictures/.

    python examples/evaluate.py --model runs/demo/model --data examples/data/emoji/test_style.parquet \
        --id_column hexcode --gallery examples/data/emoji/train.parquet

A task is one entry of `TASKS`: it makes an evaluator, whose `run(model, processor)` yields names, each with a number
or a picture to be saved. `multimodal` and `composed` need other pictures of the same concept, in --data or --gallery.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

import oner  # noqa: F401  registers the models with transformers' auto classes
from oner.processing.vl_dataset import open_pairs
from oner.training.evaluation_attention import AttentionEvaluator
from oner.training.evaluation_composed import ComposedEvaluator
from oner.training.evaluation_gap import GapEvaluator
from oner.training.evaluation_localization import LocalizationEvaluator
from oner.training.evaluation_results import read_results, write_results
from oner.training.evaluation_retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation_zero_shot import ZeroShotClassificationEvaluator
from oner.training.hub import write_pictures
from oner.training.model_card import add_evaluation

zero_shot = ZeroShotClassificationEvaluator.from_rows
TASKS: dict[str, Callable[[argparse.Namespace, str, Sequence, Sequence | None], Any]] = {
    "retrieval": lambda a, name, rows, _: RetrievalEvaluator(rows, a.batch_size, a.ks, name, a.captions),
    "zero_shot": lambda a, name, rows, _: zero_shot(rows, templates=a.templates, batch_size=a.batch_size, name=name),
    "bootstrap": lambda a, name, rows, _: zero_shot(
        rows, templates=a.templates, batch_size=a.batch_size, name=name, bootstrap=True
    ),
    "multimodal": lambda a, name, rows, gallery: MultimodalRetrievalEvaluator(rows, gallery, a.batch_size, a.ks, name),
    "composed": lambda a, name, rows, gallery: ComposedEvaluator(rows, gallery),
    "gap": lambda a, name, rows, _: GapEvaluator(rows),
    "localization": lambda a, name, rows, _: LocalizationEvaluator(rows),
    "attention": lambda a, name, rows, _: AttentionEvaluator(rows),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, or a name on the Hub")
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each is a split of its own")
    parser.add_argument("--gallery", help="a source with other pictures of the same concepts")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all that the data allow")
    parser.add_argument("--output", help="default: the model directory")
    parser.add_argument("--image_column")
    parser.add_argument("--text_column")
    parser.add_argument("--id_column", help="rows with equal ids are positives of each other (hexcode for the emoji)")
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--templates", default="slip", help="name of a template set, or a JSON file with a list")
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--limit", type=int, help="use only so many rows of each split, evenly spaced")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def read(source: str, a: argparse.Namespace, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a source; of more than `limit`, evenly spaced ones."""
    pairs = open_pairs(source, a.image_column, a.text_column, a.id_column)
    count = len(pairs) if limit is None else min(limit, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def evaluate_split(
    a: argparse.Namespace, split: str, rows: Sequence, gallery: Sequence | None, model: Any, processor: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Run the tasks on one split and write their files: the numbers, and the paths of the pictures by caption."""
    output = Path(a.output or a.model)
    repeated = len({row["id"] for row in rows}) < len(rows)
    values: dict[str, float] = {}
    drawn: dict[str, str] = {}
    for task in a.tasks or [task for task in TASKS if task != "zero_shot"]:  # bootstrap yields its numbers too
        if not a.tasks and task in ("multimodal", "composed") and gallery is None and not repeated:
            print(f"{split}: no {task}, as no concept has two pictures; name others with --gallery and --id_column")
            continue
        evaluator = TASKS[task](a, split, rows, gallery)
        numbers, pictures = {}, {}
        for name, value in evaluator.run(model, processor):
            name = name if name.startswith(f"{split}/") else f"{split}/{name}"
            (numbers if isinstance(value, int | float) else pictures)[name] = value
        facts = {"task": task, "split": split, "rows": len(rows), "limit": a.limit, "gallery_source": a.gallery}
        protocol = {**facts, **getattr(evaluator, "protocol", {})}
        checkpoint = a.model if Path(a.model).is_dir() else None
        if numbers:
            write_results(output / "results" / f"{split}.{task}.json", numbers, protocol, model, checkpoint)
        drawn |= write_pictures(pictures, output)
        values |= numbers
    for path in drawn.values():
        print(f"picture: {output / path}")
    return values, drawn


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    a = parse(arguments)
    model = AutoModelForZeroShotImageClassification.from_pretrained(a.model).to(a.device).eval()
    processor = AutoProcessor.from_pretrained(a.model)
    gallery = read(a.gallery, a) if a.gallery else None
    values: dict[str, float] = {}
    pictures: dict[str, str] = {}
    for source in a.data:
        numbers, drawn = evaluate_split(a, Path(source).stem, read(source, a, a.limit), gallery, model, processor)
        values |= numbers
        pictures |= drawn
    output = Path(a.output or a.model)
    if output == Path(a.model) and (output / "README.md").is_file():
        add_evaluation(output, read_results(output), pictures)
    width = max(map(len, values), default=0)
    print("\n".join(f"{name:<{width}}  {value:10.4f}" for name, value in values.items()))
    return values


if __name__ == "__main__":
    main()
