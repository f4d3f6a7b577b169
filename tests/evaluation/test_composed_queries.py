"""Composed queries: exact numbers with embeddings that the test lays down."""

import numpy as np
import pytest
from test_evaluation_retrieval import Colours, colour_processor, colour_row, unit, words

from oner.processing.data.row_checks import PairDataError
from oner.training.evaluation.composed_queries import ComposedQueriesEvaluator, open_queries

ROLES = ["target", "reference", "words alone", "other"]


def laid_down(ids: bool) -> tuple[list[dict], list[dict], dict[str, np.ndarray], np.ndarray]:
    """Twelve queries of four choices each: rows, gallery, unit vectors of each way to ask, and of the gallery."""
    rng = np.random.default_rng(2)
    references, texts = rng.integers(1, 200, (2, 12, 3))
    targets = np.clip(references + texts + rng.integers(-90, 90, (12, 3)), 1, 255)
    others = rng.integers(1, 255, (12, 2, 3))
    pictures = np.concatenate([targets[:, None], references[:, None] + 9, others], 1).reshape(-1, 3)
    gallery = [colour_row(colour, ["a"], number // 8 if ids else None) for number, colour in enumerate(pictures)]
    queries = [
        {
            **colour_row(references[number], []),
            "text": words(texts[number]),
            "target": 4 * number,
            "choices": [*range(4 * number, 4 * number + 4)],
            "names": ROLES,
            "kind": "add" if number % 3 else "swap",
        }
        for number in range(12)
    ]
    ways = {"picture": unit(references), "words": unit(texts), "both": unit(references + texts)}
    ways["sum"] = unit(ways["picture"] + ways["words"])
    return queries, gallery, ways, unit(pictures)


@pytest.mark.parametrize("ids", [False, True])
def test_numbers_equal_loops_by_hand(ids):
    queries, gallery, ways, pictures = laid_down(ids)
    evaluator = ComposedQueriesEvaluator(queries, gallery, 5, (1, 5), "set", progress=False)
    values = dict(evaluator.run(Colours(), colour_processor))
    recalls = {}
    for way, vectors in ways.items():
        found, first = [], []
        for query, vector in zip(queries, vectors, strict=True):
            order = np.argsort(-(pictures @ vector))
            right = {query["target"]} if not ids else {n for n in range(48) if n // 8 == query["target"] // 8}
            found.append(bool(right & set(order[:5].tolist())))
            first.append(ROLES[int(np.argmax(pictures[query["choices"]] @ vector))])
        recalls[way] = np.mean(found)
        assert values[f"set/composed_{way}_r@5"] == pytest.approx(recalls[way])
        assert values[f"set/composed_{way}_choice"] == pytest.approx(first.count("target") / 12)
        assert values.get(f"set/composed_{way}_takes_reference", 0) == pytest.approx(first.count("reference") / 12)
        swaps = [one for one, query in zip(found, queries, strict=True) if query["kind"] == "swap"]
        assert values[f"set/swap/composed_{way}_r@5"] == pytest.approx(np.mean(swaps))
    better = max(recalls["picture"], recalls["words"])
    assert values["set/composed_both_over_better"] == pytest.approx(recalls["both"] / better)
    assert values["set/composed_both_over_sum"] == pytest.approx(recalls["both"] / recalls["sum"])
    assert evaluator.protocol["queries"] == {"add": 8, "swap": 4}


def test_a_hidden_row_is_not_in_the_gallery_of_its_query():
    """CIRR's own reference: what looks as the query's picture does is neither found nor counted by chance."""
    queries, gallery, _, pictures = laid_down(False)
    queries = [{**query, "hidden": query["choices"][1]} for query in queries]
    evaluator = ComposedQueriesEvaluator(queries, gallery, ks=(1, 3), name="set", progress=False)
    values = dict(evaluator.run(Colours(), colour_processor))
    references = unit(np.array([np.asarray(query["image"])[0, 0] for query in queries]))
    found = []
    for query, vector in zip(queries, references, strict=True):
        order = [row for row in np.argsort(-(pictures @ vector)) if row != query["hidden"]]
        found.append(query["target"] in order[:3])
    assert values["set/composed_picture_r@3"] == pytest.approx(np.mean(found))
    assert evaluator.protocol["reference_left_out"] == 12
    with pytest.raises(ValueError, match="query 0: its target, row 0, is hidden from it"):
        ComposedQueriesEvaluator([{**queries[0], "hidden": 0}], gallery)


def test_a_tie_is_lost_and_a_model_without_joint_pass_has_three_ways():
    class Apart(Colours):
        get_multimodal_features = property()

    queries, gallery, *_ = laid_down(False)
    gallery = [{**row, "image": gallery[0]["image"]} for row in gallery]
    values = dict(ComposedQueriesEvaluator(queries, gallery, progress=False).run(Apart(), colour_processor))
    assert not any("both" in name for name in values)
    assert all(values[f"eval/composed_{way}_choice"] == 0 for way in ("picture", "words", "sum"))


def test_what_are_no_queries_is_refused(pairs):
    queries, gallery, *_ = laid_down(False)
    with pytest.raises(ValueError, match="query 10: a choice is row 40, and the gallery has 40 rows"):
        ComposedQueriesEvaluator(queries, gallery[:40])
    for wrong, message in (
        ({"choices": [-48, 1], "target": -48, "names": ROLES[:2]}, "a choice is row -48, and the gallery has 48 rows"),
        ({"choices": [1, 0], "target": 0, "names": ROLES[:2]}, "first choice is row 1, and its target row 0"),
        ({"choices": [0, 1], "target": 0, "names": ROLES[:1]}, "expected two at least, and a name for each"),
        ({"choices": [0], "target": 0, "names": ROLES[:1]}, "expected two at least"),
        ({"choices": [None, 1], "target": None, "names": ROLES[:2]}, "a choice is row None"),
    ):
        with pytest.raises(ValueError, match=f"query 1: .*{message}"):
            ComposedQueriesEvaluator([queries[0], {**queries[1], **wrong}], gallery)
    with pytest.raises(ValueError, match="no queries"):
        ComposedQueriesEvaluator([], gallery)
    with pytest.raises(PairDataError, match="expected composed queries, got a table without target, choices"):
        open_queries(pairs)
