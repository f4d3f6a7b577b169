"""A few of the kills and losses of `make kill-test`, which has them all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def kill(root: Path, report: Path, *options: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(root / "tests" / "reliability" / "kill.py"), "--kills", "6", "--report", str(report),
         *options],
        capture_output=True, text=True, timeout=900, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return json.loads(report.read_text())


@pytest.mark.slow
def test_killed_runs_and_lost_disks_and_workers(root, tmp_path):
    faults = "disk,sigterm,worker,export,index,convert,convert-back"
    told = kill(root, tmp_path / "report.json", "--faults", faults, "--writings", "1")
    assert told["kills"] == 6 and told["inside a checkpoint write"] >= 1
    assert told["runs that came to their end, equal to the undisturbed"] >= 1
    assert {"disk", "sigterm", "worker"} <= told.keys()
    assert all("1 kills" in told[name] for name in ("export", "index", "convert", "convert-back"))


@pytest.mark.slow
def test_runs_that_write_checkpoints_beside_their_steps(root, tmp_path):
    told = kill(root, tmp_path / "report.json", "--beside", "--faults", "disk,read-only,sigterm,worker,process")
    assert told["checkpoints beside the steps"] and told["kills"] == 6 and told["inside a checkpoint write"] >= 1
    assert told["runs that came to their end, equal to the undisturbed"] >= 1
    assert {"disk", "read-only", "sigterm", "worker", "process"} <= told.keys()
