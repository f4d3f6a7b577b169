"""All checks that need an accelerator, in one run of a few minutes and one JSON, most important first.

    python examples/gpu_check.py --output gpu.json                         all parts, on the available accelerator
    python examples/gpu_check.py --device cpu --tiny --output tiny.json    the same code with small models, anywhere

Parts: `speed` (training steps of the base models and of CLIP, torchao's fp8, and the card's peaks), `checks` (the
tests marked `gpu`) and `training` (a small OneR on composed scenes). Each part runs in its own process with a time
limit; if it fails or is stopped, its figures so far are kept, and the next part runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for machines on which oner is not installed
# parts that run in parallel, in this order: speed is measured alone
ROUNDS = (("speed",), ("checks", "training"))
PARTS = [part for parts in ROUNDS for part in parts]
LIMITS = {"speed": 280.0, "checks": 150.0, "training": 200.0}
Figures = dict[str, Any]


def run_checks(output: Path, tiny: bool) -> Iterator[tuple[str, Any]]:
    """pytest for the tests marked `gpu`: each outcome as it comes, then the output of failed tests."""
    report = output.with_suffix(".xml")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu and not slow",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
    ]
    command += ["tests/run/test_gpu.py", "tests/run/test_nonfinite.py", f"--junitxml={report}"]
    if not tiny and find_spec("xdist"):
        command += ["-n", "8"]  # most of their time is start-up and compilation, on the host
    outcomes: dict[str, str] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            words = line.split()
            outcome = next((word for word in words if word in ("PASSED", "FAILED", "ERROR", "SKIPPED")), None)
            name = next((word for word in words if "::" in word), None)
            if outcome and name:
                outcomes[name.split("::")[1]] = outcome
                yield "outcomes", outcomes
    yield "exit_status", process.returncode
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = {case.get("name"): [*case.iter("failure"), *case.iter("error")] for case in cases}
    yield "failures", {name: (found[0].text or "")[-3000:] for name, found in wrong.items() if found}
    yield "seconds", {case.get("name"): float(case.get("time", 0)) for case in cases}


def figures_of(part: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yields (name, figures) of a part, as they come."""
    device, output = torch.device(options.device), Path(options.output)
    if part == "checks":
        return run_checks(output, options.tiny)
    if part == "prepare":
        from gpu_check_training import prepare

        os.nice(10)
        workers = 1 if options.tiny else max(1, (os.cpu_count() or 2) - 4)
        sizes = (200, 40) if options.tiny else (options.scenes_count, 1000)
        return prepare(Path(options.work), Path(options.scenes), *sizes, workers)
    if part == "training":
        from gpu_check_training import training

        return training(device, options.tiny, Path(options.work), options.seconds, Path(options.model))
    from gpu_check_speed import speed

    return speed(device, options.tiny, options.cases)


def run_part(part: str, options: argparse.Namespace) -> None:
    """Runs one part in this process; its file is rewritten after each figure."""
    found: Figures = {}
    start = time.perf_counter()
    try:
        for name, value in figures_of(part, options):
            found[name] = value
            write(Path(options.output), found)
            print(f"{part} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001  recorded in the file, so that the other parts run
        found |= {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]}
    found["wall_seconds"] = time.perf_counter() - start
    write(Path(options.output), found)


def write(path: Path, figures: Figures) -> None:
    """Writes the file atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def machine(device: torch.device) -> Figures:
    """The device and the versions that the figures belong to."""
    import accelerate
    import transformers

    facts = {"device": device.type, "python": sys.version.split()[0], "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "accelerate": accelerate.__version__, "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "memory_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
        facts["multiprocessors"] = card.multi_processor_count
    return facts


class Parts:
    """The processes of the parts, each with its own file and time limit; their child processes are killed too."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder

    def start(self, part: str) -> subprocess.Popen:
        options = self.options
        command = [sys.executable, __file__, "--part", part, "--output", str(self.folder / f"{part}.json")]
        command += ["--device", options.device, "--work", str(self.folder / "scenes"), "--scenes", options.scenes]
        command += ["--scenes_count", str(options.scenes_count), "--seconds", str(options.seconds)]
        command += ["--model", options.model, *(["--tiny"] if options.tiny else [])]
        command += ["--cases", *options.cases] if options.cases else []
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    def prepare(self) -> subprocess.Popen:
        """Draws scenes during the first round, on the cores that it leaves idle."""
        return self.start("prepare")

    def finish(self, part: str, process: subprocess.Popen, limit: float) -> Figures:
        """Waits for a part and returns its figures, with an `error` if it failed or was stopped."""
        stopped = False
        try:
            process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            stopped = True
        end(process)
        path = self.folder / f"{part}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if stopped:
            found["error"] = "stopped at its limit"
        elif process.returncode:
            found.setdefault("error", f"exit status {process.returncode}")
        return found


def end(process: subprocess.Popen) -> None:
    """Kills the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_all(options: argparse.Namespace, folder: Path) -> Figures:
    """Runs all rounds; the file of all figures is written after each part."""
    figures: Figures = {"command": " ".join(["python", *sys.argv]), "machine": machine(torch.device(options.device))}
    parts, start = Parts(options, folder), time.perf_counter()
    limits = dict(zip(LIMITS, options.limits, strict=True)) if options.limits else LIMITS
    preparing = parts.prepare() if "training" in options.parts else None
    try:
        for together in ROUNDS:
            running = {part: parts.start(part) for part in together if part in options.parts}
            began = time.perf_counter()
            for part, process in running.items():
                figures[part] = parts.finish(part, process, limits[part] - (time.perf_counter() - began))
                figures["wall_seconds"] = time.perf_counter() - start
                write(Path(options.output), figures)
    finally:
        if preparing is not None:
            end(preparing)
    return figures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", default="gpu.json", help="JSON file of all figures.")
    parser.add_argument("--model", default="gpu_model.tar", help="Archive of the trained model.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="Small models and few steps, for a test.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", help="Only these cases of the part speed.")
    parser.add_argument("--limits", nargs=len(LIMITS), type=float, metavar="SECONDS", help=f"For {', '.join(LIMITS)}.")
    parser.add_argument("--seconds", type=float, default=70.0, help="Training time of the small model.")
    parser.add_argument("--scenes", default=str(ROOT / "examples" / "data"), help="Folder with scenes.py.")
    parser.add_argument("--scenes_count", type=int, default=400_000, help="Number of scenes to draw.")
    parser.add_argument("--part", choices=[*PARTS, "prepare"], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all parts or, in a child process, one of them."""
    options = parse(argv)
    for name in ("output", "model", "scenes"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    if options.part:
        run_part(options.part, options)
        return
    if options.tiny:
        options.seconds = 1.0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        run_all(options, Path(folder))


if __name__ == "__main__":
    main()
