"""transformers' ModelTesterMixin and ConfigTester on CODIS' classes."""

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

CODIS = FAMILIES["codis"]


class CodisModelTest(DualModelTest, unittest.TestCase):
    family = CODIS


class CodisForImageTextRetrievalTest(DualForImageTextRetrievalTest, unittest.TestCase):
    family = CODIS


class CodisForVisualEntailmentTest(DualForVisualEntailmentTest, unittest.TestCase):
    family = CODIS


class CodisForVisualReasoningTest(DualForVisualReasoningTest, unittest.TestCase):
    family = CODIS


class CodisForVisualQuestionAnsweringTest(DualForVisualQuestionAnsweringTest, unittest.TestCase):
    family = CODIS


class CodisForPreTrainingTest(DualForPreTrainingTest, unittest.TestCase):
    family = CODIS
