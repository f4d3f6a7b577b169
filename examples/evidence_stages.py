"""The stages of MoMo in examples/evidence.py: the model that each starts from, its length, and its metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from oner import open_rows
from oner.training.evaluation.embedding import Column, numbered, row_ids, spaced
from oner.training.evaluation.features import Pool, image_features
from oner.training.evaluation.retrieval import RetrievalEvaluator, ask
from oner.training.evaluation.suite_tasks import SUITE, SuiteOptions
from oner.training.publishing.model_loading import load_model

# row -> the row whose model it starts from
BEFORE = {
    "momo_untrained": None,
    "momo_stage1": None,
    "momo_stage2": "momo_stage1",
    "momo_stage2_text_only": "momo_stage1",
    "momo_stage3": "momo_stage2",
    "momo_stage3_no_cmga": "momo_stage2",
}
PROBES = ("emoji_groups", "supersense")
KS = (1, 5, 10)


def lengths(name: str, config: Mapping[str, Any], fraction: float) -> dict[str, int]:
    """A fraction of the steps and warm-up steps in the configuration. The very first step moves weights by 1e-5."""
    if name == "momo_untrained":
        return {"max_steps": 1}
    return {part: max(1, round(fraction * config[part])) for part in ("max_steps", "warmup_steps")}


def across_styles(tower: Any, processor: Any, pool: Pool, limit: int | None, emoji: Path) -> dict[str, float]:
    """
    Whether features recognise a concept in another drawing: emoji in an unseen style retrieve their concept among
    the training images of all queried concepts, by cosine. Returns recall@k and chance@k.
    """
    queries, known = (
        spaced(open_rows(str(emoji / f"{part}.parquet"), id_column="hexcode"), most)
        for part, most in (("test_style", limit), ("train", None))
    )
    concepts = set(row_ids(queries))
    gallery = [row for row in known if row["id"] in concepts]
    asked, given = numbered(row_ids(queries), row_ids(gallery))  # (Q,), (G,)
    features = (image_features(tower, processor, Column(rows, "image"), pool) for rows in (queries, gallery))
    vectors = [F.normalize(one, dim=-1) for one in features]  # (Q, D), (G, D)
    found = ask(*vectors, asked, given, KS)
    return {name: found[name] for k in KS for name in (f"recall@{k}", f"chance@{k}")}


def stage_values(
    directory: Path, config: Mapping[str, Any], rows: Sequence, seed: int, limit: int | None, data: Path
) -> tuple[dict[str, float], int]:
    """
    Evaluates an encoder without further training; also returns its number of parameters.

    Args:
        directory: The encoder's model directory.
        config: Its training configuration; retrieval is measured if contrast is among the losses.
        rows: Pairs whose images and first captions retrieve each other.
        seed: For the rows that select the regularisation of a probe.
        limit: Maximum number of rows of each part of a probe.
        data: Folder with `emoji` and `glosses`.

    Returns:
        Metrics by name: POOL/PROBE/logistic_accuracy, knn_accuracy and chance; POOL/styles/recall@k and chance@k;
        scenes/tr_r@k, ir_r@k and their chance.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(directory)
    tower = load_model(AutoModel, directory, draws_heads=True).to(device).eval()
    options = SuiteOptions(data=str(data), seeds=(seed,), limit=limit)

    # frozen features of images and of texts
    values: dict[str, float] = {}
    for pool in get_args(Pool):
        for name in PROBES:
            found = dict(SUITE[name](name, replace(options, pool=pool)).run(tower, processor))
            kept = [f"{name}/{value}" for value in ("logistic_accuracy", "knn_accuracy", "chance")]
            values |= {f"{pool}/{value}": found[value] for value in kept}
        styles = across_styles(tower, processor, pool, limit, data / "emoji")
        values |= {f"{pool}/styles/{name}": value for name, value in styles.items()}

    # without contrast the projections are untrained, and retrieval is random
    if "itc" in config["losses"]:
        model = load_model(AutoModelForZeroShotImageClassification, directory).to(device).eval()
        evaluator = RetrievalEvaluator(rows, 128, KS, "scenes", "first", progress=False)
        values |= dict(evaluator.run(model, processor))
    return values, sum(parameter.numel() for parameter in tower.parameters())
