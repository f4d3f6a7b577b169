"""What OneR alone refuses, in words; test_families_inputs.py has what every family does."""

import re

import pytest
from tiny_oner import joint_batch, tiny_config

from oner import OneRConfig, OneRForPreTraining


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"representations": ("image", "sound")}, "unknown representations ['sound']; expected any of"),
        ({"masked_streams": ("mix",)}, "unknown masked_streams ['mix']; expected any of ['image',"),
    ],
)
def test_the_training_step_refuses(changes, message):
    batch = joint_batch([3, 1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match=re.escape(message)):
        OneRForPreTraining(tiny_config())(**{**inputs, **changes})


def test_two_heads_have_none_for_mixtures():
    model, batch = OneRForPreTraining(tiny_config(two_heads=True)), joint_batch([3, 1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match=re.escape("two_heads has no head for ['mix', 'context']")):
        model(**inputs, representations=("image", "mix", "context"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 5}, "hidden_size must be a multiple of 4 for 2-D sines, got 30"),
        ({"patch_size": 12, "image_size": 24}, "needs a patch_size that is a power of two, got 12"),
        ({"hidden_size": 36, "patch_size": 16}, "needs hidden_size divisible by 8, got 36"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": -0.1}, "temperature must be above 0, got -0.1"),
        ({"projector_layers": 0}, "expected projector_layers >= 1 and predictor_layers >= 0, got 0 and 2"),
    ],
)
def test_configurations_that_do_not_fit_together(fields, message):
    with pytest.raises(Exception, match=re.escape(message)):
        tiny_config(**fields)


def test_unknown_names_in_the_configuration():
    with pytest.raises(
        ValueError, match="unknown size 'gigantic'; expected one of nano, tiny, small, base, large, huge"
    ):
        OneRConfig.from_size("gigantic")
    for field in ("stem", "pooling", "head_norm", "head_statistics", "mixup_space", "context_states"):
        with pytest.raises(Exception, match=field):
            tiny_config(**{field: "something else"})
