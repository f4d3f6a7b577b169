"""`oner finetune`: fine-tunes a pretrained model on a task, evaluates, and writes a model directory.

Tasks are the entries of `oner.training.tasks.finetuning.TASKS`.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

from accelerate import Accelerator
from transformers import PreTrainedModel

from oner.training.parallel.distributed import synchronise_batch_norm
from oner.training.run.arguments import Arguments
from oner.training.run.beginning import begin_objective
from oner.training.run.building import build_processor_and_config
from oner.training.run.engine import Engine
from oner.training.run.host_memory import keep_freed_memory
from oner.training.run.inputs import Inputs
from oner.training.run.launch import make_accelerator
from oner.training.run.loading import RunLoader
from oner.training.run.output_lock import alone_in
from oner.training.run.parsing import family_of, parse_arguments, read_config
from oner.training.run.summary import STOPPED, describe, export, prepare_publication
from oner.training.tasks.finetuning import (
    TASKS,
    Task,
    build_evaluator,
    find_task,
    load_task_model,
    open_task_rows,
    task_arguments,
    task_objective,
)

from .ending import tell

# where neither the line nor the file names a family or a model
DEFAULT_FAMILY = "simla"


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Runs to the end and returns the last evaluation, or None if a signal stopped it."""
    task, arguments = parse(argv)
    accelerator = make_accelerator(arguments.run)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with alone_in(arguments.run.output_dir, accelerator.device):
        return train(task, arguments, accelerator)


def train(task: Task, arguments: Arguments, accelerator: Accelerator) -> dict[str, float] | None:
    """The run itself, with parsed arguments and a started accelerator."""
    publication = prepare_publication(arguments)
    rows = {"pairs": open_task_rows(task, arguments)}
    processor, config = build_processor_and_config(arguments, rows)
    model = synchronise_batch_norm(load_task_model(task, arguments, config), accelerator.device)
    loader = RunLoader(arguments, rows, {"pairs": task.collator(arguments, processor, model.config)})
    evaluators = [build_evaluator(task, one, arguments.objective, arguments.data) for one in arguments.run.eval_data]

    objective = task_objective(task, model, arguments.objective)
    begin_objective(objective, arguments, partial(load_task_model, task, config=config))

    accelerator.print(f"{task.name}: {describe(arguments, model, loader, accelerator)}")

    def evaluate(student: PreTrainedModel) -> Iterator[tuple[str, float]]:
        for evaluator in evaluators:
            # only numbers; pictures are drawn by examples/evaluate.py
            yield from (told for told in evaluator.run(student, processor) if isinstance(told[1], int | float))

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
        directory = export(publication, arguments, engine.model, processor, metrics, evaluators)
        tell(arguments.run.output_dir, directory, metrics, rows, engine.model, processor)
    return metrics


def parse(argv: Sequence[str] | None = None) -> tuple[Task, Arguments]:
    """The task, from `--task` or the configuration file, and all other arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("task", "config", "family"):
        first.add_argument(f"--{name}")
    first.add_argument("--initial_model", "--initial-model")
    known, rest = first.parse_known_args(argv)
    told = {} if known.config is None else read_config(known.config)
    name = known.task or told.get("task")
    if name is None:
        raise ValueError(f"no task given; expected --task, or `task` in the file: {', '.join(TASKS)}")
    task = find_task(name)

    # without a model there is no run, but its other arguments can be parsed
    model = known.initial_model or told.get("initial_model")
    family = known.family or told.get("family") or (DEFAULT_FAMILY if model is None else family_of(model))
    chosen = {"config": known.config, "task": name, "family": family, "initial_model": known.initial_model}
    line = [word for option, value in chosen.items() if value is not None for word in (f"--{option}", value)]
    return task, parse_arguments([*line, *rest], objective=task_arguments(task, family))


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner finetune`: returns 0, or `STOPPED` if a signal ended the run."""
    return STOPPED if main(rest) is None else 0
