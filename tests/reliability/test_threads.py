"""Eight threads at one model: some add, others search, ground, match, save and load, and every answer is checked.

The short run stands in for the long one, `make test-slow`, which goes on for a minute.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, Pipeline, pipeline

from oner.processing.retrieval_index import RetrievalIndex

ROOT = Path(__file__).parents[2]
COUNT = 48
SEEN = 8


class Served:
    """One SIMLA behind three pipelines, and what each answers when nobody else asks."""

    def __init__(self, folder: Path):
        checkpoint = str(ROOT / "examples/checkpoints/simla-emoji")
        model = AutoModelForZeroShotImageClassification.from_pretrained(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
        tasks = ("image-text-retrieval", "image-text-matching", "visual-grounding")
        self.search, self.match, self.ground = (self.pipe(task, model, processor) for task in tasks)
        self.folder = folder
        rows = pq.read_table(ROOT / "examples/data/emoji/test_style.parquet").slice(0, COUNT).to_pylist()
        self.pictures = [row["image"]["bytes"] for row in rows]
        self.captions = [row["captions"][0] for row in rows]

        # alone; the rows grow behind these, each a picture that stands there already under another name
        self.embeddings = self.search.embed(self.pictures)  # (COUNT, P)
        self.search.index(self.named(range(COUNT)), show_progress=False)
        self.search.save_index(folder)
        self.nearest = [self.search(caption, top_k=1)[0]["score"] for caption in self.captions]
        pairs = list(zip(self.pictures, self.captions, strict=True))[:SEEN]
        self.matches = [self.match(picture, text=caption)["score"] for picture, caption in pairs]
        self.maps = [self.ground(picture, text=caption)["map"] for picture, caption in pairs]

    @staticmethod
    def pipe(task: str, model: torch.nn.Module, processor: object) -> Pipeline:
        return pipeline(task, model=model, processor=processor)

    def named(self, numbers: range) -> list[dict]:
        return [{"image": self.pictures[number % COUNT], "item": number} for number in numbers]

    def add(self, turn: int) -> bool:
        start = COUNT + turn * 4
        before = len(self.search.retrieval_index)
        index = self.search.index(self.named(range(start, start + 4)), append=True, show_progress=False)
        return len(index) >= before + 4 and self.whole(index)

    def find(self, turn: int) -> bool:
        """The best answer to a caption is as good as ever; a picture finds itself, under one of its names."""
        number = turn % COUNT
        best = self.search(self.captions[number], top_k=1)[0]
        own = self.search(image=self.pictures[number], top_k=1)[0]
        twin = self.embeddings[own["item"] % COUNT] @ self.embeddings[number]
        return abs(best["score"] - self.nearest[number]) < 1e-3 and own["score"] > 0.999 and twin > 0.999

    def pair(self, turn: int) -> bool:
        number = turn % SEEN
        score = self.match(self.pictures[number], text=self.captions[number])["score"]
        return abs(score - self.matches[number]) < 1e-4

    def where(self, turn: int) -> bool:
        number = turn % SEEN
        cells = self.ground(self.pictures[number], text=self.captions[number])["map"]
        return torch.allclose(cells, self.maps[number], rtol=1e-3, atol=1e-7)

    def save(self, turn: int) -> bool:
        return self.search.save_index(self.folder) == self.folder

    def load(self, turn: int) -> bool:
        return self.whole(RetrievalIndex.load(self.folder))

    def whole(self, index: RetrievalIndex) -> bool:
        """Each item beside its own embedding, of as many as there are at least."""
        rows = index.embeddings.float()  # (n, P)
        own = self.embeddings[[item % COUNT for item in index.items[: len(rows)]]]  # (n, P)
        return len(index.items) >= len(rows) >= COUNT and bool(((rows * own).sum(1) > 0.999).all())


def run(served: Served, seconds: float) -> Counter:
    """How often each was done; raises what a thread raises."""
    jobs: list[Callable[[int], bool]] = [
        served.add, served.find, served.find, served.pair, served.where, served.where, served.save, served.load,
    ]  # fmt: skip
    done, stop = Counter(), threading.Event()
    end = time.monotonic() + seconds

    def work(job: Callable[[int], bool]) -> None:
        turn = 0
        while not turn or (time.monotonic() < end and not stop.is_set()):
            assert job(turn), f"{job.__name__} in its turn {turn}"
            turn += 1
            done[job.__name__] += 1

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        for future in futures:
            try:
                future.result()
            finally:
                if future.done() and future.exception():
                    stop.set()
    return done


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_every_answer_is_right_while_all_happens_at_once(served: Served, seconds: int) -> None:
    done = run(served, seconds)
    assert set(done) == {"add", "find", "pair", "where", "save", "load"} and all(done.values())
    index = served.search.retrieval_index
    assert served.whole(index) and len(index.items) == len(index.embeddings)
