"""An index that is written as it grows: killed, it goes on where it was; changed rows are embedded again."""

import os
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
from oner.processing.retrieval_unfinished import PARTS, unfinished_index

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
    index_until(search, monkeypatch, 3, photos, **options)
    monkeypatch.setattr(search, "_fingerprint", "another")
    with unfinished_index(tmp_path / "index", search._space) as known:
        assert known.rows and known.key({"image": str(photos / "00.png")}) not in known.rows


def test_every_kind_of_row_has_a_key_of_its_own(tmp_path):
    from PIL import Image

    (tmp_path / "a.png").write_bytes(b"a")
    rows = [
        {"text": "a"}, {"image": b"a"}, {"text": "a", "image": b"a"}, {"image": str(tmp_path / "a.png")},
        {"image": "https://example.org/a.png"}, {"image": Image.new("RGB", (2, 2))}, {"image": Image.new("L", (2, 2))},
        {"image": torch.zeros(3, 2, 2)}, {"image": torch.zeros(3, 2, 2).numpy().transpose(1, 2, 0)},
        {"image": {"bytes": b"b", "path": "a.png"}}, {"image": tmp_path / "gone.png"},
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
