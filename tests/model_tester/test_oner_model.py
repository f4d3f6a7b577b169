"""transformers' ModelTesterMixin and ConfigTester on every class of OneR."""

import unittest

from families import FAMILIES, MODELS
from family_tester import CLASSIFICATION, MASKED_LM, PRETRAINING, RETRIEVAL, Checkpoints, EmbedsTexts, FamilyTest


class OneRModelTest(EmbedsTexts, FamilyTest, unittest.TestCase):
    """The tower and the heads that read a sequence once."""

    family, autos = FAMILIES["oner"], (MODELS, MASKED_LM, CLASSIFICATION)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class OneRForImageTextRetrievalTest(EmbedsTexts, Checkpoints, FamilyTest, unittest.TestCase):
    """Reads pictures and texts one after the other, so every layer runs twice in a step."""

    family, autos = FAMILIES["oner"], (RETRIEVAL,)


class OneRForPreTrainingTest(FamilyTest, unittest.TestCase):
    """Returns dictionaries of representations and no loss: loading, saving, initialisation and resizing apply."""

    family, autos = FAMILIES["oner"], (PRETRAINING,)
