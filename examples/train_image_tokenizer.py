"""Train a discrete image tokenizer on your images: SIMLA's masked image modelling predicts its codes.

accelerate launch examples/train_image_tokenizer.py --config examples/configs/image_tokenizer_emoji.yaml [--name value]

`--train_data` takes what `examples/pretrain.py` takes, with captions or without, and folders of images. The directory
`model` in `output_dir` has the layout of a Hub repository; its README.md shows images and their reconstructions.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModel

import oner  # noqa: F401  registers the models with transformers' auto classes
from oner.modeling.configuration_dvae import DiscreteVAEConfig
from oner.modeling.modeling_dvae import DiscreteVAE
from oner.processing.data.sources import open_rows
from oner.training.doctor.command import word
from oner.training.evaluation.dvae import ReconstructionEvaluator, reconstruction_sheet
from oner.training.evaluation.embedding import spaced
from oner.training.objectives.dvae import DiscreteVAEObjective, DiscreteVAEObjectiveArguments
from oner.training.publishing.model_loading import load_model
from oner.training.publishing.tokenizer_export import export_tokenizer
from oner.training.run.arguments import Arguments
from oner.training.run.collators import tokenizer_collator
from oner.training.run.engine import Engine
from oner.training.run.host_memory import keep_freed_memory
from oner.training.run.inputs import Inputs
from oner.training.run.launch import make_accelerator
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.output_lock import alone_in
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED, Publication, describe, prepare_publication

SHOWN = 24


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Trains, and returns the last evaluation, or None if a signal stopped the run."""
    arguments = parse_arguments(argv, DiscreteVAEObjectiveArguments, kind="images", family="discrete_vae")
    accelerator = make_accelerator(arguments.run)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with alone_in(arguments.run.output_dir, accelerator.device):
        return train(arguments, accelerator)


def train(arguments: Arguments, accelerator: Accelerator) -> dict[str, float] | None:
    """`main` after arguments are parsed and the accelerator is made."""
    publication = prepare_publication(arguments)
    data, run = arguments.data, arguments.run
    rows = open_portions(arguments)
    model = build_tokenizer(arguments)
    loader = RunLoader(arguments, rows, {"images": tokenizer_collator(arguments, model.config.image_size)})
    columns = {"image_column": data.image_column, "id_column": data.id_column}
    evaluators = [
        ReconstructionEvaluator(open_rows(path, "images", **columns), Path(path).stem) for path in run.eval_data
    ]
    accelerator.print(describe(arguments, model, loader, accelerator))

    def evaluate(tokenizer: DiscreteVAE) -> Iterator[tuple[str, float]]:
        for evaluator in evaluators:
            yield from evaluator.run(tokenizer)

    engine = Engine(
        accelerator=accelerator,
        model=model,
        objective=DiscreteVAEObjective(model, arguments.objective),
        arguments=arguments,
        loader=loader,
        total_steps=loader.total_steps,
        epoch_steps=loader.epoch_steps,
        evaluate=evaluate if evaluators else None,
        inputs=Inputs(arguments, rows, None, evaluators),
    )
    metrics = engine.fit()
    if engine.stopped:
        accelerator.print(f"stopped at step {engine.step}; go on with --resume auto")
        return None
    if accelerator.is_main_process:
        directory = export(publication, arguments, engine.model, metrics, evaluators)
        print(json.dumps({name: round(value, 5) for name, value in metrics.items()}, indent=1))
        print(f"model directory: {directory}")
        print(word(arguments.run.output_dir, rows))
    return metrics


def build_tokenizer(arguments: Arguments) -> DiscreteVAE:
    """The model in fp32: from `initial_model`, or from scratch."""
    given = arguments.model
    torch.manual_seed(arguments.run.seed)
    if given.initial_model is not None:
        return load_model(AutoModel, given.initial_model, dtype=torch.float32, **(given.model_config or {}))
    return DiscreteVAE(DiscreteVAEConfig.from_size(given.size, **(given.model_config or {})))


def export(
    publication: Publication,
    arguments: Arguments,
    model: DiscreteVAE,
    metrics: dict[str, float],
    evaluators: list[ReconstructionEvaluator],
) -> Path:
    """Writes the model directory, with its card and a sheet of images per evaluation set."""
    sheets = {
        f"{one.name}: pictures above what their codes draw": reconstruction_sheet(model, spaced(one.rows, SHOWN))
        for one in evaluators
    }
    return export_tokenizer(
        model,
        publication.directory,
        metrics=metrics,
        protocol={one.name: one.protocol for one in evaluators},
        training_config=arguments.to_dict(),
        pictures=sheets,
        origins=publication.origins,
        license=arguments.run.licence,
        dtype=publication.dtype,
        repo_id=arguments.run.repo_id,
    )


if __name__ == "__main__":
    if main() is None:
        sys.exit(STOPPED)
