"""What a run may be told: YAML files, their bases, the command line, and what is refused."""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

from oner import SimlaConfig
from oner.processing.data.bounds import bounds_of, check_bounds
from oner.training.objectives.dvae import DiscreteVAEObjectiveArguments
from oner.training.objectives.objective import OBJECTIVES, objective_classes
from oner.training.objectives.oner import OneRObjectiveArguments
from oner.training.objectives.simla import SimlaObjectiveArguments
from oner.training.run.arguments import DATA, Arguments, ModelArguments, RunArguments, hints_of
from oner.training.run.launch import tracker_options
from oner.training.run.parsing import parse_arguments, read_config
from oner.training.tasks.finetuning import TASKS, find_task, task_arguments

ROOT = Path(__file__).parents[2]
# those of other examples are tried where these are: test_finetune_example.py and the tests of image tokenizers
OTHERS = ("finetune_", "image_tokenizer_")
CONFIGS = sorted(p for p in (ROOT / "examples" / "configs").glob("*.yaml") if not p.stem.startswith(OTHERS))


@pytest.fixture
def parse(tmp_path):
    """parse("key: value", *command line) -> Arguments"""

    def run(text: str, *command_line: str) -> Arguments:
        file = tmp_path / "run.yaml"
        file.write_text("family: oner\ntrain_data: [pairs.parquet]\n" + text, encoding="utf-8")
        return parse_arguments(["--config", str(file), *command_line])

    return run


def test_the_command_line_wins_over_the_file_and_the_file_over_its_base(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "grandparent.yaml").write_text(
        "family: oner\nepochs: 1\nseed: 1\nbatch_size: 16\nweight_decay: 0.5\n"
    )
    (tmp_path / "parent.yaml").write_text("base: shared/grandparent.yaml\nseed: 2\nbatch_size: 32\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: parent.yaml\ntrain_data: [a.parquet, b.parquet]\nbatch_size: 64\n")
    arguments = parse_arguments(["--config", str(child), "--batch_size", "128", "--losses", "itc", "mlm"])
    run = arguments.run
    assert (run.batch_size, run.seed, run.epochs, run.weight_decay) == (128, 2, 1, 0.5)
    assert run.adam_beta2 == 0.999  # nobody named it
    assert arguments.data.train_data == ["a.parquet", "b.parquet"]
    assert arguments.objective.losses == ["itc", "mlm"]


def test_model_config_of_a_file_is_merged_into_its_bases(tmp_path):
    (tmp_path / "parent.yaml").write_text("model_config: {image_size: 64, temperature: 0.1}\nloss_weights: {itc: 2}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: parent.yaml\nmodel_config: {image_size: 32, two_heads: true}\n")
    assert read_config(child) == {
        "model_config": {"image_size": 32, "temperature": 0.1, "two_heads": True},
        "loss_weights": {"itc": 2},
    }


def test_unknown_keys_are_named_with_their_file(parse):
    with pytest.raises(ValueError, match=r"run\.yaml: unknown arguments \['batchsize', 'lr'\]"):
        parse("batchsize: 4\nlr: 1\nseed: 3\n")
    with pytest.raises(ValueError, match="--lr"):
        parse("seed: 3\n", "--lr", "1")


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected a mapping of argument names, got list"):
        parse_arguments(["--config", str(tmp_path / "list.yaml")])


def test_numbers_that_yaml_reads_as_text_become_numbers(parse):
    arguments = parse("base_learning_rate: 1e-4\nmin_learning_rate: 1e-6\nmim_ratio: [1e-1, 0.5]\nbatch_size: '64'\n")
    assert arguments.run.base_learning_rate == 1e-4 and arguments.run.min_learning_rate == 1e-6
    assert arguments.data.masking.mim_ratio == [0.1, 0.5] and arguments.run.batch_size == 64


def test_one_value_stands_for_a_list_of_one(parse):
    arguments = parse("eval_data: test.parquet\nlosses: itc\n")
    assert arguments.run.eval_data == ["test.parquet"] and arguments.objective.losses == ["itc"]


def test_yaml_reads_no_as_false_but_precision_means_the_word(parse):
    assert parse("mixed_precision: no\n").run.mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 2.5", r"batch_size is 2\.5; expected int"),
        ("batch_size: many", r"batch_size is 'many'; expected int"),
        ("crop_scale: [half, 1.0]", r"crop_scale is \['half', 1\.0\]; expected a list of float"),
        ("streaming: 3", "streaming is 3; expected bool"),
        ("output_dir: 7", "output_dir is 7; expected str"),
        ("seed: [1, 2]", r"seed is \[1, 2\]; expected int"),
    ],
)
def test_values_of_a_wrong_type_are_named(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_json_on_the_command_line(parse):
    arguments = parse(
        "", "--model_config", '{"image_size": 32, "temperature": 0.05}', "--loss_weights", '{"itc": 0.5}'
    )
    assert arguments.model.model_config == {"image_size": 32, "temperature": 0.05}
    assert arguments.objective.loss_weights == {"itc": 0.5}
    with pytest.raises(ValueError, match=r"model_config is '\{image_size: 32'; expected a JSON object"):
        parse("", "--model_config", "{image_size: 32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_data: []", "train_data is empty"),
        ("batch_size: 1", "batch_size is 1; expected at least 2"),
        ("crop_scale: [0.5]", r"crop_scale is \[0\.5\]; expected two rising numbers"),
        ("crop_scale: [0.5, 1.5]", r"crop_scale is \[0\.5, 1\.5\]"),
        ("mim_ratio: [-0.1, 0.5]", r"mim_ratio is \[-0\.1, 0\.5\]"),
        ("eval_captions: second", "eval_captions is 'second'; expected 'all' or 'first'"),
        ("mixed_precision: fp8", "mixed_precision is 'fp8'; expected 'no' or 'bf16' or 'fp16' or 'auto'"),
        ("one_row_per_id: true\nid_column: __row__", "one_row_per_id needs ids"),
        ("one_row_per_id: true\nkind: texts", "one_row_per_id needs ids"),
        (
            "rows_together: 2\none_row_per_id: true\nid_column: id",
            "rows_together is 2, which cannot be combined with one_row_per_id",
        ),
        (
            "one_row_per_id: true\nid_column: id\nstreaming: true",
            "one_row_per_id needs all ids .*a stream cannot give",
        ),
        ("schedule: step", "schedule is 'step'; expected 'cosine' or 'albef'"),
        ("mim_masking: block", "mim_masking is 'block'; expected 'random' or 'blocks'"),
        ("code_crop: same", "code_crop is 'same'; expected 'common' or 'independent'"),
        ("image_normalization: none", "image_normalization is 'none'; expected 'imagenet' or 'clip'"),
        ("caption_rules: blip", "caption_rules is 'blip'; expected 'albef'"),
        ("mim_min_block: 0", "mim_min_block is 0; expected at least 1"),
        ("warmup_steps: -1", "warmup_steps is -1; expected 0 or more, or none"),
        ("warmup_learning_rate: -1e-5", "warmup_learning_rate is -1e-05; expected 0 or more"),
        ("schedule: albef\nwarmup_steps: 150", "warmup_steps is 150; expected a multiple of 100 with schedule albef"),
        ("schedule: albef\nwarmup_epochs: 2", "warmup_epochs is 2, but schedule albef warms up for"),
        ("data_timeout: 60\nnum_workers: 0", "data_timeout is 60, but a run without data workers .* cannot stop"),
        ("max_steps: 0", "max_steps is 0; expected at least 1"),
        ("max_steps: -3", "max_steps is -3; expected at least 1"),
        ("log_every: 0", "log_every is 0; expected at least 1"),
        ("keep_checkpoints: 0", "keep_checkpoints is 0; expected at least 1"),
        ("family: oscar", "unknown family 'oscar'; expected one of .*oner"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    shared = {"family": "oner", "train_data": "[a.parquet]"}
    lines = [f"{name}: {value}" for name, value in shared.items() if f"{name}:" not in text]
    file.write_text("\n".join([*lines, text]) + "\n")
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(file)])


# every dataclass that a command fills
KINDS = [
    *(ModelArguments, *DATA, RunArguments, DiscreteVAEObjectiveArguments),
    *(objective_classes(family)[1] for family in OBJECTIVES),
    *(task_arguments(find_task(task), "simla") for task in TASKS),
]
# read into a configuration, or into arguments again, which say what they take
FREE = {"model_config", "portions"}


def has_numbers(hint: object) -> bool:
    return hint in (int, float, dict) or any(map(has_numbers, get_args(hint)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_has_its_bounds(kind):
    hints, bounds = hints_of(kind), bounds_of(kind)
    numbers = {name for name, hint in hints.items() if has_numbers(hint)}
    assert numbers - FREE == bounds.keys() & hints.keys() and bounds.keys() <= hints.keys()
    part = kind()
    check_bounds(part)
    for name, interval in bounds.items():
        low, high = map(float, interval[1:-1].split(","))
        outside = [math.nan, math.inf, -math.inf, low if interval[0] == "(" else low - 1]
        outside += [high + 1] if interval[-1] == "]" else []
        for value in outside:
            spoiled = copy.copy(part)
            nested = {"list": [value, 1], "dict": {"itc": value}}
            one = next((nested[form] for form in nested if form in str(hints[name])), value)
            object.__setattr__(spoiled, name, one)  # some are frozen
            with pytest.raises(ValueError, match=rf"{name} is .*; expected"):
                check_bounds(spoiled)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_within_json_are_finite(parse, value):
    for name in ("model_config", "loss_weights"):
        with pytest.raises(ValueError, match=f"{name} is .*; expected"):
            parse("", f"--{name}", f'{{"itc":{value}}}')


@pytest.mark.parametrize("name", ["output_dir", "text_column", "split", "train_data", "size", "tracker_project"])
def test_an_empty_text_is_no_value(parse, name):
    for empty in ("", " "):
        with pytest.raises(ValueError, match=f"{name} is .*; expected a non-empty string, or leave it out"):
            parse("", f"--{name}", empty)


def test_an_output_directory_that_is_a_file_is_refused(parse):
    with pytest.raises(ValueError, match="output_dir is '/dev/null', which is not a directory"):
        parse("", "--output_dir", "/dev/null")


def test_a_list_can_be_emptied_on_the_command_line(parse):
    arguments = parse("eval_data: [a.parquet]\nreport_to: tensorboard\ndata_weights: [2]\n",
                      "--eval_data", "--report_to", "--data_weights")  # fmt: skip
    assert (arguments.run.eval_data, arguments.run.report_to, arguments.data.data_weights) == ([], [], None)
    with pytest.raises(ValueError, match="train_data is empty"):
        parse("", "--train_data")


def test_trackers_get_a_flat_configuration_a_project_and_a_name(parse):
    named = ("--run_name", "first", "--tracker_project", "shapes")
    arguments = parse("seed: 3\nmodel_config: {image_size: 32}\n", *named)
    told = tracker_options(arguments)
    assert told["project_name"] == "shapes" and told["init_kwargs"]["wandb"] == {"name": "first"}
    assert told["config"].keys() == arguments.to_dict().keys() and told["config"]["seed"] == 3
    assert told["config"]["model_config"] == '{"image_size": 32}' and told["config"]["max_steps"] == "null"
    assert all(isinstance(value, bool | int | float | str) for value in told["config"].values())
    assert tracker_options(parse(""))["init_kwargs"] == {}


def test_the_family_brings_its_own_fields(parse):
    arguments = parse("ema_momentum: 0.9\nmatch_ids: true\n")
    assert isinstance(arguments.objective, OneRObjectiveArguments)
    assert arguments.objective.ema_momentum == 0.9 and arguments.objective.match_ids is True
    flat = arguments.to_dict()
    assert {"family", "train_data", "output_dir", "ema_momentum"} <= flat.keys()
    assert json.loads(json.dumps(flat)) == flat


@dataclass
class TaskArguments:
    task: str = field(default="naming", metadata={"help": "What to do."})
    names: list[str] = field(default_factory=list, metadata={"help": "Which."})


def test_a_task_may_bring_its_fields_instead_of_the_familys(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_data: [pairs.parquet]\nnames: apple\nschedule: albef\n")
    arguments = parse_arguments(["--config", str(file), "--task", "telling"], objective=TaskArguments)
    assert arguments.objective == TaskArguments("telling", ["apple"]) and arguments.run.schedule == "albef"
    assert arguments.model.family is None and "names" in arguments.to_dict()
    with pytest.raises(ValueError, match=r"unknown arguments \['names'\]"):
        parse_arguments(["--config", str(file), "--family", "oner"])
    file.write_text("train_data: [pairs.parquet]\nema_momentum: 0.9\n")
    with pytest.raises(ValueError, match=r"unknown arguments \['ema_momentum'\]"):
        parse_arguments(["--config", str(file)], objective=TaskArguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_parses_to_what_it_says(path):
    arguments = parse_arguments(["--config", str(path)])
    flat = arguments.to_dict()
    for name, value in read_config(path).items():
        assert flat[name] == value, name
    assert arguments.model.family == read_config(path)["family"]


def test_a_family_is_named_or_read_from_where_a_run_starts(tmp_path):
    line = ["--train_data", "a.parquet"]
    with pytest.raises(ValueError, match="which family.* out of .*oner, simla"):
        parse_arguments(line)
    SimlaConfig.from_size("nano").save_pretrained(tmp_path)
    # with a dash too, as every other option
    place = str(tmp_path)
    for told in (["--initial_model", place], ["--initial-model", place], [f"--initial-model={place}"]):
        arguments = parse_arguments([*line, *told])
        assert arguments.model.family == "simla" and arguments.model.initial_model == str(tmp_path)
        assert isinstance(arguments.objective, SimlaObjectiveArguments)


def test_what_another_option_stands_in_for_is_no_conflict(parse):
    """Only an option that nothing reads is refused, and no default."""
    run = parse("schedule: albef\nwarmup_epochs: 2\nwarmup_steps: 300\n").run
    assert (run.warmup_epochs, run.warmup_steps) == (2, 300)
    for timeout in ("1800", "null"):
        parse(f"num_workers: 0\ndata_timeout: {timeout}\n")
    # the workers of one portion are waited for
    portions = "portions: {pairs: {num_workers: 0}, texts: {kind: texts, train_data: [notes.txt], num_workers: 1}}"
    assert parse(f"data_timeout: 60\n{portions}\n").run.data_timeout == 60


def test_portions_have_data_batches_and_seeds_of_their_own(parse):
    arguments = parse(
        "batch_size: 8\nseed: 5\nmax_bad_rows: 0.2\nepoch_portion: texts\nportions:\n"
        "  pairs: {batch_size: 24, gradient_cache_chunks: 2}\n"
        "  texts: {kind: texts, train_data: notes.txt, repeat: 5, mlm_probability: 3e-1}\n"
    )
    pairs, texts = arguments.portions().values()
    assert list(arguments.portions()) == ["pairs", "texts"] and arguments.epoch_of().run == texts.run
    assert (pairs.run.batch_size, pairs.run.gradient_cache_chunks, pairs.run.repeat) == (24, 2, 1)
    assert (texts.run.batch_size, texts.run.gradient_cache_chunks, texts.run.repeat) == (8, 1, 5)
    assert pairs.data.train_data == ["pairs.parquet"] and texts.data.train_data == ["notes.txt"]
    assert (pairs.data.kind, texts.data.kind, texts.data.max_bad_rows) == ("pairs", "texts", 0.2)
    assert texts.data.masking.mlm_probability == 0.3 and pairs.data.masking.mlm_probability == 0.15
    assert pairs.run.seed == 5 and texts.run.seed not in (5, parse("seed: 6\n").run.seed)
    assert json.loads(json.dumps(arguments.to_dict())) == arguments.to_dict()


def test_without_portions_there_is_one_named_as_its_kind(parse):
    arguments = parse("kind: images\n")
    assert arguments.portions() == {"images": arguments} and arguments.epoch_of() is arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "portions: {texts: {epochs: 3}}",
            r"portion 'texts' sets \['epochs'\]; expected data arguments, or",
        ),
        (
            "portions: {texts: {kind: tunes}}",
            "portion 'texts': kind is 'tunes'; expected 'pairs' or 'images'",
        ),
        ("portions: {texts: {batch_size: 1}}", "batch_size is 1"),
        ("portions: {texts: {repeat: 0}}", "repeat is 0; expected at least 1"),
        ("portions: {texts: {train_data: []}}", "train_data is empty"),
        ("portions: {texts: {}}\nepoch_portion: pairs", r"epoch_portion is 'pairs'; expected one of .*\['texts'\]"),
    ],
)
def test_what_no_portion_can_be_told_is_refused(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text + "\n")


def test_there_are_examples():
    assert {"oner_emoji", "oner_base_224", "oner_base_384"} <= {path.stem for path in CONFIGS}
