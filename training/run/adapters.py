"""LoRA (Hu et al., 2021): trains small matrices beside the frozen weights of a tower, added and merged by PEFT."""

import copy

from torch import nn
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """
    Adds adapters of `rank` to every linear layer of the tower, in place, and freezes the tower. Heads outside it are
    trained in full, since a task initialises them at random. The scale is 1, as in the paper if alpha is the rank.

    Args:
        model: A model with loaded weights.

    Raises:
        ImportError: peft is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft, which is not installed: pip install 'oner[lora]'") from error
    names = {}
    for name, part in model.named_modules(remove_duplicate=False):
        names.setdefault(part, []).append(name)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    peft.inject_adapter_in_model(config, model.base_model)

    # a layer that is used under several names gets its adapter under one
    for name, *others in names.values():
        for other in others:
            model.set_submodule(other, model.get_submodule(name))


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the adapters merged into the frozen weights; the model itself if it has no adapters."""
    adapted = [name for name, part in model.named_modules(remove_duplicate=False) if hasattr(part, "lora_A")]
    if not adapted:
        return model
    merged = copy.deepcopy(model)
    for name in adapted:
        layer = merged.get_submodule(name)
        if not layer.merged:
            layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    return merged.requires_grad_(True)


def trained(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
