"""Adapters (LoRA): what was trained beside frozen weights comes back exactly from the adapter alone."""

import copy

import pytest
import torch
from families import PRETRAINING, RETRIEVAL
from tiny_oner import joint_batch, text_of
from torch import nn

from oner.modeling.vl_layers import BATCH_NORMS


def norms_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The statistics of its batch norms."""
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


@pytest.fixture
def model(family):
    """With batch norms, in the stem at least."""
    built = family.build(RETRIEVAL, stem="conv")
    assert any(isinstance(module, BATCH_NORMS) for module in built.modules())
    return built


def test_an_adapter_reloads_exactly(model, tmp_path):
    peft = pytest.importorskip("peft")
    published = copy.deepcopy(model)
    batch = {**text_of(joint_batch([5, 3, 4])), "pixel_values": joint_batch([5, 3, 4])["pixel_values"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()
    for _ in range(3):
        adapted(**batch, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(published), tmp_path).eval()
    with torch.no_grad():
        trained, found, before = (one(**batch).logits_per_image for one in (adapted, again, published))
        merged = again.merge_and_unload()(**batch).logits_per_image
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)
    assert (trained - before).abs().max() > 1e-3


def test_a_norm_keeps_its_statistics_where_it_is_frozen_and_others_learn(model):
    batch = {**text_of(joint_batch([5, 3, 4])), "pixel_values": joint_batch([5, 3, 4])["pixel_values"]}
    before = norms_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("text" in name or "word" in name)
    model(**batch)
    with torch.no_grad():
        expected = model(**batch).logits_per_image
    torch.testing.assert_close(model.train()(**batch).logits_per_image, expected, rtol=0, atol=1e-5)
    after = norms_of(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # all of it learns again: its batch counts
    model.requires_grad_(True)
    model(**batch)
    assert not any(torch.equal(value, norms_of(model)[name]) for name, value in before.items() if "mean" in name)


def test_a_teacher_goes_on_with_its_own_statistics(family):
    """It is frozen too, and runs without gradient: MoCo-v3's code has it so."""
    if not family.has_teacher:
        pytest.skip("has no teacher")
    student = family.build(PRETRAINING, stem="conv").train()
    objective = family.objective(student, losses=["itc"])
    before = norms_of(objective.teacher.model)
    objective(student, family.tiny.make_batch([5, 3, 4]), 0.5)
    after = norms_of(objective.teacher.model)
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert any("stem" in name for name in moved)
