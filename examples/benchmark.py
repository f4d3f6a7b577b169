"""The cost of a training step: throughput, FLOP, MFU, memory and phases, compared with open_clip's CLIP.

    python examples/benchmark.py                               all default cases; fills docs/performance.json and .md
    python examples/benchmark.py --cases oner_bf16 clip_bf16   some cases; the others keep their last figures
    python examples/benchmark.py --batch_size 256              on an accelerator, which is used if available

Each case runs in its own process, so that its memory can be measured, and measures the machine's GEMM peak before and
after its steps. MFU divides by the highest peak of the dtype in the whole run, so that a slow moment of the machine
cannot raise it. On a CPU, cases in fp32 use half the batch.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_steps import STEPS, Batch, Step, padded
from benchmark_visible import measure_visible
from evidence_table import machine_facts
from performance_table import write_tables

from oner.training.cost.flops import counted_flops, gemm_peak, wait_for
from oner.training.objectives.transport import transport_plan
from oner.training.parallel.sharding import full_optimizer_state
from oner.training.private_names import has_fast_bf16, most_alive
from oner.training.publishing.public import plain
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_processor_and_config
from oner.training.run.checkpoint import save_checkpoint
from oner.training.run.checkpoint_writer import CheckpointWriter
from oner.training.run.collators import build_collators
from oner.training.run.data_workers import Waiting
from oner.training.run.host_memory import keep_freed_memory
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.parsing import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "configs" / "benchmark_base_224.yaml"
CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OTHERS = ("loader", "checkpoint", "starts", "transport", "visible")
# batch and codebook size of CODIS (section 4.2.1)
FEATURES, CODES = 512, 4000
# run only if named
LONG = ("oner_bf16_as_is", "clip_fp32")


def device_of_run() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def default_cases(device: torch.device) -> list[str]:
    """All cases except `LONG`, the slowest last; on a CPU without fast bf16, only those in fp32."""
    halves = device.type != "cpu" or has_fast_bf16()
    names = [name for name in STEPS if name not in LONG and (halves or "bf16" not in name)]
    return sorted([*names, *OTHERS], key=lambda name: "compiled" in name)


def open_data(arguments: Arguments) -> tuple[RunLoader, Any]:
    """The run's loader and the model's configuration."""
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    return RunLoader(arguments, rows, build_collators(arguments, processor, config)), config


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def timed(function: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


class Phases:
    """Seconds by name of the phase; synchronises with the device at both ends of each."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def measure_step(name: str, arguments: Arguments, repeats: int) -> dict[str, Any]:
    """One case: seconds of a step, its operations, the machine's GEMM peak, seconds of its phases, memory."""
    device, dtype = device_of_run(), DTYPES["bf16" if "bf16" in name else "fp32"]
    if device.type == "cpu" and "as_is" not in name:
        keep_freed_memory()
    if device.type == "cpu" and "fp32" in name:
        arguments.run.batch_size = max(2, arguments.run.batch_size // 2)  # each pair takes several times as long
    loader, config = open_data(arguments)
    batches = [step["pairs"] for step, _ in zip(loader(0), range(2), strict=False)]
    if "padded" in name:
        batches = [padded(batch, config) for batch in batches]
    first, second = (on_device(batch, device) for batch in batches)
    step: Step = STEPS[name](arguments, config, device)
    peak = gemm_peak(dtype, device, seconds=0.3)
    flops = counted_flops(lambda: step(first))  # this also creates the optimiser's state
    warm = []
    if step.compiled:
        step.compile()
        # after two batch shapes, the graphs are compiled for any shape
        warm += [timed(lambda batch=batch: step(batch), device) for batch in (first, second)]
    seconds = [timed(lambda i=i: step((first, second)[i % 2]), device) for i in range(repeats)]
    phases = Phases(device)
    step.in_phases(second, phases)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "pairs": len(first["ids"]),
        "tokens": step.tokens(second),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "first_seconds": warm,
        "flops": flops,
        "formula_flops": step.formula(first),
        "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
        "memory_bytes": memory,
        "phases": phases.seconds,
        "peak_flops": max(peak, gemm_peak(dtype, device, seconds=0.3)),
    }


def measure_loader(arguments: Arguments, seconds: float = 6.0) -> dict[str, Any]:
    """Pairs per second of the loader alone: in this process, and with one worker per thread."""
    rates = {}
    for workers in (0, max(1, torch.get_num_threads())):
        arguments.data.num_workers = workers
        steps = open_data(arguments)[0](0)
        batches = (step["pairs"] for step in steps if not isinstance(step, Waiting))
        pairs = len(next(batches)["ids"])  # workers have started
        start, read = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            read += pairs
        rates[str(workers)] = read / (time.perf_counter() - start)
    return {"pairs_per_second": rates}


def measure_checkpoint(arguments: Arguments, repeats: int) -> dict[str, Any]:
    """
    Seconds to save a checkpoint of this run (weights, teacher, both moments), with digests, flushed to disk. With a
    background writer, a step waits for `stalls` seconds, the first time longer because memory is allocated, and the
    rest takes `beside` seconds; `stalls_cpu` is the CPU time of the stalls, so it excludes waits for other processes.
    """
    _, config = open_data(arguments)
    step = STEPS["oner_fp32"](arguments, config, CPU)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    moments, _ = full_optimizer_state(step.optimizer)
    runs = Path(arguments.run.output_dir)
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        tensors = {"model": step.model.state_dict(), "objective": step.objective.state_dict(), "optimizer": moments}
        size = sum(value.nbytes for content in tensors.values() for value in content.values())
        write = partial(save_checkpoint, folder, 1, state={"step": 1})
        seconds = [timed(lambda: write(tensors=tensors), CPU) for _ in range(repeats)]
        stalls = []
        busy = []
        beside = []
        with CheckpointWriter() as writer:
            for _ in range(1 + repeats):
                before = time.thread_time()
                stalls.append(timed(lambda: writer.start(tensors, lambda copy: write(tensors=copy, copied=True)), CPU))
                busy.append(time.thread_time() - before)
                beside.append(timed(writer.wait, CPU))
    waits = {"stalls": stalls, "stalls_cpu": busy, "beside": beside}
    return {"seconds": min(seconds), "all_seconds": seconds, "bytes": size, **waits}


def measure_starts(repeats: int = 3) -> dict[str, Any]:
    """Seconds of a whole process, the best of `repeats`: the first fills the file cache."""
    programs = {
        "from transformers import AutoModel, AutoProcessor, pipeline": "",
        "import oner": "",
        "oner --help": "import oner_command_line\noner_command_line.main(['--help'])",
    }
    took: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program or name], capture_output=True, check=True, cwd=ROOT)
            took[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in took.items()}


def measure_transport(repeats: int) -> dict[str, Any]:
    """Seconds of one transport plan of the paper's size, and how many matrices of that size are alive at once."""
    device = device_of_run()
    cost = torch.rand(FEATURES, CODES, generator=torch.Generator().manual_seed(0)).to(device)
    timed(lambda: transport_plan(cost), device)
    seconds = [timed(lambda: transport_plan(cost), device) for _ in range(max(repeats, 3))]
    most = most_alive(lambda: transport_plan(cost))
    return {"seconds": statistics.median(seconds), "bytes": most, "matrices": most / cost.nbytes}


def run_case(name: str, arguments: Arguments, repeats: int) -> dict[str, Any]:
    if name == "loader":
        return measure_loader(arguments)
    if name == "checkpoint":
        return measure_checkpoint(arguments, max(repeats, 3))
    if name == "transport":
        return measure_transport(repeats)
    if name == "visible":
        device = device_of_run()
        return measure_visible(device, device.type != "cpu" or has_fast_bf16(), max(repeats, 3))
    return measure_starts() if name == "starts" else measure_step(name, arguments, repeats)


def in_process(command: list[str], limit: float) -> dict[str, Any]:
    """The JSON that a case printed last, or why there is none; stderr passes through."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default=str(CONFIG), help="Configuration of the run to measure.")
    parser.add_argument("--cases", nargs="+", choices=[*STEPS, *OTHERS], help="Default: all but the long ones.")
    parser.add_argument("--repeats", type=int, default=2, help="Timed steps per case, after warm-up.")
    parser.add_argument("--limit", type=float, default=240.0, help="Seconds after which a case is stopped.")
    parser.add_argument("--output", default=str(ROOT / "docs" / "performance.json"), help="JSON file of figures.")
    parser.add_argument("--tables", default=str(ROOT / "docs" / "performance.md"), help="Page with the tables.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cases one after the other; figures and tables are written after each."""
    options, rest = parse(argv)
    arguments = parse_arguments(["--config", options.config, *rest])
    if options.case:
        print("\n" + json.dumps(run_case(options.case, arguments, options.repeats)))
        return
    output, device = Path(options.output), device_of_run()
    figures = json.loads(output.read_text(encoding="utf-8")) if output.is_file() and options.cases else {"cases": {}}
    figures |= {"machine": machine_facts(device), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    figures["command"] = " ".join(["python examples/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    for name in options.cases or default_cases(device):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--config", options.config, "--case", name]
        figures["cases"][name] = in_process([*command, "--repeats", str(options.repeats), *rest], options.limit)
        output.write_text(json.dumps(plain(figures), indent=1) + "\n", encoding="utf-8")
        write_tables(figures, Path(options.tables))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
