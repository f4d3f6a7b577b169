"""The tests of SIMLA's and CODIS' classes, each of which has a visual and a text encoder."""

import torch
from families import MODELS
from family_tester import (
    ANSWERS,
    CLS,
    MASKED_LM,
    PRETRAINING,
    RETRIEVAL,
    SEQUENCES,
    Checkpoints,
    EmbedsTexts,
    FamilyTest,
)
from transformers.testing_utils import torch_device


class DualTest(FamilyTest):
    """The text encoder has as many layers as the visual one, for those tests that count them."""

    fields = {"num_text_layers": 2}


class DualModelTest(EmbedsTexts, DualTest):
    """Both encoders, and the head on tokens of a text that reads an image."""

    autos = (MODELS, MASKED_LM)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class DualForImageTextRetrievalTest(EmbedsTexts, Checkpoints, DualTest):
    """Reads images with one encoder and texts with the other; the matching head is called by its own method."""

    autos = (RETRIEVAL,)

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.seq_length = 1 + self.model_tester.n_words  # its states are of the texts alone


class DualForVisualEntailmentTest(Checkpoints, DualTest):
    """A classifier of pairs."""

    autos = (SEQUENCES,)


class DualForVisualReasoningTest(Checkpoints, DualTest):
    """A classifier of texts about two images, whose second layers share keys and values with the first."""

    tasks = ("ForVisualReasoning",)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = torch.stack([pixels, pixels.flip(-1)], dim=1)
        if return_labels:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
        return inputs


class DualForVisualQuestionAnsweringTest(Checkpoints, DualTest):
    """A decoder that generates answers from the states of a question and its image."""

    autos = (ANSWERS,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["answer_ids"] = inputs["input_ids"][:, :4].clone()
            inputs["answer_ids"][:, 0] = CLS
        return inputs


class DualForPreTrainingTest(DualTest):
    """Returns logits of several passes and no loss: loading, saving, initialisation and resizing apply."""

    autos = (PRETRAINING,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        inputs["masked_input_ids"] = inputs["input_ids"].clone()
        return inputs


__all__ = [
    "DualForImageTextRetrievalTest",
    "DualForPreTrainingTest",
    "DualForVisualEntailmentTest",
    "DualForVisualQuestionAnsweringTest",
    "DualForVisualReasoningTest",
    "DualModelTest",
]
