"""Relevance of patches for a masked word: by hand, for every family, and nothing where nothing is read."""

import pytest
import torch
from families import FAMILIES, MASKED_LM, inputs_of
from PIL import Image
from tiny_oner import MASK, joint_batch
from tiny_pretraining import ROOT
from transformers import AutoModelForMaskedLM, AutoProcessor

from oner.processing.data.sources import open_rows
from oner.training.commands.evaluate import MODELS
from oner.training.evaluation import relevance
from oner.training.evaluation.relevance import (
    crossed_relevance,
    decoder_attentions,
    masked_maps,
    masked_relevance,
    relevance_sheet,
    self_relevance,
    without_own,
)
from oner.training.evaluation.sheets import draw_scenes, quarter
from oner_command_line import main as command_line


def masked_pairs(model, place: int = 2):
    """Three pairs with the word at `place` of each text masked: batch, places and what stood there."""
    batch = inputs_of(model, "pair", joint_batch([5, 3, 4]))
    shift = 16 if model.config.pair_layout == "joint" else 0
    token_ids = batch["input_ids"][:, place + shift].clone()
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, place + shift] = MASK
    return batch, torch.full((3,), place), token_ids


def test_what_passes_from_layer_to_layer():
    first = torch.tensor([[[0.0, 0.5], [0.0, 0.0]]])
    second = torch.tensor([[[0.1, 0.0], [0.2, 0.3]]])
    # (1 + second)(1 + first)
    expected = (torch.eye(2) + second) @ (torch.eye(2) + first)
    torch.testing.assert_close(self_relevance([first, second]), expected)
    rows = without_own(expected)
    torch.testing.assert_close(
        rows - torch.eye(2), (expected - torch.eye(2)) / (expected - torch.eye(2)).sum(-1)[..., None]
    )


def test_a_text_owes_an_image_what_it_reads_and_what_its_words_have_read():
    """One text layer, then one that reads; with an image whose places owe each other nothing."""
    text = [torch.tensor([[[0.0, 0.4], [0.0, 0.0]]]), torch.zeros(1, 2, 2)]
    across = [torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.7, 0.1]]])]
    owed = crossed_relevance([torch.zeros(1, 3, 3)], text, across)
    # the first word attended the second below, and owes through equation 10 its transpose
    assert torch.allclose(owed[0, 1], torch.tensor([0.0, 0.7, 0.1])) and owed[0, 0].abs().sum() == 0
    across = [torch.tensor([[[0.0, 0.7, 0.1], [0.0, 0.0, 0.0]]])]
    owed = crossed_relevance([torch.zeros(1, 3, 3)], text, across)
    assert torch.allclose(owed[0], torch.tensor([[0.0, 0.7, 0.1], [0.0, 0.7, 0.1]]))


def test_every_family_has_maps_of_each_pair(family):
    model = family.build(MASKED_LM)
    batch, places, token_ids = masked_pairs(model)
    maps = masked_relevance(model, batch, places, token_ids)
    assert maps.shape == (3, 16) and (maps >= 0).all() and (maps.sum(1) > 0).all() and not maps.requires_grad
    # rows of a batch keep to themselves
    alone = {name: value[:1] for name, value in batch.items()}
    one = masked_relevance(model, alone, places[:1], token_ids[:1])
    torch.testing.assert_close(one, maps[:1], rtol=1e-3, atol=1e-6)
    # another word was read elsewhere
    other = masked_relevance(model, batch, places, token_ids + 1)
    assert not torch.allclose(other, maps)
    with pytest.raises(ValueError, match="expects a model in eval mode"):
        masked_relevance(model.train(), batch, places, token_ids)


def test_one_tower_by_its_own_gradients():
    """OneR, re-derived: each attention's gradient by itself, and (1 + A bar) multiplied from the last layer on."""
    model = FAMILIES["oner"].build(MASKED_LM)
    batch, places, token_ids = masked_pairs(model)
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True)
    score = outputs.logits[torch.arange(3), places + 16, token_ids].sum()
    row = torch.zeros(3, 1, outputs.logits.shape[1])
    row[:, 0, places[0] + 16] = 1
    for attention in reversed(outputs.attentions):
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        row = row + row @ (attention * gradient).relu().mean(1)
    torch.testing.assert_close(masked_relevance(model, batch, places, token_ids), row[:, 0, 1:17].detach())


@pytest.mark.parametrize("fields", [{}, {"pair_decoder": "separate"}, {"shared_decoder": True}], ids=str)
def test_a_decoder_reads_on_where_its_encoder_ended(fields):
    """MoMo, re-derived over places that are seen: encoder and decoder as one chain of products, from the end."""
    model = FAMILIES["momo"].build(MASKED_LM, **fields)
    batch, places, token_ids = masked_pairs(model)
    model.set_attn_implementation("eager")
    decoder = model.decoder("pair_text" if model.pairs_apart else "pair")
    with decoder_attentions(model) as decoding:
        outputs = model(**batch, output_attentions=True)
    assert len(decoding) == len(decoder.layers) and len(outputs.attentions) == len(model.momo.layers)
    score = outputs.logits[torch.arange(3), places + 16, token_ids].sum()
    row = torch.zeros(3, 1, outputs.logits.shape[1])
    row[:, 0, places[0] + 16] = 1
    for attention in reversed([*outputs.attentions, *decoding]):
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        part = (attention * gradient).relu().mean(1)
        row = row + row @ part
        if attention is outputs.attentions[-1]:
            assert part[:, places[0] + 16].abs().sum() == 0, "nothing passes through a place that the encoder dropped"
    torch.testing.assert_close(masked_relevance(model, batch, places, token_ids), row[:, 0, 1:17].detach())
    assert not any(layer.attention._forward_hooks for layer in decoder.layers), "the hooks are gone"


def test_a_text_that_reads_no_image_owes_it_nothing():
    model = FAMILIES["simla"].build(MASKED_LM)
    with torch.no_grad():
        for layer in model.simla.text.layers:
            layer.cross_attention.proj.weight.zero_()
    assert masked_relevance(model, *masked_pairs(model)).abs().sum() == 0


def test_words_of_scenes_are_looked_for_where_they_are(emoji_folder, monkeypatch):
    """Numbers of maps that are known: one has nothing, one looks at the thing named, the others at its neighbour."""
    name = ROOT / "examples" / "checkpoints" / "oner-emoji"
    processor = AutoProcessor.from_pretrained(name)
    rows = open_rows(emoji_folder / "test_concept.parquet", id_column="hexcode").take(range(24))
    asked = [scene.asked for scene in draw_scenes(rows, 4)]
    given = torch.zeros(4, 4, 4)
    for scene, place in enumerate([None, asked[1], (asked[2] + 1) % 4, (asked[3] + 1) % 4]):
        if place is not None:
            given[scene][quarter(4, 4, place)] = 1.0
    parts = iter([given[:3], given[3:]])

    def known(model, processor, images, texts, words):
        lengths = [processor(text=text)["input_ids"].shape[1] - 1 for text in texts]
        assert all(0 <= word < length for word, length in zip(words, lengths, strict=True))
        return next(parts)

    monkeypatch.setattr(relevance, "masked_maps", known)
    monkeypatch.setattr(relevance, "relevance_sheet", lambda model, processor, images, texts: len(images))
    found = dict(relevance.RelevanceEvaluator(rows, scenes=4, shown=2, batch_size=3).run(None, processor))
    third = pytest.approx(1 / 3)
    assert found == {
        "relevance/read_off_picture": 0.75,
        "relevance/share_on_named": third,
        "relevance/peak_on_named": third,
        "relevance/sheet": 2,
    }


def test_the_command_asks_the_model_of_masked_words_alone(tmp_path, capsys):
    told = ["evaluate", "--model", "oner-emoji", "--data", "x.parquet", "--tasks", "relevance", "gap"]
    assert command_line(told) == 2
    assert (
        "relevance asks the model of masked words, which does not search; expected it alone" in capsys.readouterr().err
    )
    assert MODELS["relevance"] is AutoModelForMaskedLM


def test_a_sheet_masks_each_word_in_turn():
    pytest.importorskip("matplotlib")
    name = ROOT / "examples" / "checkpoints" / "oner-emoji"
    model, processor = AutoModelForMaskedLM.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    images = [Image.new("RGB", (64, 64), "white")] * 2
    figure = relevance_sheet(model, processor, images, ["red apple", "a green tree"], most=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "red apple" and "a green tree" in titles
    assert [title for title in titles if "MASK" in title][:2] == ["[MASK] = red", "[MASK] = apple"]
    with pytest.raises(ValueError, match="expected a token of each text, got the places .5."):
        masked_maps(model, processor, images[:1], ["red apple"], [5])
