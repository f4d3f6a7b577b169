"""What transformers' ModelTesterMixin needs to know of a family: a tiny configuration, and inputs of its classes."""

import copy
import inspect
import unittest
from collections.abc import Mapping
from typing import Any

import torch
from families import CLASSIFICATION, MASKED_LM, MODELS, PRETRAINING, RETRIEVAL, Family
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers import PreTrainedConfig
from transformers.testing_utils import torch_device

import oner

CLS, IMAGE, MASK, FIRST_WORD = 3, 1, 4, 5
ANSWERS = "AutoModelForVisualQuestionAnswering"
SEQUENCES = "AutoModelForSequenceClassification"


class FamilyModelTester:
    """A tiny model and one batch of pairs: B = 7, N = 4 patches, W = 6 words, L = 1 + N + W places of a pair's states.

    Seven rows, because a test that needs seven would invent the missing ones, without [CLS].
    """

    def __init__(self, parent: unittest.TestCase, family: Family, fields: Mapping[str, Any]):
        self.parent, self.family, self.fields = parent, family, fields
        self.batch_size, self.n_patches, self.n_words = 7, 4, 6
        self.seq_length = 1 + self.n_patches + self.n_words
        self.image_size, self.patch_size, self.num_channels = 16, 8, 3
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size, self.num_labels = 120, 2  # more than the ids of BERT's special words
        self.num_masks, self.mask_length = 2, self.n_patches  # of bool_masked_pos
        self.is_training = True

    def get_config(self) -> PreTrainedConfig:
        return self.family.tiny.tiny_config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            projection_dim=16,
            max_text_length=24,
            cls_token_id=CLS,
            image_token_id=IMAGE,
            mask_token_id=MASK,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        words = ids_tensor([self.batch_size, self.n_words], self.vocab_size - FIRST_WORD) + FIRST_WORD
        placeholders = self.n_patches if config.pair_layout == "joint" else 0
        head = torch.tensor([[CLS] + [IMAGE] * placeholders]).expand(self.batch_size, -1)
        ids = torch.cat([head.to(words.device), words], dim=1).contiguous()
        mask = torch.ones(ids.shape, dtype=torch.long)
        mask[1, -2:] = 0
        pixels = torch.rand(self.batch_size, self.num_channels, self.image_size, self.image_size)
        return config, {
            "input_ids": ids,
            "attention_mask": mask.to(torch_device),
            "pixel_values": pixels.to(torch_device),
        }


class FamilyTest(ModelTesterMixin):
    """
    Each test class names the `family`, what is tested, and `fields` of its own. `autos` are auto classes; `tasks` name
    the classes that no auto class returns, without the family's prefix.
    """

    family: Family
    autos: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    fields: Mapping[str, Any] = {}
    additional_model_inputs = ["pixel_values"]
    test_torch_exportable = False  # its tests are not in the archive

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        prefix = self.family.classes[MODELS].__name__.removesuffix("Model")
        tasks = (getattr(oner, prefix + task) for task in self.tasks)
        return (*(self.family.classes[auto] for auto in self.autos), *tasks)

    def setUp(self) -> None:
        self.model_tester = FamilyModelTester(self, self.family, self.fields)
        config_class = type(self.model_tester.get_config())
        self.config_tester = ConfigTester(self, config_class=config_class, hidden_size=48)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        auto = next((name for name, cls in self.family.classes.items() if cls is model_class), None)
        if return_labels and auto == MASKED_LM:
            inputs["labels"] = inputs["input_ids"].clone()
        if return_labels and auto in (CLASSIFICATION, SEQUENCES):
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
        if return_labels and auto == RETRIEVAL:
            inputs["return_loss"] = True
        read = inspect.signature(self.family.classes[MODELS].forward).parameters
        if return_labels and auto in (MASKED_LM, CLASSIFICATION) and "bool_masked_pos" in read:
            # so that the mask token has a gradient, as every parameter must
            inputs["bool_masked_pos"] = self.masked_patches(self.model_tester.batch_size)
        return inputs

    def masked_patches(self, rows: int) -> torch.Tensor:
        """Every other patch, (rows, N)."""
        masked = torch.tensor([True, False] * (self.model_tester.n_patches // 2), device=torch_device)
        return masked.expand(rows, -1)


class EmbedsTexts:
    """For test classes of a family's base model, or of its class for retrieval: both embed texts, and pairs."""

    def test_features_have_the_towers_shape(self) -> None:
        """Stands in for test_get_text_features_output, which looks for a text tower in the configuration."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model_class = self.family.classes[RETRIEVAL if RETRIEVAL in self.autos else MODELS]
        model = model_class(config).to(torch_device).eval()
        pixels = inputs.pop("pixel_values")
        with torch.no_grad():
            text, both = (
                model.get_text_features(**inputs),
                model.get_multimodal_features(**inputs, pixel_values=pixels),
            )
        pair = 1 + self.model_tester.n_patches + self.model_tester.n_words
        for features, length in ((text, inputs["input_ids"].shape[1]), (both, pair)):
            self.assertEqual(features.last_hidden_state.shape[1:], (length, config.hidden_size))
            self.assertEqual(features.pooler_output.shape, (self.model_tester.batch_size, config.projection_dim))
        self.assertFalse(torch.allclose(text.pooler_output, both.pooler_output))


class Checkpoints:
    """For test classes whose models return a loss."""

    def test_checkpointing_keeps_gradients(self) -> None:
        """Stands in for test_training_gradient_checkpointing*, whose mock follows one run of a layer only."""
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                self.check_gradients(model_class)

    def check_gradients(self, model_class: type) -> None:
        """Gradients with and without checkpointing must agree."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = self._prepare_for_class(inputs, model_class, return_labels=True)
        for field in ("hidden_dropout", "text_attention_dropout"):  # for families that have any
            setattr(config, field, 0.0)
        model = model_class(config).to(torch_device).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            model.zero_grad()
            model(**inputs).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        self.assertEqual(gradients[0].keys(), gradients[1].keys())
        self.assertGreater(len(gradients[0]), 20)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


__all__ = [
    "ANSWERS",
    "CLASSIFICATION",
    "Checkpoints",
    "EmbedsTexts",
    "FamilyTest",
    "MASKED_LM",
    "PRETRAINING",
    "RETRIEVAL",
    "SEQUENCES",
]
