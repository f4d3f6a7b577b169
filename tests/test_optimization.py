"""The schedule against its closed form, and who decays."""

import math

import pytest
import torch
from tiny_oner import tiny_config

from oner.modeling.modeling_oner_pretraining import OneRForPreTraining
from oner.training.arguments import RunArguments
from oner.training.objective_oner import OneRObjective, OneRObjectiveArguments
from oner.training.optimization import build_optimizer, build_schedule


def closed_form(step: int, total: int, warmup: int, peak: float, lowest: float) -> float:
    """Linear from 0 at step 0 to the peak at `warmup`, then half a cosine that would end at `total`."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / (total - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("lowest", [0.0, 1e-6])
def test_the_rate_is_a_warm_up_and_half_a_cosine_of_the_step(lowest):
    run = RunArguments(base_learning_rate=1e-4, batch_size=512, warmup_epochs=4, min_learning_rate=lowest)
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(model, run)
    schedule = build_schedule(optimizer, run, total_steps=400, epoch_steps=10)
    for step in (0, 1, 20, 39, 40, 41, 100, 220, 399, 7):  # out of order too: nothing is kept between steps
        schedule.step_update(step)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        assert rates.pop() == pytest.approx(closed_form(step, 400, 40, 2e-4, lowest), rel=1e-12, abs=1e-18)


def test_warm_up_can_be_a_part_of_an_epoch_or_none():
    run = RunArguments(batch_size=256, warmup_epochs=0.6)
    optimizer = build_optimizer(torch.nn.Linear(3, 3), run)
    schedule = build_schedule(optimizer, run, total_steps=50, epoch_steps=10)
    schedule.step_update(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4, rel=1e-12)
    run = RunArguments(batch_size=256, warmup_epochs=0)
    schedule = build_schedule(optimizer := build_optimizer(torch.nn.Linear(3, 3), run), run, 50, 10)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4, rel=1e-12)


def test_one_dimensional_parameters_do_not_decay():
    model = OneRForPreTraining(tiny_config(learnable_temperature=True))
    optimizer = build_optimizer(model, RunArguments(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.ndim <= 1 else 0.3), name
    assert set(decay.values()) == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_all_decay_when_asked_as_moco_v3_does():
    model = OneRForPreTraining(tiny_config())
    optimizer = build_optimizer(model, RunArguments(weight_decay=0.3, decay_norm_and_bias=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("decay_all", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(decay_all):
    model = OneRForPreTraining(tiny_config())
    OneRObjective(model, OneRObjectiveArguments(losses=["itc", "cmc"]))  # freezes both masked heads
    optimizer = build_optimizer(model, RunArguments(decay_norm_and_bias=decay_all))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) < len(list(model.parameters()))
    assert sorted(grouped) == sorted(trainable)
