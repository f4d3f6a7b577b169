"""From an official file to a step, converted, loaded and fed; test_parity_page.py does it as docs/parity.md says."""

import pytest
import torch
from safetensors.torch import load_file
from simla_bridge import check_step, official, our_state, problem
from tiny_simla import OFFICIAL_DEPTH
from transformers import AutoModelForPreTraining

from oner.training.conversion.checkpoints import from_official, to_official
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments
from oner_command_line import main

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
