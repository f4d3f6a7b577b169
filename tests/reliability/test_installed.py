"""A short walk of `make wheel-test`: 60 pictures, the packages of this environment, no network."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_wheel_does_what_the_pages_say_far_from_a_checkout(root, tmp_path):
    report = tmp_path / "report.json"
    program = str(root / "tests" / "reliability" / "installed.py")
    result = subprocess.run(
        [sys.executable, program, "--pictures", "60", "--report", str(report)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    told = json.loads(report.read_text())
    assert set(told["aims"]) == {"first answer", "three commands"}
    assert sum(step["kind"] == "mistake" for step in told["steps"]) >= 10
