"""A step whose loss or gradient is not finite: no update, its rows and generators kept, and the run's end after a few.

The verdict stays on the device, where the optimiser and the teacher obey it; the host reads it at the next line of the
log or checkpoint. So nothing waits, and nothing is applied meanwhile.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from oner.training.objectives.objective import Batch, Objective
from oner.training.parallel.distributed import minimum_over_processes, rank
from oner.training.private_names import BatchNorm

from .checkpoint import random_state

logger = logging.get_logger(__name__)

# the names of the collator by which a batch is found again
ROW_FIELDS = ("rows", "ids")


class _Step(NamedTuple):
    number: int
    rows: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    progress: float
    verdict: torch.Tensor | None = None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients, 0-dim; NaN or infinite as soon as one of them is, or as their squares overflow fp32."""
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    return whole(norm)


def whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm of sharded parameters, brought together."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class NonFiniteGuard:
    """
    Called around each step: `before`, then `judge` with the loss and the gradient's norm, and `settle` at the log.

    Args:
        output_dir: `nonfinite-STEP` directories are made here: process-RANK.safetensors holds `PORTION.rows` and
            `PORTION.ids` of each batch and the generators as they were before the step, process-RANK.json the loss,
            the norm and the step.
        limit (`int`): So many steps in a row stop the run.
        model, objective: Their batch norms' statistics are put back when a step is not applied.
    """

    def __init__(self, output_dir: str | Path, limit: int, model: nn.Module, objective: Objective):
        self.output_dir = Path(output_dir)
        self.limit = limit
        self.model = model
        self.objective = objective
        self.total = 0
        self.in_a_row = 0

        # steps without a verdict yet, what batch norms held before the last one, and the sentences for the error
        self._steps: list[_Step] = []
        self._statistics: list[torch.Tensor] | None = None
        self._kept: list[torch.Tensor] = []
        self._reports: list[str] = []

    def before(self, number: int, batches: Mapping[str, Batch], progress: float) -> None:
        """Remembers what step `number` (the first is 1) begins with. The batches still lie on the host."""
        rows = {
            f"{portion}.{name}": batch[name]
            for portion, batch in batches.items()
            for name in ROW_FIELDS
            if name in batch
        }
        self._steps.append(_Step(number, rows, random_state(), progress))
        if self._statistics is None:
            # a batch norm writes them in the forward, before anybody can know that the loss is not finite
            networks = [self.model, *(teacher.model for teacher in self.objective.teachers())]
            norms = [one for net in networks for one in net.modules() if isinstance(one, BatchNorm)]
            self._statistics = [value for norm in norms for value in norm.buffers(recurse=False)]
        self._kept = [value.clone() for value in self._statistics]

    def judge(self, loss: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """
        1 where the update may be applied, 0 where not, 0-dim, on the device, the same on all processes.

        Args:
            loss, norm (0-dim): This process's loss and the norm of the gradients.
            scale (0-dim, *optional*): Factor of a GradScaler. Gradients that overflow under a factor above 1 are the
                scaler's own search: the update is not applied, but it is no fault and not counted.
        """
        loss = loss.detach().float()  # ()
        norm = norm.detach().float().to(loss.device)  # ()
        finite = (loss.isfinite() & norm.isfinite()).float()  # ()
        applied = minimum_over_processes(finite)  # (), 0 as soon as one process has 0
        fault = 1 - applied
        if scale is not None:
            fault = fault * (1 - minimum_over_processes((loss.isfinite() & (scale > 1)).float()))
        self._restore(applied)

        # the verdict stays on the device until `settle` reads it
        self._steps[-1] = self._steps[-1]._replace(verdict=torch.stack([fault, loss, norm]))  # verdict (3,)
        return applied

    def _restore(self, applied: torch.Tensor) -> None:
        if applied.device.type == "cpu" and applied:
            return
        for value, before in zip(self._statistics, self._kept, strict=True):
            value.copy_(torch.where(applied.to(value.device) > 0, value, before))

    def settle(self) -> None:
        """
        Reads the verdicts since the last time, keeps what belongs to each step that was not applied, and counts.

        Raises:
            FloatingPointError: `limit` steps in a row; names their numbers, losses, rows and directories.
        """
        steps = [step for step in self._steps if step.verdict is not None]
        self._steps = []
        if not steps:
            return
        verdicts = torch.stack([step.verdict for step in steps]).tolist()  # (steps, 3), one wait for all
        for step, (fault, loss, norm) in zip(steps, verdicts, strict=True):
            if not fault:
                self.in_a_row = 0
                self._reports = []
                continue
            self.total += 1
            self.in_a_row += 1
            path = self.output_dir / f"nonfinite-{step.number:08d}"
            try:
                self._keep(path, step, loss, norm)
            except (OSError, SafetensorError) as error:
                logger.warning(f"{path}: cannot be written: {error}")
            rows = {name: value.tolist()[:8] for name, value in step.rows.items() if name.endswith(".rows")}
            self._reports.append(f"step {step.number}: loss {loss}, gradient norm {norm}, first {rows}, see {path}")
            logger.warning(f"the update was not applied, for it is not finite; {self._reports[-1]}")
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row were not finite (max_nonfinite_steps is {self.limit}); "
                    + "; ".join(self._reports)
                )

    def _keep(self, path: Path, step: _Step, loss: float, norm: float) -> None:
        path.mkdir(parents=True, exist_ok=True)
        # renamed file by file, since each process writes its own
        stem = f"process-{rank()}"
        content = {**step.rows, **step.random}
        save_file({name: value.contiguous() for name, value in content.items()}, path / f".{stem}.partial")
        os.replace(path / f".{stem}.partial", path / f"{stem}.safetensors")
        # as text, for JSON has no NaN
        verdict = {"step": step.number, "progress": step.progress, "loss": str(loss), "gradient_norm": str(norm)}
        (path / f".{stem}.partial").write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
        os.replace(path / f".{stem}.partial", path / f"{stem}.json")

    def forget(self, step: int) -> None:
        """Removes the directories of steps after `step`, which a resumed run takes again."""
        for path in self.output_dir.glob("nonfinite-*"):
            if path.name.removeprefix("nonfinite-").isdigit() and int(path.name.removeprefix("nonfinite-")) > step:
                shutil.rmtree(path)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = int(state["total"])
        self.in_a_row = int(state["in_a_row"])
