"""Handles steps with a non-finite loss or gradient: skips the update, saves rows and generators, stops after several.

The result of the check stays on the device, where the optimiser and the teacher use it; the host reads it at the next
log line or checkpoint. So no synchronisation is needed, and no bad update is applied.
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

# fields of a batch that identify its rows
ROW_FIELDS = ("rows", "ids")


class _Step(NamedTuple):
    number: int
    rows: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    progress: float
    verdict: torch.Tensor | None = None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients, 0-dim; NaN or infinite if one of them is, or if their squares overflow fp32."""
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    return whole(norm)


def whole(norm: torch.Tensor) -> torch.Tensor:
    """The whole norm, gathered if the parameters are sharded."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class NonFiniteGuard:
    """
    Called around each step: `before`, then `judge` with the loss and the gradient's norm, and `settle` at log lines.

    Args:
        output_dir: For the `nonfinite-STEP` directories: process-RANK.safetensors has `PORTION.rows` and `PORTION.ids`
            of each batch and the generator states before the step, process-RANK.json the loss, the norm and the step.
        limit (`int`): Number of consecutive non-finite steps that stops the run.
        model, objective: Their batch norm statistics are restored when a step is skipped.
    """

    def __init__(self, output_dir: str | Path, limit: int, model: nn.Module, objective: Objective):
        self.output_dir = Path(output_dir)
        self.limit = limit
        self.model = model
        self.objective = objective
        self.total = 0
        self.in_a_row = 0

        # steps not yet settled, batch norm statistics before the last one, and sentences for the error message
        self._steps: list[_Step] = []
        self._statistics: list[torch.Tensor] | None = None
        self._kept: list[torch.Tensor] = []
        self._reports: list[str] = []

    def before(self, number: int, batches: Mapping[str, Batch], progress: float) -> None:
        """Records the rows and generators before step `number` (from 1). The batches are still on the host."""
        rows = {
            f"{portion}.{name}": batch[name]
            for portion, batch in batches.items()
            for name in ROW_FIELDS
            if name in batch
        }
        self._steps.append(_Step(number, rows, random_state(), progress))
        if self._statistics is None:
            # batch norms update them in the forward, before the loss is known
            networks = [self.model, *(teacher.model for teacher in self.objective.teachers())]
            norms = [one for net in networks for one in net.modules() if isinstance(one, BatchNorm)]
            self._statistics = [value for norm in norms for value in norm.buffers(recurse=False)]
        self._kept = [value.clone() for value in self._statistics]

    def judge(self, loss: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """
        Returns 1 if the update may be applied, else 0; 0-dim, on the device, the same on all processes.

        Args:
            loss, norm (0-dim): This process's loss and the norm of the gradients.
            scale (0-dim, *optional*): Factor of a GradScaler. If gradients overflow with a factor above 1, the scaler
            is
                only searching for a factor: the update is skipped, but not counted as non-finite.
        """
        loss = loss.detach().float()  # ()
        norm = norm.detach().float().to(loss.device)  # ()
        finite = (loss.isfinite() & norm.isfinite()).float()  # ()
        applied = minimum_over_processes(finite)  # (), 0 if one process has 0
        fault = 1 - applied
        if scale is not None:
            fault = fault * (1 - minimum_over_processes((loss.isfinite() & (scale > 1)).float()))
        self._restore(applied)

        # stays on the device until `settle` reads it
        self._steps[-1] = self._steps[-1]._replace(verdict=torch.stack([fault, loss, norm]))  # verdict (3,)
        return applied

    def _restore(self, applied: torch.Tensor) -> None:
        if applied.device.type == "cpu" and applied:
            return
        for value, before in zip(self._statistics, self._kept, strict=True):
            value.copy_(torch.where(applied.to(value.device) > 0, value, before))

    def settle(self) -> None:
        """
        Reads the results since the last call, saves rows and generators of each skipped step, and counts them.

        Raises:
            FloatingPointError: `limit` consecutive steps were skipped; names their losses, rows and directories.
        """
        steps = [step for step in self._steps if step.verdict is not None]
        self._steps = []
        if not steps:
            return
        verdicts = torch.stack([step.verdict for step in steps]).tolist()  # (steps, 3), one synchronisation for all
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
            logger.warning(f"the update was skipped because it is not finite; {self._reports[-1]}")
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row were not finite (max_nonfinite_steps is {self.limit}); "
                    + "; ".join(self._reports)
                )

    def _keep(self, path: Path, step: _Step, loss: float, norm: float) -> None:
        path.mkdir(parents=True, exist_ok=True)
        # each process writes and renames its own files
        stem = f"process-{rank()}"
        content = {**step.rows, **step.random}
        save_file({name: value.contiguous() for name, value in content.items()}, path / f".{stem}.partial")
        os.replace(path / f".{stem}.partial", path / f"{stem}.safetensors")
        # as text, since JSON has no NaN
        verdict = {"step": step.number, "progress": step.progress, "loss": str(loss), "gradient_norm": str(norm)}
        (path / f".{stem}.partial").write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
        os.replace(path / f".{stem}.partial", path / f"{stem}.json")

    def forget(self, step: int) -> None:
        """Removes the directories of steps after `step`, which a resumed run repeats."""
        for path in self.output_dir.glob("nonfinite-*"):
            if path.name.removeprefix("nonfinite-").isdigit() and int(path.name.removeprefix("nonfinite-")) > step:
                shutil.rmtree(path)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = int(state["total"])
        self.in_a_row = int(state["in_a_row"])
