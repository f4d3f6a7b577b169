"""A family's objective in transformers' Trainer, for users who already train with it.

    python examples/with_trainer.py --config examples/configs/oner_emoji.yaml --max_steps 200 --output_dir runs/trainer

The engine of `oner train` does more: it takes several portions, skips steps that are not finite, and stores the
teacher and the queues in its checkpoints, so that it resumes bit-exactly. Here they are lost when the process ends.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from oner.processing.data.sampling import PairBatchSampler
from oner.processing.data.training_sets import PairTrainingSet
from oner.training.objectives.objective import SinglePortion, build_objective
from oner.training.run.building import build_model, build_processor_and_config
from oner.training.run.collators import build_collators
from oner.training.run.loading import open_portions
from oner.training.run.parsing import parse_arguments


class ObjectiveTrainer(Trainer):
    """A Trainer with an objective built on its model, and a DataLoader of the batches for the objective."""

    def __init__(self, objective: SinglePortion, batches: DataLoader, **options: Any):
        super().__init__(**options, callbacks=[AfterStep(self)])
        self.objective = objective.to(self.args.device)
        self.batches = batches

    def get_train_dataloader(self) -> DataLoader:
        return self.batches

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
        taken = self.objective(model, inputs, self.state.global_step / self.state.max_steps)
        self.kept = taken.kept
        return taken.loss


class AfterStep(TrainerCallback):
    """Updates the teacher and the queues after each step of the optimiser."""

    def __init__(self, trainer: ObjectiveTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.objective.after_step(kept=self.trainer.kept)


def main(argv: Sequence[str] | None = None) -> ObjectiveTrainer:
    """Takes the arguments of `oner train`; requires `max_steps`, and uses the run's learning rate and seed."""
    arguments = parse_arguments(argv)
    run = arguments.run
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    model = build_model(arguments, config)

    # one portion, in the order of `oner train`
    ((name, pairs),) = rows.items()
    sampler = PairBatchSampler(len(pairs), run.batch_size, run.seed, total_steps=run.max_steps)
    collator = build_collators(arguments, processor, config)[name]
    trainer = ObjectiveTrainer(
        build_objective(arguments.model.family, model, arguments.objective),
        DataLoader(PairTrainingSet(pairs), batch_sampler=sampler, collate_fn=collator),
        model=model,
        processing_class=processor,
        args=TrainingArguments(
            run.output_dir,
            max_steps=run.max_steps,
            learning_rate=run.base_learning_rate * run.batch_size / 256,
            weight_decay=run.weight_decay,
            lr_scheduler_type="cosine",
            logging_steps=run.log_every,
            save_strategy="no",
            seed=run.seed,
            report_to=run.report_to,
        ),
    )
    trainer.train()
    trainer.save_model(run.output_dir)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
