"""Is one pass over image and text better than late fusion of their two embeddings, trained on the same queries?

    python examples/data/scenes.py runs/scenes --pairs 0 --triples 16000
    python examples/late_fusion.py examples/checkpoints/oner-scenes --scenes runs/scenes

A query is an image with words that say how the target image differs from it. Four ways to embed it are compared: the
joint pass of the model, the sum of both embeddings, and two-layer perceptrons over both embeddings, without and with
their product. Perceptrons are trained on the triples with the loss of `oner finetune --task cir`; the model under them
is frozen, so the gallery stays the same for all ways. A fine-tuned MODEL shows what training its joint pass on these
triples gives.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from evidence_table import percent, spread
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from oner.training.evaluation.composed_queries import ComposedQueriesEvaluator, open_queries
from oner.training.evaluation.embedding import Column, embed_images, embed_texts, gallery_vectors
from oner.training.objectives.losses import info_nce
from oner.training.publishing.model_card import markdown_table
from oner.training.publishing.model_loading import load_model

SPLITS = ("unseen_pairs", "unseen_style", "unseen_concepts")
# how ComposedQueriesEvaluator calls a way, and the table
UNTRAINED = {"picture": "image alone", "words": "text alone", "sum": "sum of both", "both": "joint pass"}
Figures = dict[str, float]
STEPS, BATCH, RATE, WEIGHT_DECAY = 1500, 256, 1e-3, 0.05


class Perceptron(nn.Module):
    """Two layers over an image and a text embedding (B, P) each, added to their sum."""

    def __init__(self, width: int, product: bool) -> None:
        super().__init__()
        self.product = product
        self.hidden = nn.Linear((3 if product else 2) * width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        parts = [image, text, image * text] if self.product else [image, text]
        fused = self.out(F.gelu(self.hidden(torch.cat(parts, dim=-1))))  # (B, P)
        return F.normalize(image + text + fused, dim=-1)


def embedded_triples(model: Any, processor: Any, path: Path, limit: int | None) -> dict[str, Tensor]:
    """Frozen embeddings (n, P) of the references, the words and the targets of all triples."""
    rows = pq.read_table(path, columns=["image", "text", "target_image"]).slice(0, limit).to_pylist()
    return {
        "reference": embed_images(model, processor, Column(rows, "image"), 128, progress=True),
        "words": embed_texts(model, processor, [row["text"] for row in rows], 512, progress=True),
        "target": embed_images(model, processor, Column(rows, "target_image"), 128, progress=True),
    }


def trained(triples: dict[str, Tensor], product: bool, seed: int, temperature: float, steps: int) -> Perceptron:
    """A perceptron after `steps` batches, with a cosine schedule. Wrong answers: other targets, and all references."""
    torch.manual_seed(seed)
    perceptron = Perceptron(triples["words"].shape[1], product).to(triples["words"].device)
    optimizer = torch.optim.AdamW(perceptron.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randperm(len(triples["words"]))[:BATCH]
        reference, words, target = (triples[name][chosen] for name in ("reference", "words", "target"))  # (B, P)
        query = perceptron(reference, words)  # (B, P)
        asked = info_nce(query, torch.cat([target, reference]), temperature)
        answered = info_nce(target, query, temperature)
        optimizer.zero_grad()
        ((asked + answered) / 2).backward()
        optimizer.step()
        schedule.step()
    return perceptron.eval()


def measured(evaluator: ComposedQueriesEvaluator, ways: Mapping[str, Tensor], pictures: Tensor) -> dict[str, Figures]:
    """Way -> R@10 in the gallery, and how often the target is first of its ten choices."""
    values = dict(evaluator.compare(ways, pictures))
    return {
        way: {what: values[f"{evaluator.name}/composed_{way}_{what}"] for what in ("r@10", "choice")}
        for way in UNTRAINED
    }


def compare(a: argparse.Namespace) -> dict[str, dict[str, list[Figures]]]:
    """Way -> split -> the figures of each seed; what is not trained has one."""
    processor = AutoProcessor.from_pretrained(a.model)
    model = load_model(AutoModel, a.model).eval().requires_grad_(False)
    triples = embedded_triples(model, processor, a.scenes / "train_triples.parquet", a.triples)
    perceptrons = {
        title: [trained(triples, product, seed, model.config.temperature, a.steps) for seed in a.seeds]
        for title, product in (("perceptron", False), ("perceptron with product", True))
    }
    found: dict[str, dict[str, list[Figures]]] = {title: {} for title in (*UNTRAINED.values(), *perceptrons)}
    for split in a.splits:
        queries = open_queries(a.scenes / f"{split}_queries.parquet", a.limit)
        gallery = pq.read_table(a.scenes / f"{split}_gallery.parquet").to_pylist()
        evaluator = ComposedQueriesEvaluator(queries, gallery, name=split, progress=False)
        pictures = gallery_vectors(model, processor, gallery)  # (G, P)
        ways = evaluator.ways(model, processor)  # (Q, P) each
        for way, figures in measured(evaluator, ways, pictures).items():
            found[UNTRAINED[way]][split] = [figures]

        # the same embeddings, fused
        for title, seeds in perceptrons.items():
            with torch.no_grad():
                fused = [perceptron(ways["picture"], ways["words"]) for perceptron in seeds]  # (Q, P) each
            of_seeds = [measured(evaluator, {**ways, "both": both}, pictures) for both in fused]
            found[title][split] = [figures["both"] for figures in of_seeds]
    return found


def table(found: dict[str, dict[str, list[Figures]]]) -> str:
    """Means over seeds in per cent, with the sample's standard deviation where there are several."""
    splits = list(next(iter(found.values())))
    header = ["query", *(f"{split}: {what}" for split in splits for what in ("R@10", "first of ten"))]
    lines = []
    for title, by_split in found.items():
        lines.append(
            [title]
            + [
                spread([seed[what] for seed in by_split[split]], percent)
                for split in splits
                for what in ("r@10", "choice")
            ]
        )
    return markdown_table(header, lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="with a joint pass and one space for images and texts")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} triples each")
    parser.add_argument("--triples", type=int, help="train on the first so many")
    parser.add_argument("--limit", type=int, help="ask so many queries of each split, evenly spaced")
    parser.add_argument("--output", type=Path, help="JSON with the figures of each seed")
    a = parser.parse_args(given)
    found = compare(a)
    if a.output is not None:
        a.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
