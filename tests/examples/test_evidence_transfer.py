"""OneR's Table 4 on half of the pairs: the halves, the rows, and what the page says of gains."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

WAYS = [f"first/{way}_{kind}@{k}" for way in ("tr", "ir") for kind in ("r", "chance") for k in (1, 5, 10)]


@pytest.fixture(scope="module", autouse=True)
def examples_on_path(root: Path) -> Iterator[None]:
    paths = [str(root / "examples"), str(root / "examples" / "data")]
    sys.path[:0] = paths
    yield
    for path in paths:
        sys.path.remove(path)


def test_texts_name_nothing_that_the_pairs_show(tmp_path: Path) -> None:
    import halves

    halves.main([str(tmp_path), "--glosses"])
    pairs = pq.read_table(tmp_path / "pairs.parquet")
    whole = pq.read_table(halves.PAIRS)
    texts = pq.read_table(tmp_path / "texts.parquet")["text"].to_pylist()
    shown = set(pairs["hexcode"].to_pylist())
    assert 0.4 < len(pairs) / len(whole) < 0.6 and pairs.schema == whole.schema
    others = [row for row in whole.select(["hexcode", "captions"]).to_pylist() if row["hexcode"] not in shown]
    captions = {caption for row in others for caption in row["captions"]}
    assert captions == set(texts[: len(captions)]) and len(texts) == 2 * len(captions)


def made_up(row: str, score: float) -> dict:
    """A result as the runner writes it; the numbers are inputs of a test, not measurements."""
    from evidence_rows import ROWS

    machine = {"processor": "abacus", "cores": 2, "versions": {"torch": "0"}}
    sizes = {"steps": 10, "pairs": 1280, "parameters": 1e6, "train_seconds": 60.0, "wall_seconds": 90.0}
    told = {"row": row, "title": ROWS[row].title, "seed": 0, "resumed": False, "command": ["python", "x"]}
    return {**told, **sizes, "machine": machine, "values": dict.fromkeys(WAYS, score)}


def test_the_page_has_the_gain_of_each_architecture() -> None:
    import evidence
    from evidence_rows import ROWS, TRANSFER
    from evidence_table_transfer import main_table

    assert evidence.parse(["--table", "transfer"]).rows == TRANSFER and len(TRANSFER) == 4
    contents = [made_up(row, score) for row, score in zip(TRANSFER, (0.25, 0.375, 0.25, 0.5), strict=True)]
    lines = main_table(contents).splitlines()
    assert "| gain of two heads | +12.5 |" in lines[-2] and lines[-2].endswith("| +1.53 / +1.14 |")
    assert "| gain of one tower | +25.0 |" in lines[-1] and lines[-1].endswith("| +2.71 / +1.43 |")
    # a gain needs both its rows
    assert "gain of" not in main_table(contents[1:3])
    facts = {"pictures": 9, "data": "x", "jobs": 1, "threads": 1, "command": ["python", "y"]}
    assert evidence.TABLES["transfer"].page(contents, facts).count("abacus") == 1
    assert all((Path(evidence.CONFIGS) / ROWS[row].config).is_file() for row in TRANSFER)
