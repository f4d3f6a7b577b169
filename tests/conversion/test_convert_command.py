"""`oner convert` and the reading of foreign files, from a shell's side."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_official import Q, V, albef_shapes, filled, fold_types, pretraining_shapes, retrieval_shapes
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForZeroShotImageClassification, AutoProcessor

from oner.modeling.configuration_dvae import DiscreteVAEConfig
from oner.modeling.modeling_dvae import DiscreteVAE
from oner.training.conversion.reading import CheckpointFileError, read_weights
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments
from oner_command_line import COMMANDS, main

TINY = ["--heads", "4"]


@pytest.fixture(scope="module")
def official() -> dict:
    return filled(pretraining_shapes())


@pytest.fixture
def file(tmp_path, official) -> Path:
    """As the official scripts save: weights among an optimiser's state, a scheduler's, and a configuration."""
    notes = {"optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]}, "config": {"temp": 0.07}}
    torch.save({"model": official, **notes, "epoch": 29}, tmp_path / "checkpoint_29.pth")
    return tmp_path / "checkpoint_29.pth"


def vocabulary(path: Path, words: int = V) -> Path:
    special = {0: "[PAD]", 1: "[unused0]", 2: "[UNK]", 3: "[CLS]", 4: "[SEP]", 5: "[MASK]"}
    path.write_text("\n".join(special.get(n, f"word{n}") for n in range(words)), encoding="utf-8")
    return path


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_there_and_back(tmp_path, capsys, file, official):
    directory, back = tmp_path / "made" / "simla", tmp_path / "back.pth"
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY]) == 0
    told = capsys.readouterr().out
    assert "text_encoder_m.bert.embeddings.position_ids: a buffer" in told and "0 missing in the file" in told
    model = AutoModelForPreTraining.from_pretrained(directory)
    assert model.config.num_text_layers == 3 and model.config.num_attention_heads == 4
    objective = SimlaObjective(model, SimlaObjectiveArguments(queue_size=Q))
    objective.load_state_dict(load_file(directory / "objective.safetensors"))
    same(objective.teacher.state_dict(), {
        name.removeprefix("teacher."): tensor
        for name, tensor in load_file(directory / "objective.safetensors").items() if name.startswith("teacher.")
    })  # fmt: skip
    assert len(json.loads((directory / "conversion.json").read_text())["used"]) == len(official) - 2
    assert main(["convert", "--to", "simla", str(directory), str(back)]) == 0
    same(torch.load(back, weights_only=True)["model"], official)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "checkpoint_29.pth", "made"]


def test_a_processor_comes_with_a_vocabulary(tmp_path, file):
    vocab = vocabulary(tmp_path / "vocab.txt")
    directory = tmp_path / "simla"
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY, "--tokenizer", str(vocab)]) == 0
    processor = AutoProcessor.from_pretrained(directory)
    assert type(processor).__name__ == "VisionLanguageProcessor" and processor.max_text_length == 24
    assert processor.image_processor.image_mean == pytest.approx([0.4814, 0.4578, 0.4082], abs=1e-4)  # CLIP's
    model = AutoModelForPreTraining.from_pretrained(directory).eval()
    config = model.config
    ids = (config.pad_token_id, config.image_token_id, config.cls_token_id, config.sep_token_id, config.mask_token_id)
    assert ids == (0, 1, 3, 4, 5)
    features = model.get_text_features(**processor(text=["word7 word8"]))
    assert features.last_hidden_state.shape == (1, 3, 16)


def test_pictures_of_another_size(tmp_path, capsys, file):
    directory = tmp_path / "large"
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY, "--image_size", "24"]) == 0
    assert "visual_encoder_m.pos_embed: 4 x 4 patches to 6 x 6, bicubic" in capsys.readouterr().out
    model = AutoModelForPreTraining.from_pretrained(directory)
    assert model.config.image_size == 24 and model.simla.vision.embeddings.position_embeddings.shape[1] == 37


def test_fields_that_no_shape_tells(tmp_path, file):
    directory = tmp_path / "set"
    given = ["--set", "cls_token_id=7", "--set", "hidden_dropout=0", "--set", "mim_context=states"]
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY, *given]) == 0
    config = AutoModelForPreTraining.from_pretrained(directory).config
    assert (config.cls_token_id, config.hidden_dropout, config.mim_context) == (7, 0, "states")


def test_a_retrieval_checkpoint_invents_no_heads(tmp_path, capsys):
    official = filled(retrieval_shapes())
    torch.save({"model": official}, tmp_path / "retrieval.pth")
    directory, back = tmp_path / "retrieval", tmp_path / "back.pth"
    assert main(["convert", "--from", "simla", str(tmp_path / "retrieval.pth"), str(directory), *TINY]) == 0
    _, told = AutoModelForZeroShotImageClassification.from_pretrained(directory, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert not any(name.startswith(("lm_head.", "mim_head.")) for name in load_file(directory / "model.safetensors"))
    assert main(["convert", "--to", "simla", str(directory), str(back)]) == 0
    same(torch.load(back, weights_only=True)["model"], official)


def test_a_head_that_is_wholly_absent_is_left_out(tmp_path, capsys, official):
    """Whoever loads the model is told that it is drawn; the file does not pretend to hold it."""
    torch.save({name: t for name, t in official.items() if not name.startswith("mim_head")}, tmp_path / "no_mim.pth")
    directory = tmp_path / "no_mim"
    assert main(["convert", "--from", "simla", str(tmp_path / "no_mim.pth"), str(directory), *TINY]) == 0
    assert "mim_head.weight: drawn at random" in capsys.readouterr().out
    model, told = AutoModelForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert set(told["missing_keys"]) == {"mim_head.weight", "mim_head.bias"}
    assert torch.equal(model.itm_head.weight, official["itm_head.weight"])


def test_albef_is_drawn_where_it_must_be(tmp_path, capsys):
    torch.save({"model": filled(albef_shapes())}, tmp_path / "ALBEF.pth")
    command = ["convert", "--from", "albef", "--family", "simla", str(tmp_path / "ALBEF.pth")]
    assert main([*command, str(tmp_path / "no"), *TINY]) == 2
    assert "encoder.layer.0.crossattention.self.query.weight" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert main([*command, str(tmp_path / name), *TINY, "--draw_missing", "--seed", str(seed)]) == 0
    told = capsys.readouterr().out
    assert "token_type_embeddings.weight: our models have no token types" in told
    assert "simla.text.layers.0.cross_attention.query.weight: drawn at random" in told
    one, alike, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    drawn = "simla.text.layers.0.cross_attention.query.weight"
    assert torch.equal(one[drawn], alike[drawn]) and not torch.equal(one[drawn], other[drawn])
    assert not any(name.startswith("mim_head.") for name in one)
    kept = "simla.text.layers.2.cross_attention.query.weight"
    assert torch.equal(one[kept], other[kept])


def test_albef_is_a_family_of_its_own_and_goes_back(tmp_path, capsys):
    """Nothing is drawn; what comes back is what went in, with the token types folded into positions."""
    official = filled(albef_shapes())
    torch.save({"model": official}, tmp_path / "ALBEF.pth")
    assert main(["convert", "--from", "albef", str(tmp_path / "ALBEF.pth"), str(tmp_path / "albef"), *TINY]) == 0
    assert "drawn at random" not in capsys.readouterr().out
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "albef")
    assert type(model).__name__ == "CodisForPreTraining" and model.codebook is None
    assert main(["convert", "--to", "albef", str(tmp_path / "albef"), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == official.keys()
    fold_types(official)
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items() if tensor.is_floating_point())


def test_a_stem_that_the_official_layout_lacks_is_refused(tmp_path, capsys, root):
    command = ["convert", "--to", "simla", str(root / "examples/checkpoints/simla-emoji"), str(tmp_path / "out.pth")]
    assert main(command) == 2
    told = capsys.readouterr()
    assert "do not exist in the official layout" in told.err and "vision.embeddings.stem.layers.1" in told.err
    assert "written" not in told.out and not list(tmp_path.iterdir())


def test_what_is_written_is_read_back(tmp_path, capsys, file, monkeypatch):
    """A disk that keeps other bits than it was given."""
    directory = tmp_path / "simla"
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY]) == 0
    save = torch.save

    def lossy(content, path):
        content["model"]["itm_head.bias"] += 1
        save(content, path)

    monkeypatch.setattr("oner.training.conversion.command.torch.save", lossy)
    assert main(["convert", "--to", "simla", str(directory), str(tmp_path / "out.pth")]) == 2
    assert "other tensors than were written: ['itm_head.bias']" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "simla"]


class Mischief:
    def __reduce__(self):
        return os.system, ("touch escaped",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "config": Mischief()}, "bad.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Mischief()}, protocol=2))
    for name in ("bad.pth", "old.pth"):
        assert main(["convert", "--from", "simla", name, "out", *TINY]) == 2
        assert name in capsys.readouterr().err
    with pytest.raises(CheckpointFileError, match="system.*code or an object, not weights"):
        read_weights("bad.pth")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "out").exists()


def test_notes_of_scripts_are_read_as_nothing(tmp_path):
    """argparse's arguments are refused by torch's own unpickler; they are no reason to refuse the weights."""
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1e-4, deep={"x": [1]})}, tmp_path / "a.pth"
    )
    assert read_weights(tmp_path / "a.pth")["a"].tolist() == [1.0, 1.0]


def test_a_configuration_of_omegaconf_is_not_imported(tmp_path):
    """SIMLA's pretraining saves hydra's configuration; here a stand-in module of that name makes such a file."""
    (tmp_path / "omegaconf").mkdir()
    (tmp_path / "omegaconf" / "__init__.py").write_text("")
    (tmp_path / "omegaconf" / "dictconfig.py").write_text(
        "import collections\n"
        "class DictConfig:\n    def __init__(self, **kwargs):\n        self.__dict__.update(kwargs)\n"
        "        self.flags, self.types = collections.defaultdict(dict), [dict, int]\n"
    )
    script = (
        "import torch; from omegaconf.dictconfig import DictConfig;"
        "torch.save({'model': {'a': torch.ones(2)}, 'config': DictConfig(temp=0.07)}, 'c.pth')"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert read_weights(tmp_path / "c.pth")["a"].tolist() == [1.0, 1.0]
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read as weights|holds more than weights"),
        (lambda path: path.write_bytes(b""), "cannot be read as weights"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "cannot be read as a checkpoint"),
        (lambda path: torch.save({"model": {"a": 1}}, path), "got also .'a'."),
        (lambda path: torch.save([torch.ones(1)], path), "expected tensors by name, got list"),
        (lambda path: torch.save({}, path), "expected tensors by name, got dict"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, make, message):
    make(tmp_path / "x.pth")
    with pytest.raises(CheckpointFileError, match=message):
        read_weights(tmp_path / "x.pth")


def test_a_truncated_file(tmp_path, file, capsys):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert main(["convert", "--from", "simla", str(file), str(tmp_path / "out"), *TINY]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "half.safetensors").write_bytes(b"\x10" + b"\0" * 20)
    with pytest.raises(CheckpointFileError, match="cannot be read as safetensors"):
        read_weights(tmp_path / "half.safetensors")


def test_other_places_of_weights(tmp_path):
    torch.save({"state_dict": {"module.a": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    assert list(read_weights(tmp_path)) == ["a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointFileError, match="expected one of model.safetensors"):
        read_weights(tmp_path / "empty")


def test_a_file_in_half_precision_trains_in_full(tmp_path, official):
    torch.save({"model": {name: tensor.half() for name, tensor in official.items()}}, tmp_path / "half.pth")
    assert main(["convert", "--from", "simla", str(tmp_path / "half.pth"), str(tmp_path / "out"), *TINY]) == 0
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out", dtype=torch.float32)
    objective = SimlaObjective(model, SimlaObjectiveArguments(queue_size=Q))
    objective.load_state_dict(load_file(tmp_path / "out" / "objective.safetensors"))
    kinds = {name: tensor.dtype for name, tensor in objective.state_dict().items()}
    whole = {"queue.ids", "queue.pointer"}
    assert {name for name, kind in kinds.items() if kind != torch.float32} == whole
    assert all(kinds[name] == torch.int64 for name in whole)


def test_a_released_file_without_twins_and_queues_at_its_top(tmp_path, capsys):
    """As ALBEF's authors released what they fine-tuned: weights alone, under no "model"."""
    state = {
        name: one for name, one in filled(retrieval_shapes()).items() if "_m." not in name and "queue" not in name
    }
    torch.save(state, tmp_path / "mscoco.pth")
    assert main(["convert", "--from", "simla", str(tmp_path / "mscoco.pth"), str(tmp_path / "out"), *TINY]) == 0
    assert "0 missing in the file" in capsys.readouterr().out
    assert not (tmp_path / "out" / "objective.safetensors").exists()
    AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "width is 16.*num_attention_heads"),
        (["--heads", "4", "--set", "nonsense"], "expected NAME=VALUE"),
        (["--heads", "4", "--set", "head_count=2"], "no fields .'head_count'"),
        (["--heads", "5"], "hidden_size .16. must be a multiple"),
        (["--heads", "4", "--nonsense", "1"], "unknown arguments .'--nonsense', '1'"),
        (["--heads", "4", "--image_size", "18"], "image_size .18. must be a multiple of patch_size"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path, capsys, file, arguments, message):
    assert main(["convert", "--from", "simla", str(file), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_vocabulary_of_another_length(tmp_path, capsys, file):
    vocab = vocabulary(tmp_path / "vocab.txt", V - 20)
    command = ["convert", "--from", "simla", str(file), str(tmp_path / "out"), *TINY, "--tokenizer", str(vocab)]
    assert main(command) == 2
    assert f"has {V - 20} tokens; expected {V}" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(tmp_path, capsys, file):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    assert main(["convert", "--from", "simla", str(file), str(full), *TINY]) == 2
    assert "already exists" in capsys.readouterr().err and [p.name for p in full.iterdir()] == ["precious"]
    directory = tmp_path / "model"
    assert main(["convert", "--from", "simla", str(file), str(directory), *TINY]) == 0
    assert main(["convert", "--to", "simla", str(directory), str(file)]) == 2
    assert main(["convert", "--to", "simla", str(full), str(tmp_path / "x.pth")]) == 2
    (directory / "config.json").write_text('{"model_type": "oner"}')
    assert main(["convert", "--to", "simla", str(directory), str(tmp_path / "x.pth")]) == 2
    assert "family 'oner'; expected 'simla'" in capsys.readouterr().err and not (tmp_path / "x.pth").exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, capsys, file, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oner.training.conversion.command.save_file", full)
    assert main(["convert", "--from", "simla", str(file), str(tmp_path / "out"), *TINY]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_tokenizer_of_pictures(tmp_path, capsys):
    """DALL-E's layout, by a state dict that ours gives in its names."""
    tokenizer = DiscreteVAE(DiscreteVAEConfig(hidden_size=8, num_codes=12, codebook_dim=6, blocks_per_group=1))
    names = {"weight": "w", "bias": "b"}
    state = {}
    for name, tensor in tokenizer.encoder.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        stem = re.sub(r"groups\.(\d+)\.(\d+)", lambda m: f"group_{int(m[1]) + 1}.block_{int(m[2]) + 1}", stem)
        stem = re.sub(r"convs\.(\d+)", lambda m: f"res_path.conv_{int(m[1]) + 1}", stem).replace("skip", "id_path")
        state[f"blocks.{stem.replace('output', 'output.conv')}.{names[leaf]}"] = tensor
    torch.save(state, tmp_path / "encoder.pkl")
    directory = tmp_path / "tokenizer"
    assert main(["convert", "--from", "dalle", str(tmp_path / "encoder.pkl"), str(directory)]) == 0
    assert "No decoder" in capsys.readouterr().out
    loaded = AutoModel.from_pretrained(directory)
    pictures = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.get_codebook_indices(pictures), tokenizer.get_codebook_indices(pictures))
    assert main(["convert", "--from", "dalle", str(tmp_path / "no.pkl"), str(tmp_path / "x")]) == 2


def test_help_names_the_command(capsys):
    assert COMMANDS["convert"].module == "oner.training.conversion.command"
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "--from {albef" in capsys.readouterr().out
