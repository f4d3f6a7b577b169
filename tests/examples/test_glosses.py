"""examples/data/glosses: what is shipped keeps its word, and is made again from a table of glosses."""

import csv
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pretraining import ROOT, load_example

from oner.processing.data.glue_files import open_text_task

GLOSSES = ROOT / "examples" / "data" / "glosses"


@pytest.mark.parametrize(("task", "part", "count"), [
    ("supersense", "train", 10_000), ("supersense", "dev", 2_000), ("hypernym", "train", 4_000),
    ("hypernym", "dev", 1_000),
])  # fmt: skip
def test_every_shipped_row_can_be_read(task, part, count):
    rows = open_text_task([str(GLOSSES / task / f"{part}.tsv")], task)
    assert len(rows) == count and not rows.bad


def test_the_second_gloss_tells_nothing_by_itself():
    for part in ("train", "dev"):
        with open(GLOSSES / "hypernym" / f"{part}.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        under = {label: Counter(row["sentence2"] for row in rows if row["label"] == label)
                 for label in ("entailment", "not_entailment")}  # fmt: skip
        assert under["entailment"] == under["not_entailment"]


def test_the_notice_stays_with_every_copy():
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (GLOSSES / "LICENSE-wordnet.txt").read_text()


def test_a_table_of_glosses_becomes_tasks(tmp_path):
    """Twelve animals and twelve plants, three hypernyms each; one gloss holds a tab and goes."""
    source = tmp_path / "source"
    source.mkdir()
    rows = [
        {"synset": f"{kind}{number}", "text": f"a {kind} of number {number}", "supersense": f"noun.{kind}",
         "hypernym": f"{kind}{number % 3}" if number > 2 else ""}
        for kind in ("animal", "plant") for number in range(15)
    ]  # fmt: skip
    rows[4]["text"] = "a\ttab"
    for name, part in (("train", rows), ("test", rows[3:9])):
        pq.write_table(pa.Table.from_pylist(part), source / f"{name}.parquet")
    (source / "LICENSE-wordnet.txt").write_text("WordNet")
    glosses = load_example("data/glosses")
    for copy in ("one", "two"):
        glosses.main([str(source), str(tmp_path / copy)])
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert len(open_text_task([str(tmp_path / "one" / "supersense" / "train.tsv")], "supersense")) == 29
    known = {row["text"]: row for row in rows}
    above = open_text_task([str(tmp_path / "one" / "hypernym" / "train.tsv")], "hypernym")
    assert len(above) >= 8 and len(above) % 4 == 0
    for place in range(len(above)):
        first, second = known[above[place]["text"]], known[above[place]["second_text"]]
        assert (first["hypernym"] == second["synset"]) is (above[place]["label"] == 0)
        assert first["supersense"] == second["supersense"]
