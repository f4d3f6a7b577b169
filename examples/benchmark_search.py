"""The cost of search among a million items: query time, memory, build time, and the recall of faiss.

    python examples/benchmark_search.py                          exact and faiss's ivf, on two kinds of vectors
    python examples/benchmark_search.py --rows 100000 --backends exact ivf hnsw --threads 1

Two sets of unit vectors: `random`, without any structure, the hardest case; and `clustered`, a mixture of Gaussians
around 2,000 centres in 32 directions of the space, closer to a model's embeddings. Queries are drawn like the rows but
are not among them. Recall is the share of the exact ten nearest that are found. CPU time is given beside wall-clock
time, because other processes affect it less. Prints a line of JSON per result, and a table.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oner.processing.retrieval_backend import build_backend
from oner.processing.retrieval_index import RetrievalIndex

KINDS = ("random", "clustered")
BACKENDS = ("exact", "ivf", "hnsw")
CENTRES, DIRECTIONS, SPREAD = 2000, 32, 0.7
AT_ONCE = 50000  # rows drawn at a time
GIB = 2**30


def vectors(kind: str, count: int, width: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields unit vectors, (m, P) fp32, `count` in total. The seed determines the rows, not the mixture."""
    mixture = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, DIRECTIONS, generator=mixture)
    basis = torch.randn(DIRECTIONS, width, generator=mixture)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, AT_ONCE):
        some = min(AT_ONCE, count - start)
        rows = torch.randn(some, width, generator=generator)
        if kind == "clustered":
            chosen = torch.randint(CENTRES, (some,), generator=generator)
            inside = centres[chosen] + SPREAD * torch.randn(some, DIRECTIONS, generator=generator)
            rows = inside @ basis + rows
        yield torch.nn.functional.normalize(rows, dim=1)


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `action`, and its milliseconds of wall-clock and of CPU time."""
    clock = time.perf_counter()
    processor = time.process_time()
    result = action()
    return result, 1000 * (time.perf_counter() - clock), 1000 * (time.process_time() - processor)


def each_query(search: Callable[[torch.Tensor], Any], queries: torch.Tensor) -> tuple[list[Any], float, float]:
    """Runs the queries one by one: results, and median milliseconds of wall-clock and of CPU time."""
    search(queries[:1])
    asked = [timed(lambda query=query: search(query)) for query in queries.split(1)]
    results, clocks, processors = map(list, zip(*asked, strict=True))
    return results, statistics.median(clocks), statistics.median(processors)


def peak() -> float:
    """Peak memory of the process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure(kind: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result per backend."""
    index = RetrievalIndex(options.width)
    for rows in vectors(kind, options.rows, options.width, seed=1):
        index.add(rows, range(len(index), len(index) + len(rows)))
    (queries,) = vectors(kind, options.queries, options.width, seed=2)
    common = {"vectors": kind, "rows": options.rows, "width": options.width, "threads": torch.get_num_threads()}

    # compared with torch's product of the same vectors in fp32
    few = queries[: options.exact_queries]
    transposed = index.embeddings.float().T  # (P, n)
    _, product, _ = each_query(lambda query: query @ transposed, few)
    transposed = None
    _, clock, processor = each_query(index.search, few)
    _, filtered, _ = timed(lambda: index.search(few[:1], where="item>=1"))
    size = index.embeddings.nbytes / GIB
    yield {**common, "backend": "exact", "ms": clock, "processor_ms": processor, "recall": 1.0, "memory_gib": size,
           "torch_product_ms": product, "filtered_ms": filtered}  # fmt: skip
    truth = index.search(queries)[1]  # (q, 10)

    with tempfile.TemporaryDirectory(dir=options.scratch) as directory:
        index.save(directory)
        for name in (one for one in options.backends if one != "exact"):
            backend, built, worked = timed(
                partial(build_backend, "faiss", directory, kind=name, recall=options.recall)
            )
            results, clock, processor = each_query(backend.search, queries)
            found = torch.cat([indices for _, indices in results])  # (q, 10)
            share = (truth[:, :, None] == found[:, None, :]).any(-1).float().mean()
            file = next(Path(directory).glob("faiss-*.index"))
            yield {**common, "backend": name, "ms": clock, "processor_ms": processor, "recall": float(share),
                   "memory_gib": size + file.stat().st_size / GIB, "build_s": built / 1000,
                   "build_processor_s": worked / 1000, "effort": backend.effort, "peak_gib": peak()}  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| vectors | backend | ms a query (processor) | recall@10 | memory, GiB | build, s (processor) |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        effort = f" ({one['effort']})" if "effort" in one else ""
        build = f"{one['build_s']:.0f} ({one['build_processor_s']:.0f})" if "build_s" in one else "0"
        lines.append(
            f"| {one['vectors']} | {one['backend']}{effort} | {one['ms']:.1f} ({one['processor_ms']:.1f}) "
            f"| {100 * one['recall']:.1f} % | {one['memory_gib']:.2f} | {build} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vectors", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["exact", "ivf"])
    parser.add_argument("--queries", type=int, default=200, help="queries for recall and for faiss's time")
    parser.add_argument("--exact_queries", type=int, default=20, help="queries for exact search's time")
    parser.add_argument("--recall", type=float, default=0.98, help="of the exact ten, to tune faiss for")
    parser.add_argument("--threads", type=int, help="of torch and faiss; all cores by default")
    parser.add_argument("--scratch", help="folder for the temporary index")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for kind in options.vectors:
        for result in measure(kind, options):
            results.append(result)
            print(json.dumps(result), flush=True)
    print(table(results))
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
