"""An index that is written as it grows: killed, it goes on where it was; changed rows are embedded again."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import Pipeline, pipeline

import oner  # noqa: F401  registers the task
from oner.processing import retrieval_unfinished
from oner.processing.retrieval_index import IndexFileError, RetrievalIndex
from oner.processing.retrieval_sources import SHEET_REASON
from oner.processing.retrieval_unfinished import PARTS, unfinished_index
from oner.training.evaluation.contact_sheet import draw_sheet, save_sheet

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples/checkpoints/oner-emoji")
COUNT = 12


@pytest.fixture(scope="module")
def search() -> Pipeline:
    return pipeline("image-text-retrieval", model=MODEL)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    table = pq.read_table(ROOT / "examples/data/emoji/test_style.parquet", columns=["image"])
    for number, cell in enumerate(table["image"].slice(0, COUNT).to_pylist()):
        (folder / f"{number:02}.png").write_bytes(cell["bytes"])
    (folder / "05.png").write_bytes(b"broken")
    return folder


@pytest.fixture
def embedded(search: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass of the model embedded."""
    counts: list[int] = []
    forward = search.forward

    def counted(inputs: dict[str, Any], **options: Any) -> Any:
        counts.append(len(inputs.get("pixel_values", inputs.get("input_ids"))))
        return forward(inputs, **options)

    monkeypatch.setattr(search, "forward", counted)
    return counts


def index_until(search: Pipeline, monkeypatch: pytest.MonkeyPatch, passes: int, *args: Any, **options: Any) -> None:
    """As if the process ended in a pass of the model."""
    monkeypatch.setattr(retrieval_unfinished, "PART_ROWS", 1)
    forward = search.forward

    def ends(inputs: dict[str, Any], **given: Any) -> Any:
        nonlocal passes
        passes -= 1
        if passes < 0:
            raise KeyboardInterrupt
        return forward(inputs, **given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "forward", ends)
        search.index(*args, **options)


@pytest.mark.filterwarnings("ignore:1 of 12 entries")
def test_a_stopped_index_goes_on(search, photos, embedded, tmp_path, monkeypatch):
    """To the same index, to the bit, with what it had not embedded; its neighbours see the old one until then."""
    options = {"batch_size": 3, "show_progress": False}
    whole = search.index(photos, **options)
    old = search.index_texts(["old"], show_progress=False)
    old.save(tmp_path / "index")
    index_until(search, monkeypatch, 2, photos, directory=tmp_path / "index", **options)
    assert search.retrieval_index is old and RetrievalIndex.load(tmp_path / "index").items == ["old"]
    assert len(list((tmp_path / "index" / PARTS).iterdir())) == 2

    embedded.clear()
    index = search.index(photos, directory=tmp_path / "index", **options)
    assert sum(embedded) == COUNT - 1 - 5
    for found in (index, RetrievalIndex.load(tmp_path / "index")):
        assert torch.equal(found.embeddings, whole.embeddings)
        assert found.items == whole.items and found.skipped == whole.skipped
    assert not (tmp_path / "index" / PARTS).exists()


@pytest.mark.filterwarnings("ignore:1 of 1. entries")
def test_only_what_is_the_same_is_taken_over(search, photos, embedded, tmp_path, monkeypatch):
    options = {"batch_size": 3, "show_progress": False, "directory": tmp_path / "index"}
    index_until(search, monkeypatch, 3, photos, **options)

    # one picture was replaced, one added before all others, one part damaged
    (photos / "01.png").write_bytes((photos / "11.png").read_bytes())
    (photos / "00-new.png").write_bytes((photos / "10.png").read_bytes())
    parts = sorted((tmp_path / "index" / PARTS).iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    embedded.clear()
    index = search.index(photos, **options)
    assert 3 + 1 + 1 <= sum(embedded) < COUNT
    alone = search.index(photos, batch_size=3, show_progress=False)
    assert index.items == alone.items and (index.embeddings - alone.embeddings).abs().max() < 2e-3

    # nothing of another model's
    index_until(search, monkeypatch, 3, photos, **{**options, "directory": tmp_path / "other"})
    monkeypatch.setattr(search, "_fingerprint", "another")
    for place in ("index", "other"):
        with unfinished_index(tmp_path / place, search._space) as known:
            assert known.find(known.key({"image": str(photos / "00.png")})) is None


def test_captions_of_one_picture_are_counted_one_by_one(search, photos, tmp_path):
    rows = [{"image": str(photos / f"0{number // 3}.png"), "item": {"number": number}} for number in range(6)]
    options = {"show_progress": False, "directory": tmp_path / "index"}
    assert search.index(rows, **options).counts["gone"] == 0
    assert search.index(rows, **options).counts == {"embedded": 0, "kept": 6, "gone": 0}
    assert search.index(rows[:4], **options).counts == {"embedded": 0, "kept": 4, "gone": 2}


@pytest.mark.filterwarnings("ignore:1 of 1. entries")
def test_an_index_made_again_embeds_what_is_new_and_drops_what_is_gone(search, photos, embedded, tmp_path):
    options = {"batch_size": 4, "show_progress": False, "directory": tmp_path / "index"}
    first = search.index(photos, **options)
    assert first.counts == {"embedded": COUNT - 1, "kept": 0, "gone": 0}
    again = search.index(photos, **options)
    assert again.counts == {"embedded": 0, "kept": COUNT - 1, "gone": 0}
    assert torch.equal(again.embeddings, first.embeddings) and again.skipped == first.skipped

    # one has changed, one is new, one has gone
    (photos / "03.png").write_bytes((photos / "08.png").read_bytes())
    (photos / "00-new.png").write_bytes((photos / "09.png").read_bytes())
    (photos / "07.png").unlink()
    embedded.clear()
    index = search.index(photos, **options)
    assert sum(embedded) == 2 and index.counts == {"embedded": 2, "kept": COUNT - 3, "gone": 2}
    names = ["00-new", *(f"{number:02}" for number in range(COUNT) if number not in (5, 7))]
    assert [Path(item).stem for item in index.items] == names
    alone = search.index(photos, batch_size=4, show_progress=False)
    assert alone.items == index.items and (alone.embeddings - index.embeddings).abs().max() < 2e-3

    # saved and loaded they are still known; in another precision they are not
    search.load_index(tmp_path / "index")
    search.save_index(tmp_path / "copy")
    embedded.clear()
    search.index(photos, **{**options, "directory": tmp_path / "copy"})
    assert not embedded
    assert search.index(photos, **options, dtype="float32").counts["kept"] == 0


def test_a_sheet_that_was_drawn_of_pictures_is_passed_over(search, photos, tmp_path):
    (photos / "05.png").unlink()
    answer = {"score": 0.5, "item": str(photos / "01.png"), "index": 1}
    save_sheet(draw_sheet({"text": "sun"}, [answer], 1), photos / "results.png")
    with pytest.warns(UserWarning, match="1 of 12 entries"):
        index = search.index(photos, show_progress=False)
    assert index.skipped == [{"item": str(photos / "results.png"), "reason": SHEET_REASON}]


class Width16:
    """Embeds a text by its digest, as fast as bookkeeping needs."""

    def __call__(self, inputs, **options):
        rows = [hashlib.sha256(text.encode()).digest()[:16] for text in inputs["texts"]]
        numbers = torch.tensor([list(row) for row in rows], dtype=torch.float32)  # (B, 16)
        return {"embeddings": numbers - 127.5}


@pytest.fixture
def quick(search: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The pipeline with a model that costs nothing."""
    monkeypatch.setattr(search.model.config, "projection_dim", 16)
    monkeypatch.setattr(search, "preprocess", lambda queries, **_: {"texts": [query["text"] for query in queries]})
    monkeypatch.setattr(search, "forward", Width16())
    return search


def check_whole(index: RetrievalIndex, texts: list[str]) -> None:
    """Every text once, in its order, with its own embedding."""
    assert index.items == texts and len(set(index.keys)) == len(set(texts)) == len(index)
    own = torch.nn.functional.normalize(Width16()({"texts": texts})["embeddings"], dim=1)
    assert (index.embeddings.float() - own).abs().max() < 1e-3


def test_what_is_added_takes_nothing_away(quick, tmp_path):
    quick.index_texts(["a", "b"], directory=tmp_path, show_progress=False)
    index = quick.index_texts(["c"], directory=tmp_path, append=True, show_progress=False)
    assert index.counts == {"embedded": 1, "kept": 0, "gone": 0} and RetrievalIndex.load(tmp_path).items == [
        "a",
        "b",
        "c",
    ]


def test_many_interruptions_lose_and_double_nothing(quick, tmp_path, monkeypatch):
    """Eight calls that end somewhere, some with other texts than before; then one that does not."""
    draw = random.Random(0)
    texts = [f"text {number}" for number in range(600)]
    options = {"batch_size": 8, "show_progress": False}  # 75 passes, more than all calls begin
    for attempt in range(8):
        if attempt % 3 == 2:
            texts[draw.randrange(len(texts))] = f"changed {attempt}"
            texts.insert(draw.randrange(len(texts)), f"new {attempt}")
        index_texts_until(quick, monkeypatch, draw.randrange(1, 9), texts, directory=tmp_path, **options)
    check_whole(quick.index_texts(texts, directory=tmp_path, **options), texts)
    check_whole(RetrievalIndex.load(tmp_path), texts)


def index_texts_until(search: Pipeline, monkeypatch: pytest.MonkeyPatch, passes: int, texts: list, **options) -> None:
    index_until(search, monkeypatch, passes, ({"text": text} for text in texts), **options)


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(quick, tmp_path, monkeypatch):
    """SIGKILL at random moments of embedding, of saving, and of embedding again after texts have changed."""
    monkeypatch.setattr(retrieval_unfinished, "PART_SECONDS", 0.05)
    draw = random.Random(0)
    texts = [f"text {number}" for number in range(60000)]
    killed = 0
    for attempt in range(1000):
        if killed == 20:
            break
        if attempt % 4 == 3:
            texts[draw.randrange(len(texts))] = f"changed {attempt}"
            texts.insert(draw.randrange(len(texts)), f"new {attempt}")
        child = os.fork()
        if not child:
            quick.index_texts(texts, directory=tmp_path, show_progress=False, num_workers=1)
            os._exit(0)
        time.sleep(draw.uniform(0.05, 1.5))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (tmp_path / "retrieval_index.json").exists():
            found = RetrievalIndex.load(tmp_path)  # the old one or the new one, whole
            assert len(set(found.items)) == len(found) >= 60000
    assert killed == 20
    check_whole(quick.index_texts(texts, directory=tmp_path, show_progress=False), texts)


@pytest.mark.slow
def test_one_changed_of_ten_thousand_files_costs_little(search, tmp_path, monkeypatch):
    """Bookkeeping alone, on processor time: the model costs nothing here."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10000):
        (folder / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + str(number).encode())
    monkeypatch.setattr(search, "read", lambda picture, *_: torch.zeros(3, 4, 4, dtype=torch.uint8))
    rows = torch.randn(10000, search.model.config.projection_dim)
    monkeypatch.setattr(search, "preprocess", lambda queries, **_: {"pixel_values": torch.zeros(len(queries))})
    monkeypatch.setattr(search, "forward", lambda inputs: {"embeddings": rows[: len(inputs["pixel_values"])]})
    search.index(folder, directory=tmp_path / "index", show_progress=False)
    (folder / "17.png").write_bytes(b"\x89PNG\r\n\x1a\nanother")
    start = time.process_time()
    index = search.index(folder, directory=tmp_path / "index", show_progress=False)
    spent = time.process_time() - start
    print(f"one changed of 10,000: {spent:.2f} s of processor time")
    assert index.counts == {"embedded": 1, "kept": 9999, "gone": 1} and spent < 2


def test_every_kind_of_row_has_a_key_of_its_own(tmp_path):
    from PIL import Image

    (tmp_path / "a.png").write_bytes(b"a")
    rows = [
        {"text": "a"}, {"image": b"a"}, {"text": "a", "image": b"a"}, {"image": str(tmp_path / "a.png")},
        {"image": "https://example.org/a.png"}, {"image": Image.new("RGB", (2, 2))},
        {"image": Image.new("RGB", (1, 4))}, {"image": {"bytes": b"b", "path": "a.png"}},
        {"image": tmp_path / "gone.png"},
    ]  # fmt: skip
    with unfinished_index(tmp_path / "index", "space") as known:
        keys = [known.key(row) for row in rows]
        assert None not in keys and len(set(keys)) == len(rows)
        assert known.key({"image": tmp_path / "a.png"}) == keys[3]
        assert known.key({"image": object()}) is None
        with pytest.raises(IndexFileError, match="another process is indexing into it"):
            with unfinished_index(tmp_path / "index", "space"):
                pass
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexFileError, match="is a file"):
        with unfinished_index(tmp_path / "file", "space"):
            pass
    with unfinished_index(None, "space") as known:
        assert known.key(rows[0]) is None


def test_what_is_in_memory_is_known_by_what_is_seen(tmp_path):
    """Numbers that stand for other colours, by a palette, a range or a turn, are another picture; and only those."""
    from PIL import Image

    red, blue, turned = Image.new("P", (2, 1)), Image.new("P", (2, 1)), Image.new("RGB", (2, 2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    turned.putpixel((0, 0), (255, 0, 0))
    upright = turned.copy()
    turned.getexif()[0x0112] = 3
    bits = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    same = [Image.new("RGB", (2, 2)), Image.new("L", (2, 2)), torch.zeros(3, 2, 2), torch.zeros(2, 2).numpy()]
    with unfinished_index(tmp_path, "space") as known:
        keys = [known.key({"image": one}) for one in (red, blue, turned, upright, bits, bits.float(), *same)]
    assert None not in keys and len(set(keys[:6])) == 6 and len(set(keys[6:])) == 1


def test_files_that_change_places_are_embedded_again(tmp_path):
    """Of one size and date, as archives and converters leave them."""
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        path.write_bytes(path.name.encode())
        os.utime(path, (1, 1))
    with unfinished_index(tmp_path / "index", "space") as known:
        before = [known.key({"image": path}) for path in paths]
        paths[0].rename(tmp_path / "other")
        paths[1].rename(paths[0])
        (tmp_path / "other").rename(paths[1])
        after = [known.key({"image": path}) for path in paths]
    assert not set(before) & set(after)


def caption(number: int) -> str:
    """One of many, of letters alone: the vocabulary has no digits."""
    return "red apple " + str(number).translate(str.maketrans("0123456789", "abcdefghij"))


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_embedded(search, tmp_path):
    """SIGKILL while captions are embedded: parts are there, and the next call needs only the rest."""
    code = (
        "import sys, oner, torch\nfrom transformers import pipeline\n"
        "from oner.processing import retrieval_unfinished\nretrieval_unfinished.PART_SECONDS = 0.0\n"
        f"pipe = pipeline('image-text-retrieval', model={MODEL!r})\n"
        "sys.path.insert(0, 'tests/processing')\nfrom test_index_unfinished import caption\n"
        "pipe.index_texts(map(caption, range(10**6)), show_progress=False, directory=sys.argv[1])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob(f"{PARTS}/*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with unfinished_index(tmp_path, search._space) as known:
        keys = [known.key({"text": caption(number)}) for number in range(96)]
        assert len(known.rows) >= 96 and all(key in known.rows for key in keys)
        kept = torch.stack([known.rows[key] for key in keys[:32]])
        torch.testing.assert_close(kept, search.embed(map(caption, range(32))), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:1 of 12 entries")
def test_shares_of_several_processes_become_the_index_of_one(search, photos, embedded, tmp_path, monkeypatch):
    """To the bit, also where a share was killed and embedded again; and no row is embedded twice."""
    options = {"batch_size": 3, "show_progress": False}
    alone = search.index(photos, directory=tmp_path / "alone", **options)
    shared = tmp_path / "shared"
    embedded.clear()
    index_until(search, monkeypatch, 1, photos, directory=shared, share=(1, 2), **options)
    for place in (1, 0):
        assert len(search.index(photos, directory=shared, share=(place, 2), **options)) == (6, 5)[place]
        assert not (shared / "retrieval_index.json").exists()
    index = search.index(photos, directory=shared, **options)
    assert sum(embedded) == COUNT - 1 and index.counts == {"embedded": 0, "kept": COUNT - 1, "gone": 0}
    assert index.items == alone.items and index.keys == alone.keys and index.skipped == alone.skipped
    assert torch.equal(index.embeddings, alone.embeddings) and not (shared / PARTS).exists()

    # shares of one place, or an index beside the first share, are refused
    with unfinished_index(shared, "space", share=1):
        with pytest.raises(IndexFileError, match="another process is indexing into it"):
            search.index(photos, directory=shared, share=(1, 2), **options)
        search.index(photos, directory=shared, share=(0, 2), **options)
    with unfinished_index(shared, "space"), pytest.raises(IndexFileError, match="another process"):
        search.index(photos, directory=shared, share=(0, 2), **options)


@pytest.mark.slow
def test_two_processes_index_a_folder(photos, tmp_path):
    """As `accelerate launch` starts them, and what they leave is what one process would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    line = [*launch, "oner_command_line", "index", str(photos), str(tmp_path / "index")]
    for said in (f"{COUNT - 1} items in {tmp_path / 'index'}: {COUNT - 1} embedded, 0 as they were", "0 embedded"):
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert said in done.stdout and done.stdout.count("search them: ") == 1
    assert len(RetrievalIndex.load(tmp_path / "index")) == COUNT - 1
