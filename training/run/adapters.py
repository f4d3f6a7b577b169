"""LoRA (Hu et al., 2021): small matrices learn beside the frozen weights of a tower; PEFT makes and merges them."""

import copy

from torch import nn
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """
    Puts adapters of `rank` beside every linear map of the tower, in place, and freezes the tower. Heads outside it
    learn whole: a task draws them anew. The scale is 1, as the paper has where alpha is the rank.

    Args:
        model: With all its weights in place.

    Raises:
        ImportError: peft is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters are PEFT's, which is missing: pip install 'oner[lora]'") from error
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    peft.inject_adapter_in_model(config, model.base_model)


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights are the sums of the frozen ones and their adapters; the model itself where it has none."""
    adapted = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    if not adapted:
        return model
    merged = copy.deepcopy(model)
    for name in adapted:
        layer = merged.get_submodule(name)
        layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    return merged.requires_grad_(True)


def trained(model: nn.Module) -> int:
    """How many numbers learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
