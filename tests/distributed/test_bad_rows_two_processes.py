"""Bad rows with two gloo processes: the same stand-ins as one process takes, one list, and all stop together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pretraining import ROOT, tiny_arguments, write_pairs

from oner.processing.data.quarantine import read_quarantine

# one process's batches, as rows, ids and a digest of the pixels; then the error that ended them, if one did
SCRIPT = """
import hashlib, json, sys
from accelerate import PartialState
from oner.processing.data.quarantine import BadRowsError
from oner.training.run.parsing import parse_arguments
from oner.training.run.building import build_processor_and_config
from oner.training.run.loading import open_portions
from oner.training.run.collators import build_collators
from oner.training.run.loading import RunLoader
state = PartialState(cpu=True)
start, out, *line = sys.argv[1:]
arguments = parse_arguments(line)
rows = open_portions(arguments)
loader = RunLoader(arguments, rows, build_collators(arguments, *build_processor_and_config(arguments, rows)))
with open(f"{out}-{state.process_index}.jsonl", "w") as file:
    try:
        for batch in (step["pairs"] for step in loader(int(start))):
            pixels = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in batch["pixel_values"]]
            file.write(json.dumps([batch["rows"].tolist(), batch["ids"].tolist(), pixels]) + "\\n")
    except BadRowsError as error:
        file.write(json.dumps(str(error)) + "\\n")
"""


def spoil(path: Path, bad) -> Path:
    table = pq.read_table(write_pairs(path))
    pictures = [
        {**picture, "bytes": picture["bytes"][:200]} if row in bad else picture
        for row, picture in enumerate(table["image"].to_pylist())
    ]
    place = table.column_names.index("image")
    column = pa.array(pictures, table.field("image").type)
    pq.write_table(table.set_column(place, table.field("image"), column), path)
    return path


def run(processes: int, start: int, directory: Path, pairs: Path, **options) -> list[list]:
    """What each process wrote."""
    (directory / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = tiny_arguments(pairs, directory, **{"max_bad_rows": 0.9, "one_row_per_id": True, **options})
    command = [*(launch if processes > 1 else []), str(directory / "script.py"), str(start), str(directory / "out")]
    result = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, timeout=600, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    files = [directory / f"out-{number}.jsonl" for number in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def sorted_lines(directory: Path) -> list[str]:
    return sorted(json.dumps(line) for line in read_quarantine(directory / "quarantine.jsonl"))


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.slow
def test_two_processes_take_the_stand_ins_of_one(tmp_path, folders):
    pairs = spoil(tmp_path / "pairs.parquet", set(range(0, 40, 4)))
    (whole,) = run(1, 0, folders[0], pairs)
    parts = run(2, 0, folders[1], pairs)
    joined = [[a + b for a, b in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert joined == whole and len(whole) == 10
    assert all(len(set(ids)) == 8 for _, ids, _ in whole)
    lines = sorted_lines(folders[0])
    assert len(lines) >= 20 and sorted_lines(folders[1]) == lines
    # a resume in the middle cuts the common list once, whoever comes first, and writes it to the same end
    resumed = run(2, 6, folders[1], pairs)
    assert resumed == [part[6:] for part in parts] and sorted_lines(folders[1]) == lines


def test_too_many_stop_all_processes_at_once(tmp_path, folders):
    pairs = spoil(tmp_path / "pairs.parquet", set(range(0, 40, 3)))
    first, second = run(2, 0, folders[1], pairs, max_bad_rows=0.05, log_every=2)
    assert len(first) == len(second) and isinstance(first[-1], str) and isinstance(second[-1], str)
    assert all("rows could not be used; more than max_bad_rows=0.05 allows" in part[-1] for part in (first, second))
    assert first[-1].split(" of ")[0] == second[-1].split(" of ")[0]
    # at a step at which the processes talk to each other
    assert len(first) % 2 == 0
