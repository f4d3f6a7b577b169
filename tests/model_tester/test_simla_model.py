"""transformers' ModelTesterMixin and ConfigTester on SIMLA's classes."""

import unittest

from dual_tester import (
    DualForImageTextRetrievalTest,
    DualForPreTrainingTest,
    DualForVisualEntailmentTest,
    DualForVisualQuestionAnsweringTest,
    DualForVisualReasoningTest,
    DualModelTest,
)
from families import FAMILIES

SIMLA = FAMILIES["simla"]


class SimlaModelTest(DualModelTest, unittest.TestCase):
    family = SIMLA


class SimlaForImageTextRetrievalTest(DualForImageTextRetrievalTest, unittest.TestCase):
    family = SIMLA


class SimlaForVisualEntailmentTest(DualForVisualEntailmentTest, unittest.TestCase):
    family = SIMLA


class SimlaForVisualReasoningTest(DualForVisualReasoningTest, unittest.TestCase):
    family = SIMLA


class SimlaForVisualQuestionAnsweringTest(DualForVisualQuestionAnsweringTest, unittest.TestCase):
    family = SIMLA


class SimlaForPreTrainingTest(DualForPreTrainingTest, unittest.TestCase):
    family = SIMLA

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        inputs["bool_masked_pos"] = self.masked_patches(len(inputs["input_ids"]))
        return inputs
