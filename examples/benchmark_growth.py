"""How costs grow with the pairs of a batch, the tokens of a text, the pixels of an image and the rows of a data set.

    python examples/benchmark_growth.py                       all curves, about 15 minutes on one core
    python examples/benchmark_growth.py --curves text rows    some of them; the others keep their last figures

Each point is measured in its own process, on one thread: CPU time, and peak resident memory above the memory of the
process before (Linux only). The figures are written to docs/growth.json, from which the plot and the table of
docs/performance.md are made.

The step is forward and backward of OneR nano (5.8 M parameters) in fp32, at 64 pixels with 12 words per caption, with
LayerNorm heads and a linear stem (so that chunks of a batch give the same result); a curve changes only what it names.
"""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from evidence_table import machine_facts
from page_marks import between_marks
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FIGURES, PAGE = ROOT / "docs" / "growth.json", ROOT / "docs" / "performance.md"
MARKS = "<!-- growth: by examples/benchmark_growth.py -->\n", "<!-- /growth -->"
PIECE = 16  # pairs per forward pass
QUERIES, WIDTH = 256, 32  # for the curve `recall`


class Cost(NamedTuple):
    """CPU seconds, and MiB above the memory of the process before."""

    seconds: float
    mib: float


class Curve(NamedTuple):
    """
    Attributes:
        axis: What grows, in words.
        sizes: The points.
        measure: The cost of a point.
        unit: What `size` counts, for the time per unit; empty if that time is meaningless.
    """

    axis: str
    sizes: Sequence[int]
    measure: Callable[[int], Cost]
    unit: str


def resident(line: str) -> float:
    """Resident MiB of this process according to Linux: `VmRSS` is current, `VmHWM` the peak since its reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(one for one in status.splitlines() if one.startswith(line)).split()[1]) / 1024


def cost(action: Callable[[], object], repeats: int = 1) -> Cost:
    """The median time of the repeats, and their peak memory."""
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, or its reuse would look free
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = resident("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return Cost(statistics.median(seconds), resident("VmHWM") - before)


def step(pairs: int = PIECE, words: int = 12, pixels: int = 64) -> Cost:
    """Forward and backward of `pairs` pairs, in chunks of `PIECE`."""
    from accelerate import Accelerator

    from oner import OneRConfig, OneRForPreTraining
    from oner.training.objectives.objective import Example, build_objective
    from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments
    from oner.training.run.gradient_cache import loss_and_gradients

    torch.manual_seed(0)
    fields = {"vocab_size": 8000, "max_text_length": max(64, words), "head_norm": "layer", "stem": "linear"}
    config = OneRConfig.from_size("nano", image_size=pixels, **fields)
    student = OneRForPreTraining(config).train()
    objective = build_objective("oner", student, OneRObjectiveArguments())
    accelerator = Accelerator(cpu=True)

    def run(count: int) -> None:
        batch = OneRObjective.example_batches(config, [words] * count, Example(0.15, 0.4))["pairs"]
        loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": -(-count // PIECE)})

    run(min(pairs, PIECE))  # warm-up: kernels, gradients
    return cost(lambda: run(pairs), repeats=3 if pairs <= PIECE else 1)


def encoded(form: str) -> bytes:
    """A small grey image as a file."""
    held = BytesIO()
    Image.new("RGB", (16, 16), "grey").save(held, form)
    return held.getvalue()


def order(rows: int) -> Cost:
    """Computing the order of an epoch in batches of 256, up to the first batch."""
    from oner.processing.data.sampling import PairOrder

    return cost(lambda: PairOrder(rows, 256).keys(0, 1))


def table(rows: int) -> Cost:
    """Opening and checking a parquet file with `rows` small images and captions."""
    from oner import open_rows

    cells = {"image": [encoded("PNG")] * rows, "text": [f"picture number {row}" for row in range(rows)]}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "pairs.parquet"
        pq.write_table(pa.table(cells), place)
        return cost(lambda: open_rows(str(place), id_column="__row__"))


def shards(rows: int) -> Cost:
    """Indexing tar shards of 10,000 samples each; a sample is a small JPEG and a caption."""
    from oner import open_rows

    jpeg = encoded("JPEG")
    with tempfile.TemporaryDirectory() as directory:
        for first in range(0, rows, 10_000):
            with tarfile.open(Path(directory) / f"pairs-{first // 10_000:04}.tar", "w") as archive:
                for row in range(first, min(first + 10_000, rows)):
                    for ending, content in (("jpg", jpeg), ("txt", f"picture number {row}".encode())):
                        member = tarfile.TarInfo(f"{row:08}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, BytesIO(content))
        return cost(lambda: open_rows(directory, id_column="__row__"))


def recall(rows: int) -> Cost:
    """The rank of the right row among `rows` rows, for 256 queries."""
    from oner.training.evaluation.metrics import chunked_standing

    generator = np.random.default_rng(0)
    gallery = torch.from_numpy(generator.standard_normal((rows, WIDTH), dtype=np.float32))
    chosen = torch.linspace(0, rows - 1, QUERIES).long()
    return cost(lambda: chunked_standing(gallery[chosen], gallery, chosen, torch.arange(rows)))


DECADES = [10**power for power in range(3, 8)]
CURVES = {
    "batch": Curve("pairs of a step, in pieces of 16", [16, 64, 256, 1024, 4096], step, "pair"),
    "text": Curve("tokens of a caption, 16 pairs", [8, 32, 128, 512], lambda words: step(words=words), ""),
    "picture": Curve("side of a picture in pixels, 16 pairs", [64, 128, 256, 512], lambda side: step(pixels=side), ""),
    "order": Curve("rows: order of an epoch", DECADES, order, "row"),
    "table": Curve("rows: opening a table", DECADES[:4], table, "row"),
    "shards": Curve("rows: indexing shards", DECADES[:3], shards, "row"),
    "recall": Curve("rows: ranks of 256 queries", DECADES, recall, "row"),
}


def measured(name: str, size: int) -> Cost:
    torch.set_num_threads(1)
    return CURVES[name].measure(size)


def measure(names: Sequence[str]) -> Iterator[tuple[str, int, Cost]]:
    context = multiprocessing.get_context("spawn")
    # the peak resident memory of a process never falls, so each point has its own process
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        for name in names:
            for size in CURVES[name].sizes:
                yield name, size, process.submit(measured, name, size).result()


def short(seconds: float) -> str:
    """In ms, or in µs below one ms."""
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.2g} µs"


def markdown(figures: dict[str, Any]) -> str:
    """A line per point."""
    lines = ["| what grows | size | processor seconds | of each | memory, MiB |", "|---|---:|---:|---:|---:|"]
    for name, points in figures["curves"].items():
        curve = CURVES[name]
        for size, (seconds, mib) in points.items():
            each = f"{short(seconds / int(size))} a {curve.unit}" if curve.unit else ""
            lines.append(f"| {curve.axis} | {int(size):,} | {seconds:.3g} | {each} | {mib:,.0f} |")
    machine = figures["machine"]
    where = f"One thread of {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}."
    return "\n".join(["", where, "", *lines, "", ""])


def picture(figures: dict[str, Any], path: Path) -> None:
    """Time over size on logarithmic axes, each curve with a line of proportional growth."""
    from oner.training.evaluation.sheets import new_figure

    drawn = new_figure(9.0, 3.2)
    panels = {"a step": ["batch", "text", "picture"], "rows": ["order", "table", "shards", "recall"]}
    for place, (title, names) in enumerate(panels.items()):
        names = [name for name in names if name in figures["curves"]]
        if not names:
            continue
        axes = drawn.add_axes((0.07 + 0.5 * place, 0.15, 0.4, 0.74))
        for name in names:
            points = figures["curves"][name]
            sizes = [int(size) for size in points]
            seconds = [seconds for seconds, _ in points.values()]
            axes.loglog(sizes, seconds, marker="o", markersize=4, label=CURVES[name].axis.removeprefix("rows: "))
            axes.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color="0.7", linewidth=1)
        axes.set_title(f"{title}: processor seconds (dotted: in proportion)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(fontsize=7, frameon=False)
    drawn.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    options = parser.parse_args(argv)
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {"curves": {}}
    found: dict[str, dict[str, Cost]] = {}
    for name, size, result in measure(options.curves):
        print(f"{CURVES[name].axis}: {size:,}: {result.seconds:.3g} s, {result.mib:,.0f} MiB", flush=True)
        found.setdefault(name, {})[str(size)] = result

    # figures first, then what is made from them
    curves = {name: found.get(name) or known["curves"].get(name) for name in CURVES}
    figures = {"machine": machine_facts(torch.device("cpu")), "curves": {n: c for n, c in curves.items() if c}}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between_marks(page, *MARKS, markdown(figures)), encoding="utf-8")
    picture(figures, PAGE.parent / "pictures" / "growth.png")


if __name__ == "__main__":
    main()
