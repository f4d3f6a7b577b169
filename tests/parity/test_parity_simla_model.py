"""SIMLA's networks with official weights: every pass of a step against the naive oracle, in several shapes."""

import pytest
import torch
from official_networks import Network, unit
from simla_bridge import close, model_of, official_batch, our_state, sizes_of, weights_of
from tiny_simla import CODES, VOCAB, simla_batch, tiny_config

from oner import SimlaForImageTextRetrieval, SimlaForPreTraining

SHAPES = {
    "plain": {},
    "twelve": {"num_text_layers": 12},
    "other heads": {"num_attention_heads": 2, "text_attention_heads": 8},
    "narrow text": {"text_intermediate_size": 48, "num_hidden_layers": 1},
    "wide": {"hidden_size": 48, "projection_dim": 20, "num_text_layers": 2},
}
LENGTHS = [3, 7, 1, 5]


def inputs_of(batch: dict) -> list[torch.Tensor]:
    """The model's first four."""
    return [batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "masked_input_ids")]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request):
    return tiny_config(**request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_pass(config, implementation, dtype):
    weights, batch = weights_of(config, dtype), simla_batch(LENGTHS, dtype=dtype)
    model, network = model_of(config, weights, implementation), Network(weights, sizes_of(config))
    with torch.no_grad():
        output = model(
            *inputs_of(batch),
            batch["bool_masked_pos"],
            passes=("contrast", "match", "tokens", "patches", "concepts", "keywords"),
            choose_negatives=lambda *_: (batch["negative_images"], batch["negative_texts"]),
        )
        official = official_batch(batch)
        ids, mask = official["ids"], official["mask"]
        picture, image, text = network.unimodal(official["pixels"], ids, mask)
        fused, attention = network.fuse(ids, mask, picture)
        other_picture, _ = network.fuse(ids, mask, picture[official["negative_images"]])
        wrong = official["negative_texts"]
        other_text, _ = network.fuse(ids[wrong], mask[wrong], picture)
        masked = network.picture(official["pixels"], official["masked_patches"])
        everywhere = torch.ones(masked.shape[:2])
        completed, _ = network.text(network.embed(embeds=masked), everywhere, network.embed(ids), mask)
        expected = {
            "image_states": picture,
            "image_embeds": image,
            "text_embeds": text,
            "itm_logits": network.linear("itm_head", torch.cat([fused, other_picture, other_text])[:, 0]),
            "mlm_logits": network.words(network.fuse(official["masked_ids"], mask, picture)[0]),
            "mim_logits": network.linear("mim_head", completed[:, 1:]),
            "text_context": network.embed(ids),
            "concept_logits": network.linear("concept_head", image),
            "keyword_attention": attention[:, :, 0],
            "temperature": weights["temp"].reshape(1),
        }
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert output.keys() == expected.keys()
    for name, value in expected.items():
        close(output[name], value, tolerance, tolerance, name)


def test_places_choose_among_the_logits():
    """What is predicted only where asked is what is predicted everywhere, there."""
    config, batch = tiny_config(), simla_batch(LENGTHS)
    model = model_of(config, weights_of(config))
    inputs = inputs_of(batch)
    words, patches = torch.tensor([1, 9, 17]), batch["bool_masked_pos"].flatten().nonzero().flatten()
    with torch.no_grad():
        few = model(*inputs, batch["bool_masked_pos"], words, patches, passes=("tokens", "patches"))
        all_of_them = model(*inputs, batch["bool_masked_pos"], passes=("tokens", "patches"))
    torch.testing.assert_close(few.mlm_logits, all_of_them.mlm_logits.flatten(0, 1)[words], atol=1e-5, rtol=1e-5)
    assert few.mim_logits.shape == (len(patches), CODES)
    torch.testing.assert_close(few.mim_logits, all_of_them.mim_logits.flatten(0, 1)[patches], atol=1e-5, rtol=1e-5)


def test_slots_that_no_caption_fills_change_nothing():
    config = tiny_config()
    model = model_of(config, weights_of(config))
    for slots in (7, 12):
        batch = simla_batch(LENGTHS, slots=slots)
        with torch.no_grad():
            output = model(*inputs_of(batch)[:3], passes=("contrast",))
        if slots == 7:
            expected = output.text_embeds
    torch.testing.assert_close(output.text_embeds, expected, atol=1e-6, rtol=1e-6)


def test_retrieval_class_scores_as_the_oracle_does():
    """Cosines over the temperature, and matching logits of every text with every picture, from cached states."""
    config, batch = tiny_config(), simla_batch(LENGTHS)
    weights = weights_of(config)
    model = SimlaForImageTextRetrieval(config).eval()
    state = our_state(weights)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    network, official = Network(weights, sizes_of(config)), official_batch(batch)
    ids, mask = official["ids"], official["mask"]
    texts, pictures = torch.arange(4).repeat(4), torch.arange(4).repeat_interleave(4)
    with torch.no_grad():
        output = model(ids, mask, batch["pixel_values"])
        picture, image, text = network.unimodal(batch["pixel_values"], ids, mask)
        torch.testing.assert_close(output.logits_per_image, image @ text.T / 0.07, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(output.image_embeds, unit(output.image_embeds), atol=1e-6, rtol=1e-6)
        logits = model.match(ids[texts], mask[texts], image_states=picture, context_index=pictures)
        fused, _ = network.fuse(ids[texts], mask[texts], picture[pictures])
        torch.testing.assert_close(logits, network.linear("itm_head", fused[:, 0]), atol=2e-5, rtol=1e-5)
        pairs = model.match(*inputs_of(batch)[:3])
        torch.testing.assert_close(pairs, logits[torch.arange(4) * 5], atol=1e-5, rtol=1e-5)


def test_official_names_are_all_taken():
    """Each trained weight of the official step has its place here, and each of ours its official name."""
    config = tiny_config()
    model = SimlaForPreTraining(config)
    ours = {name for name, _ in model.named_parameters()} | {"lm_head.decoder.weight"}
    assert our_state(weights_of(config)).keys() == ours
    teachers = {name for name in ours if not name.startswith(("itm_head", "temperature"))}
    assert our_state(weights_of(config), teacher=True).keys() == teachers
    assert model.lm_head.decoder.weight.shape == (VOCAB, config.hidden_size)
