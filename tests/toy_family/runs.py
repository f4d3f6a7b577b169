"""A tiny run of the toy family by examples/pretrain.py: forty pairs, and 24 lines of text."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tiny_pretraining import write_pairs


def write_sources(folder: Path) -> dict[str, str]:
    """Pairs, and a text file of the captions of others."""
    pairs = write_pairs(folder / "pairs.parquet")
    captions = pq.read_table(write_pairs(folder / "others.parquet", 24))["captions"].to_pylist()
    (folder / "notes.txt").write_text("\n".join(" and ".join(row) for row in captions) + "\n", encoding="utf-8")
    return {"pairs": str(pairs), "texts": str(folder / "notes.txt")}


def command(
    sources: dict[str, str],
    output_dir: Path,
    sizes: tuple[int, int] = (6, 6),
    chunks: tuple[int, int] = (1, 1),
    workers: int = 0,
    texts: dict | None = None,
    **options: Any,
) -> list[str]:
    """Nine steps, a checkpoint after each; batch sizes and chunks of texts and of pairs."""
    portions = {
        "texts": {"kind": "texts", "train_data": [sources["texts"]], "text_column": None, "id_column": None},
        "pairs": {"train_data": [sources["pairs"]]},
    }
    for told, size, count in zip(portions.values(), sizes, chunks, strict=True):
        told |= {"batch_size": size, "gradient_cache_chunks": count}
    portions["texts"] |= {"mlm_probability": 0.3, **(texts or {})}
    fields = {
        "family": "toy",
        "train_data": sources["pairs"],
        "portions": json.dumps(portions),
        "epoch_portion": "texts",
        "text_column": "captions",
        "id_column": "hexcode",
        "vocab_size": 200,
        "max_steps": 9,
        "base_learning_rate": 0.3,
        "mixed_precision": "no",
        "log_every": 1,
        "eval_every_epochs": 0,
        "save_every_epochs": sizes[0] / 24,
        "keep_checkpoints": 3,
        "num_workers": workers,
        "output_dir": output_dir,
        **options,
    }
    return [word for name, value in fields.items() if value is not None for word in (f"--{name}", str(value))]
