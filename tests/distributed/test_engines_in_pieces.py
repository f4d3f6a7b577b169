"""Cached gradients under each parallel engine: two processes, a queue beside OneR's losses, one piece against two."""

import json
import os
import subprocess
import sys

import pytest
from engine_runs import ENGINES
from tiny_pretraining import ROOT, read_log, tiny_arguments, write_pairs

OPTIONS = {
    "losses": ["itc", "cmc", "mlm", "mim"],
    "match_ids": True,
    "max_steps": 4,
    "model_config": {"head_norm": "layer", "stem": "linear"},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_a_run_in_two_pieces_is_the_run_in_one(engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    pairs, jobs = write_pairs(tmp_path / "pairs.parquet"), []
    for chunks in (1, 2):
        arguments = tiny_arguments(pairs, tmp_path / str(chunks), gradient_cache_chunks=chunks, **OPTIONS)
        jobs.append({"engine": engine, "arguments": arguments, "limit": 400})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "distributed" / "engine_runs.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         str(tmp_path / "jobs.json")],
        capture_output=True, text=True, timeout=900, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read_log(tmp_path / str(chunks)) for chunks in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == 4 and len({line["loss"] for line in logs[0]}) == 4
    for line, other in zip(*logs, strict=True):
        assert "queue" in line and other == pytest.approx(line, rel=1e-5, abs=1e-7)
