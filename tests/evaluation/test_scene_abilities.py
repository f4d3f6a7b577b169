"""Abilities on scenes: a world of coloured squares, a model that counts colours, and every number known."""

import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_simla_pictures import make_processor, make_simla

from oner import SimlaForImageTextRetrieval
from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.image_processing_vl import open_image
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.training.evaluation.scenes import SceneEvaluator, asked_of, inside, pointed, quarters

ROOT = Path(__file__).parents[2]
INKS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "teal": (0, 255, 255), "pink": (255, 0, 255)}
NAMES = list(INKS)
PLACES = [(0, 0), (16, 0), (0, 16), (16, 16)]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def scene(number, names, places=None):
    """Squares of 16 pixels in a picture of 32, one a quarter."""
    places = places or range(len(names))
    canvas = Image.new("RGB", (32, 32))
    objects = []
    for group, (name, place) in enumerate(zip(names, places, strict=True)):
        canvas.paste(INKS[name], (*PLACES[place], PLACES[place][0] + 16, PLACES[place][1] + 16))
        objects.append({"name": name, "group": group, "box": [*PLACES[place], 16, 16]})
    other = next(name for name in NAMES if name not in names)
    text = " and ".join(f"a {name}" for name in names)
    return {
        "id": f"scene-{number}", "image": png(canvas), "text": text, "captions": [text, f"{text} on black"],
        "concepts": "+".join(sorted(names)), "names": names, "objects": objects,
        "hard_captions": [text.replace(names[0], other), text.replace(names[-1], other) + " on black"],
        "hard_kinds": ["thing", "order"], "hard_of": [0, 1],
    }  # fmt: skip


def world():
    """Every single square, every pair, four squares in each of some orders; queries that add a square."""
    pairs = [[one, other] for one in NAMES for other in NAMES if one < other]
    fours = [[NAMES[(start + step) % 5] for step in range(4)] for start in range(5)]
    rows = [scene(number, names) for number, names in enumerate([[name] for name in NAMES] + pairs + fours)]
    queries, gallery = [], []
    for one, other in pairs:
        asked = scene(0, [one], [3])
        choices = [[one, other], [one], [other], [name for name in NAMES if name not in (one, other)][:2]]
        queries.append({
            "id": one + other, "image": asked["image"], "text": f"with a {other}", "reference_text": f"a {one}",
            "names": ["target", "reference", "words alone", "swap"], "target": len(gallery),
            "choices": list(range(len(gallery), len(gallery) + 4)), "concepts": one, "kind": "add",
        })  # fmt: skip
        gallery += [{key: scene(0, names)[key] for key in ("image", "text", "concepts")} for names in choices]
    return rows, queries, gallery


class Colours(torch.nn.Module):
    """Embeds a picture as the area of each colour, a text as its colours, both as their product (wrong on purpose)."""

    config = SimpleNamespace(image_size=32, patch_size=8, num_hidden_layers=0, hidden_size=5)

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    @staticmethod
    def seen(pixels):
        """(B, 3, H, W) -> (B, N, 5), the share of each colour in each patch of eight pixels."""
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2, 3)
        inks = torch.tensor(list(INKS.values())) / 255.0
        return (patches[:, :, :, None] == inks).all(-1).float().mean(2)

    def get_image_features(self, pixel_values, **_):
        patches = self.seen(pixel_values)
        return SimpleNamespace(
            pooler_output=patches.mean(1) + 1e-3, last_hidden_state=torch.cat([patches[:, :1] * 0, patches], 1) + 1e-6
        )

    def get_text_features(self, input_ids, attention_mask):
        words = torch.nn.functional.one_hot(input_ids, 6)[..., 1:].float() * attention_mask[..., None]
        return SimpleNamespace(pooler_output=words.sum(1) + 1e-3, last_hidden_state=words)

    def get_multimodal_features(self, input_ids, attention_mask, pixel_values):
        text, image = self.get_text_features(input_ids, attention_mask), self.get_image_features(pixel_values)
        return SimpleNamespace(pooler_output=text.pooler_output * image.pooler_output)


def colour_processor(images=None, text=None, **_):
    batch = {}
    if images is not None:
        pictures = [open_image(image) for image in images]
        rows = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
        batch["pixel_values"] = torch.stack(rows).view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    if text is not None:
        lines = [[NAMES.index(word) + 1 if word in NAMES else 0 for word in line.split()] for line in text]
        width = max(map(len, lines)) + 1
        batch["input_ids"] = torch.tensor([[0, *line] + [0] * (width - 1 - len(line)) for line in lines])
        real = [1 + len(line) for line in lines]
        batch["attention_mask"] = torch.tensor([[1] * count + [0] * (width - count) for count in real])
    return batch


def test_patches_and_quarters_of_boxes():
    # four patches a side over 32 x 64 pixels: middles at 4, 12 ... across and 8, 24 ... down
    found = inside([(3, 7, 10, 18), (28, 57, 1, 7)], (4, 4), (32, 64))
    assert found.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert quarters([(0, 0, 10, 10), (12, 50, 10, 10)], (32, 64)) == {0, 3}


def test_the_highest_patch_is_what_counts():
    asked = asked_of(world()[0])[:2]
    assert [one.text for one in asked] == ["a red", "a green"] and asked[1].boxes == [[16, 0, 16, 16]]
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 1] = maps[1, 3, 3] = 1
    assert pointed(maps, asked) == {"box": 0.5, "box_chance": 0.25, "quarter": 0.5, "quarter_chance": 0.25}


def test_every_number_of_a_model_that_counts_colours():
    rows, queries, gallery = world()
    evaluator = SceneEvaluator(rows, [row for row in rows if len(row["names"]) == 1], queries, gallery, "w")
    values = dict(evaluator.run(Colours(), colour_processor))
    # names are found wherever they stand; a scene is found by its caption, but for those with the same colours
    assert values["w/localization/asked"] == 20
    assert values["w/localization/box"] == values["w/localization/quarter"] == 1
    assert values["w/localization/box_chance"] == values["w/localization/quarter_chance"] == 0.25
    assert values["w/retrieval/tr_r@1"] == values["w/retrieval/ir_r@1"] == 1
    # a false caption has another colour in a place of a right one
    assert values["w/hard/cosine_told"] == 1 and values["w/hard/cosine_auc_thing"] > 0.9
    # one colour alone is in four pairs, among which chance decides; the sum of picture and word knows both
    assert values["w/pairs/sum_r@1"] == 1 and values["w/pairs/picture_r@1"] < 1 / 4
    assert values["w/pairs/both_over_sum"] == values["w/pairs/both_r@10"] / values["w/pairs/sum_r@10"]
    assert values["w/composed/sum_choice_r@1"] == 1 and values["w/composed/words_choice_r@1"] == 0
    # the caption of a single thing finds it; of ten queries four have the first colour, and all these tie
    assert values["w/same/words_r@10"] == 1 and values["w/same/chance@10"] == pytest.approx(10 / 40)
    assert values["w/guidance/guided/zero_shot_top1"] == 1 and values["w/guidance/guided_lost"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("scenes")
    rows, queries, gallery = world()
    for row in rows:
        row["captions_de"] = row["captions"]
    for name, table in (("seen", rows), ("seen_queries", queries), ("seen_gallery", gallery), ("unseen_style", rows)):
        pq.write_table(pa.Table.from_pylist(table), home / f"{name}.parquet")
    return home


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("abilities_example", ROOT / "examples" / "abilities.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["one tower", "matching"])
def test_one_command_fills_the_table(example, folder, tmp_path, capsys, kind):
    processor = make_processor()
    if kind == "matching":
        model = make_simla(SimlaForImageTextRetrieval, processor)
    else:
        processor = VisionLanguageProcessor(processor.image_processor, processor.tokenizer)
        torch.manual_seed(0)
        config = OneRConfig.from_size(
            "nano", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
            projection_hidden_size=32, projection_dim=16, vocab_size=len(processor.tokenizer), cls_token_id=3,
            mask_token_id=4,
        )  # fmt: skip
        model = OneRForImageTextRetrieval(config)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    common = [str(tmp_path / "model"), "--scenes", str(folder), "--device", "cpu", "--quiet"]
    values = example.main([*common, "--splits", "seen", "unseen_style"])
    table = (tmp_path / "model" / "results" / "abilities.md").read_text()
    assert table in capsys.readouterr().out and "| ability | seen | unseen_style |" in table
    assert "≥ 97.0 %" in table and "≥ 60.0 %" in table and "McNemar's p, seen/guidance/sum" in table
    assert "20 of seen, 20 of unseen_style; the aims of recall are for 1,000" in table
    assert ("Grad-CAM of contrast, in the box" in table) == ("re-ranked by the sum" in table) == (kind == "matching")
    stored = json.loads((tmp_path / "model" / "results" / "seen.abilities.json").read_text())
    assert stored["protocol"]["split"] == "seen" and stored["protocol"]["scenes"] == 20
    assert stored["values"]["seen/language/mean_over_english"] == pytest.approx(1)
    assert {name for name in values if name.startswith("seen/")} == set(stored["values"])
    with pytest.raises(SystemExit, match=r"has no unseen_pairs\.parquet: make scenes"):
        example.main([*common, "--splits", "unseen_pairs"])


def test_matching_is_asked_of_each_picture_with_its_own_captions(folder):
    rows = pq.read_table(folder / "seen.parquet").to_pylist()[:6]
    processor = make_processor()
    model = make_simla(SimlaForImageTextRetrieval, processor)
    values = dict(SceneEvaluator(rows).hard_captions(model, processor))

    def difference(row, text):
        with torch.no_grad():
            no, yes = model.match(**processor(images=open_image(row["image"]), text=text))[0]
        return float(yes - no)

    right = [difference(row, row["captions"][of]) for row in rows for of in row["hard_of"]]
    wrong = [difference(row, text) for row in rows for text in row["hard_captions"]]
    wins = [(one > other) for one in right for other in wrong]
    assert values["hard/itm_auc"] == pytest.approx(sum(wins) / len(wins), abs=0.02)
    told = [one > other for one, other in zip(right, wrong, strict=True)]
    assert values["hard/itm_told"] == pytest.approx(sum(told) / len(told))
