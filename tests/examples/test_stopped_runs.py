"""A run that a signal stopped ends with a status of its own, which `make demo` and `examples/launch.py` pass on."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_finetuning import DATA, write_simla
from tiny_pretraining import ROOT, tiny_arguments, write_pairs

from oner.training.run.engine import Engine
from oner.training.run.summary import STOPPED

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # the tiny model's vocabulary is of other texts, and a run says so
    pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning"),
]


def pretraining(folder: Path) -> list[str]:
    return tiny_arguments(write_pairs(folder / "pairs.parquet"), folder / "run")


def finetuning(folder: Path) -> list[str]:
    told = DATA["retrieval"](folder)
    fields = {
        "task": "retrieval", "initial_model": write_simla(folder / "pretrained"), "batch_size": 4, "max_steps": 9,
        "mixed_precision": "no", "log_every": 1, "eval_every_epochs": 0, "output_dir": folder / "run", **told,
    }  # fmt: skip
    lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    return [str(part) for name, values in lists.items() if values != [None] for part in (f"--{name}", *values)]


def image_tokenizer(folder: Path) -> list[str]:
    config = folder / "config.yaml"
    values = {
        "base": str(ROOT / "examples" / "configs" / "image_tokenizer_emoji.yaml"),
        "train_data": [str(write_pairs(folder / "pairs.parquet"))],
        "model_config": {"hidden_size": 8, "num_codes": 24, "codebook_dim": 8, "image_size": 16},
        "eval_data": [],
        "attribution": None,
        "batch_size": 4,
        "mixed_precision": "no",
        "log_every": 1,
        "output_dir": str(folder / "run"),
    }
    config.write_text(yaml.safe_dump(values))
    return ["--config", str(config)]


SAID = "stopped; run it again to go on"
PROGRAMS = {"pretrain": pretraining, "finetune": finetuning, "train_image_tokenizer": image_tokenizer}


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_stopped_ends_with_its_own_status(name, tmp_path, monkeypatch, capsys):
    log = Engine._log

    def log_and_stop(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return log(self, *arguments)

    monkeypatch.setattr(Engine, "_log", log_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *PROGRAMS[name](tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == STOPPED == os.EX_TEMPFAIL
    assert "stopped at step 1; go on with --resume auto" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-00000001").is_dir() and not (tmp_path / "run" / "model").exists()


def make_demo(folder: Path, status: int) -> tuple[subprocess.CompletedProcess, list[str]]:
    """`make demo` with a python that does nothing, but end pretrain.py with `status`; and the scripts it was asked."""
    python, asked = folder / "bin" / "python", folder / "asked.txt"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$1" >> {asked}\ncase "$1" in *pretrain.py) exit {status};; esac\n', encoding="utf-8"
    )
    python.chmod(0o755)
    (folder / ".installed-plots").touch()
    done = subprocess.run(["make", "demo", f"VENV={folder}"], cwd=ROOT, capture_output=True, text=True)
    return done, [Path(line).name for line in asked.read_text().splitlines()]


def test_make_demo_evaluates_what_was_trained(tmp_path):
    done, asked = make_demo(tmp_path, status=0)
    assert done.returncode == 0, done.stderr
    assert asked == ["pretrain.py", "evaluate.py", "evaluate.py", "evaluate.py"]
    assert SAID not in done.stdout.splitlines()


@pytest.mark.parametrize("status", [STOPPED, 1])
def test_make_demo_evaluates_nothing_that_was_not_trained(status, tmp_path):
    done, asked = make_demo(tmp_path, status)
    assert done.returncode != 0 and asked == ["pretrain.py"]
    assert (SAID in done.stdout.splitlines()) == (status == STOPPED)


# as `accelerate launch` starts one process, and several (which it does by torchrun)
LAUNCHES = {"one": ["--num_processes", "1"], "two": ["--num_processes", "2", "--use_fsdp"]}
ENDINGS = {"stopped": (f"raise SystemExit({STOPPED})", STOPPED), "well": ("", 0), "error": ("raise ValueError", 1)}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_launcher_passes_the_status_on(launch, ending, tmp_path):
    code, status = ENDINGS[ending]
    script = tmp_path / "script.py"
    script.write_text(code + "\n", encoding="utf-8")
    options = [*LAUNCHES[launch], "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, str(ROOT / "examples" / "launch.py"), *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
