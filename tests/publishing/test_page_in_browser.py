"""The search page in a real Chromium, by playwright: words, an upload, both, a click on an answer, another index."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES
from real_browser import CHROMIUM, page_at
from tiny_search import search_of

from oner.processing.retrieval_page import SearchPage
from oner.training.publishing.space_layout import build_page, look

# a busy machine takes long to answer
PATIENCE = 120_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    # what gradio and its server say of their own
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def search(emoji_folder, tmp_path_factory) -> SimpleNamespace:
    return search_of(FAMILIES["oner"], emoji_folder, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def address(search) -> Iterator[str]:
    pytest.importorskip("gradio")
    blocks = build_page(SearchPage(search.pipe, search.indexes), "Search <emoji>")
    _, served, _ = blocks.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **look())
    yield served
    blocks.close()


@pytest.fixture
def browser(address) -> Iterator[Any]:
    """A page of the browser; `elsewhere` are addresses that it asked beside the server's."""
    with page_at(address, "#words textarea", PATIENCE) as page:
        yield page


def captions(page: Any) -> list[str]:
    return page.locator("#answers .caption-label").all_inner_texts()


def wait_for_remark(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#remark').innerText.includes(text)", arg=text)


def expected(search: SimpleNamespace, name: str, *query: Any) -> list[str]:
    answer = SearchPage(search.pipe, search.indexes).search(name, *query)
    return [f"{one.score:+.3f} {one.name}" for one in answer.found]


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")


def test_words_then_a_click_show_answers_and_a_map(browser, search):
    browser.fill("#words textarea", "a face")
    browser.press("#words textarea", "Enter")
    wait_for_remark(browser, "12 nearest of 24 by words")
    assert captions(browser) == expected(search, "named", "a face")
    assert browser.locator("#answers img").first.evaluate("picture => picture.naturalWidth") > 0

    browser.locator("#answers .thumbnail-item").nth(2).click()
    browser.wait_for_selector("#where img")
    assert browser.locator("#where img").evaluate("picture => picture.naturalWidth") == 512
    facts = browser.inner_text("#facts")
    third = expected(search, "named", "a face")[2].split(" ", 1)[1]
    assert facts.startswith(f"3. {third}") and "speaks for the words" in facts and ".png" in facts
    assert not browser.elsewhere


def test_an_upload_alone_and_with_words(browser, search):
    upload(browser, search.pictures[4])
    browser.click("#ask")
    wait_for_remark(browser, "by a picture")
    assert captions(browser) == expected(search, "named", "", search.pictures[4])

    browser.fill("#words textarea", "made of glass")
    browser.click("#ask")
    wait_for_remark(browser, "as one query")
    assert captions(browser) == expected(search, "named", "made of glass", search.pictures[4])


def test_another_index_is_asked_the_same(browser, search):
    browser.fill("#words textarea", "a face")
    browser.click("#ask")
    wait_for_remark(browser, "of 24 by words")
    browser.click("#index input")
    browser.get_by_role("option", name="files (12)").click()
    wait_for_remark(browser, "of 12 by words")
    assert captions(browser) == expected(search, "files", "a face")


def test_mistakes_are_told_on_the_page(browser, search, tmp_path):
    browser.click("#ask")
    wait_for_remark(browser, "Enter words, a picture, or both")
    whole = search.pictures[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    browser.set_input_files("#picture input[type=file]", tmp_path / "cut.png")
    browser.wait_for_selector("#picture img", state="attached")
    browser.click("#ask")
    told = browser.get_by_text("cannot read")
    told.first.wait_for(state="attached")
    assert "'cut.png'" in told.first.inner_text()
