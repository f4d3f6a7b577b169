"""ALBEF's step by CODIS without a codebook, from a converted official file: losses, gradients, teacher and queues."""

import official_albef
import pytest
import torch
from official_networks import trained
from simla_bridge import TOLERANCES, close, official, official_batch, sizes_of
from tiny_codis import tiny_config
from tiny_simla import CLS, simla_batch

from oner.training.conversion.checkpoints import from_official, to_official
from oner.training.conversion.families import OFFICIAL
from oner.training.objectives.codis import CodisObjective, CodisObjectiveArguments

LOSSES = ["itc", "itm", "mlm"]
# what no shape of an official file tells
TOLD = ("num_attention_heads", "hidden_dropout", "text_attention_dropout", "max_text_length", "cls_token_id",
        "image_token_id", "sep_token_id", "mask_token_id")  # fmt: skip


def albef_problem(lengths: list[int], dtype=torch.float32, queue: int = 12, **fields):
    """A configuration, official weights of it, and a batch."""
    config = tiny_config(num_codes=0, **fields)
    weights = official_albef.albef_weights(
        config.num_text_layers,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_text_layers + config.num_fusion_layers,
        config.vocab_size,
        config.image_size,
        config.patch_size,
        projection=config.projection_dim,
        queue=queue,
        positions=config.max_position_embeddings,
        text_inner=config.text_intermediate_size,
        seed=len(lengths),
        dtype=dtype,
    )
    return config, weights, simla_batch(lengths, seed=len(lengths), dtype=dtype, codes=False)


def converted(config, weights, alpha: float, **arguments):
    """Student, teacher and queues by the converter, at the end of the ramp of alpha."""
    done = from_official(weights, "codis", **{name: getattr(config, name) for name in TOLD})
    dtype = weights["temp"].dtype
    student = done.model_class(done.config).to(dtype)
    student.load_state_dict(done.weights)
    size = weights["image_queue"].shape[1]
    told = {"losses": LOSSES, "distillation": alpha, "distillation_ramp": 0.0, "queue_size": size, **arguments}
    objective = CodisObjective(student.train(), CodisObjectiveArguments(**told))
    objective.teacher.model.to(dtype)
    objective.load_state_dict(done.objective)
    return student, objective


def check(student, objective, weights, batch, alpha: float, record):
    """One step of both from the same state; parameters that the oracle's loss does not reach must have no gradient."""
    near, steep, rounding, moved = TOLERANCES[weights["temp"].dtype]
    leaves = official(weights)
    step = official_albef.pretraining_step(leaves, official_batch(batch), sizes_of(student.config), alpha)
    step.total.backward()
    loss, parts, kept = objective(student, batch, 1.0)
    loss.backward()
    objective.after_step(kept=kept)
    assert set(parts) == set(LOSSES)
    for name, theirs in step.losses.items():
        record(name, abs(parts[name].item() - theirs.item()))
        close(parts[name], theirs.detach(), near, near, name)

    # gradients, each against the largest of its parameter; of biases of keys and queries, of their weights'
    names = OFFICIAL["codis"].names()
    reached = {name: leaves[name].grad for name in trained(leaves) if name != official_albef.TYPES}
    for name, theirs in reached.items():
        mine = student.get_parameter(names(name.replace("predictions.bias", "predictions.decoder.bias"))).grad
        scale = reached[name.replace("key.bias", "key.weight").replace("query.bias", "query.weight")].abs().max()
        error = ((mine.reshape(theirs.shape) - theirs).abs().max() - rounding).clamp_min(0) / scale
        record("gradient", error.item())
        assert error <= steep, f"the gradient of {name} differs by {error} of its largest"
    assert len(reached) == sum(parameter.grad is not None for parameter in student.parameters())

    # the teacher, whose token types stand in its positions here, and the queues
    after, _ = to_official(student.state_dict(), "codis", objective.state_dict())
    types = step.after.pop("text_encoder_m.bert.embeddings.token_type_embeddings.weight")
    step.after["text_encoder_m.bert.embeddings.position_embeddings.weight"] += types[0]
    for name, theirs in step.after.items():
        error = (after[name] - theirs).abs().max().item()
        record("state", error)
        assert error <= moved, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_official_step(alpha, dtype, record):
    config, weights, batch = albef_problem([3, 7, 5], dtype)
    student, objective = converted(config, weights, alpha)
    check(student, objective, weights, batch, alpha, record)


SHAPES = {
    "more above": {"num_text_layers": 1, "num_fusion_layers": 3, "grounding_layer": 3},
    "other heads": {"num_attention_heads": 2},
    "narrow text": {"text_intermediate_size": 48, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_official_step_of_several_shapes(shape, record):
    config, weights, batch = albef_problem([5, 5, 2, 9], torch.float64, **shape)
    student, objective = converted(config, weights, 0.4)
    check(student, objective, weights, batch, 0.4, record)


def test_a_wrong_reading_is_seen(record):
    """The comparison can fail: without soft targets of masked words it is another loss."""
    config, weights, batch = albef_problem([6, 2, 9], torch.float64)
    student, objective = converted(config, weights, 0.4, distil_mlm=False)
    with pytest.raises(AssertionError, match="mlm"):
        check(student, objective, weights, batch, 0.4, record)
    assert CLS == config.cls_token_id
