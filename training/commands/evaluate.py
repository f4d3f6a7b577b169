"""Evaluate a model directory: a table on the screen, numbers in results/, pictures in pictures/.

    python examples/evaluate.py --model runs/demo/model --data examples/data/emoji/test_style.parquet \
        --id_column hexcode --gallery examples/data/emoji/train.parquet

A task is one entry of `TASKS`: it makes an evaluator, whose `run(model, processor)` yields names, each with a number
or a picture to be saved. `multimodal` and `composed` need other pictures of the same concept, in --data or --gallery.

Composed queries, a table of their own (examples/data/scenes.md, icons.md), for instance

    python examples/evaluate.py --model runs/icons_oner/model --tasks queries --id_column concepts \
        --data runs/icons/unseen_sets_queries.parquet --gallery runs/icons/unseen_sets_gallery.parquet

Pictures with class numbers instead of captions, for instance a folder with one folder a class:

    python examples/evaluate.py --model runs/demo/model --data imagenet/val --class_names imagenet

A model that was fine-tuned for a task of `oner.training.tasks.finetuning`, on data in that task's format; what else
the task may be told are further options, and `--tasks TASK --help` lists them:

    python examples/evaluate.py --model runs/vqa/model --tasks vqa --data questions.json --answer_list answers.json
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    HfArgumentParser,
)

from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.sources import open_rows
from oner.training.evaluation.attention import AttentionEvaluator
from oner.training.evaluation.codes import CodeEvaluator, has_codebook
from oner.training.evaluation.composed import ComposedEvaluator
from oner.training.evaluation.composed_queries import ComposedQueriesEvaluator, open_queries
from oner.training.evaluation.concepts import ConceptEvaluator
from oner.training.evaluation.embedding import Gallery, picture_key, spaced
from oner.training.evaluation.gap import GapEvaluator
from oner.training.evaluation.grounding import SceneGroundingEvaluator
from oner.training.evaluation.labels import open_labelled
from oner.training.evaluation.languages import LanguagesEvaluator
from oner.training.evaluation.localization import LocalizationEvaluator
from oner.training.evaluation.prompts import load_class_names, usual_templates
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.results import read_results, write_results
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator
from oner.training.publishing.hub import write_pictures
from oner.training.publishing.model_card import add_evaluation
from oner.training.publishing.model_loading import load_model
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES
from oner.training.tasks.finetuning import TASKS as FINETUNED
from oner.training.tasks.finetuning import Evaluator, build_evaluator, find_task


def zero_shot(a: argparse.Namespace, name: str, rows: Sequence, bootstrap: bool) -> ZeroShotClassificationEvaluator:
    """With --class_names a row's id is the number of its class; without, every concept is a class."""
    templates = a.templates or usual_templates(a.class_names)
    guided_text = a.guided_text or ("name" if templates == "name" else "prompt")
    how = {"templates": templates, "batch_size": a.batch_size, "name": name, "bootstrap": bootstrap, "shown": 8}
    how |= {"bootstrap_rows": a.bootstrap_rows, "guided_text": guided_text, "guided_score": a.guided_score}
    how["keep_aspect"] = a.class_names == "imagenet" if a.keep_aspect is None else a.keep_aspect
    if a.class_names is None:
        return ZeroShotClassificationEvaluator.from_rows(rows, **how)
    labels = [row["id"] for row in rows]
    return ZeroShotClassificationEvaluator(rows, labels, load_class_names(a.class_names), **how)


TASKS: dict[str, Callable[[argparse.Namespace, str, Sequence, Sequence | None], Any]] = {
    "retrieval": lambda a, name, rows, _: RetrievalEvaluator(
        rows, a.batch_size, a.ks, name, a.captions, clean_caption=CAPTION_RULES.get(a.caption_rules)
    ),
    "rerank": lambda a, name, rows, _: RerankingEvaluator(
        rows,
        a.batch_size,
        a.ks,
        name,
        a.captions,
        clean_caption=CAPTION_RULES.get(a.caption_rules),
        rerank_k=a.rerank_k,
        rerank_score=a.rerank_score,
        rerank_weight=a.rerank_weight,
    ),
    "zero_shot": lambda a, name, rows, _: zero_shot(a, name, rows, bootstrap=False),
    "bootstrap": lambda a, name, rows, _: zero_shot(a, name, rows, bootstrap=True),
    "multimodal": lambda a, name, rows, gallery: MultimodalRetrievalEvaluator(
        rows, gallery, a.batch_size, a.ks, name, captions=a.captions
    ),
    "composed": lambda a, name, rows, gallery: ComposedEvaluator(rows, gallery),
    "queries": lambda a, name, rows, gallery: ComposedQueriesEvaluator(rows, gallery, a.batch_size, a.ks, name),
    "gap": lambda a, name, rows, _: GapEvaluator(rows),
    "localization": lambda a, name, rows, _: LocalizationEvaluator(rows),
    "attention": lambda a, name, rows, _: AttentionEvaluator(rows),
    "scenes": lambda a, name, rows, _: SceneGroundingEvaluator(rows, batch_size=a.batch_size),
    "concepts": lambda a, name, rows, _: ConceptEvaluator(rows, batch_size=a.batch_size, progress=False),
    "codes": lambda a, name, rows, _: CodeEvaluator(rows, batch_size=a.batch_size, progress=False),
    "languages": lambda a, name, rows, _: LanguagesEvaluator(rows, a.languages or (), a.batch_size, a.ks, name),
}
CLASS_TASKS = ("zero_shot", "bootstrap")
# they ask a head, or the codebook, that no other model than the pretraining one has
PRETRAINING_TASKS = ("concepts", "codes")
# they have models and data of their own; that of retrieval is a model of the tasks above
OWN_TASKS = tuple(task for task in FINETUNED if task not in TASKS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, with those of a task that has a model of its own; `a.own` is that task."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--tasks", nargs="+", default=())
    own = [task for task in first.parse_known_args(arguments)[0].tasks if task in OWN_TASKS]
    kinds = [find_task(own[0]).arguments] if own else []
    parser = HfArgumentParser(
        kinds, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_options(parser)
    a = parser.parse_args(arguments)
    a.own, a.bootstrap_rows = own[0] if own else None, a.bootstrap_rows or None
    if own and (len(a.tasks) > 1 or a.class_names is not None):
        parser.error(f"{own[0]} has a model of its own and is evaluated by itself; expected it alone in --tasks")
    if "queries" in (a.tasks or ()) and (len(a.tasks) > 1 or a.gallery is None):
        parser.error("queries are rows of their own kind; expected them alone in --tasks, and their --gallery")
    if a.class_names is not None:
        if other := [task for task in a.tasks or () if task not in CLASS_TASKS]:
            parser.error(f"--class_names is for the tasks {' and '.join(CLASS_TASKS)}, got {', '.join(other)}")
        a.tasks = a.tasks or ["bootstrap"]
    return a


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a model directory, or a name on the Hub")
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each is a split of its own")
    parser.add_argument("--gallery", help="a source with other pictures of the same concepts")
    parser.add_argument(
        "--tasks", nargs="+", choices=[*TASKS, *OWN_TASKS], help="default: all that the model and the data allow"
    )
    parser.add_argument("--output", help="default: the model directory")
    parser.add_argument("--image_column")
    parser.add_argument("--text_column")
    parser.add_argument("--id_column", help="rows with equal ids are positives of each other (hexcode for the emoji)")
    parser.add_argument(
        "--image_folder", help="what the picture paths of annotations are relative to; if none, the file"
    )
    parser.add_argument("--eval_split", help="of Karpathy's JSON (dataset_coco.json): test, say")
    parser.add_argument(
        "--class_names",
        help="imagenet, cifar10, cifar100, or a JSON file with a list: the classes of zero_shot and bootstrap, the "
        "only tasks then; captions are not needed, and --id_column (label, or the folder of a picture) holds the "
        "number of each row's class, its place in that list",
    )
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--caption_rules", choices=CAPTION_RULES, help="rewrite captions and questions as in training")
    parser.add_argument(
        "--templates",
        help="name of a template set, or a JSON file with a list (default: those of the class names, slip for "
        "imagenet, cifar for cifar10 and cifar100; without class names the bare name)",
    )
    parser.add_argument(
        "--guided_text", choices=("prompt", "name"),
        help="what stands beside a guided picture: 'a photo of a {}', or the bare name (default with bare names)",
    )  # fmt: skip
    parser.add_argument(
        "--guided_score", choices=("guided", "sum"), default="guided",
        help="candidates are ordered by s' = cos(f(I, t), f(t)) alone (the paper's), or by s + s'",
    )  # fmt: skip
    parser.add_argument(
        "--keep_aspect", action=argparse.BooleanOptionalAction,
        help="zero-shot: take the middle square of a picture, as SLIP does (default with imagenet)",
    )  # fmt: skip
    parser.add_argument("--languages", nargs="+", help="of each row's captions, in their order: the task of that name")
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--rerank_k", type=int, default=128, help="candidates of a query (COCO 256, Flickr30k 128)")
    parser.add_argument(
        "--rerank_score", choices=("logit", "difference", "sum"), default="logit",
        help="what orders the candidates: the logit for matched (ALBEF, SIMLA), its difference to the other logit, or "
        "cosine / temperature + rerank_weight times that difference",
    )  # fmt: skip
    parser.add_argument("--rerank_weight", type=float, default=0.25, help="of the difference in sum")
    parser.add_argument("--limit", "--eval_limit", type=int, help="use only so many rows of each split, evenly spaced")
    parser.add_argument(
        "--bootstrap_rows", type=int, default=300,
        help="guide only so many evenly spaced pictures, at ten more passes each (default 300; 0: all)",
    )  # fmt: skip
    parser.add_argument("--batch_size", "--eval_batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def read(source: str, a: argparse.Namespace, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a source; of more than `limit`, evenly spaced ones."""
    if a.class_names is not None:
        return spaced(open_labelled(source, load_class_names(a.class_names), a.image_column, a.id_column), limit)
    if a.image_folder is not None or a.eval_split is not None:
        return spaced(open_karpathy(source, a.image_folder, a.eval_split), limit)
    return spaced(open_rows(source, "pairs", a.image_column, a.text_column, a.id_column), limit)


def chosen_tasks(a: argparse.Namespace, split: str, rows: Sequence, gallery: Sequence | None, model: Any) -> list[str]:
    """Those named, or all but what cannot be done here, which is said."""
    if a.tasks:
        return a.tasks
    lacking = {}
    pictures = {(row["id"], picture_key(row["image"])) for row in rows} if gallery is None else ()
    if gallery is None and len({concept for concept, _ in pictures}) == len(pictures):
        why = "no concept has two pictures; name others with --gallery and --id_column"
        lacking |= {"multimodal": why, "composed": why}
    if not hasattr(model, "match"):
        lacking["rerank"] = lacking["scenes"] = f"{type(model).__name__} has no matching head"
    if a.languages is None:
        lacking["languages"] = "--languages does not name those of the captions"
    if not hasattr(model, "concepts"):
        lacking["concepts"] = "it needs the pretraining model; name it in --tasks"
    if not has_codebook(model):
        lacking["codes"] = "they need the pretraining model of a family with a codebook; name them in --tasks"
    # bootstrap yields the numbers of zero_shot too; queries are rows of their own
    tasks = [task for task in TASKS if task not in ("zero_shot", "queries")]
    for task in tasks:
        if task in lacking:
            print(f"{split}: no {task}, as {lacking[task]}")
    return [task for task in tasks if task not in lacking]


def record(
    a: argparse.Namespace, facts: dict[str, Any], evaluator: Evaluator, model: Any, processor: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Run one task on one split and write its files: the numbers, and the paths of the pictures by caption."""
    output, split = Path(a.output or a.model), facts["split"]
    numbers, pictures = {}, {}
    for name, value in evaluator.run(model, processor):
        name = name if name.startswith(f"{split}/") else f"{split}/{name}"
        (numbers if isinstance(value, int | float) else pictures)[name] = value
    protocol = {**facts, "limit": a.limit, "gallery_source": a.gallery, **getattr(evaluator, "protocol", {})}
    protocol |= {} if a.class_names is None else {"class_names": a.class_names}
    if numbers:
        write_results(output / "results" / f"{split}.{facts['task']}.json", numbers, protocol, model, a.model)
    drawn = write_pictures(pictures, output)
    for path in drawn.values():
        print(f"picture: {output / path}")
    return numbers, drawn


def evaluators(a: argparse.Namespace, model: Any) -> Iterator[tuple[dict[str, Any], Evaluator]]:
    """Everything that is to be done: task, split and number of rows, and the evaluator."""
    if a.own is not None:
        task = find_task(a.own)
        a.eval_limit, a.eval_batch_size = a.limit, a.batch_size
        told = task.arguments(**{one.name: getattr(a, one.name) for one in fields(task.arguments)})
        for source in a.data:
            evaluator = build_evaluator(task, source, told, DataArguments(caption_rules=a.caption_rules))
            yield {"task": a.own, "split": Path(source).stem}, evaluator
        return
    gallery = Gallery(read(a.gallery, a)) if a.gallery and a.class_names is None else None
    for source in a.data:
        opened = open_queries(source, a.limit) if a.tasks == ["queries"] else read(source, a, a.limit)
        split, rows = Path(source).stem, opened
        for task in chosen_tasks(a, split, rows, gallery, model):
            yield {"task": task, "split": split, "rows": len(rows)}, TASKS[task](a, split, rows, gallery)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    a = parse(arguments)
    pretraining = set(PRETRAINING_TASKS) & set(a.tasks or ())
    kind = AutoModelForPreTraining if pretraining else AutoModelForZeroShotImageClassification
    kind = kind if a.own is None else find_task(a.own).model
    model = load_model(kind, a.model).to(a.device).eval()
    processor = AutoProcessor.from_pretrained(a.model)
    values: dict[str, float] = {}
    pictures: dict[str, str] = {}
    for facts, evaluator in evaluators(a, model):
        numbers, drawn = record(a, facts, evaluator, model, processor)
        values |= numbers
        pictures |= drawn
    output = Path(a.output or a.model)
    if output == Path(a.model) and (output / "README.md").is_file():
        add_evaluation(output, read_results(output), pictures)
    width = max(map(len, values), default=0)
    print("\n".join(f"{name:<{width}}  {value:10.4f}" for name, value in values.items()))
    return values
