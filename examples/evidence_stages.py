"""Rows of examples/evidence.py that are stages of MoMo: what each begins with, its length, what is measured of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from oner.training.evaluation.features import Pool
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.evaluation.suite_tasks import SUITE, SuiteOptions
from oner.training.publishing.model_loading import load_model

# row -> the row whose model it begins with
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
    """Steps of a row and of its warm-up, a fraction of its file's. The first step of all moves weights by 1e-5."""
    if name == "momo_untrained":
        return {"max_steps": 1}
    return {part: max(1, round(fraction * config[part])) for part in ("max_steps", "warmup_steps")}


def stage_values(
    directory: Path, config: Mapping[str, Any], rows: Sequence, seed: int, limit: int | None, data: Path
) -> tuple[dict[str, float], int]:
    """
    What an encoder is good for without more training, and how many parameters it has.

    Args:
        directory: Its model directory.
        config: The file that it was trained by; retrieval is measured where contrast is among its losses.
        rows: Pairs, whose images and first captions ask each other.
        seed: Of the rows that choose a probe's strength.
        limit: At most so many rows of each part of a probe.
        data: Folder with `emoji` and `glosses`.

    Returns:
        By name: POOL/PROBE/logistic_accuracy, knn_accuracy and chance, scenes/tr_r@k, ir_r@k and their chance.
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

    # projections that nothing trained would ask at random
    if "itc" in config["losses"]:
        model = load_model(AutoModelForZeroShotImageClassification, directory).to(device).eval()
        evaluator = RetrievalEvaluator(rows, 128, KS, "scenes", "first", progress=False)
        values |= dict(evaluator.run(model, processor))
    return values, sum(parameter.numel() for parameter in tower.parameters())
