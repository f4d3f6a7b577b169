"""CODIS against oracles in fp64: Algorithm 2 as a naive loop and an exact solver, equations 1 to 5 in numpy."""

from dataclasses import fields

import numpy as np
import pytest
import tiny_codis
import torch
from families import FAMILIES, PRETRAINING

from oner import CodisConfig, CodisForPreTraining
from oner.training.objectives.codis import CodisObjectiveArguments
from oner.training.objectives.feature_queue import NO_ID
from oner.training.objectives.transport import codes_used, plan_entropy, transport_plan
from oner.training.private_names import most_alive

FAMILY = FAMILIES["codis"]
PROGRESS = 0.5
# alpha where the ramp has ended
ALPHA = 0.4


def random_cost(features: int, codes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (features, codes))
    return 1 - torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(columns, dim=1).T


def naive_plan(cost: np.ndarray, beta: float, outer: int, inner: int) -> np.ndarray:
    """Algorithm 2, line by line."""
    n, k = cost.shape
    sigma = np.ones(k) / k
    plan = np.ones((n, k))
    kernel = np.exp(-cost / beta)
    for _ in range(outer):
        q = kernel * plan
        for _ in range(inner):
            delta = 1 / (n * (q @ sigma))
            sigma = 1 / (k * (q.T @ delta))
        plan = np.diag(delta) @ q @ np.diag(sigma)
    return plan


@pytest.mark.parametrize(("beta", "outer", "inner"), [(0.5, 50, 1), (0.1, 7, 3), (2.0, 1, 1)])
def test_the_plan_is_algorithm_2(beta, outer, inner):
    cost = random_cost(9, 13)
    found = transport_plan(cost, beta, outer, inner)
    expected = torch.from_numpy(naive_plan(cost.numpy(), beta, outer, inner))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    single = transport_plan(cost.float(), beta, outer, inner)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("features", "codes"), [(64, 400), (12, 5)])
def test_marginals_are_even_after_fifty_steps(features, codes):
    plan = transport_plan(random_cost(features, codes))
    assert (plan.sum(0) - 1 / codes).abs().max() < 1e-4 and (plan.sum(1) - 1 / features).abs().max() < 1e-4


def test_many_steps_reach_the_exact_plan():
    ot = pytest.importorskip("ot")
    cost = random_cost(12, 6).numpy()
    exact = ot.emd2(np.full(12, 1 / 12), np.full(6, 1 / 6), cost)
    plans = [transport_plan(torch.from_numpy(cost), 0.5, outer).numpy() for outer in (2, 2000)]
    few, many = (abs(float((plan * cost).sum()) - exact) for plan in plans)
    assert few > 1e-3 * exact > many


def test_a_plan_has_no_gradient_and_half_precision_is_computed_in_full():
    cost = random_cost(4, 6).requires_grad_()
    assert not transport_plan(cost).requires_grad
    assert transport_plan(cost.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("inner", [1, 2])
def test_two_matrices_live_at_once(inner):
    """Kernel and plan, beside the cost; rows and columns are the rest."""
    features, codes = 64, 400
    cost = random_cost(features, codes).float()
    most = most_alive(lambda: transport_plan(cost, inner=inner)) / cost.nbytes
    assert 2 <= most < 2 + 4 * (1 / features + 1 / codes)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"outer": 0}, {"inner": 0}])
def test_a_transport_that_makes_no_step_is_refused(wrong):
    with pytest.raises(ValueError, match="expected beta above 0 and at least one step"):
        transport_plan(torch.ones(2, 2), **wrong)


def test_what_is_watched():
    even = torch.full((4, 8), 1 / 32)
    assert plan_entropy(even).item() == pytest.approx(np.log(8))
    assert codes_used(torch.eye(4, 8)) == 1 and codes_used(torch.zeros(4, 8)) == 0.25


def softmax(values: np.ndarray) -> np.ndarray:
    high = np.exp(values - values.max(1, keepdims=True))
    return high / high.sum(1, keepdims=True)


def crossed(targets: np.ndarray, logits: np.ndarray) -> float:
    """Mean over rows of H(targets, softmax(logits))."""
    return float(-(targets * np.log(softmax(logits))).sum(1).mean())


@pytest.fixture
def taken():
    """A step's inputs in fp64 and what the student and the teacher make of them."""

    def take(model: dict | None = None, **arguments):
        torch.manual_seed(0)
        student = FAMILY.build(PRETRAINING, **(model or {})).double().train()
        objective = FAMILY.objective(student, **{"losses": ["ica", "code"], "distillation_ramp": 0.0, **arguments})
        objective.teacher.model.double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # a teacher that lags behind
            for parameter in objective.teacher.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        batch = tiny_codis.make_batch([5, 3, 2, 4], dtype=torch.float64)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        targets = objective.targets(student, batch, PROGRESS)
        online = student(**inputs, passes=("contrast",))
        parts = objective.take(student, batch, PROGRESS).parts
        made = {
            "gamma": online.temperature.item(),
            "queue": {name: rows.double().numpy() for name, rows in objective.queue.rows.items()},
            "codes": torch.nn.functional.normalize(student.codebook.weight, dim=1).detach().numpy(),
            **{name: getattr(online, f"{name}_embeds").detach().numpy() for name in ("image", "text")},
            **{f"key {name}": targets.rows[f"key of {name}"].numpy() for name in ("image", "text")},
        }
        return parts, made

    return take


@pytest.mark.parametrize("targets", ["albef", "soft"])
@pytest.mark.parametrize(("reduction", "scale"), [("half", 0.5), ("sum", 1.0), ("mean", 0.25)])
def test_alignment_is_equation_5(taken, targets, reduction, scale):
    parts, made = taken(alignment_targets=targets, alignment_reduction=reduction)
    total = 0.0
    for query, key in (("image", "text"), ("text", "image"), ("image", "image"), ("text", "text")):
        keys = made["queue"][key]
        if targets == "albef":
            keys = np.concatenate([made[f"key {key}"], keys])
        soft = softmax(made[f"key {query}"] @ keys.T / made["gamma"])
        if targets == "albef":
            soft = ALPHA * soft + (1 - ALPHA) * np.eye(*soft.shape)
        total += crossed(soft, made[query] @ keys.T / made["gamma"])
    assert parts["ica"].item() == pytest.approx(scale * total, rel=1e-10)


def test_what_soft_targets_of_alignment_do_not_read_is_said():
    """They are the teacher's distribution alone, so nothing is right by its id; tasks set match_ids by default."""
    (option,) = (one for one in fields(CodisObjectiveArguments) if one.name == "alignment_targets")
    losses = {}
    for name, value in (("match_ids", False), ("match_ids", True), ("distillation", 0.9)):
        torch.manual_seed(0)
        student = FAMILY.build(PRETRAINING).eval()
        objective = FAMILY.objective(student, losses=["ica"], alignment_targets="soft", **{name: value})
        objective.teacher.model.eval()
        batch = {**tiny_codis.make_batch([5, 3, 2, 4]), "ids": torch.tensor([1, 1, 2, 3])}
        losses[name, value] = objective.take(student, batch, PROGRESS).loss.item()
        assert name in option.metadata["help"]
    assert len(set(losses.values())) == 1


def test_an_empty_place_of_the_queue_is_right_for_no_id():
    """Also for one that is called as empty places are."""
    torch.manual_seed(0)
    student = FAMILY.build(PRETRAINING).eval()
    objective = FAMILY.objective(student, losses=["itc"], match_ids=True)
    objective.teacher.model.eval()
    batch = tiny_codis.make_batch([5, 3, 2, 4])
    losses = [
        objective.take(student, {**batch, "ids": torch.tensor([first, 1, 2, 3])}, PROGRESS).loss.item()
        for first in (7, NO_ID)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("plan", ["own", "swapped", "text"])
@pytest.mark.parametrize("rows", ["normalised", "raw"])
@pytest.mark.parametrize("features", ["teacher", "student"])
def test_codes_are_equations_1_to_3(taken, plan, rows, features):
    parts, made = taken(plan=plan, plan_rows=rows, code_features=features)
    source = {name: made[f"key {name}" if features == "teacher" else name] for name in ("image", "text")}
    costs = {name: 1 - value @ made["codes"].T for name, value in source.items()}
    plans = {name: naive_plan(cost, 0.5, 50, 1) for name, cost in costs.items()}
    loss = sum((plans[name] * costs[name]).sum() for name in costs)
    other = {"own": ("image", "text"), "swapped": ("text", "image"), "text": ("text", "text")}[plan]
    for name, teacher in zip(("image", "text"), other, strict=True):
        target = plans[teacher] * (len(plans[teacher]) if rows == "normalised" else 1)
        loss += crossed(target, made[name] @ made["codes"].T / made["gamma"])
    assert parts["code"].item() == pytest.approx(loss, rel=1e-10)


def gradients_of(loss_of, **arguments) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    student = FAMILY.build(PRETRAINING).train()
    objective = FAMILY.objective(student, losses=["code"], **arguments)
    batch = tiny_codis.make_batch([5, 3, 2, 4])
    targets = objective.targets(student, batch, PROGRESS)
    online = objective.represent(student, batch, targets, PROGRESS, {})
    loss_of(objective, online).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("features", ["teacher", "student"])
def test_transport_trains_the_codebook_alone(features):
    def transport(objective, online):
        costs = [1 - online.rows[f"{name} key codes"] for name in ("image", "text")]
        return sum((objective.transport(cost) * cost).sum() for cost in costs)

    assert set(gradients_of(transport, code_features=features)) == {"codebook.weight"}


def test_codes_that_a_step_leaves_of_unit_length():
    student = FAMILY.build(PRETRAINING, code_norm="step").train()
    with torch.no_grad():
        student.codebook.weight.mul_(3)
    objective = FAMILY.objective(student)
    objective.before_step()
    torch.testing.assert_close(student.codebook.weight.norm(dim=1), torch.ones(tiny_codis.CODES))


def test_without_distillation_of_tokens_the_teacher_is_not_heard():
    batch = tiny_codis.make_batch([5, 3, 2, 4])
    losses = []
    for distil in (True, False):
        torch.manual_seed(0)
        student = FAMILY.build(PRETRAINING).train()
        objective = FAMILY.objective(student, losses=["mlm"], distil_mlm=distil, distillation_ramp=0.0)
        with torch.no_grad():
            objective.teacher.model.lm_head.decoder.bias.add_(torch.arange(50.0))
        losses.append(objective.take(student, batch, PROGRESS).parts["mlm"])
    assert losses[0] != losses[1]


def test_codes_of_a_model_that_has_none_are_refused():
    with pytest.raises(ValueError, match="the loss code needs a codebook; expected num_codes"):
        FAMILY.objective(FAMILY.build(PRETRAINING, num_codes=0), losses=["code"])


def test_weights_are_as_many_as_the_papers():
    with torch.device("meta"):
        albef = CodisForPreTraining(CodisConfig(num_codes=0))
        codis = CodisForPreTraining(CodisConfig())
    count = sum(parameter.numel() for parameter in albef.parameters())
    assert count == 209_936_189  # ALBEF's towers and heads, its token types folded into positions
    assert sum(parameter.numel() for parameter in codis.parameters()) - count == 256 * 4000
    head = sum(p.numel() for name, p in albef.lm_head.named_parameters() if name != "decoder.weight")
    text = sum(parameter.numel() for parameter in albef.codis.text.parameters()) + head
    assert round(text / 1e6, 1) == 123.7
