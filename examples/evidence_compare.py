"""The family comparison of examples/evidence.py: the metrics of each row, and the choice of its learning rate."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from clip_baseline import ClipBaseline, ClipObjective, ClipTower
from evidence_rows import CLIP, NEOMME, ROWS, Run
from neomme_baseline import NeoMmeBaseline, NeoMmeTower
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from oner import open_rows
from oner.training.cost.estimate import DEVICES, configuration_of, estimate
from oner.training.cost.flops import counted_flops
from oner.training.evaluation.embedding import (
    Column,
    Row,
    embed_images,
    embed_pairs,
    embed_texts,
    gallery_vectors,
    row_ids,
    spaced,
)
from oner.training.evaluation.gap import distribution_gap, paired_cosines
from oner.training.evaluation.metrics import centroid_distance
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator, ask
from oner.training.evaluation.suite_tasks import SUITE, SuiteOptions
from oner.training.objectives.objective import Example, objective_classes
from oner.training.publishing.model_loading import load_model
from oner.training.run.parsing import parse_arguments

# script -> the class of its model, and the wrapper that probes read
BASELINES = {CLIP: (ClipBaseline, ClipTower), NEOMME: (NeoMmeBaseline, NeoMmeTower)}
# known concepts in an unseen style, and unseen concepts in known styles
SPLITS = ("test_style", "test_concept")
HELD_OUT = "train_extra"  # near twins of training images, used only to choose a learning rate
PROBES = {"pictures": "emoji_groups", "texts": "supersense"}
FACTORS = (0.5, 1.0, 2.0)  # multiples of a row's own learning rate
KS = (1, 5, 10)
CANDIDATES = 32  # to re-rank, per query
WORDS = 12  # mean caption length when counting operations; the longest of a batch has the model's maximum


class ComposedWays(MultimodalRetrievalEvaluator):
    """
    Image and caption retrieve other images of their concept: by the image, by the caption, by the normalised sum of
    both embeddings, and by both in one pass if the model supports it.

    Yields name/composed_{way}_r@k and name/composed_chance@k.
    """

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        # the gallery (G, P), and queries (Q, P) of each kind
        gallery = gallery_vectors(model, processor, self.gallery_rows, self.batch_size)
        asking = Column(self.query_rows, "image", self.asked)
        picture = embed_images(model, processor, asking, self.batch_size)
        text = embed_texts(model, processor, self.texts, self.batch_size)
        ways = {"picture": picture, "text": text, "sum": F.normalize(picture + text, dim=-1)}
        if hasattr(model, "get_multimodal_features"):
            ways["joint"] = embed_pairs(model, processor, asking, self.texts, self.batch_size)

        # chance is the same for all kinds
        matching = (self.query_ids, self.gallery_ids, self.ks, self.query_keys, self.gallery_keys, self.chunk_size)
        for way, vectors in ways.items():
            values = ask(vectors, gallery, *matching)
            yield from ((f"{self.name}/composed_{way}_r@{k}", values[f"recall@{k}"]) for k in self.ks)
        yield from ((f"{self.name}/composed_chance@{k}", values[f"chance@{k}"]) for k in self.ks)


def load(run: Run, device: torch.device) -> tuple[nn.Module, Any]:
    """The trained model and its processor."""
    directory = run.directory / "model"
    if ROWS[run.name].script in BASELINES:
        model = BASELINES[ROWS[run.name].script][0].from_directory(directory)
    else:
        model = load_model(AutoModelForZeroShotImageClassification, directory)
    return model.to(device).eval(), AutoProcessor.from_pretrained(directory)


def load_tower(run: Run, model: nn.Module, device: torch.device) -> nn.Module:
    """A trained model without its projections."""
    if ROWS[run.name].script in BASELINES:
        return BASELINES[ROWS[run.name].script][1](model).eval()
    return load_model(AutoModel, run.directory / "model", draws_heads=True).to(device).eval()


def compare_values(run: Run, limit: int | None, data: Path) -> tuple[dict[str, float], int]:
    """
    All metrics of a trained row, and its number of parameters.

    Args:
        limit: Maximum number of rows of each part.
        data: Folder with `emoji` and `glosses`.

    Returns:
        Metrics by name: {split}/... (retrieval, composed queries, gaps), pictures/... and texts/... (probes),
        held_out/... (retrieval), flops_per_pair.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load(run, device)
    known, held_out = (open_rows(str(data / "emoji" / f"{part}.parquet"), id_column="hexcode")
                       for part in ("train", HELD_OUT))  # fmt: skip
    evaluator = RetrievalEvaluator(spaced(held_out, limit), 128, KS, "held_out", "first", progress=False)
    values = dict(evaluator.run(model, processor))

    # both splits; composed queries in the unseen style search training images of the same concepts
    for split in SPLITS:
        rows = spaced(open_rows(str(data / "emoji" / f"{split}.parquet"), id_column="hexcode"), limit)
        values |= pair_values(model, processor, rows, split)
        concepts = set(row_ids(rows))
        gallery = [row for row in known if row["id"] in concepts] if split == "test_style" else rows
        composed = ComposedWays(rows, gallery, 128, KS, split, progress=False)
        values |= dict(composed.run(model, processor))

    # frozen features of images and of texts
    tower = load_tower(run, model, device)
    options = SuiteOptions(data=str(data), seeds=(run.seed,), limit=limit)
    for what, task in PROBES.items():
        found = SUITE[task](task, options).run(tower, processor)
        values |= {name.replace(task, what, 1): value for name, value in found}
    return values | {"flops_per_pair": flops_per_pair(run)}, sum(p.numel() for p in model.parameters())


def pair_values(model: Any, processor: Any, rows: Sequence[Row], split: str) -> dict[str, float]:
    """Retrieval by dot products, re-ranked if the model has a matching head, and the gap: {split}/..."""
    matches = hasattr(model, "match")
    told = {"name": split, "captions": "first", "progress": False}
    evaluator = (
        RerankingEvaluator(rows, 128, KS, rerank_k=CANDIDATES, **told)
        if matches
        else RetrievalEvaluator(rows, 128, KS, **told)
    )
    images, captions = (side.cpu() for side in evaluator.embed(model, processor))  # (n, P), (m, P)
    values = dict(evaluator.numbers(images, captions))
    if matches:
        matched = evaluator.matched(model, processor, images, captions)
        values |= dict(evaluator.reranked(images, captions, matched, evaluator.rerank_score))

    # each image with its own caption
    texts = embed_texts(model, processor, [own[0] for own in evaluator.rows.captions], 512).cpu()  # (n, P)
    paired, unpaired = paired_cosines(images, texts, evaluator.rows.ids)
    across, within = distribution_gap(images, texts)
    gap = {"centroid": centroid_distance(images, texts), "distribution": across, "distribution_within": within}
    gap |= {"cosine_paired": paired, "cosine_unpaired": unpaired}
    return values | {f"{split}/gap_{name}": value for name, value in gap.items()}


def flops_per_pair(run: Run) -> float:
    """Operations of a training step per pair, from `oner estimate`, or counted in the same way for baselines."""
    command = run.command(threads=1)
    arguments = parse_arguments(command[command.index("--config") :])
    if ROWS[run.name].script not in BASELINES:
        return estimate(arguments, DEVICES["h100"], words=WORDS).flops_per_pair

    # the batch that `estimate` assumes: one caption has the maximum length
    config = configuration_of(arguments)
    batch_size = arguments.run.batch_size
    lengths = [config.max_text_length] + [min(WORDS, config.max_text_length)] * (batch_size - 1)
    batch = objective_classes("oner")[0].example_batches(config, lengths, Example(0.0, 0.0))["pairs"]
    told = {word.removeprefix("--"): True for word in ROWS[run.name].words}
    model = BASELINES[ROWS[run.name].script][0](config, **told)
    return counted_flops(lambda: ClipObjective(model)(model, batch, 0.0)[0].backward()) / batch_size


def held_out_recall(content: Mapping[str, Any]) -> float:
    """The criterion for learning rates: R@10 on held-out images, mean of both directions."""
    return fmean(content["values"][f"held_out/{way}_r@10"] for way in ("tr", "ir"))


def trials_of(a: argparse.Namespace) -> dict[str, dict[float, str]]:
    """Row -> factor -> the row at that multiple of its own learning rate."""
    # rows that set a rate keep it
    free = [row for row in a.rows if "base_learning_rate=" not in row]
    return {row: {factor: at_rate(row, factor, a) for factor in FACTORS} for row in free}


def at_rate(row: str, factor: float, a: argparse.Namespace) -> str:
    """The row at a multiple of its own learning rate; unchanged for a factor of 1."""
    if factor == 1.0:
        return row
    rate = factor * Run(row, 0, Path(a.output)).config()["base_learning_rate"]
    return f"{row}{',' if ':' in row else ':'}base_learning_rate={rate:g}"
