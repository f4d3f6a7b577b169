"""transformers' ProcessorTesterMixin on VisionLanguageProcessor, with a tokenizer trained on a few captions."""

import unittest

from hf_tests.test_processing_common import ProcessorTesterMixin

from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer

CAPTIONS = ["lower newer", "upper older longer string", "a red apple", "this is a test", "green tree"] * 2


class VisionLanguageProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VisionLanguageProcessor

    @classmethod
    def _setup_image_processor(cls):
        return VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=16)

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(CAPTIONS, vocab_size=400, min_frequency=1)
