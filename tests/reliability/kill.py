"""Kills a run again and again, and takes its disk, its workers and its other process away. What is left must go on.

python tests/reliability/kill.py [--kills 200] [--seed 0] [--beside] [--faults disk,export,...] [--writings 40]
                                 [--report FILE]

One process imports everything and forks each run, so that a restart costs a second; the runs are examples/pretrain.py
with a checkpoint after each step. Half of the kills come at random moments, half while a checkpoint is being written.
After each, every checkpoint that there is must be whole and none may be lost; a run that has come to its end must have
the weights, moments, teacher, generators and log of the run that nobody disturbed. SIGKILL leaves what the kernel has
taken over for the disk, so this is no test of the power going out.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from kill_writers import WRITERS, kill_writer
from tiny_pretraining import assert_same_checkpoint, load_example, read_log, tiny_arguments, write_pairs
from tqdm import tqdm

from oner.training.run.checkpoint import PREFIX, find_checkpoint, list_checkpoints, step_of, verify
from oner.training.run.summary import STOPPED

STEPS = 12
PATIENCE = 300  # seconds after which a run counts as hanging
PORT = 29683
FAULTS = ("disk", "read-only", "sigterm", "worker", "process")


class Failed(AssertionError):
    """What must not happen has happened; the message says what."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise Failed(message)


class Runs:
    """Forked runs over the same pairs, with checkpoints `beside` the steps or not; the caller removes `scratch`."""

    def __init__(self, scratch: Path, beside: bool = False):
        self.scratch, self.example, self.beside = scratch, load_example("pretrain"), beside
        self.pairs = write_pairs(scratch / "pairs.parquet")

    def arguments(self, output_dir: Path, workers: int = 0, **options: Any) -> list[str]:
        fixed = {
            "max_steps": STEPS,
            "save_every_epochs": 0.2,
            "keep_checkpoints": 2,
            "num_workers": workers,
            "async_checkpoints": self.beside,
            "model_config": {"attention_dropout": 0.1},
        }
        return [*tiny_arguments(self.pairs, output_dir, **{**fixed, **options}), "--resume"]

    def output(self, output_dir: Path) -> Path:
        """Beside the directories of the runs, not on the disks that are taken away."""
        return self.scratch / f"{'-'.join(output_dir.relative_to(self.scratch).parts)}.txt"

    def start(self, arguments: list[str], prepare: Callable[[], None] = lambda: None, **environment: str) -> int:
        """The process id of a run in a session of its own; what it prints goes to `output`."""
        output = self.output(Path(arguments[arguments.index("--output_dir") + 1]))
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.setsid()
            os.environ.update(environment)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            prepare()
            code = STOPPED if self.example.main(arguments) is None else 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, arguments: list[str], **options: Any) -> tuple[int, str]:
        """A run to its end: its exit status and what it printed."""
        output = self.output(Path(arguments[arguments.index("--output_dir") + 1]))
        output.unlink(missing_ok=True)
        status = wait(self.start(arguments, **options))
        return status, output.read_text(encoding="utf-8", errors="replace")


def wait(child: int, patience: float = PATIENCE) -> int:
    """Its exit status, negative for a signal. A run that hangs is killed and is a failure."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise Failed(f"a run hung for {patience} s")


def is_over(child: int) -> bool:
    """Whether it has ended, without taking its status."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def check_whole(directory: Path, at_least: int = 0) -> int:
    """All checkpoints are whole, and the last is not before `at_least`; returns its step, 0 for none."""
    for path in list_checkpoints(directory):
        verify(path)
    last = find_checkpoint(directory)
    step = 0 if last is None else step_of(last)
    check(step >= at_least, f"{directory}: the last checkpoint is of step {step}, there was one of step {at_least}")
    return step


def check_same_end(reference: Path, directory: Path) -> None:
    assert_same_checkpoint(list_checkpoints(reference)[-1], list_checkpoints(directory)[-1])
    check(read_log(reference) == read_log(directory), f"{directory}: another log than {reference}")
    one, other = (path / "model" / "model.safetensors" for path in (reference, directory))
    check(one.read_bytes() == other.read_bytes(), f"{directory}: other exported weights than {reference}")
    left = [path.name for path in directory.iterdir() if path.name.endswith(".partial")]
    check(not left, f"{directory}: {left} left over")


def wait_for_steps(child: int, directory: Path, steps: int) -> None:
    """Until the run has logged so many steps."""
    log, end = directory / "log.jsonl", time.monotonic() + PATIENCE
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") >= steps):
        check(time.monotonic() < end and not is_over(child), f"{directory}: no step {steps} was reached")
        time.sleep(0.005)


def kill_in_a_write(child: int, directory: Path, chance: random.Random) -> None:
    """SIGKILL up to 15 ms after the first, second or third checkpoint from now has begun to be written."""
    seen: set[str] = set()
    for _ in range(chance.randint(1, 3)):
        fresh: set[str] = set()
        while not fresh and not is_over(child):
            if directory.is_dir():
                fresh = {path.name for path in directory.glob(f".{PREFIX}*.partial")} - seen
            time.sleep(0.0005)
        seen |= fresh
    time.sleep(chance.uniform(0, 0.015))
    os.kill(child, signal.SIGKILL)


def kills(runs: Runs, reference: Path, count: int, seed: int, seconds: float) -> dict[str, Any]:
    """Runs that are killed until they come to their ends, `count` kills in all."""
    chance, told, rounds = random.Random(seed), Counter(), 0
    while told["kills"] < count:
        directory, last = runs.scratch / f"killed-{rounds}", 0
        rounds += 1
        while True:
            arguments = runs.arguments(directory, workers=2 * (told["kills"] % 2))
            child = runs.start(arguments)
            if told["kills"] >= count:
                check(wait(child) == 0, f"{directory}: a run that nobody killed failed, see {runs.output(directory)}")
                break
            if told["kills"] % 2:
                kill_in_a_write(child, directory, chance)
            else:
                end = time.monotonic() + chance.uniform(0, seconds)
                while time.monotonic() < end and not is_over(child):
                    time.sleep(0.001)
                os.kill(child, signal.SIGKILL)
            status = wait(child)
            if status != -signal.SIGKILL:
                check(
                    status == 0, f"{directory}: ended with {status} before it was killed, see {runs.output(directory)}"
                )
                break
            told["kills"] += 1
            step = check_whole(directory, last)
            told["before the first checkpoint"] += step == 0
            # a run that resumes writes a step again; whatever lies half-written was cut short by this kill
            told["inside a checkpoint write"] += bool(list(directory.glob(f".{PREFIX}*.partial")))
            last = step
            if told["kills"] % 20 == 0:
                print(f"{dict(told)}, {rounds} rounds", flush=True)
        check_same_end(reference, directory)
        shutil.rmtree(directory)
    return {**told, "runs that came to their end, equal to the undisturbed": rounds}


def disk_is_full(runs: Runs, reference: Path) -> str:
    """A file system with room for two checkpoints and a half; where none can be mounted, a limit of the file size."""
    size = sum(file.stat().st_size for file in list_checkpoints(reference)[-1].iterdir())
    directory, mounted = runs.scratch / "disk", False
    directory.mkdir()
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", f"size={5 * size // 2}", "none", str(directory)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    limit = max(file.stat().st_size for file in list_checkpoints(reference)[-1].iterdir()) // 2
    arguments = runs.arguments(directory / "run")
    try:
        if mounted:
            status, printed = runs.finish(arguments)
        else:
            status, printed = runs.finish(
                arguments, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            )
        check(status == 1 and "CheckpointError: " in printed and "cannot be written" in printed, printed[-2000:])
        found = [path.name for path in (directory / "run").iterdir() if "checkpoint" in path.name]
        check(len(found) == (2 if mounted else 0), f"expected the earlier checkpoints and nothing half, got {found}")
        check_whole(directory / "run")
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(directory)], check=True)
        check(runs.finish(arguments)[0] == 0, "the run did not go on with room on the disk")
        check_same_end(reference, directory / "run")
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
    return "a tmpfs that was full at the third checkpoint" if mounted else "RLIMIT_FSIZE at half a checkpoint's file"


def directory_is_read_only(runs: Runs, reference: Path) -> str:
    """
    Nothing can be made in the directory from the midst of a run on. Not by a remount, which a run's open lock hinders.
    """
    directory = runs.scratch / "read-only"
    directory.mkdir()

    def immutable(sign: str) -> bool:
        return subprocess.run(["chattr", f"{sign}i", str(directory)], capture_output=True).returncode == 0

    if shutil.which("chattr") is None or not (immutable("+") and immutable("-")):
        return "not run: no directory can be made immutable here"
    arguments = runs.arguments(directory)
    output = runs.output(directory)
    try:
        child = runs.start(arguments)
        wait_for_steps(child, directory, 3)
        immutable("+")
        status = wait(child)
        printed = output.read_text(encoding="utf-8", errors="replace")
        check(status == 1 and "cannot be written" in printed, f"ended with {status}: {printed[-2000:]}")
        # beside the run, the second may be what could not be written
        step = check_whole(directory, at_least=1 if runs.beside else 2)
    finally:
        immutable("-")
    check(runs.finish(arguments)[0] == 0, f"the run did not go on when it could write, see {output}")
    check_same_end(reference, directory)
    return f"a directory made immutable after step {step}"


def sigterm_to_the_group(runs: Runs, reference: Path) -> str:
    """As a scheduler sends it: to the run and to its data workers."""
    directory = runs.scratch / "sigterm"
    arguments, stops = runs.arguments(directory, workers=2, save_every_epochs=99), []
    for further in (2, 1, 2):
        child, steps = runs.start(arguments), further + (stops[-1] if stops else 0)
        wait_for_steps(child, directory, steps)
        os.killpg(child, signal.SIGTERM)
        status = wait(child)
        stops.append(check_whole(directory, at_least=steps))
        # a signal that comes in the last step stops nothing
        expected = 0 if stops[-1] == STEPS else STOPPED
        check(status == expected, f"SIGTERM ended the run with {status}, see {runs.output(directory)}")
        if stops[-1] == STEPS:
            break
    check(runs.finish(arguments)[0] == 0, "the run did not go on after SIGTERM")
    check_same_end(reference, directory)
    return f"saved at steps {stops}"


def worker_is_dead(runs: Runs, reference: Path) -> str:
    """A data worker gets SIGKILL, as from the kernel when memory runs out."""
    directory = runs.scratch / "worker"
    arguments = runs.arguments(directory, workers=2)
    child = runs.start(arguments)
    wait_for_steps(child, directory, 2)
    psutil.Process(child).children()[0].kill()
    status = wait(child)
    printed = runs.output(directory).read_text(encoding="utf-8", errors="replace")
    check(status == 1 and "worker" in printed, f"ended with {status}: {printed[-2000:]}")
    step = check_whole(directory, at_least=1)
    check(
        runs.finish(arguments)[0] == 0,
        f"the run did not go on after its worker was lost, see {runs.output(directory)}",
    )
    check_same_end(reference, directory)
    return f"the run ended with an error, the last checkpoint of step {step}"


def process_is_lost(runs: Runs, reference: Path) -> str:
    """One of two gloo processes gets SIGKILL; the other must end too. Against two that nobody disturbed."""

    def start_two(directory: Path) -> list[int]:
        # evaluation mode of batch norm aside, two halves of a batch have other statistics than the whole: none here
        options = {"model_config": {"attention_dropout": 0.1, "head_norm": "layer", "stem": "linear"}}
        arguments = runs.arguments(directory, **options)
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(PORT),
            "ACCELERATE_USE_CPU": "true",
        }
        return [runs.start(arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]

    whole, directory = runs.scratch / "two", runs.scratch / "lost"
    check([wait(child) for child in start_two(whole)] == [0, 0], f"two processes failed, see {runs.output(whole)}")
    ends = []
    for lost in (1, 0):
        children = start_two(directory)
        last = check_whole(directory)
        wait_for_steps(children[0], directory, last + 3)
        os.kill(children[lost], signal.SIGKILL)
        statuses = [wait(child) for child in children]
        check(statuses[lost] == -signal.SIGKILL and statuses[1 - lost] == 1, f"statuses {statuses}")
        ends.append(check_whole(directory, at_least=last))
    check(
        [wait(child) for child in start_two(directory)] == [0, 0],
        f"the two did not go on, see {runs.output(directory)}",
    )
    check_same_end(whole, directory)
    return f"the other ended with an error; the last checkpoints of steps {ends}"


ACTIONS = dict(
    zip(
        FAULTS,
        (disk_is_full, directory_is_read_only, sigterm_to_the_group, worker_is_dead, process_is_lost),
        strict=True,
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", action="store_true", help="checkpoints are written beside the steps")
    faults = (*FAULTS, *WRITERS)
    parser.add_argument("--faults", default=",".join(faults), help="any of " + ", ".join(faults))
    parser.add_argument("--writings", type=int, default=40, help="kills of each that writes beside training")
    parser.add_argument("--report", type=Path, help="where to write what was counted, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one killed in it would stop the others
    scratch = Path(tempfile.mkdtemp(prefix="oner-kill-"))
    try:
        runs = Runs(scratch, options.beside)
        reference, start = scratch / "reference", time.monotonic()
        status, printed = runs.finish(runs.arguments(reference))
        seconds = time.monotonic() - start
        check(status == 0, printed)
        report = {"steps of a run": STEPS, "seed": options.seed, "checkpoints beside the steps": options.beside}
        if options.kills:
            report |= kills(runs, reference, options.kills, options.seed, seconds)
        for name in filter(None, options.faults.split(",")):
            if name in WRITERS:
                report[name] = kill_writer(name, scratch, options.writings, options.seed)
            else:
                report[name] = ACTIONS[name](runs, reference)
            print(f"{name}: {report[name]}", flush=True)
        report["seconds"] = round(time.monotonic() - start)
    finally:
        if sys.exc_info()[0] is None:
            shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if options.report is not None:
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
