"""Memory and time of exact ranks of Q queries in a gallery of G, each query with one positive.

.venv/bin/python tests/reliability/ranks.py --queries 1000000 --gallery 1000000 [--width 256 --dtype float16 ...]

With `--ranked` only so many queries are ranked (all embeddings are held all the same): chunks of queries follow one
another and leave five counts a query, so that time grows with it and memory does not.
"""

import argparse
import json
import resource
import time

import torch

from oner.training.evaluation.metrics import chunked_standing, recall


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("queries", 1_000_000), ("gallery", 1_000_000), ("width", 64), ("ranked", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="how they are held")
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    gallery, queries = (
        torch.empty(number, asked.width, dtype=getattr(torch, asked.dtype))
        for number in (asked.gallery, asked.queries)
    )
    for part in gallery.split(65536):
        part.copy_(torch.randn(part.shape, generator=generator))
    ids = torch.randperm(asked.gallery, generator=generator)  # positives anywhere in the gallery
    own = torch.arange(asked.queries) % asked.gallery
    for part, places in zip(queries.split(65536), own.split(65536), strict=True):
        part.copy_(torch.randn(part.shape, generator=generator) + gallery[places])
    query_ids = ids[own]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ranked = asked.ranked or asked.queries
    start = time.process_time()
    where = chunked_standing(queries[:ranked], gallery, query_ids[:ranked], ids)
    seconds = time.process_time() - start
    figures = {
        **vars(asked),
        "recall@1": recall(where, [1])[1],
        "cpu_seconds": round(seconds, 1),
        "cpu_seconds_for_all": round(seconds * asked.queries / ranked),
        "threads": torch.get_num_threads(),
        "embeddings_MiB": round((queries.nbytes + gallery.nbytes) / 2**20),
        "MiB_before": round(held),
        "peak_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
