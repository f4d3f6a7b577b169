"""A step on tensors without contents: what it computes and keeps, known before anything is allocated.

Any family's own code runs, under torch's fake tensors, so nothing here knows a formula. B pairs, N patches, W slots of
the longest text, n words, M masked words.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from .arguments import Arguments
from .flops import flop_counter
from .objective import build_objective
from .pair_loading import build_model


@dataclass(frozen=True)
class Rehearsal:
    """
    One step of one process.

    Attributes:
        pairs (`int`): Pairs of the step.
        parameters, trained, teacher (`int`): Numbers of the student, those with a gradient, and of the teachers.
        buffers (`int`): Bytes of everything in student and teachers that is no parameter.
        forward, targets, backward (`float`): Operations of the student's pass with the losses, of the targets (a
            teacher's pass), and of the backward with what it recomputes.
        activations (`int`): Bytes kept for the backward, each storage once, parameters left out.
        inputs (`int`): Bytes of the batch.
    """

    pairs: int
    parameters: int
    trained: int
    teacher: int
    buffers: int
    forward: float
    targets: float
    backward: float
    activations: int
    inputs: int

    @property
    def flops(self) -> float:
        return self.forward + self.targets + self.backward


def pair_batch(
    config: PreTrainedConfig,
    lengths: Sequence[int],
    mlm_probability: float = 0.15,
    mim_ratio: float = 0.3,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    What `PairCollator` gives for captions of these lengths, with random words and grey pictures. Shapes as there. A
    model that predicts visual codes gets random ones, (B, N) int64: no tokenizer of pictures is rehearsed.

    Raises:
        ValueError: a text longer than `max_text_length`.
    """
    if not len(lengths) or max(lengths) > config.max_text_length:
        raise ValueError(f"lengths {list(lengths)[:8]}...; expected some in [0, {config.max_text_length}]")
    rng, pairs, slots = np.random.default_rng(seed), len(lengths), max(1, *lengths)
    head = 1 + (config.image_size // config.patch_size) ** 2
    real = np.arange(slots) < np.asarray(lengths)[:, None]  # (B, W)
    ids = np.full((pairs, head + slots), config.pad_token_id, dtype=np.int64)
    ids[:, 0], ids[:, 1:head] = config.cls_token_id, config.image_token_id
    low = 1 + max(config.cls_token_id, config.mask_token_id, config.image_token_id)
    words = rng.integers(min(low, config.vocab_size - 1), config.vocab_size, int(real.sum()))
    ids[:, head:][real] = words
    places = np.sort(rng.permutation(len(words))[: round(mlm_probability * len(words))])
    order, twin, corrupted = np.argsort(rng.random((pairs, head - 1))), ids.copy(), words.copy()
    hidden = order < int(mim_ratio * (head - 1))
    corrupted[places] = config.mask_token_id
    twin[:, head:][real] = corrupted
    arrays = {
        "input_ids": ids,
        "attention_mask": np.concatenate([np.ones((pairs, head), bool), real], axis=1).astype(np.int64),
        "masked_input_ids": twin,
        "text_index": np.flatnonzero(real),
        "mlm_index": places,
        "mlm_labels": words[places],
        "bool_masked_pos": hidden,
        "mim_index": np.flatnonzero(hidden),
        "ids": np.arange(pairs),
        "rows": np.arange(pairs),
    }
    if (codes := getattr(config, "num_visual_codes", None)) is not None:
        arrays["visual_codes"] = rng.integers(codes, size=(pairs, head - 1))
    batch = {name: torch.tensor(array) for name, array in arrays.items()}
    side = config.image_size
    return {**batch, "pixel_values": torch.zeros(pairs, config.num_channels, side, side)}


def rehearse(
    arguments: Arguments, config: PreTrainedConfig, lengths: Sequence[int], precision: str = "no"
) -> Rehearsal:
    """The step of these arguments on captions of these lengths; `precision` is `no`, `bf16` or `fp16`."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    fresh = replace(arguments, model=replace(arguments.model, initial_model=None))
    if hasattr(fresh.objective, "image_tokenizer"):
        fresh = replace(fresh, objective=replace(fresh.objective, image_tokenizer=None))  # the batch brings its codes
    with torch.device("meta"):  # fake tensors cannot be copied, as a teacher copies its student
        model = build_model(fresh, config)
        objective = build_objective(fresh.model.family, model, fresh.objective)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _fake(_modules(model, objective))
        for teacher in objective.teachers():
            teacher.follow(model)
        objective.to(torch.device("cpu"))  # what it keeps beside modules: queues
        fake.allow_non_fake_inputs = False  # a tensor with contents would be one that was forgotten
        batch = pair_batch(config, lengths, arguments.data.mlm_probability, sum(arguments.data.mim_ratio) / 2)
        owned = {_storage(tensor) for module in _modules(model, objective) for tensor in _tensors(module)}
        owned |= {_storage(tensor) for tensor in batch.values()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if _storage(tensor) not in owned:
                kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        model.train()
        with flop_counter() as pass_counter, torch.autograd.graph.saved_tensors_hooks(keep, _same):
            with nullcontext() if half is None else torch.autocast("cpu", half):
                loss, _ = objective(model, batch, 0.5)
        with flop_counter() as target_counter, torch.no_grad():
            with nullcontext() if half is None else torch.autocast("cpu", half):
                objective.targets(model, batch, 0.5)
        with flop_counter() as back_counter:
            loss.backward()
    teachers = [teacher.model for teacher in objective.teachers()]
    targets = float(target_counter.get_total_flops())
    return Rehearsal(
        pairs=len(lengths),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        teacher=sum(parameter.numel() for teacher in teachers for parameter in teacher.parameters()),
        buffers=sum(b.numel() * b.element_size() for m in (model, *teachers) for b in m.buffers()),
        forward=float(pass_counter.get_total_flops()) - targets,
        targets=targets,
        backward=float(back_counter.get_total_flops()),
        activations=sum(kept.values()),
        inputs=sum(tensor.numel() * tensor.element_size() for tensor in batch.values()),
    )


def _modules(model: torch.nn.Module, objective) -> list[torch.nn.Module]:
    return [model, *(teacher.model for teacher in objective.teachers())]


def _fake(modules: list[torch.nn.Module]) -> None:
    """Parameters and buffers on meta become fake ones on the CPU, where autocast sees them; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in (part for whole in modules for part in whole.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made.setdefault(id(parameter), torch.nn.Parameter(empty, parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
