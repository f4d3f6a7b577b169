"""Joins the sets of icons into files for training and evaluation, with attribution.

train/00000.parquet ...   icons of sets and concepts that are not held out
unseen_names.parquet      concepts that are held out in every set, from the sets of training
unseen_sets.parquet       sets that training never shows, without drawings that look like one of training
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from building import write_table, write_text
from icons_drawing import have_twins, small_copy
from icons_names import UNSEEN_SETS, concept_of, is_held_out
from icons_queries import composed_queries

ROWS_A_FILE = 16384
BRANDS = {"brand", "logo"}  # words of names
SPLITS = ("train", "unseen_names", "unseen_sets")


def write_splits(
    output: Path, drawn: Path, sets: Mapping[str, Any], left_out: Mapping[str, Any], queries: int
) -> None:
    """Writes all files, from those in `drawn`: for each set a table, and the counts of icons left out of it."""
    table = pa.concat_tables([pq.read_table(drawn / f"{name}.parquet") for name in sorted(sets)]).combine_chunks()
    dropped = sum((Counter(json.loads((drawn / f"{name}.json").read_text())) for name in sets), Counter())
    splits = split(table, dropped)
    table = with_captions(table, splits["train"])

    # Training in several files, the rest in one each.
    for old in (output / "train").glob("*.parquet"):
        old.unlink()
    for number, start in enumerate(range(0, len(splits["train"]), ROWS_A_FILE)):
        rows = splits["train"][start : start + ROWS_A_FILE]
        write_table(output / "train" / f"{number:05}.parquet", table.take(rows))
    for name in ("unseen_names", "unseen_sets"):
        write_table(output / f"{name}.parquet", table.take(splits[name]))
        pool = np.concatenate([splits["train"], splits[name]]) if name == "unseen_names" else splits[name]
        if asked := composed_queries(table, splits[name], pool, name, queries):
            for part, rows in asked.items():
                write_table(output / f"{name}_{part}.parquet", rows)
    _write_facts(output, table, splits, sets, left_out, dropped)


def split(table: pa.Table, dropped: Counter) -> dict[str, np.ndarray]:
    """Row numbers of each split, without images that are byte-identical to another of the same concept."""
    png = table["image"].combine_chunks().field("bytes").to_pylist()
    concepts = table["concept"].to_pylist()
    unseen = np.array([name in UNSEEN_SETS for name in table["set"].to_pylist()], bool)
    held_out = np.array([is_held_out(concept) for concept in concepts], bool)

    # Sets of trademarks are left out; these are the trademarks of other sets.
    brand = np.array([not BRANDS.isdisjoint(concept.split("-")) for concept in concepts], bool)
    dropped["a trademark, by its name"] += int(brand.sum())

    # The first of each image and concept, preferably from training sets.
    known, first = set(), np.zeros(len(png), bool)
    for row in np.argsort(unseen, kind="stable"):
        first[row] = (png[row], concepts[row]) not in known
        known.add((png[row], concepts[row]))
    dropped["the same picture under the same name"] += int((~first & ~brand).sum())
    first &= ~brand

    # Held-out sets keep only images that look like no training image.
    copies = np.stack([small_copy(one) for one in png]) if png else np.zeros((0, 1), np.float32)
    train = np.flatnonzero(first & ~unseen & ~held_out)
    new = np.flatnonzero(first & unseen)
    twins = have_twins(copies[new], copies[train])
    dropped["held-out set, but like a picture of training"] += int(twins.sum())
    return {"train": train, "unseen_names": np.flatnonzero(first & ~unseen & held_out), "unseen_sets": new[~twins]}


def with_captions(table: pa.Table, train: np.ndarray) -> pa.Table:
    """Adds `captions` (the name, the name with its style, other names) and `seen_name`: is it a concept of training?

    No other name is that of a concept that is held out.
    """
    columns = table.select(["text", "style", "synonyms", "concept"]).to_pydict()
    captions = []
    for text, style, synonyms in zip(columns["text"], columns["style"], columns["synonyms"], strict=True):
        # Drops names of held-out concepts, and those that only add words to this one, such as the set's own name.
        others = [one for one in synonyms if not is_held_out(concept_of(one.split()))]
        others = [one for one in others if not set(text.split()) <= set(one.split())]
        captions.append([text, *([f"{text} {style}"] if style else []), *others])
    seen = {columns["concept"][row] for row in train}
    table = table.drop_columns(["synonyms"])
    table = table.append_column("captions", pa.array(captions, pa.list_(pa.string())))
    return table.append_column("seen_name", pa.array([one in seen for one in columns["concept"]], pa.bool_()))


def _write_facts(
    output: Path,
    table: pa.Table,
    splits: Mapping[str, Sequence[int]],
    sets: Mapping[str, Any],
    left_out: Mapping[str, Any],
    dropped: Counter,
) -> None:
    """Writes ATTRIBUTION.md, which a model's card cites, and counts.json."""
    of_set = np.array(table["set"].to_pylist(), object)
    licences = np.array(table["license"].to_pylist(), object)
    by_set = {split: Counter(of_set[rows]) for split, rows in splits.items()}
    lines = [
        f"- `{name}` ({facts['license'].get('spdx', facts['license']['title'])}): {facts['name']}, "
        f"(c) {facts['author']['name']}, {facts['license'].get('url') or facts['author'].get('url', '')}: "
        + ", ".join(f"{by_set[split][name]} in {split}" for split in SPLITS if by_set[split][name])
        for name, facts in sorted(sets.items())
        if any(by_set[split][name] for split in SPLITS)
    ]
    head = "# Who drew the icons\n\nDrawn small, black on white where a set has no colours, from the npm package "
    head += "`@iconify/json`, set by set under its own licence. Names are those of the sets, without style and size.\n"
    write_text(output / "ATTRIBUTION.md", "\n".join([head, *lines, ""]))
    counts = {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "concepts": {split: len(set(table["concept"].take(rows).to_pylist())) for split, rows in splits.items()},
        "licences": {split: dict(Counter(licences[rows]).most_common()) for split, rows in splits.items()},
        "sets": {split: dict(found.most_common()) for split, found in by_set.items()},
        "dropped": {reason: count for reason, count in dropped.most_common() if count},
        "sets_left_out": dict(left_out),
    }
    write_text(output / "counts.json", json.dumps(counts, indent=1))
