"""The nouns of two towers on ALBEF, which is CODIS without its codebook; those of SIMLA are in them.

Layer by layer against oracles that read one text and one image at a time. B rows, N = 16 patches, T places of a text.
"""

import copy

import pytest
import torch
from naive_fusion import naive_embed, naive_layer
from tiny_codis import tiny_config
from tiny_simla import VOCAB, simla_batch
from tiny_simla import tiny_config as simla_config
from tiny_tasks import ANSWERS, MASK, bold, inputs
from torch.nn.functional import normalize

from oner import (
    CodisConfig,
    CodisForImageTextRetrieval,
    CodisForMaskedLM,
    CodisForPreTraining,
    CodisForTextAssignment,
    CodisForVisualQuestionAnswering,
    CodisForVisualReasoning,
    CodisModel,
    SimlaModel,
)

LENGTHS = (3, 5, 0, 2)


def albef_config(**fields) -> CodisConfig:
    return tiny_config(**{"num_codes": 0, "text_intermediate_size": 64, "grounding_layer": 8, **fields})


def built(kind, seed: int = 0, **fields):
    torch.manual_seed(seed)
    return bold(kind(albef_config(**fields)))


@pytest.fixture(scope="module")
def tower():
    return built(CodisModel)


def texts_of(batch: dict) -> list[torch.Tensor]:
    """Each row's real ids."""
    return [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def naive_alone(text, ids: torch.Tensor) -> torch.Tensor:
    """The two layers that read a text: (T,) -> (T, D)."""
    x = naive_embed(text.embeddings, ids)
    for layer in text.layers[:2]:
        x = naive_layer(layer, x)
    return x


def naive_fused(tower, ids: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """And the two above, which read a picture (C, H, W) too."""
    x, seen = naive_alone(tower.text, ids), tower.vision(picture[None])[0]
    for layer in tower.text.layers[2:]:
        x = naive_layer(layer, x, seen)
    return x


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def test_the_configuration_decides_who_reads_the_image(tower):
    layers = tower.text.layers
    assert [layer.cross_attention is not None for layer in layers] == [False, False, True, True]
    assert [layer.cross_norm is not None for layer in layers] == [False, False, True, True]
    simla = SimlaModel(simla_config())
    assert len(simla.text.layers) == 3 and all(layer.cross_attention is not None for layer in simla.text.layers)
    assert (tower.text.first_fusion, simla.text.first_fusion) == (2, 0)
    assert tower.vision.embeddings.mask_token is None and simla.vision.embeddings.mask_token is not None
    deep = CodisModel(albef_config(num_text_layers=1, num_fusion_layers=3))
    assert [layer.cross_attention is not None for layer in deep.text.layers] == [False, True, True, True]


@torch.no_grad()
def test_texts_images_and_pairs_against_layers_by_hand(tower):
    batch = inputs(LENGTHS)
    image = tower(pixel_values=batch["pixel_values"])
    text = tower(batch["input_ids"], batch["attention_mask"])
    pair = tower(**batch)
    assert pair.last_hidden_state.shape == (4, 16 + 6, 32)
    assert pair.token_types.tolist()[0] == [0] + [1] * 16 + [2, 2, 2, 3, 3]
    for row, ids in enumerate(texts_of(batch)):
        alone, fused = naive_alone(tower.text, ids), naive_fused(tower, ids, batch["pixel_values"][row])
        close(text.last_hidden_state[row, : len(ids)], alone)
        states = pair.last_hidden_state[row]
        close(states[pair.token_types[row] == 1], image.last_hidden_state[row, 1:])
        close(torch.cat([states[:1], states[17 : 16 + len(ids)]]), fused)
        close(text.pooler_output[row], tower.text_projection(alone[0]))
        unit = [normalize(one, dim=-1) for one in (image.pooler_output[row], tower.text_projection(alone[0]))]
        close(pair.pooler_output[row], (unit[0] + unit[1]) / 2)
    close(tower.get_multimodal_features(**batch).pooler_output, pair.pooler_output)


def test_a_pair_passes_each_layer_once_in_albef_and_simla_reads_its_text_twice(tower):
    batch, simla = inputs(LENGTHS), SimlaModel(simla_config()).eval()
    for model, expected in ((tower, [1, 1, 1, 1]), (simla, [2, 2, 2])):
        passes = [0] * len(expected)
        hooks = []
        for number, layer in enumerate(model.text.layers):

            def count(*_, number=number, passes=passes):
                passes[number] += 1

            hooks.append(layer.register_forward_hook(count))
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        assert passes == expected


@torch.no_grad()
def test_hidden_states_and_attentions_of_a_pair(tower):
    tower.set_attn_implementation("eager")
    output = tower(**inputs(LENGTHS), output_hidden_states=True, output_attentions=True)
    tower.set_attn_implementation("sdpa")
    # two of the image, two of the text, two that fuse; and what the first layer was given
    assert len(output.hidden_states) == 7 and len(output.attentions) == 6
    assert [weights.shape[-2:] for weights in output.attentions] == [(17, 17)] * 2 + [(6, 6)] * 4
    assert [weights.shape[-2:] for weights in output.cross_attentions] == [(6, 17)] * 2


@torch.no_grad()
def test_matching(tower):
    model, batch = built(CodisForImageTextRetrieval), inputs(LENGTHS)
    pixels, texts = batch["pixel_values"], texts_of(batch)
    expected = [[model.itm_head(naive_fused(model.codis, ids, picture)[0]) for picture in pixels[:3]] for ids in texts]
    pairs = model.match(**{name: value[:3] for name, value in batch.items()})
    close(pairs, torch.stack([expected[row][row] for row in range(3)]))
    states = model.get_image_features(pixels[:3]).last_hidden_state
    index = torch.tensor([2, 0, 1, 0])
    found = model.match(batch["input_ids"], batch["attention_mask"], image_states=states, context_index=index)
    close(found, torch.stack([expected[row][column] for row, column in enumerate(index.tolist())]))
    with pytest.raises(ValueError, match="got 4 texts and 3 pictures; expected as many of each"):
        model.match(batch["input_ids"], batch["attention_mask"], image_states=states)
    with pytest.raises(ValueError, match="either pixel_values or image_states"):
        model.match(**batch, image_states=states)


@torch.no_grad()
def test_retrieval_by_cosine():
    model, batch = built(CodisForImageTextRetrieval), inputs(LENGTHS)
    output = model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    text = torch.stack([model.codis.text_projection(naive_alone(model.codis.text, ids)[0]) for ids in texts_of(batch)])
    image = model.codis.vision_projection(model.codis.vision(batch["pixel_values"][:2])[:, 0])
    close(output.logits_per_image, normalize(image, dim=-1) @ normalize(text, dim=-1).T / model.temperature)


def test_grounding_by_a_layer_that_reads_the_image():
    model, batch = built(CodisForImageTextRetrieval), inputs(LENGTHS)
    for layer, number in ((None, 3), (2, 2), (-1, 3)):  # of fewer layers than the configuration names, the last
        asked = []
        attention = model.codis.text.layers[number].cross_attention
        hook = attention.register_forward_hook(lambda *call, asked=asked: asked.append(call[2][1]))
        maps = model.ground(**batch, layer=layer, pool="none")
        hook.remove()
        (table,) = asked  # what was attended, (B, H, T, S)
        (gradient,) = torch.autograd.grad(model.itm_head(fused_from(model, batch, number, table))[:, 1].sum(), table)
        expected = (table * gradient.clamp_min(0))[..., 1:].mean(1).unflatten(2, (4, 4))  # (B, T, h, w)
        torch.testing.assert_close(maps, expected * batch["attention_mask"][..., None, None], rtol=1e-3, atol=1e-7)
        assert maps.max() > 1e-6
    with pytest.raises(ValueError, match="layer 1 reads no image; expected one from 2 on"):
        model.ground(**batch, layer=1)
    assert model.ground(**batch, mode="itc", layer=0).shape == (4, 4, 4)


def fused_from(model, batch: dict, number: int, table: torch.Tensor) -> torch.Tensor:
    """[CLS] (B, D) of a run whose layer `number` attends the image by `table` instead of its own."""
    tower, attention = model.codis, model.codis.text.layers[number].cross_attention
    values = attention.heads(attention.value(tower.vision(batch["pixel_values"])))
    taken = attention.proj((table @ values).transpose(1, 2).flatten(2))
    hook = attention.register_forward_hook(lambda *_: (taken, table))
    states = tower(**batch).last_hidden_state
    hook.remove()
    return states[:, 0]


@torch.no_grad()
def test_masked_tokens_of_texts_and_of_pairs():
    model, batch = built(CodisForMaskedLM), inputs(LENGTHS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    pair, text = model(**batch, labels=labels), model(batch["input_ids"], batch["attention_mask"])
    assert pair.logits.shape == text.logits.shape == (4, 6, VOCAB)
    losses = []
    for row, ids in enumerate(texts_of(batch)):
        logits = model.lm_head(naive_fused(model.codis, ids, batch["pixel_values"][row]))
        close(pair.logits[row, : len(ids)], logits)
        close(text.logits[row, : len(ids)], model.lm_head(naive_alone(model.codis.text, ids)))
        losses.append(-logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    close(pair.loss, torch.cat(losses).mean())


def step(model, batch: dict):
    """Contrast within the batch, matching, masked tokens."""
    texts = batch["input_ids"]
    slots, words = texts.shape[1] - 1, batch["text_index"][batch["mlm_index"]]
    output = model(
        texts,
        batch["attention_mask"],
        batch["pixel_values"],
        batch["masked_input_ids"],
        words + words // slots + 1,
        ("contrast", "match", "tokens"),
        lambda *_: (batch["negative_images"], batch["negative_texts"]),
    )
    logits = output.image_embeds @ output.text_embeds.T / output.temperature
    matched = torch.tensor([1] * len(texts) + [0] * 2 * len(texts))
    losses = (logits, torch.arange(len(texts))), (output.itm_logits, matched), (output.mlm_logits, batch["mlm_labels"])
    return output, sum(torch.nn.functional.cross_entropy(*one) for one in losses)


def test_a_step_of_pretraining():
    model, batch = built(CodisForPreTraining).train(), simla_batch([3, 5, 1, 4])
    output, loss = step(model, batch)
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in model.parameters())
    reached = [name for name, p in model.named_parameters() if p.grad.abs().max() > 0]
    # a key's bias moves all scores of a query alike
    assert {name for name, _ in model.named_parameters()} - set(reached) <= {
        name for name, _ in model.named_parameters() if name.endswith("key.bias")
    }
    with torch.no_grad():
        texts, pixels, tower = texts_of(batch), batch["pixel_values"], model.codis
        one, other = batch["negative_images"], batch["negative_texts"]
        asked = [(ids, row) for row, ids in enumerate(texts)]
        asked += [(ids, one[row]) for row, ids in enumerate(texts)] + [(texts[other[row]], row) for row in range(4)]
        cls = torch.stack([naive_fused(tower, ids, pixels[picture])[0] for ids, picture in asked])
        close(output.itm_logits, model.itm_head(cls))
        masked = texts_of({**batch, "input_ids": batch["masked_input_ids"]})
        states = torch.cat([naive_fused(tower, ids, picture)[1:] for ids, picture in zip(masked, pixels, strict=True)])
        close(output.mlm_logits, model.lm_head(states[batch["mlm_index"]]))


@pytest.mark.parametrize("kind", [CodisForVisualReasoning, CodisForTextAssignment])
@torch.no_grad()
def test_two_images_alternate_in_the_fusion_layers_alone(kind):
    model, batch = built(kind, num_text_layers=3), inputs(LENGTHS, pictures=2)
    first, second = batch["pixel_values"].unbind(1)
    tower, states = model.codis, []
    assert model.lower == 3 and len(model.second_layers) == 2
    stack = [tower.text.layers[3], model.second_layers[0], tower.text.layers[4], model.second_layers[1]]
    for row, ids in enumerate(texts_of(batch)):
        x, seen = naive_embed(tower.text.embeddings, ids), tower.vision(batch["pixel_values"][row])
        for layer in tower.text.layers[:3]:
            x = naive_layer(layer, x)
        for place, layer in enumerate(stack):
            x = naive_layer(layer, x, seen[place % 2])
        states.append(x[0])
    if kind is CodisForVisualReasoning:
        close(model(**batch).logits, model.classifier(torch.stack(states)))
    else:
        rows = torch.arange(4)
        logits = model(**{**batch, "pixel_values": first}, choose=lambda cosines: (rows, rows.flip(0))).logits
        assert torch.equal(second, first.flip(0))  # so the two that are read are the same
        close(logits, model.assignment_head(torch.stack(states)))
    for place, one in enumerate(model.second_layers):
        assert one.cross_attention.key is tower.text.layers[3 + place].cross_attention.key


@torch.no_grad()
def test_answers_begin_as_the_fusion_layers():
    pretrained, model = built(CodisForPreTraining), built(CodisForVisualQuestionAnswering, seed=3)
    model.initialise_from(pretrained)
    for mine, theirs in zip(model.decoder.layers, pretrained.codis.text.layers[2:], strict=True):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    batch = inputs((3, 5, 2))
    out = model(**batch, answer_ids=ANSWERS[:3], answer_mask=MASK[:3])
    question = [naive_fused(model.codis, ids, batch["pixel_values"][row]) for row, ids in enumerate(texts_of(batch))]
    for row, states in enumerate(question):
        close(out.question_states[row, : len(states)], states)
    model.freeze_unused()
    assert all(parameter.requires_grad for parameter in model.parameters())  # there is no mask token


def test_a_pretraining_checkpoint_serves_every_class(tmp_path):
    trained, batch = built(CodisForPreTraining), inputs(LENGTHS)
    trained.save_pretrained(tmp_path)
    for kind in (CodisModel, CodisForImageTextRetrieval, CodisForMaskedLM, CodisForPreTraining):
        model, told = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
        with torch.no_grad():
            got, expected = (
                one.base_model(**batch).last_hidden_state for one in (model.eval(), copy.deepcopy(trained).eval())
            )
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert CodisConfig.from_pretrained(tmp_path).num_fusion_layers == 2
    assert "pair_layout" not in trained.config.to_dict()


def test_positions_of_another_size_are_learned_anew(tower):
    model = copy.deepcopy(tower)
    before = model(pixel_values=torch.ones(1, 3, 24, 24), interpolate_pos_encoding=True).last_hidden_state
    model.resize_positions(24)
    assert model.vision.embeddings.position_embeddings.shape == (1, 37, 32) and model.config.image_size == 24
    close(model(pixel_values=torch.ones(1, 3, 24, 24)).last_hidden_state, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiles_without_a_graph_break(tower, implementation):
    model, batch = copy.deepcopy(tower), inputs(LENGTHS)
    model.set_attn_implementation(implementation)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch)
        close(compiled.last_hidden_state, model(**batch).last_hidden_state)
