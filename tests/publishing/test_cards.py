"""A card says what it was told: no mark-up of theirs, no place of this machine; by its repository's name."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from oner import VisionLanguageImageProcessor, VisionLanguageProcessor, train_tokenizer
from oner.training.evaluation.results import read_results, write_results
from oner.training.publishing.hub import export_model, push_to_hub
from oner.training.publishing.model_card import add_evaluation, fence_for, inline, model_card, slug
from oner.training.publishing.shipped import shipped_checkpoint

INJECTED = {
    "data": ["a\n---\nlicense: evil\n---\n", "<img src=x onerror=alert(1)>", "{{ 7*7 }}", "<!-- /evaluation -->"],
    "metrics": {"se\nt\n## Injected/recall@1": 0.5, "<b>x</b>/recall@5": -0.25},
    "protocol": {"k\n## Injected by a key": "v\n## Injected by a value", "e": "<!-- evaluation -->"},
    "training_config": {
        "train_data": ["s3://user:SECRET@bucket/x", "a\n```\n\n# Injected behind the fence\n"],
        "output_dir": "/home/alice/secret-project/run",
    },
    "pictures": {"cap](x) ![i](http://tracker.example.org/pixel": 1, "## heading\n\n# Injected": 2, "a] b": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> VisionLanguageProcessor:
    tokenizer = train_tokenizer(["one word or two"] * 2, vocab_size=60, min_frequency=1)
    pictures = VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=4)
    return VisionLanguageProcessor(pictures, tokenizer)


@pytest.fixture
def model(family):
    return family.build("AutoModelForPreTraining")


def load(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md", ignore_metadata_errors=True)


def test_nothing_that_is_told_becomes_mark_up(model, processor, tmp_path):
    drawn = {caption: Image.new("RGB", (4, 4)) for caption in INJECTED["pictures"]}
    directory = export_model(
        model, processor, tmp_path / "model", **{**INJECTED, "pictures": drawn}, repo_id="org/na\nme"
    )
    card, text = load(directory), (directory / "README.md").read_text()
    assert card.data.license is None and text.count("\n---\n") == 1
    assert not [line for line in text.splitlines() if line.startswith("#") and "njected" in line]
    assert "<img" not in card.text and "<b>" not in card.text and "{{ 7*7 }}" in text and "| -0.25 |" in text
    assert card.text.count("<!-- evaluation -->") == card.text.count("<!-- /evaluation -->") == 1
    assert "SECRET" not in text and "alice" not in text and not re.search(r"(?<!\\)\]\(http", text)
    assert text.count("\n````yaml\n") == text.count("\n````\n") == 1, "the fence is longer than what it holds"


def test_it_says_to_which_widths_vectors_may_be_cut_where_they_were_trained_for_it(model):
    def text(**told) -> str:
        return model_card(model, "org/name", tasks=["image-text-retrieval"], **told).text

    told = text(training_config={"matryoshka_dims": [2, 4]})
    assert "the first 2, 4 coordinates are embeddings" in told and "SentenceTransformer(MODEL, truncate_dim=4)" in told
    for nothing in ({}, {"training_config": {}}, {"training_config": {"matryoshka_dims": []}}):
        assert "truncate_dim" not in text(**nothing)


def test_configurations_pass_the_gate_too(model, processor, tmp_path):
    """What a user wrote into a configuration is published with it."""
    model.config.trained_from = "/home/alice/weights/first"
    model.config.hub_token = "abc"
    directory = export_model(model, processor, tmp_path / "model")
    told = json.loads((directory / "config.json").read_text())
    assert told["trained_from"] == "first" and told["hub_token"] == "(left out)"
    assert told["pad_token_id"] == model.config.pad_token_id
    assert json.loads((directory / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"


@pytest.mark.parametrize("umask", [0, 0o022])
def test_nobody_else_may_write_an_export(umask, model, processor, tmp_path):
    before = os.umask(umask)
    try:
        directory = export_model(model, processor, tmp_path / "model", pictures={"a": Image.new("RGB", (4, 4))})
    finally:
        os.umask(before)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [directory, *directory.rglob("*")]}
    assert modes == {(False, 0o644), (True, 0o755)}


@pytest.mark.parametrize(("place", "name"), [("fruit", "fruit"), ("fruit/model", "fruit"), ("sub/../fruit", "fruit")])
def test_a_card_is_named_after_its_directory_and_when_pushed_after_its_repository(
    model, processor, place, name, tmp_path, monkeypatch
):
    directory = export_model(model, processor, tmp_path / place, metrics={"test/recall": 0.5})
    assert f"\n# {name}\n" in load(directory).text and f'`MODEL = "{name}"`' in load(directory).text
    assert load(directory).data.model_name == name

    # nothing is sent: what would be is what lies there
    class Hub:
        def __init__(self, token): ...
        def create_repo(self, *arguments, **options): ...
        def upload_folder(self, folder_path, **options):
            sent.append(load(folder_path))
            return type("Commit", (), {"commit_url": "there"})

    sent: list[ModelCard] = []
    monkeypatch.setattr("oner.training.publishing.hub.HfApi", Hub)
    push_to_hub(directory, "org/veg")
    assert "\n# veg\n" in sent[0].text and '`MODEL = "org/veg"`' in sent[0].text and f"# {name}" not in sent[0].text
    assert sent[0].data.model_name == "veg" and sent[0].data.eval_results[0].metric_value == 0.5
    with pytest.raises(ValueError, match="expected `name` or `owner/name`"):
        push_to_hub(directory, "org/a b")

    # an upload that fails changes nothing, and neither does one that would not load
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setattr(Hub, "create_repo", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push_to_hub(directory, "org/other")
    code = directory / f"{type(model.config).__module__.rsplit('.', 1)[-1]}.py"
    code.unlink()
    with pytest.raises(FileNotFoundError, match=f"no exported model: {code.name} missing"):
        push_to_hub(directory, "org/other")
    assert all(path.read_bytes() == content for path, content in before.items() if path != code)
    with pytest.raises(FileNotFoundError, match="auto_map in config.json missing"):
        push_to_hub(shipped_checkpoint("oner-emoji"), "org/other")


def evaluate(directory: Path, split: str, value: float) -> None:
    """As examples/evaluate.py leaves it."""
    protocol = {"split": split, "gallery": f"{directory}/x.csv"}
    write_results(directory / "results" / f"{split}.retrieval.json", {f"{split}/r": value}, protocol, None, directory)
    add_evaluation(directory, read_results(directory))


def test_an_evaluation_outlives_an_export_of_the_same_weights_only(model, processor, tmp_path):
    directory = export_model(model, processor, tmp_path / "model")
    evaluate(directory, "fruit", 0.25)
    measured = (directory / "results" / "fruit.retrieval.json").read_bytes()
    export_model(model, processor, directory)
    assert "| fruit | r | 0.25 |" in load(directory).text and load(directory).data.eval_results[0].metric_value == 0.25
    assert not (directory / "previous").exists(), "our own programs changed the card, no user did"

    # of other weights: the file stays, since it names its weights; no card shows it
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    export_model(model, processor, directory)
    assert (directory / "results" / "fruit.retrieval.json").read_bytes() == measured
    assert "| fruit |" not in load(directory).text and load(directory).data.eval_results is None
    evaluate(directory, "veg", 0.5)
    assert "| veg | r | 0.5 |" in load(directory).text and "| fruit |" not in load(directory).text
    assert str(tmp_path) not in (directory / "results" / "veg.retrieval.json").read_text()


def test_a_copy_of_an_export_is_exported_into_as_well(model, processor, tmp_path):
    directory = export_model(model, processor, tmp_path / "model")
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    export_model(model, processor, tmp_path / "link", repo_id="copy")
    assert (tmp_path / "link").is_symlink() and "\n# copy\n" in load(tmp_path / "copy").text


def test_names_of_files_and_text_on_a_line():
    assert slug("A photo, of: it") == "a-photo-of-it" and slug("青蛙") != slug("苹果") and slug("青蛙").isascii()
    assert slug("東京1") != slug("大阪1")
    with pytest.raises(ValueError, match="at least one letter or digit"):
        slug("...")
    assert inline("a\n b") == "a b" and inline(-0.5) == "-0.5" and inline('["{}", "a"]') == '["{}", "a"]'
    assert fence_for("no ticks") == "```" and fence_for("a ```` b") == "`````"
