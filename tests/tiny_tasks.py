"""Answers, inputs and outspoken weights for the tests of the heads of tasks."""

import torch
from tiny_oner import joint_batch, randomised, text_of
from tiny_simla import CLS, SEP

from oner import SimlaForVisualEntailment, SimlaForVisualQuestionAnswering, SimlaForVisualReasoning

TASKS = (SimlaForVisualQuestionAnswering, SimlaForVisualEntailment, SimlaForVisualReasoning)
ANSWERS = torch.tensor(
    [[CLS, 7, 8, SEP, 0], [CLS, 9, SEP, 0, 0], [CLS, 10, 11, 12, SEP], [CLS, 7, SEP, 0, 0], [CLS, 30, 31, SEP, 0]]
)
MASK = (ANSWERS != 0).long()


def bold(model):
    """Weights large enough that what is said depends on what is read."""
    randomised(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(4)
    return model.eval()


def inputs(lengths=(3, 5, 2), pictures=1, **options):
    """Pairs as SIMLA reads them, texts beside their pixels."""
    batch = joint_batch(list(lengths), **options)
    chosen = {**text_of(batch), "pixel_values": batch["pixel_values"]}
    if pictures == 2:
        chosen["pixel_values"] = torch.stack([chosen["pixel_values"], chosen["pixel_values"].flip(0)], 1)
    return chosen
