"""examples/browser: what Python writes, and in a real Chromium that it reads, finds and ranks as Python does."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_browser import CHROMIUM, page_at
from tiny_pretraining import load_example
from transformers import AutoProcessor

from oner.processing.retrieval_index import RetrievalIndex
from oner.training.publishing.shipped import shipped_checkpoint

# a busy machine takes long to answer
PATIENCE = 240_000
# of 8 bits a last digit can turn a rounding of activations, and with it the vector a little
TURNED = 5e-3
TEXTS = [
    "", "red fruit", "Red  FRUIT!", "éclair à la crème, nai\u0308ve", "红色的水果", "りんごとバナナ", "한국어 사과",
    "🍎 apple 👩‍🚀 ❤️", "a\u200bb \t\n tab", "[CLS] [IMG] [MASK] [PAD]x", "x" * 300, "word " * 100, "İstanbul ẞ ﬁ",
    "مرحبا नमस्ते", "trái táo đỏ", "can't-stop_won't #1 50% $3.50 «a» — b",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Any:
    return load_example("browser/build")


def test_vectors_captions_and_pictures_are_in_one_order(script, tmp_path):
    """Of seven items four, evenly spaced: paths, a picture with its words, and words alone."""
    names = [tmp_path / f"{number} apples.png" for number in range(7)]
    for number, name in enumerate(names):
        Image.new("RGB", (400, 200), (30 * number, 200, 90)).save(name)
    items = [*map(str, names[:3]), {"image": str(names[3]), "text": "three"}, "x", {"text": "words"}, str(names[6])]
    index = RetrievalIndex(16)
    index.add(torch.randn(7, 16), items)

    site = tmp_path / "site"
    site.mkdir()
    told = script.write_pictures(index, 4, site)
    kept = [0, 1, 3, 5]
    assert [one["caption"] for one in told] == ["0 apples", "1 apples", "three", "words"]
    rows = np.fromfile(site / "vectors.f16", "<f2").reshape(4, 16)
    np.testing.assert_array_equal(rows, index.embeddings[kept].numpy())
    assert [one["file"] for one in told] == [*(f"pictures/{place:05d}.jpg" for place in range(3)), ""]
    for one, place in zip(told[:3], kept, strict=False):
        small = Image.open(site / one["file"])
        assert small.size == (160, 80)
        np.testing.assert_allclose(small.getpixel((80, 40)), (30 * place, 200, 90), atol=4)


def test_the_page_reads_what_is_written(script):
    folder = Path(script.__file__).parent
    code = (folder / "search.js").read_text(encoding="utf-8")
    libraries = {
        f"./{name.rpartition('/')[2]}/{Path(file).name}"
        for name, (_, files) in script.LIBRARIES.items()
        for file in files
    }
    assert set(re.findall(r' from "(.+?)"', code)) <= libraries
    assert set(re.findall(r'\b(?:json|bytes)\("(.+?)"\)', code)) == {"site.json", "vectors.f16", *script.MODEL}
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in re.findall(r'"#(\w+)"', code))
    assert not re.search("https?://", page + code)


@pytest.fixture(scope="module")
def pairs(emoji_folder, tmp_path_factory) -> Path:
    """A copy, beside which an index is kept."""
    return Path(shutil.copy(emoji_folder / "test_concept.parquet", tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def site(script, pairs, tmp_path_factory) -> Path:
    """Of the checkpoint that ships."""
    pytest.importorskip("onnxruntime")
    directory = tmp_path_factory.mktemp("browser") / "site"
    try:
        script.build(str(shipped_checkpoint()), str(pairs), str(directory))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm has not the packages at hand and cannot fetch them: {error}")
    return directory


@pytest.fixture(scope="module")
def index(site, pairs) -> RetrievalIndex:
    """What the site was made of."""
    return RetrievalIndex.load(pairs.parent / f".{pairs.name}.oner-index")


@pytest.fixture(scope="module")
def page(site) -> Iterator[Any]:
    """A page of the browser; `elsewhere` are addresses that it asked beside the server's."""
    pytest.importorskip("playwright.sync_api")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    with page_at(address, "button:enabled", PATIENCE) as page:
        yield page
    server.shutdown()
    server.server_close()


def in_page(page: Any, code: str, given: Any) -> Any:
    """A function of `search`, the page's module, and of what is given."""
    return page.evaluate(f"async given => ({code})(await import(new URL('search.js', location)), given)", given)


def python_ids(text: str) -> list[int]:
    processor = AutoProcessor.from_pretrained(shipped_checkpoint())
    return processor(text=[text], padding=False, return_tensors=None)["input_ids"][0]


def python_vector(site: Path, ids: list[int]) -> np.ndarray:
    """(P,) of the same graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(site / "text_int8.onnx")
    row = np.array([ids], dtype=np.int64)  # (1, L)
    return session.run(["vectors"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0]


def rows_shown(page: Any) -> list[int]:
    sources = page.locator("#answers img").evaluate_all("all => all.map(one => one.getAttribute('src'))")
    return [int(re.fullmatch(r"pictures/(\d+)\.jpg", source)[1]) for source in sources]


slow = pytest.mark.slow
needs_browser = pytest.mark.skipif(None in (CHROMIUM, shutil.which("npm")), reason="needs Chromium and npm")


@slow
@needs_browser
def test_ids_and_vectors_are_pythons(page, site):
    found = in_page(page, "(search, texts) => texts.map(search.idsOf)", TEXTS)
    assert found == [python_ids(text) for text in TEXTS]
    asked = [ids for ids in found if len(ids) > 1]
    vectors = np.array([in_page(page, "async (search, ids) => [...await search.embed(ids)]", ids) for ids in asked])
    distances = np.abs(vectors - [python_vector(site, ids) for ids in asked]).max(1)  # (texts,)
    assert np.median(distances) < 1e-4 and distances.max() < TURNED, distances


@slow
@needs_browser
def test_answers_are_pythons(page, site, index):
    page.fill("#words", " ")
    page.press("#words", "Enter")
    page.wait_for_function("document.querySelector('#remark').innerText == 'Type some words.'")
    page.fill("#words", "red fruit")
    page.press("#words", "Enter")
    page.wait_for_function("document.querySelector('#remark').innerText.includes('ms to search')")
    scores, rows = index.search(torch.from_numpy(python_vector(site, python_ids("red fruit")))[None], 12)  # (1, k)
    assert rows_shown(page)[:10] == rows[0, :10].tolist()
    shown = [float(text.split()[0]) for text in page.locator("#answers figcaption").all_inner_texts()]
    np.testing.assert_allclose(shown, scores[0], atol=TURNED)
    assert page.locator("#answers img").first.evaluate("picture => picture.naturalWidth") > 0

    # what is like the third answer, it first
    third = rows_shown(page)[2]
    page.locator("#answers figure").nth(2).click()
    assert rows_shown(page) == index.search(index.embeddings[[third]], 12)[1][0].tolist()
    assert not page.elsewhere
