"""The end of a process that talked to others: gloo's threads are gone before the interpreter is."""

import os
import subprocess
import sys

from tiny_pretraining import ROOT

# what is registered first is called last
SCRIPT = """
import atexit
import torch
import torch.distributed as dist
atexit.register(lambda: print("left" if not dist.is_initialized() else "still there"))
import oner.training.parallel.distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print("worked")
"""


def test_gloo_is_left_before_the_interpreter_ends():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.stdout.split("\n")[:-1] == ["worked", "left"], result.stderr[-2000:]
    assert result.returncode == 0
