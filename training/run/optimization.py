"""AdamW over two groups, and a cosine per iteration, both timm's, or ALBEF's stairs; which parts are compiled."""

import math
from collections.abc import Iterable

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from transformers import PreTrainedModel

from oner.training.private_names import raise_recompile_limit, undivided_layers

from .arguments import RunArguments


def build_optimizer(model: nn.Module, run: RunArguments, batch_size: int) -> torch.optim.AdamW:
    """AdamW at base_learning_rate * batch_size / 256; 1-D parameters without decay unless asked otherwise."""
    rate = run.base_learning_rate * batch_size / 256
    if run.decay_norm_and_bias:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    else:
        groups = param_groups_weight_decay(model, run.weight_decay)
    betas = (run.adam_beta1, run.adam_beta2)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=run.weight_decay, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, run: RunArguments, total_steps: int, epoch_steps: int
) -> Scheduler:
    """
    A pure function of the step, `step_update(step)`: by default a linear warm-up, then half a cosine to the minimum.
    """
    if run.schedule == "albef":
        steps = 2000 if run.warmup_steps is None else run.warmup_steps
        return AlbefScheduler(
            optimizer, total_steps / epoch_steps, epoch_steps, steps, run.warmup_learning_rate, run.min_learning_rate
        )

    # the warm-up leaves at least one step to fall in
    warmup = round(run.warmup_epochs * epoch_steps) if run.warmup_steps is None else run.warmup_steps
    warmup = min(warmup, total_steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup,
        lr_min=run.min_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=run.warmup_learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class AlbefScheduler(Scheduler):
    """
    The rate of ALBEF's, TCL's and SIMLA's code. In the first epoch it climbs from `warmup_rate` to the optimiser's own
    rate in even stairs, one after each 100 steps, the first after step 100, for `warmup_steps`, and stays there.
    Epoch e of E has lowest + (peak - lowest) (1 + cos(pi e / E)) / 2, also where the first was too short to warm up.

    Args:
        epochs (`float`): E, the length of the run.
        epoch_steps (`int`): Steps of an epoch.
        warmup_steps (`int`): ALBEF: 2000 to pretrain, 100 to fine-tune.
        warmup_rate, lowest (`float`): Rates.
    """

    # timm's cosine counts steps or epochs; this one counts hundreds of steps in the first epoch and epochs after it
    STAIR = 100

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        epochs: float,
        epoch_steps: int,
        warmup_steps: int,
        warmup_rate: float,
        lowest: float,
    ):
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.epochs = epochs
        self.epoch_steps = epoch_steps
        self.stairs = warmup_steps // self.STAIR
        self.warmup_rate = warmup_rate
        self.lowest = lowest

    def _get_lr(self, t: int) -> list[float]:
        # after the first epoch, level within each
        epoch = t // self.epoch_steps
        if epoch > 0:
            share = (1 + math.cos(math.pi * min(epoch / self.epochs, 1))) / 2
            return [self.lowest + (peak - self.lowest) * share for peak in self.base_values]
        # the code sets the rate after the update, so that steps 1 to 100 have the first stair's
        climbed = min(1, max(0, t - 1) // self.STAIR / self.stairs) if self.stairs else 1
        return [self.warmup_rate + (peak - self.warmup_rate) * climbed for peak in self.base_values]


# graphs that one layer may have: with or without gradient, with or without masks, states of another encoder or none,
# each for fixed sizes and for any. SIMLA has 17; at torch's own limit of 8 the rest would silently run eagerly
GRAPHS_PER_LAYER = 32


def compile_regions(models: Iterable[PreTrainedModel], backend: str = "inductor") -> int:
    """
    `torch.compile` of each layer by itself (`_no_split_modules`): equal layers share one graph, so that it takes the
    time of one layer, whatever the depth. A teacher has as many layers as its student and wants it as much.

    Args:
        models: Their layers are compiled in place.
        backend (`str`): torch's compiler; `aot_eager` traces alike and generates no code.

    Returns:
        How many layers were compiled.
    """
    layers = [part for model in models for part in model.modules() if type(part).__name__ in undivided_layers(model)]
    raise_recompile_limit(GRAPHS_PER_LAYER)
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Layers keep their inputs alone and are computed again in the backward pass: memory for one more forward."""
    # the newer name of transformers, which warns of the older
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
