"""What is MoMo's own: its size, that the hidden is not seen and costs nothing, its decoders, its heads."""

import pytest
import tiny_momo
import torch
from families import FAMILIES, MASKED_LM, PRETRAINING, RETRIEVAL
from test_modeling_pretraining import naive_varlen
from tiny_oner import CLS, MASK, joint_batch, text_of
from transformers.utils import logging

from oner import (
    MomoConfig,
    MomoForMaskedLM,
    MomoForPreTraining,
    MomoForSequenceClassification,
    MomoForVisualQuestionAnswering,
    MomoModel,
)
from oner.modeling import vl_layers, vl_ragged
from oner.modeling.vl_ragged import Joined, Ragged, complement

FAMILY = FAMILIES["momo"]
PASSES = ("image", "text", "pair", "contrast", "match")


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("size", "text", "image"), [("base", 109.1, 85.65), ("large", 334.4, 303.1)])
def test_parameters_are_those_of_table_1(size, text, image):
    with torch.device("meta"):
        model = MomoModel(MomoConfig.from_size(size), add_pooling_layer=False)
    assert round(millions(model), 1) == text
    without_words = millions(model) - millions(model.embeddings.word_embeddings)
    assert without_words == pytest.approx(image, abs=0.005)


def test_decoders_are_maes_one_for_each_kind():
    with torch.device("meta"):
        model = MomoForPreTraining(MomoConfig())
        separate = MomoForPreTraining(MomoConfig(pair_decoder="separate"))
        shared = MomoForPreTraining(MomoConfig(shared_decoder=True))
    # MAE-B's decoder has 26.0 M, 0.1 M of them its table of positions
    assert millions(model.image_decoder) == pytest.approx(26.0, abs=0.1)
    assert model.image_decoder.pixel_head.out_features == 768 and model.text_decoder.pixel_head is None
    assert model.lm_head.decoder.weight is model.momo.embeddings.word_embeddings.weight

    def decoders(one):
        return [name.removesuffix("_decoder") for name, _ in one.named_children() if name.endswith("_decoder")]

    assert decoders(model) == ["image", "text", "pair"] and decoders(shared) == ["shared"]
    assert decoders(separate) == ["image", "text", "pair_image", "pair_text"]


def choose(images, texts, temperature):
    return torch.tensor([1, 2, 0, 0]), torch.tensor([2, 0, 1, 2])


def step(model, batch: dict, passes: tuple[str, ...] = PASSES, **options):
    names = ("input_ids", "attention_mask", "pixel_values", "bool_masked_pos", "text_index", "mlm_index")
    given = {name: batch[name] for name in names}
    return model(**given, passes=passes, choose_negatives=choose, **options)


def flat(output) -> dict[str, torch.Tensor]:
    groups = {"embedding": output.embeddings, "pixels": output.pixel_predictions, "words": output.mlm_logits}
    made = {f"{kind} {name}": value for kind, group in groups.items() for name, value in group.items()}
    return made if output.itm_logits is None else {**made, "itm": output.itm_logits}


@torch.no_grad()
def test_what_is_hidden_changes_nothing():
    """Other words and pixels where the encoder does not look: the same predictions; elsewhere, others."""
    model, batch = FAMILY.build(PRETRAINING), tiny_momo.make_batch([5, 3, 4, 2])
    hidden = batch["bool_masked_pos"].view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    pixels = torch.where(hidden, torch.randn_like(batch["pixel_values"]), batch["pixel_values"])
    ids = batch["input_ids"].clone()
    slots = batch["text_index"][batch["mlm_index"]]
    width = ids.shape[1] - 17
    ids[slots // width, 17 + slots % width] = 7
    masked = ("image", "text", "pair")
    before, after = (flat(step(model, one, masked)) for one in (batch, {**batch, "pixel_values": pixels,
                                                                        "input_ids": ids}))  # fmt: skip
    assert before.keys() == {"pixels image", "pixels pair", "words text", "words pair"}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    seen = flat(step(model, {**batch, "pixel_values": batch["pixel_values"] + ~hidden * 0.3}, masked))
    assert {name for name, value in before.items() if not torch.equal(value, seen[name])} == {
        "pixels image", "pixels pair", "words pair"
    }  # fmt: skip


@torch.no_grad()
def test_the_encoder_takes_visible_tokens_alone():
    model, batch = FAMILY.build(PRETRAINING), tiny_momo.make_batch([5, 3, 4, 2])
    rows = []
    model.momo.layers[0].register_forward_hook(lambda layer, given, made: rows.append(given[0].shape))
    words, masked = len(batch["text_index"]), len(batch["mlm_index"])
    expected = {"image": 4 + 4 * 11, "text": 4 + words - masked, "pair": 4 + 4 * 11 + words - masked}
    for name, tokens in expected.items():
        rows.clear()
        step(model, batch, (name,))
        assert rows == [(tokens, 32)], name
    # all passes that need no negatives in one run, the matched pairs in a second
    rows.clear()
    step(model, batch)
    others = (8 + 4 * 16 + words, 2 * (4 + 4 * 16 + words) + 4 + 4 * 16 + int(sum([4, 5, 3, 4])))
    assert rows == [(sum(expected.values()) + others[0], 32), (others[1], 32)]


@torch.no_grad()
def test_without_a_mask_nothing_is_padding():
    model, batch = FAMILY.build(PRETRAINING), tiny_momo.make_batch([4, 4, 4, 4])
    expected, made = (flat(step(model, one)) for one in (batch, {**batch, "attention_mask": None}))
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_without_padding_attend_as_padded_ones_do(monkeypatch, masked):
    """What a GPU's kernel for unequal lengths is given, answered by a loop: same outputs and gradients."""
    told = []
    batch = tiny_momo.make_batch([5, 1, 3, 4], dtype=torch.float64)
    batch["bool_masked_pos"][1] = torch.arange(16) > 2
    for unpadded in (False, True):
        torch.manual_seed(0)
        model = FAMILY.build(PRETRAINING).double().train()
        if unpadded:
            monkeypatch.setattr(vl_layers, "varlen_attn", naive_varlen)
            monkeypatch.setattr(vl_ragged, "attends_unpadded", lambda *_: True)
        values = flat(step(model, batch, match_masked=masked))
        sum(value.square().sum() for value in values.values()).backward()
        told.append((values, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}))
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys() and len(one) >= 7
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("form", [{}, {"pair_decoder": "separate"}, {"shared_decoder": True}])
def test_the_masked_language_model_is_what_was_trained(form, tmp_path):
    """[MASK] in padded ids: the logits of the packed step, of texts alone and beside an image that is seen whole."""
    model, batch = FAMILY.build(PRETRAINING, **form), tiny_momo.make_batch([5, 3, 4, 2])
    model.save_pretrained(tmp_path)
    masked_lm = MomoForMaskedLM.from_pretrained(tmp_path).eval()
    whole = {**batch, "bool_masked_pos": torch.zeros_like(batch["bool_masked_pos"])}
    made = step(model, whole, ("text", "pair")).mlm_logits
    ids = batch["input_ids"].clone()
    slots, width = batch["text_index"][batch["mlm_index"]], ids.shape[1] - 17
    ids[slots // width, 17 + slots % width] = MASK
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    pair = masked_lm(**inputs, pixel_values=batch["pixel_values"]).logits
    text = masked_lm(**text_of({**batch, **inputs})).logits
    torch.testing.assert_close(pair[slots // width, 17 + slots % width], made["pair"], rtol=0, atol=1e-5)
    torch.testing.assert_close(text[slots // width, 1 + slots % width], made["text"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_match_is_what_was_trained(tmp_path):
    model, batch = FAMILY.build(PRETRAINING), tiny_momo.make_batch([5, 3, 4, 2])
    model.save_pretrained(tmp_path)
    retrieval = FAMILY.classes[RETRIEVAL].from_pretrained(tmp_path).eval()
    expected = step(model, batch, ("contrast", "match")).itm_logits
    pairs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    torch.testing.assert_close(retrieval.match(**pairs), expected[:4], rtol=0, atol=1e-5)
    context = retrieval.matching_context(batch["pixel_values"])
    assert context.shape == (4, 16, 32)
    index = choose(None, None, None)[0]
    others = retrieval.match(**text_of(batch), image_states=context, context_index=index)
    torch.testing.assert_close(others, expected[4:8], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="either pixel_values or image_states, and got both or neither"):
        retrieval.match(**text_of(batch))
    with pytest.raises(ValueError, match="got 3 texts and 4 pictures"):
        retrieval.match(input_ids=torch.full((3, 1), CLS), image_states=context)


def test_decoders_stay_behind_unless_they_are_asked_for(tmp_path, caplog):
    model = FAMILY.build(PRETRAINING, save_decoders=False)
    logger = logging.get_logger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    logger.propagate = propagate
    left = "image_decoder, text_decoder, pair_decoder, lm_head of this stage are left behind"
    assert any(left in record.message for record in caplog.records) or not caplog.records
    again, report = MomoForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    heads = {name.partition(".")[0] for name in report["missing_keys"]}
    assert heads == {"image_decoder", "text_decoder", "pair_decoder", "lm_head"}
    for name, value in model.state_dict().items():
        if name.partition(".")[0] not in heads or name == "lm_head.decoder.weight":
            assert torch.equal(again.state_dict()[name], value), name
    assert again.lm_head.decoder.weight is again.momo.embeddings.word_embeddings.weight


def test_an_image_needs_a_decoder_of_pairs():
    model = FAMILY.classes[MASKED_LM](tiny_momo.tiny_config(decoders=["text"]))
    batch = joint_batch([3])
    with pytest.raises(ValueError, match="there is no pair_decoder: decoders are .'text'., those of another stage"):
        model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])


def test_texts_are_classified_and_scored():
    batch = text_of(joint_batch([5, 3]))
    model = MomoForSequenceClassification(tiny_momo.tiny_config(num_labels=3)).eval()
    output = model(**batch, labels=torch.tensor([2, 0]))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, expected)
    # one label is a score, as of STS-B
    model = MomoForSequenceClassification(tiny_momo.tiny_config(num_labels=1)).eval()
    output = model(**batch, labels=torch.tensor([2.5, 0.0]))
    expected = (output.logits[:, 0] - torch.tensor([2.5, 0.0])).square().mean()
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="MomoForSequenceClassification expects input_ids, got None"):
        model(pixel_values=torch.zeros(1, 3, 16, 16))


def test_questions_are_answered_by_one_of_many():
    batch = joint_batch([5, 3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    model = MomoForVisualQuestionAnswering(tiny_momo.tiny_config(num_labels=7)).eval()
    one = model(**inputs, labels=torch.tensor([6, 1]))
    assert one.logits.shape == (2, 7)
    torch.testing.assert_close(one.loss, torch.nn.functional.cross_entropy(one.logits, torch.tensor([6, 1])))
    soft = torch.zeros(2, 7)
    soft[0, 6], soft[0, 2], soft[1, 1] = 1.0, 0.3, 0.6
    loss = model(**inputs, labels=soft).loss
    naive = -(soft * one.logits.sigmoid().log() + (1 - soft) * (1 - one.logits.sigmoid()).log()).sum() / 2
    torch.testing.assert_close(loss, naive)
    with pytest.raises(ValueError, match="answers about pictures: it expects input_ids and pixel_values"):
        model(**text_of(batch))


# rows of unequal length


def test_rows_are_chosen_joined_and_taken_apart():
    words = Ragged(torch.arange(6.0)[:, None], torch.tensor([0, 0, 2, 2, 2, 3]), rows=4)
    assert words.counts.tolist() == [2, 0, 3, 1] and words.width() == 3
    assert words.slots(3).tolist() == [0, 1, 6, 7, 8, 9]
    chosen = words.select(torch.tensor([2, 1, 0, 2]))
    assert chosen.states.flatten().tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert chosen.row.tolist() == [0, 0, 0, 2, 2, 3, 3, 3] and chosen.rows == 4
    patches = Ragged.of_rectangle(10 + torch.arange(8.0).view(4, 2, 1))
    assert patches.select(torch.tensor([3, 0])).states.flatten().tolist() == [16, 17, 10, 11]
    both = Joined.of([patches, words])
    assert both.whole.states.flatten().tolist() == [10, 11, 0, 1, 12, 13, 14, 15, 2, 3, 4, 16, 17, 5]
    one, other = both.apart(both.whole.states)
    assert torch.equal(one, patches.states) and torch.equal(other, words.states)
    assert complement(torch.tensor([4, 1]), 6).tolist() == [0, 2, 3, 5]
    assert complement(torch.zeros(0, dtype=torch.long), 2).tolist() == [0, 1]
