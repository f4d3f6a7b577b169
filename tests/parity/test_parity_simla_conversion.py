"""From an official file to a step, by the road that docs/parity.md describes: `oner convert`, load, feed, compare."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official_networks import trained
from official_simla import pretraining_step
from safetensors.torch import load_file
from simla_bridge import check_step, official, official_batch, our_state, problem, sizes_of
from tiny_simla import OFFICIAL_DEPTH
from transformers import AutoModelForPreTraining

from oner.training.conversion.checkpoints import from_official, to_official
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments
from oner_command_line import main

ROOT = Path(__file__).resolve().parents[2]
# what no shape of an official file tells
TOLD = ("num_attention_heads", "hidden_dropout", "text_attention_dropout", "max_text_length", "cls_token_id",
        "image_token_id", "sep_token_id", "mask_token_id")  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_converted_file_takes_the_official_step(tmp_path, alpha, record):
    config, weights, batch = problem([3, 7, 5], **OFFICIAL_DEPTH)
    torch.save({"model": weights, "epoch": 0}, tmp_path / "official.pth")
    told = [part for name in TOLD for part in ("--set", f"{name}={getattr(config, name)}")]
    directory = tmp_path / "simla"
    assert main(["convert", "--from", "simla", str(tmp_path / "official.pth"), str(directory), *told]) == 0

    student = AutoModelForPreTraining.from_pretrained(directory).train()
    size = weights["image_queue"].shape[1]
    objective = SimlaObjective(
        student,
        SimlaObjectiveArguments(distillation=alpha, distillation_ramp=0.0, queue_size=size, mlm_soft_axis="sequence"),
    )
    objective.load_state_dict(load_file(directory / "objective.safetensors"))
    step = check_step(student, objective, official(weights), batch, alpha, record)

    state, _ = to_official(student.state_dict(), "simla", objective.state_dict())
    for name, after in step.after.items():
        torch.testing.assert_close(state[name].to(after.dtype), after, atol=1e-5, rtol=0, msg=name)


def test_two_tables_of_names_agree():
    """That of the converter and that of these tests, which were written apart."""
    config, weights, _ = problem([3])
    told = {name: getattr(config, name) for name in TOLD}
    done = from_official(weights, "simla", **told)
    teacher = {f"teacher.{name}": tensor for name, tensor in our_state(weights, teacher=True).items()}
    for mine, theirs in ((done.weights, our_state(weights)), (done.objective, teacher)):
        mine = {name: tensor for name, tensor in mine.items() if not name.startswith("queue.")}
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name].flatten(), theirs[name].flatten()) for name in mine)
    assert not done.report.left_over and not done.report.missing


def snippets() -> dict[str, str]:
    """The blocks of docs/parity.md that are marked for tests."""
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    found = re.findall(r"^ *<!-- test: (\w+) -->\n( *)```\w+\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    return {name: re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for name, indent, text in found}


def record_step(weights: dict, batch: dict, config, alpha: float) -> dict:
    """What the page asks to be recorded, by the oracle in the place of the official code."""
    leaves = official(weights)
    given = official_batch(batch)
    step = pretraining_step(leaves, given, sizes_of(config), alpha)
    step.total.backward()
    return {
        "image": given["pixels"],
        "input_ids": given["ids"],
        "attention_mask": given["mask"],
        "masked_input_ids": given["masked_ids"],
        "labels": given["labels"],
        "masked_patches": given["masked_patches"],
        "visual_codes": given["codes"],
        "negative_images": given["negative_images"],
        "negative_texts": given["negative_texts"],
        "keyword_targets": step.keyword_targets,
        "alpha": alpha,
        "losses": {name: value.item() for name, value in step.losses.items()},
        "gradients": {name: leaves[name].grad for name in trained(leaves) if leaves[name].grad is not None},
        "after": step.after,
    }


def test_the_page_says_how(tmp_path, monkeypatch):
    """Its command and its script, on a recorded step; then what the script prints is held against the tolerances."""
    config, weights, batch = problem([3, 7, 5], **OFFICIAL_DEPTH)
    torch.save({"model": weights}, tmp_path / "official.pth")
    torch.save(record_step(weights, batch, config, 0.4), tmp_path / "recorded.pth")
    blocks = snippets()
    assert set(blocks) == {"convert", "compare"}
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks["convert"])[1:]) == 0
    (tmp_path / "compare.py").write_text(blocks["compare"], encoding="utf-8")
    done = subprocess.run([sys.executable, "compare.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    for name in ("itc", "itm", "mlm", "mim", "psl"):
        assert float(told[name].rpartition(" ")[2]) < 3e-5, told[name]
    for name, most in (("gradients", 1e-3), ("teacher and queues", 1e-5)):
        largest = float(re.search(r"', ([\d.e-]+)\)", told[name])[1])
        assert 0 < largest < most, told[name]
    assert len(re.findall(r"\('", told["gradients"])) == 3
