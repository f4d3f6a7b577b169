"""Retrieval evaluators: exact numbers with embeddings that the test lays down; a small random OneR on real pairs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation.embedding import Gallery, embed_images, embed_pairs, embed_texts, picture_key
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator, caption_table
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji"


class Colours(torch.nn.Module):
    """A model whose embeddings are known: of a picture its colour, of a text the three numbers it consists of."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def get_image_features(self, pixel_values):
        return SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))

    def get_text_features(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=input_ids.float())

    def get_multimodal_features(self, input_ids, attention_mask, pixel_values):
        return SimpleNamespace(pooler_output=input_ids.float() + pixel_values.mean((2, 3)))


def colour_processor(images=None, text=None, **_):
    batch = {}
    if images is not None:
        batch["pixel_values"] = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])
    if text is not None:
        batch["input_ids"] = torch.tensor([[int(word) for word in line.split()] for line in text])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def colour_row(colour, captions, concept=None):
    row = {"image": Image.new("RGB", (4, 4), tuple(map(int, colour))), "captions": captions}
    return row if concept is None else {**row, "id": concept}


def words(colour) -> str:
    return " ".join(str(int(part)) for part in colour)


def unit(colours) -> np.ndarray:
    colours = np.asarray(colours, dtype=np.float64)
    return colours / np.linalg.norm(colours, axis=1, keepdims=True)


def share_found(queries, gallery, right, k) -> float:
    found = 0
    for number, query in enumerate(queries):
        order = np.argsort(-(gallery @ query), kind="stable")[:k]
        found += any(right(number, int(item)) for item in order)
    return found / len(queries)


@pytest.mark.parametrize("captions", ["all", "first"])
def test_numbers_equal_loops_by_hand(captions):
    rng = np.random.default_rng(3)
    colours = rng.integers(1, 256, (30, 3))
    texts = [np.clip(colour + rng.integers(-60, 60, (rng.integers(1, 6), 3)), 1, 255) for colour in colours]
    rows = [colour_row(c, [words(t) for t in own]) for c, own in zip(colours, texts, strict=True)]
    kept = [own if captions == "all" else own[:1] for own in texts]
    owners = np.repeat(np.arange(30), [len(own) for own in kept])
    evaluator = RetrievalEvaluator(rows, batch_size=7, ks=(1, 5), name="set", captions=captions, progress=False)
    values = dict(evaluator.run(Colours(), colour_processor))
    pictures, sentences = unit(colours), unit(np.concatenate(kept))
    for k in (1, 5):
        tr = share_found(pictures, sentences, lambda q, g: owners[g] == q, k)
        ir = share_found(sentences, pictures, lambda q, g: owners[q] == g, k)
        assert values[f"set/tr_r@{k}"] == pytest.approx(tr) and values[f"set/ir_r@{k}"] == pytest.approx(ir)
        assert values[f"set/ir_chance@{k}"] == pytest.approx(k / 30)
        assert values[f"set/ir_chance@{k}"] < ir < 1
    assert values["set/gap"] == pytest.approx(np.linalg.norm(pictures.mean(0) - sentences.mean(0)), abs=1e-6)
    assert values["set/r_mean"] == pytest.approx(
        np.mean([values[f"set/{d}_r@{k}"] for d in ("tr", "ir") for k in (1, 5)])
    )
    assert evaluator.protocol["texts"] == len(owners) and evaluator.protocol["captions"] == captions


def test_rows_of_one_concept_are_positives_and_bring_a_shared_caption_once():
    rows = [
        colour_row((200, 10, 10), ["200 9 9", "150 20 10"], "red"),
        colour_row((10, 200, 10), ["9 200 9"], "green"),
        colour_row((10, 10, 200), ["200 9 9", "200 9 9"], "red"),
    ]
    texts, owners = caption_table(rows, "all")
    assert texts == ["200 9 9", "150 20 10", "9 200 9"] and owners == [0, 0, 1]
    values = dict(RetrievalEvaluator(rows, ks=(1,), name="s", progress=False).run(Colours(), colour_processor))
    assert values["s/ir_r@1"] == 1.0  # each caption meets a picture of its concept
    assert values["s/tr_r@1"] == 1.0 and values["s/ir_chance@1"] == pytest.approx((2 + 2 + 1) / 9)
    kept, _ = caption_table([{"captions": ["a", "a"]}, {"captions": ["a"]}], "all")
    assert kept == ["a", "a", "a"]  # rows without id are different concepts, and no caption within a row is dropped


def test_picture_and_caption_together_find_what_neither_finds_alone():
    # Concepts differ in red (told by the caption) and in green (told by the picture); the query knows one of each.
    rows = [
        colour_row((200, 200, 10), ["200 1 1"], "both"),
        colour_row((190, 190, 10), ["200 1 1"], "both"),
        colour_row((200, 10, 10), ["200 1 1"], "red"),
        colour_row((10, 200, 10), ["1 200 1"], "green"),
    ]
    query = [colour_row((1, 200, 1), ["200 1 1"], "both")]
    evaluator = MultimodalRetrievalEvaluator(query, rows, ks=(1,), name="s", progress=False)
    values = dict(evaluator.run(Colours(), colour_processor))
    assert values["s/multimodal_both_r@1"] == 1.0
    assert values["s/multimodal_image_r@1"] == 0.0 and values["s/multimodal_text_r@1"] == 0.0
    assert values["s/multimodal_chance@1"] == pytest.approx(0.5) and values["s/multimodal_queries"] == 1


def test_each_caption_of_a_row_asks_once_with_its_picture():
    # the first caption tells what the picture lacks, the second leads away: 1 of 2 queries of the first row is right
    rows = [
        colour_row((200, 200, 10), ["1 1 1"], "both"),
        colour_row((10, 10, 200), ["1 1 1"], "blue"),
    ]
    query = [
        colour_row((1, 200, 1), ["200 1 1", "1 1 255"], "both"),
        colour_row((1, 1, 200), ["1 1 200"], "blue"),
    ]
    values = {}
    for captions in ("first", "all"):
        evaluator = MultimodalRetrievalEvaluator(
            query, rows, ks=(1,), name=captions, progress=False, captions=captions
        )
        values |= evaluator.run(Colours(), colour_processor)
    assert (values["first/multimodal_queries"], values["all/multimodal_queries"]) == (2, 3)
    assert values["first/multimodal_text_r@1"] == 1.0 and values["all/multimodal_text_r@1"] == pytest.approx(2 / 3)
    assert values["all/multimodal_image_r@1"] == 1.0  # a picture counts as often as it is asked with a caption
    assert evaluator.protocol["captions"] == "all" and evaluator.protocol["pictures"] == 2


def test_own_picture_is_excluded_and_queries_without_another_are_left_out():
    rows = [
        colour_row((200, 20, 20), ["1 1 200"], "a"),
        colour_row((20, 20, 200), ["1 1 200"], "a"),
        colour_row((30, 20, 190), ["1 200 1"], "alone"),
        colour_row((90, 90, 90), ["1 200 1"]),
    ]
    evaluator = MultimodalRetrievalEvaluator(rows, ks=(1, 3), name="s", progress=False)
    assert evaluator.asked == [0, 1] and evaluator.protocol["pictures_left_out"] == 2
    values = dict(evaluator.run(Colours(), colour_processor))
    assert values["s/multimodal_image_r@1"] == 0.0  # with itself in the gallery it would be 1
    assert values["s/multimodal_image_r@3"] == 1.0 and values["s/multimodal_chance@1"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="none of the 2 query rows has another picture of its concept"):
        MultimodalRetrievalEvaluator(rows[2:])
    with pytest.raises(ValueError, match="none of the 1 query rows"):  # rows without ids are no concept of each other
        MultimodalRetrievalEvaluator([rows[3]], [colour_row((9, 9, 9), ["1 1 1"])])


def test_a_picture_that_stands_in_several_rows_is_searched_once():
    """As tables with a row a caption have it: five copies of one wrong picture would fill five places."""
    wrong = [colour_row((200, 10, 10), [f"{n} 1 1"], "red") for n in range(1, 6)]
    rows = [colour_row((150, 120, 10), ["1 1 1"], "both"), *wrong]
    query = [colour_row((200, 20, 20), ["200 1 1"], "both")]
    gallery = Gallery(rows)
    for searched in (rows, gallery):
        evaluator = MultimodalRetrievalEvaluator(query, searched, ks=(1, 2), name="s", progress=False)
        values = dict(evaluator.run(Colours(), colour_processor))
        assert [values[f"s/multimodal_image_r@{k}"] for k in (1, 2)] == [0.0, 1.0]
        assert values["s/multimodal_chance@1"] == pytest.approx(0.5) and evaluator.protocol["gallery"] == 2
    assert len(gallery.vectors(Colours(), colour_processor)) == 6  # others of its evaluators count rows

    # and each picture is classified once, however many captions it has
    made = ZeroShotClassificationEvaluator.from_rows(rows, templates="name")
    assert len(made.images) == len(made.labels) == 2


def test_pictures_in_memory_are_told_apart_by_their_shape_too():
    keys = {picture_key(Image.new("RGB", size)) for size in ((2, 8), (4, 4), (8, 2))}
    assert len(keys) == 3 and picture_key(Image.new("L", (4, 4))) in keys


def test_bad_options_are_named():
    row = colour_row((1, 2, 3), ["1 2 3"])
    with pytest.raises(ValueError, match="captions must be"):
        RetrievalEvaluator([row], captions="some")
    with pytest.raises(ValueError, match="no rows"):
        RetrievalEvaluator([])
    with pytest.raises(ValueError, match="row 1 has no captions"):
        RetrievalEvaluator([row, {"image": row["image"], "captions": []}])
    with pytest.raises(ValueError, match='captions must be "all" or "first", got .some'):
        MultimodalRetrievalEvaluator([row, row], captions="some")
    with pytest.raises(ValueError, match="gallery must be"):
        MultimodalRetrievalEvaluator([row, row], gallery="text")


@pytest.fixture(scope="module")
def tiny(emoji_rows) -> tuple[OneRForImageTextRetrieval, VisionLanguageProcessor]:
    """A small random OneR and its processor."""
    tokenizer = train_tokenizer((text for row in emoji_rows for text in row["captions"]), vocab_size=300)
    size = {"image_size": 32, "patch_size": 8, "vocab_size": len(tokenizer), "cls_token_id": 3, "mask_token_id": 4}
    torch.manual_seed(0)
    config = OneRConfig.from_size("nano", **size)
    images = VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8)
    return OneRForImageTextRetrieval(config), VisionLanguageProcessor(images, tokenizer)


@pytest.fixture(scope="module")
def emoji_rows() -> list[dict]:
    """Every drawing of the first twelve concepts of `test_concept`."""
    pairs = open_rows(EMOJI / "test_concept.parquet", id_column="hexcode")
    concepts = {pairs[number]["id"] for number in range(12)}
    return [row for row in pairs if row["id"] in concepts]


def test_batches_padding_and_order_do_not_change_embeddings(tiny, emoji_rows):
    model, processor = tiny
    images = [row["image"] for row in emoji_rows[:10]]
    texts = [row["captions"][-1] for row in emoji_rows[:10]]
    for function, given in (
        (embed_images, (images,)),
        (embed_texts, (texts + texts[:2],)),
        (embed_pairs, (images, texts)),
    ):
        whole = function(model, processor, *given, batch_size=64)
        parts = function(model, processor, *given, batch_size=3)
        assert whole.shape == (len(given[0]), model.config.projection_dim)
        torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(whole)))


def test_a_random_oner_on_real_pairs_agrees_with_its_own_logits(tiny, emoji_rows):
    model, processor = tiny
    model.train()
    evaluator = RetrievalEvaluator(emoji_rows, 16, (3,), "emoji", captions="first", progress=False)
    values = dict(evaluator.run(model, processor))
    assert model.training, "the mode the model came in is restored"
    model.eval()
    names = list(dict.fromkeys((row["id"], row["captions"][0]) for row in emoji_rows))
    with torch.no_grad():
        out = model(
            **processor(text=[text for _, text in names], return_tensors="pt"),
            pixel_values=processor(images=[row["image"] for row in emoji_rows], return_tensors="pt")["pixel_values"],
        )
    best = out.logits_per_image.argsort(dim=1, descending=True)[:, :3].tolist()
    hits = [any(names[column][0] == row["id"] for column in line) for row, line in zip(emoji_rows, best, strict=True)]
    assert values["emoji/tr_r@3"] == pytest.approx(np.mean(hits), abs=1.5 / len(hits))
    assert all(0 <= value <= 1 for name, value in values.items() if "@" in name)


def test_multimodal_queries_of_a_random_oner_on_real_pairs(tiny, emoji_rows):
    evaluator = MultimodalRetrievalEvaluator(emoji_rows, name="emoji", gallery="both", progress=False)
    values = dict(evaluator.run(*tiny))
    assert values["emoji/multimodal_queries"] == len(evaluator.asked) > 0
    for kind in ("both", "image", "text"):
        recalls = [values[f"emoji/multimodal_{kind}_r@{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls) and 0 <= recalls[0] and recalls[-1] <= 1
