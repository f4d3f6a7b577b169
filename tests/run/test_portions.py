"""Steps of several portions, shown on a family of two: their gradients against a naive fp64 step, in any chunks."""

import copy
from pathlib import Path

import pytest
import torch
import toy_family
from accelerate import Accelerator
from tiny_pretraining import forget_accelerator
from toy_family.modeling_toy import ToyConfig, ToyForPreTraining
from toy_family.objective_toy import ToyObjective, ToyObjectiveArguments

from oner.training.run.gradient_cache import loss_and_gradients

# rows of texts and of pairs, and their chunks
SHAPES = [((6, 6), (1, 1)), ((6, 6), (3, 2)), ((4, 12), (1, 4)), ((12, 4), (5, 1)), ((4, 12), (4, 12))]


@pytest.fixture
def accelerator() -> Accelerator:
    forget_accelerator()
    yield Accelerator(cpu=True)
    forget_accelerator()


def build(dropout: float = 0.0) -> tuple[ToyForPreTraining, ToyObjective]:
    torch.manual_seed(1)
    student = ToyForPreTraining(ToyConfig(vocab_size=60, cls_token_id=2, mask_token_id=3, dropout=dropout)).double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    objective = ToyObjective(student, ToyObjectiveArguments())
    objective.teacher.model.double()
    with torch.no_grad():
        for parameter in objective.teacher.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return student.train(), objective


def texts(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """(rows, 1 + 5) ids, a third of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (rows, 1), generator=generator)
    real = torch.arange(5) < lengths  # (B, W)
    ids = torch.randint(4, 60, (rows, 5), generator=generator) * real
    chosen = (torch.rand(rows, 5, generator=generator) < 0.35) & real
    places = chosen[real].nonzero().flatten()  # (M,) among the n tokens
    cls = torch.full((rows, 1), 2)
    return {
        "input_ids": torch.cat([cls, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(cls), real.long()], 1),
        "masked_input_ids": torch.cat([cls, ids.masked_fill(chosen, 3)], 1),
        "text_index": real.flatten().nonzero().flatten(),
        "mlm_index": places,
        "mlm_labels": ids[chosen],
        "ids": torch.arange(rows),
        "rows": torch.arange(rows),
    }


def pairs(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    batch = texts(rows, seed + 1)
    batch["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=generator, dtype=torch.float64)
    batch["bool_masked_pos"] = torch.zeros(rows, 4, dtype=torch.bool)
    return batch


def nce(queries: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    queries, keys = (rows / rows.norm(dim=1, keepdim=True) for rows in (queries, keys))
    logits = queries @ keys.T / temperature
    return torch.stack([logits[i].logsumexp(0) - logits[i, i] for i in range(len(logits))]).mean()


def naive_step(student, teacher, batches) -> dict[str, torch.Tensor]:
    """Every part row by row, in one graph."""
    parts = {}
    batch, keys = batches["texts"], teacher(**chosen(batches["texts"]))
    text = student(
        **{**chosen(batch), "input_ids": batch["masked_input_ids"]},
        mlm_places=torch.arange(batch["input_ids"].numel()),
    )
    parts["text contrast"] = nce(text["text"], keys["text"].detach(), 0.5)
    hidden = batch["masked_input_ids"] != batch["input_ids"]
    logs = text["logits"].view(*batch["input_ids"].shape, -1).log_softmax(-1)
    losses = [-logs[row, place, batch["input_ids"][row, place]] for row, place in hidden.nonzero().tolist()]
    parts["mlm"] = torch.stack(losses).mean()
    batch, keys = batches["pairs"], teacher(**chosen(batches["pairs"]))
    pair, temperature = student(**chosen(batch)), (-student.logit_scale).exp()
    sides = (("image", "text"), ("text", "image"))
    parts["pair contrast"] = sum(nce(pair[a], keys[b].detach(), temperature) for a, b in sides) / 2
    return parts


def chosen(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}


@pytest.mark.parametrize(("rows", "chunks"), SHAPES)
def test_the_gradient_of_two_portions_is_that_of_their_sum(accelerator, rows, chunks):
    batches = {"texts": texts(rows[0]), "pairs": pairs(rows[1])}
    student, objective = build()
    oracle, teacher = copy.deepcopy(student), copy.deepcopy(objective.teacher.model)
    expected = naive_step(oracle, teacher, batches)
    sum(expected.values()).backward()

    numbers = dict(zip(batches, chunks, strict=True))
    taken = loss_and_gradients(accelerator, objective, student, batches, 0.0, numbers)
    assert taken.parts.keys() == expected.keys()
    for name, part in expected.items():
        assert taken.parts[name].item() == pytest.approx(part.item(), rel=1e-10), name
    assert taken.loss.item() == pytest.approx(sum(expected.values()).item(), rel=1e-10)
    for (name, one), other in zip(student.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_portion_alone_leaves_what_it_does_not_touch(accelerator):
    """The parameters that only one portion reaches have only that portion's gradient."""
    student, objective = build()
    batches = {"texts": texts(4), "pairs": pairs(4)}
    loss_and_gradients(accelerator, objective, student, batches, 0.0)
    both = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    objective.portions["texts"].take(student, batches["texts"], 0.0).loss.backward()
    assert student.toy.stem.weight.grad is None and student.logit_scale.grad is None
    assert torch.equal(student.lm_head.weight.grad, both["lm_head.weight"])
    assert both["toy.stem.weight"].abs().sum() > 0 and both["logit_scale"].abs().sum() > 0


def test_dropout_is_replayed_portion_by_portion(accelerator):
    """In chunks, twice from the same generator: the same gradient to the bit, and the generator where it was."""
    results = []
    for _ in range(2):
        student, objective = build(dropout=0.3)
        torch.manual_seed(9)
        batches = {"texts": texts(6), "pairs": pairs(6)}
        loss_and_gradients(accelerator, objective, student, batches, 0.0, {"texts": 3, "pairs": 2})
        results.append((torch.cat([p.grad.flatten() for p in student.parameters()]), torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_step_needs_a_batch_of_each_portion(accelerator):
    student, objective = build()
    with pytest.raises(ValueError, match=r"got batches of \['texts'\]; expected one for each of \['pairs', 'texts'\]"):
        loss_and_gradients(accelerator, objective, student, {"texts": texts(4)}, 0.0)


def test_the_family_is_short():
    """`docs/adding_a_family.md` promises it: what is new in a family, and nothing else, is its author's work."""
    files = ("__init__", "modeling_toy", "objective_toy")
    text = "\n".join((Path(toy_family.__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in files)
    assert len([line for line in text.splitlines() if line.strip()]) < 150
