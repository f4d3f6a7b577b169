"""examples/pretrain.py in this process, on forty real pairs and a model of some thousand weights."""

import argparse
import importlib
import importlib.util
import io
import json
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from families import FAMILIES

from oner.training.run import engine
from oner.training.run.checkpoint import load_checkpoint
from oner.training.run.checkpoint_writer import CheckpointWriter
from oner_command_line import COMMANDS as COMMAND_LINE

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 40
# dropout, so that the generators count too; a checkpoint after every one of the ten steps
EVERY_STEP = {"save_every_epochs": 0.2, "keep_checkpoints": 20, "model_config": {"attention_dropout": 0.1}}


# examples/NAME.py that only call a command of the package
COMMANDS = {"pretrain": "train", "finetune": "finetune", "evaluate": "evaluate", "search": "search"}


def load_example(name: str) -> ModuleType:
    """examples/NAME.py, or the command that it calls, as a module; the folder is no package."""
    if name in COMMANDS:
        return importlib.import_module(f"oner.training.commands.{COMMANDS[name]}")
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluated(line: list[str]) -> dict[str, float]:
    """What `oner evaluate LINE` finds."""
    return load_example("evaluate").evaluate(*COMMAND_LINE["evaluate"].read("evaluate", line))


def evaluation_of(line: list[str]) -> argparse.Namespace:
    """What `oner evaluate LINE` is told."""
    return load_example("evaluate").complete(*COMMAND_LINE["evaluate"].read("evaluate", line))


def write_pairs(path: Path, rows: int = PAIRS) -> Path:
    """Every 150th row of the embedded pairs: few of them show the same concept."""
    table = pq.read_table(ROOT / "examples" / "data" / "emoji" / "train.parquet")
    pq.write_table(table.take(list(range(0, 150 * rows, 150))), path)
    return path


def write_shard(path: Path, rows: list[dict]) -> Path:
    """A shard of pairs in the layout of webdataset: KEY.png beside KEY.json."""
    with tarfile.open(path, "w") as shard:
        for row in rows:
            told = json.dumps({"captions": row["captions"], "hexcode": row["hexcode"]}).encode()
            for suffix, content in (("png", row["image"]["bytes"]), ("json", told)):
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def tiny_arguments(pairs: Path, output_dir: Path, family: str = "oner", **overrides: Any) -> list[str]:
    """A command line: two epochs of five steps of eight pairs, in fp32. `model_config` is merged, None is left out."""
    run = FAMILIES[family].run
    fields = {
        "family": family,
        "train_data": [pairs],
        "text_column": "captions",
        "id_column": "hexcode",
        "size": "nano",
        "vocab_size": 300,
        "batch_size": 8,
        "epochs": 2,
        "warmup_epochs": 0.6,
        "base_learning_rate": 0.03,
        "num_workers": 0,
        "mixed_precision": "no",
        "log_every": 1,
        "eval_every_epochs": 0,
        "output_dir": output_dir,
        **run,
        **overrides,
        "model_config": json.dumps({**run["model_config"], **overrides.get("model_config", {})}),
    }
    line = []
    for name, value in fields.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def write_as_late_as_can_be(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """
    A checkpoint that is written beside the run is so only when the run waits for it, steps later. Returns a list that
    fills with the steps of those written.
    """
    asked, steps = threading.Event(), []
    wait, save = CheckpointWriter.wait, engine.save_checkpoint

    def asking(self):
        asked.set()
        try:
            wait(self)
        finally:
            asked.clear()

    def late(directory, step, *arguments, **named):
        assert asked.wait(120), "nobody waited for the checkpoint"
        steps.append(step)
        return save(directory, step, *arguments, **named)

    monkeypatch.setattr(CheckpointWriter, "wait", asking)
    monkeypatch.setattr(engine, "save_checkpoint", late)
    return steps


def forget_accelerator() -> None:
    """Accelerate keeps one state a process; a second run with another precision needs it gone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl without the only values that are a matter of time."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


def assert_same_checkpoint(one: Path, other: Path, but: Iterable[str] = ()) -> None:
    """Every tensor bit for bit, and the state but for the arguments."""
    tensors, state = load_checkpoint(one)
    tensors_other, state_other = load_checkpoint(other)
    assert tensors.keys() == tensors_other.keys()
    for stem in tensors.keys() - set(but):
        assert tensors[stem].keys() == tensors_other[stem].keys()
        different = [
            name for name, value in tensors[stem].items() if not torch.equal(value, tensors_other[stem][name])
        ]
        assert not different, f"{stem}: {len(different)} differ, {different[:3]}"
    state.pop("arguments"), state_other.pop("arguments")
    assert state == state_other
