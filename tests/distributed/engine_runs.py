"""What test_engines_two_processes.py compares: examples/pretrain.py under one engine after another, in the same
processes, with a queue of keys beside OneR's own losses. Started by torchrun with a JSON list of what to run.
"""

import faulthandler
import json
import math
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import PartialState

from oner.training.objectives.losses import info_nce
from oner.training.objectives.objective import OBJECTIVES
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments
from oner.training.parallel.distributed import gather_without_gradient, rank, world_size

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
# what `accelerate launch` would put into the environment
ENGINES = {
    "one": {},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate config` writes it
    },
    "zero1": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
QUEUE = 24  # three batches of eight


class QueueObjective(OneRObjective):
    """OneR's, and pictures against the captions of the last batches too, as SIMLA has it."""

    spoilt = 0  # the last process's loss is NaN in the step of this number

    def __init__(self, student, arguments):
        super().__init__(student, arguments)
        generator = torch.Generator().manual_seed(1)
        self.queue = torch.randn(QUEUE, student.config.projection_dim, generator=generator)
        self.weights["queue"] = 0.5
        self.steps = 0

    def compare(self, rows, common, targets, progress):
        compared = super().compare(rows, common, targets, progress)
        keys = gather_without_gradient(targets["key of text"].float())
        compared.kept["newest"] = keys.detach()
        offset = rank() * len(rows["image"])
        compared.parts["queue"] = info_nce(rows["image"], torch.cat([keys, self.queue]), 0.1, offset=offset)
        return compared

    def weigh(self, parts):
        loss = super().weigh(parts)
        return loss * math.nan if self.steps + 1 == self.spoilt and rank() == world_size() - 1 else loss

    def after_step(self, applied=None, kept=None):
        super().after_step(applied, kept)
        self.steps += 1
        if applied is None or applied:
            self.queue = torch.cat([kept["newest"], self.queue])[:QUEUE]

    def state_dict(self):
        return {**super().state_dict(), "queue": self.queue}

    def load_state_dict(self, state):
        self.queue = state["queue"]
        super().load_state_dict({name: value for name, value in state.items() if name != "queue"})


@contextmanager
def with_a_queue(spoilt: int = 0):
    """`--family oner` is trained with the queue."""
    name = "queue_objective"
    sys.modules[name] = sys.modules[__name__]
    before, OBJECTIVES["oner"] = OBJECTIVES["oner"], (name, "QueueObjective", OneRObjectiveArguments.__name__)
    QueueObjective.spoilt = spoilt
    try:
        yield
    finally:
        OBJECTIVES["oner"] = before
        del sys.modules[name]


def main(jobs: list[dict]) -> None:
    """
    Each job: `engine`, the example's `arguments`, optionally `spoilt`, the `limit` in seconds, and the module of a
    `family` that is not oner's own.
    """
    from tiny_pretraining import forget_accelerator, load_example

    example = load_example("pretrain")
    for job in jobs:
        for name in {name for settings in ENGINES.values() for name in settings}:
            os.environ.pop(name, None)
        os.environ.update(ENGINES[job["engine"]])
        forget_accelerator()
        if "family" in job:
            import_module(job["family"])
        # processes that wait for each other for ever say where, and end
        faulthandler.dump_traceback_later(job.get("limit", 300), exit=True)
        with with_a_queue(job.get("spoilt", 0)):
            example.main(job["arguments"])
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # DeepSpeed remembers the process group of its first run, which must not be destroyed at that run's end
    PartialState.destroy_process_group = lambda self, group=None: None
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
