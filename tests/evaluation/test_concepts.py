"""What the concept head names: maps against autograd on a stack written out, scores by hand, sheets not blank."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_grounding import naive_cam, visual_score
from tiny_simla import randomised, simla_batch, tiny_config
from tiny_simla_pictures import assert_not_blank, make_processor, make_simla, real_rows
from torch.nn.functional import normalize

from oner import SimlaForImageTextRetrieval, SimlaForPreTraining
from oner.training.evaluation.concepts import (
    ConceptEvaluator,
    average_precision,
    beyond_usual,
    caption_words,
    concept_probabilities,
    concept_scores,
    concept_sheet,
    ranks_of,
)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def small(processor):
    return make_simla(SimlaForPreTraining, processor)


@pytest.mark.parametrize("reads", ["projected", "cls"])
def test_maps_are_gradcam_of_the_heads_logit(reads):
    torch.manual_seed(0)
    model = randomised(SimlaForPreTraining(tiny_config(concept_input=reads))).double().eval()
    batch, words = simla_batch([3, 5, 2], dtype=torch.float64), torch.tensor([7, 30, 12])
    pixels = batch["pixel_values"]
    for layer in (None, 0):
        maps = model.ground_concepts(pixels, words, layer)
        for row in range(3):

            def logit(cls, row=row):
                if reads == "projected":
                    cls = normalize(model.simla.vision_projection(cls), dim=-1)
                return model.concept_head(cls)[words[row]]

            chosen = 1 if layer is None else layer
            cam = naive_cam(lambda t, r=row, c=chosen, s=logit: visual_score(model, pixels[r], c, s, t))
            torch.testing.assert_close(maps[row], cam[:, 0, 1:].mean(0).reshape(4, 4), rtol=1e-9, atol=1e-15)
            assert maps[row].max() > 1e-9
    with torch.no_grad():
        keys = ("input_ids", "attention_mask", "pixel_values")
        expected = model(**{name: batch[name] for name in keys}, passes=("concepts",)).concept_logits
        torch.testing.assert_close(model.concepts(pixels), expected)
    with pytest.raises(ValueError, match="one token id a picture"):
        model.ground_concepts(pixels, words[:2])
    with pytest.raises(ValueError, match="eval mode"):
        model.train().ground_concepts(pixels, words)


def test_scores_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0])  # order: 1, 2, 3, 0, 4
    assert ranks_of(scores, {3, 1, 4}).tolist() == [1, 3, 5]
    assert average_precision(torch.tensor([1, 3, 5])) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(torch.tensor([1, 2])) == 1
    got = concept_scores(torch.stack([scores, scores]), [{1, 3, 4}, {4}], ks=(1, 3))
    assert got == {
        "mean_average_precision": pytest.approx(((1 + 2 / 3 + 3 / 5) / 3 + 1 / 5) / 2),
        "precision@1": 0.5, "hit@1": 0.5, "recall@1": pytest.approx(1 / 6),
        "precision@3": pytest.approx(2 / 6), "hit@3": 0.5, "recall@3": pytest.approx(2 / 6),
    }  # fmt: skip


def test_what_sets_a_picture_apart():
    found = torch.tensor([[0.9, 0.2, 0.5, 0.0], [0.9, 0.1, 0.4, 0.0]])
    surer = beyond_usual(found, found.mean(0))
    assert surer[0, 0] == 0 and surer[0].argmax() == 1 and surer[:, 3].eq(-torch.inf).all()
    assert float(surer[0, 1]) == pytest.approx(math.log(0.2 / 0.8) - math.log(0.15 / 0.85), abs=1e-5)


def test_average_precision_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        scores = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        right = {3 * seed, 7, 21, 39}
        labels = [int(word in right) for word in range(40)]
        expected = metrics.average_precision_score(labels, scores.numpy())
        assert average_precision(ranks_of(scores, right)) == pytest.approx(expected, abs=1e-6)


def test_words_are_the_models_tokens_without_special_ones(processor):
    words = caption_words(processor, ["red apple", "a red apple"])
    tokens = processor.tokenizer.convert_ids_to_tokens(sorted(words))
    assert "red" in tokens and not {"[CLS]", "[PAD]", "[UNK]"} & set(tokens)
    assert words == caption_words(processor, ["a red apple"])


def test_special_tokens_are_never_named(small, processor):
    images = [row["image"] for row in real_rows(3)]
    found = concept_probabilities(small, processor, images, batch_size=2)
    assert found.shape == (3, len(processor.tokenizer)) and found.std(0).max() > 1e-4
    assert found[:, processor.tokenizer.cls_token_id].eq(0).all() and found[:, processor.image_token_id].eq(0).all()
    with pytest.raises(TypeError, match="concept head, such as SimlaForPreTraining, got SimlaForImageTextRetrieval"):
        concept_probabilities(make_simla(SimlaForImageTextRetrieval, processor), processor, images)


class Knowing(torch.nn.Linear):
    """Answers with the words of the captions, in the order of the rows."""

    config = SimpleNamespace(image_size=32, patch_size=8, num_hidden_layers=1, hidden_size=1, name_or_path="")

    def __init__(self, words, size):
        super().__init__(1, 1)
        self.words, self.size, self.place = words, size, 0

    def concepts(self, pixel_values):
        logits = torch.full((len(pixel_values), self.size), -5.0)
        for row in range(len(pixel_values)):
            logits[row, sorted(self.words[self.place % len(self.words)])] = 5.0
            self.place += 1
        return logits

    def ground_concepts(self, pixel_values, token_ids, layer=None):
        return torch.rand(len(pixel_values), 4, 4)


def test_a_head_that_knows_is_right_and_one_list_for_all_is_not(processor):
    rows = real_rows(12)
    words = [caption_words(processor, row["captions"]) for row in rows]
    model = Knowing(words, len(processor.tokenizer))
    results = dict(ConceptEvaluator(rows, ks=(1, 5), batch_size=5, progress=False).run(model, processor))
    for name in ("concept_sheet", "beyond_usual_sheet"):
        assert_not_blank(results.pop(f"concepts/{name}"))
    assert results["concepts/concept_mean_average_precision"] == 1
    assert results["concepts/concept_precision@1"] == results["concepts/concept_hit@5"] == 1
    assert results["concepts/same_words_mean_average_precision"] < 0.9
    assert results["concepts/beyond_usual_precision@1"] == 1
    assert len(results) == 21 and all(0 <= value <= 1 for value in results.values())


def test_evaluator_with_a_model(small, processor):
    results = dict(ConceptEvaluator(real_rows(20), shown=2, progress=False).run(small, processor))
    assert_not_blank(results.pop("concepts/beyond_usual_sheet"))
    assert 0 < results["concepts/concept_mean_average_precision"] < 1
    sheet = concept_sheet(small, processor, real_rows(2), k=3)
    assert len(sheet.axes) == 8 and "%" in sheet.axes[1].get_xlabel()
