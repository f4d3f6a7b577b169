"""examples/evaluate.py on a saved random model and real pairs: a table, files of results, pictures."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.image_processing_vl import OneRImageProcessor
from oner.processing.processing_vl import OneRProcessor
from oner.processing.vl_dataset import open_pairs
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation_results import read_results, write_results

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "data" / "emoji"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("evaluate_example", ROOT / "examples" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(open_pairs(EMOJI / "test_style.parquet").captions(), vocab_size=400)
    torch.manual_seed(0)
    config = OneRConfig.from_size(
        "nano", image_size=32, patch_size=8, vocab_size=len(tokenizer), cls_token_id=3, mask_token_id=4
    )
    OneRForImageTextRetrieval(config).save_pretrained(path)
    OneRProcessor(OneRImageProcessor(size={"height": 32, "width": 32}, patch_size=8), tokenizer).save_pretrained(path)
    return path


def test_numbers_and_the_protocol_are_written(example, model_directory, tmp_path, capsys):
    data = EMOJI / "test_concept.parquet"
    values = example.main(
        ["--model", str(model_directory), "--data", str(data), "--id_column", "hexcode", "--limit", "120",
         "--tasks", "retrieval", "bootstrap", "multimodal", "--captions", "first", "--templates", "name",
         "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{values['test_concept/tr_r@10']:.4f}" in printed and "test_concept/multimodal_both_r@10" in printed
    results = read_results(tmp_path)
    assert sorted(results) == ["test_concept.bootstrap", "test_concept.multimodal", "test_concept.retrieval"]
    stored = results["test_concept.retrieval"]
    assert stored["values"]["test_concept/ir_r@5"] == values["test_concept/ir_r@5"]
    assert stored["protocol"]["split"] == "test_concept" and stored["protocol"]["pictures"] == 120
    digest = hashlib.sha256((model_directory / "model.safetensors").read_bytes()).hexdigest()
    assert stored["checkpoint"] == {"path": str(model_directory), "sha256": {"model.safetensors": digest}}
    assert stored["model"]["image_size"] == 32 and torch.__version__.startswith(stored["versions"]["torch"])
    assert results["test_concept.bootstrap"]["protocol"]["templates"] == ["{}"]
    assert set().union(*(result["values"] for result in results.values())) == set(values)


def test_pictures_are_saved(example, model_directory, tmp_path, capsys):
    pytest.importorskip("sklearn")
    example.main(
        ["--model", str(model_directory), "--data", str(EMOJI / "test_style.parquet"), "--limit", "60",
         "--tasks", "gap", "localization", "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    named = [Path(line.removeprefix("picture: ")) for line in lines if line.startswith("picture: ")]
    assert len(named) == 3 and {path.parent for path in named} == {tmp_path / "pictures"}
    for path in named:
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
        assert min(image.size) > 100 and low < high


def test_what_the_data_do_not_allow_is_said_and_left_out(example, model_directory, tmp_path, capsys, monkeypatch):
    chosen = ("retrieval", "zero_shot", "multimodal")
    monkeypatch.setattr(example, "TASKS", {name: example.TASKS[name] for name in chosen})
    values = example.main(
        ["--model", str(model_directory), "--data", str(EMOJI / "test_style.parquet"), "--limit", "40",
         "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    assert "test_style: no multimodal, as no concept has two pictures" in capsys.readouterr().out
    assert "test_style/tr_r@10" in values and not any("multimodal" in name for name in values)


def test_results_refuse_what_would_not_be_evidence(tmp_path):
    with pytest.raises(ValueError, match='must name the "split"'):
        write_results(tmp_path / "a.json", {"x": 1.0}, {"task": "t"})
    with pytest.raises(ValueError, match="finite numbers, got {'x': nan}"):
        write_results(tmp_path / "a.json", {"x": float("nan")}, {"split": "s"})
    with pytest.raises(FileNotFoundError, match="holds no"):
        write_results(tmp_path / "a.json", {"x": 1.0}, {"split": "s"}, checkpoint=tmp_path)
    write_results(tmp_path / "results" / "a.json", {"x": 1.0}, {"split": "s"})
    (tmp_path / "results" / "metrics.json").write_text(json.dumps({"metrics": {}}))
    assert list(read_results(tmp_path)) == ["a"]
