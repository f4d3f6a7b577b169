"""Goodput: the share of the time that a run spends in steps that stay, while it is killed once a minute.

python tests/reliability/goodput.py [--minutes 30] [--seconds 60] [--epochs 20] [--forked] [--waits] [--report FILE]

The run is examples/pretrain.py on forty pairs, with a checkpoint after every `--epochs` epochs of five steps. A kill
loses half of that time on average, so the best interval is the square root of 2 x the time of a checkpoint x the time
between kills (Young, 1974): for a tenth of a second and a minute, 3.5 s. The run gets SIGKILL `--seconds` after each
start and is started again with --resume, as a process of its own: a supervisor that has imported everything and forks
the run is `--forked`. What stays at the end is the last whole checkpoint. Its steps, at the median seconds of a step,
are the good part of the time; the rest went into starts, into steps that were lost with a process and taken again, and
into checkpoints.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kill import Runs, check, check_whole, is_over, wait
from tiny_pretraining import ROOT

BATCH = 8


def start_afresh(arguments: list[str], output: Path) -> int:
    """The process id of a run that imports everything itself."""
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *arguments]
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True).pid


def logged(directory: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's log."""
    log = directory / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def live_once(runs: Runs, arguments: list[str], directory: Path, forked: bool, end: float) -> int:
    """A start, and a kill at the time `end`; the last step that it logged."""
    output = runs.output(directory)
    child = runs.start(arguments) if forked else start_afresh(arguments, output)
    while time.monotonic() < end:
        check(not is_over(child), f"a run ended before it was killed, see {output}")
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    wait(child)
    return max((line["step"] for line in logged(directory)), default=0)


def goodput(runs: Runs, minutes: float, seconds: float, epochs: int, forked: bool) -> dict[str, Any]:
    """What a run keeps that is killed every `seconds` and saved every `epochs`."""
    directory = runs.scratch / "goodput"
    arguments = runs.arguments(directory, max_steps=10**6, save_every_epochs=epochs, batch_size=BATCH)
    kills = 0
    lost = 0
    kept = 0
    begin = time.monotonic()
    while (now := time.monotonic()) < begin + 60 * minutes:
        reached = live_once(runs, arguments, directory, forked, min(now + seconds, begin + 60 * minutes))
        kept = check_whole(directory, at_least=kept)
        kills += 1
        lost += reached - kept
    total = time.monotonic() - begin

    # a step's own time: lines after a checkpoint hold it too, which the median does not see
    times = [BATCH / line["pairs_per_second"] for line in logged(directory)]
    check(bool(times), f"no step within {seconds} s of a start, {kills} times: see {runs.output(directory)}")
    step = statistics.median(times)
    return {
        "kills": kills,
        "seconds": round(total, 1),
        "starts": "forked" if forked else "afresh",
        "epochs between checkpoints": epochs,
        "checkpoints beside the steps": runs.beside,
        "steps kept": kept,
        "steps lost": lost,
        "seconds a step": round(step, 4),
        "goodput": round(kept * step / total, 4),
        "share of lost steps": round(lost * step / total, 4),
        "share of starts and checkpoints": round(1 - (kept + lost) * step / total, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="from a start to its kill")
    parser.add_argument("--epochs", type=int, default=20, help="between checkpoints, of five steps each")
    parser.add_argument("--forked", action="store_true", help="runs are forks of this process, which imports once")
    parser.add_argument("--waits", action="store_true", help="steps wait for the checkpoints")
    parser.add_argument("--report", type=Path, help="where to write what was counted, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    scratch = Path(tempfile.mkdtemp(prefix="oner-goodput-"))
    try:
        runs = Runs(scratch, not options.waits)
        told = goodput(runs, options.minutes, options.seconds, options.epochs, options.forked)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(told, indent=1))
    if options.report is not None:
        options.report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
