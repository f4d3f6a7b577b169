"""Resuming a run: chooses the checkpoint, checks that it belongs to the same run, and trims the log."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from oner.training.parallel.distributed import gather_without_gradient, rank

from .checkpoint import CheckpointError, find_checkpoint, list_checkpoints, step_of, verify

logger = logging.get_logger(__name__)

# arguments that may differ when a run is resumed, since no result depends on them
HARMLESS = {
    "resume", "allow_changes", "output_dir", "log_every", "report_to", "keep_checkpoints", "num_workers",
    "max_bad_rows",
    "max_nonfinite_steps", "export_dtype", "licence", "language", "repo_id", "data_licence", "attribution",
    "run_name", "tracker_project", "data_timeout", "async_checkpoints",
}  # fmt: skip


def choose_checkpoint(output_dir: Path, resume: str | None, device: torch.device) -> Path | None:
    """
    The checkpoint to resume from, verified once by the first process for all; None to start at step 0.

    Args:
        resume: None, `auto` for the last intact checkpoint of `output_dir` if any, or a checkpoint's path.

    Raises:
        CheckpointError: the given checkpoint is damaged; all checkpoints are damaged; or `resume` is None, but
            `output_dir` contains checkpoints, with which those of a new run would be mixed.
    """
    checkpoints = list_checkpoints(output_dir)

    # a new run must not mix its checkpoints with those of another
    if resume is None:
        if checkpoints:
            raise CheckpointError(
                f"{output_dir} contains {checkpoints[-1].name} of an earlier run: resume it with --resume, choose "
                "another output_dir, or remove it"
            )
        return None
    nothing = -1
    failed = -2
    choice = nothing
    error = None
    if rank() == 0:
        try:
            path = find_checkpoint(output_dir) if resume == "auto" else Path(resume)
            if resume != "auto":
                verify(path)
            choice = nothing if path is None else (step_of(path) if resume == "auto" else 0)
        except CheckpointError as caught:
            choice = failed
            error = caught

    # all processes raise, or use the same checkpoint
    choice = int(gather_without_gradient(torch.tensor([choice], device=device))[0])
    if choice == failed:
        raise error or CheckpointError(f"the first process found no intact checkpoint with --resume {resume}")
    if choice == nothing:
        return None
    if resume != "auto":
        return Path(resume)
    return next(path for path in list_checkpoints(output_dir) if step_of(path) == choice)


def check_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any], allow_changes: bool) -> None:
    """Raises `CheckpointError` that lists all relevant arguments that differ, with both values."""
    # through JSON, as in the checkpoint, where tuples are lists
    now = json.loads(json.dumps(dict(now)))
    changed = [
        f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
        for name in sorted({*then, *now} - HARMLESS)
        if then.get(name) != now.get(name)
    ]
    if not changed:
        return
    if not allow_changes:
        raise CheckpointError(
            f"{path} belongs to another configuration; " + "; ".join(changed) + " (allow_changes resumes anyway)"
        )
    logger.warning(f"resumes {path} with another configuration; " + "; ".join(changed))


class RunLog:
    """log.jsonl: one JSON object per line, each with its `step`. Raises `CheckpointError` if it cannot be written."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, values: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written, the last checkpoint is intact: {error}") from error

    def flush(self) -> None:
        """Flushes the log to disk, so that no checkpoint is ahead of it."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def trim(self, step: int) -> None:
        """Removes the lines after `step`, which a resumed run writes again, and a line truncated by a crash."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)

        # written under another name and renamed, so that a kill leaves the old log
        whole = [line for line in lines if self._is_whole(line) and json.loads(line)["step"] <= step]
        if whole != lines:
            beside = self.path.with_name(f".{self.path.name}.partial")
            beside.write_text("".join(whole), encoding="utf-8")
            os.replace(beside, self.path)

    @staticmethod
    def _is_whole(line: str) -> bool:
        try:
            content = json.loads(line)
        except ValueError:
            return False
        return line.endswith("\n") and isinstance(content, dict) and isinstance(content.get("step"), int)
