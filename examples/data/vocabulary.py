"""One vocabulary for all stages of a run, trained on the texts of all: the first stage may read only images.

    python examples/data/vocabulary.py runs/momo_small/vocabulary --size 8000 \
        --pairs examples/data/emoji/train.parquet runs/scenes/train.parquet --texts examples/data/glosses/train.parquet

It writes a saved tokenizer, for the argument `tokenizer` of a run.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from oner import open_rows, train_tokenizer


def texts_of(pairs: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """Captions of the pairs, then texts."""
    for kind, sources in (("pairs", pairs), ("texts", texts)):
        for source in sources:
            yield from open_rows(source, kind).captions()


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="output directory")
    parser.add_argument("--size", type=int, default=8000, help="maximum number of tokens, special tokens included")
    parser.add_argument("--pairs", nargs="+", default=[], help="sources of pairs")
    parser.add_argument("--texts", nargs="+", default=[], help="sources of texts")
    options = parser.parse_args(argv)

    # saved as a whole, with its treatment of case and accents
    tokenizer = train_tokenizer(texts_of(options.pairs, options.texts), vocab_size=options.size)
    tokenizer.save_pretrained(options.destination)
    print(f"{len(tokenizer)} tokens: {options.destination}")
    return options.destination


if __name__ == "__main__":
    main()
