"""`oner index`: a corpus embedded once, saved as it grows."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oner.training.run.shipped import shipped_checkpoint

from .search import TABLES, load_pipeline, table_rows


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Embeds what is not embedded yet, and says how much there is."""
    source = Path(options.source).resolve()
    if not source.exists():
        raise FileNotFoundError(f"{options.source}: no such folder or file")
    pipe = load_pipeline(options.model or shipped_checkpoint())
    rows = table_rows(str(source)) if source.suffix in TABLES else source
    index = pipe.index(rows, directory=options.destination, batch_size=options.batch_size)
    print(f"{len(index)} pictures in {options.destination}, {len(index.skipped)} left out")
    for one in index.skipped:
        print(f"  {one['item']}: {one['reason']}")
    model = f" --model {options.model}" if options.model else ""
    print(f'search them: oner search {options.destination} "words"{model}')
    return 0
