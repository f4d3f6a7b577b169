"""Grad-CAM against a stack written out head by head; boxes by closed forms; RefCOCO+ in its official files."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_simla import randomised, simla_batch, tiny_config
from tiny_simla_pictures import assert_not_blank, make_processor, make_simla, real_rows
from torch.nn.functional import interpolate, normalize

from oner import SimlaForImageTextRetrieval
from oner.processing.data.grounding_files import open_grounding, read_boxes
from oner.processing.data.row_checks import PairDataError
from oner.processing.grounding_boxes import (
    best_rectangle,
    box_iou,
    overlay_map,
    rectangle_box,
    resize_map,
    score_boxes,
)
from oner.processing.vl_captions import pre_caption
from oner.training.evaluation.grounding import (
    GroundingEvaluator,
    SceneGroundingEvaluator,
    choose_box,
    grounding_maps,
    grounding_sheet,
    word_sheet,
)

LENGTHS = [3, 5, 2]


@pytest.fixture(scope="module")
def model():
    """Layers of text 3, of pictures 2; float64, so that the oracle's tolerance can be small."""
    torch.manual_seed(0)
    model = randomised(SimlaForImageTextRetrieval(tiny_config()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    return model.double().eval()


@pytest.fixture(scope="module")
def pairs():
    batch = simla_batch(LENGTHS, dtype=torch.float64)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture(scope="module")
def texts():
    batch = simla_batch(LENGTHS)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def attend(query, key, value, proj, mask, given=None):
    """One picture, one text, head by head: (L, D), (S, D), (S, D) -> (L, D) and a list of H tables (L, S)."""
    heads, tables, d = [], [], query.shape[-1] // 4
    for head in range(4):
        part = slice(head * d, (head + 1) * d)
        table = (query[:, part] @ key[:, part].T / d**0.5 + mask).softmax(-1) if given is None else given[head]
        heads.append(table @ value[:, part])
        tables.append(table)
    return proj(torch.cat(heads, -1)), tables


def fused_score(model, states, ids, mask, layer, tables=None):
    """The matching logit of one pair; `tables` stand for the cross-attention of `layer`. -> score, its tables."""
    text = model.simla.text
    hidden = text.embeddings.word_embeddings(ids) + text.embeddings.position_embeddings.weight[: len(ids)]
    hidden = text.embeddings.norm(hidden)
    padding = torch.where(mask.bool(), 0.0, -math.inf).double()
    found = None
    for place, block in enumerate(text.layers):
        one = block.attention
        out, _ = attend(one.query(hidden), one.key(hidden), one.value(hidden), one.proj, padding)
        hidden = block.attention_norm(hidden + out)
        two = block.cross_attention
        given = tables if place == layer else None
        out, used = attend(two.query(hidden), two.key(states), two.value(states), two.proj, 0.0, given)
        found = used if place == layer else found
        hidden = block.cross_norm(hidden + out)
        hidden = block.output_norm(hidden + block.feed_forward(hidden))
    return model.itm_head(hidden[0])[1], found


def naive_cam(score_of):
    """A * max(dS/dA, 0) of each head, from a score that can be told its tables."""
    with torch.no_grad():
        _, tables = score_of(None)
    tables = [table.clone().requires_grad_() for table in tables]
    score, _ = score_of(tables)
    gradients = torch.autograd.grad(score, tables)
    return torch.stack([(t * g.clamp(min=0)).detach() for t, g in zip(tables, gradients, strict=True)])


@pytest.mark.parametrize("layer", [None, 0, 2, -1])
def test_maps_are_the_official_formula(model, pairs, texts, layer):
    chosen = model.config.grounding_layer if layer is None else layer % 3
    maps = model.ground(**pairs, layer=layer)
    tokens = model.ground(**pairs, layer=layer, pool="none")
    longest = texts["input_ids"].shape[1]
    assert maps.shape == (3, 4, 4) and tokens.shape == (3, longest, 4, 4)
    for row in range(3):
        ids, mask = texts["input_ids"][row], texts["attention_mask"][row]
        with torch.no_grad():
            states = model.simla.vision(pairs["pixel_values"][row : row + 1])[0]
        cam = naive_cam(lambda tables, i=ids, m=mask, s=states: fused_score(model, s, i, m, chosen, tables))
        expected = cam[:, :, 1:].reshape(4, longest, 4, 4) * mask[None, :, None, None]
        torch.testing.assert_close(tokens[row], expected.mean(0), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(maps[row], expected.mean(0).mean(0), rtol=1e-9, atol=1e-15)
        assert maps[row].max() > 1e-9 and maps[row].std() > 0


def test_eight_threads_ground_with_one_model(model, pairs):
    """Beside passes that ask for nothing: each gets the map of its own pass, to the bit; the model keeps no hook."""
    ways = [(mode, layer) for mode in ("itm", "itc") for layer in (0, 1)]
    alone = [model.ground(**pairs, mode=mode, layer=layer) for mode, layer in ways]
    logits = model.match(**pairs)

    def ask(thread: int) -> bool:
        mode, layer = ways[thread % 4]
        maps = [model.ground(**pairs, mode=mode, layer=layer) for _ in range(6)]
        with torch.no_grad():
            matches = [model.match(**pairs) for _ in range(3)]
        return all(torch.equal(map_, alone[thread % 4]) for map_ in maps) and all(map(logits.equal, matches))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def visual_score(model, pixels, layer, head, tables=None):
    """`head` of the visual encoder's [CLS] of one picture; `tables` stand for the attention of `layer`."""
    vision, found = model.base_model.vision, None
    hidden = vision.embeddings(pixels[None])[0]
    for place, block in enumerate(vision.layers):
        query, key, value = block.attention.qkv(block.norm1(hidden)).chunk(3, -1)
        given = tables if place == layer else None
        out, used = attend(query, key, value, block.attention.proj, 0.0, given)
        found = used if place == layer else found
        hidden = hidden + out
        hidden = hidden + block.feed_forward(block.norm2(hidden))
    return head(vision.norm(hidden)[0]), found


@pytest.mark.parametrize("layer", [None, 0])
def test_maps_by_contrast_are_the_official_formula(model, pairs, texts, layer):
    maps = model.ground(**pairs, layer=layer, mode="itc")
    for row in range(3):
        with torch.no_grad():
            words = model.simla.encode_texts(texts["input_ids"][row][None], texts["attention_mask"][row][None])
            words = normalize(model.simla.text_projection(words[0, 0]), dim=-1)

        def similarity(cls, words=words):
            return normalize(model.simla.vision_projection(cls), dim=-1) @ words / model.temperature[0]

        pixels, chosen = pairs["pixel_values"][row], 1 if layer is None else layer
        cam = naive_cam(lambda tables, p=pixels, c=chosen, s=similarity: visual_score(model, p, c, s, tables))
        expected = cam[:, 0, 1:].mean(0).reshape(4, 4)
        torch.testing.assert_close(maps[row], expected, rtol=1e-9, atol=1e-15)
        assert expected.max() > 1e-9


def test_positions_are_pooled_as_named(model, pairs):
    tokens = model.ground(**pairs, pool="none")
    for row, length in enumerate(LENGTHS):
        assert torch.equal(tokens[row, 1 + length :], torch.zeros_like(tokens[row, 1 + length :]))
        torch.testing.assert_close(model.ground(**pairs)[row], tokens[row].sum(0) / (1 + max(LENGTHS)))
        torch.testing.assert_close(model.ground(**pairs, pool="real")[row], tokens[row, : 1 + length].mean(0))
        torch.testing.assert_close(model.ground(**pairs, pool="tokens")[row], tokens[row, 1 : 1 + length].mean(0))


def test_a_row_keeps_to_itself(model, pairs, texts):
    together = model.ground(**pairs, pool="real")
    ids = texts["input_ids"][2:, :3]  # [CLS] and two words, without padding
    single = model.ground(ids, None, pairs["pixel_values"][2:], pool="real")
    torch.testing.assert_close(single[0], together[2], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_kernel_frozen_weights_and_inference_mode_change_nothing(model, pairs, mode):
    expected = model.ground(**pairs, mode=mode)
    before = model.config._attn_implementation
    try:
        for kernel in ("eager", "sdpa"):
            model.set_attn_implementation(kernel)
            torch.testing.assert_close(model.ground(**pairs, mode=mode), expected, rtol=1e-9, atol=1e-14)
    finally:
        model.set_attn_implementation(before)
    with torch.inference_mode():
        copies = {name: value.clone() for name, value in pairs.items()}
        assert copies["input_ids"].is_inference()
        made = model.ground(**copies, mode=mode)
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    try:
        model.requires_grad_(False)
        torch.testing.assert_close(model.ground(**pairs, mode=mode), expected, rtol=0, atol=0)
    finally:
        model.requires_grad_(True)
    assert not expected.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_requests_are_named(model, pairs):
    cases = [
        ({"layer": 3}, "layer is 3; expected one of the model's 3"),
        ({"mode": "itx"}, "mode of .'itm', 'itc'.*got 'itx'"),
        ({"pool": "max"}, "got 'itm' and 'max'"),
        ({"pixel_values": None}, "expects pixel_values, got None"),
        ({"pixel_values": pairs["pixel_values"][:2]}, "3 texts and 2 pictures"),
        ({"pixel_values": pairs["pixel_values"][..., :8]}, "pictures are 16x8; expected 16x16"),
    ]
    for changed, words in cases:
        with pytest.raises(ValueError, match=words):
            model.ground(**{**pairs, **changed})
    try:
        with pytest.raises(ValueError, match="eval mode"):
            model.train().ground(**pairs)
    finally:
        model.eval()


class TestBoxes:
    def test_overlap_counts_pixels_inclusively(self):
        assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
        assert box_iou((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(50 / 150)
        assert box_iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5
        assert box_iou((0, 0, 10, 10), (20, 20, 5, 5)) == 0
        # nine columns apart: one column of pixels is shared, which the official code takes for none
        assert box_iou((0, 0, 10, 10), (9, 0, 10, 10)) == 0
        assert box_iou((0, 0, 10, 10), (8, 0, 10, 10)) == pytest.approx(20 / 180)
        # fractions of a pixel: inclusive counting is not the area of the overlap
        assert box_iou((0.5, 0, 4, 4), (0, 0, 4, 4)) == pytest.approx(3.5 * 4 / (32 - 3.5 * 4))

    def test_scores_are_sums_over_the_root_of_the_area(self):
        pixels = torch.arange(48.0).reshape(6, 8)
        scores = score_boxes(
            pixels, [(0, 0, 8, 6), (2, 1, 3, 2), (2.9, 1.2, 3, 2, 0.99), (-2, -2, 4, 4), (6, 4, 9, 9)]
        )
        sums = [
            pixels.sum(),
            pixels[1:3, 2:5].sum(),
            pixels[1:3, 2:5].sum(),
            pixels[:2, :2].sum(),
            pixels[4:, 6:].sum(),
        ]
        assert scores.tolist() == pytest.approx(
            [float(s) / a**0.5 for s, a in zip(sums, (48, 6, 6, 16, 81), strict=True)]
        )
        assert float(score_boxes(pixels, [(2, 1, 3, 2)], exponent=1)) == pytest.approx(float(sums[1]) / 6)
        for boxes, words in (([], "no boxes"), ([(0, 0, 0, 3)], "above 0"), ([(0, 0, 1)], "x, y, width, height")):
            with pytest.raises(ValueError, match=words):
                score_boxes(pixels, boxes)

    def test_best_rectangle_is_the_best_of_all(self):
        for seed in range(5):
            cells = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) ** 4
            best = max(
                ((t, l, b, r) for t in range(3) for b in range(t + 1, 4) for l in range(5) for r in range(l + 1, 6)),
                key=lambda q: float(cells[q[0] : q[2], q[1] : q[3]].sum()) / ((q[2] - q[0]) * (q[3] - q[1])) ** 0.5,
            )
            assert best_rectangle(cells) == best
        spot = torch.zeros(4, 4)
        spot[1:3, 2:4] = 1
        assert best_rectangle(spot) == (1, 2, 3, 4)
        assert rectangle_box(spot, 80, 120) == (60, 20, 60, 40)

    def test_maps_are_enlarged_as_officially(self):
        cells = torch.rand(24, 24)
        official = interpolate(cells.view(1, 1, 24, 24), size=(37, 50), mode="bicubic").squeeze()
        assert torch.equal(resize_map(cells, 37, 50), official)

    def test_the_first_of_the_highest_boxes_is_chosen_also_below_zero(self):
        cells = torch.zeros(4, 4)
        cells[0, 0] = 1
        boxes = [(40, 40, 20, 20), (0, 0, 20, 20), (0, 0, 20, 20)]
        choice = choose_box(cells, (80, 80), boxes, (0, 0, 20, 15))
        assert (choice.index, choice.right, choice.candidates, choice.right_candidates) == (1, True, 3, 2)
        assert choose_box(cells - 9, (80, 80), boxes, (0, 0, 5, 5)).index == 1  # the highest of negative scores

    def test_overlay_shows_map_and_box(self):
        cells = torch.zeros(4, 4)
        cells[:, :2] = 1
        drawn = overlay_map(Image.new("RGB", (40, 20), "white"), cells, (22, 2, 10, 10))
        left, right = drawn.getpixel((3, 10)), drawn.getpixel((37, 10))
        assert left[0] > left[2] + 30 and right[2] > right[0] + 30 and drawn.size == (40, 20)
        assert drawn.getpixel((22, 5)) == (0, 255, 0) and drawn.getpixel((3, 3)) != (0, 255, 0)
        overlay_map(Image.new("RGB", (9, 9)), cells, (50, 50, 3, 3))  # a box outside is left out


@pytest.fixture
def refcoco(tmp_path):
    """Four pictures of 40 x 80 pixels, six expressions, three splits: the official files as small as they can be."""
    (tmp_path / "train2014").mkdir()
    names = [f"train2014/COCO_train2014_{number:012}.png" for number in range(4)]
    for number, name in enumerate(names):
        Image.new("RGB", (80, 40), (60 * number, 90, 200 - 40 * number)).save(tmp_path / name)
    left, right = [0, 0, 40, 40], [40, 0, 40, 40]
    # ref_id, picture, split, box
    objects = [(7, 0, "val", left), (8, 0, "val", right), (9, 1, "testA", left), (10, 2, "testB", right),
               (11, 3, "testB", [0, 0, 10, 10]), (12, 3, "testB", left)]  # fmt: skip
    files = {
        "refcoco+_val.json": [(7, "The man, left!"), (8, "her")],
        "refcoco+_test.json": [(9, "left one"), (10, "right one"), (11, "small thing"), (12, "man")],
        "refcoco+_train.json": [(7, "a"), (8, "b"), (9, "c")],
    }
    pictures = {ref: picture for ref, picture, _, _ in objects}
    for file, said in files.items():
        entries = [{"image": names[pictures[ref]], "text": text, "ref_id": ref} for ref, text in said]
        (tmp_path / file).write_text(json.dumps(entries))
    refs = [
        {"ref_id": ref, "ann_id": 100 + ref, "image_id": picture, "split": split, "category_id": 1,
         "sentences": [{"sent_id": ref, "raw": "x", "tokens": ["x"]}]}
        for ref, picture, split, _ in objects
    ]  # fmt: skip
    (tmp_path / "refs(unc).json").write_text(json.dumps(refs))
    instances = {
        "images": [{"id": number, "height": 40, "width": 80, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"id": 100 + r, "image_id": p, "bbox": box, "category_id": 1} for r, p, _, box in objects],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    detections = {str(number): [[*left, 0.9, 1], [*right, 0.8, 1]] for number in range(4)}
    (tmp_path / "dets.json").write_text(json.dumps(detections))
    return tmp_path


def known_boxes(folder):
    return read_boxes(folder / "refs(unc).json", folder / "instances.json", folder / "dets.json")


class TestRefCoco:
    def test_rows_of_the_official_files(self, refcoco):
        rows = open_grounding(refcoco / "refcoco+_train.json")
        assert rows[1] == {
            "image": str(refcoco / "train2014/COCO_train2014_000000000000.png"),
            "captions": ["b"],
            "id": "COCO_train2014_000000000000.png",
            "ref_id": 8,
        }
        ids = rows.ids()
        assert ids[0] == ids[1] != ids[2]  # expressions of one picture are no negatives of each other
        both = [refcoco / "refcoco+_val.json", refcoco / "refcoco+_test.json"]
        rows = open_grounding(both, boxes=known_boxes(refcoco), clean=pre_caption)
        assert len(rows) == 6 and rows[0]["captions"] == ["the man left"]
        assert rows[3]["split"] == "testB" and rows[3]["box"] == (40, 0, 40, 40) and rows[3]["size"] == (40, 80)
        assert rows[3]["boxes"][1][:4] == [40, 0, 40, 40]
        elsewhere = open_grounding(refcoco / "refcoco+_val.json", refcoco, boxes=known_boxes(refcoco))
        assert elsewhere[0]["image"] == rows[0]["image"]

    def test_a_pickle_is_not_read(self, refcoco):
        (refcoco / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch broken'\ntR.")
        with pytest.raises(PairDataError, match=r"refs\(unc\).p: a pickle can run any code.*as JSON"):
            read_boxes(refcoco / "refs(unc).p", refcoco / "instances.json", refcoco / "dets.json")

    def test_wrong_files_are_named(self, refcoco):
        good = [refcoco / name for name in ("refs(unc).json", "instances.json", "dets.json")]
        with pytest.raises(PairDataError, match="missing.json: cannot be read: No such file"):
            read_boxes(refcoco / "missing.json", *good[1:])
        (refcoco / "list.json").write_text("[]")
        with pytest.raises(PairDataError, match="list.json: the detector's boxes .* an object at its top, got list"):
            read_boxes(*good[:2], refcoco / "list.json")
        (refcoco / "lost.json").write_text(json.dumps([{"ref_id": 7, "ann_id": 5, "image_id": 0, "split": "val"}]))
        with pytest.raises(PairDataError, match="ref_id 7 names ann_id 5, which .*instances.json does not have"):
            read_boxes(refcoco / "lost.json", *good[1:])
        (refcoco / "half.json").write_text(json.dumps([{"ref_id": 7, "split": "val"}]))
        with pytest.raises(PairDataError, match="half.json: entry 0 lacks ann_id, image_id"):
            read_boxes(refcoco / "half.json", *good[1:])

    def test_bad_rows_are_named_or_kept_aside(self, refcoco):
        entries = json.loads((refcoco / "refcoco+_val.json").read_text())
        entries += [{**entries[0], "text": " "}, {**entries[0], "image": "gone.png"}, {**entries[0], "ref_id": 99}, 3]
        (refcoco / "bad.json").write_text(json.dumps(entries))
        boxes = {**known_boxes(refcoco)}
        with pytest.raises(PairDataError, match="4 of 6 rows") as error:
            open_grounding(refcoco / "bad.json", boxes=boxes)
        for words in ("row 2: the caption is empty", "row 3: no picture file", "row 4: ref_id 99 is not among"):
            assert words in str(error.value)
        skipped = open_grounding(refcoco / "bad.json", boxes=boxes, bad_rows="skip")
        assert sorted(skipped.bad) == [2, 3, 4, 5] and len(skipped) == 6
        boxes[8] = {**boxes[8], "boxes": None}
        with pytest.raises(PairDataError, match="row 1: the detector has no boxes for its picture"):
            open_grounding(refcoco / "refcoco+_val.json", boxes=boxes)

    def test_accuracies_of_known_maps(self, refcoco):
        """A model whose matching always points to the left half, and contrast to the right one: right where the object
        is on that side, and never for one that no detection fits."""

        class Left(torch.nn.Linear):
            config = SimpleNamespace(image_size=32, patch_size=8)

            def ground(self, input_ids, attention_mask, pixel_values, **how):
                assert pixel_values.shape[1:] == (3, 32, 32)
                maps = torch.zeros(len(pixel_values), 4, 4)
                maps[:, 1:3, :2] = 1
                return maps if how["mode"] == "itm" else maps.flip(2)

        both = [refcoco / "refcoco+_val.json", refcoco / "refcoco+_test.json"]
        rows = open_grounding(both, boxes=known_boxes(refcoco))
        evaluator = GroundingEvaluator(rows, batch_size=4, name="refcoco+", progress=False)
        results = dict(evaluator.run(Left(1, 1), make_processor()))
        figure = results.pop("refcoco+/sheet")
        others = {split: results.pop(f"refcoco+/{split}_d_itc") for split in ("val", "testA", "testB")}
        assert others == {"val": 0.5, "testA": 0.0, "testB": pytest.approx(1 / 3)}
        assert results == {
            "refcoco+/val_d": 0.5, "refcoco+/val_chance": 0.5, "refcoco+/val_reachable": 1.0,
            "refcoco+/val_expressions": 2.0,
            "refcoco+/testA_d": 1.0, "refcoco+/testA_chance": 0.5, "refcoco+/testA_reachable": 1.0,
            "refcoco+/testA_expressions": 1.0,
            "refcoco+/testB_d": pytest.approx(1 / 3), "refcoco+/testB_chance": pytest.approx(1 / 3),
            "refcoco+/testB_reachable": pytest.approx(2 / 3), "refcoco+/testB_expressions": 3.0,
        }  # fmt: skip
        assert_not_blank(figure)
        assert "0.5" in evaluator.protocol["right"] and evaluator.protocol["expressions"] == 6

    def test_rows_without_boxes_cannot_be_scored(self, refcoco):
        with pytest.raises(PairDataError, match="refs, instances, detections"):
            GroundingEvaluator(open_grounding(refcoco / "refcoco+_val.json"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def small(processor):
    return make_simla(SimlaForImageTextRetrieval, processor)


class TestScenes:
    def test_maps_do_not_depend_on_the_batch_size(self, small, processor):
        rows = real_rows(5)
        images, texts = [row["image"] for row in rows], [row["captions"][0] for row in rows]
        maps = grounding_maps(small, processor, images, texts, pool="real")
        assert maps.shape == (5, 4, 4) and maps.min() >= 0 and maps.std() > 0
        torch.testing.assert_close(
            grounding_maps(small, processor, images, texts, 2, pool="real"), maps, rtol=1e-3, atol=1e-8
        )
        with pytest.raises(ValueError, match="5 pictures and 4 texts"):
            grounding_maps(small, processor, images, texts[:4])
        with pytest.raises(TypeError, match="ground.., got Linear"):
            grounding_maps(torch.nn.Linear(1, 1), processor, images, texts)

    @pytest.mark.parametrize("mode", ["itm", "itc"])
    def test_evaluator(self, small, processor, mode):
        other = {"itm": "itc", "itc": "itm"}[mode]
        results = dict(SceneGroundingEvaluator(real_rows(30), scenes=12, shown=2, mode=mode).run(small, processor))
        sheets = [results.pop(name) for name in list(results) if name.endswith("sheet")]
        assert len(sheets) == (3 if mode == "itm" else 2)
        assert results.keys() == {
            f"grounding/{name}"
            for name in (
                "pointing_accuracy", "box_accuracy", "scene_chance", f"{other}_pointing_accuracy",
                f"{other}_box_accuracy",
            )
        }  # fmt: skip
        assert all(0 <= value <= 1 for value in results.values())
        for sheet in sheets:
            assert_not_blank(sheet)

    def test_sheets_of_words(self, small, processor):
        row = real_rows(1)[0]
        sheet = word_sheet(small, processor, row["image"], "red apple tree")
        titles = [axes.get_title() for axes in sheet.axes]
        ids = processor(text=["red apple tree"])["input_ids"][0].tolist()
        assert titles == ["picture", *processor.tokenizer.convert_ids_to_tokens(ids)]
        sheet = grounding_sheet(small, processor, [row["image"]], [["red apple", "tree"]])
        assert [axes.get_title() for axes in sheet.axes] == ["picture", "red apple", "tree"]
        assert_not_blank(sheet)
