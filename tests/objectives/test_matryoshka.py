"""Contrasts over the first coordinates: each family's against a loop in fp64, in chunks, left out, and refused.

B rows, P = 8 embedding width, M rows of a queue. OneR's whole step with it: run/test_gradient_cache.py.
"""

import pytest
import torch
from accelerate import Accelerator
from families import PRETRAINING
from tiny_pretraining import forget_accelerator
from torch.nn.functional import normalize

from oner.training.run.gradient_cache import loss_and_gradients

B, P, T = 4, 8, 0.2
DIMS, WEIGHTS = [2, 5], [0.5, 3.0]
ACROSS = (("image", "text"), ("text", "image"))
# each contrast's sides; an alignment within modalities is half the sum of its four
SIDES = {
    "itc": ACROSS,
    "cmc": (("image_text", "mix"), ("mix", "image_text")),
    "ica": (*ACROSS, ("image", "image"), ("text", "text")),
}
SCALES = {"ica": 2.0}
LOSSES = {"oner": ["itc", "cmc"], "simla": ["itc"], "codis": ["ica"], "momo": ["itc"]}
LENGTHS = [5, 3, 2, 4, 1, 6]


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, P, generator=generator, dtype=torch.float64), dim=1)


def naive_contrast(queries, teacher, keys, alpha: float) -> float:
    """One query and one key at a time: cross-entropy against the own key, and by `alpha` what the teacher says."""
    total = 0.0
    for i in range(len(queries)):
        cosines = [(queries[i] @ key / queries[i].norm() / key.norm() / T).item() for key in keys]
        said = [(teacher[i] @ key / teacher[i].norm() / key.norm() / T).item() for key in keys]
        logs = torch.tensor(cosines, dtype=torch.float64).log_softmax(0)
        soft = torch.tensor(said, dtype=torch.float64).softmax(0)
        total -= sum(((1 - alpha) * (j == i) + alpha * soft[j].item()) * logs[j].item() for j in range(len(keys)))
    return total / len(queries)


@pytest.fixture
def accelerator() -> Accelerator:
    forget_accelerator()
    yield Accelerator(cpu=True)
    forget_accelerator()


def objective_of(family, **arguments):
    """A family's contrasts over a student in fp64; nothing is drawn, and a teacher's word counts from the first."""
    torch.manual_seed(0)
    student = family.build(PRETRAINING, **family.tiny.APART).double().train()
    ramp = {"distillation_ramp": 0.0} if family.name in ("codis", "simla") else {}
    objective = family.objective(student, **{"losses": LOSSES[family.name], **ramp, **arguments})
    for teacher in objective.teachers():
        teacher.model.double()
    return student, objective


def inputs_of(family, objective) -> tuple[dict, dict, dict, dict]:
    """What `compare` takes, random, with T as temperature; and queues of unit vectors in fp64."""
    names = sorted({side for name in LOSSES[family.name] for pair in SIDES[name] for side in pair})
    rows = {name: unit_rows(B, seed).requires_grad_() for seed, name in enumerate(names)}  # (B, P) each
    targets = {"ids": torch.arange(B)}
    if objective.teacher is not None:
        targets |= {f"key of {name}": unit_rows(B, 10 + seed) for seed, name in enumerate(names)}
    if not hasattr(objective, "queue"):
        common = {"logit_scale": -torch.tensor([T], dtype=torch.float64).log()} if family.name == "momo" else {}
        return rows, common, targets, {}
    objective.queue.rows = {name: unit_rows(32, 20 + seed) for seed, name in enumerate(objective.queue.rows)}
    return rows, {"temperature": torch.tensor([T], dtype=torch.float64)}, targets, objective.queue.rows


def test_each_width_has_the_contrast_of_a_loop(family):
    _, objective = objective_of(family, matryoshka_dims=[*DIMS, P], matryoshka_weights=[*WEIGHTS, 2.0])
    portion = objective.portions["pairs"]
    rows, common, targets, old = inputs_of(family, objective)
    alpha = objective.alpha(0.5) if hasattr(objective, "alpha") else 0.0
    compared = portion.compare(rows, common, targets, 0.5)

    # keys are the teacher's, with older ones behind them, or the rows of the other side
    keys = {name: targets.get(f"key of {name}", row) for name, row in rows.items()}
    wide = {name: torch.cat([key, old[name]]) if name in old else key for name, key in keys.items()}  # (B + M, P)
    expected = {}
    for name in LOSSES[family.name]:
        for dim in (None, *DIMS):
            terms = [
                naive_contrast(rows[query][:, :dim], keys[query][:, :dim], wide[key][:, :dim], alpha)
                for query, key in SIDES[name]
            ]
            expected[name if dim is None else f"{name}@{dim}"] = SCALES.get(name, 1.0) * sum(terms) / len(terms)
    assert list(compared.parts) == list(expected)
    assert len({round(value, 3) for value in expected.values()}) == len(expected)
    for name, value in expected.items():
        assert compared.parts[name].item() == pytest.approx(value, rel=1e-9), name

    # the whole width is always there; listed, it has its weight
    weights = dict(zip((f"@{dim}" for dim in DIMS), WEIGHTS, strict=True)) | {"": 2.0}
    told = sum(weights["".join(name.partition("@")[1:])] * value for name, value in expected.items())
    assert portion.weigh(compared.parts).item() == pytest.approx(told, rel=1e-9)


def step_of(family, accelerator, chunks: int = 1, **arguments) -> tuple:
    student, objective = objective_of(family, **arguments)
    batch = family.tiny.make_batch(LENGTHS, dtype=torch.float64)
    taken = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.5, {"pairs": chunks})
    return taken, {name: one.grad for name, one in student.named_parameters() if one.grad is not None}


def test_chunks_have_the_gradient_of_one_go(family, accelerator):
    whole, slopes = step_of(family, accelerator, matryoshka_dims=DIMS)
    cached, found = step_of(family, accelerator, 3, matryoshka_dims=DIMS)
    assert whole.parts.keys() == cached.parts.keys() and len(whole.parts) == 3 * len(LOSSES[family.name])
    assert slopes.keys() == found.keys()
    torch.testing.assert_close(cached.loss, whole.loss, rtol=1e-10, atol=0)
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-8, atol=1e-12, msg=name)


def test_left_out_it_changes_nothing(family, accelerator):
    """The full width is the same to the bit, and narrow ones of weight 0 leave its gradient alone."""
    plain, slopes = step_of(family, accelerator)
    nothing, found = step_of(family, accelerator, matryoshka_dims=DIMS, matryoshka_weights=[0.0, 0.0])
    assert not any("@" in name for name in plain.parts)
    assert all(torch.equal(nothing.parts[name], part) for name, part in plain.parts.items())
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-15, msg=name)
    narrow, moved = step_of(family, accelerator, matryoshka_dims=DIMS)
    assert narrow.loss.item() == pytest.approx(sum(narrow.parts.values()).item(), rel=1e-12)
    assert any((moved[name] - slope).abs().max() > 1e-4 for name, slope in slopes.items())


@pytest.mark.parametrize(
    ("dims", "weights", "expected"),
    [
        ([0, 4], [], "from 1 to the model's projection_dim, 8"),
        ([4, 9], [], "from 1 to the model's projection_dim, 8"),
        ([4, 2], [], "increasing"),
        ([4, 4], [], "increasing"),
        ([2, 4], [1.0], "one for each of matryoshka_dims"),
        ([], [1.0], "one for each of matryoshka_dims"),
    ],
)
def test_widths_that_cannot_be_are_refused(family, dims, weights, expected):
    with pytest.raises(ValueError, match=expected):
        objective_of(family, matryoshka_dims=dims, matryoshka_weights=weights)


def test_a_run_without_contrast_is_refused(family):
    losses = {"momo": ["cmm"]}.get(family.name, ["mlm"])
    with pytest.raises(ValueError, match="is a contrast of embeddings"):
        objective_of(family, losses=losses, matryoshka_dims=[2])
