"""SIMLA's and ALBEF's retrieval fine-tuning step: contrast with several positives of an id, and matching."""

import pytest
import torch
from official_networks import Weights, trained
from official_simla import retrieval_step
from simla_bridge import (
    TOLERANCES,
    check_state,
    close,
    official,
    official_batch,
    ours,
    problem,
    sizes_of,
    worst_gradient,
)

# of six rows, three show one picture and two another; the queue remembers two of the ids
IDS = torch.tensor([70, 70, 31, 70, 31, 5])
LENGTHS = [5, 3, 7, 2, 6, 4]
PRETRAINING_ONLY = ("text_encoder.cls.", "mim_head.", "concept_head.", "visual_encoder.mask_token")


def remembered() -> torch.Tensor:
    ids = torch.full((16,), -100)
    ids[[2, 9, 10]] = torch.tensor([31, 5, 31])
    return ids


def retrieval_weights(weights: Weights) -> Weights:
    """The names of models/simla/retrieval.py, whose text encoder has no head of words and no `bert.` before it."""
    return {
        name.replace(".bert.", "."): value for name, value in weights.items() if not name.startswith(PRETRAINING_ONLY)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("keep_ids", [False, True], ids=["simla", "albef"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_retrieval_step(alpha, keep_ids, dtype, record):
    near, steep, rounding, state = TOLERANCES[dtype]
    config, weights, batch = problem(LENGTHS, dtype, queue=16)
    weights["queue_ptr"].fill_(13)
    batch["ids"] = IDS
    batch["negative_images"] = torch.tensor([2, 5, 0, 4, 1, 3])
    batch["negative_texts"] = torch.tensor([5, 2, 1, 2, 3, 0])
    id_queue = remembered() if keep_ids else torch.full((16,), -100)
    student, objective = ours(
        config, weights, alpha, id_queue, losses=["itc", "itm"], match_ids=True, enqueue_ids=keep_ids
    )
    weights = official(weights)
    step = retrieval_step(
        retrieval_weights(weights),
        {**official_batch(batch), "image_ids": IDS},
        sizes_of(config, text="text_encoder"),
        alpha,
        id_queue,
        keep_ids,
    )
    step.total.backward()
    loss, parts, kept = objective(student, batch, 1.0)
    loss.backward()
    objective.after_step(kept=kept)
    assert parts.keys() == step.losses.keys()
    for name, theirs in step.losses.items():
        record(name, abs(parts[name].item() - theirs.item()))
        close(parts[name], theirs.detach(), near, near, name)
    assert {name for name in trained(weights) if weights[name].grad is None} >= {"mim_head.weight"}
    error, name = worst_gradient(student, weights, rounding)
    record("gradient", error)
    assert error <= steep, f"the gradient of {name} differs by {error} of its largest"
    # the teacher of pretraining's class averages its other heads too
    after = {name.replace("text_encoder_m.", "text_encoder_m.bert."): value for name, value in step.after.items()}
    teacher, queue = check_state(objective, weights, after, state, but=PRETRAINING_ONLY)
    record("teacher", teacher), record("queue", queue)
    assert objective.queue.ids.tolist() == step.after["idx_queue"].tolist()


def test_ids_of_the_queue_count():
    """Keys of the same id in the queue are positives too: forgetting them is another loss."""
    config, weights, batch = problem(LENGTHS, torch.float64, queue=16)
    batch["ids"] = IDS
    losses = []
    for ids in (remembered(), torch.full((16,), -100)):
        student, objective = ours(config, weights, 0.0, ids, losses=["itc"], match_ids=True)
        losses.append(objective(student, batch, 1.0)[0].item())
    assert abs(losses[0] - losses[1]) > 0.01
