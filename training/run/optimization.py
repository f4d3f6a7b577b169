"""AdamW with two parameter groups, a cosine schedule per step (timm) or ALBEF's, compilation, and checkpointing."""

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
    """AdamW at base_learning_rate * batch_size / 256; 1-D parameters have no decay unless decay_norm_and_bias."""
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
    The learning rate as a pure function of the step, `step_update(step)`: by default linear warm-up, then half a
    cosine
    to the minimum.
    """
    if run.schedule == "albef":
        steps = 2000 if run.warmup_steps is None else run.warmup_steps
        return AlbefScheduler(
            optimizer, total_steps / epoch_steps, epoch_steps, steps, run.warmup_learning_rate, run.min_learning_rate
        )

    # leave at least one step after the warm-up
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
    The schedule in ALBEF's, TCL's and SIMLA's code. In the first epoch the rate rises from `warmup_rate` to the
    optimiser's rate in equal steps, one per 100 training steps, the first after step 100, for `warmup_steps`; then it
    stays there. Epoch e of E has lowest + (peak - lowest) (1 + cos(pi e / E)) / 2, even if the first was too short for
    the warm-up.

    Args:
        epochs (`float`): E, the length of the run.
        epoch_steps (`int`): Steps of an epoch.
        warmup_steps (`int`): ALBEF: 2000 in pretraining, 100 in fine-tuning.
        warmup_rate, lowest (`float`): Learning rates.
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
        # after the first epoch, constant within each epoch
        epoch = t // self.epoch_steps
        if epoch > 0:
            share = (1 + math.cos(math.pi * min(epoch / self.epochs, 1))) / 2
            return [self.lowest + (peak - self.lowest) * share for peak in self.base_values]
        # their code sets the rate after the update, so steps 1 to 100 have the first rate
        climbed = min(1, max(0, t - 1) // self.STAIR / self.stairs) if self.stairs else 1
        return [self.warmup_rate + (peak - self.warmup_rate) * climbed for peak in self.base_values]


# maximum number of graphs of a layer: with or without gradient, masks and states of another encoder, each for fixed
# and for dynamic sizes. SIMLA has 17; at torch's own limit of 8 the rest would silently run eagerly
GRAPHS_PER_LAYER = 32


def compile_regions(models: Iterable[PreTrainedModel], backend: str = "inductor") -> int:
    """
    Compiles each layer separately (`_no_split_modules`): equal layers share one graph, so the compilation takes the
    time of one layer at any depth. Teachers are compiled too.

    Args:
        models: Their layers are compiled in place.
        backend (`str`): torch's compiler; `aot_eager` traces in the same way without generating code.

    Returns:
        The number of compiled layers.
    """
    layers = [part for model in models for part in model.modules() if type(part).__name__ in undivided_layers(model)]
    raise_recompile_limit(GRAPHS_PER_LAYER)
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: layers keep only their inputs and are recomputed in the backward pass."""
    # transformers' newer name if it exists, since the older one warns
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
