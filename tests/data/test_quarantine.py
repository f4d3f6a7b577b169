"""Bad rows: every kind is skipped, named and replaced, the batch keeps its size, and too many of them stop the run."""

import json
import re

import datasets
import pytest
import torch
from bad_inputs.cells import CAPTIONS_BEYOND_ARROW, CAPTIONS_READ, CAPTIONS_REFUSED, IDS_REFUSED, PLACES_REFUSED
from bad_inputs.pictures import READ, REFUSED
from bad_inputs.tables import PARTLY, ROWS, UNREADABLE
from PIL import Image
from tiny_loading import collator_of, dataset_of, loader_of, real_pairs

from oner.processing.data.mixture import PairMixture
from oner.processing.data.sources import PairDataError, open_rows
from oner.processing.image_processing_vl import open_image
from oner.processing.vl_tokenizer import train_tokenizer

BATCH, BAD, COUNT = 4, 5, 12
# what Pillow says of broken metadata and of bombs besides refusing or reading them
pytestmark = pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF", "ignore::PIL.Image.DecompressionBombWarning", "ignore:Image was not the expected size"
)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def pairs(emoji_folder):
    return real_pairs(emoji_folder)


@pytest.fixture(scope="module")
def picture(pairs) -> Image.Image:
    return open_image(pairs[0][5])


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return train_tokenizer(pairs[1], vocab_size=300)


def dataset(pairs, **changes):
    return dataset_of(pairs, COUNT, **changes)


def with_cell(values, cell, place=BAD):
    return [cell if number == place else value for number, value in enumerate(values)]


def check_epochs(loader, bad, batch_size=BATCH, count=COUNT):
    """Two epochs of whole batches without the bad row and with all others; returns the lines of the quarantine."""
    batches = list(loader)
    shown = [number for batch in batches for number in batch["rows"].tolist()]
    lines = [line for batch in batches for line in batch.get("quarantine", [])]
    assert len(batches) == 2 * count // batch_size and bad not in shown
    for batch in batches:
        assert len(batch["rows"]) == len(batch["pixel_values"]) == batch_size == len(set(batch["rows"].tolist()))
        assert torch.isfinite(batch["pixel_values"]).all()
    assert set(shown) == set(range(count)) - {bad}
    return lines


# The corpus


def test_the_corpus_is_large_enough():
    kinds = [REFUSED, READ, CAPTIONS_REFUSED, CAPTIONS_BEYOND_ARROW, CAPTIONS_READ, IDS_REFUSED, PLACES_REFUSED]
    assert sum(map(len, [*kinds, UNREADABLE, PARTLY])) >= 60


@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_that_cannot_be_read(kind, pairs, picture, tokenizer):
    make, words = REFUSED[kind]
    rows = open_rows(dataset(pairs, image=with_cell(pairs[0][:COUNT], make(picture))), bad_rows="skip")
    lines = check_epochs(loader_of(rows, collator_of(tokenizer), 6), BAD)
    if kind == "0 bytes":
        assert lines == [] and rows.bad == {BAD: "the picture has 0 bytes"}
        return
    assert rows.bad == {} and [(line["row"], line["epoch"], line["attempt"]) for line in lines] == [
        (BAD, 0, 0),
        (BAD, 1, 0),
    ]
    assert all(line["reason"].startswith("cannot read the picture") for line in lines)
    assert all(re.search(words, line["reason"]) for line in lines), lines[0]["reason"]


@pytest.mark.parametrize("kind", READ)
def test_a_picture_that_is_only_unusual(kind, pairs, picture, tokenizer):
    rows = open_rows(dataset(pairs, image=with_cell(pairs[0][:COUNT], READ[kind](picture))), bad_rows="skip")
    batches = list(loader_of(rows, collator_of(tokenizer), steps=3))
    assert sorted(number for batch in batches for number in batch["rows"].tolist()) == list(range(COUNT))
    assert not any("quarantine" in batch for batch in batches)
    assert all(torch.isfinite(batch["pixel_values"]).all() for batch in batches)


@pytest.mark.parametrize("kind", CAPTIONS_REFUSED)
def test_a_caption_that_cannot_be_used(kind, pairs, tokenizer):
    cell, words = CAPTIONS_REFUSED[kind]
    texts = pairs[1][:COUNT] if not isinstance(cell, list) else [[text] for text in pairs[1][:COUNT]]
    data = dataset(pairs, text=with_cell(texts, cell))
    rows = open_rows(data, bad_rows="skip")
    lines = check_epochs(loader_of(rows, collator_of(tokenizer), 6), BAD)
    found = rows.bad[BAD] if rows.bad else lines[0]["reason"]
    assert re.search(words, found) and len(lines) == (0 if rows.bad else 2)
    if rows.bad:
        assert list(rows.bad) == [BAD] and len(list(rows.captions())) == COUNT - 1
        with pytest.raises(PairDataError, match=f"1 of {COUNT} rows cannot be used.*\n  row {BAD}: .*{words}"):
            open_rows(data)


@pytest.mark.parametrize("kind", CAPTIONS_BEYOND_ARROW)
def test_a_caption_that_only_python_can_hold(kind, pairs, tokenizer):
    cell, words = CAPTIONS_BEYOND_ARROW[kind]

    class Rows(PairMixture):
        def take(self, indices):
            taken = super().take(indices)
            return [{**row, "captions": [cell]} if i == BAD else row for i, row in zip(indices, taken, strict=True)]

    rows = Rows([open_rows(dataset(pairs))])
    lines = check_epochs(loader_of(rows, collator_of(tokenizer), 6), BAD)
    assert len(lines) == 2 and all(re.search(words, line["reason"]) for line in lines)
    json.dumps(lines).encode("utf-8")


@pytest.mark.parametrize("kind", CAPTIONS_READ)
def test_a_caption_that_is_only_unusual(kind, pairs, tokenizer):
    cell = CAPTIONS_READ[kind]
    texts = pairs[1][:COUNT] if isinstance(cell, str) else [[text] for text in pairs[1][:COUNT]]
    rows = open_rows(dataset(pairs, text=with_cell(texts, cell)), bad_rows="skip")
    batches = list(loader_of(rows, collator_of(tokenizer), steps=3))
    assert rows.bad == {} and not any("quarantine" in batch for batch in batches)


@pytest.mark.parametrize("kind", IDS_REFUSED)
def test_an_id_that_cannot_be_used(kind, pairs, tokenizer):
    cells, words = IDS_REFUSED[kind]
    data = dataset(pairs, key=(cells * COUNT)[:COUNT])
    rows = open_rows(data, id_column="key", bad_rows="skip")
    assert list(rows.bad) == [1, 4, 7, 10] and all(re.search(words, reason) for reason in rows.bad.values())
    ids = rows.ids()
    assert len(set(ids[[1, 4, 7, 10]])) == 4 and len(set(ids[[0, 3, 6, 9]])) == 1
    shown = [number for batch in loader_of(rows, collator_of(tokenizer), 6) for number in batch["rows"].tolist()]
    assert len(shown) == 24 and not set(shown) & set(rows.bad)


@pytest.mark.parametrize("kind", PLACES_REFUSED)
def test_a_picture_that_is_not_there(kind, pairs, tokenizer, tmp_path):
    make, words = PLACES_REFUSED[kind]
    for number in range(COUNT):
        (tmp_path / f"{number}.png").write_bytes(pairs[0][number])
    names = with_cell([f"{number}.png" for number in range(COUNT)], make(tmp_path))
    table = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"image": name, "text": text}) for name, text in zip(names, pairs[1], strict=False)]
    table.write_text("\n".join(lines))
    rows = open_rows(table, bad_rows="skip")
    lines = check_epochs(loader_of(rows, collator_of(tokenizer), 6), BAD)
    found = rows.bad[BAD] if rows.bad else lines[0]["reason"]
    assert re.search(words, found) and len(lines) == (0 if rows.bad else 2)


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("bad_rows", ["raise", "skip"])
def test_a_file_that_cannot_be_read(kind, bad_rows, pairs, tmp_path):
    make, words = UNREADABLE[kind]
    for name, content in zip((name for name, _ in ROWS), pairs[0], strict=False):
        (tmp_path / name).write_bytes(content)
    source = make(tmp_path)
    with pytest.raises(PairDataError) as caught:
        open_rows(source, bad_rows=bad_rows)
    assert re.search(words, str(caught.value)) and source.name in str(caught.value)


@pytest.mark.parametrize("kind", PARTLY)
def test_a_file_with_bad_rows(kind, pairs, tokenizer, tmp_path):
    make, expected = PARTLY[kind]
    for name, content in zip((name for name, _ in ROWS), pairs[0], strict=False):
        (tmp_path / name).write_bytes(content)
    source = make(tmp_path)
    rows = open_rows(source, bad_rows="skip")
    assert {row: bool(re.search(words, rows.bad.get(row, ""))) for row, words in expected.items()} == dict.fromkeys(
        expected, True
    ), rows.bad
    assert {row for row in rows.bad if row < len(ROWS)} == set(expected)
    good = [row for row in range(len(ROWS)) if row not in expected]
    taken = rows.take(good)
    if "line break" not in kind and "emoji" not in kind and "not UTF-8" not in kind:
        assert [row["captions"] for row in taken] == [[ROWS[number][1]] for number in good]
    shown = {
        number
        for batch in loader_of(rows, collator_of(tokenizer), 9, batch_size=2)
        for number in batch["rows"].tolist()
    }
    assert shown == set(good)
    if expected:
        with pytest.raises(PairDataError, match="|".join(f"row {row}" for row in expected)):
            open_rows(source)
