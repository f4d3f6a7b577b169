"""Objectives of fine-tuning: losses by hand, momentum distillation, pieces of a batch, and what may be told."""

import copy

import pytest
import tiny_momo
import torch
from accelerate import Accelerator
from tiny_oner import randomised
from tiny_simla import DROPOUT, tiny_config
from tiny_tasks import ANSWERS, MASK, inputs
from torch.nn import functional as F

from oner import (
    MomoForVisualQuestionAnswering,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)
from oner.training.objectives.answers import AnswerClassObjective, AnswerObjective, AnswerObjectiveArguments
from oner.training.objectives.classification import ClassificationObjective
from oner.training.objectives.task import DistillationArguments
from oner.training.run.gradient_cache import loss_and_gradients
from oner.training.tasks.answers import AnswerArguments
from oner.training.tasks.classification import EntailmentArguments, ReasoningArguments

WEIGHTS = torch.tensor([0.7, 0.3, 1.0, 0.5, 0.2])


def answers_batch() -> dict:
    return {
        **inputs(),
        "answer_ids": ANSWERS,
        "answer_mask": MASK,
        "answer_weights": WEIGHTS,
        "answers_per_question": torch.tensor([2, 1, 2]),
        "ids": torch.arange(3),
        "rows": torch.arange(3),
    }


def classes_batch(pictures: int = 1) -> dict:
    return {**inputs(pictures=pictures), "labels": torch.tensor([1, 0, 1]), "ids": torch.arange(3)}


def built(kind, **overrides):
    torch.manual_seed(5)
    return randomised(kind(tiny_config(**overrides))).train()


CASES = {
    "answers": (SimlaForVisualQuestionAnswering, AnswerObjective, AnswerObjectiveArguments, answers_batch),
    "entailment": (SimlaForVisualEntailment, ClassificationObjective, DistillationArguments, classes_batch),
    "two pictures": (
        SimlaForVisualReasoning, ClassificationObjective, DistillationArguments, lambda: classes_batch(2),
    ),
}  # fmt: skip


def made(case: str, student=None, **told):
    kind, objective, arguments, batch = CASES[case]
    student = built(kind) if student is None else student
    return student, objective(student, arguments(**told)), batch()


def moved_teacher(objective):
    """A teacher that is not the student, so that its targets show."""
    randomised(objective.teacher.model, seed=11)
    objective.teacher.momentum = 1.0
    return copy.deepcopy(objective.teacher.model)


def test_classes_by_hand():
    student, objective, batch = made("entailment", distillation=0.4)
    teacher = moved_teacher(objective)
    loss, parts, kept = objective(student, batch, progress=0.0)
    pairs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        mine, theirs = student(**pairs).logits.log_softmax(-1), teacher(**pairs).logits.softmax(-1)
    expected = 0.6 * F.nll_loss(mine, batch["labels"]) - 0.4 * (theirs * mine).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert list(parts) == ["classes"] and loss.requires_grad and not parts["classes"].requires_grad


def test_answers_by_hand():
    student, objective, batch = made("answers", distillation=0.4, distillation_ramp=0.5)
    teacher = moved_teacher(objective)
    inputs_ = {name: value for name, value in batch.items() if name not in ("ids", "rows")}
    with torch.no_grad():
        mine, theirs = student(**inputs_).logits.log_softmax(-1), teacher(**inputs_).logits.softmax(-1)
    for progress, alpha in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.4), (0.9, 0.4)):
        loss, *_ = objective(student, batch, progress)
        expected = 0.0
        for row in range(5):
            for place in range(MASK[row].sum() - 1):
                hard = -mine[row, place, ANSWERS[row, place + 1]]
                soft = -(theirs[row, place] * mine[row, place]).sum()
                expected += WEIGHTS[row] * ((1 - alpha) * hard + alpha * soft) / 3
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)


def test_classes_of_answers_by_hand():
    """Binary cross-entropies, in double precision; the teacher's share of what is right."""
    torch.manual_seed(5)
    student = randomised(MomoForVisualQuestionAnswering(tiny_momo.tiny_config(num_labels=5))).train()
    labels = torch.tensor([[0.3, 0.0, 1.0, 0.0, 0.6], [0.0] * 5, [0.0, 1.0, 0.0, 0.0, 0.0]])
    batch = {**tiny_momo.make_batch([3, 5, 2], draws=False), "labels": labels}
    for alpha in (0.0, 0.4):
        objective = AnswerClassObjective(student, DistillationArguments(distillation=alpha))
        told = labels.double()
        read = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        if alpha:
            moved_teacher(objective)
            told = 0.6 * told + 0.4 * objective.teacher(**read).logits.double().sigmoid()
        chance = student(**read).logits.double().sigmoid()
        expected = -(told * chance.log() + (1 - told) * (1 - chance).log()).sum() / 3
        taken = objective(student, batch, 0.5)
        torch.testing.assert_close(taken.loss.double(), expected, rtol=1e-5, atol=1e-6)
    own = student(**read, labels=labels).loss
    torch.testing.assert_close(
        own.double(),
        AnswerClassObjective(student, DistillationArguments(distillation=0.0))(student, batch, 0.5).loss.double(),
    )


def test_alpha_may_be_forgotten_as_the_code_does():
    student, forgetful, batch = made("answers", pass_alpha=False)
    assert forgetful.teacher is None and forgetful.alpha(0.9) == 0
    plain = made("answers", student=student, distillation=0.0)[1]
    torch.testing.assert_close(forgetful(student, batch, 0.9)[0], plain(student, batch, 0.9)[0], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_teacher_moves_before_a_step_towards_what_the_student_is(case):
    student, objective, batch = made(case, ema_momentum=0.9)
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    before = {name: value.clone() for name, value in objective.teacher.model.named_parameters()}
    with torch.no_grad():
        for name in names:
            student.get_parameter(name).add_(1.0)
    objective(student, batch, 0.5)
    after = dict(objective.teacher.model.named_parameters())
    for name in names:
        torch.testing.assert_close(after[name], before[name] + 0.1, rtol=1e-5, atol=1e-5)
    objective.after_step(torch.ones(()))
    assert all(torch.equal(value, objective.teacher.model.get_parameter(name)) for name, value in after.items())
    twin = made(case)[1]
    twin.load_state_dict(objective.state_dict())
    assert all(torch.equal(value, twin.teacher.model.get_parameter(name)) for name, value in after.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_give_the_loss_and_gradient_of_the_whole(case, pieces, fresh_accelerator):
    accelerator = Accelerator(cpu=True)
    found = []
    for count in (1, pieces):
        student, objective, batch = made(case, distillation=0.4)
        moved_teacher(objective)
        loss, *_ = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.9, {"pairs": count})
        found.append((loss, {name: value.grad for name, value in student.named_parameters()}))
    (whole, gradients), (parts, others) = found
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_what_no_loss_reaches_is_frozen(case):
    student, objective, batch = made(case)
    objective(student, batch, 0.5)[0].backward()
    idle = [name for name, value in student.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle
    assert not any(parameter.requires_grad for parameter in objective.teacher.model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_it_learns_a_batch_by_heart(case):
    student, objective, batch = made(case, student=built(CASES[case][0], **DROPOUT), distillation=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        loss, *_ = objective(student, batch, step / 25)
        loss.backward()
        optimizer.step()
        objective.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("told", [{"distillation": 1.2}, {"distillation_ramp": -0.1}])
def test_shares_are_checked(told):
    with pytest.raises(ValueError, match=f"{next(iter(told))} is .*; expected a share in"):
        made("entailment", **told)


def test_defaults_are_those_of_albefs_protocol():
    # alpha whole at once for entailment, over the first epoch of 10 and of 8 for the others
    ramps = [kind().distillation_ramp for kind in (EntailmentArguments, ReasoningArguments, AnswerArguments)]
    assert ramps == [0.0, 1 / 10, 1 / 8]
    for kind in (EntailmentArguments, ReasoningArguments, AnswerArguments):
        assert (kind().distillation, kind().ema_momentum) == (0.4, 0.995)
