"""`oner compare`: models of several kinds on the same rows, ours and transformers' own."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, RETRIEVAL
from PIL import Image, ImageStat
from tiny_repository import emoji_rows, model_of, processor_of
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from oner.training.evaluation.beside import Named, clip_maps, map_columns
from oner.training.evaluation.embedding import embed_texts
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.publishing.hub import export_model
from oner_command_line import main as command_line

ROWS = 30
SIDE, WIDTH, LENGTH = 32, 16, 16
# of transformers' own: configuration, model, image processor, processor; SigLIP's tokenizers make no mask
THEIRS = {
    "clip": (CLIPConfig, CLIPModel, CLIPImageProcessor, CLIPProcessor, ["input_ids", "attention_mask"]),
    "siglip": (SiglipConfig, SiglipModel, SiglipImageProcessor, SiglipProcessor, ["input_ids"]),
}


def save_theirs(kind: str, directory: Path, tokenizer) -> Path:
    """A model of transformers' own from a configuration, with a processor over `tokenizer`'s vocabulary."""
    configuration, model, image_processor, processor, names = THEIRS[kind]
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_dim": WIDTH}
    words |= {"eos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0}
    config = configuration(
        text_config={**tower, **words}, vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=WIDTH,
    )  # fmt: skip
    torch.manual_seed(0)
    model(config).eval().save_pretrained(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token,
        eos_token=tokenizer.pad_token, model_max_length=LENGTH, model_input_names=names,
    )  # fmt: skip
    size = {"size": {"height": SIDE, "width": SIDE}} | ({"do_center_crop": False} if kind == "clip" else {})
    processor(image_processor(**size), fast).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(emoji_folder, tmp_path_factory) -> dict[str, Path]:
    """Of two families and of two kinds of transformers' own."""
    folder = tmp_path_factory.mktemp("models")
    rows = emoji_rows(emoji_folder)
    found = {}
    for name in ("oner", "simla"):
        family = FAMILIES[name]
        processor = processor_of(family, rows)
        found[name] = export_model(model_of(family, processor, RETRIEVAL), processor, folder / name)
    for kind in THEIRS:
        found[kind] = save_theirs(kind, folder / kind, processor.tokenizer)
    return found


@pytest.fixture(scope="module")
def compared(models, emoji_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("compared")
    line = ["compare", *map(str, models.values()), "--data", str(emoji_folder / "test_concept.parquet")]
    line += ["--id_column", "hexcode", "--limit", str(ROWS), "--captions", "first", "--output", str(output)]
    assert command_line([*line, "--device", "cpu"]) == 0
    return output


def test_every_model_is_measured_on_the_same_rows(models, compared):
    content = json.loads((compared / "compare.json").read_text())
    assert [result["class"] for result in content["results"]] == [
        "OneRForImageTextRetrieval", "SimlaForImageTextRetrieval", "CLIPModel", "SiglipModel",
    ]  # fmt: skip
    protocol = content["protocols"]["test_concept"]
    for result in content["results"]:
        values = result["values"]
        recalls = [values[f"{direction}_r@{k}"] for direction in ("tr", "ir") for k in (1, 5, 10)]
        assert all(0 <= value <= 1 for value in recalls) and result["seconds"] > 0 and result["parameters"] > 1000
        assert len(result["checkpoint"]["sha256"]) == 1
    assert protocol["pictures"] <= ROWS and content["machine"]["device"] == "cpu"
    assert str(models["oner"].parent) not in (compared / "compare.json").read_text()


def test_the_table_shows_what_was_measured_beside_guessing(compared):
    content = json.loads((compared / "compare.json").read_text())
    lines = (compared / "compare.md").read_text().split("\n\n")[-1].strip().splitlines()
    assert len(lines) == 2 + len(content["results"]) + 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][0].strip() == "test\\_concept" or cells[0][0] == "test_concept"
    for row, result in zip(cells[2:], content["results"], strict=False):
        values = result["values"]
        assert row[1] == result["class"]
        shown = [f"{100 * values[f'{direction}_r@{k}']:.1f}" for direction in ("tr", "ir") for k in (1, 5, 10)]
        assert row[2:8] == shown and row[8] == f"{result['seconds']:.1f}"
    chance = content["results"][0]["values"]["tr_chance@10"]
    assert cells[-1][0] == "guessing" and cells[-1][4] == f"{100 * chance:.1f}"


def test_numbers_are_those_of_the_evaluator(models, compared, emoji_folder):
    from oner import OneRForImageTextRetrieval
    from oner.processing.data.sources import open_rows
    from oner.training.evaluation.embedding import spaced

    rows = spaced(open_rows(str(emoji_folder / "test_concept.parquet"), "pairs", None, None, "hexcode"), ROWS)
    model = OneRForImageTextRetrieval.from_pretrained(models["oner"]).eval()
    evaluator = RetrievalEvaluator(rows, name="x", captions="first", progress=False)
    expected = dict(evaluator.run(model, AutoProcessor.from_pretrained(models["oner"])))
    values = json.loads((compared / "compare.json").read_text())["results"][0]["values"]
    assert values == {name.removeprefix("x/"): pytest.approx(value) for name, value in expected.items()}


def test_texts_of_a_tokenizer_without_a_mask_do_not_depend_on_their_neighbours(models):
    """SigLIP reads its last position, whatever stands there: a short text alone and beside a long one are one."""
    model = SiglipModel.from_pretrained(models["siglip"]).eval()
    processor = AutoProcessor.from_pretrained(models["siglip"])
    alone = embed_texts(model, processor, ["a face"])
    beside = embed_texts(model, processor, ["a face", "a face with a hat and a very long beard"])
    torch.testing.assert_close(alone[0], beside[0])
    ids = processor.tokenizer(["a face"], padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == LENGTH
    whole = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(alone, torch.nn.functional.normalize(whole, dim=-1))


def test_models_are_drawn_side_by_side(models, emoji_folder, tmp_path):
    drawn = [str(models[name]) for name in ("oner", "simla", "clip")]
    rows = ["--data", str(emoji_folder / "test_concept.parquet"), "--id_column", "hexcode", "--limit", "12"]
    line = [*rows, "--device", "cpu", "--output", str(tmp_path), "--sheets", "maps", "gap"]
    assert command_line(["compare", *drawn, *line]) == 0
    for kind in ("maps", "gap"):
        path = tmp_path / f"compare_test_concept_{kind}.png"
        picture = Image.open(path).convert("RGB")
        assert max(ImageStat.Stat(picture).stddev) > 10


def test_simla_points_in_two_ways(models, emoji_folder):
    name = models["simla"]
    model, processor = (
        AutoModelForZeroShotImageClassification.from_pretrained(name),
        AutoProcessor.from_pretrained(name),
    )
    picture = Image.linear_gradient("L").convert("RGB")
    columns = list(map_columns(Named("it", model, processor), [picture], ["a face"]))
    assert [panel.above for (panel,) in columns] == ["it\nitm", "it\nitc"]


def test_a_clip_patch_goes_the_way_of_its_cls(models):
    """So a map is the cosine that [CLS] would have, had it the state of the patch."""
    model = CLIPModel.from_pretrained(models["clip"]).eval()
    processor = AutoProcessor.from_pretrained(models["clip"])
    picture = Image.linear_gradient("L").convert("RGB").resize((SIDE, SIDE))
    (found,) = clip_maps(model, processor, [picture], ["a face"])
    batch = processor(images=[picture], text=["a face"], return_tensors="pt")
    with torch.no_grad():
        words = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[0]
        states = model.vision_model(batch["pixel_values"]).last_hidden_state[0]
        way = model.visual_projection(model.vision_model.post_layernorm(states))
        torch.testing.assert_close(way[0], model.get_image_features(batch["pixel_values"]).pooler_output[0])
    cosines = [torch.cosine_similarity(patch, words, dim=0) for patch in way[1:]]
    torch.testing.assert_close(found.flatten(), torch.stack(cosines))


def test_a_model_that_cannot_point_is_named(models):
    model = SiglipModel.from_pretrained(models["siglip"])
    with pytest.raises(TypeError, match="theirs is a SiglipModel"):
        next(map_columns(Named("theirs", model, None), [], []))


def test_two_sources_of_one_name_are_refused(models, emoji_folder, tmp_path, capsys):
    other = tmp_path / "test_concept.parquet"
    other.write_bytes((emoji_folder / "test_concept.parquet").read_bytes())
    line = ["compare", str(models["oner"]), "--data", str(emoji_folder / "test_concept.parquet"), str(other)]
    assert command_line([*line, "--limit", "5"]) == 2
    assert "share the name 'test_concept'" in capsys.readouterr().err


def test_a_model_that_cannot_do_it_is_refused_in_one_line(models, emoji_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "red.png")
    data = ["--data", str(emoji_folder / "test_concept.parquet"), "--limit", "4", "--output", "compared"]
    for line, reason in (
        (["search", "photos", "red", "--model", str(models["clip"])], "get_multimodal_features, got CLIPModel\n"),
        (["compare", str(models["siglip"]), *data, "--sheets", "maps"], "siglip is a SiglipModel\n"),
    ):
        assert command_line(line) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith(f"oner {line[0]}: ") and said.endswith(reason)
        assert "Traceback" not in said
