"""Streams of OneR that read some patches only. Against the naive loss, and in pieces: run/test_gradient_cache.py."""

import pytest
import torch
from naive_pretraining import build_pair, gradients, uneven_batch

REPRESENTATIONS = ("image", "text", "mix", "image_text", "context")


def step_inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "text_index")}


@pytest.mark.parametrize("stem", ["conv", "linear"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_all_patches_kept_are_the_whole_pass(stem, pooling):
    batch = uneven_batch(5, 2, repeat_ids=False)
    made = {}
    for name, kept in (("whole", {}), ("kept", {"kept_patches": torch.arange(16).expand(5, 16)})):
        student, _ = build_pair({"losses": ["itc"]}, stem=stem, pooling=pooling)
        embeddings = student(**step_inputs(batch), **kept, representations=REPRESENTATIONS).embeddings
        sum(value.square().sum() for value in embeddings.values()).backward()
        made[name] = embeddings, gradients(student)
    for one, other in zip(made["whole"], made["kept"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_patch_keeps_its_position_and_texts_stay_as_they_are():
    batch = uneven_batch(5, 2, repeat_ids=False)
    student, _ = build_pair({"losses": ["itc"]})
    kept = batch["kept_patches"]
    some, turned, whole = (
        student(**step_inputs(batch), **places, representations=REPRESENTATIONS).embeddings
        for places in ({"kept_patches": kept}, {"kept_patches": kept.flip(1)}, {})
    )
    for name in REPRESENTATIONS:
        torch.testing.assert_close(some[name], turned[name], rtol=0, atol=1e-10)
        assert torch.equal(some[name], whole[name]) == (name == "text")

    # pixels of patches that are left out are not seen, behind a stem that sees no further than a patch
    left = torch.ones(5, 16).scatter(1, kept, 0.0).view(5, 1, 4, 4)
    batch["pixel_values"] = batch["pixel_values"] + left.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = student(**step_inputs(batch), kept_patches=kept, representations=REPRESENTATIONS).embeddings
    assert all(torch.equal(some[name], other[name]) for name in REPRESENTATIONS)


def test_keys_are_of_whole_pictures_unless_told():
    batch, keys = uneven_batch(5, 2, repeat_ids=False), {}
    options = {"off": {}, "whole": {"image_keep": 0.4}, "kept": {"image_keep": 0.4, "keep_in_keys": True}}
    for name, chosen in options.items():
        student, objective = build_pair({"losses": ["itc", "cmc"], **chosen})
        keys[name] = objective.targets(student, batch, 0.0).rows
    for name, whole in keys["off"].items():
        assert torch.equal(whole, keys["whole"][name])
        assert torch.equal(whole, keys["kept"][name]) == (name in ("ids", "key of text"))


def test_masked_patches_are_predicted_from_whole_pictures():
    batch, parts = uneven_batch(5, 2, repeat_ids=False), {}
    for keep in (0.4, 1.0):
        student, objective = build_pair({"contrast_masked": False, "image_keep": keep})
        parts[keep] = objective(student, batch, 0.0).parts
    for name in ("mlm", "mim"):
        torch.testing.assert_close(parts[0.4][name], parts[1.0][name], rtol=0, atol=1e-12)
    assert all((parts[0.4][name] - parts[1.0][name]).abs() > 1e-4 for name in ("itc", "cmc"))


@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_every_trained_parameter_gets_a_gradient(keep):
    student, objective = build_pair({"losses": ["itc", "cmc"], "image_keep": keep}, stem="conv", head_norm="batch")
    objective(student, uneven_batch(5, 2, repeat_ids=False), 0.0).loss.backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"image_keep is 0.5, and mim predicts patches .* losses without mim"):
        build_pair({"image_keep": 0.5})
    student, objective = build_pair({"losses": ["itc"], "image_keep": 0.5})
    batch = uneven_batch(5, 2, repeat_ids=False)
    kept = batch.pop("kept_patches")
    with pytest.raises(ValueError, match="image_keep is 0.5, and the batch has no kept_patches"):
        objective(student, batch, 0.0)
    expected = r"kept_patches are .*; expected int64 of shape \(5, K\), places of 1 to 16"
    for wrong in (kept[:4], kept[:, 0], kept[:, :0], kept.int(), kept.repeat(1, 3)):
        with pytest.raises(ValueError, match=expected):
            student(**step_inputs(batch), kept_patches=wrong)
    with pytest.raises(ValueError, match="got kept_patches and bool_masked_pos for the same streams"):
        student(**step_inputs(batch), kept_patches=kept, bool_masked_pos=batch["bool_masked_pos"])
