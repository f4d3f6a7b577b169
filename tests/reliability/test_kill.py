"""A few of the kills and losses of `make kill-test`, which has them all."""

import json
import os
import subprocess
import sys


def test_killed_runs_and_lost_disks_and_workers(root, tmp_path):
    report = tmp_path / "report.json"
    result = subprocess.run(
        [sys.executable, str(root / "tests" / "reliability" / "kill.py"), "--kills", "6",
         "--faults", "disk,sigterm,worker,export,index,convert,convert-back", "--writings", "3",
         "--report", str(report)],
        capture_output=True, text=True, timeout=900, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    told = json.loads(report.read_text())
    assert told["kills"] == 6 and told["inside a checkpoint write"] >= 1
    assert told["runs that came to their end, equal to the undisturbed"] >= 1
    assert {"disk", "sigterm", "worker"} <= told.keys()
    assert all("3 kills" in told[name] for name in ("export", "index", "convert", "convert-back"))
