"""Karpathy's and ALBEF's annotation files as rows, in files written here in their formats."""

import json
from pathlib import Path

import pytest
from PIL import Image

from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.row_checks import PairDataError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def coco(folder: Path, **changes) -> Path:
    """dataset_coco.json with a picture or two of each split; `changes` replace fields of the first."""
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "test", "train"]):
        name, place = f"COCO_{number:012d}.jpg", "val2014" if number else "train2014"
        picture(folder / place / name)
        sentences = [{"raw": f"Caption {k} of {number}.", "tokens": [], "sentid": 9 * number + k} for k in range(5)]
        images.append({"filepath": place, "filename": name, "imgid": number, "split": split, "sentences": sentences})
    images[0] |= changes
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_pictures_with_all_their_captions(tmp_path):
    rows = open_karpathy(coco(tmp_path), split="test")
    assert len(rows) == 2 and rows.exact_resume
    assert rows[1]["image"] == str(tmp_path / "val2014" / "COCO_000000000004.jpg")
    assert rows[1]["captions"] == [f"Caption {k} of 4." for k in range(5)]
    assert len(set(rows.ids().tolist())) == 2


def test_train_is_train_and_restval_one_caption_a_row(tmp_path):
    rows = open_karpathy(coco(tmp_path), split="train", captions_apart=True)
    assert [row["captions"] for row in rows.take(range(15))] == [
        [f"Caption {k} of {number}."] for number in (0, 1, 5) for k in range(5)
    ]
    ids = rows.ids().tolist()
    assert [ids.index(one) for one in ids] == [0] * 5 + [5] * 5 + [10] * 5  # captions of a picture are positives


def test_flickr_has_no_folders_in_its_file(tmp_path):
    picture(tmp_path / "flickr30k-images" / "36979.jpg")
    image = {"filename": "36979.jpg", "imgid": 0, "split": "val", "sentences": [{"raw": "Two men.", "tokens": []}]}
    path = write(tmp_path / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    rows = open_karpathy(path, image_folder=tmp_path / "flickr30k-images")
    assert rows[0] == {
        "image": str(tmp_path / "flickr30k-images" / "36979.jpg"),
        "captions": ["Two men."],
        "id": str(tmp_path / "flickr30k-images" / "36979.jpg"),
    }


def test_albefs_files(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "images" / name)
    train = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": "two", "image_id": "coco_2"},
        {"image": "a.jpg", "caption": "three", "image_id": "coco_1"},
    ]
    rows = open_karpathy(write(tmp_path / "coco_train.json", train), tmp_path / "images", captions_apart=True)
    assert [row["captions"] for row in rows.take(range(3))] == [["one"], ["two"], ["three"]]
    ids = rows.ids().tolist()
    assert ids[0] == ids[2] != ids[1]
    test = [{"image": "a.jpg", "caption": ["one", "three"]}, {"image": "b.jpg", "caption": ["two"]}]
    path = write(tmp_path / "coco_test.json", test)
    rows = open_karpathy(path, tmp_path / "images")
    assert [(row["captions"], row["id"]) for row in rows.take(range(2))] == [
        (["one", "three"], str(tmp_path / "images" / "a.jpg")),
        (["two"], str(tmp_path / "images" / "b.jpg")),
    ]
    both = open_karpathy([tmp_path / "coco_train.json", path], tmp_path / "images")
    assert len(both) == 5 and both[3]["captions"] == ["one", "three"]


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path):
    files = []
    for folder in ("one", "other"):
        picture(tmp_path / folder / "0.jpg")
        files.append(write(tmp_path / folder / "captions.json", [{"image": "0.jpg", "caption": [folder]}]))
    both = open_karpathy(files)
    assert len(set(both.ids().tolist())) == 2 and both[0]["id"] == str(tmp_path / "one" / "0.jpg")


def test_bad_rows_are_named_or_kept_apart(tmp_path):
    path = coco(tmp_path, sentences=[{"raw": "good"}, {"raw": " "}, {"tokens": ["no", "raw"]}])
    (tmp_path / "val2014" / "COCO_000000000005.jpg").unlink()
    with pytest.raises(PairDataError) as told:
        open_karpathy(path, split="train", captions_apart=True)
    assert "2 of 13 rows" in str(told.value)
    assert "row 1: image 0 (COCO_000000000000.jpg): caption 0 of the list: the caption is empty" in str(told.value)
    assert "row 2: image 0" in str(told.value) and "the caption is null" in str(told.value)
    rows = open_karpathy(path, split="train", captions_apart=True, bad_rows="skip")
    assert sorted(rows.bad) == [1, 2, 8, 9, 10, 11, 12] and "no picture file" in rows.bad[8]
    assert rows[0]["captions"] == ["good"] and next(rows.captions()) == "good"


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ({"images": [{"split": "a"}, {"split": "b"}]}, None, r"holds several splits; choose one of \['a', 'b'\]"),
        ({"images": [{"split": "a"}]}, "test", "has no split 'test'"),
        ({"annotations": []}, None, r"expected a list of entries .* got an object with \['annotations'\]"),
        ("text", None, "got str"),
        ([], None, "no rows"),
        ([7], None, r"row 0: entry 0 \(7, expected an object\)"),
        ([{"image": 5, "caption": "x"}], None, "the picture must be a path, got int"),
        ([{"image": "a.jpg"}], None, "the caption is null"),
        ([{"image": "a.jpg", "caption": {"x": 1}}], None, "must be a string or a list of strings, got dict"),
        ([{"image": "a.jpg", "caption": ["x", 3]}], None, "not a string"),
        ([{"image": "gone.jpg", "caption": "x"}], None, "no picture file .*gone.jpg"),
    ],
)  # fmt: skip
def test_what_is_no_such_file(tmp_path, content, split, message):
    picture(tmp_path / "a.jpg")
    with pytest.raises(PairDataError, match=message):
        open_karpathy(write(tmp_path / "file.json", content), split=split)


def test_a_file_that_is_cut_short_or_gone(tmp_path):
    path = coco(tmp_path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(PairDataError, match="cannot be read as JSON: it is not JSON"):
        open_karpathy(path, split="test")
    with pytest.raises(PairDataError, match="cannot be read"):
        open_karpathy(tmp_path / "gone.json")
