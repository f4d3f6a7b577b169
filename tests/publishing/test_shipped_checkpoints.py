"""What examples/checkpoints holds: weights, configuration, card, results and pictures, and no code."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

import oner
from oner.training.publishing.model_loading import DIGESTS, check_directory

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for path in (ROOT / "examples" / "checkpoints").iterdir() if path.is_dir())
SUFFIXES = {".safetensors", ".json", ".md", ".png"}

pytestmark = pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)


def keys_of(value) -> set[str]:
    """Keys of nested objects."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    return set(value).union(*map(keys_of, value.values())) if isinstance(value, dict) else set()


def test_there_is_no_code_and_no_word_of_it(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 5 and {path.suffix for path in files} <= SUFFIXES
    for path in directory.glob("*.json"):
        assert not {"auto_map", "custom_pipelines"} & keys_of(json.loads(path.read_text())), path.name
    card = ModelCard.load(directory / "README.md", ignore_metadata_errors=True)
    assert "custom_code" not in card.data.tags and "trust_remote_code" not in card.text


def test_files_are_those_of_their_digests(directory):
    assert "model.safetensors" in json.loads((directory / DIGESTS).read_text())
    check_directory(directory)


def test_it_loads_with_the_classes_of_oner(directory):
    assert type(AutoModel.from_pretrained(directory)).__module__.startswith("oner.modeling.")
    if (directory / "processor_config.json").is_file():
        assert type(AutoProcessor.from_pretrained(directory)) is oner.VisionLanguageProcessor


def test_the_card_s_python_runs(directory, emoji_folder, tmp_path, monkeypatch):
    """As written, from a folder that holds photo.png and, by the repository's name, the directory."""
    row = oner.open_rows(emoji_folder / "test_style.parquet").take(range(1))[0]
    oner.open_image(row["image"]).save(tmp_path / "photo.png")
    shutil.copytree(directory, tmp_path / directory.name)
    monkeypatch.chdir(tmp_path)
    text = (directory / "README.md").read_text().replace('"path/to/folder"', repr(str(tmp_path)))
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert snippets and all("import oner\n" in snippet for snippet in snippets)
    for snippet in snippets:
        if "sentence_transformers" in snippet and find_spec("sentence_transformers") is None:
            continue
        exec(compile(snippet, "README.md", "exec"), {"MODEL": directory.name})
