"""examples/data/definitions.py: emoji joined to WordNet's definitions."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def definitions(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "data"), *sys.path])
    import definitions

    return definitions


def test_nouns_with_one_meaning_are_defined_without_examples(definitions, tmp_path):
    glosses = [
        ("1n", ["red_apple", "apple"], 'a fruit; "an apple a day"'),
        ("2n", ["apple"], "a firm"),
        ("3v", ["canoe"], "travel by canoe"),
        ("4n", ["Canoe"], "a boat; pointed at both ends"),
    ]
    for part, rows in (("train", glosses[:3]), ("test", glosses[3:])):
        columns = dict(zip(("synset", "words", "text"), map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    assert definitions.single_meanings(tmp_path) == {"red apple": "a fruit", "canoe": "a boat; pointed at both ends"}


def test_rows_without_a_definition_are_left_out(definitions):
    table = pa.table({"hexcode": ["A", "B", "A"], "image": [b"0", b"1", b"2"]})
    found = definitions.defined(table, {"A": "a boat"}).to_pylist()
    assert found == [{"hexcode": "A", "image": image, "definition": "a boat"} for image in (b"0", b"2")]


def test_the_embedded_definitions_join_the_embedded_pairs(definitions, tmp_path, capsys):
    definitions.main([str(tmp_path)])
    assert "test_style: 255 pictures of 255 defined emoji" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "test_style.parquet", columns=["text", "definition"]).to_pylist()
    defined = {row["text"]: row["definition"] for row in rows}
    assert defined["new moon"] == "the time at which the Moon appears as a narrow waxing crescent"
