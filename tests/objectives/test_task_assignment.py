"""Text assignment: which pictures are drawn, what is read, and that NLVR2 begins where it ended."""

import pytest
import torch
from tiny_oner import randomised
from tiny_simla import tiny_config
from tiny_tasks import bold, inputs
from torch.nn import functional as F

from oner import SimlaForPreTraining, SimlaForTextAssignment, SimlaForVisualReasoning
from oner.training.objectives.assignment import (
    AssignmentObjective,
    AssignmentObjectiveArguments,
    assign,
    draw_two_pictures,
)
from oner.training.tasks.assignment import load_assignment
from oner.training.tasks.classification import load_reasoning

OWN = 2 / 3


def drawn(cosines, allowed, rounds=400, own=OWN, temperature=0.07):
    for _ in range(rounds):
        (first, second), labels = draw_two_pictures(cosines, allowed, own, temperature)
        yield from zip(range(len(labels)), first.tolist(), second.tolist(), labels.tolist(), strict=True)


def test_own_pictures_stand_where_the_label_says_and_others_are_anothers():
    ids = torch.tensor([1, 2, 2, 3, 4])
    allowed, counts = ids[:, None] != ids[None, :], torch.zeros(3)
    for row, first, second, label in drawn(torch.rand(5, 5), allowed):
        counts[label] += 1
        assert first != second
        assert (first == row, second == row) == (label == 0, label == 1)
        assert all(ids[place] != ids[row] for place in (first, second) if place != row)
    # two texts of three, evenly in both places; of 2000, the deviation is 21
    torch.testing.assert_close(counts / counts.sum(), torch.full((3,), 1 / 3), rtol=0, atol=0.05)


def test_others_are_drawn_by_likeness():
    cosines = torch.eye(4)
    cosines[0] = torch.tensor([1.0, 0.9, 0.8, 0.0])
    seen = torch.zeros(4)
    for row, first, _, label in drawn(cosines, ~torch.eye(4, dtype=torch.bool), temperature=0.1):
        if row == 0 and label == 2:
            seen[first] += 1
    weights = (cosines[0] / 0.1).exp()
    weights[0] = 0
    torch.testing.assert_close(seen / seen.sum(), weights / weights.sum(), rtol=0, atol=0.12)


def test_too_few_pictures_are_no_question():
    allowed = torch.tensor([[False, True, False], [True, False, True], [False, True, False]])
    _, labels = draw_two_pictures(torch.zeros(3, 3), allowed, 1.0, 0.07)
    assert labels[0] == labels[2] == -100 and labels[1] in (0, 1)
    (first, second), labels = draw_two_pictures(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), OWN, 0.07)
    assert first.tolist() == second.tolist() == [0] and labels.tolist() == [-100]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return bold(SimlaForTextAssignment(tiny_config(num_text_layers=4)))


@torch.no_grad()
def test_a_text_reads_the_two_that_are_chosen_in_their_order(model):
    batch, first, second = inputs((3, 5, 2, 4)), torch.tensor([0, 3, 1, 3]), torch.tensor([2, 1, 0, 0])
    cosines = []
    logits = model(**batch, choose=lambda found: cosines.append(found) or (first, second)).logits
    two = SimlaForVisualReasoning(tiny_config(num_text_layers=4)).eval()
    two.load_state_dict(model.state_dict(), strict=False)
    two.classifier = model.assignment_head
    pictures = torch.stack([batch["pixel_values"][first], batch["pixel_values"][second]], 1)
    torch.testing.assert_close(logits, two(**{**batch, "pixel_values": pictures}).logits, rtol=1e-4, atol=1e-5)
    unit = F.normalize(model.simla.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    torch.testing.assert_close(cosines[0], unit @ unit.T, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expects input_ids, pixel_values and `choose`"):
        model(**batch)


def test_the_objective(model):
    student = SimlaForTextAssignment(tiny_config(num_text_layers=4)).train()
    objective = AssignmentObjective(student, AssignmentObjectiveArguments())
    batch = {**inputs((3, 5, 2, 4)), "ids": torch.arange(4)}
    torch.manual_seed(9)
    loss, parts, kept = objective(student, batch, 0.5)
    torch.manual_seed(9)
    logits, labels = assign(student, batch, OWN, 0.07)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    loss.backward()
    assert list(parts) == ["assignment"] and not objective.teachers() and objective.state_dict() == {}
    idle = [name for name, value in student.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle
    recorded = {
        "first_pictures": torch.tensor([0, 2, 2, 1]),
        "second_pictures": torch.tensor([1, 1, 0, 2]),
        "labels": torch.tensor([0, 1, 0, 2]),
    }
    logits, labels = assign(student, {**batch, **recorded}, OWN, 0.07)
    again = objective(student, {**batch, **recorded}, 0.5)[0]
    torch.testing.assert_close(again, F.cross_entropy(logits, recorded["labels"]))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"distillation": 0.4}, "has no teacher"),
        ({"own_picture": 1.5}, "a share"),
        ({"draw_temperature": 0.0}, "share"),
    ],
)
def test_what_cannot_be_is_refused(model, told, message):
    with pytest.raises(ValueError, match=message):
        AssignmentObjective(model, AssignmentObjectiveArguments(**told))


def test_nlvr2_begins_where_assignment_ended(model, tmp_path):
    pretrained = randomised(SimlaForPreTraining(tiny_config(num_text_layers=4)))
    pretrained.save_pretrained(tmp_path / "pretrained")
    begun = load_assignment(str(tmp_path / "pretrained"))
    for layer, source in zip(begun.second_layers, pretrained.simla.text.layers[2:], strict=True):
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in layer.state_dict().items())
    model.save_pretrained(tmp_path / "assigned")
    two = load_reasoning(str(tmp_path / "assigned"))
    assert type(two) is SimlaForVisualReasoning and "LABEL_0" not in two.config.id2label.values()
    mine, theirs = two.state_dict(), model.state_dict()
    shared = [name for name in mine if not name.startswith("classifier.")]
    assert all(torch.equal(mine[name], theirs[name]) for name in shared) and any("second_layers" in n for n in shared)
    with pytest.raises(ValueError, match="family 'oner' has no model of two pictures; expected .*simla"):
        from tiny_oner import tiny_config as of_oner

        load_reasoning(str(tmp_path / "assigned"), config=of_oner())
