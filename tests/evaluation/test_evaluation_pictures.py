"""Localisation maps, [CLS] attention, composed queries and the modality gap: numbers by oracle, pictures not blank."""

import io

import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageStat
from tiny_simla_pictures import make_simla

from oner import SimlaForImageTextRetrieval
from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation import sheets as evaluation_sheets
from oner.training.evaluation.attention import (
    AttentionEvaluator,
    attention_maps,
    cls_attention,
    cls_attention_rows,
    eager_attention,
    head_maps,
    share_in_quarter,
)
from oner.training.evaluation.composed import ComposedEvaluator, composed_queries, nearest
from oner.training.evaluation.gap import (
    GapEvaluator,
    centroid_separability,
    distribution_gap,
    embed_rows,
    frechet_share,
    gap_measures,
    linear_separability,
    paired_cosines,
    tsne,
)
from oner.training.evaluation.localization import LocalizationEvaluator, mean_of_words, pointing, similarity_maps
from oner.training.evaluation.sheets import (
    Panel,
    draw_scenes,
    evaluating,
    heat_sheet,
    one_of_each_id,
    pictures_as_seen,
    quarter,
    spread,
)


@pytest.fixture(scope="module")
def rows(emoji_folder):
    """Forty pictures of unseen concepts; several concepts come more than once."""
    table = pyarrow.parquet.read_table(emoji_folder / "test_concept.parquet").to_pylist()
    table = sorted(table, key=lambda row: row["hexcode"])[:40]
    return [{"image": row["image"], "captions": row["captions"], "id": row["hexcode"]} for row in table]


@pytest.fixture(scope="module")
def processor(rows):
    tokenizer = train_tokenizer([text for row in rows for text in row["captions"]], vocab_size=300)
    return VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8), tokenizer
    )


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = OneRConfig.from_size(
        "nano",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_hidden_size=32,
        projection_dim=16,
        image_size=32,
        patch_size=8,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    return OneRForImageTextRetrieval(config).eval()


def first_captions(rows):
    return [row["captions"][0] for row in rows]


def drawn(figure) -> Image.Image:
    """The figure as the caller would save it."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return Image.open(file).convert("RGB")


def assert_not_blank(figure) -> None:
    picture = drawn(figure)
    assert min(picture.size) > 300
    assert max(ImageStat.Stat(picture).stddev) > 10


class TestLocalization:
    def test_maps_equal_a_loop_in_float64(self, model, processor, rows):
        rows = rows[:5]
        texts = [" ".join(row["captions"][:2]) for row in rows]
        maps = similarity_maps(model, processor, [row["image"] for row in rows], texts, batch_size=2)
        assert maps.shape == (5, 4, 4)
        for row, text, got in zip(rows, texts, maps, strict=True):
            with torch.no_grad():
                pixels = processor(images=[row["image"]])["pixel_values"]
                words = processor(text=[text])
                patches = model.get_image_features(pixel_values=pixels).last_hidden_state[0].double()
                states = model.get_text_features(**words).last_hidden_state[0].double()
            mean = sum(states[i] for i in range(1, len(states))) / (len(states) - 1)
            for place in range(16):
                patch = patches[1 + place]
                cosine = (patch * mean).sum() / (patch * patch).sum().sqrt() / (mean * mean).sum().sqrt()
                assert abs(float(cosine) - float(got[place // 4, place % 4])) < 1e-5

    def test_one_text_is_asked_of_every_picture(self, model, processor, rows):
        images = [row["image"] for row in rows[:3]]
        one = similarity_maps(model, processor, images, "red flower")
        assert torch.allclose(one, similarity_maps(model, processor, images, ["red flower"] * 3))

    def test_a_larger_picture_gives_a_finer_grid(self, model, processor, rows):
        images = [row["image"] for row in rows[:2]]
        with pytest.warns(UserWarning, match="maps at 64 pixels of a model made for 32"):
            fine = similarity_maps(model, processor, images, "red flower", image_size=64)
        assert fine.shape == (2, 8, 8)
        same = similarity_maps(model, processor, images, "red flower", image_size=32)
        assert torch.allclose(same, similarity_maps(model, processor, images, "red flower"), atol=1e-6)

    def test_mean_leaves_out_cls_and_padding(self):
        states = torch.arange(24.0).reshape(2, 4, 3)
        mean = mean_of_words(states, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
        assert torch.equal(mean[0], states[0, 1:3].mean(0)) and torch.equal(mean[1], states[1, 1:].mean(0))
        with pytest.raises(ValueError, match="text 1 has no words"):
            mean_of_words(states, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))

    def test_numbers_of_pictures_and_texts_must_agree(self, model, processor, rows):
        with pytest.raises(ValueError, match="got 2 pictures and 1 texts"):
            similarity_maps(model, processor, [row["image"] for row in rows[:2]], ["one"])

    def test_pointing_knows_the_quarters(self):
        maps = torch.zeros(4, 6, 8)
        for index, (y, x) in enumerate([(0, 0), (2, 7), (5, 3), (3, 4)]):
            maps[index, y, x] = 1.0
        accuracy, lift = pointing(maps, [0, 1, 2, 3])
        assert accuracy == 1.0 and lift == pytest.approx(1 / 12 - 1 / 48)
        assert pointing(maps, [1, 1, 1, 1])[0] == 0.25

    def test_mode_of_the_model_is_restored(self, model, processor, rows):
        model.train()
        try:
            with pytest.raises(RuntimeError), evaluating(model):
                assert not model.training and not torch.is_grad_enabled()
                raise RuntimeError
            assert model.training and torch.is_grad_enabled()
        finally:
            model.eval()

    def test_evaluator(self, model, processor, rows):
        results = dict(LocalizationEvaluator(rows, scenes=12, shown=2).run(model, processor))
        assert 0 <= results["localization/pointing_accuracy"] <= 1
        assert abs(results["localization/cosine_lift"]) < 1
        assert_not_blank(results["localization/sheet"])
        assert_not_blank(results["localization/scenes_sheet"])


class TestAttention:
    def test_rows_sum_to_one_and_hold_cls_patches_and_words(self, model, processor, rows):
        images, texts = [row["image"] for row in rows[:3]], ["a dog", "hand with fingers splayed", "x"]
        alone = cls_attention_rows(model, processor, images)
        steered = cls_attention_rows(model, processor, images, texts, batch_size=2)
        assert [len(row) for row in alone] == [17, 17, 17]
        assert [len(row) for row in steered] == [
            17 + len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
        ]
        for row in alone + steered:
            assert float(row.sum()) == pytest.approx(1, abs=1e-5) and float(row.min()) >= 0
        assert not torch.allclose(alone[0][1:17], steered[0][1:17], atol=1e-6)

    def test_map_is_the_last_layers_mean_of_heads(self, model, processor, rows):
        image = rows[0]["image"]
        got = cls_attention(model, processor, image, "a red car")
        batch = processor(images=[image], text=["a red car"])
        with torch.no_grad(), eager_attention(model):
            attentions = model.base_model(**batch, output_attentions=True).attentions
        want = sum(attentions[-1][0, head, 0, 1:17] for head in range(4)) / 4
        assert got.shape == (4, 4)
        assert torch.allclose(got.flatten(), want, atol=1e-6)
        first = cls_attention(model, processor, image, "a red car", layer=0)
        assert torch.allclose(first.flatten(), attentions[0][0, :, 0, 1:17].mean(0), atol=1e-6)

    def test_words_that_read_a_picture_by_cross_attention_are_shown_by_it(self, processor, rows):
        simla, image = make_simla(SimlaForImageTextRetrieval, processor), rows[0]["image"]
        processor = VisionLanguageProcessor(processor.image_processor, processor.tokenizer, joint_layout=False)
        (row,) = cls_attention_rows(simla, processor, [image], ["a red car"])
        with torch.no_grad(), eager_attention(simla):
            outputs = simla.base_model(**processor(images=[image], text=["a red car"]), output_attentions=True)
        assert len(row) == 17 and float(row.sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(row, outputs.cross_attentions[-1][0, :, 0].mean(0), atol=1e-6)
        (alone,) = cls_attention_rows(simla, processor, [image])
        assert len(alone) == 17 and not torch.allclose(alone, row, atol=1e-3)

    def test_implementation_is_restored(self, model, processor, rows):
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation("sdpa")
            cls_attention(model, processor, rows[0]["image"])
            assert model.config._attn_implementation == "sdpa"
            with pytest.raises(RuntimeError), eager_attention(model):
                assert model.config._attn_implementation == "eager"
                raise RuntimeError
            assert model.config._attn_implementation == "sdpa"
        finally:
            model.set_attn_implementation(before)

    def test_share_of_a_quarter(self):
        maps = torch.ones(2, 4, 4)
        assert share_in_quarter(maps, [0, 3]) == pytest.approx(0.25)
        maps[0, :2, 2:] = 3.0
        assert share_in_quarter(maps[:1], [1]) == pytest.approx(12 / 24)

    def test_evaluator(self, model, processor, rows):
        results = dict(AttentionEvaluator(rows, scenes=8, shown=2).run(model, processor))
        for name in ("share_on_named_without_words", "share_on_named_with_words", "share_to_words"):
            assert 0 < results[f"attention/{name}"] < 1
        assert_not_blank(results["attention/sheet"])
        assert_not_blank(results["attention/heads_sheet"])

    def test_the_mean_of_the_heads_is_the_map_of_the_layer(self, model, processor, rows):
        images = [row["image"] for row in rows[:3]]
        for layer in (0, -1):
            heads = head_maps(model, processor, images, layer)
            assert heads.shape == (3, 4, 4, 4)
            torch.testing.assert_close(heads.mean(1), attention_maps(model, processor, images, layer=layer))


class TestComposed:
    def test_nearest_hides_the_query_itself(self):
        gallery = torch.eye(4)
        scores, places = nearest(torch.tensor([[0.9, 0.3, 0.1, 0.0]]), gallery, 2)
        assert places.tolist() == [[0, 1]] and scores[0].tolist() == pytest.approx([0.9, 0.3])
        assert nearest(torch.tensor([[0.9, 0.3, 0.1, 0.0]]), gallery, 2, hidden=[0])[1].tolist() == [[1, 2]]
        with pytest.raises(ValueError, match="cannot find the 4 nearest in a gallery of 4"):
            nearest(torch.eye(4)[:1], gallery, 4, hidden=[0])

    def test_three_ways_to_ask_differ(self, model, processor, rows):
        ways = composed_queries(model, processor, [row["image"] for row in rows[:4]], first_captions(rows[:4]))
        assert {way: tuple(vectors.shape) for way, vectors in ways.items()} == {
            "picture": (4, 16),
            "words": (4, 16),
            "both": (4, 16),
        }
        assert torch.allclose(ways["both"].norm(dim=-1), torch.ones(4), atol=1e-5)
        assert not torch.allclose(ways["both"], ways["picture"], atol=1e-4)

    def test_evaluator(self, model, processor, rows):
        results = dict(ComposedEvaluator(rows, shown=2, found=5).run(model, processor))
        assert set(results) == {"composed/sheet", "composed/other_words_sheet"}
        for figure in results.values():
            assert len(figure.axes) == 2 * (1 + 3 * (1 + 5))
            assert_not_blank(figure)

    def test_a_picture_finds_itself_in_a_gallery_that_holds_it(self, model, processor, rows):
        ways = composed_queries(model, processor, [row["image"] for row in rows], first_captions(rows))
        scores, places = nearest(ways["picture"], ways["picture"], 1)
        assert torch.allclose(scores, torch.ones(len(rows), 1), atol=1e-5)
        hidden = nearest(ways["picture"], ways["picture"], 3, hidden=list(range(len(rows))))[1]
        assert not (hidden == torch.arange(len(rows))[:, None]).any()


class TestGap:
    def test_one_cloud_has_no_gap(self):
        generator = torch.Generator().manual_seed(0)
        image, text = torch.randn(2, 2000, 8, generator=generator).unbind()
        assert centroid_separability(image, text) == pytest.approx(0.5, abs=0.04)
        assert linear_separability(image, text) == pytest.approx(0.5, abs=0.04)
        assert centroid_separability(image, image) == linear_separability(image, image) == 0.5

    def test_two_clouds_are_told_apart(self):
        image, text = torch.randn(2, 400, 8).unbind()
        image[:, 0] += 8
        assert centroid_separability(image, text) > 0.99 and linear_separability(image, text) > 0.99

    def test_ridge_finds_a_gap_that_loud_directions_hide(self):
        image, text = torch.randn(2, 4000, 2).unbind()
        image, text = image * torch.tensor([30.0, 1.0]), text * torch.tensor([30.0, 1.0])
        image[:, 1] += 5
        # The loud axis' sampling noise turns the line between the centroids; least squares weighs it down.
        assert linear_separability(image, text, ridge=1e-6) > 0.98
        assert linear_separability(image, text, ridge=1e-6) > centroid_separability(image, text) + 0.02

    def test_a_shift_is_no_difference_in_distribution(self):
        generator = torch.Generator().manual_seed(0)
        image, text = torch.randn(2, 600, 8, generator=generator).unbind()
        across, within = distribution_gap(image, text)
        assert across == pytest.approx(within, abs=0.01) and within < 0.02
        assert distribution_gap(image + 7, text) == pytest.approx((across, within), abs=1e-9)
        # nor is a text that lies beside its picture
        assert distribution_gap(image, image + 0.01 * text)[0] < 0.02
        # clouds of other directions are others, though their centroids are the same
        left, right = torch.zeros(2, 600, 8).unbind()
        left[:, :4] = image[:, :4]
        right[:, 4:] = text[:, 4:]
        across, within = distribution_gap(left, right)
        assert across > 0.99 and within < 0.02

    def test_frechet_share_is_scipys(self):
        linalg = pytest.importorskip("scipy.linalg")
        generator = torch.Generator().manual_seed(1)
        one = torch.randn(50, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
        other = torch.randn(70, 6, generator=generator).double()
        a, b = (torch.cov(cloud.T, correction=0).numpy() for cloud in (one, other))
        expected = 1 - 2 * linalg.sqrtm(a @ b).real.trace() / (a.trace() + b.trace())
        assert frechet_share(one, other) == pytest.approx(expected, abs=1e-9)
        assert frechet_share(one, one + 3) == pytest.approx(0, abs=1e-9) and frechet_share(one * 0, one * 0) == 0

    def test_known_distances_and_cosines(self):
        east, north = torch.tensor([1.0, 0.0]).repeat(6, 1), torch.tensor([0.0, 1.0]).repeat(6, 1)
        measures = gap_measures({"image": east, "text": north, "both": east})
        assert measures["image_text"] == pytest.approx(2**0.5) and measures["image_both"] == 0
        assert measures["text_both"] == pytest.approx(2**0.5)
        assert measures["cosine_paired"] == measures["cosine_unpaired"] == 0
        assert measures["centroid_separability"] == measures["linear_separability"] == 1

    def test_unpaired_leaves_out_rows_of_the_same_id(self):
        vectors = torch.eye(3)[[0, 0, 1]]
        assert paired_cosines(vectors, vectors) == (1.0, pytest.approx(2 / 6))
        assert paired_cosines(vectors, vectors, ["a", "a", "b"]) == (1.0, 0.0)
        with pytest.raises(ValueError, match="at least 2 different ids"):
            paired_cosines(vectors, vectors, ["a", "a", "a"])

    def test_embeddings_are_normalised_and_each_of_its_own(self, model, processor, rows):
        embeddings = embed_rows(model, processor, rows[:5], batch_size=3)
        for vectors in embeddings.values():
            assert vectors.shape == (5, 16) and torch.allclose(vectors.norm(dim=-1), torch.ones(5), atol=1e-5)
        assert not torch.allclose(embeddings["both"], embeddings["image"], atol=1e-4)

    def test_tsne_is_seeded_and_keeps_clusters(self):
        clusters = torch.randn(60, 5) * 0.1
        clusters[30:, 0] += 10
        points = tsne(clusters, perplexity=10)
        assert points.shape == (60, 2) and torch.equal(points, tsne(clusters, perplexity=10))
        assert centroid_separability(points[:30], points[30:]) == 1
        with pytest.raises(ValueError, match="more points than its perplexity of 60, got 60"):
            tsne(clusters, perplexity=60)

    def test_evaluator(self, model, processor, rows):
        results = dict(GapEvaluator(rows, count=30, drawn=20).run(model, processor))
        figure = results.pop("gap/tsne")
        assert all(isinstance(value, float) for value in results.values()) and len(results) == 9
        assert [len(dots.get_offsets()) for dots in figure.axes[0].collections] == [20, 20, 20]
        assert_not_blank(figure)


class TestSheets:
    def test_pictures_as_seen_keep_their_colours(self, processor, rows):
        plain = Image.new("RGB", (64, 64), (200, 100, 50))
        seen = pictures_as_seen([plain, rows[0]["image"]], processor)
        assert seen.shape == (2, 32, 32, 3)
        assert torch.allclose(seen[0], torch.tensor([200, 100, 50]) / 255, atol=1e-3)

    def test_spread_is_min_max_and_survives_a_constant(self):
        maps = torch.stack([torch.arange(6.0).reshape(2, 3), torch.full((2, 3), 7.0)])
        assert torch.allclose(spread(maps)[0], torch.arange(6.0).reshape(2, 3) / 5)
        assert torch.equal(spread(maps)[1], torch.zeros(2, 3))

    def test_quarters_share_nothing(self):
        count = torch.zeros(5, 6)
        for index in range(4):
            count[quarter(5, 6, index)] += 1
        assert count.max() == 1 and count[2].sum() == 0 and count.sum() == 24

    def test_scenes_hold_four_ids_at_their_places(self, rows):
        captions = {}
        for row in rows:
            captions.setdefault(row["captions"][0], row)
        scenes = draw_scenes(rows, 6, seed=3, side=32)
        again = draw_scenes(rows, 6, seed=3, side=32)
        assert [scene.words for scene in scenes] == [scene.words for scene in again]
        assert {scene.asked for scene in draw_scenes(rows, 40, side=16)} == {0, 1, 2, 3}
        for scene in scenes:
            assert scene.image.size == (64, 64)
            assert len({captions[word]["id"] for word in scene.words}) == 4
            for box in ((0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)):
                assert max(ImageStat.Stat(scene.image.crop(box)).stddev) > 5
        with pytest.raises(ValueError, match="rows of 4 different ids, got 1"):
            draw_scenes(rows[:1], 1)

    def test_new_ids_come_first(self):
        table = [{"id": name} for name in "aaaaabbbbc"]
        assert {row["id"] for row in one_of_each_id(table, 3, seed=1)} == {"a", "b", "c"}
        assert len(one_of_each_id(table, 7)) == 7 and len(one_of_each_id(table, 20)) == 10

    def test_captions_are_never_read_as_formulas(self):
        panel = Panel(torch.rand(8, 8, 3), torch.rand(4, 4), above="$\\frac{", below="a_b $5 and $6")
        assert_not_blank(heat_sheet([[panel, panel], [panel]], "costs $1 and $\\nothing{"))
        with pytest.raises(ValueError, match="at least one panel"):
            heat_sheet([], "nothing")

    @pytest.mark.parametrize("package", ["matplotlib.figure", "sklearn.manifold"])
    def test_missing_packages_name_the_extra(self, package, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ImportError, match=r"oner\[plots\]"):
            evaluation_sheets.new_figure(1, 1) if package.startswith("matplotlib") else tsne(torch.rand(40, 3))
