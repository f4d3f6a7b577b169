"""`oner export`: exports a model to ONNX, for programs without torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel, AutoProcessor

from oner.training.publishing.model_loading import load_model
from oner.training.publishing.onnx_export import export_onnx
from oner.training.publishing.shipped import find_model


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the graphs of a model, and prints how far each differs from torch."""
    source = find_model(options.model)
    model = load_model(AutoModel, source).eval()
    processor = AutoProcessor.from_pretrained(source)
    for name, distance in export_onnx(model, processor, options.destination, options.int8):
        size = (Path(options.destination) / name).stat().st_size / 1e6
        print(f"{options.destination}/{name}: {size:.1f} MB, differs by {distance:.1e} from torch")
    return 0
