"""The end of a process that talked to others: gloo's threads are gone, or at rest, before the interpreter is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pretraining import ROOT

from oner.training.parallel.distributed import _name_and_state

# what is registered first is called last
SCRIPT = """
import atexit
from pathlib import Path
import torch
import torch.distributed as dist

def tell():
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("still there" if dist.is_initialized() else "left", names.count("pt_gloo_runloop"))

atexit.register(tell)
import oner.training.parallel.distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
{end}
print("worked")
"""
ENDS = {"forgotten": "del model", "in a cycle": "cycle = [model]; cycle.append(cycle); del model, cycle", "held": ""}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads here")
@pytest.mark.parametrize("end", ENDS)
def test_gloo_is_left_before_the_interpreter_ends(end):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT.format(end=ENDS[end])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    threads = 2 if end == "held" else 0
    assert result.stdout.split("\n")[:-1] == ["worked", f"left {threads}"], result.stderr[-2000:]
    assert result.returncode == 0


def test_a_threads_name_may_hold_what_encloses_it(tmp_path):
    (tmp_path / "stat").write_text("12 (a (b) c) R 1 12 12 0 -1\n")
    assert _name_and_state(tmp_path / "stat") == ("a (b) c", "R")
    assert _name_and_state(tmp_path / "ended") == ("", "")
