"""Between SIMLA's official names, batches and steps and the project's: for the tests, apart from the converter."""

import re

import torch
from official_networks import MODULES, TIED, Sizes, Weights, random_weights, trained, twin
from official_simla import Step, pretraining_step
from tiny_simla import CLS, simla_batch, tiny_config

from oner import SimlaForPreTraining
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments

PATCHES = 16
# Losses relative and absolute; gradients of a parameter's largest, and absolute; state absolute. What is equal is seen
# in fp64. In fp32 two makes of processor and two numbers of threads leave 5e-6, 1.8e-4 and 1.2e-6: five times that.
TOLERANCES = {torch.float32: (3e-5, 1e-3, 2e-7, 1e-5), torch.float64: (1e-12, 1e-11, 0.0, 1e-12)}

RENAMED = [
    (r"^visual_encoder\.patch_embed\.proj", "simla.vision.embeddings.stem.projection"),
    (r"^visual_encoder\.pos_embed", "simla.vision.embeddings.position_embeddings"),
    (r"^visual_encoder\.(cls|mask)_token", r"simla.vision.embeddings.\1_token"),
    (r"^visual_encoder\.norm", "simla.vision.norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn", r"simla.vision.layers.\1.attention"),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp", r"simla.vision.layers.\1.feed_forward"),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"simla.vision.layers.\1.norm"),
    (r"^(vision|text)_proj\.", r"simla.\1_projection."),
    (r"^text_encoder\.cls\.predictions\.transform\.dense", "lm_head.dense"),
    (r"^text_encoder\.cls\.predictions\.transform\.LayerNorm", "lm_head.norm"),
    (r"^text_encoder\.cls\.predictions\.bias", "lm_head.decoder.bias"),
    (r"^text_encoder\.bert\.embeddings\.LayerNorm", "simla.text.embeddings.norm"),
    (r"^text_encoder\.bert\.embeddings\.(\w+)", r"simla.text.embeddings.\1"),
    (r"^text_encoder\.bert\.encoder\.layer\.", "simla.text.layers."),
    (r"crossattention\.self", "cross_attention"),
    (r"crossattention\.output\.dense", "cross_attention.proj"),
    (r"crossattention\.output\.LayerNorm", "cross_norm"),
    (r"attention\.self", "attention"),
    (r"attention\.output\.dense", "attention.proj"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "feed_forward.fc1"),
    (r"output\.dense", "feed_forward.fc2"),
    (r"output\.LayerNorm", "output_norm"),
    (r"^temp$", "temperature"),
]


def our_name(official: str) -> str:
    for pattern, ours in RENAMED:
        official = re.sub(pattern, ours, official)
    return official


def our_state(weights: Weights, teacher: bool = False) -> Weights:
    """The state of the student, or of the teacher, which has neither matching head nor temperature, in our names."""
    state = {}
    for name, value in weights.items():
        if name in TIED or name.split(".")[0] not in (*MODULES, "itm_head", "temp"):
            continue
        if teacher and twin(name) not in weights:
            continue
        state[our_name(name)] = weights[twin(name)].detach() if teacher else value.detach().reshape(value.shape or 1)
    words = state.get("simla.text.embeddings.word_embeddings.weight")
    if "lm_head.decoder.bias" in state:
        state["lm_head.decoder.weight"] = words
    return state


def official_batch(batch: Weights) -> Weights:
    """A batch as the official step takes it: texts [CLS] w1 ... wT, labels of -100 elsewhere."""
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    words = labels[:, 1:].flatten()
    words[batch["text_index"][batch["mlm_index"]]] = batch["mlm_labels"]
    labels[:, 1:] = words.view(len(ids), -1)
    given = ("negative_images", "negative_texts", "keyword_targets")
    return {
        "pixels": batch["pixel_values"],
        "ids": ids,
        "mask": batch["attention_mask"],
        "masked_ids": batch["masked_input_ids"],
        "labels": labels,
        "masked_patches": batch["bool_masked_pos"],
        "codes": batch.get("visual_codes"),
        **{name: batch[name] for name in given if name in batch},
    }


def weights_of(config, dtype: torch.dtype = torch.float32, **fields) -> dict[str, torch.Tensor]:
    return random_weights(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_text_layers,
        config.vocab_size,
        config.image_size,
        config.patch_size,
        projection=config.projection_dim,
        codes=config.num_visual_codes,
        positions=config.max_position_embeddings,
        text_inner=config.text_intermediate_size,
        dtype=dtype,
        **fields,
    )


def sizes_of(config, **fields) -> Sizes:
    return Sizes(config.num_attention_heads, config.text_attention_heads, config.patch_size, cls_id=CLS, **fields)


def model_of(config, weights: dict[str, torch.Tensor], implementation: str = "sdpa") -> SimlaForPreTraining:
    model = SimlaForPreTraining._from_config(config, attn_implementation=implementation).to(weights["temp"].dtype)
    model.load_state_dict(our_state(weights))
    return model.eval()


def problem(lengths: list[int], dtype=torch.float32, voted: bool = True, queue: int = 12, **fields):
    """A configuration, weights of it, and a batch whose keywords are voted on or given."""
    config = tiny_config(**fields)
    weights = weights_of(config, dtype, seed=len(lengths), queue=queue)
    batch = simla_batch(lengths, seed=len(lengths), dtype=dtype)
    if voted:
        del batch["keyword_targets"]
    return config, weights, batch


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float, rtol: float, name: str = "value") -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")


def official(weights: Weights) -> Weights:
    """Leaves of their own for every trained weight, tied ones still one."""
    weights = {name: value.clone() for name, value in weights.items()}
    for tied, owner in TIED.items():
        weights[tied] = weights[owner]
    for name in trained(weights):
        weights[name].requires_grad_()
    return weights


def ours(
    config, weights: Weights, alpha: float, id_queue: torch.Tensor | None = None, **arguments
) -> tuple[SimlaForPreTraining, SimlaObjective]:
    """Student, teacher and queues from official weights, at the end of the ramp of alpha."""
    dtype = weights["temp"].dtype
    student = model_of(config, weights).train()
    size = weights["image_queue"].shape[1]
    objective = SimlaObjective(
        student, SimlaObjectiveArguments(distillation=alpha, distillation_ramp=0.0, queue_size=size, **arguments)
    )
    objective.teacher.model.to(dtype)
    state = {f"teacher.{name}": value for name, value in our_state(weights, teacher=True).items()}
    state |= {f"queue.{name}": weights[f"{name}_queue"].T for name in ("image", "text")}
    state["queue.ids"] = torch.full((size,), -100) if id_queue is None else id_queue
    state["queue.pointer"] = weights["queue_ptr"]
    objective.load_state_dict(state)
    return student, objective


def worst_gradient(student: SimlaForPreTraining, weights: Weights, rounding: float = 0.0) -> tuple[float, str]:
    """
    By parameter, the largest difference, less `rounding`, over the largest gradient; the worst, and its name. A bias
    of keys has no gradient but rounding, for it moves all scores of a query alike, and what queries' biases get nearly
    cancels: these are measured on their weights'. Parameters that the oracle's loss does not reach must have none.
    """
    worst = (0.0, "")
    for name in trained(weights):
        mine, theirs = student.get_parameter(our_name(name)).grad, weights[name].grad
        assert (mine is None) == (theirs is None), f"{name} has a gradient on one side only"
        if theirs is not None:
            error = (mine.reshape(theirs.shape) - theirs).abs().max().item()
            scale = name.replace("key.bias", "key.weight").replace("query.bias", "query.weight")
            largest = weights[scale].grad.abs().max().item()
            assert largest > 0, f"{name} is not reached"
            worst = max(worst, (max(0.0, error - rounding) / largest, name))
    return worst


def check_state(
    objective: SimlaObjective, weights: Weights, after: Weights, tolerance: float, but: tuple[str, ...] = ()
) -> tuple[float, float]:
    """The teacher's and the queues' largest differences after the step; `but` official weights that it left alone."""
    mine = objective.teacher.model.state_dict()
    theirs = our_state({**weights, **after}, teacher=True)
    assert mine.keys() == theirs.keys()
    left = {our_name(name) for name in weights if name.startswith(but)} if but else set()
    left |= {"lm_head.decoder.weight"} if left else set()
    teacher = max((mine[name] - theirs[name]).abs().max().item() for name in theirs.keys() - left)
    rows = objective.queue.rows
    queue = max((rows[name] - after[f"{name}_queue"].T).abs().max().item() for name in rows)
    assert teacher <= tolerance and queue <= tolerance, (teacher, queue)
    assert objective.queue.pointer.tolist() == after["queue_ptr"].tolist()
    return teacher, queue


def check_step(
    student: SimlaForPreTraining,
    objective: SimlaObjective,
    weights: Weights,
    batch: dict,
    alpha: float,
    record,
    mlm_axis: str = "sequence",
) -> Step:
    """One step of both from the same state, compared; gradients are left in place, and both have moved on."""
    near, steep, rounding, state = TOLERANCES[weights["temp"].dtype]
    step = pretraining_step(weights, official_batch(batch), sizes_of(student.config), alpha, mlm_axis)
    step.total.backward()
    loss, parts, kept = objective(student, batch, 1.0)
    loss.backward()
    objective.after_step(kept=kept)
    assert parts.keys() == step.losses.keys()
    for name, theirs in step.losses.items():
        record(name, abs(parts[name].item() - theirs.item()))
        close(parts[name], theirs.detach(), near, near, name)
    close(loss, step.total, near, near, "total")
    error, name = worst_gradient(student, weights, rounding)
    record("gradient", error)
    assert error <= steep, f"the gradient of {name} differs by {error} of its largest"
    teacher, queue = check_state(objective, weights, step.after, state)
    record("teacher", teacher), record("queue", queue)
    return step
