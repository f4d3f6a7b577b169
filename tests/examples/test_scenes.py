"""Scenes: the same everywhere, captions true and hard ones false of them, nothing held out shown in training."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scenes_reader import SCENES, Seen, digest, stand, wrong

from oner import open_rows

sys.path.insert(0, str(SCENES))

import scenes  # noqa: E402
from scenes_captions import draw_captions  # noqa: E402
from scenes_concepts import concept_table, confusable, is_held_out  # noqa: E402
from scenes_drawing import paint_background, pixel_box, render  # noqa: E402
from scenes_hard import draw_hard_captions  # noqa: E402
from scenes_layout import COLOURS, SPLITS, Group, Layout, draw_layout, generator, pool  # noqa: E402
from scenes_queries import QUERY_KINDS, facts, query  # noqa: E402
from scenes_sprites import cut_out, load_sprites  # noqa: E402
from scenes_statements import related, stands_at  # noqa: E402
from scenes_twins import draw_twins  # noqa: E402

MANY = 120


@pytest.fixture(scope="module", params=SPLITS)
def made(request) -> list[scenes.Scene]:
    """Scenes of a split."""
    return [scenes.scene(7, request.param, index) for index in range(MANY)]


def test_a_scene_is_a_function_of_seed_split_and_index():
    code = "import scenes, scenes_reader; print(scenes_reader.digest(scenes.scene(3, 'train', 11)))"
    paths = os.pathsep.join(map(str, (SCENES, Path(__file__).parents[1])))
    line, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "5"}
    elsewhere = subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert elsewhere == [digest(scenes.scene(3, "train", 11))]
    others = [(3, "train", 11), (4, "train", 11), (3, "seen", 11), (3, "train", 12)]
    assert len({digest(scenes.scene(*one)) for one in others}) == 4


def test_the_layout_is_the_same_at_every_size():
    small, large = scenes.scene(0, "train", 5), scenes.scene(0, "train", 5, size=128)
    assert small.texts == large.texts and large.image.size == (128, 128)
    assert [hard.text for hard in small.hard] == [hard.text for hard in large.hard]
    for one, other in zip(small.objects, large.objects, strict=True):
        assert np.abs(2 * np.array(one.box) - np.array(other.box)).max() <= 2


def test_captions_are_true(made):
    lengths = Counter()
    for one in made:
        seen = Seen.of(one)
        assert len(set(one.texts)) == len(one.texts) >= 2
        for text in one.texts:
            assert not wrong(text, seen), f"{one.id}: {text!r} {wrong(text, seen)}"
            lengths[len(text.split())] += 1
    assert min(lengths) >= 8 and max(lengths) <= 16


def test_hard_captions_are_false_and_one_change_away(made):
    kinds = Counter()
    for one in made:
        seen = Seen.of(one)
        for hard in one.hard:
            faults = wrong(hard.text, seen)
            assert faults, f"{one.id}: {hard.kind} {hard.text!r} is true"
            assert hard.text != one.texts[hard.of]
            kinds[hard.kind] += 1
    assert set(kinds) == {"thing", "relation", "order", "size", "count", "place", "background"}
    assert kinds["thing"] == MANY and min(kinds.values()) > MANY / 8


def test_words_do_not_tell_hard_captions_from_true_ones():
    """Captions and what they were changed to say each number, size, place and colour about equally often."""
    said = {True: Counter(), False: Counter()}
    for index in range(3000):
        layout = draw_layout(6, "train", index)
        captions = draw_captions(generator("captions", 6, "train", index), layout, 4)
        for hard in draw_hard_captions(generator("hard captions", 6, "train", index), layout, captions, "train"):
            for true, text in ((True, captions[hard.of].text), (False, hard.text)):
                said[true].update((hard.kind, word) for word in text.split())
    for kind, words in {
        "count": ("one", "single", "two", "three", "four", "a"),
        "size": ("big", "small"),
        "place": ("left", "right", "top", "bottom"),
        "background": tuple(COLOURS),
        "relation": ("left", "right", "above", "below"),
    }.items():
        for word in words:
            one, other = said[True][kind, word], said[False][kind, word]
            assert abs(one - other) < 0.08 * (one + other) + 3 * (one + other) ** 0.5, f"{kind}: {word} {one} {other}"


def test_relations_agree_with_the_boxes(made):
    for one in made:
        boxes = [[thing.box for thing in one.objects if thing.group == number] for number in range(4)]
        for first, relation, second in one.relations:
            assert stand(boxes[first], relation, boxes[second])
            assert not stand(boxes[second], relation, boxes[first])


def test_what_is_held_out_is_never_shown_in_training():
    for split in SPLITS:
        layouts = [draw_layout(1, split, index) for index in range(1000)]
        pairs = [(a, b) for one in layouts for a in one.concepts for b in one.concepts if a < b]
        held_out = [pair for pair in pairs if is_held_out(*pair)]
        if split in ("train", "seen", "unseen_style"):
            assert not held_out
        if split == "unseen_pairs":
            assert all(is_held_out(*one.concepts[:2]) for one in layouts)
        assert not any(confusable(*pair) for pair in pairs)
        styles = {group.sprite.style for one in layouts for group in one.groups}
        assert styles == {"openmoji"} if split == "unseen_style" else "openmoji" not in styles
    assert not set(pool("train")) & set(pool("unseen_concepts"))
    assert set(pool("unseen_style")) == set(pool("train")) == set(pool("unseen_pairs"))
    assert len(pool("train")) > 400 and len(pool("unseen_concepts")) > 40


def test_boxes_hold_their_things():
    """Drawn alone, a thing changes no pixel outside of its box, and some within two pixels of each edge."""
    for index in range(60):
        layout = draw_layout(2, "train", index)
        ground = paint_background(layout.background, 64).astype(int)
        for group in layout.groups:
            for box in group.boxes:
                alone = Layout((type(group)(group.sprite, group.size, group.flipped, (box,)),), layout.background)
                changed = np.abs(np.asarray(render(alone, 64)).astype(int) - ground).max(-1) > 3
                x, y, width, height = pixel_box(box, 64)
                assert 0 <= x and x + width <= 64 and 0 <= y and y + height <= 64
                inside = changed[y : y + height, x : x + width]
                assert inside.sum() == changed.sum() and inside.mean() > 0.08
                for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                    assert edge.any()


def test_things_stay_visible():
    """Of each thing at least two fifths of the pixels that it drew are still there in the end."""
    for index in range(200):
        layout = draw_layout(5, "train", index)
        whole = np.asarray(render(layout, 64)).astype(int)
        ground = paint_background(layout.background, 64).astype(int)
        for number, group in enumerate(layout.groups):
            alone = np.asarray(render(Layout((group,), layout.background), 64)).astype(int)
            until = np.asarray(render(Layout(layout.groups[: number + 1], layout.background), 64)).astype(int)
            drawn = np.abs(alone - ground).max(-1) > 3
            hidden = drawn & (np.abs(whole - until).max(-1) > 3)
            assert hidden.sum() < 0.6 * drawn.sum(), index


def test_cutting_out_keeps_white_that_is_enclosed():
    pixels = np.full((1, 9, 9, 3), 255, np.uint8)
    pixels[0, 2:7, 2:7] = 0
    pixels[0, 3:6, 3:6] = 255  # an enclosed white
    pixels[0, 1, 4] = 128  # a soft edge
    cut = cut_out(pixels)[0]
    alpha = cut[..., 3]
    assert alpha[4, 4] == 255 and (cut[4, 4, :3] == 255).all()
    assert alpha[0, 0] == 0 and alpha[2, 2] == 255
    assert 100 < alpha[1, 4] < 155 and (cut[1, 4, :3] == 0).all()


def test_every_concept_has_a_proper_name():
    table = concept_table()
    assert len({concept.name for concept in table.values()}) == len(table)
    for concept in table.values():
        assert 1 <= len(concept.name.split()) <= 4
        assert not concept.name.startswith(("a ", "an ", "the ", "big ", "small "))
        assert concept.hexcode in load_sprites("train") or concept.hexcode in load_sprites("unseen_concepts")
    assert table["1F417"].named(1) == "a boar" and table["1F989"].named(1) == "an owl"
    assert table["1F43A"].named(2, "small") == "two small wolves"
    assert table["1F984"].named(1) == "a unicorn" and table["231B"].named(1) == "an hourglass"


def test_what_is_disputable_is_neither_true_nor_false():
    sprite = load_sprites("train")["1F415"][0]

    def at(x: float, y: float) -> Group:
        return Group(sprite, "small", False, ((x - 0.1, y - 0.1, 0.2, 0.2),))

    assert related(at(0.2, 0.5), "left", at(0.8, 0.5)) is True
    assert related(at(0.8, 0.5), "left", at(0.2, 0.5)) is False
    assert related(at(0.4, 0.1), "left", at(0.55, 0.9)) is None  # a little left, and far above
    assert related(at(0.4, 0.1), "above", at(0.55, 0.9)) is True
    assert stands_at(at(0.2, 0.5), "left") is True and stands_at(at(0.8, 0.5), "left") is False
    assert stands_at(at(0.44, 0.5), "left") is None and stands_at(at(0.5, 0.5), "middle") is True


@pytest.mark.parametrize("kind", QUERY_KINDS)
def test_a_query_has_one_right_answer(kind):
    for index in range(12):
        asked = query(4, "train", index, kind)
        again = query(4, "train", index, kind)
        assert asked.words == again.words and [facts(one) for one in asked.gallery] == [
            facts(one) for one in again.gallery
        ]
        assert len(asked.gallery) == 10 and asked.names[:2] == ("target", "reference")
        assert asked.names.count("words alone") == 3
        target, reference = asked.gallery[:2]
        before, after = set(asked.reference.concepts), set(target.concepts)
        mentioned = {one for one in before ^ after if is_named(asked.words, one)}
        assert mentioned == before ^ after
        if kind in ("add", "remove", "swap"):
            assert (len(after - before), len(before - after)) == {"add": (1, 0), "remove": (0, 1), "swap": (1, 1)}[
                kind
            ]
        else:
            assert before == after
        if kind == "background":
            assert target.background.colour in asked.words and target.background.colour != reference.background.colour
        assert set(reference.concepts) == before


def is_named(words: str, hexcode: str) -> bool:
    concept = concept_table()[hexcode]
    return concept.name in words or concept.plural in words


def test_queries_of_training_hold_nothing_out():
    for index in range(60):
        asked = query(0, "train", index)
        for layout in (asked.reference, *asked.gallery):
            assert not any(is_held_out(a, b) for a in layout.concepts for b in layout.concepts if a < b)
            for group in layout.groups:
                assert all(-1e-9 <= x and x + w <= 1 + 1e-9 and -1e-9 <= y and y + h <= 1 + 1e-9
                           for x, y, w, h in group.boxes)  # fmt: skip


@pytest.mark.parametrize("split", ["train", "unseen_pairs"])
def test_what_is_told_of_a_twin_is_false_of_the_other(split):
    for index in range(60):
        couple = [
            (scenes.pictured("", layout, 64, captions), captions) for layout, captions in draw_twins(5, split, index)
        ]
        (one, told), (other, told_of_other) = couple
        assert facts(one.layout) != facts(other.layout)
        for text in (caption.text for caption in told):
            assert not wrong(text, Seen.of(one)) and wrong(text, Seen.of(other)), (index, text)
        for text in (caption.text for caption in told_of_other):
            assert not wrong(text, Seen.of(other)) and wrong(text, Seen.of(one)), (index, text)


def test_twins_lie_beside_each_other(tmp_path):
    scenes.main([str(tmp_path), "--pairs", "0", "--twins", "8", "--seed", "5"])
    assert [file.name for file in tmp_path.iterdir()] == ["train_twins.parquet"]
    rows = pq.read_table(tmp_path / "train_twins.parquet").to_pylist()
    assert [row["id"] for row in rows[4:6]] == ["twin-train-5-2-0", "twin-train-5-2-1"]
    assert [row["captions"] for row in rows[4:6]] == [
        [caption.text for caption in captions] for _, captions in draw_twins(5, "train", 2)
    ]


def test_so_many_groups_a_scene_are_written(tmp_path):
    scenes.main([str(tmp_path), "--pairs", "6", "--groups", "1"])
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [len(row["names"]) for row in rows] == [1] * 6
    assert rows[4]["captions"] == scenes.scene(0, "train", 4, groups=1).texts


def test_parquet_is_what_the_loaders_read(tmp_path):
    scenes.main([str(tmp_path), "--pairs", "20", "--queries", "3", "--split", "train", "unseen_concepts"])
    rows = open_rows([str(tmp_path / "train.parquet")], id_column="concepts")
    assert len(rows) == 20
    assert rows[3]["captions"] == scenes.scene(0, "train", 3).texts
    table = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert table[3]["objects"][0]["box"] == list(scenes.scene(0, "train", 3).objects[0].box)
    assert all(len(row["hard_captions"]) == len(row["hard_kinds"]) == len(row["hard_of"]) for row in table)
    queries = pq.read_table(tmp_path / "unseen_concepts_queries.parquet").to_pylist()
    gallery = pq.read_table(tmp_path / "unseen_concepts_gallery.parquet").to_pylist()
    assert len(queries) == 3 and len(gallery) == 30
    assert all(gallery[one["target"]]["name"] == "target" for one in queries)
    assert [gallery[number]["name"] for number in queries[2]["choices"]] == queries[2]["names"]
    assert len(open_rows([str(tmp_path / "unseen_concepts_gallery.parquet")])) == 30
    assert not list(tmp_path.glob("*.part"))


def test_several_processes_write_the_same(tmp_path):
    for workers in ("1", "2"):
        scenes.main([str(tmp_path / workers), "--pairs", "150", "--split", "unseen_style", "--workers", workers])
    one, other = (pq.read_table(tmp_path / workers / "unseen_style.parquet") for workers in ("1", "2"))
    assert one.equals(other)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="split must be one of train, .*, got 'test'"):
        scenes.scene(0, "test", 0)
    with pytest.raises(ValueError, match="kind must be one of add, .*, got 'rotate'"):
        query(0, "train", 0, "rotate")
