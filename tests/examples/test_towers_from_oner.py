"""A vision tower out of a OneR: the same image states, and what it cannot have is refused."""

import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny_oner import tiny_config
from tiny_repository import emoji_rows, model_of, processor_of
from transformers import AutoProcessor

from oner import OneRForPreTraining
from oner.training.publishing.hub import export_model
from oner.training.publishing.model_loading import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"
EMOJI = EXAMPLES / "data" / "emoji"
sys.path.insert(0, str(EXAMPLES))

from towers_from_oner import FAMILIES as BUILT  # noqa: E402
from towers_from_oner import build, main  # noqa: E402


@pytest.fixture
def trunk() -> OneRForPreTraining:
    torch.manual_seed(0)
    return OneRForPreTraining(tiny_config(stem="conv")).eval()


@pytest.mark.parametrize("built", BUILT)
def test_its_image_states_are_the_trunks(trunk, built):
    size = trunk.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = build(trunk, trunk.config.num_hidden_layers, 1, built).eval()
    with torch.no_grad():
        expected = trunk.oner(pixel_values=pixels).last_hidden_state
        assert torch.equal(model.base_model.vision(pixels), expected)


def test_words_that_were_close_remain_so(trunk):
    words = build(trunk, 1, 1).simla.text.embeddings.word_embeddings.weight
    before = trunk.oner.embeddings.word_embeddings.weight
    assert torch.allclose(words / words.std(), before / before.std(), atol=1e-5)


@pytest.mark.parametrize("built", BUILT)
def test_the_directory_is_one_to_begin_with(tmp_path, built):
    processor = processor_of(FAMILIES["oner"], emoji_rows(EMOJI))
    export_model(model_of(FAMILIES["oner"], processor), processor, tmp_path / "oner")
    main([str(tmp_path / "oner"), str(tmp_path / "new"), "--family", built, "--layers", "2", "--text_layers", "1"])
    model = load_model(BUILT[built][1], str(tmp_path / "new"))
    assert (model.config.num_hidden_layers, model.config.num_text_layers) == (2, 1)
    assert AutoProcessor.from_pretrained(tmp_path / "new").tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_fewer_layers_are_the_lowest_and_more_are_refused(trunk):
    lower = build(trunk, 1, 1).simla.vision.layers
    assert len(lower) == 1
    assert torch.equal(lower[0].feed_forward.fc1.weight, trunk.oner.layers[0].feed_forward.fc1.weight)
    with pytest.raises(ValueError, match="layers is 9; expected 1 to the 2 of the OneR"):
        build(trunk, 9, 1)
