"""`--lora`: the tower stays, adapters and heads learn, a run resumes to the bit, and its export has merged weights."""

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from tiny_finetuning import karpathy, write_pretrained
from tiny_oner import CLS
from tiny_pretraining import assert_same_checkpoint, forget_accelerator, load_example, read_log, tiny_arguments
from transformers import AutoModel

from oner import CodisForVisualReasoning, OneRForPreTraining
from oner.training.run.adapters import add_lora, without_adapters
from oner.training.run.checkpoint import list_checkpoints, load_checkpoint
from oner.training.run.parsing import parse_arguments

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning"),
]
STEPS = 4
PLACE = ".attention.qkv"


def command(family: str, pairs: Path, directory: Path, **options) -> list[str]:
    fields = {"max_steps": STEPS, "save_every_epochs": 0.2, "keep_checkpoints": STEPS, "lora": 2, **options}
    return tiny_arguments(pairs, directory, family, **fields)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, example, pairs, tmp_path_factory) -> tuple[str, Path]:
    """A family and the directory of its run."""
    forget_accelerator()
    directory = tmp_path_factory.mktemp("lora")
    example.main(command(request.param, pairs, directory))
    return request.param, directory


def weights_at(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / f"checkpoint-{step:08d}")[0]["model"]


def test_adapters_and_heads_learn_and_the_tower_stays(run):
    name, directory = run
    first, last = weights_at(directory, 1), weights_at(directory, STEPS)
    assert len({told["loss"] for told in read_log(directory)}) == STEPS
    moved = {key for key, value in first.items() if not torch.equal(value, last[key])}
    adapters = {key for key in first if "lora_" in key}
    assert adapters and adapters & moved
    assert not [key for key in moved if "base_layer" in key]
    assert [key for key in moved if not key.startswith(f"{name}.")], "heads beside the tower learn whole"


def test_it_resumes_to_the_bit(run, example, pairs, tmp_path):
    family, directory = run
    shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for checkpoint in list_checkpoints(tmp_path / "run")[2:]:
        shutil.rmtree(checkpoint)
    example.main(command(family, pairs, tmp_path / "run", resume="auto"))
    assert_same_checkpoint(list_checkpoints(directory)[-1], list_checkpoints(tmp_path / "run")[-1])
    assert read_log(tmp_path / "run") == read_log(directory)


def test_the_export_is_a_plain_model_of_summed_weights(run):
    family, directory = run
    exported, trained = load_file(directory / "model" / "model.safetensors"), weights_at(directory, STEPS)
    assert not [key for key in exported if "lora" in key or "base_layer" in key]
    places = [key.removesuffix(".base_layer.weight") for key in trained if key.endswith(".base_layer.weight")]
    assert places and any(place.endswith(PLACE) for place in places)
    for place in places:
        down, up = (trained[f"{place}.lora_{side}.default.weight"] for side in "AB")  # (r, D), (D', r)
        expected = trained[f"{place}.base_layer.weight"] + up @ down
        torch.testing.assert_close(exported[f"{place}.weight"], expected, rtol=0, atol=1e-6)
    assert type(AutoModel.from_pretrained(directory / "model")) is FAMILIES[family].classes["AutoModel"]


def test_a_task_is_learned_so(tmp_path):
    pretrained = write_pretrained(tmp_path / "pretrained", OneRForPreTraining, projection_hidden_size=16)
    told = {
        **karpathy(tmp_path / "coco"), "task": "retrieval", "initial_model": pretrained, "lora": 2, "max_steps": 2,
        "batch_size": 4, "warmup_steps": 0, "base_learning_rate": 0.05, "num_workers": 0, "mixed_precision": "no",
        "family": "oner", "losses": ["itc", "cmc"], "rerank_k": 0, "output_dir": tmp_path / "run",
    }  # fmt: skip
    del told["queue_size"]
    values = {name: value if isinstance(value, list) else [value] for name, value in told.items()}
    words = [str(word) for name, value in values.items() for word in (f"--{name}", *value)]
    metrics = load_example("finetune").main(words)
    before, after = (load_file(place / "model.safetensors") for place in (pretrained, tmp_path / "run" / "model"))
    assert metrics and before.keys() == after.keys()
    tokens = "oner.embeddings.word_embeddings.weight"
    assert torch.equal(before[tokens], after[tokens])
    qkv = f"oner.layers.0{PLACE}.weight"
    assert 0 < torch.linalg.matrix_rank(after[qkv] - before[qkv], atol=1e-6) <= 2


def test_layers_that_two_images_share_share_their_adapter():
    model = CodisForVisualReasoning(FAMILIES["codis"].tiny.tiny_config()).eval()
    add_lora(model, 2)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    texts, pictures = torch.tensor([[CLS, 7, 8], [CLS, 9, 10]]), torch.randn(2, 2, 3, 16, 16)
    with torch.no_grad():
        learned, merged = (one(texts, None, pictures).logits for one in (model, without_adapters(model)))
    torch.testing.assert_close(learned, merged, rtol=1e-4, atol=1e-5)


def test_alone_it_is_of_rank_16(tmp_path):
    line = ["--family", "oner", "--train_data", "x", "--lora"]
    assert parse_arguments(line).model.lora == 16 and parse_arguments(line[:-1]).model.lora is None
    with pytest.raises(ValueError, match="lora"):
        parse_arguments([*line, "0"])
