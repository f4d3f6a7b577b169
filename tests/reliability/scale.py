"""What exactness at scale costs: InfoNCE in blocks, and a step in pieces against the step in one go.

.venv/bin/python tests/reliability/scale.py [contrast|cache] [--output FILE.json]

`contrast`: peak memory of the loss and every gradient over 32,768 x 32,768, each measured in a process of its own;
eight rows are compared with fp64. `cache`: memory of a step against the batch, with pieces of one size, and CPU time
of a pair against the plain step's, by turns. Memory is the process's highest resident set above what it held before.
"""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))


class Peak:
    """MiB of the highest resident set since it was made, above what was resident then. Linux only."""

    def __init__(self):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, or the next allocations would look free
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")

    @staticmethod
    def _read(name: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024

    def mib(self) -> int:
        return round(self._read("VmHWM") - self.before)


def alone(function, *arguments) -> dict[str, Any]:
    """In a fresh process, since the highest resident set of one never falls."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    print(json.dumps(result), flush=True)
    return result


def _answer(sender, function, arguments) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))


def contrast(rows: int, columns: int, width: int, with_ids: bool) -> dict[str, Any]:
    """InfoNCE of `rows` x `columns` forward and backward, all three gradients."""
    from oner.training.objectives.losses import info_nce

    torch.manual_seed(0)
    queries = torch.randn(rows, width, requires_grad=True)
    keys = (queries.detach()[torch.arange(columns) % rows] + torch.randn(columns, width)).requires_grad_()
    temperature = torch.tensor([0.07], requires_grad=True)
    ids = (torch.arange(rows) // 2, torch.arange(columns) % rows // 2) if with_ids else (None, None)
    # the kernels and their buffers, once
    info_nce(queries[:64], keys[:64], temperature).backward()
    queries.grad = keys.grad = temperature.grad = None
    peak, start = Peak(), time.process_time()
    loss = info_nce(queries, keys, temperature, *ids)
    loss.backward()
    figures = {"rows": rows, "columns": columns, "width": width, "ids": with_ids, "loss": round(loss.item(), 5)}
    figures |= {"MiB": peak.mib(), "cosines_MiB": round(rows * columns * 4 / 2**20)}
    figures["cpu_seconds"] = round(time.process_time() - start, 1)
    few = torch.linspace(0, rows - 1, 8).long()
    exact = queries.detach()[few].double().requires_grad_()
    unit = torch.nn.functional.normalize(exact, dim=1)
    logits = unit @ torch.nn.functional.normalize(keys.detach().double(), dim=1).T / temperature.detach().double()
    same = ids[0][few, None] == ids[1][None] if with_ids else torch.arange(columns)[None] == few[:, None]
    targets = same.double() / same.sum(1, keepdim=True)
    (-(targets * logits.log_softmax(1)).sum() / rows).backward()
    error = (queries.grad[few].double() - exact.grad).norm() / exact.grad.norm()
    return {**figures, "gradient_off_fp64": float(f"{error.item():.1e}")}


def build(batch_size: int, directory: str):
    """Student, objective and one batch of the embedded pairs: OneR-small without BatchNorm, at 112 pixels."""
    from tiny_pretraining import tiny_arguments

    import oner  # noqa: F401
    from oner.training.objectives.objective import build_objective
    from oner.training.run.building import build_model, build_processor_and_config
    from oner.training.run.collators import build_collators
    from oner.training.run.loading import RunLoader, open_portions
    from oner.training.run.parsing import parse_arguments

    pairs = ROOT / "examples" / "data" / "emoji" / "train.parquet"
    line = tiny_arguments(pairs, directory, size="small", batch_size=batch_size, vocab_size=2000)
    wanted = {"image_size": 112, "head_norm": "layer", "stem": "linear", "max_text_length": 32}
    line[line.index("--model_config") + 1] = json.dumps(wanted)
    arguments = parse_arguments(line)
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    student = build_model(arguments, config).train()
    objective = build_objective("oner", student, arguments.objective)
    batch = next(iter(RunLoader(arguments, rows, build_collators(arguments, processor, config))(0)))["pairs"]
    return student, objective, {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def memory(batch_size: int, pieces: int, directory: str) -> dict[str, Any]:
    """The highest resident set of a step above what weights, gradients and batch take."""
    from accelerate import Accelerator

    from oner.training.run.gradient_cache import loss_and_gradients

    student, objective, batch = build(batch_size, directory)
    accelerator = Accelerator(cpu=True)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = Peak()
    loss, *_ = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": pieces})
    figures = {"pairs": batch_size, "pieces": pieces, "loss": round(loss.item(), 5), "MiB": peak.mib()}
    return {**figures, "held_MiB": round(peak.before)}


def seconds(batch_size: int, pieces: int, turns: int, directory: str) -> dict[str, Any]:
    """CPU seconds of a pair in one go and in pieces, by turns; medians, and the median of the ratios."""
    from accelerate import Accelerator

    from oner.training.run.gradient_cache import loss_and_gradients

    student, objective, batch = build(batch_size, directory)
    accelerator, taken = Accelerator(cpu=True), {1: [], pieces: []}
    for turn in range(turns + 1):
        for number in taken:
            student.zero_grad()
            start = time.process_time()
            loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": number})
            if turn:  # the first warms up
                taken[number].append((time.process_time() - start) / batch_size)
    ratios = [cached / plain for plain, cached in zip(taken[1], taken[pieces], strict=True)]
    medians = {name: statistics.median(taken[number]) for name, number in (("plain", 1), ("cached", pieces))}
    return {
        "pairs": batch_size,
        "pieces": pieces,
        **{f"{name}_ms_a_pair": round(1000 * value, 1) for name, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["contrast", "cache", "all"], default="all")
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("--size", type=int, default=32768)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    figures, directory = {"torch": torch.__version__, "threads": 1}, "/tmp/oner-scale"
    if asked.what in ("contrast", "all"):
        figures["contrast"] = [alone(contrast, asked.size, asked.size, 256, with_ids) for with_ids in (False, True)]
    if asked.what in ("cache", "all"):
        steps = [(8, 1), (16, 1), (32, 1), (16, 2), (32, 4), (64, 8), (128, 16)]
        figures["memory"] = [alone(memory, *step, directory) for step in steps]
        figures["time"] = [alone(seconds, 16, pieces, asked.turns, directory) for pieces in (2, 4)]
    if asked.output:
        asked.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
