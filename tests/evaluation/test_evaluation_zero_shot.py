"""Zero-shot classification: exact numbers with embeddings that the test lays down, guidance, prompts, real pairs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation.guidance import guidance_sheet, guided_examples
from oner.training.evaluation.prompts import (
    class_name_sets,
    fill,
    load_class_names,
    load_templates,
    template_sets,
    usual_templates,
)
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator, class_embeddings, rerank

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji"
WORDS = ["red", "green", "blue", "a", "dark", "photo", "of"]


class Words(torch.nn.Module):
    """Embeds a picture as its colour and a text as the sum of its words' vectors; with both, `mix` decides."""

    vectors = torch.tensor(
        [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.1, 0.1, 0.1], [0.3, 0.3, 0], [0.0, 0.2, 0], [0.0, 0, 0.2]]
    )

    def __init__(self, mix=None):
        super().__init__()
        self.anchor, self.mix, self.asked = torch.nn.Parameter(torch.zeros(())), mix, []

    def get_image_features(self, pixel_values):
        return SimpleNamespace(pooler_output=pixel_values)

    def get_text_features(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=(self.vectors[input_ids] * attention_mask[..., None]).sum(1))

    def get_multimodal_features(self, input_ids, attention_mask, pixel_values):
        self.asked.append(len(input_ids))
        return SimpleNamespace(pooler_output=self.mix(pixel_values, self.get_text_features(input_ids, attention_mask)))


def word_processor(images=None, text=None, **_):
    batch = {}
    if images is not None:
        batch["pixel_values"] = torch.tensor([image.getpixel((0, 0)) for image in images]).float() / 255
    if text is not None:
        rows = [[WORDS.index(word) for word in line.split()] for line in text]
        width = max(map(len, rows))
        batch["input_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        batch["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return batch


def colour(*rgb) -> Image.Image:
    return Image.new("RGB", (2, 2), rgb)


def unit(vector):
    return vector / vector.norm()


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts():
    v = dict(zip(WORDS, Words.vectors, strict=True))
    found = class_embeddings(Words(), word_processor, ["red", ["green", "blue"]], ["{}", "a dark {}"], batch_size=2)
    red = unit(unit(v["red"]) + unit(v["a"] + v["dark"] + v["red"]))
    other = [unit(v[c]) + unit(v["a"] + v["dark"] + v[c]) for c in ("green", "blue")]
    torch.testing.assert_close(found, torch.stack([red, unit(sum(other))]))


def test_top_k_by_hand():
    images = [colour(250, 10, 0), colour(0, 250, 0), colour(90, 0, 200), colour(90, 0, 200)]
    evaluator = ZeroShotClassificationEvaluator(
        images, [0, 1, 0, 1], ["red", "green", "blue"], ["{}"], top_k=(1, 2), name="s", progress=False
    )
    values = dict(evaluator.run(Words(), word_processor))
    assert values["s/zero_shot_top1"] == 0.5 and values["s/zero_shot_top2"] == 0.75
    assert values["s/zero_shot_chance1"] == pytest.approx(1 / 3) and "s/bootstrap_top1" not in values


def test_guidance_reorders_the_candidates_and_only_these():
    # The picture is blue, then green, then red; beside a word the model sees the word's colour, but mistrusts blue.
    def mix(pixels, text):
        words = text.pooler_output
        return words * torch.tensor([1.0, 1.0, -1.0])

    images = [colour(60, 120, 200)]
    common = {"class_names": ["red", "green", "blue"], "templates": ["{}"], "top_k": (1, 2), "name": "s"}
    for label, candidates, expected in ((1, 2, 1.0), (2, 2, 0.0), (0, 3, 0.5), (2, 1, 1.0)):
        # With three candidates red and green tie at s' = 1 before blue, so that each is first half the time.
        evaluator = ZeroShotClassificationEvaluator(
            images, [label], bootstrap=True, candidates=candidates, guided_text="name", progress=False, **common
        )
        values = dict(evaluator.run(Words(mix), word_processor))
        assert values["s/bootstrap_top1"] == expected, (label, candidates)
        assert values["s/zero_shot_top1"] == float(label == 2)
    summed = ZeroShotClassificationEvaluator(
        images, [1], bootstrap=True, guided_text="name", guided_score="sum", progress=False, **common
    )
    assert dict(summed.run(Words(mix), word_processor))["s/bootstrap_top1"] == 1.0  # s breaks the tie of s'


def test_guidance_asks_every_picture_with_its_own_candidates():
    model = Words(lambda pixels, text: pixels + text.pooler_output)
    images = [colour(200, 100, 0), colour(0, 100, 200), colour(0, 200, 100)]
    evaluator = ZeroShotClassificationEvaluator(
        images, [0, 2, 1], ["red", "green", "blue"], ["{}"], batch_size=4, bootstrap=True, candidates=2,
        guided_template="a photo of {}", progress=False,
    )  # fmt: skip
    v = dict(zip(WORDS, Words.vectors, strict=True))
    pixels = torch.tensor([[200.0, 100, 0], [0, 100, 200], [0, 200, 100]]) / 255
    classes = torch.eye(3)
    scores = torch.nn.functional.normalize(pixels, dim=-1) @ classes.T
    found, guided = evaluator.guide(model, word_processor, images, scores, classes)
    assert model.asked == [4, 2]
    assert found.tolist() == [[0, 1], [2, 1], [1, 2]]
    prompts = torch.stack([v["a"] + v["photo"] + v["of"] + v[c] for c in ("red", "green", "blue")])
    for picture, candidates in enumerate(([0, 1], [2, 1], [1, 2])):
        expected = [float(unit(pixels[picture] + prompts[c]) @ unit(prompts[c])) for c in candidates]
        assert guided[picture].tolist() == pytest.approx(expected, abs=1e-5)
        (rest,) = set(range(3)) - set(candidates)
        assert rerank(scores, found, guided)[picture].argmin() == rest


def test_only_some_pictures_are_guided_and_compared_with_themselves():
    model = Words(lambda pixels, text: text.pooler_output)
    images = [colour(250, 0, 0), colour(0, 250, 0), colour(0, 0, 250), colour(0, 250, 0), colour(0, 0, 250)]
    evaluator = ZeroShotClassificationEvaluator(
        images, [1, 1, 2, 1, 2], ["red", "green", "blue"], ["{}"], (1,), bootstrap=True, candidates=2, name="s",
        bootstrap_rows=2, progress=False, guided_text="name",
    )  # fmt: skip
    values = dict(evaluator.run(model, word_processor))
    assert model.asked == [4] and evaluator.guided_rows == [0, 2]
    assert evaluator.protocol["guidance"]["pictures"] == 2 and evaluator.protocol["pictures"] == 5
    assert values["s/zero_shot_top1"] == 0.8 and values["s/bootstrap_without_top1"] == 0.5
    # each candidate fits itself, so that guidance ties: the one that was right is so for sure no longer
    assert [values[f"s/bootstrap_{name}"] for name in ("gained", "lost", "mcnemar_p")] == [0, 1, 1]
    with pytest.raises(ValueError, match="a limit must be at least 1, got -1"):
        ZeroShotClassificationEvaluator(images, [0] * 5, ["red"], bootstrap_rows=-1)


def test_the_sheet_lists_classes_before_and_after_with_the_right_one_marked():
    names = ["sun", "moon", "star", "cloud", "rain", "snow", "wind"]
    scores = torch.tensor([[0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    guided = torch.tensor([[0.11, 0.12, 0.93], [0.81, 0.82, 0.83]])
    reranked = rerank(scores, scores.topk(3).indices, guided)
    pictures, labels = [colour(9, 9, 9), colour(200, 9, 9)], torch.tensor([2, 1])
    first, second = guided_examples(pictures, labels, scores, reranked, guided, 8)
    assert (first.before[:4], first.after[:4]) == ([0, 1, 2, 3], [2, 1, 0, 3]) and first.label == 2
    assert first.before_scores == pytest.approx([0.7, 0.6, 0.5])
    assert first.after_scores == pytest.approx([0.93, 0.12, 0.11])
    assert second.before[:3] == [6, 5, 4] and second.after[:3] == [4, 5, 6] and second.label == 1
    (chosen,) = guided_examples(pictures, torch.tensor([6, 6]), scores, reranked, guided, 1)
    assert chosen.picture is pictures[1]  # the other's right class is no candidate
    figure = guidance_sheet([first, second], names, "a title")
    texts = {text.get_text(): text for axes in figure.axes for text in axes.texts}
    assert texts["star  (0.50)"].get_weight() == texts["star  (0.93)"].get_weight() == "bold"
    assert texts["sun  (0.70)"].get_weight() == "normal" and "moon  (rank 6)" in texts
    with pytest.raises(ValueError, match="at least one picture"):
        guidance_sheet([], names, "a title")


def test_rerank_keeps_the_rest_below_and_in_order():
    torch.manual_seed(0)
    scores, guided = torch.rand(5, 20) * 2 - 1, torch.rand(5, 10) * 2 - 1
    candidates = scores.topk(10).indices
    order = rerank(scores, candidates, guided).argsort(dim=1, descending=True)
    assert torch.equal(order[:, :10], candidates.gather(1, guided.argsort(dim=1, descending=True)))
    assert torch.equal(order[:, 10:], scores.argsort(dim=1, descending=True)[:, 10:])


def test_shipped_templates_and_names():
    assert load_templates("slip") == [
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
    ]  # fmt: skip
    assert len(load_templates("cifar")) == len(set(load_templates("cifar"))) == 18
    assert all(template.count("{}") == 1 for name in template_sets() for template in load_templates(name))
    assert {name: len(load_class_names(name)) for name in class_name_sets()} == {
        "cifar10": 10, "cifar100": 100, "imagenet": 1000,
    }  # fmt: skip
    imagenet, cifar = load_class_names("imagenet"), load_class_names("cifar100")
    assert (imagenet[0], imagenet[281], imagenet[999]) == ("tench", "tabby cat", "toilet paper")
    assert (cifar[0], cifar[51], cifar[99]) == ("apple", "mushroom", "worm") and cifar == sorted(cifar)
    assert fill(["a {}.", "{}"], ["x{", "y"]) == ["a x{.", "a y.", "x{", "y"]


def test_templates_belong_to_class_names():
    sets = {None: "name", "cifar10": "cifar", "cifar100": "cifar", "imagenet": "slip", "mine.json": "slip"}
    assert {names: usual_templates(names) for names in sets} == sets


@pytest.mark.parametrize("resized_first", [False, True])
def test_the_aspect_is_kept_on_request(resized_first):
    wide = Image.new("RGB", (128, 32), (0, 0, 0))
    wide.paste((255, 255, 255), (40, 0, 88, 32))  # its middle square is white, most of it is black
    model = Words(lambda pixels, text: text.pooler_output)
    model.config = SimpleNamespace(image_size=16)
    shown = {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    read = VisionLanguageImageProcessor(**(shown if resized_first else {"size": shown["crop_size"]}), patch_size=8)
    seen = []

    def processor(images=None, text=None, padding=None, truncation=None, **options):
        batch = {} if text is None else word_processor(text=text)
        if images is not None:
            seen.append(read(images, **options)["pixel_values"])
            batch["pixel_values"] = seen[-1].mean((2, 3))
        return batch

    how = {"class_names": ["red", "a"], "templates": ["{}"], "progress": False, "bootstrap": True, "candidates": 1}
    for kept in (True, False):
        evaluator = ZeroShotClassificationEvaluator([wide], [0], keep_aspect=kept, guided_text="name", **how)
        dict(evaluator.run(model, processor))
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 16, 16)] * 4  # alone and beside a class, twice
    assert [bool(pixels.std((2, 3)).max() < 1e-3) for pixels in seen] == [True, True] + [resized_first] * 2


def test_own_templates_from_a_file_and_bad_ones(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('["a drawing of {}"]')
    assert load_templates(str(path)) == ["a drawing of {}"]
    with pytest.raises(ValueError, match="unknown templates 'slipp'; known: cifar, emoji, name, photo, slip"):
        load_templates("slipp")
    with pytest.raises(ValueError, match="exactly one \"{}\", got 'a photo'"):
        ZeroShotClassificationEvaluator([colour(1, 1, 1)], [0], ["red"], ["a photo"])
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.0, got 1"):
        ZeroShotClassificationEvaluator([colour(1, 1, 1)], [1], ["red"])
    with pytest.raises(ValueError, match="got 1 pictures and 2 labels"):
        ZeroShotClassificationEvaluator([colour(1, 1, 1)], [0, 0], ["red"])
    with pytest.raises(ValueError, match="guided_score must be one of"):
        ZeroShotClassificationEvaluator([colour(1, 1, 1)], [0], ["red"], guided_score="both")


def test_a_random_oner_on_unseen_concepts():
    pairs = open_rows(EMOJI / "test_concept.parquet", id_column="hexcode")
    concepts = {pairs[number]["id"] for number in range(15)}
    rows = [row for row in pairs if row["id"] in concepts]
    tokenizer = train_tokenizer((text for row in rows for text in row["captions"]), vocab_size=300)
    torch.manual_seed(0)
    config = OneRConfig.from_size(
        "nano", image_size=32, patch_size=8, vocab_size=len(tokenizer), cls_token_id=3, mask_token_id=4
    )
    processor = VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8), tokenizer
    )
    evaluator = ZeroShotClassificationEvaluator.from_rows(rows, bootstrap=True, name="emoji", progress=False)
    assert evaluator.class_names == [row["captions"][0] for row in rows[:15]]
    values = dict(evaluator.run(OneRForImageTextRetrieval(config), processor))
    assert values["emoji/zero_shot_chance5"] == pytest.approx(5 / 15)
    assert 0 <= values["emoji/zero_shot_top1"] <= values["emoji/zero_shot_top5"] < 1
    assert 0 <= values["emoji/bootstrap_top1"] <= values["emoji/bootstrap_top5"] < 1
    assert evaluator.protocol["guidance"]["candidates"] == 10 and len(evaluator.protocol["templates"]) == 7
