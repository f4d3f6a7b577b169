"""OneR's objective against the paper's formulas, computed here in fp64 from separate passes of student and teacher.

B pairs, P = 8 embedding width.
"""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from naive_streams import crossed_states
from tiny_oner import joint_batch, randomised, text_of, tiny_config

from oner import OneRForPreTraining
from oner.training.objectives.objective import build_objective, objective_classes
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments

LENGTHS = [5, 0, 3, 1]


def build(**overrides) -> OneRForPreTraining:
    # layer norm and a linear stem: no row sees another, so that streams may be computed one at a time
    fields = {"head_norm": "layer", "stem": "linear", **overrides}
    return randomised(OneRForPreTraining(tiny_config(**fields))).train()


def moved_apart(student, objective) -> None:
    """A student some steps away from its teacher."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def pass_of(model, batch, kind: str, masked: bool) -> torch.Tensor:
    """F(X) of one stream from one call of the tower, (B, D)."""
    ids = "masked_input_ids" if masked else "input_ids"
    inputs = text_of(batch, ids) if kind == "text" else {"pixel_values": batch["pixel_values"]}
    if kind == "image_text":
        inputs = {"input_ids": batch[ids], "attention_mask": batch["attention_mask"], **inputs}
    if masked and kind != "text":
        inputs["bool_masked_pos"] = batch["bool_masked_pos"]
    return model.oner(**inputs).last_hidden_state[:, 0]


def context_of(model, batch) -> torch.Tensor:
    """(F(I|T) + F(T|I)) / 2 of the masked inputs; the packed pass has its own oracle in naive_streams."""
    crossed = crossed_states(model, batch, masked=True)
    return (crossed["image"][:, 0] + crossed["text"][:, 0]) / 2


def nce(queries: torch.Tensor, keys: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    queries, keys = queries.double(), keys.double()
    queries = queries / queries.norm(dim=1, keepdim=True)
    keys = keys / keys.norm(dim=1, keepdim=True)
    logits = queries @ keys.T / temperature
    return sum(logits[i].logsumexp(0) - logits[i, i] for i in range(len(logits))) / len(logits)


@torch.no_grad()
def formulas(student, teacher, batch, masked: bool = True) -> dict[str, float]:
    """Equations 1 to 4 with q online (masked inputs) and k the teacher's (clean inputs)."""
    online = {kind: pass_of(student, batch, kind, masked) for kind in ("image", "text", "image_text")}
    target = {kind: pass_of(teacher, batch, kind, False) for kind in ("image", "text", "image_text")}
    online["mix"], target["mix"] = ((side["image"] + side["text"]) / 2 for side in (online, target))
    if masked:
        online["context"] = context_of(student, batch)
        crossed_clean = dict(batch, masked_input_ids=batch["input_ids"])
        crossed_clean["bool_masked_pos"] = torch.zeros_like(batch["bool_masked_pos"])
        target["context"] = context_of(teacher, crossed_clean)
    q = {name: student.predictor(student.oner.projector(state)) for name, state in online.items()}
    k = {name: teacher.oner.projector(state) for name, state in target.items()}
    result = {
        "itc": (nce(q["image"], k["text"]) + nce(q["text"], k["image"])) / 2,
        "xmc": nce(q["mix"], k["mix"]),
        "cmc": (nce(q["image_text"], k["mix"]) + nce(q["mix"], k["image_text"])) / 2,
    }
    if masked:
        result["cic"] = (nce(q["context"], k["mix"]) + nce(q["mix"], k["context"])) / 2
    return {name: value.item() for name, value in result.items()}


@pytest.mark.parametrize("context_states", ["co_attention", "last_layer"])
def test_each_contrast_equals_its_equation(context_states):
    student, batch = build(context_states=context_states), joint_batch(LENGTHS, slots=6)
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["itc", "xmc", "cic", "cmc", "mlm", "mim"]))
    moved_apart(student, objective)
    loss, parts, kept = objective(student, batch, 0.0)
    expected = formulas(student, objective.teacher.model, batch)
    assert len({round(value, 4) for value in expected.values()}) == 4  # four different numbers
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, abs=2e-5), name
    assert loss.item() == pytest.approx(sum(part.item() for part in parts.values()), abs=1e-5)
    assert loss.shape == () and all(part.shape == () and not part.requires_grad for part in parts.values())


def test_own_context_states_and_the_cls_make_cic_the_same_as_xmc():
    """
    [CLS] is one vector in every stream. With Y's own keys at every layer its way through F(X|Y) is its way through
    F(Y): the context is the mixture, and CIC is XMC again. Only patches and words of F(X|Y) are new (mean pooling).
    """
    student, batch = build(), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["xmc", "cic", "mlm", "mim"]))
    moved_apart(student, objective)
    _, parts, _ = objective(student, batch, 0.0)
    assert parts["cic"].item() == pytest.approx(parts["xmc"].item(), abs=1e-5)
    student = build(pooling="mean")
    _, parts, _ = OneRObjective(student, OneRObjectiveArguments(losses=["xmc", "cic"]))(student, batch, 0.0)
    assert abs(parts["cic"].item() - parts["xmc"].item()) > 1e-4


def test_the_teacher_is_a_teacher_and_not_the_student():
    student, batch = build(), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["itc", "mlm", "mim"]))
    moved_apart(student, objective)
    _, parts, _ = objective(student, batch, 0.0)
    itself = OneRObjective(student, OneRObjectiveArguments(losses=["itc", "mlm", "mim"], teacher=False))
    assert itself.teacher is None and itself.state_dict() == {}
    _, own, _ = itself(student, batch, 0.0)
    assert own["itc"].item() == pytest.approx(formulas(student, student, batch)["itc"], abs=2e-5)
    assert abs(own["itc"].item() - parts["itc"].item()) > 1e-3


def test_contrast_of_clean_inputs_beside_the_masked_ones():
    student, batch = build(), joint_batch(LENGTHS)
    arguments = OneRObjectiveArguments(contrast_masked=False)
    objective = OneRObjective(student, arguments)
    moved_apart(student, objective)
    _, parts, _ = objective(student, batch, 0.0)
    expected = formulas(student, objective.teacher.model, batch, masked=False)
    for name in ("itc", "cmc"):
        assert parts[name].item() == pytest.approx(expected[name], abs=2e-5)


def test_masked_losses_are_means_over_their_streams():
    student, batch = build(), joint_batch(LENGTHS)
    _, parts, _ = OneRObjective(student, OneRObjectiveArguments(losses=["mlm", "mim"]))(student, batch, 0.0)
    slots = batch["text_index"][batch["mlm_index"]]
    words, pixels = [], []
    ids, joint = text_of(batch, "masked_input_ids"), {n: batch[n] for n in ("attention_mask", "pixel_values")}
    picture = {"pixel_values": batch["pixel_values"], "bool_masked_pos": batch["bool_masked_pos"]}
    joint = {**joint, **picture, "input_ids": batch["masked_input_ids"]}
    for inputs, first in ((ids, 1), (joint, 17)):
        logits = student.lm_head(student.oner(**inputs).last_hidden_state[:, first:].flatten(0, 1)[slots]).double()
        words.append(torch.nn.functional.nll_loss(logits.log_softmax(-1), batch["mlm_labels"]))
    target = batch["pixel_values"].double().unfold(2, 4, 4).unfold(3, 4, 4)  # (B, C, h, w, p, q)
    target = target.permute(0, 2, 3, 4, 5, 1).reshape(4, 16, 48)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    for inputs in (picture, joint):
        states = student.oner(**inputs).last_hidden_state[:, 1:17]
        error = (student.pixel_head(states).double() - target).square().mean(-1)
        pixels.append(error[batch["bool_masked_pos"]].mean())
    assert parts["mlm"].item() == pytest.approx(sum(words).item() / 2, abs=1e-5)
    assert parts["mim"].item() == pytest.approx(sum(pixels).item() / 2, abs=1e-5)


def test_weights_and_the_factor_of_moco_v3():
    student, batch = build(), joint_batch(LENGTHS)
    _, plain, _ = OneRObjective(student, OneRObjectiveArguments(losses=["itc", "mlm"]))(student, batch, 0.0)
    arguments = OneRObjectiveArguments(losses=["itc", "mlm"], loss_weights={"itc": 3}, scale_by_temperature=True)
    loss, parts, _ = OneRObjective(student, arguments)(student, batch, 0.0)
    assert parts["itc"].item() == pytest.approx(plain["itc"].item() * 2 * 0.2, rel=1e-5)
    assert loss.item() == pytest.approx(3 * parts["itc"].item() + parts["mlm"].item(), rel=1e-5)


def test_rows_of_one_concept_are_positives_of_each_other():
    student, batch = build(), joint_batch(LENGTHS)
    batch["ids"] = torch.tensor([5, 5, 8, 9])
    arguments = OneRObjectiveArguments(losses=["xmc", "mlm", "mim"], match_ids=True)
    objective = OneRObjective(student, arguments)
    _, parts, _ = objective(student, batch, 0.0)
    online = [pass_of(student, batch, kind, True) for kind in ("image", "text")]
    target = [pass_of(objective.teacher.model, batch, kind, False) for kind in ("image", "text")]
    q = student.predictor(student.oner.projector(sum(online) / 2)).double()
    k = objective.teacher.model.oner.projector(sum(target) / 2).double()
    logs = (q / q.norm(dim=1, keepdim=True) @ (k / k.norm(dim=1, keepdim=True)).T / 0.2).log_softmax(1)
    expected = -((logs[0, 0] + logs[0, 1] + logs[1, 0] + logs[1, 1]) / 2 + logs[2, 2] + logs[3, 3]) / 4
    assert parts["xmc"].item() == pytest.approx(expected.item(), abs=2e-5)


def test_a_learnable_temperature_is_used_and_learns():
    student, batch = build(learnable_temperature=True, temperature=0.1), joint_batch(LENGTHS)
    arguments = OneRObjectiveArguments(losses=["itc"], scale_by_temperature=True)
    loss, parts, _ = OneRObjective(student, arguments)(student, batch, 0.0)
    plain = build(temperature=0.1)
    plain.load_state_dict({name: value for name, value in student.state_dict().items() if name != "logit_scale"})
    _, fixed, _ = OneRObjective(plain, arguments)(plain, batch, 0.0)
    assert parts["itc"].item() == pytest.approx(fixed["itc"].item(), rel=1e-4)
    assert loss.shape == () and parts["itc"].shape == ()
    loss.backward()
    assert student.logit_scale.grad.abs().item() > 1e-6


@pytest.mark.parametrize("above", [8.0, 1e4])
def test_a_learnable_temperature_is_held_above_a_hundredth(above):
    """Before a step, whose loss is finite, and after it; from there it can come down again."""
    student, batch = build(learnable_temperature=True), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["itc"]))
    student.logit_scale.data.fill_(above)
    _, beyond, _ = objective(student, batch, 0.0)
    student.logit_scale.data.fill_(above)
    objective.after_step(torch.ones(()))
    assert student.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    loss, parts, _ = objective(student, batch, 0.0)
    assert parts["itc"].isfinite() and parts["itc"] == beyond["itc"]
    loss.backward()
    assert student.logit_scale.grad.abs().item() > 1e-6
    below = student.logit_scale.data.fill_(2.0).clone()
    objective.after_step(torch.ones(()))
    assert torch.equal(student.logit_scale.data, below)
    with pytest.raises(StrictDataclassClassValidationError, match="held at 0.01 or above, got 0.005"):
        tiny_config(learnable_temperature=True, temperature=0.005)


# the teacher


def test_masks_do_not_reach_the_keys():
    student, batch = build(), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments())
    seen = []
    forward = objective.teacher.model.forward
    objective.teacher.model.forward = lambda **inputs: seen.append((inputs, forward(**inputs))) or seen[-1][1]
    objective(student, batch, 0.0)
    other = dict(batch, bool_masked_pos=~batch["bool_masked_pos"], masked_input_ids=batch["input_ids"].clone())
    objective(student, other, 0.0)
    (inputs, first), (_, second) = seen
    assert "masked_input_ids" not in inputs and "bool_masked_pos" not in inputs
    assert torch.equal(inputs["input_ids"], batch["input_ids"])
    assert set(first.embeddings) == {"image", "text", "mix", "image_text"}
    for name, keys in first.embeddings.items():
        assert torch.equal(keys, second.embeddings[name]) and not keys.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_follows_after_the_step(dtype):
    student, batch = build(head_norm="batch", stem="conv").to(dtype), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments(ema_momentum=0.9))
    teacher = objective.teacher.model
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and teacher.training
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    loss, *_ = objective(student, batch, 0.0)
    loss.backward()
    torch.optim.SGD(student.parameters(), lr=0.5).step()
    for name, value in teacher.named_parameters():
        assert torch.equal(value, before[name]), name  # nothing moves before the step is over
    buffers = {name: value.clone() for name, value in teacher.named_buffers()}
    objective.after_step()
    theirs, moved = dict(student.named_parameters()), 0
    for name, value in teacher.named_parameters():
        expected = before[name].double() * 0.9 + theirs[name].double() * 0.1
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)
        moved += not torch.equal(value, before[name])
    assert moved > 10
    for name, value in teacher.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_the_teacher_keeps_only_what_keys_need():
    objective = OneRObjective(build(two_heads=True), OneRObjectiveArguments(losses=["itc"]))
    names = {name.split(".")[0] for name, _ in objective.teacher.model.named_parameters()}
    assert names == {"oner"}
    assert any("text_projector" in name for name, _ in objective.teacher.model.named_parameters())
    assert OneRObjective(build(), OneRObjectiveArguments(losses=["mlm", "mim"])).teacher is None


def test_state_survives_a_round_trip():
    student, batch = build(), joint_batch(LENGTHS)
    objective = OneRObjective(student, OneRObjectiveArguments())
    moved_apart(student, objective)
    objective.after_step()
    state = copy.deepcopy(objective.state_dict())
    fresh = OneRObjective(student, OneRObjectiveArguments())
    before = fresh(student, batch, 0.0)[0].item()
    fresh.load_state_dict(state)
    assert set(state) == set(fresh.state_dict()) and all(
        torch.equal(state[n], v) for n, v in fresh.state_dict().items()
    )
    after = fresh(student, batch, 0.0)[0].item()
    assert after == objective(student, batch, 0.0)[0].item() and after != before


# configurations


SUBSETS = [
    ["itc", "mlm", "mim"],
    ["itc", "xmc", "mlm", "mim"],
    ["itc", "xmc", "cic", "mlm", "mim"],
    ["itc", "cmc", "mlm", "mim"],
    ["itc", "cmc", "mlm"],
    ["itc", "cmc", "mim"],
    ["cmc", "mlm", "mim"],
    ["mlm", "mim"],
    *([name] for name in ("itc", "xmc", "cic", "cmc", "mlm", "mim")),
]


@pytest.mark.parametrize("losses", SUBSETS, ids="+".join)
@pytest.mark.parametrize("learnable", [False, True])
def test_every_trained_parameter_gets_a_gradient(losses, learnable):
    """One that gets none would make a data-parallel engine wait for it for ever."""
    student = build(head_norm="batch", stem="conv", learnable_temperature=learnable)
    objective = OneRObjective(student, OneRObjectiveArguments(losses=losses))
    loss, parts, kept = objective(student, joint_batch(LENGTHS), 0.0)
    assert set(parts) == set(losses)
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name.split(".")[0] for name, p in student.named_parameters() if not p.requires_grad}
    assert ("pixel_head" in frozen) == ("mim" not in losses)
    assert ("lm_head" in frozen) == ("mlm" not in losses)
    assert student.oner.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("losses", [["itc"], ["itc", "mlm", "mim"]], ids="+".join)
def test_two_heads_get_gradients(losses):
    student = build(two_heads=True, head_norm="batch", stem="conv")
    objective = OneRObjective(student, OneRObjectiveArguments(losses=losses))
    objective(student, joint_batch(LENGTHS), 0.0)[0].backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_no_masked_word_in_a_batch_still_reaches_every_parameter():
    student, batch = build(), joint_batch(LENGTHS)
    batch["mlm_index"] = batch["mlm_labels"] = torch.zeros(0, dtype=torch.long)
    loss, parts, _ = OneRObjective(student, OneRObjectiveArguments())(student, batch, 0.0)
    loss.backward()
    assert parts["mlm"].item() == 0
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (
            {"losses": ["itc", "itm"]},
            {},
            r"losses are \['itc', 'itm'\]; expected a non-empty subset of \['itc',",
        ),
        ({"losses": ["itc", "mlm", "itc"]}, {}, r"losses are \['itc', 'mlm', 'itc'\]; expected each once"),
        ({"losses": []}, {}, r"losses are \[\]; expected a non-empty subset"),
        ({"losses": ["itc", "cmc"]}, {"two_heads": True}, r"two_heads serves itc alone .*got \['itc', 'cmc'\]"),
        ({"losses": ["itc"], "loss_weights": {"mlm": 2}}, {}, r"loss_weights name \['mlm'\], which are not among"),
        ({"ema_momentum": 1.5}, {}, r"expected an EMA momentum in \[0, 1\], got 1.5"),
        ({"losses": ["mlm"], "masked_streams": ["image"]}, {}, r"mlm needs one of .*masked_streams are \['image'\]"),
        ({"losses": ["mim"], "masked_streams": []}, {}, r"mim needs one of .*masked_streams are \[\]"),
        ({"masked_streams": ["both"]}, {}, r"unknown masked_streams \['both'\]"),
    ],
)
def test_configurations_that_cannot_be_served(arguments, overrides, message):
    with pytest.raises(ValueError, match=message):
        OneRObjective(build(**overrides), OneRObjectiveArguments(**arguments))


def test_families_are_found_by_name():
    assert objective_classes("oner") == (OneRObjective, OneRObjectiveArguments)
    assert isinstance(build_objective("oner", build(), OneRObjectiveArguments()), OneRObjective)
    with pytest.raises(ValueError, match="unknown family 'clip'; expected one of .*oner"):
        objective_classes("clip")
