"""Makes transformers' tests importable, tells them of the families, and names what does not apply, with the reason."""

import re
import sys

import pytest
from fetch import PACKAGE, tests_folder

SINGLE_TOWER = (
    "reads config.text_config; one configuration holds all here, test_features_have_the_towers_shape checks the same"
)
TWO_RUNS = (
    "its mock follows one run of a layer in a step; here two, test_checkpointing_keeps_gradients checks the same"
)
LEFT = "masks the first two positions, [CLS] and a patch; OneR pads on the right and refuses this with an error"
NO_LOSS = "a ForPreTraining returns logits; its losses and their gradients are the objective's, and tested there"
NO_STATES = "OneRForPreTraining packs all streams of a step; it returns dictionaries, no states of one sequence"
WORDS = "counts positions against max_length; the processor's max_length counts words, patches and [CLS] come on top"
AUTO_MAP = "compares with the state before saving; saving a class that ships its code adds auto_map to it"
DEFAULTS = (
    "expects the tokenizer's own padding and max_length to win; VisionLanguageProcessor decides both (max_text_length)"
)
PAIRS = "gives a text two pictures and another one none; OneR reads one picture per text, or none at all"
STACKS = "counts num_hidden_layers states; a pair passes two stacks of layers, test_families_models.py counts a text's"
NO_PLACES = "a ForPreTraining of two encoders returns embeddings and logits of several passes, no states"
LOGITS = "a text alternates between the states of two images; ForVisualReasoning returns its logits alone"
NO_STACK = "reads hidden_states and attentions; ForVisualQuestionAnswering returns answers' logits and question_states"
NO_PASS = "MomoForPreTraining returns predictions of several packed passes, no states of one sequence"
PACKED = "gives a single row the masked places of the whole batch, which are counted over all of its tokens"
ONE_DECODER = "expects a gradient for every parameter; a pair passes one decoder of two, and pixels are not asked for"
TEMPERATURE = "calls numpy() on the first output; here that is a parameter, the temperature"
UNREAD = (
    "expects a gradient for every parameter; contrast reads neither matching head nor cross-attention: "
    "test_checkpointing_keeps_gradients checks the rest"
)
MASK_TOKEN = (
    "expects a gradient for every parameter; only pre-training reads the mask token: "
    "test_checkpointing_keeps_gradients checks the rest"
)
PAD_LEFT = r"test_eager_matches_sdpa_inference_\d+_\w+_pad_left(?!_no_attn_mask)"
TEXT_TOWER = {
    "test_get_text_features_output_0": SINGLE_TOWER,
    "test_get_text_features_output_2": SINGLE_TOWER,
}
STATES = (
    "test_attention_outputs", "test_hidden_states_output", "test_retain_grad_hidden_states_attentions",
    "test_eager_matches_sdpa_inference",
)  # fmt: skip
# of SIMLA and CODIS: test class without the family's name → pattern of a test's name → why it does not apply
DUAL = {
    "ModelTest": {
        **TEXT_TOWER,
        PAD_LEFT: LEFT,
        "test_attention_outputs": STACKS,
        "test_hidden_states_output": STACKS,
    },
    "ForImageTextRetrievalTest": {
        **TEXT_TOWER,
        PAD_LEFT: LEFT,
        "test_training_gradient_checkpointing": UNREAD,
    },
    "ForVisualEntailmentTest": {
        PAD_LEFT: LEFT,
        "test_attention_outputs": STACKS,
        "test_hidden_states_output": STACKS,
    },
    "ForVisualReasoningTest": dict.fromkeys(STATES, LOGITS),
    "ForVisualQuestionAnsweringTest": dict.fromkeys(STATES, NO_STACK),
    "ForPreTrainingTest": {
        **TEXT_TOWER,
        "test_training": NO_LOSS,
        "test_determinism": TEMPERATURE,
        **dict.fromkeys(STATES, NO_PLACES),
    },
}
# of SIMLA alone, whose images may be masked
SIMLA = dict.fromkeys(
    ("ForVisualEntailmentTest", "ForVisualReasoningTest", "ForVisualQuestionAnsweringTest"),
    {"test_training_gradient_checkpointing": MASK_TOKEN},
)
# test class → pattern of a test's name → why it does not apply
NOT_APPLICABLE = {
    "OneRModelTest": {
        **TEXT_TOWER,
        PAD_LEFT: LEFT,
    },
    "OneRForImageTextRetrievalTest": {
        **TEXT_TOWER,
        "test_training_gradient_checkpointing": TWO_RUNS,
    },
    "OneRForPreTrainingTest": {
        **TEXT_TOWER,
        "test_training": NO_LOSS,
        "test_attention_outputs": NO_STATES,
        "test_hidden_states_output": NO_STATES,
        "test_retain_grad_hidden_states_attentions": NO_STATES,
        "test_determinism": NO_STATES,
        "test_eager_matches_sdpa_inference": NO_STATES,
    },
    **{f"Codis{test}": patterns for test, patterns in DUAL.items()},
    **{f"Simla{test}": patterns | SIMLA.get(test, {}) for test, patterns in DUAL.items()},
    "MomoModelTest": {
        PAD_LEFT: LEFT,
    },
    "MomoForMaskedLMTest": {
        PAD_LEFT: LEFT,
        "test_training_gradient_checkpointing": ONE_DECODER,
    },
    "MomoForImageTextRetrievalTest": {
        **TEXT_TOWER,
        "test_training_gradient_checkpointing": TWO_RUNS,
        PAD_LEFT: LEFT,
    },
    "MomoForImageClassificationTest": {
        PAD_LEFT: LEFT,
    },
    "MomoForPreTrainingTest": {
        **TEXT_TOWER,
        "test_training": NO_LOSS,
        "test_attention_outputs": NO_PASS,
        "test_hidden_states_output": NO_PASS,
        "test_retain_grad_hidden_states_attentions": NO_PASS,
        "test_batching_equivalence": PACKED,
        "test_determinism": TEMPERATURE,
        "test_eager_matches_sdpa_inference": NO_PASS,
    },
    "VisionLanguageProcessorTest": {
        "test_kwargs_overrides_default_subprocessor_kwargs_0": WORDS,
        "test_structured_kwargs_nested_from_dict_0": WORDS,
        "test_unstructured_kwargs_0": WORDS,
        "test_subprocessor_defaults_preserved_by_kwargs_0": DEFAULTS,
        "test_processor_from_and_save_pretrained": AUTO_MAP,
        "test_processor_text_has_no_visual": PAIRS,
    },
}


def pytest_configure() -> None:
    folder = tests_folder()
    if not (folder / PACKAGE).is_dir():
        raise pytest.UsageError(f"{folder} is missing: run `make test-transformers`, or tests/model_tester/fetch.py")
    sys.path.insert(0, str(folder))
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    # In-tree models are listed by name; several tests find a head's base model through this list.
    MODEL_MAPPING_NAMES.update(codis="CodisModel", momo="MomoModel", oner="OneRModel", simla="SimlaModel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in NOT_APPLICABLE.get(item.cls.__name__ if item.cls else "", {}).items():
            if re.match(pattern, item.name):
                item.add_marker(pytest.mark.skip(reason=reason))
