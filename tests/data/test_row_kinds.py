"""Rows of images alone and of texts alone: every source gives them, none fakes the other half, bad ones are named."""

import io
import json
import tarfile
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_loading import loader_of, special_of
from torch.utils.data import DataLoader

from oner.processing.data.augmentation import TrainingImageTransform
from oner.processing.data.collation import Collator, Reader
from oner.processing.data.layouts import ImageLayout, SeparateLayout
from oner.processing.data.listed_rows import ListedRows
from oner.processing.data.masking import Dropping, Masking
from oner.processing.data.mixture import PairMixture, PairStreamMixture, open_mixture
from oner.processing.data.sampling import PairBatchSampler, RowKey, concept_id
from oner.processing.data.sources import PairDataError, PairStream, PairTrainingSet, PairTrainingStream, open_rows
from oner.processing.vl_captions import MAX_CAPTION_LENGTH, MAX_TEXT_LENGTH
from oner.processing.vl_tokenizer import train_tokenizer

LINES = ["one, two", 'a "quoted" word', "NA", "007"]
IDS = ["a", "b", "a", "c"]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 90)).save(buffer, "png")
    return buffer.getvalue()


def opened(source, kind, streaming=False, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_rows(source, kind, streaming=streaming, **options)


def listed(rows):
    return list(rows) if isinstance(rows, PairStream) else rows.take(range(len(rows)))


def message(*args, **options):
    with pytest.raises(PairDataError) as caught:
        opened(*args, **options)
    return str(caught.value)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


# Texts


def texts_as(form, folder):
    """The same four lines in a file of each format."""
    path = folder / f"texts.{form}"
    if form == "txt":
        path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    elif form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        cells = ['"' + line.replace('"', '""') + '"' for line in LINES]
        lines = [mark.join(pair) for pair in zip(["text", *cells], ["name", *IDS], strict=True)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif form == "jsonl":
        rows = [{"text": line, "name": name} for line, name in zip(LINES, IDS, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.table({"text": LINES, "name": IDS}), path)
    elif form == "folder":
        path.mkdir()
        (path / "1.txt").write_text("\n".join(LINES[:3]), encoding="utf-8")
        (path / "2.txt").write_text(LINES[3], encoding="utf-8")
    elif form == "object":
        return datasets.Dataset.from_dict({"text": LINES, "name": IDS})
    elif form == "saved":
        datasets.Dataset.from_dict({"text": LINES, "name": IDS}).save_to_disk(str(path))
    elif form == "tar":
        members = [(f"{number}.txt", line.encode()) for number, line in enumerate(LINES)]
        write_tar(path, [("0.png", png()), *members])
    return path


FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet", "folder", "object", "saved", "tar")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_of_texts_gives_the_same_rows(tmp_path, form, streaming):
    source = texts_as(form, tmp_path)
    if streaming and form in ("object", "saved", "tar"):
        if form == "tar":
            assert "open them without streaming" in message(source, "texts", streaming=True)
            return
        data = source if form == "object" else datasets.load_from_disk(str(source))
        source = data.to_iterable_dataset()
    rows = opened(source, "texts", streaming)
    expected = [{"image": None, "captions": [line], "id": number} for number, line in enumerate(LINES)]
    assert rows.kind == "texts" and listed(rows) == expected
    if not streaming:
        assert list(rows.captions()) == LINES and rows.ids().tolist() == [0, 1, 2, 3] and rows.exact_resume
        assert rows[2] == expected[2] and rows.take([3, 1]) == [expected[3], expected[1]]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "object"])
def test_texts_that_share_an_id_are_one_concept(tmp_path, form):
    rows = opened(texts_as(form, tmp_path), "texts", id_column="name")
    assert rows.has_ids and rows.ids().tolist() == [concept_id(name) for name in IDS] and rows[2]["id"] == "a"


def test_a_table_of_pairs_serves_either_half(emoji_folder):
    table = emoji_folder / "test_concept.parquet"
    both, texts, images = (opened(table, kind) for kind in ("pairs", "texts", "images"))
    assert len(both) == len(texts) == len(images) and list(texts.captions()) == list(both.captions())
    pair = both[5]
    assert texts[5] == {**pair, "image": None} and images[5] == {**pair, "captions": []}
    assert list(images.captions()) == [] and set(texts.data.column_names) == {"captions"}


def test_lines_without_text_are_no_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  \t\ntwo  \nthree\rfour\n\n".encode())
    for streaming in (False, True):
        rows = opened(tmp_path / "a.txt", "texts", streaming)
        assert [row["captions"] for row in listed(rows)] == [["one"], ["two  "], ["three"], ["four"]]
        assert [row["id"] for row in listed(rows)] == [0, 1, 2, 3]
    for content in ("", "\n \n"):
        (tmp_path / "empty.txt").write_text(content)
        assert "empty.txt" in message(tmp_path / "empty.txt", "texts")


def test_a_large_text_file_is_read_in_order(tmp_path):
    """More than what `datasets` reads at a time."""
    lines = [f"line {number} " + "x" * 1000 for number in range(12_000)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    rows = opened(tmp_path / "a.txt", "texts")
    assert len(rows) == 12_000
    for number in (0, 5_000, 9_999, 11_999):
        assert rows[number]["captions"] == [lines[number]] and rows[number]["id"] == number


def test_bad_lines_keep_their_numbers(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n\xff\xfe bad\nalso good\nnul \0 here\nlast\n")
    path = tmp_path / "a.txt"
    told = message(path, "texts")
    assert "row 1: is not UTF-8 (line 3)" in told
    rows = opened(path, "texts", bad_rows="skip")
    assert len(rows) == 5 and set(rows.bad) == {1, 3}
    assert "is not UTF-8 (line 3)" in rows.bad[1] and "the text holds NUL (character 4)" in rows.bad[3]
    assert list(rows.captions()) == ["good", "also good", "last"] and rows[4]["captions"] == ["last"]
    stream = opened(path, "texts", True, bad_rows="skip")
    found = [(number, reason and reason[:14]) for number, _, reason in stream.checked()]
    assert found == [(0, None), (1, "is not UTF-8 ("), (2, None), (3, "the text holds"), (4, None)]
    (tmp_path / "wide.txt").write_text("one\ntwo\n", encoding="utf-16")
    assert "wide.txt: is UTF-16; expected UTF-8" in message(tmp_path / "wide.txt", "texts")


def test_a_bad_line_of_the_second_file_is_counted_behind_the_first(tmp_path):
    (tmp_path / "1.txt").write_text("a\n\nb\n")
    (tmp_path / "2.txt").write_bytes(b"c\n\xff\nd\n")
    rows = opened([tmp_path / "1.txt", tmp_path / "2.txt"], "texts", bad_rows="skip")
    assert set(rows.bad) == {3} and rows[4]["captions"] == ["d"] and rows.where(4) == (rows.name, 4)


def test_a_document_may_be_longer_than_a_caption(tmp_path, emoji_folder):
    long = "word " * (MAX_CAPTION_LENGTH // 5 + 1)
    beyond = "x" * (MAX_TEXT_LENGTH + 1)
    (tmp_path / "a.txt").write_text(f"{long}\n{beyond}\nshort\n")
    rows = opened(tmp_path / "a.txt", "texts", bad_rows="skip")
    assert rows.bad == {1: f"the text has {MAX_TEXT_LENGTH + 1} characters; expected at most {MAX_TEXT_LENGTH}"}
    caption = datasets.Dataset.from_dict({"image": [png()], "text": [long]})
    told = f"the caption has {len(long)} characters; expected at most {MAX_CAPTION_LENGTH}"
    assert told in message(caption, "pairs")


@pytest.mark.parametrize(
    "cell, reason",
    [
        (None, "the text is null"),
        (" \n", "the text is empty"),
        ([], "the list of texts is empty"),
        (["a", ""], "text 1 of the list: the text is empty"),
    ],
)
def test_bad_cells_of_texts_are_named(cell, reason):
    values = [cell, cell if isinstance(cell, list) else "fine"]
    if isinstance(cell, list):
        values[1] = ["fine"]
    data = datasets.Dataset.from_dict({"text": values})
    assert f"row 0: {reason}" in message(data, "texts")
    assert set(opened(data, "texts", bad_rows="skip").bad) == {0}


# Images


def images_as(form, folder):
    """The same four images in a source of each kind."""
    path = folder / f"images.{form}"
    cells = [png(10 * number) for number in range(4)]
    if form == "heap":
        for number, content in enumerate(cells):
            place = path / ("deep" if number < 2 else "deeper/still") / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        (path / "notes.txt").write_text("not an image")
        (path / ".hidden").mkdir()
        (path / ".hidden" / "no.png").write_bytes(cells[0])
    elif form in ("csv", "metadata"):
        path.mkdir()
        for number, content in enumerate(cells):
            (path / f"{number}.png").write_bytes(content)
        table = path / ("metadata.csv" if form == "metadata" else "list.csv")
        table.write_text("file_name,name\n" + "".join(f"{number}.png,{IDS[number]}\n" for number in range(4)))
        return path if form == "metadata" else table
    elif form == "parquet":
        pq.write_table(pa.table({"image": cells, "name": IDS}), path)
    elif form == "object":
        return datasets.Dataset.from_dict({"image": cells, "name": IDS})
    elif form == "tar":
        members = [(f"{number}.png", content) for number, content in enumerate(cells)]
        write_tar(path, [*members, ("lonely.txt", b"a caption without an image is no row"), ("3.txt", b"unread")])
    return path


def content_of(image):
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    return image if isinstance(image, bytes) else Path(image).read_bytes()


@pytest.mark.parametrize("form", ["heap", "csv", "metadata", "parquet", "object", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_of_images_gives_the_same_rows(tmp_path, form, streaming):
    source = images_as(form, tmp_path)
    if streaming and form in ("object", "tar"):
        if form == "tar":
            return
        source = source.to_iterable_dataset()
    rows = opened(source, "images", streaming)
    found = listed(rows)
    assert rows.kind == "images" and [row["id"] for row in found] == [0, 1, 2, 3]
    assert all(row["captions"] == [] and set(row) == {"image", "captions", "id"} for row in found)
    assert [content_of(row["image"]) for row in found] == [png(10 * number) for number in range(4)]
    if not streaming:
        assert list(rows.captions()) == [] and rows.ids().tolist() == [0, 1, 2, 3]


def test_images_with_ids(tmp_path):
    rows = opened(images_as("parquet", tmp_path), "images", id_column="name")
    assert rows.ids().tolist() == [concept_id(name) for name in IDS] and rows[3]["id"] == "c"
    shard = write_tar(
        tmp_path / "b.tar",
        [
            (f"{n}.{e}", c)
            for n in range(2)
            for e, c in (("jpg", png()), ("json", json.dumps({"who": n + 7}).encode()))
        ],
    )
    assert [row["id"] for row in listed(opened(shard, "images", id_column="who"))] == [7, 8]
    assert [row["id"] for row in listed(opened(shard, "images", id_column="__key__"))] == ["0", "1"]


def test_a_split_may_be_a_folder_of_images(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            place = tmp_path / "set" / split / f"n{number}" / "a.png"
            place.parent.mkdir(parents=True)
            place.write_bytes(png(number))
    assert len(opened(tmp_path / "set", "images")) == 5
    assert len(opened(tmp_path / "set", "images", split="val")) == 2


def test_bad_images_are_named_before_the_first_step(tmp_path):
    data = datasets.Dataset.from_dict({"image": [png(), b"", None, str(tmp_path / "none.png").encode()]})
    rows = opened(data, "images", bad_rows="skip")
    assert rows.bad == {1: "the picture has 0 bytes", 2: "the picture is null"}
    table = tmp_path / "list.csv"
    table.write_text("file_name\nnone.png\n")
    assert "row 0: no picture file" in message(table, "images")
    shard = write_tar(tmp_path / "a.tar", [("0.png", png()), ("1.png", b"")])
    assert set(opened(shard, "images", bad_rows="skip").bad) == {1}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    assert "texts" in message(tmp_path / "texts", "images")


# Kinds


def test_a_kind_reads_its_own_columns_only(tmp_path):
    data = datasets.Dataset.from_dict({"image": [png()], "text": ["a"]})
    with pytest.raises(ValueError, match="rows of texts have no image, got image_column 'image'"):
        open_rows(data, "texts", image_column="image")
    with pytest.raises(ValueError, match="rows of images have no text, got text_column 'text'"):
        open_rows(data, "images", text_column="text")
    with pytest.raises(ValueError, match="kind must be one of pairs, images, texts, got 'words'"):
        open_rows(data, "words")
    only = datasets.Dataset.from_dict({"text": ["a"]})
    assert "none of the columns image, file_name, image_path for the pictures" in message(only, "pairs")
    assert "none of the columns image, file_name, image_path for the pictures" in message(only, "images")
    assert "expected files of one kind out of" in message(texts_as("txt", tmp_path), "pairs")


def test_a_mixture_is_of_one_kind(tmp_path):
    texts, more = opened(texts_as("txt", tmp_path), "texts"), opened(texts_as("jsonl", tmp_path), "texts")
    both = PairMixture([texts, more])
    assert both.kind == "texts" and len(both) == 8 and list(both.captions()) == LINES * 2
    assert both[6] == {"image": None, "captions": ["NA"], "id": 6} and both.where(6) == (more.name, 2)
    images = opened(images_as("heap", tmp_path), "images")
    with pytest.raises(PairDataError, match="must have rows of one kind, got .*'texts'.*'images'"):
        PairMixture([texts, images])
    streams = [opened(tmp_path / "texts.txt", "texts", True), opened(tmp_path / "images.heap", "images", True)]
    with pytest.raises(PairDataError, match="must have rows of one kind"):
        PairStreamMixture(streams)


def test_entries_of_a_run_become_one_source_or_a_mixture(tmp_path):
    txt, jsonl = texts_as("txt", tmp_path), texts_as("jsonl", tmp_path)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "more.txt").write_text("five\nsix")
    joined = open_mixture([txt, other / "more.txt"], "texts")
    assert not isinstance(joined, PairMixture) and len(joined) == 6 and joined[5]["captions"] == ["six"]
    mixed = open_mixture([txt, jsonl, other], "texts", weights=[1, 1, 2])
    assert mixed.kind == "texts" and mixed.sizes == (4, 4, 2)
    heaps = open_mixture([images_as("heap", tmp_path), images_as("tar", tmp_path)], "images")
    assert heaps.kind == "images" and len(heaps) == 8 and heaps[5]["captions"] == []


def test_listed_rows_without_images_are_texts():
    rows = ListedRows([{"id": 1, "text": "a", "label": 0}], "list", images=())
    assert rows.kind == "texts" and rows[0]["label"] == 0 and not rows.bad


# To batches


@pytest.fixture
def documents(tmp_path):
    """Forty lines of many lengths, two of them bad."""
    rng = np.random.default_rng(0)
    words = ["red", "apple", "big", "green", "tree", "wind", "car", "blue"]
    lines = [" ".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(40)]
    content = [line.encode() for line in lines]
    content[7], content[21] = b"\xff\xff", b"nul \0"
    (tmp_path / "documents.txt").write_bytes(b"\n".join(content))
    return tmp_path / "documents.txt", train_tokenizer(lines, vocab_size=200, min_frequency=1)


def of_texts(tokenizer, length=16):
    reader = Reader(tokenizer, max_text_length=length, windows=True)
    dropping = Dropping(Masking(0.15, [0.0, 0.0], corruption="drop"))
    return Collator(reader, SeparateLayout(special_of(tokenizer)), dropping, seed=3)


def test_texts_train_through_workers_and_resumes(documents):
    path, tokenizer = documents
    rows = opened(path, "texts", bad_rows="skip")

    def batches(**options):
        return list(loader_of(rows, of_texts(tokenizer), 12, batch_size=8, **options))

    whole = batches()
    assert all(not {7, 21} & set(batch["rows"].tolist()) for batch in whole)
    for other, expected in ((batches(workers=2), whole), (batches(start_step=5), whole[5:])):
        for found, batch in zip(other, expected, strict=True):
            assert found.keys() == batch.keys() and all(
                torch.equal(found[name], value) for name, value in batch.items() if torch.is_tensor(value)
            )
    for batch in whole:
        lengths = batch["attention_mask"].sum(1) - 1
        slots = batch["input_ids"].shape[1] - 1
        assert slots == lengths.max() <= 16
        dropped = torch.bincount(batch["text_index"][batch["mlm_index"]] // slots, minlength=8)
        assert dropped.tolist() == [length * 15 // 100 for length in lengths.tolist()]


def test_texts_train_as_a_stream(documents):
    path, tokenizer = documents
    stream = opened(path, "texts", True, bad_rows="skip")
    data = PairTrainingStream(stream, 4, 9, seed=1)
    batches = list(DataLoader(data, batch_size=None, collate_fn=of_texts(tokenizer)))
    assert len(batches) == 9 and all(len(batch["rows"]) == 4 for batch in batches)
    assert {line["row"] for batch in batches for line in batch.get("quarantine", [])} <= {7, 21}


def test_images_train_and_a_picture_that_does_not_decode_is_replaced(tmp_path):
    heap = images_as("heap", tmp_path)
    (heap / "broken.png").write_bytes(b"<html>")
    rows = opened(heap, "images", bad_rows="skip")
    assert len(rows) == 5 and not rows.bad
    dropping = Dropping(Masking(mim_ratio=[0.75, 0.75], corruption="drop"))
    make = Collator(Reader(image_transform=TrainingImageTransform(16)), ImageLayout(8), dropping)
    batches = list(loader_of(rows, make, 5, batch_size=2))
    assert all(batch["pixel_values"].shape == (2, 3, 16, 16) for batch in batches)
    assert all(batch["bool_masked_pos"].sum(1).tolist() == [3, 3] for batch in batches)
    lines = [line for batch in batches for line in batch.get("quarantine", [])]
    assert lines and all("cannot read the picture" in line["reason"] for line in lines)
    sampler = PairBatchSampler(len(rows), 2, seed=3, total_steps=5)
    with pytest.raises(ValueError, match="row 0 of the data set: cannot read the picture"):
        list(DataLoader(PairTrainingSet(rows), batch_sampler=sampler, collate_fn=make))


def test_an_image_is_cropped_as_beside_its_captions(emoji_folder):
    """The draws of a run on images do not depend on whether there are captions."""
    table = emoji_folder / "test_concept.parquet"
    images, both = opened(table, "images"), opened(table, "pairs")
    make = Collator(Reader(image_transform=TrainingImageTransform(16)), ImageLayout())
    one, two = (make([(RowKey(number, 1, 0.0), rows[number]) for number in range(6)]) for rows in (images, both))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
