"""transformers' ProcessorTesterMixin on OneRProcessor, with a tokenizer trained on a few captions."""

import unittest

from hf_tests.test_processing_common import ProcessorTesterMixin

from oner.processing.image_processing_vl import OneRImageProcessor
from oner.processing.processing_vl import OneRProcessor
from oner.processing.vl_tokenizer import train_tokenizer

CAPTIONS = ["lower newer", "upper older longer string", "a red apple", "this is a test", "green tree"] * 2


class OneRProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = OneRProcessor

    @classmethod
    def _setup_image_processor(cls):
        return OneRImageProcessor(size={"height": 32, "width": 32}, patch_size=16)

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(CAPTIONS, vocab_size=400, min_frequency=1)
