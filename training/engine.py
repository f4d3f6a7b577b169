"""The loop, on Accelerate. It knows no family: an objective gives the loss and moves its own teacher.

for each batch: learning rate, loss, backward, clip, step, teacher, log, evaluate, save
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .arguments import Arguments, RunArguments
from .checkpoint import (
    CheckpointError,
    find_checkpoint,
    flatten_optimizer,
    load_checkpoint,
    load_weights,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)
from .distributed import any_process, rank
from .objective import Objective
from .optimization import build_optimizer, build_schedule

# loader(start_step) -> batches of this process from that step to the end of the run
LoaderFactory = Callable[[int], Iterable[dict[str, torch.Tensor]]]
Evaluate = Callable[[PreTrainedModel], Iterator[tuple[str, float]]]

# what may differ between the run that saved and the run that resumes, since no result depends on it
HARMLESS = {"resume", "allow_changes", "output_dir", "log_every", "report_to", "keep_checkpoints", "num_workers"}


def make_accelerator(run: RunArguments) -> Accelerator:
    """
    Accelerate as the command line launched it, with this run's precision and trackers.

    Raises:
        ValueError: gradient accumulation or ZeRO-3, which this engine would get wrong; a tracker that is not there.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    if absent := [name for name in run.report_to if name not in {*installed, "all"}]:
        # Accelerate would only warn, and the numbers be lost
        raise ValueError(f"report_to names {absent}, which is not installed; there are {sorted(installed)}")
    accelerator = Accelerator(
        mixed_precision=choose_precision(run.mixed_precision),
        log_with=run.report_to or None,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}: accumulating a contrastive "
            f"loss leaves only a micro-batch's negatives, which is another loss; lower batch_size or add processes"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage == 3:
            raise ValueError(
                "ZeRO-3 partitions the student, and the EMA teacher would average empty shards: use ZeRO-1 or ZeRO-2"
            )
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = run.batch_size // accelerator.num_processes
        # DeepSpeed clips by itself, at Accelerate's 1.0 unless told; 0 is never
        plugin.deepspeed_config["gradient_clipping"] = run.max_grad_norm or 0.0
    return accelerator


def choose_precision(asked: str) -> str:
    """`auto` is bf16 on accelerators that have it and on CPUs with bf16 matrix units, else no."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    # a private name, but torch has no public one: without these units bf16 on a CPU is slower than fp32
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"


class Engine:
    """
    Trains `model` to the end of the run, or to a SIGTERM or Ctrl-C, which ends it cleanly with a checkpoint.

    Args:
        accelerator (`Accelerator`): From `make_accelerator`.
        model (`PreTrainedModel`): The student, unwrapped, weights in place, fp32.
        objective (`Objective`): Built over this very model.
        arguments (`Arguments`): The run's; kept in each checkpoint.
        loader: Batches of this process from a given step on.
        total_steps, epoch_steps (`int`): Length of the run and of an epoch.
        evaluate (*optional*): model -> (name, value) pairs, called on the first process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        objective: Objective,
        arguments: Arguments,
        loader: LoaderFactory,
        total_steps: int,
        epoch_steps: int,
        evaluate: Evaluate | None = None,
    ):
        run = arguments.run
        self.accelerator, self.arguments, self.run = accelerator, arguments, run
        self.loader, self.total_steps, self.epoch_steps, self.evaluate = loader, total_steps, epoch_steps, evaluate
        self.output_dir = Path(run.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.model = model
        optimizer = build_optimizer(self.model, run)
        self.schedule = build_schedule(optimizer, run, total_steps, epoch_steps)
        if run.compile:
            for layer in self.model.modules():
                if type(layer).__name__ in self.model._no_split_modules:
                    layer.compile()
        self.student, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.objective = objective.to(accelerator.device)
        self.step, self.stopped = 0, False
        self.metrics: dict[str, float] = {}
        set_seed(run.seed + rank())

    @property
    def keeps_optimizer(self) -> bool:
        # DeepSpeed shards the optimiser and can only pickle it
        return self.accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP)

    def fit(self) -> dict[str, float]:
        """Runs to the end; returns the last evaluation. `self.stopped` tells whether a signal cut it short."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.accelerator.init_trackers("oner", config={"run": json.dumps(self.arguments.to_dict())})
            self._resume()
            self._loop()
            self.accelerator.end_training()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # a signal that came in the last step cut nothing short
        self.stopped = self.stopped and self.step < self.total_steps
        return self.metrics

    def _loop(self) -> None:
        clock, logged = time.perf_counter(), self.step
        with tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=not self.accelerator.is_main_process
        ) as bar:
            for batch in self.loader(self.step):
                loss, parts = self._train_step(batch)
                bar.update()
                if self.step % self.run.log_every == 0 or self.step == self.total_steps:
                    seconds, clock = time.perf_counter() - clock, time.perf_counter()
                    speed = (self.step - logged) * self.run.batch_size / seconds
                    logged = self.step
                    bar.set_postfix(loss=f"{self._log(loss, parts, speed, batch):.3f}", pairs_s=f"{speed:.0f}")
                stopping = self._stopping()
                if self._due(self.run.eval_every_epochs) or self.step == self.total_steps:
                    self._evaluate()
                    clock, logged = time.perf_counter(), self.step
                if stopping or self._due(self.run.save_every_epochs) or self.step == self.total_steps:
                    self._check_finite(loss, parts, batch)
                    self._save()
                if stopping:
                    self.stopped = True  # on the processes too that got no signal
                    break

    def _train_step(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        self.student.train()
        self.schedule.step_update(self.step)
        with self.accelerator.autocast():
            loss, parts = self.objective(self.student, batch, self.step / self.total_steps)
        self.accelerator.backward(loss)
        if self.run.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.run.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step()
        self.step += 1
        return loss.detach(), parts

    def _due(self, epochs: float) -> bool:
        every = round(epochs * self.epoch_steps)
        return every > 0 and self.step % every == 0

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.stopped = True

    def _stopping(self) -> bool:
        # several processes agree only now and then: the question makes an accelerator wait
        if self.accelerator.num_processes > 1 and self.step % self.run.log_every:
            return False
        return any_process(self.stopped, self.accelerator.device)

    def _check_finite(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], batch: dict) -> dict[str, float]:
        """The loss and its parts, means over processes. Looked at before each line of the log and each checkpoint."""
        named = {"loss": loss, **parts}
        means = self.accelerator.reduce(torch.stack([part.float() for part in named.values()]), reduction="mean")
        values = dict(zip(named, means.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step} ({values}), rows {batch['rows'].tolist()[:16]}..."
            )
        return values

    def _log(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], speed: float, batch: dict) -> float:
        values = self._check_finite(loss, parts, batch)
        values |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "pairs_per_second": round(speed, 1)}
        self._write({"epoch": round(self.step / self.epoch_steps, 4), **values})
        return values["loss"]

    def _write(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=self.step)

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        if self.accelerator.is_main_process:
            self.metrics = dict(self.evaluate(self.model))
            tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.items()))
        self._write(self.metrics)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        random_tensors, random_json = random_state()
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.model.state_dict(),
                "objective": self.objective.state_dict(),
                "random": random_tensors,
            }
            groups = None
            if self.keeps_optimizer:
                tensors["optimizer"], groups = flatten_optimizer(self.optimizer)
            state = {
                "step": self.step,
                "total_steps": self.total_steps,
                "arguments": self.arguments.to_dict(),
                "optimizer_groups": groups,
                "random": random_json,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "metrics": self.metrics,
            }
            save_checkpoint(self.output_dir, self.step, tensors, state, keep=self.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.run.resume is None:
            return
        path = find_checkpoint(self.output_dir) if self.run.resume == "auto" else Path(self.run.resume)
        if path is None:
            return
        tensors, state = load_checkpoint(path)
        self._check_same_run(path, state)
        if not self.keeps_optimizer or state["optimizer_groups"] is None:
            raise CheckpointError(
                f"{path}: the optimiser's state is sharded by {self.accelerator.distributed_type.value} and not kept "
                f"in a checkpoint yet; start from its weights with initial_model, or resume under DDP"
            )
        load_weights(self.model, tensors["model"], path)
        try:
            self.objective.load_state_dict(tensors.get("objective", {}))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: the objective's state is not the one expected: {error}") from error
        restore_optimizer(self.optimizer, tensors["optimizer"], state["optimizer_groups"])
        self.step, self.metrics = state["step"], state["metrics"]
        self._restore_randomness(tensors["random"], state["random"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _restore_randomness(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        if self.accelerator.num_processes > 1:
            # a checkpoint holds the first process's generators only: restored on all, every process would draw alike
            set_seed(self.run.seed + rank() + self.step)
        else:
            restore_random_state(tensors, state)

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        then, now = state["arguments"], self.arguments.to_dict()
        # both through JSON, where a tuple is a list
        now = json.loads(json.dumps(now))
        changed = [
            f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
            for name in sorted({*then, *now} - HARMLESS)
            if then.get(name) != now.get(name)
        ]
        if changed and not self.run.allow_changes:
            raise CheckpointError(
                f"{path} belongs to another configuration; " + "; ".join(changed) + " (allow_changes resumes anyway)"
            )
