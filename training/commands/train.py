"""`oner train`: pretrains a family on pairs, evaluates, and writes a model directory that is a Hub repository."""

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from oner.processing.data.sources import open_rows
from oner.training.evaluation.embedding import check_pictures
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.objectives.objective import Objective, build_objective
from oner.training.parallel.distributed import synchronise_batch_norm
from oner.training.run.arguments import Arguments
from oner.training.run.beginning import begin_objective
from oner.training.run.building import build_model, build_processor_and_config
from oner.training.run.collators import CAPTION_RULES, build_collators
from oner.training.run.engine import Engine
from oner.training.run.host_memory import keep_freed_memory
from oner.training.run.inputs import Inputs
from oner.training.run.launch import make_accelerator
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.output_lock import alone_in
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED, describe, export, prepare_publication

from .ending import tell
from .folder import folder_line


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Runs to the end and returns the last evaluation, or None if a signal stopped it."""
    line = list(sys.argv[1:] if argv is None else argv)
    of_folder = bool(line) and not line[0].startswith("-")
    if of_folder:
        line = folder_line(line[0], line[1:])
    arguments = parse_arguments(line)
    accelerator = make_accelerator(arguments.run)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with alone_in(arguments.run.output_dir, accelerator.device):
        return train(arguments, accelerator, timed=of_folder)


def train(arguments: Arguments, accelerator: Accelerator, timed: bool = False) -> dict[str, float] | None:
    """The run itself, with parsed arguments and a started accelerator; `timed` first prints its expected duration."""
    publication = prepare_publication(arguments)
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    model = synchronise_batch_norm(build_model(arguments, config), accelerator.device)
    loader = RunLoader(arguments, rows, build_collators(arguments, processor, config))
    evaluators = build_evaluators(arguments)
    objective = build_objective(arguments.model.family, model, arguments.objective)
    begin_objective(objective, arguments, partial(build_model, config=config))

    accelerator.print(describe(arguments, model, loader, accelerator))
    if timed:
        accelerator.print(duration(seconds_of_step(objective, model, loader, accelerator) * loader.total_steps))

    def evaluate(student: PreTrainedModel) -> Iterator[tuple[str, float]]:
        for evaluator in evaluators:
            yield from evaluator.run(student, processor)

    engine = Engine(
        accelerator=accelerator,
        model=model,
        objective=objective,
        arguments=arguments,
        loader=loader,
        total_steps=loader.total_steps,
        epoch_steps=loader.epoch_steps,
        evaluate=evaluate if evaluators else None,
        inputs=Inputs(arguments, rows, processor.tokenizer, evaluators),
    )
    metrics = engine.fit()
    if engine.stopped:
        accelerator.print(f"stopped at step {engine.step}; go on with --resume auto")
        return None
    if accelerator.is_main_process:
        directory = export(publication, arguments, engine.model, processor, metrics, evaluators, objective.compares())
        tell(arguments.run.output_dir, directory, metrics, rows, engine.model, processor, evaluators)
    return metrics


def build_evaluators(arguments: Arguments) -> list[RetrievalEvaluator]:
    """A retrieval evaluator per evaluation set, after checking that all its pictures can be read."""
    data, run, evaluators = arguments.data, arguments.run, []
    for path in run.eval_data:
        rows = open_rows(path, "pairs", data.image_column, data.text_column, data.id_column)
        check_pictures(rows, path)
        how = {"captions": run.eval_captions, "clean_caption": CAPTION_RULES.get(data.caption_rules)}
        evaluators.append(RetrievalEvaluator(rows, name=Path(path).stem, progress=False, **how))
    return evaluators


def seconds_of_step(
    objective: Objective, model: PreTrainedModel, loader: RunLoader, accelerator: Accelerator
) -> float:
    """Times a step on the first batch, with copies of model and objective; without the update, but with warm-up."""
    student, trial = copy.deepcopy((model, objective))
    student.to(accelerator.device).train()
    for teacher in trial.teachers():
        teacher.follow(student)
    trial.to(accelerator.device)
    started = time.perf_counter()
    batches = loader.trial()
    for name, portion in trial.portions.items():
        batch = {key: value.to(accelerator.device) for key, value in batches[name].items()}
        with accelerator.autocast():
            taken = portion.take(student, batch, 0.5)
        taken.loss.backward()
        taken.loss.item()  # an accelerator is waited for
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    """How long it will take, as one says it."""
    if seconds < 90:
        return f"this will take about {max(1, round(seconds / 10)) * 10} s"
    return (
        f"this will take about {seconds / 60:.0f} min" if seconds < 5400 else f"this will take {seconds / 3600:.1f} h"
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner train`: 0, or `STOPPED` where a signal ended it."""
    return STOPPED if main(rest) is None else 0
