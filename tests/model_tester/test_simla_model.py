"""transformers' ModelTesterMixin and ConfigTester on SIMLA's classes."""

import unittest

import torch
from families import FAMILIES, MODELS
from family_tester import MASKED_LM, PRETRAINING, RETRIEVAL, SEQUENCES, FamilyTest
from transformers.testing_utils import torch_device


class SimlaTest(FamilyTest):
    family = FAMILIES["simla"]
    fields = {"num_text_layers": 2}  # as many as below, for those tests that count them


class SimlaModelTest(SimlaTest, unittest.TestCase):
    """Both encoders, and the head on words that read a picture."""

    autos = (MODELS, MASKED_LM)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_features_have_the_towers_shape(self) -> None:
        self.check_features(self.family.classes[MODELS])


class SimlaForImageTextRetrievalTest(SimlaTest, unittest.TestCase):
    """Reads pictures with one encoder and texts with the other; the matching head is called by its own method."""

    autos = (RETRIEVAL,)

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.seq_length = 1 + self.model_tester.n_words  # its states are of the texts alone

    def test_features_have_the_towers_shape(self) -> None:
        self.check_features(self.family.classes[RETRIEVAL])

    def test_checkpointing_keeps_gradients(self) -> None:
        self.check_checkpointing(self.family.classes[RETRIEVAL], return_loss=True)


class SimlaForVisualEntailmentTest(SimlaTest, unittest.TestCase):
    """A classifier of pairs."""

    autos = (SEQUENCES,)

    def test_checkpointing_keeps_gradients(self) -> None:
        labels = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
        self.check_checkpointing(self.family.classes[SEQUENCES], labels=labels)


class SimlaForPreTrainingTest(SimlaTest, unittest.TestCase):
    """Returns logits of several passes and no loss: loading, saving, initialisation and resizing apply."""

    autos = (PRETRAINING,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        masked = torch.tensor([True, False] * (self.model_tester.n_patches // 2), device=torch_device)
        inputs["bool_masked_pos"] = masked.expand(len(inputs["input_ids"]), -1)
        inputs["masked_input_ids"] = inputs["input_ids"].clone()
        return inputs
