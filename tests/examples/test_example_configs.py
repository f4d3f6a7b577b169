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
# rows of a paper's table differ from the run that they are based on in a loss or two
ROWS = ("oner_table", "simla_table", "codis_table", "momo_table", "oner_emoji_", "simla_emoji_", "codis_scenes_")
TRIED = [
    pytest.param(path, marks=pytest.mark.slow if path.stem.startswith(ROWS) else (), id=path.stem) for path in CONFIGS
]
LAUNCHES = sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml"))
TOKENIZER = ROOT / "examples" / "checkpoints" / "oner-emoji"
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
    if said.get("portions"):
        overrides["portions"] = {name: shrink_portion(told, pairs) for name, told in said["portions"].items()}
    if said.get("kind") == "images" and said.get("tokenizer"):
        overrides["tokenizer"] = str(TOKENIZER)  # without texts none can be trained
    values = {
        **SHRUNK,
        **tiny.SHRUNK,
        **files,
        "train_data": [str(pairs)],
        "data_weights": None,
        "output_dir": str(directory / "run"),
        "mim_min_block": 1,  # of four patches
        **overrides,
    }
    shrunk = directory / "shrunk.yaml"
    shrunk.write_text(yaml.safe_dump({"base": str(config), **values}))
    return ["--config", str(shrunk)]


def shrink_portion(told: dict, pairs: Path) -> dict:
    """A portion over eight rows: captions are its texts."""
    sizes = {"train_data": [str(pairs)], "batch_size": 8, "attribution": None, "data_weights": None}
    texts = {"max_text_length": 8} if told.get("max_text_length") else {}
    return {**told, **sizes, **texts, "text_column": "captions", "repeat": 1}


def begins_with(config: Path) -> Path:
    """The first of a file's stages, by what each begins with and leaves; the family's paper run where none left it."""
    left = {Path(read_config(path)["output_dir"]) / "model": path for path in CONFIGS}
    family = read_config(config)["family"]
    papers = [path for path in CONFIGS if path.stem.startswith(f"{family}_base")]
    while initial := read_config(config).get("initial_model"):
        config = left.get(Path(initial)) or next(one for one in papers if not read_config(one).get("initial_model"))
    return config


@pytest.fixture(scope="module")
def first_stage_of(example, pairs, tmp_path_factory):
    """File of a later stage -> the model directory that its first one leaves, made once."""
    made: dict[Path, Path] = {}

    def first_stage(later: Path) -> Path:
        config = begins_with(later)
        if config not in made:
            forget_accelerator()
            directory = tmp_path_factory.mktemp("first_stage")
            example.main(shrink(config, pairs, directory))
            forget_accelerator()
            made[config] = directory / "run" / "model"
        return made[config]

    return first_stage


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_is_read_as_a_run(config):
    arguments = parse_arguments(["--config", str(config)])
    said = read_config(config)
    assert arguments.objective.losses == said["losses"] and arguments.run.output_dir == said["output_dir"]


@pytest.mark.parametrize("config", TRIED)
def test_it_takes_two_steps(config, example, pairs, tmp_path, first_stage_of):
    said, overrides = read_config(config), {}
    family = FAMILIES[said.get("family", "oner")]
    tiny = family.tiny.SHRUNK["model_config"]
    if said.get("initial_model"):  # a second stage: after the first, at twice its resolution instead of 384
        overrides["initial_model"] = str(first_stage_of(config))
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


def test_the_papers_numbers_stand_in_momos_stages():
    """Sections 3.2 to 3.6: a stage begins with the one before, with new decoders."""
    stages = [
        parse_arguments(["--config", str(ROOT / "examples" / "configs" / f"momo_stage{number}_base.yaml")])
        for number in (1, 2, 3)
    ]
    for number, (losses, epochs, warmup, rate, decoders) in enumerate(
        (
            (["mim"], 1600, 40, 1.5e-4 * 16, ["image"]),
            (["mlm", "mim"], 100, 10, 5e-5, ["image", "text"]),
            (["mlm", "itc", "cmm", "itm"], 100, 10, 1e-4, ["text", "pair"]),
        )
    ):
        stage = stages[number]
        assert stage.objective.losses == losses and stage.model.model_config == {"decoders": decoders}
        assert (stage.run.epochs, stage.run.warmup_epochs) == (epochs, warmup)
        size = stage.epoch_of().run.batch_size
        assert size == 64 * 64 and stage.run.base_learning_rate * size / 256 == pytest.approx(rate)
        if number:
            assert Path(stage.model.initial_model) == Path(stages[number - 1].run.output_dir) / "model"
    shares = {"images": (0.15, 0.75), "texts": (0.15, 0.75), "pairs": (0.75, 0.75)}
    for stage in stages:
        for name, portion in stage.portions().items():
            masking = portion.data.masking
            assert masking.corruption == "drop"
            assert (masking.mlm_probability, masking.mim_ratio) == (shares[name][0], [shares[name][1]] * 2)
    assert stages[1].portions()["images"].run.repeat == 5
    lengths = {name: portion.data.max_text_length for name, portion in stages[2].portions().items()}
    assert lengths == {"texts": 512, "pairs": 77}


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
