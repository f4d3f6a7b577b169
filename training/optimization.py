"""AdamW over two groups and a cosine per iteration, both timm's; which parts of a model are compiled."""

from collections.abc import Iterable

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from transformers import PreTrainedModel

from .arguments import RunArguments


def build_optimizer(model: nn.Module, run: RunArguments) -> torch.optim.AdamW:
    """AdamW at base_learning_rate * batch_size / 256; 1-D parameters without decay unless asked otherwise."""
    rate = run.base_learning_rate * run.batch_size / 256
    if run.decay_norm_and_bias:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    else:
        groups = param_groups_weight_decay(model, run.weight_decay)
    betas = (run.adam_beta1, run.adam_beta2)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=run.weight_decay, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, run: RunArguments, total_steps: int, epoch_steps: int
) -> Scheduler:
    """Linear warm-up from 0, then half a cosine to the minimum. A pure function of the step: `step_update(step)`."""
    warmup = min(round(run.warmup_epochs * epoch_steps), total_steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup,
        lr_min=run.min_learning_rate,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def compile_regions(models: Iterable[PreTrainedModel]) -> int:
    """
    `torch.compile` of each layer by itself (`_no_split_modules`): equal layers share one graph, so that it takes the
    time of one layer, whatever the depth. A teacher has as many layers as its student and wants it as much.

    Returns:
        How many layers were compiled.
    """
    layers = [part for model in models for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for layer in layers:
        layer.compile()
    return len(layers)
