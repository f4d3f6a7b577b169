"""The speed of embedding images and texts, compared with transformers' CLIP of the same width, depth and patch size.

    python examples/benchmark_embedding.py                    docs/embedding.json and the table of docs/performance.md
    python examples/benchmark_embedding.py --repeats 9        medians of more rounds

Base size, images of 224 pixels, random weights, one thread, CPU time, models measured in turn. OneR has a
convolutional stem; `linear stem` is a single projection, as in CLIP. Texts have 12 tokens each, or are captions of the
embedded emoji, batched as each library does it: OneR sorts by length and pads to the longest of a batch
(`embed_texts`), CLIP's processor pads to the longest of a batch, its pipelines and most of its users pad to 77.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from benchmark_steps import transformers_clip
from evidence_table import machine_facts
from onnxruntime.quantization import QuantType, quantize_dynamic
from page_marks import between_marks
from transformers import AutoTokenizer

from oner import OneRConfig, OneRModel, open_rows
from oner.training.publishing.onnx_export import Embedding, export_program, write_graph

ROOT = Path(__file__).resolve().parents[1]
FIGURES, PAGE = ROOT / "docs" / "embedding.json", ROOT / "docs" / "performance.md"
MARKS = "<!-- embedding: by examples/benchmark_embedding.py -->\n", "<!-- /embedding -->"
EMOJI = ROOT / "examples" / "data" / "emoji" / "train.parquet"
TOKENIZER = ROOT / "examples" / "checkpoints" / "oner-emoji"
CLIP_LENGTH = 77
Calls = Mapping[str, Callable[[], object]]


def by_turns(calls: Calls, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, measured in turn after one round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def embeds_pictures(models: Mapping[str, Any], pixels: torch.Tensor) -> Calls:
    return {name: lambda model=model: model.get_image_features(pixel_values=pixels) for name, model in models.items()}


def embeds_texts(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> Callable[[], object]:
    return lambda: [model.get_text_features(**batch) for batch in batches]


def captions_padded(tokenizer: Any, rows: int, size: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Captions of the emoji in batches: sorted by length, unsorted, and padded to `CLIP_LENGTH`."""
    texts = [row["captions"][0] for row in open_rows(str(EMOJI), id_column="hexcode").take(range(rows))]
    orders = {"sorted": sorted(texts, key=len), "longest": texts, "77": texts}
    padding = {"sorted": True, "longest": True, "77": "max_length"}
    made: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, ordered in orders.items():
        for start in range(0, rows, size):
            batch = tokenizer(
                ordered[start : start + size], padding=padding[name], max_length=CLIP_LENGTH, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            made.setdefault(name, []).append({key: batch[key] for key in ("input_ids", "attention_mask")})
    return made


def graphs(model: OneRModel, pixels: torch.Tensor, directory: Path) -> Calls:
    """The graph of the image embedding in fp32 and int8, run by onnxruntime on one thread."""
    module = Embedding(model, "get_image_features", ("pixel_values",)).eval()
    plain, small = directory / "image.onnx", directory / "image_int8.onnx"
    write_graph(export_program(module, {"pixel_values": pixels}, model.config.max_text_length), module.names, plain)
    quantize_dynamic(plain, small, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    given = {"pixel_values": pixels.numpy()}
    sessions = {
        "fp32": onnxruntime.InferenceSession(plain, options),
        "int8": onnxruntime.InferenceSession(small, options),
    }
    return {name: lambda session=session: session.run(None, given) for name, session in sessions.items()}


def measure(repeats: int, size: str = "base", pictures: int = 8, captions: int = 256) -> dict[str, dict[str, float]]:
    """Measurement -> model -> CPU seconds."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    fields = {"vocab_size": len(tokenizer), "max_text_length": CLIP_LENGTH}
    fields |= {name: getattr(tokenizer, name) for name in ("cls_token_id", "pad_token_id", "mask_token_id")}
    config = OneRConfig.from_size(size, **fields)
    models = {
        "OneR": OneRModel(config).eval(),
        "OneR, linear stem": OneRModel(OneRConfig.from_size(size, stem="linear", **fields)).eval(),
        "CLIP": transformers_clip(config, CLIP_LENGTH).eval(),
    }
    side = config.image_size
    pixels = torch.rand(pictures, 3, side, side)  # (B, 3, H, W)
    ids = torch.cat([torch.full((64, 1), tokenizer.cls_token_id), torch.randint(200, 2000, (64, 11))], dim=1)
    equal = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = {name: models[name] for name in ("OneR", "CLIP")}
    made = captions_padded(tokenizer, captions, size=64)
    found = {}
    with torch.inference_mode():
        found[f"{pictures} pictures, fp32"] = by_turns(embeds_pictures(models, pixels), repeats)
        with torch.autocast("cpu", torch.bfloat16):
            found[f"{pictures} pictures, bf16"] = by_turns(embeds_pictures(models, pixels), repeats)
        found["one picture, fp32"] = by_turns(embeds_pictures(models, pixels[:1]), repeats)
        calls = {name: embeds_texts(model, [equal]) for name, model in both.items()}
        found["64 texts of 12 tokens, fp32"] = by_turns(calls, repeats)
        with torch.autocast("cpu", torch.bfloat16):
            found["64 texts of 12 tokens, bf16"] = by_turns(calls, repeats)
        read = {
            "OneR": embeds_texts(models["OneR"], made["sorted"]),
            "CLIP, longest of a batch": embeds_texts(models["CLIP"], made["longest"]),
            "CLIP": embeds_texts(models["CLIP"], made["77"]),
        }
        found[f"{captions} captions, fp32"] = by_turns(read, repeats)
    with tempfile.TemporaryDirectory() as directory:
        found[f"{pictures} pictures, onnxruntime"] = by_turns(graphs(models["OneR"], pixels, Path(directory)), repeats)
    return found


def markdown(figures: Mapping[str, Any]) -> str:
    """A line per model, with its rate over CLIP's, or over fp32's for onnxruntime."""
    lines = ["| what | by | processor seconds | rate over CLIP's or fp32's |", "|---|---|---:|---:|"]
    for question, seconds in figures["seconds"].items():
        beside = seconds["CLIP"] if "CLIP" in seconds else seconds["fp32"]
        lines += [f"| {question} | {name} | {own:.3f} | {beside / own:.2f} |" for name, own in seconds.items()]
    machine = figures["machine"]
    where = (
        f"One thread of {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}, onnxruntime {onnxruntime.__version__}."
    )
    return "\n".join(["", where, "", *lines, "", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures = {"machine": machine_facts(torch.device("cpu")), "seconds": measure(options.repeats)}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between_marks(page, *MARKS, markdown(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
