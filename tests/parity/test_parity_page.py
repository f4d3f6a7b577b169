"""docs/parity.md as it stands: its commands and its script, on a step that the oracles record."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import official_albef
import official_simla
import pytest
import torch
from official_networks import trained
from simla_bridge import official, official_batch, problem, sizes_of
from test_parity_albef import albef_problem
from tiny_simla import OFFICIAL_DEPTH

from oner_command_line import main

ROOT = Path(__file__).resolve().parents[2]
# what is asked of a recorded step, and the oracle's name of it
ASKED = {
    "image": "pixels",
    "input_ids": "ids",
    "attention_mask": "mask",
    "masked_input_ids": "masked_ids",
    "labels": "labels",
    "negative_images": "negative_images",
    "negative_texts": "negative_texts",
}
OF_SIMLA = {"masked_patches": "masked_patches", "visual_codes": "codes"}


def snippets() -> dict[str, str]:
    """The blocks of the page that are marked for tests."""
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    found = re.findall(r"^ *<!-- test: (\w+) -->\n( *)```\w+\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    return {name: re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for name, indent, text in found}


def simla() -> tuple[dict, dict]:
    """Official weights, and what the page asks to be recorded of a step."""
    config, weights, batch = problem([3, 7, 5], **OFFICIAL_DEPTH)
    return weights, record_step(official_simla.pretraining_step, weights, batch, config, ASKED | OF_SIMLA)


def albef() -> tuple[dict, dict]:
    config, weights, batch = albef_problem([3, 7, 5])
    return weights, record_step(official_albef.pretraining_step, weights, batch, config, ASKED)


def record_step(take, weights: dict, batch: dict, config, asked: dict[str, str], alpha: float = 0.4) -> dict:
    """By the oracle, in the place of the official code."""
    leaves = official(weights)
    given = official_batch(batch)
    step = take(leaves, given, sizes_of(config), alpha)
    step.total.backward()
    keywords = {} if step.keyword_targets is None else {"keyword_targets": step.keyword_targets}
    return {
        **{name: given[theirs] for name, theirs in asked.items()},
        **keywords,
        "alpha": alpha,
        "losses": {name: value.item() for name, value in step.losses.items()},
        "gradients": {name: leaves[name].grad for name in trained(leaves) if leaves[name].grad is not None},
        "after": step.after,
    }


@pytest.mark.parametrize(
    ("make", "command", "losses"),
    [(simla, "convert", ("itc", "itm", "mlm", "mim", "psl")), (albef, "convert_albef", ("itc", "itm", "mlm"))],
    ids=["simla", "albef"],
)
def test_the_page_says_how(make, command, losses, tmp_path, monkeypatch):
    """What its script prints is held against the tolerances."""
    weights, recorded = make()
    torch.save({"model": weights}, tmp_path / "official.pth")
    torch.save(recorded, tmp_path / "recorded.pth")
    blocks = snippets()
    assert set(blocks) == {"convert", "convert_albef", "compare"}
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks[command])[1:]) == 0
    (tmp_path / "compare.py").write_text(blocks["compare"], encoding="utf-8")
    done = subprocess.run([sys.executable, "compare.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert set(told) == {*losses, "gradients", "teacher and queues"}
    for name in losses:
        assert float(told[name].rpartition(" ")[2]) < 3e-5, told[name]
    for name, most in (("gradients", 1e-3), ("teacher and queues", 1e-5)):
        largest = float(re.search(r"', ([\d.e-]+)\)", told[name])[1])
        assert 0 < largest < most, told[name]
    assert len(re.findall(r"\('", told["gradients"])) == 3
