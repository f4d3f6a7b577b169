"""transformers' ModelTesterMixin and ConfigTester on MoMo's classes."""

import unittest

import torch
from families import FAMILIES
from family_tester import (
    ANSWERS,
    CLASSIFICATION,
    MASK,
    MASKED_LM,
    PRETRAINING,
    RETRIEVAL,
    SEQUENCES,
    Checkpoints,
    EmbedsTexts,
    FamilyTest,
)
from transformers.testing_utils import torch_device


class MomoTest(FamilyTest):
    family = FAMILIES["momo"]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is self.family.classes[ANSWERS]:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
        if return_labels and model_class is self.family.classes[MASKED_LM]:
            inputs["input_ids"][:, 1 + self.model_tester.n_patches] = MASK
        return inputs


class MomoModelTest(EmbedsTexts, Checkpoints, MomoTest, unittest.TestCase):
    """The encoder, and the heads that read a sequence once."""

    autos = (SEQUENCES, ANSWERS)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class MomoForMaskedLMTest(MomoTest, unittest.TestCase):
    """The encoder and a decoder behind it."""

    autos = (MASKED_LM,)
    fields = {"decoders": ["pair"]}


class MomoForImageTextRetrievalTest(EmbedsTexts, Checkpoints, MomoTest, unittest.TestCase):
    """Reads pictures and texts one after the other, so every layer runs twice in a step."""

    autos = (RETRIEVAL,)
    fields = {"temperature": 0.5}  # logits are compared, and half precision rounds them by as much as they are sharp


class MomoForImageClassificationTest(MomoTest, unittest.TestCase):
    """A classifier of pictures."""

    autos = (CLASSIFICATION,)


class MomoForPreTrainingTest(MomoTest, unittest.TestCase):
    """Returns predictions of several passes and no loss: loading, saving, initialisation and resizing apply."""

    autos = (PRETRAINING,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        inputs["bool_masked_pos"] = self.masked_patches(len(inputs["input_ids"]))
        inputs["mlm_index"] = torch.arange(0, 12, 3, device=torch_device)
        return inputs
