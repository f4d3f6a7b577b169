"""Ways to ask: weighted sums, neighbours, conditions, re-ranking by late interaction, other backends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Pipeline, pipeline

import oner  # noqa: F401  registers the task
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import open_image
from oner.processing.retrieval_backend import build_backend
from oner.processing.retrieval_late_interaction import late_interaction, query_of_item
from oner.training.commands.search import opened

ROOT = Path(__file__).parents[2]
COUNT = 12


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rows = open_rows(str(ROOT / "examples/data/emoji/test_style.parquet")).take(range(COUNT))
    return [open_image(row["image"]) for row in rows]


@pytest.fixture(scope="module")
def search(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Over pictures in files, with columns."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        item = {"path": str(folder / f"{number}.png"), "licence": ("MIT", "BSD")[number % 2], "number": number}
        rows.append({"image": item["path"], "item": item})
    pipe = pipeline("image-text-retrieval", model=str(ROOT / "examples/checkpoints/oner-emoji"))
    pipe.index(rows, show_progress=False)
    return pipe


def numbers(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["index"] for answer in answers]


def test_a_weighted_sum_is_one_of_unit_embeddings(search: Pipeline, pictures: list[Image.Image]) -> None:
    asked = [("a red apple", 1.0), ({"image": pictures[3]}, 0.5), ("a tree", -0.7)]
    rows = search.embed([query for query, _ in asked]).double()
    together = sum(weight * row for (_, weight), row in zip(asked, rows, strict=True))
    cosines = search.retrieval_index.embeddings.double() @ torch.nn.functional.normalize(together, dim=0)
    answers = search.combine(asked, top_k=COUNT)
    assert numbers(answers) == cosines.argsort(descending=True).tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(cosines.sort(descending=True).values.tolist())

    # of one query it is that query, whatever its weight; subtracting a picture puts it last
    assert numbers(search.combine([("a tree", 3)], top_k=4)) == numbers(search("a tree", top_k=4))
    assert numbers(search.combine([({"image": pictures[5]}, -1.0)], top_k=COUNT))[-1] == 5


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "nothing was asked"),
        ([("a", float("nan"))], "finite numbers"),
        ([("sun", 1), ("sun", -1)], "cancel each other"),
        ([("sun", 0)], "cancel each other"),
    ],
)
def test_sums_that_mean_nothing_are_refused(search: Pipeline, asked: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search.combine(asked)


def test_conditions_hold_for_every_way_to_ask(search: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = search("a red apple", top_k=COUNT)
    wanted = [one for one in everything if one["item"]["licence"] == "MIT" and one["item"]["number"] >= 4]
    where = ["licence=MIT", "number>=4"]
    assert search("a red apple", top_k=COUNT, where=where) == wanted and len(wanted) == 4
    assert numbers(search(["a red apple", "a tree"], top_k=2, where=where)[0]) == numbers(wanted[:2])
    assert numbers(search.combine([("a red apple", 2)], top_k=3, where=where)) == numbers(wanted[:3])
    assert all(one["item"]["licence"] == "BSD" for one in search.neighbours(2, top_k=9, where={"licence": "BSD"}))

    # conditions of the pipeline hold where a call names none
    monkeypatch.setitem(search._postprocess_params, "where", where)
    for found in (search.combine([("a red apple", 2)]), search.neighbours(4)):
        assert found and all(one["item"]["licence"] == "MIT" and one["item"]["number"] >= 4 for one in found)
    assert len(search.combine([("a red apple", 2)], top_k=COUNT, where="licence=MIT")) == COUNT // 2
    with pytest.raises(ValueError, match="expected a condition such as"):
        search("a red apple", where="MIT")


def test_neighbours_are_those_of_the_picture_itself(search: Pipeline, pictures: list[Image.Image]) -> None:
    asked = search(image=pictures[4], top_k=COUNT)
    assert asked[0]["index"] == 4
    found = search.neighbours(search.retrieval_index.items[4], top_k=COUNT)
    assert numbers(found) == numbers(asked)[1:] and numbers(search.neighbours(4)) == numbers(asked)[1:6]


def test_late_interaction_is_the_mean_of_greatest_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, generator=generator)
    items = [torch.randn(count, 8, generator=generator) for count in (5, 2)]
    for score, item in zip(late_interaction(query, items), items, strict=True):
        cosines = [[float(torch.cosine_similarity(a, b, dim=0)) for b in item] for a in query]
        assert float(score) == pytest.approx(sum(max(row) for row in cosines) / 3, abs=1e-6)
    assert float(late_interaction(query, [query])[0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="has no states"):
        late_interaction(query[:0], items)


def test_re_ranking_orders_the_best_by_both_scores(search: Pipeline, pictures: list[Image.Image]) -> None:
    before = search("a red apple", top_k=COUNT)
    (asked,) = search.states(["a red apple"])
    shown = search.states([{"image": picture} for picture in pictures])
    late = late_interaction(asked, shown)
    batch = search.processor(text=["a red apple"])
    with torch.no_grad():
        states = search.model.get_text_features(**batch).last_hidden_state[0, 1:]
    torch.testing.assert_close(asked, states, rtol=0, atol=1e-5)

    found = search("a red apple", top_k=COUNT, rerank_k=6, rerank_weight=0.8)
    mixed = {one["index"]: 0.2 * one["score"] + 0.8 * float(late[one["index"]]) for one in before[:6]}
    assert numbers(found[:6]) == sorted(mixed, key=mixed.get, reverse=True) and found[6:] == before[6:]
    assert [one["score"] for one in found[:6]] == pytest.approx(sorted(mixed.values(), reverse=True), abs=1e-5)
    assert numbers(search("a red apple", top_k=3, rerank_k=6, rerank_weight=0.8)) == numbers(found[:3])
    assert numbers(search("a red apple", top_k=COUNT, rerank_k=6, rerank_weight=0.0)) == numbers(before)

    # a picture, or both, has states too
    both = {"text": "a red apple", "image": pictures[2]}
    (words, patches, joint) = search.states(["a red apple", {"image": pictures[2]}, both])
    assert len(joint) == len(words) + len(patches)
    assert len(search([both, pictures[2]], top_k=2, rerank_k=4)) == 2


def test_re_ranking_that_cannot_be_is_refused(search: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        search("sun", rerank_k=3, rerank_weight=2)
    with pytest.raises(ValueError, match="positive integer"):
        search("sun", rerank_k=0)
    with pytest.raises(ValueError, match="cannot open the item"):
        query_of_item({"table": "a.parquet", "row": 3})

    # the name of a picture that was moved is not a text
    assert query_of_item("a red apple") == {"text": "a red apple"}
    gone = str(ROOT / "gone" / "red apple.png")
    with pytest.raises(ValueError, match="red apple.png"):
        search.states([query_of_item(gone)])
    for item in (gone, {"image": gone}):
        with pytest.raises(ValueError, match="cannot read the picture of .*red apple.png"):
            opened(item)
    assert opened("a red apple") == {"text": "a red apple"}
    monkeypatch.setattr(type(search.model.config), "pair_layout", "separate")
    with pytest.raises(ValueError, match="needs one tower .* got a oner model"):
        search("sun", rerank_k=3)


def test_another_backend_answers_in_its_place(search: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    wanted = search("a red apple", top_k=4, where="licence=MIT"), search.neighbours(3, top_k=2)
    index = search.retrieval_index
    search.save_index(tmp_path)
    build_backend("faiss", tmp_path, recall=1.0)
    try:
        search.load_index(tmp_path, backend="faiss")
        assert (search("a red apple", top_k=4, where="licence=MIT"), search.neighbours(3, top_k=2)) == wanted
        with pytest.raises(ValueError, match="load the index itself"):
            search.save_index(tmp_path / "again")
    finally:
        search.retrieval_index = index
