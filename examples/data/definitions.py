"""The embedded emoji with WordNet's definitions as texts: what OneR's Figures 8 and 11 ask a model to find.

    python examples/data/definitions.py runs/definitions

An emoji is defined if its name is a noun with exactly one meaning in WordNet. Each output file has the rows of the
embedded file of the same name whose emoji are defined, with one more column, `definition`, without example sentences.
The definitions come from glosses/definitions.tsv, which `--glosses FOLDER` makes from train.parquet and test.parquet
with the columns `synset`, `words` and `text`.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
EMOJI = HERE / "emoji"
DEFINITIONS = HERE / "glosses" / "definitions.tsv"
PARTS = ("train", "test_style", "test_concept")
COLUMNS = ("hexcode", "name", "definition")


def single_meanings(glosses: Path) -> dict[str, str]:
    """Noun -> its definition, for nouns that belong to one synset only."""
    found: dict[str, list[str]] = defaultdict(list)
    for part in ("train", "test"):
        table = pq.read_table(glosses / f"{part}.parquet", columns=["synset", "words", "text"])
        for gloss in table.to_pylist():
            if gloss["synset"].endswith("n"):
                for word in gloss["words"]:
                    found[word.lower().replace("_", " ")].append(gloss["text"])
    return {word: texts[0].split('; "')[0] for word, texts in found.items() if len(texts) == 1}


def write_definitions(glosses: Path, path: Path) -> None:
    """A table of the embedded emoji that are defined, sorted by hexcode."""
    meanings = single_meanings(glosses)
    names = {}
    for part in PARTS:
        table = pq.read_table(EMOJI / f"{part}.parquet", columns=["hexcode", "text"])
        names |= dict(zip(table["hexcode"].to_pylist(), table["text"].to_pylist(), strict=True))
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, dialect="excel-tab", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((code, name, meanings[name]) for code, name in sorted(names.items()) if name in meanings)


def read_definitions(path: Path) -> dict[str, str]:
    """Hexcode -> definition."""
    with open(path, encoding="utf-8", newline="") as stream:
        return {row["hexcode"]: row["definition"] for row in csv.DictReader(stream, dialect="excel-tab")}


def defined(table: pa.Table, definitions: Mapping[str, str]) -> pa.Table:
    """The rows whose emoji is defined, with the column `definition`."""
    codes = table["hexcode"].to_pylist()
    rows = [row for row, code in enumerate(codes) if code in definitions]
    return table.take(rows).append_column("definition", pa.array([definitions[codes[row]] for row in rows]))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the parquet files")
    parser.add_argument("--glosses", type=Path, help="make definitions.tsv from the glosses in this folder first")
    args = parser.parse_args(given)
    if args.glosses is not None:
        write_definitions(args.glosses, DEFINITIONS)

    definitions = read_definitions(DEFINITIONS)
    args.output.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        table = defined(pq.read_table(EMOJI / f"{part}.parquet"), definitions)
        pq.write_table(table, args.output / f"{part}.parquet")
        print(f"{part}: {len(table):,} pictures of {len(set(table['hexcode'].to_pylist())):,} defined emoji")


if __name__ == "__main__":
    main()
