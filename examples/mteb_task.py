"""Retrieval on any pairs as two mteb tasks, whose R@k (`hit_rate_at_k` in mteb) equal those of `oner evaluate`.

    python examples/mteb_task.py examples/checkpoints/oner-emoji examples/data/emoji/test_concept.parquet hexcode

Needs mteb and sentence-transformers. The tasks work with any model that mteb accepts; this script compares the export
loaded by sentence-transformers with our own evaluation of the same directory. mteb rounds to five digits.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import open_image
from oner.training.evaluation.retrieval import RetrievalEvaluator

KS = (1, 5, 10)
# our name of a direction -> mteb's: images retrieve captions, captions retrieve images
DIRECTIONS = {"tr": "i2t", "ir": "t2i"}


def make_task(evaluator: RetrievalEvaluator, direction: str) -> AbsTaskRetrieval:
    """One direction, `tr` or `ir`, of an evaluation's images (n) and captions (m), as a task of mteb."""
    pictures = [open_image(row["image"]) for row in evaluator.rows]
    image_features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    images = datasets.Dataset.from_dict({"id": names("i", pictures), "image": pictures}, features=image_features)
    texts = datasets.Dataset.from_dict({"id": names("t", evaluator.texts), "text": evaluator.texts})
    right = evaluator.image_ids[:, None] == evaluator.text_ids[None]  # (n, m), same concept
    if direction == "ir":
        queries, corpus, right = texts, images, right.T
    else:
        queries, corpus = images, texts

    class Pairs(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"{evaluator.name}-{DIRECTIONS[direction]}",
            description="Pictures and captions; right is what has the concept of the query.",
            dataset={"path": evaluator.name, "revision": "local"},
            type="Any2AnyRetrieval",
            category=DIRECTIONS[direction],
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_10",
        )
        k_values = KS

        def load_data(self, **_: Any) -> None:
            found = {
                query: {corpus["id"][place]: 1 for place in places.nonzero().flatten().tolist()}
                for query, places in zip(queries["id"], right, strict=True)
            }
            split = {"corpus": corpus, "queries": queries, "relevant_docs": found, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Pairs()


def names(kind: str, items: Sequence[Any]) -> list[str]:
    return [f"{kind}{number}" for number in range(len(items))]


def compare(model: str | Path, rows: Sequence[Any], name: str) -> Iterator[tuple[str, float, float]]:
    """Yields (metric, our value, mteb's value) of a model directory on rows of pairs."""
    evaluator = RetrievalEvaluator(rows, name=name, ks=KS, progress=False)
    own = AutoModelForZeroShotImageClassification.from_pretrained(model).eval()
    ours = dict(evaluator.run(own, AutoProcessor.from_pretrained(model)))
    encoder = SentenceTransformerEncoderWrapper(SentenceTransformer(str(model), device="cpu"))
    encoder.mteb_model_meta.modalities = [
        "text",
        "image",
    ]  # mteb asks the Hub for them, and treats a directory as a text model
    for direction in DIRECTIONS:
        result = mteb.evaluate(encoder, make_task(evaluator, direction), cache=None, show_progress_bar=False)
        (scores,) = result.task_results[0].scores["test"]
        for k in KS:
            number = f"{name}/{direction}_r@{k}"
            yield number, ours[number], scores[f"hit_rate_at_{k}"]


def main(model: str, source: str, id_column: str | None = None) -> None:
    for number, ours, theirs in compare(model, open_rows(source, id_column=id_column), Path(source).stem):
        print(f"{number:<32} oner {ours:.5f}  mteb {theirs:.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
