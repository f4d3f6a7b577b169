"""Pretrain a family on pairs of pictures and text, evaluate, and write a model directory that is a Hub repository.

accelerate launch examples/pretrain.py --config examples/configs/oner_emoji.yaml [--name value ...]
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from oner.processing.data.sources import open_rows
from oner.training.doctor.command import word
from oner.training.evaluation.embedding import check_pictures
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.objectives.objective import build_objective
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
from oner.training.run.summary import describe, export, prepare_publication


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Runs to the end and returns the last evaluation, or nothing where a signal stopped it before."""
    arguments = parse_arguments(argv)
    accelerator = make_accelerator(arguments.run)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with alone_in(arguments.run.output_dir, accelerator.device):
        return train(arguments, accelerator)


def train(arguments: Arguments, accelerator: Accelerator) -> dict[str, float] | None:
    """`main` with everything told and started."""
    publication = prepare_publication(arguments)
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    model = synchronise_batch_norm(build_model(arguments, config), accelerator.device)
    loader = RunLoader(arguments, rows, build_collators(arguments, processor, config))
    evaluators = build_evaluators(arguments)
    objective = build_objective(arguments.model.family, model, arguments.objective)
    begin_objective(objective, arguments, partial(build_model, config=config))

    accelerator.print(describe(arguments, model, loader, accelerator))

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
        directory = export(publication, arguments, engine.model, processor, metrics, evaluators)
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}, indent=1))
        print(f"model directory: {directory}")
        print(word(arguments.run.output_dir, rows))
    return metrics


def build_evaluators(arguments: Arguments) -> list[RetrievalEvaluator]:
    """Retrieval on each evaluation set, whose pictures are all tried first."""
    data, run, evaluators = arguments.data, arguments.run, []
    for path in run.eval_data:
        rows = open_rows(path, "pairs", data.image_column, data.text_column, data.id_column)
        check_pictures(rows, path)
        how = {"captions": run.eval_captions, "clean_caption": CAPTION_RULES.get(data.caption_rules)}
        evaluators.append(RetrievalEvaluator(rows, name=Path(path).stem, progress=False, **how))
    return evaluators
