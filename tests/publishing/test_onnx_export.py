"""`oner export MODEL OUT --onnx`: graphs that say what the model says, in eight bits nearly so, and no half of one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from tiny_repository import emoji_rows, model_of, processor_of
from torch import nn
from transformers import AutoModel, AutoProcessor

from oner.processing.image_processing_vl import open_image
from oner.training.publishing import onnx_export
from oner.training.publishing.hub import export_model
from oner_command_line import main

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
TEXTS = ["a red fruit", "a tree", "x", "a green one of many words"]


@pytest.fixture(scope="module")
def rows(emoji_folder) -> list[dict]:
    return emoji_rows(emoji_folder)


@pytest.fixture(scope="module")
def pictures(rows) -> list[Image.Image]:
    return [open_image(row["image"]) for row in rows[: len(TEXTS)]]


@pytest.fixture(scope="module")
def directory(rows, tmp_path_factory) -> Path:
    """Of one family: tests/modeling/test_export.py has the graphs of all."""
    processor = processor_of(FAMILIES["oner"], rows)
    model = model_of(FAMILIES["oner"], processor)
    return export_model(model, processor, tmp_path_factory.mktemp("model") / "oner")


@pytest.fixture(scope="module")
def graphs(directory, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "onnx"
    assert main(["export", str(directory), str(out), "--onnx", "--int8"]) == 0
    return out


def vectors(graphs: Path, name: str, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Of a graph, by the record of its inputs. (rows, P)."""
    told = json.loads((graphs / onnx_export.RECORD).read_text())[name.removesuffix("_int8")]
    session = onnxruntime.InferenceSession(graphs / f"{name}.onnx")
    return session.run([told["output"]], {key: inputs[key].numpy() for key in told["inputs"]})[0]


@pytest.mark.slow
def test_graphs_give_the_models_vectors(directory, graphs, pictures):
    model = AutoModel.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(graphs)  # the graphs bring it along
    given = {
        "text": processor(text=TEXTS),
        "image": processor(images=pictures),
        "image_text": processor(text=TEXTS, images=pictures),
    }
    for kind, inputs in given.items():
        with torch.no_grad():
            features = getattr(model, onnx_export.METHODS[kind])(**inputs).pooler_output
        expected = nn.functional.normalize(features, dim=-1).numpy()
        np.testing.assert_allclose(vectors(graphs, kind, inputs), expected, rtol=0, atol=1e-5, err_msg=kind)
        # eight bits turn a vector a little
        turned = vectors(graphs, f"{kind}_int8", inputs)
        cosines = (turned * expected).sum(1)
        assert (cosines > 0.9).all() and np.abs(turned - expected).max() > 1e-5, (kind, cosines)


def test_a_graph_that_differs_is_an_error(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    monkeypatch.setattr(onnx_export, "distance_of", lambda *_: 1e-9)
    assert main(["export", str(directory), str(tmp_path / "onnx"), "--onnx"]) == 2
    assert "text.onnx differs by 1e-09 from torch; expected at most 0.0" in capsys.readouterr().err


def test_what_lies_in_the_place_stays(directory, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["export", str(directory), str(tmp_path), "--onnx"]) == 2
    assert "contains something other than exported graphs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
