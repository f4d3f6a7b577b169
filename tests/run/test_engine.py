"""The engine through examples/pretrain.py: resume to the bit, signals, refusals, logs, and the variants of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pretraining import (
    EVERY_STEP,
    ROOT,
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
)
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from oner.modeling.vl_embeddings import interpolate_positions, sincos_2d
from oner.processing.data.sources import open_rows
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.run import launch
from oner.training.run.arguments import RunArguments
from oner.training.run.building import build_model
from oner.training.run.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    verify,
)
from oner.training.run.engine import Engine
from oner.training.run.launch import choose_precision, make_accelerator
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED

pytestmark = [pytest.mark.usefixtures("fresh_accelerator")]


def last(directory: Path) -> Path:
    return list_checkpoints(directory)[-1]


def stop_after(monkeypatch, step: int) -> None:
    """SIGTERM to this very process when it logs that step, once."""
    log = Engine._log

    def log_and_stop(self, *arguments):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(self, *arguments)

    monkeypatch.setattr(Engine, "_log", log_and_stop)


# Resume


@pytest.mark.parametrize("step", [1, 3, 5, 9], ids=["first step", "mid-epoch", "epoch edge", "before the last"])
def test_resuming_is_never_stopping(example, pairs, undisturbed, tmp_path, step):
    name = f"checkpoint-{step:08d}"
    shutil.copytree(undisturbed / name, tmp_path / name)
    example.main(tiny_arguments(pairs, tmp_path, resume="auto", **EVERY_STEP))
    for later in range(step + 1, 11):
        name = f"checkpoint-{later:08d}"
        assert_same_checkpoint(undisturbed / name, tmp_path / name)
    assert read_log(tmp_path) == read_log(undisturbed)[step:]
    weights = [(directory / "model" / "model.safetensors").read_bytes() for directory in (undisturbed, tmp_path)]
    assert weights[0] == weights[1]


def test_the_run_that_is_repeated_is_not_trivial(undisturbed):
    first, end = (load_checkpoint(undisturbed / f"checkpoint-{step:08d}")[0] for step in (1, 10))
    assert first.keys() == {"model", "objective", "optimizer", "random"}
    moved = [name for name, value in first["model"].items() if not torch.equal(value, end["model"][name])]
    assert {"oner.layers.0.attention.qkv.weight", "oner.embeddings.word_embeddings.weight"} <= set(moved)
    teacher = "teacher.oner.layers.0.attention.qkv.weight"
    assert not torch.equal(first["objective"][teacher], end["objective"][teacher])
    assert not torch.equal(first["random"]["cpu"], end["random"]["cpu"])
    losses = [line["loss"] for line in read_log(undisturbed)]
    assert len(set(losses)) == 10


def test_stopped_thrice_with_data_workers(example, pairs, undisturbed, tmp_path, monkeypatch):
    arguments = tiny_arguments(pairs, tmp_path, resume="auto", **{**EVERY_STEP, "save_every_epochs": 9})
    arguments[arguments.index("--num_workers") + 1] = "2"
    for step in (2, 5, 6):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            example.main(arguments)
        assert last(tmp_path).name == f"checkpoint-{step:08d}" and not (tmp_path / "model").exists()
    with pytest.raises(CheckpointError, match=r"save_every_epochs: 9\.0 -> 0\.2"):
        example.main(tiny_arguments(pairs, tmp_path, resume="auto", **EVERY_STEP))
    example.main(arguments)
    assert_same_checkpoint(last(undisturbed), last(tmp_path))
    assert read_log(tmp_path) == read_log(undisturbed)


def test_a_finished_run_is_only_exported_again(example, pairs, undisturbed, tmp_path):
    shutil.copytree(last(undisturbed), tmp_path / last(undisturbed).name)
    example.main(tiny_arguments(pairs, tmp_path, resume="auto", **EVERY_STEP))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "log.jsonl").exists()


def test_a_changed_configuration_is_named_and_refused_unless_allowed(example, pairs, undisturbed, tmp_path):
    name = "checkpoint-00000009"
    shutil.copytree(undisturbed / name, tmp_path / name)
    changed = tiny_arguments(
        pairs, tmp_path, resume="auto", weight_decay=0.7, losses=["itc", "cmc", "mlm"], **EVERY_STEP
    )
    with pytest.raises(CheckpointError) as error:
        example.main(changed)
    message = str(error.value)
    assert "weight_decay: 0.05 -> 0.7" in message and "allow_changes" in message
    assert "losses: ['itc', 'cmc', 'mlm', 'mim'] -> ['itc', 'cmc', 'mlm']" in message
    assert "base_learning_rate" not in message and not (tmp_path / "log.jsonl").exists()
    changed = tiny_arguments(
        pairs, tmp_path, resume="auto", weight_decay=0.7, allow_changes=True, log_every=2, **EVERY_STEP
    )
    example.main(changed)
    state = load_checkpoint(last(tmp_path))[1]
    assert state["step"] == 10 and state["arguments"]["weight_decay"] == 0.7
    assert {group["weight_decay"] for group in state["optimizer_groups"]} == {0.0, 0.7}


def test_sigterm_to_the_program_ends_it_with_a_checkpoint(example, pairs, undisturbed, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = tiny_arguments(pairs, tmp_path / "run", **{**EVERY_STEP, "save_every_epochs": 9})
    # steps of a tiny model would be over before a signal arrives: `epochs` alone makes the run long enough
    arguments[arguments.index("--epochs") + 1] = "200"
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "pretrain.py"), *arguments],
            stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (log.is_file() and log.read_text().count("\n") >= 3):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == STOPPED, (tmp_path / "output.txt").read_text()[-2000:]
    step = len(read_log(tmp_path / "run"))
    assert f"stopped at step {step}; go on with --resume auto" in (tmp_path / "output.txt").read_text()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{step:08d}"]
    verify(last(tmp_path / "run"))
    assert 3 <= step < 1000 and not (tmp_path / "run" / "model").exists()
    # the rest in this process, a few steps of it, against a run of this process that was never stopped
    end = step + 3
    for directory, resume in ((tmp_path / "run", "auto"), (tmp_path / "whole", None)):
        arguments[arguments.index("--output_dir") + 1] = str(directory)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, end)
            example.main([*arguments, *(["--resume", resume] if resume else [])])
    assert_same_checkpoint(last(tmp_path / "whole"), last(tmp_path / "run"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")


def test_sigterm_is_given_back(example, pairs, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    example.main(tiny_arguments(pairs, tmp_path / "a", max_steps=1))
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(FloatingPointError):
        example.main(tiny_arguments(pairs, tmp_path / "b", base_learning_rate=1e38, warmup_epochs=0))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_the_last_step_cuts_nothing_short(example, pairs, tmp_path, monkeypatch):
    save = Engine._save

    def save_and_stop(self):
        save(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Engine, "_save", save_and_stop)
    example.main(tiny_arguments(pairs, tmp_path, max_steps=1))
    assert last(tmp_path).name == "checkpoint-00000001" and (tmp_path / "model" / "model.safetensors").is_file()


def test_every_process_goes_on_with_its_own_generators(monkeypatch):
    """Two processes' generators on two processes; on one or three, seeds that differ by process and step."""
    saved, expected = [], []
    for _ in range(2):
        saved.append(random_state())
        expected.append(torch.rand(3).tolist())
    generators = {name: torch.stack([one[name] for one in saved]) for name in saved[0]}
    drawn = {}
    for place, count, step in ((0, 2, 7), (1, 2, 7), (0, 1, 7), (0, 1, 7), (0, 1, 8), (0, 3, 7), (2, 3, 7)):
        monkeypatch.setattr("oner.training.run.engine.rank", lambda place=place: place)
        monkeypatch.setattr("oner.training.run.engine.world_size", lambda count=count: count)
        engine = SimpleNamespace(run=RunArguments(seed=4), step=step)
        Engine._restore_randomness(engine, generators)
        drawn.setdefault((place, count, step), []).append(tuple(torch.rand(3).tolist()))
    assert [list(drawn[place, 2, 7][0]) for place in (0, 1)] == expected
    assert len(set(drawn[0, 1, 7])) == 1
    assert len({draws[0] for key, draws in drawn.items() if key != (0, 3, 7)}) == 5


# Refusals


def test_an_objective_of_another_shape_is_named_with_its_file(example, pairs, undisturbed, tmp_path):
    tensors, state = load_checkpoint(undisturbed / "checkpoint-00000009")
    name = "teacher.oner.layers.0.attention.qkv.weight"
    del tensors["objective"][name]
    path = save_checkpoint(tmp_path, 9, tensors, state)
    with pytest.raises(CheckpointError) as error:
        example.main(tiny_arguments(pairs, tmp_path, resume="auto", **EVERY_STEP))
    assert str(path) in str(error.value) and name.removeprefix("teacher.") in str(error.value)


def test_accumulating_a_contrastive_loss_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps is 4: with accumulation, a contrastive loss has only"
    ):
        make_accelerator(RunArguments(output_dir=str(tmp_path), mixed_precision="no"))


# Precision, logs, evaluation, export


def test_automatic_precision_follows_the_hardware(example, pairs, tmp_path, monkeypatch, capsys):
    assert [choose_precision(asked) for asked in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(launch, "has_fast_bf16", lambda fast=fast: fast)
        assert choose_precision("auto") == precision
        forget_accelerator()
        example.main(tiny_arguments(pairs, tmp_path / precision, mixed_precision="auto", max_steps=2))
        assert f"precision {precision}" in capsys.readouterr().out
    weights = [load_checkpoint(last(tmp_path / name))[0]["model"] for name in ("bf16", "no")]
    assert {value.dtype for value in weights[0].values() if value.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_logs_evaluation_and_the_model_directory(example, pairs, tmp_path):
    metrics = example.main(
        tiny_arguments(pairs, tmp_path, eval_data=[pairs], eval_every_epochs=1, log_every=2, save_every_epochs=1)
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in evaluations] == [5, 10]
    assert {"epoch", "loss", "itc", "cmc", "mlm", "mim", "learning_rate", "pairs_per_second"} <= losses[0].keys()
    assert losses[0]["loss"] == pytest.approx(sum(losses[0][name] for name in ("itc", "cmc", "mlm", "mim")), rel=1e-6)
    assert losses[1]["epoch"] == 0.8 and losses[0]["pairs_per_second"] > 0
    assert {name: evaluations[-1][name] for name in metrics} == metrics and "pairs/tr_r@1" in metrics
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000005", "checkpoint-00000010"]

    weights = load_checkpoint(last(tmp_path))[0]["model"]
    for auto, prefix in ((AutoModel, "oner."), (AutoModelForZeroShotImageClassification, "")):
        model, report = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[prefix + name]), name
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    row = open_rows(pairs, text_column="captions")[0]
    inputs = processor(images=row["image"], text=row["captions"][0])
    assert model.eval()(**inputs).logits_per_image.shape == (1, 1)


def test_evaluating_only_at_the_end(example, pairs, tmp_path):
    example.main(tiny_arguments(pairs, tmp_path, eval_data=[pairs], eval_every_epochs=0, log_every=10))
    assert [line["step"] for line in read_log(tmp_path) if "loss" not in line] == [10]


def test_evaluating_does_not_change_the_run(example, pairs, undisturbed, tmp_path):
    example.main(tiny_arguments(pairs, tmp_path, **EVERY_STEP | {"eval_every_epochs": 0.4, "eval_data": [pairs]}))
    one, other = load_checkpoint(last(undisturbed))[0], load_checkpoint(last(tmp_path))[0]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@pytest.mark.parametrize("every, kept", [(1, 5), (0, 10)], ids=["on the way", "at the end"])
def test_an_evaluation_that_fails_loses_no_step(example, pairs, undisturbed, tmp_path, monkeypatch, every, kept):
    """And a run that has come to its end is not over without its numbers."""
    options = {**EVERY_STEP, "save_every_epochs": 9, "eval_data": [pairs], "resume": "auto"}
    options["eval_every_epochs"] = every

    def fail(self, model, processor):
        raise RuntimeError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalEvaluator, "run", fail)
        for _ in range(1 if every else 2):
            with pytest.raises(RuntimeError, match="no memory is left"):
                example.main(tiny_arguments(pairs, tmp_path, **options))
    assert last(tmp_path).name == f"checkpoint-{kept:08}"
    metrics = example.main(tiny_arguments(pairs, tmp_path, **options))
    assert metrics and load_checkpoint(last(tmp_path))[1]["metrics"] == metrics
    assert [line["step"] for line in read_log(tmp_path) if "loss" not in line] == [10]
    weights, expected = (load_checkpoint(last(run))[0]["model"] for run in (tmp_path, undisturbed))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_a_tracker_gets_the_numbers(example, pairs, tmp_path):
    pytest.importorskip("tensorboard")
    example.main(tiny_arguments(pairs, tmp_path, report_to=["tensorboard"], max_steps=2))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("oner.training.run.launch.get_available_trackers", lambda: [])
    run = RunArguments(output_dir=str(tmp_path), mixed_precision="no", report_to=["wandb"])
    with pytest.raises(ValueError, match=r"report_to names \['wandb'\], which is not installed"):
        make_accelerator(run)


# Variants


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"two_heads": True}, {"losses": ["itc", "mlm", "mim"]}),
        ({}, {"losses": ["itc", "xmc"]}),
        ({"context_states": "co_attention"}, {"losses": ["itc", "xmc", "cic"]}),
        ({"learnable_temperature": True}, {"losses": ["itc", "cmc"]}),
        ({}, {"losses": ["mlm", "mim"]}),
        ({"head_norm": "layer"}, {"teacher": False, "one_row_per_id": True, "match_ids": True}),
        ({}, {"gradient_checkpointing": True, "contrast_masked": False, "max_grad_norm": 1.0}),
    ],
    ids=["two heads", "xmc", "cic", "learnable temperature", "masked only", "no teacher", "checkpointing"],
)
def test_variants_run_and_learn(example, pairs, tmp_path, config, options):
    example.main(tiny_arguments(pairs, tmp_path, max_steps=2, save_every_epochs=0.2, model_config=config, **options))
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert set(options.get("losses", ["itc", "cmc", "mlm", "mim"])) <= lines[0].keys()
    one, two = (load_checkpoint(path)[0]["model"] for path in list_checkpoints(tmp_path))
    assert not torch.equal(one["oner.layers.0.feed_forward.fc1.weight"], two["oner.layers.0.feed_forward.fc1.weight"])
    if "learnable_temperature" in config:
        assert not torch.equal(one["logit_scale"], two["logit_scale"])


def test_what_the_first_stage_lacks_is_drawn_by_the_seed(pairs, undisturbed, tmp_path):
    tower = AutoModel.from_pretrained(undisturbed / "model")
    tower.save_pretrained(tmp_path)
    heads = []
    for seed in (3, 3, 4):
        torch.rand(len(heads))  # wherever the generator happens to be
        model = build_model(
            parse_arguments(tiny_arguments(pairs, tmp_path, initial_model=tmp_path, seed=seed)), tower.config
        )
        assert torch.equal(model.oner.layers[0].attention.qkv.weight, tower.layers[0].attention.qkv.weight)
        heads.append(model.pixel_head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_second_stage_starts_from_the_first_and_interpolates_positions(
    example, pairs, undisturbed, tmp_path, capsys
):
    # at a rate of zero, the weights of the second stage are those of the first
    example.main(
        tiny_arguments(
            pairs, tmp_path, initial_model=undisturbed / "model", base_learning_rate=0, max_steps=1,
            model_config={"image_size": 64},
        )
    )  # fmt: skip
    assert f"oner from {undisturbed / 'model'}, " in capsys.readouterr().out
    first, second = (AutoModel.from_pretrained(path / "model") for path in (undisturbed, tmp_path))
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name
    assert (second.config.image_size, second.config.position_image_size) == (64, 32)
    ticks = torch.arange(2, dtype=torch.float64)
    table = sincos_2d(ticks, ticks, 32).float()
    torch.testing.assert_close(second.embeddings.image_positions, interpolate_positions(table, (2, 2), (4, 4)))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert (
        processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(undisturbed / "model").tokenizer.get_vocab()
    )


@pytest.mark.filterwarnings("ignore:.*is read as a sequential stream:UserWarning")
def test_a_stream_says_that_it_cannot_resume_exactly_and_runs(example, pairs, tmp_path, capsys):
    with pytest.raises(ValueError, match="no vocabulary can be trained on them first; expected `tokenizer`"):
        example.main(tiny_arguments(pairs, tmp_path / "a", streaming=True, max_steps=3))
    train_tokenizer(open_rows(pairs).captions(), vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    stream = {"streaming": True, "tokenizer": tmp_path / "tokenizer"}
    with pytest.raises(ValueError, match="the run needs max_steps, got none"):
        example.main(tiny_arguments(pairs, tmp_path / "b", **stream))
    with pytest.raises(ValueError, match=r"warmup_epochs is 4\.0, .* all 7 steps; for streamed data, .* below 1"):
        example.main(tiny_arguments(pairs, tmp_path / "b", max_steps=7, warmup_epochs=4, **stream))
    capsys.readouterr()
    example.main(tiny_arguments(pairs, tmp_path / "c", max_steps=7, **stream))
    printed = capsys.readouterr().out
    assert f"{pairs} is read as a sequential stream: a resumed run can only" in printed.split("model directory")[0]
    assert [line["step"] for line in read_log(tmp_path / "c")] == list(range(1, 8))


@pytest.mark.slow
def test_compiled_layers_give_the_same_run(example, pairs, tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    for compile in (False, True):
        example.main(tiny_arguments(pairs, tmp_path / str(compile), compile=compile, max_steps=2))
    eager, compiled = (read_log(tmp_path / str(compile)) for compile in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
