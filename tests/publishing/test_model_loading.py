"""Damaged model directories: an error that names the file or the keys, and no weight drawn at random in silence."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import PRETRAINING
from safetensors.torch import load_file, save_file
from tiny_pretraining import evaluated, forget_accelerator, load_example, tiny_arguments, write_pairs
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForZeroShotImageClassification

from oner.training.publishing.model_loading import DIGESTS, ModelDirectoryError, check_directory, load_model

AUTOS = (AutoModel, AutoModelForPreTraining, AutoModelForZeroShotImageClassification)
WEIGHTS = "model.safetensors"
# of a tower's first layer, behind the tower's place in the family's models
WEIGHT = "layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def exported(family, tmp_path_factory) -> Path:
    """The model directory of a run of one step, as examples/pretrain.py leaves it."""
    folder = tmp_path_factory.mktemp("exported")
    pairs = write_pairs(folder / "pairs.parquet")
    forget_accelerator()
    load_example("pretrain").main(tiny_arguments(pairs, folder / "run", family.name, max_steps=1))
    forget_accelerator()
    return folder / "run" / "model"


@pytest.fixture()
def directory(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "model")


def tower_weight(directory: Path) -> str:
    return next(name for name in load_file(directory / WEIGHTS) if name.endswith(WEIGHT))


def rewrite(directory: Path, change) -> None:
    """Other weights, under no digest."""
    (directory / DIGESTS).unlink(missing_ok=True)
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("loader", AUTOS, ids=lambda auto: auto.__name__)
def test_what_is_whole_loads(exported, loader, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_model(loader, exported).eval()
    weights = load_file(exported / WEIGHTS)
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert len(state) > 20 and "drawn at random" not in caplog.text
    for name, value in state.items():
        key = name if name in weights else f"{model.base_model_prefix}.{name}"
        assert key not in weights or torch.equal(value, weights[key]), name


def test_a_file_cut_at_any_kibibyte_or_flipped_in_any_is_named(directory):
    """Every file that a model is read from, at each KiB and one byte before its end."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")])
    assert {"config.json", "processor_config.json", "tokenizer.json", WEIGHTS, DIGESTS} <= {f.name for f in files}
    cases = 0
    for file in files:
        whole = file.read_bytes()
        for place in [*range(0, len(whole), 1024), len(whole) - 1]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            for damaged in (whole[:place], bytes(flipped)):
                file.write_bytes(damaged)
                # another digest shows at the file that it is said to be of, unless it is no JSON any more
                named = str(directory) if file.name == DIGESTS else str(file)
                if file.name == DIGESTS and damaged == whole[:-1]:
                    continue  # without its last line feed it says the same
                with pytest.raises(ModelDirectoryError, match=re.escape(named)):
                    check_directory(directory)
                cases += 1
        file.write_bytes(whole)
    check_directory(directory)
    assert cases > 300
    (directory / "processor_config.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"processor_config\.json: missing"):
        load_model(AutoModel, directory)


def test_weights_cut_short_are_named_without_digests_too(directory):
    (directory / DIGESTS).unlink()
    whole = (directory / WEIGHTS).read_bytes()
    for place in range(0, len(whole), 1024):
        (directory / WEIGHTS).write_bytes(whole[:place])
        with pytest.raises(ModelDirectoryError, match=rf"{WEIGHTS}: cannot be read"):
            load_model(AutoModel, directory)


@pytest.mark.parametrize("draws_heads", [False, True])
@pytest.mark.parametrize("loader", AUTOS, ids=lambda auto: auto.__name__)
def test_keys_and_shapes_that_do_not_fit_are_listed(directory, loader, draws_heads):
    pristine, tower = (directory / WEIGHTS).read_bytes(), tower_weight(directory)
    short = re.escape(tower.partition(".")[2])
    cases = [
        (
            lambda weights: weights.pop(tower),
            rf"missing keys \['(\w+\.)?{short}'\], unexpected k",
        ),
        (lambda weights: weights.update({"foreign.weight": torch.zeros(2)}), r"unexpected keys \['foreign\.weight'\]"),
        (
            lambda weights: weights.update({tower: weights[tower][:-1].clone()}),
            r"wrong shapes \{.*qkv\.weight': '\(95, 32",
        ),
    ]
    for change, said in cases:
        (directory / WEIGHTS).write_bytes(pristine)
        rewrite(directory, change)
        with pytest.raises(ModelDirectoryError, match=said):
            load_model(loader, directory, draws_heads=draws_heads)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
@pytest.mark.parametrize("loader", AUTOS, ids=lambda auto: auto.__name__)
def test_a_number_that_is_none_is_named(directory, loader, value, said):
    """One of a matrix, one of a bias, and one of the statistics of a norm where there is any."""
    pristine, tower = (directory / WEIGHTS).read_bytes(), tower_weight(directory)
    statistics = next((name for name in load_file(directory / WEIGHTS) if name.endswith("running_var")), tower)
    for name in (tower, tower.replace("weight", "bias"), statistics):
        (directory / WEIGHTS).write_bytes(pristine)
        rewrite(directory, lambda weights, name=name: weights[name].view(-1)[:1].fill_(value))
        short = re.escape(name.partition(".")[2])
        with pytest.raises(ModelDirectoryError, match=rf"1 damaged weights \{{'(\w+\.)?{short}': '{said}'"):
            load_model(loader, directory)


def test_zeros_alone_are_named(directory):
    """As a cast to integers leaves them; a bias may be zeros, and so may a token."""
    pristine, tower = (directory / WEIGHTS).read_bytes(), tower_weight(directory)

    def bare(weights):
        for name, value in weights.items():
            if name.endswith(("bias", "mask_token")):
                value.zero_()

    rewrite(directory, bare)
    load_model(AutoModelForPreTraining, directory)
    (directory / WEIGHTS).write_bytes(pristine)
    rewrite(directory, lambda weights: weights[tower].zero_())
    with pytest.raises(ModelDirectoryError, match=rf"1 damaged weights \{{'{re.escape(tower)}': 'only zeros'"):
        load_model(AutoModelForPreTraining, directory)
    rewrite(directory, lambda weights: [value.zero_() for value in weights.values()])
    with pytest.raises(ModelDirectoryError, match="damaged weights .*'only zeros'"):
        load_model(AutoModel, directory, draws_heads=True)


def test_a_head_is_drawn_whole_and_said_or_not_at_all(directory, caplog):
    rewrite(directory, lambda weights: weights.pop("lm_head.dense.weight"))
    with pytest.raises(ModelDirectoryError, match=r"missing keys \['lm_head\.dense\.weight'\]"):
        load_model(AutoModelForPreTraining, directory, draws_heads=True)
    load_model(AutoModelForZeroShotImageClassification, directory)  # which has no such head

    def behead(weights):
        for name in [name for name in weights if name.startswith("lm_head.")]:
            del weights[name]

    rewrite(directory, behead)
    with pytest.raises(ModelDirectoryError, match="missing keys .*lm_head"):
        load_model(AutoModelForPreTraining, directory)
    with caplog.at_level(logging.WARNING):
        load_model(AutoModelForPreTraining, directory, draws_heads=True)
    assert f"{directory} has no weights for ['lm_head']: drawn at random" in caplog.text


@pytest.mark.parametrize("source", ["runs/demo/model", "./model", "/nowhere/model", Path("model")], ids=str)
def test_a_directory_that_is_not_there_is_said(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelDirectoryError, match=rf"^{source}: no such directory; expected a directory with config"):
        load_model(AutoModel, source)


def test_a_name_may_have_meant_a_directory(tmp_path, monkeypatch):
    """`runs/model` has the form of a Hub name, where nothing answers."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelDirectoryError, match="^runs/model: no such directory, and nothing of that name came"):
        load_model(AutoModel, "runs/model")
    (tmp_path / "runs" / "models").mkdir(parents=True)
    for source, name in (("runs/model", "runs/models"), ("oner-emojy", "oner-emoji")):
        with pytest.raises(ModelDirectoryError, match=f"; did you mean {name}\\?$"):
            load_model(AutoModel, source)


def test_the_programs_refuse_a_model_that_lacks_weights(family, directory, tmp_path):
    tower = tower_weight(directory)
    rewrite(directory, lambda weights: weights.pop(tower))
    pairs = write_pairs(tmp_path / "pairs.parquet")
    with pytest.raises(ModelDirectoryError, match="qkv"):
        evaluated(["--model", str(directory), "--data", str(pairs)])
    with pytest.raises(ModelDirectoryError, match="qkv"):
        load_example("search").load_pipeline(str(directory))
    forget_accelerator()
    with pytest.raises(ModelDirectoryError, match="qkv"):
        load_example("pretrain").main(
            tiny_arguments(pairs, tmp_path / "run", family.name, initial_model=directory, max_steps=1)
        )


def test_an_edited_configuration_is_told_from_damage(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.3}))
    with pytest.raises(ModelDirectoryError, match=rf"if you changed it on purpose, remove {DIGESTS}"):
        load_model(AutoModel, directory)
    (directory / DIGESTS).unlink()
    assert load_model(AutoModel, directory).config.temperature == 0.3


def test_a_tower_without_heads_serves_a_second_stage(family, tmp_path, caplog):
    whole = family.build(PRETRAINING)
    tower = family.tower(whole)
    tower.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(AutoModelForPreTraining, tmp_path, draws_heads=True)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, family.tower(model).state_dict()[name]), name
    assert "drawn at random" in caplog.text
