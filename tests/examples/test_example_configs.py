"""Every example of a run takes two steps, with nothing changed but sizes and places; Accelerate's files load."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from families import FAMILIES
from safetensors.torch import load_file
from tiny_pretraining import ROOT, forget_accelerator, read_log
from transformers import AutoConfig

from oner.training.run.parsing import parse_arguments, read_config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
# those of other examples are tried where these are: test_finetune_example.py and the tests of image tokenizers
OTHERS = ("finetune_", "image_tokenizer_")
CONFIGS = sorted(p for p in (ROOT / "examples" / "configs").glob("*.yaml") if not p.stem.startswith(OTHERS))
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
    said = read_config(config)
    tiny = FAMILIES[said.get("family", "oner")].tiny
    files = {name: path for name, path in tiny.stand_ins().items() if said.get(name)}
    # what a builder of data leaves is not here: its file of makers, its names of columns
    if said.get("attribution") and not (ROOT / said["attribution"]).is_file():
        overrides["attribution"] = None
    for column, stand_in in (("text_column", "captions"), ("id_column", "hexcode")):
        if said.get(column) not in (None, *pq.read_schema(pairs).names):
            overrides[column] = stand_in
    values = {
        **SHRUNK,
        **tiny.SHRUNK,
        **files,
        "train_data": [str(pairs)],
        "output_dir": str(directory / "run"),
        "mim_min_block": 1,  # of four patches
        **overrides,
    }
    shrunk = directory / "shrunk.yaml"
    shrunk.write_text(yaml.safe_dump({"base": str(config), **values}))
    return ["--config", str(shrunk)]


@pytest.fixture(scope="module")
def first_stage_of(example, pairs, tmp_path_factory):
    """Family -> the model directory that the paper's first stage leaves, made once."""
    made: dict[str, Path] = {}

    def first_stage(family: str) -> Path:
        if family not in made:
            stages = [path for path in CONFIGS if path.stem.startswith(f"{family}_base")]
            config = next(path for path in stages if not read_config(path).get("initial_model"))
            forget_accelerator()
            directory = tmp_path_factory.mktemp("first_stage")
            example.main(shrink(config, pairs, directory))
            forget_accelerator()
            made[family] = directory / "run" / "model"
        return made[family]

    return first_stage


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_takes_two_steps(config, example, pairs, tmp_path, first_stage_of):
    said, overrides = read_config(config), {}
    family = FAMILIES[said.get("family", "oner")]
    tiny = family.tiny.SHRUNK["model_config"]
    if said.get("initial_model"):  # a second stage: after the first, at twice its resolution instead of 384
        overrides["initial_model"] = str(first_stage_of(family.name))
        overrides["model_config"] = {"image_size": 2 * tiny["image_size"]}
    example.main(shrink(config, pairs, tmp_path, **overrides))

    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    logged = [name for name in lines[0] if name in family.losses]
    assert logged == sorted(said["losses"], key=family.losses.index)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    model = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    for name, value in (said.get("model_config") or {}).items():
        if name not in {*tiny, *overrides.get("model_config", {})}:
            assert getattr(model, name) == value, name
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    if overrides:  # twice as many positions a side as were learnt
        assert (model.image_size, model.position_image_size) == (2 * tiny["image_size"], tiny["image_size"])


def test_the_papers_numbers_stand_in_its_files():
    # appendix C
    first = parse_arguments(["--config", str(ROOT / "examples" / "configs" / "oner_base_224.yaml")])
    assert (first.run.epochs, first.run.batch_size, first.run.warmup_epochs) == (40, 4096, 4)
    assert (first.run.base_learning_rate, first.run.weight_decay, first.objective.ema_momentum) == (1e-4, 0.1, 0.996)
    assert (first.data.masking.mlm_probability, first.data.masking.mim_ratio) == (0.15, [0.1, 0.5])
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
