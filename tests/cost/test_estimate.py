"""The rehearsed step against a real one, the estimate's arithmetic by hand, and the command that prints it."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from tiny_loading import collator_of

from oner import OneRConfig, SimlaConfig
from oner.processing.data.augmentation import TrainingImageTransform
from oner.processing.data.sampling import RowKey
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.cost.estimate import DEVICES, GIB, Device, configuration_of, estimate
from oner.training.cost.flops import flop_counter
from oner.training.cost.rehearsal import rehearse
from oner.training.objectives.examples import example_pairs
from oner.training.objectives.objective import Example, build_objective
from oner.training.objectives.simla import SimlaObjective
from oner.training.run.building import build_model
from oner.training.run.parsing import parse_arguments
from oner_command_line import COMMANDS, main

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "projection_hidden_size": 48,
    "projection_dim": 16,
    "max_text_length": 12,
}
# of a family with two encoders, for images of 2 x 2 patches
FEW_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_text_layers": 1, "num_attention_heads": 2}
FEW_LAYERS |= {"image_size": 32, "projection_dim": 16, "max_text_length": 12, "num_visual_codes": 7, "vocab_size": 200}
LENGTHS = [3, 12, 0, 7, 5, 6]


def arguments(*given: str, **model_config):
    config = json.dumps({**SMALL, "vocab_size": 200, **model_config})
    return parse_arguments(
        [
            "--family",
            "oner",
            "--train_data",
            "none",
            "--model_config",
            config,
            "--attn_implementation",
            "eager",
            *given,
        ]
    )


def simla_arguments(*given: str):
    return parse_arguments(
        ["--family", "simla", "--train_data", "none", "--attn_implementation", "eager", "--queue_size", "64"]
        + ["--model_config", json.dumps(FEW_LAYERS), *given]
    )


def test_example_pairs_are_laid_out_as_the_collator_does(emoji_folder):
    rows = pq.read_table(emoji_folder / "test_style.parquet").slice(0, 6).to_pylist()
    captions = [row["captions"][0] if isinstance(row["captions"], list) else row["captions"] for row in rows]
    tokenizer = train_tokenizer(captions * 2, vocab_size=200, max_text_length=12)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "image_token_id": tokenizer.image_token_id,
    }
    config = OneRConfig(**SMALL, **ids, vocab_size=len(tokenizer))
    collator = collator_of(tokenizer, TrainingImageTransform(32), patch_size=16, max_text_length=12)
    real = collator(
        [(RowKey(i, 0, 0.5), {"image": row["image"], "captions": text})
         for i, (row, text) in enumerate(zip(rows, captions, strict=True))]
    )  # fmt: skip
    real = {name: value for name, value in real.items() if isinstance(value, torch.Tensor)}
    lengths = (real["attention_mask"].sum(1) - 1 - 4).tolist()
    made = example_pairs(config, lengths, Example())
    assert made.keys() == real.keys()
    for name, tensor in made.items():
        assert tensor.dtype == real[name].dtype, name
        if name not in ("mlm_index", "mlm_labels"):  # as many as were drawn
            assert tensor.shape == real[name].shape, name
    assert torch.equal(made["text_index"], real["text_index"])
    assert torch.equal(made["attention_mask"], real["attention_mask"])
    assert torch.equal(made["mim_index"], made["bool_masked_pos"].flatten().nonzero().flatten())
    head = slice(0, 5)
    assert torch.equal(made["input_ids"][:, head], real["input_ids"][:, head])


def test_a_family_that_predicts_visual_codes_brings_them():
    config = SimlaConfig(**FEW_LAYERS)
    codes = SimlaObjective.example_batches(config, LENGTHS, Example())["pairs"]["visual_codes"]
    assert codes.shape == (6, 4) and codes.dtype == torch.int64 and 0 <= codes.min() < codes.max() < 7


def test_example_pairs_refuse_what_the_model_cannot_read():
    with pytest.raises(ValueError, match=r"expected some in \[0, 12\]"):
        example_pairs(OneRConfig(**SMALL), [13], Example())


def real_step(given, config, half):
    """Operations of a step on real tensors, and bytes that its backward keeps."""
    model = build_model(given, config)
    objective = build_objective(given.model.family, model, given.objective)
    batch = objective.example_batches(config, LENGTHS, Example(0.15, 0.3))["pairs"]
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    own |= {t.untyped_storage().data_ptr() for t in objective.teacher.model.state_dict().values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with flop_counter() as counter:
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, *_ = objective(model.train(), batch, 0.5)
        loss.backward()
    return counter.get_total_flops(), sum(kept.values()), model


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_rehearsal_is_the_step(precision):
    given = arguments()
    config = OneRConfig(**SMALL, vocab_size=200)
    rehearsed = rehearse(given, config, LENGTHS, precision)
    flops, kept, model = real_step(given, config, precision == "bf16")
    assert rehearsed.flops == flops
    assert rehearsed.activations == pytest.approx(kept, rel=0.02)
    assert rehearsed.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert rehearsed.pairs == len(LENGTHS) and rehearsed.targets > 0


def test_transport_is_tried_where_a_rehearsal_has_no_contents():
    layers = {name: value for name, value in FEW_LAYERS.items() if name != "num_visual_codes"}
    config = json.dumps({**layers, "num_fusion_layers": 1, "num_codes": 8})
    given = parse_arguments(
        ["--family", "codis", "--train_data", "none", "--attn_implementation", "eager", "--queue_size", "64"]
        + ["--batch_size", "8", "--model_config", config]
    )
    assert estimate(given, DEVICES["h100"]).flops_per_pair > 1e6


def test_a_rehearsal_is_the_step_of_a_family_with_queues_and_codes():
    """Its teacher moves before the step, its queues are tensors beside modules, and its tokenizer is not there."""
    given = simla_arguments()
    config = configuration_of(given)
    rehearsed = rehearse(
        replace(given, objective=replace(given.objective, image_tokenizer="nowhere")), config, LENGTHS
    )
    flops, kept, model = real_step(given, config, half=False)
    assert rehearsed.flops == flops and rehearsed.activations == pytest.approx(kept, rel=0.02)
    assert rehearsed.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < rehearsed.teacher < rehearsed.parameters


def test_rehearsing_allocates_nothing_of_the_models_size():
    """A model of 25 GB in fp32 is rehearsed here."""
    given = arguments()
    config = OneRConfig(**{**SMALL, "hidden_size": 8192, "num_hidden_layers": 8}, vocab_size=200)
    assert rehearse(given, config, [3, 4]).parameters * 4 > 20e9


def test_memory_and_time_by_hand():
    given = arguments("--batch_size", "8", "--epochs", "3", "--warmup_epochs", "0", "--mixed_precision", "no")
    device = Device(half=1000.0, single=2.0, memory=1.0)
    one = estimate(given, device, words=6, mfu=0.5, pairs=83)
    rehearsed = rehearse(given, OneRConfig(**SMALL, vocab_size=200), [12] + [6] * 7)
    assert one.memory["weights"] * GIB == 4 * rehearsed.parameters + rehearsed.buffers
    assert one.memory["optimizer"] == 2 * one.memory["gradients"] and one.memory["half weights"] == 0
    assert one.memory["teacher"] * GIB == 4 * rehearsed.teacher > 0
    assert one.memory["total"] == pytest.approx(1.1 * (one.memory["total"] - one.memory["margin"]))
    assert one.pairs_per_second == pytest.approx(0.5 * 2.0e12 / (rehearsed.flops / 8))
    assert one.steps == 3 * (83 // 8)
    assert one.hours == pytest.approx(30 * 8 / one.pairs_per_second / 3600) and one.device_hours == one.hours
    assert estimate(given, device, words=6).hours is None


def test_devices_share_the_batch_and_shards_the_state():
    device = DEVICES["h100"]
    one = estimate(arguments("--batch_size", "8"), device, words=6, pairs=800)
    two = estimate(arguments("--batch_size", "16"), device, count=2, words=6, pairs=800)
    assert two.memory == one.memory and two.pairs_per_second == pytest.approx(2 * one.pairs_per_second)
    assert two.device_hours == pytest.approx(one.device_hours)
    spread = estimate(arguments("--batch_size", "16"), device, count=2, words=6, sharding="fsdp2")
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert spread.memory[name] == pytest.approx(one.memory[name] / 2)
    first = estimate(arguments("--batch_size", "16"), device, count=2, words=6, sharding="zero1")
    assert first.memory["optimizer"] == spread.memory["optimizer"] and first.memory["weights"] == one.memory["weights"]


def test_cached_gradients_keep_less_and_work_more():
    device = DEVICES["h100"]
    plain = estimate(arguments("--batch_size", "16"), device, words=6)
    cached = estimate(arguments("--batch_size", "16", "--gradient_cache_chunks", "4"), device, words=6)
    assert cached.memory["activations"] < plain.memory["activations"] / 3
    assert 1.2 < cached.flops_per_pair / plain.flops_per_pair < 1.4
    assert cached.memory["weights"] == plain.memory["weights"]


def test_patches_that_are_not_kept_are_not_counted():
    given = ("--losses", "itc", "cmc")
    half, whole = (
        rehearse(made, configuration_of(made), LENGTHS)
        for made in (arguments(*given, "--image_keep", share) for share in ("0.5", "1"))
    )
    assert half.targets == whole.targets and half.flops < whole.flops and half.activations < whole.activations


def test_what_chunks_repeat_is_the_first_pass_alone():
    """Of SIMLA that embeds both sides for contrast; fusion and heads run once."""
    given = simla_arguments("--gradient_cache_chunks", "2", "--batch_size", "12")
    rehearsed = rehearse(given, configuration_of(given), LENGTHS)
    assert 0 < rehearsed.repeated < 0.3 * rehearsed.forward
    cached = estimate(given, DEVICES["h100"], words=6).flops_per_pair
    plain = estimate(simla_arguments("--batch_size", "6"), DEVICES["h100"], words=6).flops_per_pair
    assert 1 < cached / plain < 1.15


@pytest.mark.parametrize("wrong", [{"count": 3}, {"count": 0}, {"mfu": 1.5}, {"sharding": "zero4"}])
def test_what_cannot_be_estimated_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        estimate(arguments("--batch_size", "8"), DEVICES["h100"], **wrong)


def command(*given: str) -> list[str]:
    config = json.dumps({**SMALL, "vocab_size": 200})
    return [
        "estimate",
        "--family",
        "oner",
        "--train_data",
        "none",
        "--model_config",
        config,
        "--batch_size",
        "8",
        *given,
    ]


def test_a_later_stage_is_estimated_before_the_one_that_it_begins_with():
    arguments = parse_arguments(["--config", "momo_stage3_large"])
    with pytest.warns(UserWarning, match="runs/momo_stage2_large/model is not there: estimated for the size 'large'"):
        config = configuration_of(arguments)
    assert config.num_hidden_layers == 24 and config.decoders == ["text", "pair"]


def test_the_command_prints_text_and_json(capsys):
    assert main(command("--device", "h100", "--pairs", "800", "--words", "6")) == 0
    text = capsys.readouterr().out
    assert "device-hours" in text and "activations" in text and "of 80 GiB: fits" in text
    assert main(command("--json", "--memory_gib", "0.001")) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory"]["total"] > 0 and values["hours"] is None
    assert main(command("--memory_gib", "0.001")) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(capsys):
    assert main(command("--count", "3")) == 2
    assert "expected a multiple of 3 devices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["no-such-command"])
    assert "estimate" in COMMANDS


def test_setup_declares_the_command(root):
    import configparser

    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    assert "oner = oner_command_line:main" in setup["options.entry_points"]["console_scripts"]
