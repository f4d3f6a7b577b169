"""Every example of a run takes two steps, with nothing changed but sizes and places; Accelerate's files load."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from tiny_pretraining import ROOT, TINY_MODEL, forget_accelerator, read_log
from transformers import AutoConfig

from oner.training.arguments import parse_arguments, read_config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml"))
SHRUNK = {
    "batch_size": 8,
    "max_steps": 2,
    "num_workers": 0,
    "vocab_size": 300,
    "tokenizer": None,
    "eval_data": [],
    "log_every": 1,
}


def shrink(config: Path, pairs: Path, directory: Path, **overrides) -> list[str]:
    """A file over the example that only makes it smaller; the heads' width shrinks, their depth stays."""
    values = {**SHRUNK, "train_data": [str(pairs)], "output_dir": str(directory / "run"), **overrides}
    shrunk = directory / "shrunk.yaml"
    shrunk.write_text(yaml.safe_dump({"base": str(config), "model_config": TINY_MODEL, **values}))
    return ["--config", str(shrunk)]


@pytest.fixture(scope="module")
def first_stage(example, pairs, tmp_path_factory) -> Path:
    forget_accelerator()
    directory = tmp_path_factory.mktemp("first_stage")
    example.main(shrink(ROOT / "examples" / "configs" / "oner_base_224.yaml", pairs, directory))
    return directory / "run" / "model"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_takes_two_steps(config, example, pairs, tmp_path, request):
    said, overrides = read_config(config), {}
    if said.get("initial_model"):  # a second stage: after the first, at twice its resolution instead of 384
        overrides["initial_model"] = str(request.getfixturevalue("first_stage"))
        overrides["model_config"] = {"image_size": 64}
    example.main(shrink(config, pairs, tmp_path, **overrides))

    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert list(lines[0])[3:-1] == sorted(said["losses"], key=["itc", "xmc", "cic", "cmc", "mlm", "mim"].index)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    model = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    for name, value in (said.get("model_config") or {}).items():
        if name not in {*TINY_MODEL, *overrides.get("model_config", {})}:
            assert getattr(model, name) == value, name
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    # at 64 pixels the stem makes 4 x 4 patches of positions that were learnt at 2 x 2
    if overrides:
        assert (model.image_size, model.position_image_size) == (64, 32)


def test_the_papers_numbers_stand_in_its_files():
    # appendix C
    first = parse_arguments(["--config", str(ROOT / "examples" / "configs" / "oner_base_224.yaml")])
    assert (first.run.epochs, first.run.batch_size, first.run.warmup_epochs) == (40, 4096, 4)
    assert (first.run.base_learning_rate, first.run.weight_decay, first.objective.ema_momentum) == (1e-4, 0.1, 0.996)
    assert (first.data.mlm_probability, first.data.mim_ratio) == (0.15, [0.1, 0.5])
    assert first.objective.losses == ["itc", "cmc", "mlm", "mim"]
    second = parse_arguments(["--config", str(ROOT / "examples" / "configs" / "oner_base_384.yaml")])
    assert (second.run.epochs, second.run.batch_size) == (5, 1024)
    assert second.model.model_config == {"image_size": 384}
    assert Path(second.model.initial_model) == Path(first.run.output_dir) / "model"


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))
    engines = {"ddp": "MULTI_GPU", "deepspeed": "DEEPSPEED", "fsdp2": "FSDP"}
    assert config.distributed_type == engines[path.stem.split("_")[0]]
    assert config.mixed_precision == "no"  # the run's own decides, under every engine
    assert config.num_processes % config.num_machines == 0 and not config.use_cpu
    first = parse_arguments(["--config", str(ROOT / "examples" / "configs" / "oner_base_224.yaml")])
    assert first.run.batch_size % config.num_processes == 0
    if config.distributed_type == "DEEPSPEED":
        assert f"zero{config.deepspeed_config['zero_stage']}" in path.stem
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
