"""transformers' ModelTesterMixin and ConfigTester on every class of OneR."""

import unittest

from families import FAMILIES, MODELS
from family_tester import CLASSIFICATION, MASKED_LM, PRETRAINING, RETRIEVAL, FamilyTest


class OneRModelTest(FamilyTest, unittest.TestCase):
    """The tower and the heads that read a sequence once."""

    family, autos = FAMILIES["oner"], (MODELS, MASKED_LM, CLASSIFICATION)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_features_have_the_towers_shape(self) -> None:
        self.check_features(self.family.classes[MODELS])


class OneRForImageTextRetrievalTest(FamilyTest, unittest.TestCase):
    """Reads pictures and texts one after the other, so every layer runs twice in a step."""

    family, autos = FAMILIES["oner"], (RETRIEVAL,)

    def test_features_have_the_towers_shape(self) -> None:
        self.check_features(self.family.classes[RETRIEVAL])

    def test_checkpointing_keeps_gradients(self) -> None:
        self.check_checkpointing()


class OneRForPreTrainingTest(FamilyTest, unittest.TestCase):
    """Returns dictionaries of representations and no loss: loading, saving, initialisation and resizing apply."""

    family, autos = FAMILIES["oner"], (PRETRAINING,)
