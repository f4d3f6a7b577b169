"""Half of the embedded emoji as pairs, the captions of the other half as texts: the data for OneR's Table 4.

    python examples/data/halves.py runs/halves

Concepts are split by a digest of their hexcode, so the texts name no concept that the pairs show. `pairs.parquet` has
the columns of train.parquet; `texts.parquet` has a column `text`: every caption of the other half once and, with
`--glosses`, as many definitions of WordNet.
"""

import argparse
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

HERE = Path(__file__).parent
PAIRS = HERE / "emoji" / "train.parquet"
GLOSSES = HERE / "glosses" / "train.parquet"


def in_first_half(hexcode: str) -> bool:
    """Whether a concept is in the half that is used as pairs."""
    return blake2b(hexcode.encode(), digest_size=1).digest()[0] < 128


def halve(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The pairs (n rows) whose concepts are in the first half, and the distinct captions of the others, sorted."""
    shown = pa.array([in_first_half(hexcode) for hexcode in table["hexcode"].to_pylist()])  # (n,)
    other = table.filter(pc.invert(shown))["captions"].to_pylist()
    return table.filter(shown), sorted({caption for captions in other for caption in captions})


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--glosses", action="store_true", help="add as many definitions as there are captions")
    args = parser.parse_args(given)
    args.output.mkdir(parents=True, exist_ok=True)

    pairs, texts = halve(pq.read_table(PAIRS))
    if args.glosses:
        texts += pq.read_table(GLOSSES, columns=["text"])["text"].to_pylist()[: len(texts)]
    pq.write_table(pairs, args.output / "pairs.parquet")
    pq.write_table(pa.table({"text": texts}), args.output / "texts.parquet")
    print(f"{args.output}: {len(pairs):,} pairs, {len(texts):,} texts")


if __name__ == "__main__":
    main()
