"""The whole road of MoMo's three stages through examples/pretrain.py, on eight rows a step; and steps without CMGA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume_matrix import pretrain
from tiny_pretraining import ROOT, assert_same_checkpoint, forget_accelerator, read_log, tiny_arguments
from toy_family.runs import write_sources
from transformers import AutoModelForMaskedLM, AutoModelForZeroShotImageClassification

from oner.training.publishing.model_loading import load_model
from oner.training.run.checkpoint import list_checkpoints
from oner.training.run.engine import Engine

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
DROPS = {"texts": {"mlm_probability": 0.5}, "images": {}, "pairs": {"mlm_probability": 0.75}}
STAGES = {
    1: (("images",), ["mim"], ["image"]),
    2: (("texts", "images"), ["mlm", "mim"], ["image", "text"]),
    3: (("texts", "pairs"), ["mlm", "itc", "cmm", "itm"], ["text", "pair"]),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    made = write_sources(tmp_path_factory.mktemp("sources"))
    return {**made, "images": made["pairs"]}


def command(sources: dict[str, str], stage: int, directory: Path, initial: Path | None = None, **options) -> list[str]:
    """Three steps of a stage, a checkpoint after each, from the model directory of the one before."""
    kinds, losses, decoders = STAGES[stage]
    columns = {"texts": {"text_column": None, "id_column": None}, "images": {"id_column": None}, "pairs": {}}
    portions = {
        kind: {"kind": kind, "train_data": [sources[kind]], "batch_size": 6, **columns[kind], **DROPS[kind]}
        for kind in kinds
    }
    # as the paper has it: decoders are left behind
    fields = {"decoders": decoders, "save_decoders": False, **options.pop("model_config", {})}
    told = {
        "portions": json.dumps(portions),
        "losses": losses,
        "max_steps": 3,
        "save_every_epochs": 0.01,
        "keep_checkpoints": 3,
        "tokenizer": ROOT / "examples" / "checkpoints" / "oner-emoji",
        **options,
    }
    if initial is not None:
        told |= {"initial_model": initial / "model", "tokenizer": None, "vocab_size": None, "size": None}
    return tiny_arguments(Path(sources["pairs"]), directory, "momo", model_config=fields, **told)


@pytest.fixture(scope="module")
def road(example, sources, tmp_path_factory) -> dict[int, Path]:
    """Stage -> its run's directory, each begun with the one before."""
    folder, done = tmp_path_factory.mktemp("road"), {}
    for stage in STAGES:
        forget_accelerator()
        done[stage] = folder / f"stage{stage}"
        example.main(command(sources, stage, done[stage], done.get(stage - 1)))
    forget_accelerator()
    return done


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def test_each_stage_has_its_losses_and_leaves_the_encoder(road):
    for stage, directory in road.items():
        lines = read_log(directory)
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert {name for name in lines[0] if name in ("mim", "mlm", "itc", "cmm", "itm")} == set(STAGES[stage][1])
        left = {name.partition(".")[0] for name in weights(directory)}
        assert left == {"momo", "logit_scale", "itm_head"}
        decoders = {name.split(".")[0] for name in list_state(directory) if "_decoder." in name}
        assert decoders == {f"{kind}_decoder" for kind in STAGES[stage][2]}
        card = (directory / "model" / "README.md").read_text(encoding="utf-8")
        told = f"no loss of this run ({', '.join(STAGES[stage][1])}) compared their embeddings"
        assert (told in card) == (stage < 3), "who searches with a first stage is told that it answers by chance"
    load_model(AutoModelForZeroShotImageClassification, road[3] / "model")


def list_state(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(directory)[-1] / "model.safetensors")


def test_a_stage_begins_with_the_encoder_of_the_one_before(example, sources, road, tmp_path, monkeypatch):
    """Before its first step, to the bit; and its decoders are new."""
    begun = {}

    def look(self):
        begun.update({name: value.clone() for name, value in self.model.state_dict().items()})
        raise InterruptedError

    monkeypatch.setattr(Engine, "fit", look)
    with pytest.raises(InterruptedError):
        example.main(command(sources, 2, tmp_path, road[1]))
    before = list_state(road[1])
    assert all(torch.equal(begun[name], value) for name, value in before.items() if name.startswith("momo."))
    assert not torch.equal(begun["image_decoder.embed.weight"], before["image_decoder.embed.weight"])


def test_decoders_that_are_kept_serve_the_masked_language_model(example, sources, road, tmp_path):
    example.main(command(sources, 3, tmp_path, road[2], model_config={"save_decoders": True}))
    assert {"text_decoder", "pair_decoder", "lm_head"} <= {name.partition(".")[0] for name in weights(tmp_path)}
    model = load_model(AutoModelForMaskedLM, tmp_path / "model")  # would refuse what it had to draw
    state = list_state(tmp_path)
    assert torch.equal(model.text_decoder.embed.weight, state["text_decoder.embed.weight"])


def test_a_road_that_is_stopped_in_the_middle_of_a_stage_is_the_same(example, sources, road, tmp_path):
    """A crash between the backwards of two portions; the last checkpoint counts."""
    drawn = {"attention_dropout": 0.1}
    pretrain(example, command(sources, 3, tmp_path / "whole", road[2], model_config=drawn), {})
    forget_accelerator()
    stopped = command(sources, 3, tmp_path / "stopped", road[2], model_config=drawn, resume="auto")
    pretrain(example, stopped, {}, stop=3, piece=2)
    forget_accelerator()
    assert list_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-00000002"
    pretrain(example, stopped, {})
    one, other = (list_checkpoints(tmp_path / name)[-1] for name in ("whole", "stopped"))
    assert_same_checkpoint(one, other)


def test_without_cmga_the_second_portion_meets_the_first_ones_update(example, sources, road, tmp_path):
    """The texts of the first step pay the same; the pairs are read by weights that have moved by then."""
    for name, together in (("together", True), ("apart", False)):
        options = {"cmga": together, "warmup_epochs": 0, "max_steps": 2}
        example.main(command(sources, 3, tmp_path / name, road[2], **options))
        forget_accelerator()
    one, other = (read_log(tmp_path / name)[0] for name in ("together", "apart"))
    assert one["mlm"] == other["mlm"]
    assert all(one[name] != other[name] for name in ("itc", "cmm", "itm"))
