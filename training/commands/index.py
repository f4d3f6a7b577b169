"""`oner index`: embeds a corpus, saves it as it grows, and builds the backend that will search it."""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from oner.processing.retrieval_backend import build_backend, build_stale
from oner.processing.retrieval_sources import list_pictures
from oner.training.publishing.shipped import shipped_checkpoint
from oner.training.run.arguments import read_launch

from .search import load_pipeline
from .table_items import TABLES, TableItems

PATIENCE = timedelta(days=7)  # time that a process waits for the others
NAMED = re.compile(r"(row \d+: )?(cannot (read|fetch) )?((\d+ bytes starting with b|)(['\"]).*?\6: )?")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Embeds what is not embedded yet, and prints a summary."""
    source = Path(options.source).resolve()
    if not source.exists():
        raise FileNotFoundError(f"{options.source}: no such folder or file")
    state = PartialState(timeout=PATIENCE) if read_launch().processes > 1 else None
    pipe = load_pipeline(options.model or shipped_checkpoint(), state and state.device)
    rows = TableItems(str(source)) if source.suffix in TABLES else source
    elsewhere = 0 if state is None else embed_share(pipe, rows, options, state)
    if state is not None and not state.is_main_process:
        return 0
    index = pipe.index(rows, directory=options.destination, batch_size=options.batch_size)

    # a summary of all rows and files
    counts = index.counts
    embedded = counts["embedded"] + elsewhere
    print(f"{len(index)} items in {options.destination}: {embedded} embedded, {len(index) - embedded} as they were")
    if counts["gone"]:
        print(f"{counts['gone']} of the index before are gone or have changed")
    reasons = [one["reason"] for one in index.skipped] + list(getattr(rows, "bad", {}).values())
    for line in passed_over(reasons, source):
        print(line)

    # search backends
    for name in build_stale(options.destination):
        print(f"built again: {name}")
    if options.backend != "exact":
        start = time.monotonic()
        built = build_backend(options.backend, options.destination, **backend_options(options))
        print(f"built {options.backend} over {len(built)} items in {time.monotonic() - start:.0f} s")
    model = f" --model {quote(options.model)}" if options.model else ""
    backend = f" --backend {options.backend}" if options.backend != "exact" else ""
    print(f'search them: oner search {quote(options.destination)} "words"{model}{backend}')
    return 0


def embed_share(pipe: ImageTextRetrievalPipeline, rows: Any, options: argparse.Namespace, state: PartialState) -> int:
    """Embeds this process's share of the rows, waits for the others, and returns how many all processes embedded."""
    share = (state.process_index, state.num_processes)
    told = {"batch_size": options.batch_size, "show_progress": state.is_main_process}
    index = pipe.index(rows, directory=options.destination, share=share, **told)
    return int(reduce(torch.tensor(index.counts["embedded"], device=state.device), "sum"))


def backend_options(options: argparse.Namespace) -> dict[str, object]:
    """The options given for the backend, without those not given."""
    said = {"kind": options.kind, "recall": options.recall} if options.backend == "faiss" else {"url": options.url}
    return {name: value for name, value in said.items() if value is not None}


def passed_over(reasons: Iterable[str], source: Path) -> list[str]:
    """Summary lines: how many rows were skipped for each reason, and how many files are not pictures."""
    counts = Counter(map(shortened, reasons))
    lines = [f"  {count:6d}  {reason}" for reason, count in counts.most_common()]
    if source.is_dir() and (others := other_files(source)):
        shown = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        lines.append(f"  {others.total():6d}  files that are no pictures ({shown})")
    listed = f" {counts.total()} that were listed (retrieval_index.json names each)" if counts else ""
    return [f"passed over:{listed}", *lines] if lines else []


def shortened(reason: str) -> str:
    """A reason without the details of one file: its name, its first bytes, numbers."""
    reason = NAMED.sub("", reason, count=1)
    return re.sub(r"\d+", "N", re.sub(r", starts with b.*", "", reason, flags=re.DOTALL))[:100]


def other_files(folder: Path) -> Counter[str]:
    """Number of files under a folder that are not pictures, by suffix; hidden files are ignored."""
    pictures = set(list_pictures(folder))
    counts: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in files if not name.startswith(".")]
        counts.update(
            Path(name).suffix.lower() or "without a suffix"
            for name in visible
            if os.path.join(parent, name) not in pictures
        )
    return counts
