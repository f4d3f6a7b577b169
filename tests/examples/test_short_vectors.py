"""examples/short_vectors.py: what cut and quantised vectors find, beside searches written out in numpy."""

import numpy as np
import pytest
from tiny_pretraining import load_example

pytest.importorskip("sentence_transformers")
pytest.importorskip("faiss")
COUNT, WIDTH, TOP = 60, 64, 10


@pytest.fixture(scope="module")
def script():
    return load_example("short_vectors")


@pytest.fixture(scope="module")
def side(script):
    """Queries near to their own item; the clouds lie apart, as captions and pictures do."""
    generator = np.random.default_rng(0)
    gallery = generator.standard_normal((COUNT, WIDTH)).astype(np.float32)
    queries = gallery + 0.9 * generator.standard_normal((COUNT, WIDTH)).astype(np.float32) + 0.3
    ids = np.arange(COUNT)
    return script.Side(script.unit(queries), script.unit(gallery), ids, ids)


def best(scores: np.ndarray) -> list[set[int]]:
    return [set(row[:TOP].tolist()) for row in np.argsort(-scores, axis=1, kind="stable")]


@pytest.mark.parametrize("dim", [WIDTH, 16])
def test_whole_numbers_and_bytes_are_found_by_cosine(script, side, dim):
    queries, gallery = (
        rows[:, :dim] / np.linalg.norm(rows[:, :dim], axis=1)[:, None] for rows in (side.queries, side.gallery)
    )
    assert [set(row) for row in side.found(dim, "fp32").tolist()] == best(queries @ gallery.T)
    # 256 steps for all coordinates
    step = 2 * np.abs(gallery).max() / 255
    bytes_ = np.floor((gallery + np.abs(gallery).max()) / step)
    assert [set(row) for row in side.found(dim, "int8").tolist()] == best(queries @ bytes_.T)


def test_bits_are_found_by_their_hamming_distance_and_ordered_by_the_query(script, side):
    same = ((side.queries > 0)[:, None] == (side.gallery > 0)[None]).sum(-1)  # (Q, G)
    found = side.found(WIDTH, "bits")
    # ties are in any order: the distances are those of the nearest ten
    np.testing.assert_array_equal(np.take_along_axis(same, found, 1), -np.sort(-same, axis=1)[:, :TOP])
    rescored = side.found(WIDTH, "bits, rescored")
    scores = np.take_along_axis(side.queries @ (side.gallery > 0).T, rescored, 1)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    assert side.recall(rescored, 1) >= side.recall(found, 1)


def test_a_table_has_each_way_at_each_width(script, side):
    header, *rows = script.table({"captions ask": side}, [WIDTH, 16])
    assert len(header) == len(rows[0]) == 5 and len(rows) == 2 * len(script.WAYS)
    assert rows[0][:2] == ["64 x fp32", "256"] and rows[0][-1] == "100.0"
    assert {row[0]: row[1] for row in rows}["16 x bits, rescored"] == "2"
    top = np.argmax(side.queries @ side.gallery.T, axis=1)
    assert rows[0][2] == f"{100 * (top == np.arange(COUNT)).mean():.1f}"
