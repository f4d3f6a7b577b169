"""Two text tasks from WordNet's glosses, in GLUE's formats: supersense classification and hypernym entailment.

    python examples/data/glosses.py GLOSSES examples/data/glosses

GLOSSES contains train.parquet and test.parquet with `synset`, `text`, `supersense` and `hypernym`. The same files and
seed give the same rows.
"""

import argparse
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROWS = {"supersense": {"train": 10_000, "dev": 2_000}, "hypernym": {"train": 4_000, "dev": 1_000}}
# a file of GLOSSES -> the split made from it
SPLITS = {"train": "train", "test": "dev"}
LICENCE = "LICENSE-wordnet.txt"
SEED = 0

Gloss = Mapping[str, str]


def read_glosses(folder: Path) -> dict[str, list[Gloss]]:
    """Split -> glosses in file order, without those that are empty or contain a tab or a line break."""
    columns = ["synset", "text", "supersense", "hypernym"]
    return {
        split: [row for row in pq.read_table(folder / f"{name}.parquet", columns=columns).to_pylist() if whole(row)]
        for name, split in SPLITS.items()
    }


def whole(row: Gloss) -> bool:
    """Whether a text can be one cell of a TSV file."""
    return row["text"].strip() != "" and not {"\t", "\n", "\r"} & set(row["text"])


def ancestors(synset: str, parents: Mapping[str, str]) -> set[str]:
    """A synset and all of its known hypernyms."""
    found: set[str] = set()
    while synset and synset not in found:
        found.add(synset)
        synset = parents.get(synset, "")
    return found


def entailments(
    glosses: Sequence[Gloss], known: Mapping[str, Gloss], count: int, generator: np.random.Generator
) -> list[tuple[str, str, str]]:
    """
    Up to `count` triples (gloss, second gloss, label). The second gloss is that of the first's hypernym (entailment),
    or of another gloss's hypernym with the same supersense (not_entailment). Labels are balanced, also for each second
    gloss, so that it reveals nothing by itself.
    """
    # glosses with a hypernym, by supersense, within which hypernyms are exchanged
    parents = {synset: gloss["hypernym"] for synset, gloss in known.items()}
    children = [gloss for gloss in glosses if gloss["hypernym"] in known]
    groups: dict[str, list[Gloss]] = defaultdict(list)
    for place in generator.permutation(len(children)):
        groups[children[place]["supersense"]].append(children[place])

    # neighbours within each group, which is in random order
    pairs = [pair for group in groups.values() for pair in zip(group[::2], group[1::2], strict=False)]
    triples: list[tuple[str, str, str]] = []
    for place in generator.permutation(len(pairs)):
        first, second = pairs[place]
        # neither may descend from the other's hypernym, which it would entail
        if second["hypernym"] in ancestors(first["synset"], parents):
            continue
        if first["hypernym"] in ancestors(second["synset"], parents):
            continue
        above = [known[one["hypernym"]]["text"] for one in (first, second)]
        triples += [
            (first["text"], above[0], "entailment"),
            (first["text"], above[1], "not_entailment"),
            (second["text"], above[1], "entailment"),
            (second["text"], above[0], "not_entailment"),
        ]
        if len(triples) >= count:
            break
    return triples[:count]


def write_tsv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a table without quotes, as in GLUE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glosses", type=Path)
    parser.add_argument("output", type=Path)
    a = parser.parse_args(arguments)

    glosses = read_glosses(a.glosses)
    known = {gloss["synset"]: gloss for rows in glosses.values() for gloss in rows}
    generator = np.random.default_rng(SEED)
    for split, rows in glosses.items():
        # supersense: the lexicographer's file of a gloss
        places = np.sort(generator.choice(len(rows), min(len(rows), ROWS["supersense"][split]), replace=False))
        kinds = [(rows[place]["text"], rows[place]["supersense"]) for place in places]
        write_tsv(a.output / "supersense" / f"{split}.tsv", ("sentence", "label"), kinds)

        # entailment, in RTE's columns
        triples = entailments(rows, known, ROWS["hypernym"][split], generator)
        numbered = [(str(number), *triple) for number, triple in enumerate(triples)]
        write_tsv(a.output / "hypernym" / f"{split}.tsv", ("index", "sentence1", "sentence2", "label"), numbered)
    # every copy must contain the licence
    shutil.copyfile(a.glosses / LICENCE, a.output / LICENCE)


if __name__ == "__main__":
    main()
