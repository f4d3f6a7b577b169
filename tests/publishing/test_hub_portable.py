"""A published model directory works by itself: with `import oner` and no trust, and without oner but with trust."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import hub_probe
import pytest
import save_probe
import torch
import transformers
from fake_hub import serve
from families import RETRIEVAL
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_repository import emoji_rows, model_of, processor_of

from oner.processing.processing_vl import VisionLanguageProcessor
from oner.training.publishing.hub import export_model, push_to_hub

TOLERANCE = 1e-6
METRICS = {
    "test_style/image_to_text_recall@10": 0.25,
    "test_style/tr_chance@10": 0.01,
    "test_style/top1": 0.125,
    "test_concept/gap": float("nan"),
}


@pytest.fixture(scope="module")
def pairs(emoji_folder) -> list[dict]:
    return emoji_rows(emoji_folder)


@pytest.fixture(scope="module")
def processor(family, pairs) -> VisionLanguageProcessor:
    return processor_of(family, pairs)


@pytest.fixture(scope="module")
def model(family, processor) -> transformers.PreTrainedModel:
    return model_of(family, processor)


@pytest.fixture(scope="module")
def picture(pairs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "photo.png"
    path.write_bytes(pairs[0]["image"]["bytes"])
    return path


@pytest.fixture(scope="module")
def exported(family, model, processor, picture, tmp_path_factory) -> Path:
    return export_model(
        model,
        processor,
        tmp_path_factory.mktemp("hub") / f"{family.name}-tiny",
        metrics=METRICS,
        protocol={"resolution": 32, "templates": ["{}"]},
        training_config={"seed": 0, "losses": ["itc", "cmc"]},
        data=[
            {"name": "emoji", "pictures": 6185, "licence": "see ATTRIBUTION.md"},
            {"name": "hf://datasets/owner/pairs@main/train.parquet"},
            {"name": "/home/alice/photos"},
        ],
        languages=["en"],
        pictures={"A photo": Image.open(picture)},
    )


def run_probe(mode: str, model_id: str, picture: Path, folder: Path, **env: str) -> dict[str, torch.Tensor]:
    """hub_probe.py in a fresh interpreter, elsewhere, with caches of its own."""
    out = folder / f"{mode}.safetensors"
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, str(Path(__file__).parents[1] / "hub_probe.py"), mode, model_id, str(picture), str(out)]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def expected(model, exported, picture) -> dict[str, torch.Tensor]:
    """What this process gets from the directory, with its weights checked against the model that was exported."""
    outputs = hub_probe.model_outputs(str(exported), str(picture), {})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(outputs[f"state.{name}"], tensor, rtol=0, atol=0)
    return outputs | hub_probe.pipeline_outputs(str(exported), str(picture), {})


@pytest.mark.parametrize("mode", ["remote", "local"])
def test_loads_elsewhere_and_gives_the_same(mode, exported, picture, expected, tmp_path):
    got = run_probe(mode, str(exported), picture, tmp_path)
    assert got.keys() == expected.keys() and len(got) > 20
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.contiguous(), rtol=0, atol=TOLERANCE, msg=f"{mode}: {name}")
    assert expected["retrieval.both"].std() > 0 and expected["pipeline.retrieval"].numel() == 2


@pytest.mark.slow_but_one
def test_pushed_model_loads_from_the_hub(exported, picture, expected, tmp_path, monkeypatch):
    """Push to a Hub of our own, then load by name: `remote` downloads weights and code."""
    server, url = serve()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("oner.training.publishing.hub.HfApi", functools.partial(HfApi, endpoint=url))
    try:
        address = push_to_hub(exported, "org/tiny", token="x")
        assert address.startswith(f"{url}/org/tiny/commit/")
        files = server.RequestHandlerClass.repositories["org/tiny"]
        assert set(files) == {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
        env = {"HF_ENDPOINT": url, "HF_TOKEN": "x", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        got = run_probe("remote", "org/tiny", picture, tmp_path, **env)

        # and saves itself whole again from there, code that nothing has loaded so far included
        command = [sys.executable, save_probe.__file__, "save", "remote", "org/tiny:saved:built_in_pipeline"]
        caches = {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tmp_path, env=os.environ | caches | env, check=True, capture_output=True)
        code = {path.name for path in exported.glob("*.py")}
        assert {path.name for path in (tmp_path / "saved").glob("*.py")} == code
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert saved["auto_map"] == json.loads((exported / "config.json").read_text())["auto_map"]
    finally:
        server.shutdown()
        server.server_close()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.contiguous(), rtol=0, atol=TOLERANCE, msg=name)


def test_every_named_class_is_in_the_directory(family, exported):
    config = json.loads((exported / "config.json").read_text())
    references = dict(config["auto_map"]) | {task: p["impl"] for task, p in config["custom_pipelines"].items()}
    assert {"AutoConfig", "AutoProcessor", "AutoImageProcessor", *family.classes} <= set(references)
    for reference in references.values():
        file, cls = reference.split(".")
        assert f"class {cls}" in (exported / f"{file}.py").read_text()


def test_everything_that_is_saved_is_a_whole_repository(family, model, exported, tmp_path):
    """Whichever class a user saves by hand, and none of its names dangles."""
    offered = json.loads((exported / "config.json").read_text())["auto_map"]
    for cls in {*family.classes.values(), type(family.tower(model))}:
        folder = tmp_path / cls.__name__
        cls(model.config).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == offered
        pipelines = [entry["impl"] for entry in config["custom_pipelines"].values()]
        for referred in [*offered.values(), *pipelines]:
            file, name = referred.split(".")
            path = folder / f"{file}.py"
            assert path.is_file() and f"class {name}" in path.read_text(), f"{cls.__name__}: {referred}"


def test_everybody_may_read_an_export(exported):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in exported.rglob("*") if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {"0o644"}, modes


def pipelines_of(directory: Path) -> dict[str, str]:
    """Task → class, as config.json names it."""
    named = json.loads((directory / "config.json").read_text())["custom_pipelines"]
    return {task: entry["impl"] for task, entry in named.items()}


def test_resaving_keeps_the_pipelines(family, exported, tmp_path):
    """`pipeline` does not see custom_pipelines where oner is, what is saved has them all the same."""
    retrieval = family.classes[RETRIEVAL].from_pretrained(exported)
    assert not hasattr(retrieval.config, "custom_pipelines")
    retrieval.save_pretrained(tmp_path)
    assert pipelines_of(tmp_path) == pipelines_of(exported)
    assert "image-text-retrieval" in pipelines_of(tmp_path)


def test_a_pipeline_saves_itself_and_goes_on(exported, tmp_path):
    """transformers writes down the saved pipeline's code alone; the others stay, and nobody is asked for trust."""
    search = transformers.pipeline("image-text-retrieval", model=str(exported))
    search.save_pretrained(tmp_path / "saved")
    assert pipelines_of(tmp_path / "saved") == pipelines_of(exported)
    again = transformers.pipeline(
        "image-text-retrieval", model=search.model, processor=search.processor, tokenizer=search.tokenizer
    )
    again.save_pretrained(tmp_path / "again")
    assert pipelines_of(tmp_path / "again") == pipelines_of(exported)


def test_a_configuration_that_is_not_registered_shows_its_pipelines(family, exported, monkeypatch):
    """As the one that travels with the weights does, so that `trust_remote_code=True` finds their code."""
    config_class = family.tiny.tiny_config().__class__
    monkeypatch.setattr(config_class, "pipelines_are_registered", False)
    config = config_class.from_pretrained(exported)
    assert config.custom_pipelines == config.to_dict()["custom_pipelines"]
    assert config.custom_pipelines.keys() == pipelines_of(exported).keys()


def test_card(exported):
    card = ModelCard.load(exported / "README.md", ignore_metadata_errors=False)
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results == {("test_style", "image_to_text_recall@10"): 0.25, ("test_style", "top1"): 0.125}
    assert card.data.library_name == "transformers"
    assert {"oner", "custom_code", "sentence-transformers"} <= set(card.data.tags)
    assert card.data.language == ["en"] and card.data.datasets == ["owner/pairs"]
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|data)/", (exported / "README.md").read_text())
    for part in ("not measurable", "pictures/a-photo.png", "ATTRIBUTION.md", "itc", "templates"):
        assert part in card.text, part
    assert (exported / "pictures" / "a-photo.png").is_file()
    stored = json.loads((exported / "results" / "metrics.json").read_text())
    assert stored["metrics"] == {**METRICS, "test_concept/gap": None}


def test_card_snippets_run(exported, picture, tmp_path, monkeypatch, capsys):
    """The page's Python, as written, from a folder that holds photo.png."""
    (tmp_path / "photo.png").write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    text = (exported / "README.md").read_text().replace('"path/to/folder"', repr(str(tmp_path)))
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 3
    for snippet in snippets:
        if "sentence_transformers" in snippet and find_spec("sentence_transformers") is None:
            continue
        exec(compile(snippet, "README.md", "exec"), {"MODEL": str(exported)})
    assert "tensor(" in capsys.readouterr().out


def test_half_precision_file_computes_in_full(model, processor, exported, tmp_path):
    small = export_model(model, processor, tmp_path / "half", dtype=torch.float16)
    size = {path: (path / "model.safetensors").stat().st_size for path in (small, exported)}
    assert size[small] < 0.6 * size[exported]
    loaded = transformers.AutoModel.from_pretrained(small)
    assert loaded.dtype == torch.float32
    reference = model.get_input_embeddings().weight
    torch.testing.assert_close(loaded.get_input_embeddings().weight.data, reference.data, rtol=1e-3, atol=1e-5)
    assert "stored as float16" in (small / "README.md").read_text()


def test_export_replaces_only_an_export(model, processor, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="precious holds something else.*thesis.txt"):
        export_model(model, processor, precious)
    first = export_model(model, processor, tmp_path / "model", metrics={"a/b": 1.0})
    export_model(model, processor, first)
    assert not (first / "results" / "metrics.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


def test_failed_export_leaves_the_old_one(model, processor, tmp_path):
    directory = export_model(model, processor, tmp_path / "model")
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(TypeError, match="picture 'x' is a int, expected a PIL image"):
        export_model(model, processor, directory, pictures={"x": 3})
    assert sorted(path.name for path in directory.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_clear_errors(model, processor, tmp_path):
    with pytest.raises(TypeError, match="model is a Linear, expected a PreTrainedModel"):
        export_model(torch.nn.Linear(1, 1), processor, tmp_path / "x")
    foreign = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    foreign.config.__class__ = type("Unregistered", (transformers.ViTConfig,), {})
    with pytest.raises(ValueError, match="Unregistered is not registered with AutoModel"):
        export_model(foreign, processor, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"config.json.*\*.safetensors missing"):
        push_to_hub(tmp_path, "org/nothing")


@pytest.mark.slow
def test_directories_of_any_name(exported, picture, tmp_path):
    names = ("plain", "v1.0.model", "my model", "0start", "ünï-苹果")
    for name in names:
        shutil.copytree(exported, tmp_path / name)
    code = (
        "import sys, transformers\n"
        "for name in sys.argv[1:]:\n"
        "    processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=True)\n"
        "    assert type(processor).__name__ == 'VisionLanguageProcessor', name\n"
        "    transformers.AutoModel.from_pretrained(name, trust_remote_code=True)\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    for folder, arguments in ((tmp_path, names), (tmp_path / "plain", (".",))):
        command = [sys.executable, "-c", code, *arguments]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
