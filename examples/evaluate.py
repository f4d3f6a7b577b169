"""Evaluate a model directory: a table on the screen, numbers in results/, pictures in pictures/.

    python examples/evaluate.py --model runs/demo/model --data examples/data/emoji/test_style.parquet \
        --id_column hexcode --gallery examples/data/emoji/train.parquet

A task is one entry of `TASKS`: it makes an evaluator, whose `run(model, processor)` yields names, each with a number
or a picture to be saved. `multimodal` and `composed` need other pictures of the same concept, in --data or --gallery.

Pictures with class numbers instead of captions, for instance a folder with one folder a class:

    python examples/evaluate.py --model runs/demo/model --data imagenet/val --class_names imagenet
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
from oner.training.evaluation_embedding import Gallery, spaced
from oner.training.evaluation_gap import GapEvaluator
from oner.training.evaluation_labels import open_labelled
from oner.training.evaluation_localization import LocalizationEvaluator
from oner.training.evaluation_results import read_results, write_results
from oner.training.evaluation_retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation_zero_shot import ZeroShotClassificationEvaluator
from oner.training.hub import write_pictures
from oner.training.model_card import add_evaluation
from oner.training.model_loading import load_model
from oner.training.prompts import load_class_names


def zero_shot(a: argparse.Namespace, name: str, rows: Sequence, bootstrap: bool) -> ZeroShotClassificationEvaluator:
    """With --class_names a row's id is the number of its class; without, every concept is a class."""
    how = {"templates": a.templates, "batch_size": a.batch_size, "name": name, "bootstrap": bootstrap}
    how |= {"bootstrap_rows": a.bootstrap_rows, "shown": 8}
    if a.class_names is None:
        return ZeroShotClassificationEvaluator.from_rows(rows, **how)
    labels = [row["id"] for row in rows]
    return ZeroShotClassificationEvaluator(rows, labels, load_class_names(a.class_names), **how)


TASKS: dict[str, Callable[[argparse.Namespace, str, Sequence, Sequence | None], Any]] = {
    "retrieval": lambda a, name, rows, _: RetrievalEvaluator(rows, a.batch_size, a.ks, name, a.captions),
    "zero_shot": lambda a, name, rows, _: zero_shot(a, name, rows, bootstrap=False),
    "bootstrap": lambda a, name, rows, _: zero_shot(a, name, rows, bootstrap=True),
    "multimodal": lambda a, name, rows, gallery: MultimodalRetrievalEvaluator(
        rows, gallery, a.batch_size, a.ks, name, captions=a.captions
    ),
    "composed": lambda a, name, rows, gallery: ComposedEvaluator(rows, gallery),
    "gap": lambda a, name, rows, _: GapEvaluator(rows),
    "localization": lambda a, name, rows, _: LocalizationEvaluator(rows),
    "attention": lambda a, name, rows, _: AttentionEvaluator(rows),
}
CLASS_TASKS = ("zero_shot", "bootstrap")


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
    parser.add_argument(
        "--class_names",
        help="imagenet, cifar10, cifar100, or a JSON file with a list: the classes of zero_shot and bootstrap, the "
        "only tasks then; captions are not needed, and --id_column (label, or the folder of a picture) holds the "
        "number of each row's class, its place in that list",
    )
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--templates", default="slip", help="name of a template set, or a JSON file with a list")
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--limit", type=int, help="use only so many rows of each split, evenly spaced")
    parser.add_argument(
        "--bootstrap_rows", type=int, default=300,
        help="guide only so many evenly spaced pictures, at ten more passes each (default 300; 0: all)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    a.bootstrap_rows = a.bootstrap_rows or None
    if a.class_names is not None:
        if other := [task for task in a.tasks or () if task not in CLASS_TASKS]:
            parser.error(f"--class_names is for the tasks {' and '.join(CLASS_TASKS)}, got {', '.join(other)}")
        a.tasks = a.tasks or ["bootstrap"]
    return a


def read(source: str, a: argparse.Namespace, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a source; of more than `limit`, evenly spaced ones."""
    if a.class_names is not None:
        return spaced(open_labelled(source, load_class_names(a.class_names), a.image_column, a.id_column), limit)
    return spaced(open_pairs(source, a.image_column, a.text_column, a.id_column), limit)


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
        facts |= {} if a.class_names is None else {"class_names": a.class_names}
        protocol = {**facts, **getattr(evaluator, "protocol", {})}
        if numbers:
            write_results(output / "results" / f"{split}.{task}.json", numbers, protocol, model, a.model)
        drawn |= write_pictures(pictures, output)
        values |= numbers
    for path in drawn.values():
        print(f"picture: {output / path}")
    return values, drawn


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    a = parse(arguments)
    model = load_model(AutoModelForZeroShotImageClassification, a.model).to(a.device).eval()
    processor = AutoProcessor.from_pretrained(a.model)
    gallery = Gallery(read(a.gallery, a)) if a.gallery and a.class_names is None else None
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
