"""OneR's loss the slow way, for any numerics test: fp64, one stream at a time, one pair of rows at a time, no packing.

It shares with the package only the tower, called on one kind of input at a time, and the heads. Autograd gives its
gradient. B rows, P embedding width.
"""

import torch
from tiny_oner import joint_batch, naive_layer, randomised, text_of, tiny_config
from torch import nn

from oner import OneRForPreTraining
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments

FIRST_WORD = 17  # after [CLS] and sixteen patches


def uneven_batch(rows: int, seed: int, repeat_ids: bool) -> dict[str, torch.Tensor]:
    """Captions of 0 to 6 words, a random third of them masked, 0 to 9 masked patches a row, 6 kept. fp64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (rows,), generator=generator).tolist()
    batch = joint_batch([*lengths[1:], 6], seed=seed, dtype=torch.float64)
    chosen = torch.rand(len(batch["text_index"]), generator=generator) < 0.35
    batch["mlm_index"] = chosen.nonzero().flatten()
    words = batch["input_ids"][:, FIRST_WORD:].flatten()
    masked = words.clone()
    masked[batch["text_index"][chosen]] = 4
    batch["masked_input_ids"] = batch["input_ids"].clone()
    batch["masked_input_ids"][:, FIRST_WORD:] = masked.view(rows, -1)
    batch["mlm_labels"] = words[batch["text_index"][chosen]]
    numbers = torch.randint(0, 10, (rows, 1), generator=generator)
    batch["bool_masked_pos"] = torch.rand(rows, 16, generator=generator).argsort(1) < numbers
    batch["ids"] = (
        torch.randint(0, max(2, rows // 2), (rows,), generator=generator) if repeat_ids else 7 * torch.arange(rows)
    )
    batch["rows"] = torch.arange(rows)
    batch["kept_patches"] = torch.rand(rows, 16, generator=generator).argsort(1)[:, :6].sort(1).values
    return batch


def build_pair(
    arguments: dict, dtype: torch.dtype = torch.float64, **config
) -> tuple[OneRForPreTraining, OneRObjective]:
    """A student some steps away from its teacher, both in `dtype`; LayerNorm and a linear stem unless told."""
    torch.manual_seed(0)
    config = {"head_norm": "layer", "stem": "linear", **config}
    student = randomised(OneRForPreTraining(tiny_config(**config))).train()
    objective = OneRObjective(student, OneRObjectiveArguments(**arguments))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    student.to(dtype)
    if objective.teacher is not None:
        objective.teacher.model.to(dtype)
    return student, objective


def naive_loss(student: nn.Module, objective: OneRObjective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a whole batch from the paper's equations; every mean is over the whole batch. -> 0-dim fp64."""
    arguments = objective.arguments
    # nothing is masked that no loss would predict
    if "mlm" not in objective.weights:
        batch = {**batch, "masked_input_ids": batch["input_ids"]}
    if "mim" not in objective.weights:
        batch = {**batch, "bool_masked_pos": torch.zeros_like(batch["bool_masked_pos"])}
    keep = arguments.image_keep != 1
    masked = {
        kind: _states(student, batch, kind, True, keep and "mim" not in objective.weights)
        for kind in ("image", "text", "image_text")
    }
    parts = {}
    if objective.contrasts:
        online = masked
        if not arguments.contrast_masked:
            online = {kind: _states(student, batch, kind, False, keep) for kind in masked}
        network = student if objective.teacher is None else objective.teacher.model
        with torch.set_grad_enabled(arguments.gather_gradient):
            kept_keys = keep and arguments.keep_in_keys
            clean = {kind: _states(network, batch, kind, False, kept_keys)[:, 0] for kind in masked}
            clean["mix"] = (clean["image"] + clean["text"]) / 2
            keys = {kind: network.oner.projector(state) for kind, state in clean.items()}
        online = {kind: states[:, 0] for kind, states in online.items()}
        online["mix"] = (online["image"] + online["text"]) / 2
        queries = {kind: student.predictor(student.oner.projector(state)) for kind, state in online.items()}
        ids = batch["ids"].tolist() if arguments.match_ids else list(range(len(batch["ids"])))
        learnt = student.config.learnable_temperature
        temperature = (-student.logit_scale).exp() if learnt else student.config.temperature
        pairs = {
            "itc": [("image", "text"), ("text", "image")],
            "xmc": [("mix", "mix")],
            "cmc": [("image_text", "mix"), ("mix", "image_text")],
        }
        for name in objective.contrasts:
            # the whole embedding, then its first coordinates alone
            for part, dim in [(name, None), *((f"{name}@{dim}", dim) for dim in arguments.matryoshka_dims)]:
                losses = [
                    _contrast(queries[query][:, :dim], keys[key][:, :dim], temperature, ids)
                    for query, key in pairs[name]
                ]
                parts[part] = sum(losses) / len(losses)
                if arguments.scale_by_temperature:
                    parts[part] = parts[part] * 2 * temperature
    if "mlm" in objective.weights:
        parts["mlm"] = (
            _words(student, masked["text"], 1, batch) + _words(student, masked["image_text"], 17, batch)
        ) / 2
    if "mim" in objective.weights:
        parts["mim"] = (_pixels(student, masked["image"], batch) + _pixels(student, masked["image_text"], batch)) / 2
    return sum(objective.weights[name] * part for name, part in parts.items()).squeeze()


def _states(model: nn.Module, batch: dict, kind: str, masked: bool, kept: bool = False) -> torch.Tensor:
    """One stream from one call of the tower, or with only the kept patches in sight of each other. -> (B, L, D)"""
    ids = "masked_input_ids" if masked else "input_ids"
    inputs = text_of(batch, ids) if kind == "text" else {"pixel_values": batch["pixel_values"]}
    if kind == "image_text":
        inputs = {"input_ids": batch[ids], "attention_mask": batch["attention_mask"], **inputs}
    if masked and kind != "text":
        inputs["bool_masked_pos"] = batch["bool_masked_pos"]
    if kept and kind != "text":
        return _kept_states(model, batch["kept_patches"], inputs)
    return model.oner(**inputs).last_hidden_state


def _kept_states(model: nn.Module, kept: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The tower layer by layer over whole sequences, in which no place sees a patch that is not kept. -> (B, L, D)"""
    ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    masks = {name: inputs[name] for name in ("bool_masked_pos",) if name in inputs}
    states, _ = model.oner.embeddings(ids, attention_mask, inputs["pixel_values"], **masks)
    seen = torch.ones(states.shape[:2], dtype=torch.bool) if ids is None else attention_mask != 0
    for row, places in enumerate(kept.tolist()):
        for patch in range(16):
            seen[row, 1 + patch] = patch in places
    for layer in model.oner.layers:
        states = naive_layer(layer, states, states, seen)
    return model.oner.norm(states)


def _contrast(queries: torch.Tensor, keys: torch.Tensor, temperature, ids: list[int]) -> torch.Tensor:
    total = 0
    for i, query in enumerate(queries):
        cosines = [(query @ key) / query.norm() / key.norm() / temperature for key in keys]
        log_sum = sum(cosine.exp() for cosine in cosines).log()
        positives = [cosine for cosine, other in zip(cosines, ids, strict=True) if other == ids[i]]
        total = total + sum(log_sum - cosine for cosine in positives) / len(positives)
    return total / len(queries)


def _words(student: nn.Module, states: torch.Tensor, first: int, batch: dict) -> torch.Tensor:
    slots = batch["text_index"][batch["mlm_index"]].tolist()
    width = batch["input_ids"].shape[1] - FIRST_WORD
    total = states.sum() * 0
    for slot, label in zip(slots, batch["mlm_labels"].tolist(), strict=True):
        logits = student.lm_head(states[slot // width, first + slot % width])
        total = total + logits.exp().sum().log() - logits[label]
    return total / max(1, len(slots))


def _pixels(student: nn.Module, states: torch.Tensor, batch: dict) -> torch.Tensor:
    total, places = states.sum() * 0, batch["bool_masked_pos"].nonzero().tolist()
    for row, patch in places:
        y, x = patch // 4 * 4, patch % 4 * 4
        target = batch["pixel_values"][row, :, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        total = total + (student.pixel_head(states[row, 1 + patch]) - target).square().mean()
    return total / max(1, len(places))


# what a loss may be made of; each is tried with four sizes of a process's share, kept patches with one
OPTIONS = [
    {"losses": ["itc", "cmc", "mlm", "mim"]},
    {"losses": ["itc", "xmc", "cmc", "mlm", "mim"], "match_ids": True},
    {
        "losses": ["itc", "mlm"],
        "match_ids": True,
        "scale_by_temperature": True,
        "learnable_temperature": True,
        "matryoshka_dims": [3],
        "matryoshka_weights": [0.7],
    },
    {
        "losses": ["itc", "xmc"],
        "match_ids": True,
        "teacher": False,
        "gather_gradient": True,
        "matryoshka_dims": [2, 5],
    },
    {"losses": ["itc", "cmc", "mim"], "contrast_masked": False},
    {"losses": ["cmc", "mlm"], "teacher": False},
    {"losses": ["mlm", "mim"]},
    {"losses": ["xmc", "mlm"], "loss_weights": {"xmc": 3.0, "mlm": 0.5}, "learnable_temperature": True},
    {"losses": ["itc", "cmc", "mlm"], "image_keep": 0.4},
    {"losses": ["itc", "cmc", "mim"], "contrast_masked": False, "image_keep": 0.4, "keep_in_keys": True},
]
SHAPES = [
    (options, share)
    for options, arguments in enumerate(OPTIONS)
    for share in ((3,) if "image_keep" in arguments else (1, 2, 3, 5))
]


def build_shape(options: int, dtype: torch.dtype = torch.float64) -> tuple[OneRForPreTraining, OneRObjective]:
    arguments = dict(OPTIONS[options])
    learnable = arguments.pop("learnable_temperature", False)
    return build_pair(arguments, dtype, learnable_temperature=learnable)


def batch_of_shape(options: int, share: int) -> dict[str, torch.Tensor]:
    """Four shares."""
    return uneven_batch(4 * share, seed=10 * options + share, repeat_ids=OPTIONS[options].get("match_ids", False))


def gradients(student: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def oracle(options: int, share: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student, objective = build_shape(options)
    loss = naive_loss(student, objective, batch_of_shape(options, share))
    loss.backward()
    return loss.detach(), gradients(student)


def assert_same_step(
    got: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
    tolerance: float = 1e-10,
) -> None:
    """Loss, gradient as a whole, and each parameter's, to a share of their size."""
    loss, found = got
    wanted, slopes = expected
    assert abs(loss.double() - wanted).item() <= tolerance * abs(wanted).item()
    norm = torch.stack([slope.norm() for slope in slopes.values()]).norm()
    assert norm > 1e-2
    off = {name: (found[name].double() - slope).norm() for name, slope in slopes.items() if name in found}
    # none on one side is zero on the other: a batch without masked words still reaches the words' head
    alone = [(found if name in found else slopes)[name] for name in found.keys() ^ slopes.keys()]
    assert all(slope.abs().max() == 0 for slope in alone)
    assert torch.stack(list(off.values())).norm() <= tolerance * norm
    assert len(off) > 20
    for name, error in off.items():
        # some have no slope but rounding: the bias of the attention's keys, which softmax ignores
        bound = tolerance * (slopes[name].norm() + 1e-3 * norm)
        assert error <= bound, f"{name}: off by {error:.1e} of {slopes[name].norm():.1e}"
