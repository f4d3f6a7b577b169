"""The training loop, on Accelerate. It does not depend on the family: an objective gives losses and updates teachers.

for each step: learning rate, loss and backward of each portion, clip, step, teachers, log, evaluate, save
"""

import copy
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from oner.training.objectives.objective import Batch, Objective, Taken
from oner.training.parallel.distributed import any_process, gather_without_gradient, rank, world_size
from oner.training.parallel.sharding import full_optimizer_state, full_state

from .arguments import Arguments
from .checkpoint import (
    CheckpointError,
    check_finite,
    load_weights,
    random_state,
    read_checkpoint,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
    set_aside,
    sweep,
)
from .checkpoint_writer import CheckpointWriter, Tensors
from .data_workers import STOPPING, Waiting
from .gradient_cache import loss_and_gradients
from .inputs import Inputs
from .launch import WholeModel, prepare, tracker_options
from .loading import Awaited
from .nonfinite import NonFiniteGuard, gradient_norm, whole
from .optimization import build_optimizer, build_schedule, compile_regions
from .resumption import RunLog, check_same_run, choose_checkpoint

logger = logging.get_logger(__name__)

# loader(start_step) -> batches of this process, by portion, from that step to the end of the run
LoaderFactory = Callable[[int], Iterable[dict[str, Batch] | Waiting]]
Evaluate = Callable[[PreTrainedModel], Iterator[tuple[str, float]]]
# seconds between messages that a batch has not arrived
REMIND = 60
HANGUP = getattr(signal, "SIGHUP", None)


class DataStalledError(RuntimeError):
    """No batch arrived within `data_timeout` seconds; the message names the source and the data workers."""


class Engine:
    """
    Trains `model` to the end of the run, or until SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, after which it saves a
    checkpoint
    and stops.

    Args:
        accelerator (`Accelerator`): From `make_accelerator`.
        model (`PreTrainedModel`): The unwrapped student with loaded weights, in fp32.
        objective (`Objective`): Built for this model.
        arguments (`Arguments`): The run's; saved in each checkpoint.
        loader: Gives the batches of this process from a given step on.
        total_steps, epoch_steps (`int`): Length of the run and of an epoch.
        evaluate (*optional*): model -> (name, value) pairs, called on the first process.
        inputs (`Inputs`, *optional*): The run's inputs, to be recorded in its directory and its checkpoints.
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
        inputs: Inputs | None = None,
    ):
        run = arguments.run
        self.accelerator = accelerator
        self.arguments = arguments
        self.run = run
        self.loader = loader
        self.total_steps = total_steps
        self.epoch_steps = epoch_steps
        self.evaluate = evaluate
        self.inputs = inputs
        self.output_dir = Path(run.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.model = model

        # each portion has its own batch size and chunks
        portions = arguments.portions()
        if portions.keys() != objective.portions.keys():
            raise ValueError(f"the run has the portions {list(portions)}; expected {list(objective.portions)}")
        self.batch_sizes = {name: options.run.batch_size for name, options in portions.items()}
        self.chunks = {name: options.run.gradient_cache_chunks for name, options in portions.items()}

        # the optimiser is built for the unwrapped model; `prepare` wraps both
        optimizer = build_optimizer(self.model, run, arguments.epoch_of().run.batch_size)
        self.schedule = build_schedule(optimizer, run, total_steps, epoch_steps)
        if run.compile:
            compile_regions([self.model, *(teacher.model for teacher in objective.teachers())])
        self.whole_model = WholeModel(accelerator, model)
        self.student, self.optimizer = prepare(accelerator, model, optimizer, objective)
        self.objective = objective
        self.step = 0
        self.stopped = False
        self._waits_since: float | None = None
        self._reminded = 0.0
        self.metrics: dict[str, float] = {}
        self.evaluated = True
        self.log = RunLog(self.output_dir / "log.jsonl")
        self.writer = CheckpointWriter()
        self.guard = NonFiniteGuard(self.output_dir, run.max_nonfinite_steps, self.model, self.objective)
        set_seed(run.seed + rank())

    def fit(self) -> dict[str, float]:
        """Runs to the end and returns the last evaluation. `self.stopped` is True if a signal ended it early."""
        # except SIGHUP if nohup has set it to be ignored
        heard = [number for number in STOPPING if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            self.accelerator.init_trackers(**tracker_options(self.arguments))
            self._resume()
            # however the loop ends, a pending checkpoint is written first
            with self.writer:
                self._loop()
                self._together(self.writer.wait)
            with self.whole_model() as model:
                self.model = model  # unsharded, so that one process can export it
            self.accelerator.end_training()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # a signal in the last step did not end the run early
        self.stopped = self.stopped and self.step < self.total_steps
        return self.metrics

    def _loop(self) -> None:
        if self.step == self.total_steps and not self.evaluated:
            self._evaluate()
            self._save()
        clock = time.perf_counter()
        logged = self.step
        awaited = Awaited(self.loader(self.step))
        with tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=not self.accelerator.is_main_process
        ) as bar:
            for batches in awaited:
                if isinstance(batches, Waiting):
                    if self._gives_up(batches):
                        break
                    continue
                self._waits_since = None
                taken = self._train_step(batches)
                bar.update()

                # a log line, with the speed since the last one
                if self.step % self.run.log_every == 0 or self.step == self.total_steps:
                    now = time.perf_counter()
                    speed = (self.step - logged) / (now - clock)
                    waited = awaited.take() / (now - clock)
                    clock = now
                    logged = self.step
                    loss = self._log(taken, speed, waited)
                    bar.set_postfix(loss=f"{loss:.3f}", rows_s=f"{speed * sum(self.batch_sizes.values()):.0f}")

                # checked before the evaluation: a signal during it stops the run one step later
                stopping = self._stopping()
                if self._due(self.run.eval_every_epochs) or self.step == self.total_steps:
                    self._evaluate()
                    clock = time.perf_counter()
                    logged = self.step
                    awaited.take()

                # a checkpoint, after checking that all updates up to this step were finite
                if stopping or self._due(self.run.save_every_epochs) or self.step == self.total_steps:
                    self.guard.settle()
                    self._save()
                if stopping:
                    self.stopped = True  # also on processes that got no signal
                    break

    def _train_step(self, batches: dict[str, Batch]) -> Taken:
        self.student.train()
        self.schedule.step_update(self.step)
        updates = self.objective.updates()
        taken = [self._optimise(objective, batches, apart=len(updates) > 1) for objective in updates]
        self.step += 1
        parts = {name: part for one in taken for name, part in one.parts.items()}
        return Taken(torch.stack([one.loss for one in taken]).sum(), parts, {})

    def _optimise(self, objective: Objective, batches: dict[str, Batch], apart: bool) -> Taken:
        """One optimiser step on the batches of an objective's portions; `apart`: this step has several of them."""
        batches = {name: batches[name] for name in objective.portions}
        progress = self.step / self.total_steps
        self.guard.before(self.step + 1, batches, progress)
        taken = loss_and_gradients(self.accelerator, objective, self.student, batches, progress, self.chunks, apart)
        if apart:
            # zero gradients, so that the moments also update parameters that these portions do not reach
            for parameter in self.student.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

        # the update, then teachers and queues, which also depend on `applied`
        applied = self._update(taken.loss)
        self.optimizer.zero_grad()
        objective.after_step(applied, taken.kept)
        return taken

    def _update(self, loss: torch.Tensor) -> torch.Tensor:
        """Steps the optimiser if loss and gradient are finite. Returns 1 if applied, else 0, on the device."""
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed has stepped in its backward, unless the gradient was not finite
            norm = math.nan if self.optimizer.step_was_skipped else 0.0
            return self.guard.judge(loss, torch.tensor(norm, device=loss.device))

        # the norm of the gradient over all shards, without the fp16 scale
        if self.run.max_grad_norm is not None:
            norm = whole(accelerator.clip_grad_norm_(self.student.parameters(), self.run.max_grad_norm))
        else:
            accelerator.unscale_gradients()
            norm = gradient_norm(self.student.parameters())
        scaler = accelerator.scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        applied = self.guard.judge(loss, norm, scale)
        # torch's mechanism to skip a step without a host synchronisation, used by GradScaler and fused optimisers
        optimizer = self.optimizer.optimizer
        optimizer.found_inf = 1 - applied
        if scaler is None:
            self.optimizer.step()
        else:
            # not scaler.step, which does not check the loss
            optimizer.step()
            scaler.update()
        del optimizer.found_inf
        return applied

    def _gives_up(self, waiting: Waiting) -> bool:
        """
        Whether to save and stop instead of waiting longer for a batch, because of a signal. Logs once a minute what it
        waits for. Raises `DataStalledError` after `data_timeout` seconds.
        """
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = self._reminded = now
        seconds = now - self._waits_since
        late = self.run.data_timeout is not None and seconds >= self.run.data_timeout
        what = (
            f"step {self.step + 1} has been waiting for a batch of {waiting.source} for {seconds:.0f} s; its data "
            f"workers are the processes {list(waiting.workers)}"
        )
        if now - self._reminded >= REMIND:
            self._reminded = now
            logger.warning(what)
        if not (late or self.stopped):
            return False

        # with several processes the others are in the step or wait too, so no state can be gathered
        alone = self.accelerator.num_processes == 1
        if alone and self.step:
            self.guard.settle()
            self._save()
            self.writer.wait()
        if late or not alone:
            kept = f"saved at step {self.step}" if alone and self.step else "the last checkpoint is intact"
            raise DataStalledError(f"{what}; {kept}")
        logger.warning(f"stopped by a signal while {what}")
        return True

    def _due(self, epochs: float) -> bool:
        # at least one step; 0 means never
        every = max(1, round(epochs * self.epoch_steps)) if epochs else 0
        return every > 0 and self.step % every == 0

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops immediately
        self.stopped = True

    def _stopping(self) -> bool:
        # several processes check only at log lines, since it synchronises accelerators
        if self.accelerator.num_processes > 1 and self.step % self.run.log_every:
            return False
        return any_process(self.stopped, self.accelerator.device)

    def _log(self, taken: Taken, speed: float, waited: float) -> float:
        """
        Logs the loss and its parts, averaged over processes; `speed` in steps per second, `waited` the share of time
        in
        which this process waited for batches. An accelerator may have computed in the meantime, so there `waited` is
        an upper bound of the time lost.
        """
        self.guard.settle()
        parts = {"loss": taken.loss, **taken.parts}
        means = self.accelerator.reduce(torch.stack([part.float() for part in parts.values()]), reduction="mean")
        values = dict(zip(parts, means.tolist(), strict=True))
        shown = values["loss"]
        # JSON has no NaN
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values |= {f"{name}_per_second": round(speed * size, 1) for name, size in self.batch_sizes.items()}
        values["waited_per_second"] = round(waited, 3)
        if self.guard.total:
            values["nonfinite_steps"] = self.guard.total
        self._write({"epoch": round(self.step / self.epoch_steps, 4), **values})
        return shown

    def _write(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.log.write({"step": self.step, **values})
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=self.step)

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        failed = None
        with self.whole_model() as model:
            if self.accelerator.is_main_process:
                try:
                    self.metrics = dict(self.evaluate(model))
                except Exception as error:
                    failed = error

        # what was trained up to here is kept, for a run that is resumed; after the last step it evaluates first
        self.evaluated = not any_process(failed is not None, self.accelerator.device)
        if not self.evaluated:
            self.guard.settle()
            self._save()
            raise failed or RuntimeError(f"the first process could not evaluate step {self.step}")
        if self.accelerator.is_main_process:
            tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.items()))
        self._write(self.metrics)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Saves a checkpoint; with `async_checkpoints` it is complete only after `writer.wait` returns."""
        device = self.accelerator.device
        generators = {
            name: gather_without_gradient(value[None].to(device)).cpu() for name, value in random_state().items()
        }

        # collective: all processes gather a sharded state, and the first one writes it
        moments, groups = full_optimizer_state(self.optimizer)
        tensors = {
            "model": full_state(self.model),
            "objective": self.objective.state_dict(),
            "optimizer": moments,
            "random": generators,
        }
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch_steps": self.epoch_steps,
            "arguments": self.arguments.to_dict(),
            "inputs": {} if self.inputs is None else self.inputs.digests,
            "threads": torch.get_num_threads(),
            "optimizer_groups": groups,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "nonfinite": self.guard.state_dict(),
            "metrics": self.metrics,
            "evaluated": self.evaluated,
        }
        if self.run.async_checkpoints:
            write = partial(self._write_checkpoint, copy.deepcopy(state), copied=True)
            self._together(lambda: self.writer.start(tensors, write))
        else:
            self._together(lambda: self._write_checkpoint(state, tensors))

    def _write_checkpoint(self, state: dict[str, Any], tensors: Tensors, copied: bool = False) -> None:
        """Runs on the first process, possibly while training continues, so it only reads constant attributes."""
        check_finite(state["step"], tensors)
        self.log.flush()
        save_checkpoint(self.output_dir, state["step"], tensors, state, self.run.keep_checkpoints, copied)

    def _together(self, action: Callable[[], None]) -> None:
        """Runs a checkpoint action on the first process. If it fails, all processes raise, instead of waiting."""
        error = None
        if self.accelerator.is_main_process:
            try:
                action()
            except (CheckpointError, FloatingPointError) as caught:
                error = caught
        if any_process(error is not None, self.accelerator.device):
            raise error or CheckpointError(f"the first process could not save step {self.step}")

    def _resume(self) -> None:
        path = choose_checkpoint(self.output_dir, self.run.resume, self.accelerator.device)
        if path is not None:
            tensors, state = read_checkpoint(path)
            try:
                self._restore(path, tensors, state)
            except KeyError as error:
                raise CheckpointError(f"{path}: lacks {error}") from error

        # discard files that the run wrote after that step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            sweep(self.output_dir)
            if self.inputs is not None:
                self.inputs.keep(self.output_dir)
            self.log.trim(self.step)
            self.guard.forget(self.step)
            for moved in set_aside(self.output_dir, self.step):
                tqdm.write(f"set aside, since the run continues from step {self.step}: {moved}")

    def _restore(self, path: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        lengths = {name: getattr(self, name) for name in ("total_steps", "epoch_steps")}
        # arguments newer than the checkpoint count as having had their defaults
        then = {**self.arguments.defaults(), **state["arguments"], **{name: state[name] for name in lengths}}
        check_same_run(path, then, {**self.arguments.to_dict(), **lengths}, self.run.allow_changes)
        if self.inputs is not None:
            self.inputs.check(path, state.get("inputs"), self.run.allow_changes)
        threads = torch.get_num_threads()
        if self.accelerator.device.type == "cpu" and state.get("threads", threads) != threads:
            logger.warning(
                f"{path} was computed with {state['threads']} threads per process, now there are {threads}, which sum "
                "in another order: the run resumes up to rounding errors, not bit-exactly"
            )
        load_weights(self.model, tensors["model"], path)
        try:
            self.objective.load_state_dict(tensors["objective"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: the objective's state is not the one expected: {error}") from error
        restore_optimizer(self.optimizer, tensors["optimizer"], state["optimizer_groups"], path)
        self.step = state["step"]
        self.metrics = state["metrics"]
        self.evaluated = state.get("evaluated", True)
        self.guard.load_state_dict(state["nonfinite"])
        self._restore_randomness(tensors["random"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _restore_randomness(self, generators: dict[str, torch.Tensor]) -> None:
        """Restores each process's generators; for another number of processes or kind of device, seeds them anew."""
        processes = len(generators["cpu"])
        seed = self.run.seed + rank() + self.step
        if processes != world_size() or (torch.cuda.is_available() and "cuda" not in generators):
            set_seed(seed)
        if processes == world_size():
            restore_random_state({name: value[rank()] for name, value in generators.items()})
