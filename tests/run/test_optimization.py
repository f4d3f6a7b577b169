"""The schedule against its closed form, and who decays."""

import math

import pytest
import torch
from families import PRETRAINING
from tiny_oner import tiny_config

from oner.modeling.modeling_oner_pretraining import OneRForPreTraining
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments
from oner.training.run.arguments import RunArguments
from oner.training.run.optimization import GRAPHS_PER_LAYER, build_optimizer, build_schedule, compile_regions


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
    optimizer = build_optimizer(model, run, run.batch_size)
    schedule = build_schedule(optimizer, run, total_steps=400, epoch_steps=10)
    for step in (0, 1, 20, 39, 40, 41, 100, 220, 399, 7):  # out of order too: nothing is kept between steps
        schedule.step_update(step)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        assert rates.pop() == pytest.approx(closed_form(step, 400, 40, 2e-4, lowest), rel=1e-12, abs=1e-18)


def test_warm_up_can_be_a_part_of_an_epoch_or_none():
    run = RunArguments(batch_size=256, warmup_epochs=0.6)
    optimizer = build_optimizer(torch.nn.Linear(3, 3), run, run.batch_size)
    schedule = build_schedule(optimizer, run, total_steps=50, epoch_steps=10)
    schedule.step_update(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4, rel=1e-12)
    run = RunArguments(batch_size=256, warmup_epochs=0)
    schedule = build_schedule(optimizer := build_optimizer(torch.nn.Linear(3, 3), run, run.batch_size), run, 50, 10)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4, rel=1e-12)


def test_a_warm_up_may_be_told_in_steps_and_begin_above_0():
    """CODIS: from 1e-5 to 1e-4 in 1000 steps, then a cosine to 1e-5."""
    run = RunArguments(batch_size=256, warmup_steps=1000, warmup_learning_rate=1e-5, min_learning_rate=1e-5)
    schedule = build_schedule(
        optimizer := build_optimizer(torch.nn.Linear(3, 3), run, run.batch_size), run, 9000, 3000
    )
    for step, expected in ((0, 1e-5), (500, 5.5e-5), (1000, 1e-4), (5000, 5.5e-5)):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def albef_rates(epochs=30, epoch_steps=10_000, **overrides):
    """step -> rate, of ALBEF's run: 1e-4 at a batch of 512."""
    fields = {"base_learning_rate": 5e-5, "batch_size": 512, "warmup_learning_rate": 1e-5, "min_learning_rate": 1e-5}
    run = RunArguments(schedule="albef", **{**fields, **overrides})
    optimizer = build_optimizer(torch.nn.Linear(3, 3), run, run.batch_size)
    schedule = build_schedule(optimizer, run, total_steps=round(epochs * epoch_steps), epoch_steps=epoch_steps)

    def rate(step):
        schedule.step_update(step)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        return rates.pop()

    return rate


def test_albefs_stairs():
    """The rate is set after the update of each hundredth step, so that it holds from the step after."""
    rate = albef_rates()
    told, current = {}, 1e-5
    for step in range(10_000):
        told[step] = current
        if step % 100 == 0 and step <= 2000:
            current = 1e-5 + step // 100 * 4.5e-6
    for step in (0, 1, 100, 101, 200, 201, 1234, 1900, 1901, 2000, 2001, 2100, 9999):
        assert rate(step) == pytest.approx(told[step], rel=1e-12), step
    assert rate(2000) == pytest.approx(9.55e-5, rel=1e-12) and rate(2001) == 1e-4


def test_albefs_epochs():
    rate = albef_rates()
    assert rate(10_000) == rate(19_999) == pytest.approx(9.975e-5, rel=1e-4)
    assert rate(29 * 10_000) == rate(30 * 10_000 - 1) == pytest.approx(1.0247e-5, rel=1e-4)
    for epoch in (15, 3, 29, 1):  # out of order too
        expected = 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * epoch / 30))
        assert rate(epoch * 10_000 + 17) == pytest.approx(expected, rel=1e-12)
    assert rate(0) == 1e-5


def test_albefs_stairs_of_a_short_epoch_or_another_length():
    rate = albef_rates(epochs=5, epoch_steps=350)
    assert rate(349) == pytest.approx(1e-5 + 3 * 4.5e-6, rel=1e-12)
    assert rate(350) == pytest.approx(1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi / 5)), rel=1e-12)
    fine = albef_rates(epochs=10, epoch_steps=900, warmup_steps=100, base_learning_rate=5e-6, min_learning_rate=1e-6)
    assert [fine(step) for step in (0, 100, 101, 899)] == [1e-5] * 4  # both ends are 1e-5 there
    assert fine(9 * 900) == pytest.approx(1e-6 + 0.5 * 9e-6 * (1 + math.cos(0.9 * math.pi)), rel=1e-12)
    level = albef_rates(epochs=0.5, epoch_steps=900, warmup_steps=0)
    assert level(0) == level(449) == 1e-4


def test_one_dimensional_parameters_do_not_decay():
    model = OneRForPreTraining(tiny_config(learnable_temperature=True))
    optimizer = build_optimizer(model, RunArguments(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95), 256)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.ndim <= 1 else 0.3), name
    assert set(decay.values()) == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_all_decay_when_asked_as_moco_v3_does():
    model = OneRForPreTraining(tiny_config())
    optimizer = build_optimizer(model, RunArguments(weight_decay=0.3, decay_norm_and_bias=True), 256)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("decay_all", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(decay_all):
    model = OneRForPreTraining(tiny_config())
    OneRObjective(model, OneRObjectiveArguments(losses=["itc", "cmc"]))  # freezes both masked heads
    optimizer = build_optimizer(model, RunArguments(decay_norm_and_bias=decay_all), 256)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) < len(list(model.parameters()))
    assert sorted(grouped) == sorted(trainable)


@pytest.mark.slow
def test_no_layer_of_any_family_falls_back_to_eager_for_its_many_graphs(family):
    """torch gives up a layer after eight graphs without a word, and SIMLA's have more."""
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    model = family.build(PRETRAINING, **family.tiny.DRAWN).train()
    objective = family.objective(model)
    compile_regions([model, *(teacher.model for teacher in objective.teachers())], backend="aot_eager")
    for lengths in ([3, 5, 7, 2], [4, 12, 1, 6], [5, 5, 5, 5]):
        objective(model, family.tiny.make_batch(lengths), 0.5)[0].backward()
        objective.after_step()
    assert counters["frames"]["ok"] == counters["frames"]["total"] >= 4
    assert not counters["graph_break"] and not any("limit" in name for name in counters["unimplemented"])
    graphs = counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert graphs <= GRAPHS_PER_LAYER
    assert family.name != "simla" or graphs > 8
