"""SIMLA's training step with official weights, inputs and draws: losses, gradients, teacher and queues of the oracle.

In fp64 all of it agrees to rounding, which shows that what is left in fp32 is rounding too: `simla_bridge.TOLERANCES`.
"""

import pytest
import torch
from official_networks import trained
from official_simla import pretraining_step
from simla_bridge import (
    check_step,
    model_of,
    official,
    official_batch,
    our_name,
    ours,
    problem,
    sizes_of,
)
from tiny_simla import OFFICIAL_DEPTH, simla_batch

from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments

READINGS = {"hard": (0.0, "vocabulary"), "soft": (0.4, "vocabulary"), "soft over places": (0.4, "sequence")}


@pytest.fixture(params=READINGS.values(), ids=READINGS.keys())
def reading(request) -> tuple[float, str]:
    """alpha, and the axis of MLM's soft term."""
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_step_of_twelve_layers(reading, dtype, record):
    """The depth at which the official code takes attention: five losses, every gradient, teacher and queues."""
    alpha, axis = reading
    config, weights, batch = problem([3, 7, 5], dtype, **OFFICIAL_DEPTH)
    student, objective = ours(config, weights, alpha, mlm_soft_axis=axis)
    check_step(student, objective, official(weights), batch, alpha, record, axis)


@pytest.mark.parametrize("lengths", [[7, 4], [5, 5, 2, 9], [6, 1, 8, 2, 12]], ids=len)
def test_step_of_several_batches(lengths, reading, record):
    alpha, axis = reading
    config, weights, batch = problem(lengths, torch.float64)
    student, objective = ours(config, weights, alpha, mlm_soft_axis=axis)
    check_step(student, objective, official(weights), batch, alpha, record, axis)


SHAPES = {
    "other heads": {"num_attention_heads": 2, "text_attention_heads": 8},
    "narrow text": {"text_intermediate_size": 48, "num_hidden_layers": 1},
    "wide": {"hidden_size": 48, "projection_dim": 20, "num_visual_codes": 60},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_step_of_several_shapes(shape, record):
    config, weights, batch = problem([6, 2, 9], torch.float64, **shape)
    student, objective = ours(config, weights, 0.4, mlm_soft_axis="sequence")
    check_step(student, objective, official(weights), batch, 0.4, record)


@pytest.mark.parametrize("temperature", [0.0004, 0.9])
def test_temperature_is_held_before_anything_else(temperature, record):
    """Out of its range it is moved to the bound, from where its gradient is taken."""
    config, weights, batch = problem([6, 2, 9], torch.float64)
    weights["temp"].fill_(temperature)
    student, objective = ours(config, weights, 0.4, mlm_soft_axis="sequence")
    step = check_step(student, objective, official(weights), batch, 0.4, record)
    assert student.temperature.item() == pytest.approx(0.001 if temperature < 0.1 else 0.5)
    assert student.temperature.item() == pytest.approx(step.after["temp"].item(), abs=1e-12)
    assert student.temperature.grad.abs().item() > 1e-3


def test_recorded_keywords_are_taken(record):
    config, weights, batch = problem([6, 2, 9], torch.float64, voted=False)
    student, objective = ours(config, weights, 0.4, mlm_soft_axis="sequence")
    step = check_step(student, objective, official(weights), batch, 0.4, record)
    assert torch.equal(step.keyword_targets, batch["keyword_targets"])


def test_keywords_of_short_texts():
    """
    The official code needs five places in the longest text of a batch and fails below; here all places are keywords,
    padding too, as it is with the code where a caption has fewer words than the vote has winners.
    """
    config, weights, batch = problem([3, 2])
    with pytest.raises(RuntimeError, match="out of range"):
        pretraining_step(official(weights), official_batch(batch), sizes_of(config), 0.4)
    _, objective = ours(config, weights, 0.4)
    student = objective.student
    with torch.no_grad():
        output = student(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")},
            passes=("contrast",),
        )
        targets = objective._keywords(output, batch, {})
    words = batch["input_ids"][:, 1:]
    for row in range(2):
        assert set(targets[row].nonzero().flatten().tolist()) == set(words[row].tolist())
    loss, parts, kept = objective(student, batch, 1.0)
    assert loss.isfinite() and parts["psl"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_three_steps_go_the_same_way(dtype, record):
    """AdamW in between. Five rows do not divide the twelve places of a queue, which is written over its end."""
    config, weights, _ = problem([4] * 5, dtype)
    student, objective = ours(config, weights, 0.4, mlm_soft_axis="sequence")
    weights = official(weights)
    names = trained(weights)
    # a bias of keys has no gradient but rounding, of which AdamW makes a step unless its eps is larger
    optimisers = [
        torch.optim.AdamW(parameters, lr=2e-3, eps=1e-4, weight_decay=0.02)
        for parameters in ([weights[name] for name in names], [student.get_parameter(our_name(n)) for n in names])
    ]
    pointers = []
    for number, lengths in enumerate([[5, 3, 7, 2, 6], [4, 4, 9, 8, 1], [6, 7, 5, 8, 4]]):
        for optimiser in optimisers:
            optimiser.zero_grad()
        batch = simla_batch(lengths, seed=number, dtype=dtype)
        step = check_step(student, objective, weights, batch, 0.4, record)
        for optimiser in optimisers:
            optimiser.step()
        weights.update(step.after, temp=weights["temp"])
        pointers.append(int(objective.queue.pointer))
    assert pointers == [5, 10, 3]
    moved = max((student.get_parameter(our_name(n)) - weights[n]).abs().max().item() for n in names)
    record("weights", moved)
    assert moved < (5e-5 if dtype == torch.float32 else 1e-12)


def test_negatives_are_weighed_as_in_the_official_code(monkeypatch):
    """Student's embeddings against the teacher's of the batch, softmax over the batch, own pair without weight."""
    config, weights, batch = problem([6, 2, 9, 4], torch.float64)
    del batch["negative_images"], batch["negative_texts"]
    student, objective = ours(config, weights, 0.4)
    asked = []

    def first_allowed(odds, allowed):
        asked.append(odds.masked_fill(~allowed, 0.0))
        return allowed.long().argmax(1), allowed.any(1)

    monkeypatch.setattr("oner.training.objectives.momentum.draw_negatives", first_allowed)
    objective(student, batch, 1.0)
    replay = {**official_batch(batch), "negative_images": [1, 0, 0, 0], "negative_texts": [1, 0, 0, 0]}
    step = pretraining_step(official(weights), replay, sizes_of(config), 0.4)
    to_images, to_texts = (step.extras[name] for name in ("odds_of_images", "odds_of_texts"))
    torch.testing.assert_close(asked[0], to_images, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(asked[1], to_texts, atol=1e-12, rtol=1e-9)


def test_no_negative_is_of_the_own_id(monkeypatch):
    """As in the official fine-tuning; its pre-training knows no ids, which is every row having its own."""
    config, weights, batch = problem([6, 2, 9, 4])
    del batch["negative_images"], batch["negative_texts"]
    batch["ids"] = torch.tensor([8, 3, 8, 3])
    student, objective = ours(config, weights, 0.4)
    asked = []

    def first_allowed(odds, allowed):
        asked.append(allowed)
        return allowed.long().argmax(1), allowed.any(1)

    monkeypatch.setattr("oner.training.objectives.momentum.draw_negatives", first_allowed)
    objective(student, batch, 1.0)
    strangers = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]] * 2, dtype=torch.bool)
    assert all(torch.equal(allowed, strangers) for allowed in asked) and len(asked) == 2


def test_alpha_rises_as_in_the_official_loop():
    """0.4 min(1, i / n) in the first of thirty epochs of n steps, then 0.4."""
    config, weights, _ = problem([3, 4])
    objective = SimlaObjective(model_of(config, weights), SimlaObjectiveArguments(queue_size=4))
    n = 50
    for epoch, i in ((0, 0), (0, 1), (0, 25), (0, 49), (1, 0), (29, 49)):
        theirs = 0.4 * min(1, i / n) if epoch == 0 else 0.4
        assert objective.alpha((epoch * n + i) / (30 * n)) == pytest.approx(theirs)


def test_a_wrong_reading_is_seen(record):
    """The comparison can fail: the soft term over the other axis is another loss."""
    config, weights, batch = problem([6, 2, 9], torch.float64)
    student, objective = ours(config, weights, 0.4, mlm_soft_axis="vocabulary")
    with pytest.raises(AssertionError, match="mlm"):
        check_step(student, objective, official(weights), batch, 0.4, record, "sequence")
