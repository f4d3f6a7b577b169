"""`oner evaluate`: prints a table, and writes numbers to results/ and pictures to pictures/.

Each entry of `TASKS` makes an evaluator, whose `run(model, processor)` yields names with a number or a picture to
save. A model fine-tuned for a task of `oner.training.tasks.finetuning` is evaluated by that task's evaluator.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    HfArgumentParser,
)

from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.same_pictures import ROW
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
from oner.training.evaluation.relevance import RelevanceEvaluator
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.results import read_results, results_directory, write_results
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator
from oner.training.publishing.hub import write_pictures
from oner.training.publishing.model_card import add_evaluation
from oner.training.publishing.model_loading import load_model
from oner.training.publishing.shipped import find_model
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import CAPTION_RULES
from oner.training.tasks.finetuning import TASKS as FINETUNED
from oner.training.tasks.finetuning import Evaluator, build_evaluator, find_task


def zero_shot(a: argparse.Namespace, name: str, rows: Sequence, bootstrap: bool) -> ZeroShotClassificationEvaluator:
    """With --class_names a row's id is its class number; without, every concept is a class."""
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
    "relevance": lambda a, name, rows, _: RelevanceEvaluator(rows),
}
# they ask a head, or the codebook, that other models have not; the rest ask the one that searches
MODELS = {"concepts": AutoModelForPreTraining, "codes": AutoModelForPreTraining, "relevance": AutoModelForMaskedLM}
# they have models and data of their own; that of retrieval is a model of the tasks above
OWN_TASKS = tuple(task for task in FINETUNED if task not in TASKS)


def complete(a: argparse.Namespace, rest: Sequence[str]) -> argparse.Namespace:
    """Completes the options; `a.own` is a task with its own model, `a.told` its arguments."""
    own = [task for task in a.tasks or () if task in OWN_TASKS]
    a.own, a.told = None, None
    if own:
        a.own, a.eval_limit, a.eval_batch_size = own[0], a.limit, a.batch_size
        kind = find_task(a.own).arguments
        (told,) = HfArgumentParser(kind, allow_abbrev=False).parse_args_into_dataclasses(list(rest))
        # for names in both, the options of the evaluation take precedence
        a.told = replace(told, **{one.name: getattr(a, one.name) for one in fields(kind) if hasattr(a, one.name)})
    if a.class_names is not None:
        a.tasks = a.tasks or ["bootstrap"]
    told, a.model = a.model, find_model(a.model)
    a.output = a.output or str(results_directory(told, a.model))
    a.bootstrap_rows = a.bootstrap_rows or None
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return a


def read(source: str, a: argparse.Namespace, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a source; evenly spaced ones if there are more than `limit`."""
    if a.class_names is not None:
        return spaced(open_labelled(source, load_class_names(a.class_names), a.image_column, a.id_column), limit)
    if a.image_folder is not None or a.eval_split is not None:
        return spaced(open_karpathy(source, a.image_folder, a.eval_split), limit)
    return spaced(open_rows(source, "pairs", a.image_column, a.text_column, a.id_column), limit)


def read_gallery(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the gallery. Without a column of ids theirs are numbers in their own source, and no other's."""
    rows = read(a.gallery, a)
    if a.id_column not in (None, ROW) or a.image_folder is not None or a.eval_split is not None:
        return rows
    return [{**row, "id": ("gallery", row["id"])} for row in rows]


def chosen_tasks(a: argparse.Namespace, split: str, rows: Sequence, gallery: Sequence | None, model: Any) -> list[str]:
    """The named tasks, or all possible ones; prints why the others are not possible."""
    if a.tasks:
        return a.tasks
    lacking = {}
    pictures = {(row["id"], picture_key(row["image"])) for row in rows} if gallery is None else ()
    if gallery is None and len({concept for concept, _ in pictures}) == len(pictures):
        why = "no concept has two pictures; name others with --gallery and --id_column"
        lacking |= {"multimodal": why, "composed": why}
    if gallery is not None and {row["id"] for row in rows}.isdisjoint(row["id"] for row in gallery):
        lacking["multimodal"] = "no id of its rows stands in the gallery; --id_column names that of both"
    if not hasattr(model, "match"):
        lacking["rerank"] = lacking["scenes"] = f"{type(model).__name__} has no matching head"
    elif not hasattr(model, "ground"):
        lacking["scenes"] = f"{type(model).__name__} does not say where a text lies in a picture"
    if a.languages is None:
        lacking["languages"] = "--languages does not name those of the captions"
    if not hasattr(model, "concepts"):
        lacking["concepts"] = "it needs the pretraining model; name it in --tasks"
    lacking["relevance"] = "it needs the model of masked words; name it in --tasks, alone"
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
    """Runs one task on one split and writes its files; returns the numbers, and the pictures' paths by caption."""
    output, split = Path(a.output), facts["split"]
    numbers, pictures = {}, {}
    try:
        for name, value in evaluator.run(model, processor):
            name = name if name.startswith(f"{split}/") else f"{split}/{name}"
            (numbers if isinstance(value, int | float) else pictures)[name] = value
    except ImportError as error:
        if a.tasks:
            raise
        print(f"{split}: {facts['task']} ends here, as {error}")  # of all tasks, each tells what it can
    protocol = {**facts, "limit": a.limit, "gallery_source": a.gallery, **getattr(evaluator, "protocol", {})}
    protocol |= {} if a.class_names is None else {"class_names": a.class_names}
    if numbers:
        write_results(output / "results" / f"{split}.{facts['task']}.json", numbers, protocol, model, a.model)
    drawn = write_pictures(pictures, output)
    for path in drawn.values():
        print(f"picture: {output / path}")
    return numbers, drawn


def evaluators(a: argparse.Namespace, model: Any) -> Iterator[tuple[dict[str, Any], Evaluator]]:
    """All evaluations to run: task, split and number of rows, with the evaluator."""
    if a.own is not None:
        for source in a.data:
            data = DataArguments(caption_rules=a.caption_rules)
            evaluator = build_evaluator(find_task(a.own), source, a.told, data)
            yield {"task": a.own, "split": Path(source).stem}, evaluator
        return
    gallery = Gallery(read_gallery(a)) if a.gallery and a.class_names is None else None
    for source in a.data:
        opened = open_queries(source, a.limit) if a.tasks == ["queries"] else read(source, a, a.limit)
        split, rows = Path(source).stem, opened
        for task in chosen_tasks(a, split, rows, gallery, model):
            yield {"task": task, "split": split, "rows": len(rows)}, TASKS[task](a, split, rows, gallery)


def evaluate(options: argparse.Namespace, rest: Sequence[str] = ()) -> dict[str, float]:
    """Everything that is to be done; the numbers by name, which are printed and written too."""
    a = complete(options, rest)
    kinds = [MODELS[task] for task in a.tasks or () if task in MODELS]
    kind = kinds[0] if kinds else AutoModelForZeroShotImageClassification
    kind = kind if a.own is None else find_task(a.own).model
    model = load_model(kind, a.model).to(a.device).eval()
    processor = AutoProcessor.from_pretrained(a.model)
    values: dict[str, float] = {}
    pictures: dict[str, str] = {}
    for facts, evaluator in evaluators(a, model):
        numbers, drawn = record(a, facts, evaluator, model, processor)
        values |= numbers
        pictures |= drawn
    output = Path(a.output)
    if output == Path(a.model) and (output / "README.md").is_file():
        add_evaluation(output, read_results(output), pictures)
    width = max(map(len, values), default=0)
    print("\n".join(f"{name:<{width}}  {value:10.4f}" for name, value in values.items()))
    return values


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner evaluate`."""
    evaluate(options, rest)
    return 0
