"""What a search page does: answers, previews and maps, and the same for twenty users at once as for one."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_search import search_of

from oner.processing.grounding_boxes import overlay_map
from oner.processing.pipeline_visual_grounding import VisualGroundingPipeline
from oner.processing.retrieval_index import IndexMismatchError, RetrievalIndex
from oner.processing.retrieval_page import LARGE, MOST, PREVIEW, SearchPage, caption_of, picture_of, place_of

USERS = 20


@pytest.fixture(scope="module")
def search(family, emoji_folder, tmp_path_factory) -> SimpleNamespace:
    return search_of(family, emoji_folder, tmp_path_factory.mktemp(f"page-{family.name}"))


@pytest.fixture(scope="module")
def page(search) -> SearchPage:
    return SearchPage(search.pipe, search.indexes)


def test_answers_are_those_of_the_pipeline(search, page):
    assert page.sizes == {"named": 24, "files": 12, "words": 24} and search.pipe.retrieval_index is None
    queries = [("made of glass", None), ("", search.pictures[3]), ("a face", Image.open(search.pictures[5]))]
    for name, directory in search.indexes.items():
        index = RetrievalIndex.load(directory)
        for words, picture in queries:
            query = {key: value for key, value in (("text", words), ("image", picture)) if value}
            scores, places = index.search(search.pipe.embed([query]), top_k=5)
            answer = page.search(name, words, picture, top_k=5)
            assert [one.item for one in answer.found] == [index.items[i] for i in places[0]]
            assert [one.score for one in answer.found] == scores[0].tolist()
            assert answer.words == words and f"5 nearest of {len(index)}" in answer.remark


def test_a_picture_finds_itself_and_carries_its_names(search, page):
    best = page.search("named", picture=search.pictures[7]).found[0]
    assert best.name == search.rows[7]["captions"][0] and best.place == str(search.pictures[7])
    best = page.search("files", picture=search.pictures[7]).found[0]
    assert (best.name, best.place) == ("7", str(search.pictures[7]))
    best = page.search("words", search.rows[7]["captions"][0]).found[0]
    assert best.name == best.item and best.place == ""


def test_twenty_users_at_once_get_what_one_gets(search, page):
    """Words of many lengths, pictures, both, and maps, all over two indexes: a shared tokenizer would mix them up."""
    texts = [search.rows[i]["captions"][0] + " and a face" * (i % 4) for i in range(6)]
    jobs = [
        (name, texts[i] if i % 3 else "", search.pictures[i] if i % 3 != 1 else None)
        for i in range(6)
        for name in ("named", "words")
    ]

    def ask(job: tuple) -> tuple:
        answer = page.search(*job, top_k=4)
        located = [page.locate(answer.words, one.item) for one in answer.found[:1] if answer.words]
        maps = [None if one.map is None else one.map.tobytes() for one in located]
        return [(one.score, one.name) for one in answer.found], answer.remark, maps

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(USERS) as users:
        together = list(users.map(ask, jobs * 3))
    assert together == alone * 3


def test_maps_are_those_of_the_model(search, page):
    words = search.rows[2]["captions"][0]
    located = page.locate(words, str(search.pictures[2]))
    picture = Image.open(search.pictures[2]).convert("RGB")
    assert max(located.picture.size) == LARGE
    if not hasattr(search.pipe.model, "ground"):
        assert located.map is None and f"{type(search.pipe.model).__name__} makes no maps" in located.remark
        return
    ground = VisualGroundingPipeline(model=search.pipe.model, processor=search.processor, device="cpu")
    modes = search.pipe.model.grounding_modes
    cells = ground(picture, text=words, mode="itc" if "itc" in modes else modes[0])["map"]
    assert "speaks for the words" in located.remark
    torch.testing.assert_close(
        torch.from_numpy(np.array(located.map)), torch.from_numpy(np.array(overlay_map(located.picture, cells))),
        rtol=0, atol=1,
    )  # fmt: skip


def test_without_words_or_picture_there_is_no_map_and_the_page_says_so(page, search):
    item = page.search("files", picture=search.pictures[0]).found[0].item
    located = page.locate("", item)
    assert located.map is None and located.picture is not None and "had none" in located.remark
    assert page.locate("a face", "only words").picture is None


def test_previews_are_small_and_words_get_a_card(page, search, tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "wide.png")
    preview = page.preview(str(tmp_path / "wide.png"))
    assert preview.size == (PREVIEW, round(PREVIEW / 3)) and preview.getpixel((5, 5)) == (255, 0, 0)
    card = page.preview("a caption " * 40)
    assert card.size == (PREVIEW, PREVIEW) and len(set(card.convert("L").tobytes())) > 8
    assert page.preview(str(tmp_path / "gone.png")).size == (PREVIEW, PREVIEW)


def test_what_cannot_be_asked_is_named(page, search, tmp_path):
    with pytest.raises(ValueError, match="no index 'cats'; expected one of"):
        page.search("cats", "a face")
    with pytest.raises(ValueError, match="nothing was asked"):
        page.search("named", "  ", None)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png"):
        page.search("named", "a face", tmp_path / "broken.png")
    with pytest.raises(ValueError, match="at least one index"):
        SearchPage(search.pipe, {})
    assert len(page.search("named", "a face", top_k=10**9).found) == min(24, MOST)
    assert len(page.search("named", "a face", top_k=-3).found) == 1


def test_words_that_the_vocabulary_lacks_are_told(page):
    assert "vocabulary lacks" in page.search("named", "☃☃☃ 漢字").remark
    assert "vocabulary lacks" not in page.search("named", "a red apple").remark


def test_an_index_of_another_model_is_refused(search, tmp_path):
    other = RetrievalIndex(search.pipe.model.config.projection_dim, "another", "0" * 32)
    other.add(torch.ones(1, other.projection_dim), ["a"])
    other.save(tmp_path)
    with pytest.raises(IndexMismatchError, match="made by 'another'"):
        SearchPage(search.pipe, {"other": tmp_path})


@pytest.mark.parametrize(
    ("item", "caption", "place"),
    [
        ("photos/red apple.png", "red apple", "photos/red apple.png"),
        ("a red apple", "a red apple", ""),
        ({"image": "a/b.jpg", "text": "an apple"}, "an apple", "a/b.jpg"),
        ({"image": "a/b.jpg"}, "b", "a/b.jpg"),
        ({"table": "t.parquet", "row": 3, "text": "an apple"}, "an apple", "t.parquet, row 3"),
        (17, "17", ""),
    ],
)
def test_names_and_places_of_items(item, caption, place):
    assert (caption_of(item), place_of(item)) == (caption, place)


def test_pictures_of_items_are_found_from_a_folder(tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "one.png")
    assert picture_of({"image": "one.png"}, tmp_path).size == (4, 4)
    assert picture_of(str(tmp_path / "one.png")).getpixel((0, 0)) == (0, 0, 255)
    assert picture_of({"text": "words"}) is None and picture_of(17) is None and picture_of("one.png", "/") is None
