"""Layouts of the same rows against each other, whole and in chunks; what is dropped, of text, images and both."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_loading import collator_of, special_of

from oner.processing.data.augmentation import CodeView, TrainingImageTransform
from oner.processing.data.chunks import split_pairs, text_slots
from oner.processing.data.collation import Collator, Reader
from oner.processing.data.layouts import ImageLayout, JointLayout, SeparateLayout, SpecialTokens
from oner.processing.data.masking import Dropping, Masking, Replacement
from oner.processing.data.sampling import RowKey
from oner.processing.vl_tokenizer import train_tokenizer

N, SIZE = 4, 16  # patches of 8 x 8
TEXTS = ["red apple", "a big green tree in the wind", "car", "blue car and a red apple", "tree", "the big car", "wind"]
PER_TOKEN = {"text_index", "mlm_index", "mlm_labels"}
MASKS = Masking(mlm_probability=0.5, mim_ratio=[0.5, 0.5])
DROPS = Masking(mlm_probability=0.5, mim_ratio=[0.75, 0.75], corruption="drop")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=120, min_frequency=1)


def items():
    def image(number):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return [
        (RowKey(number, 0, 0.2), {"image": image(number), "captions": [TEXTS[number]], "id": number % 3})
        for number in range(len(TEXTS))
    ]


def transform():
    return TrainingImageTransform(SIZE, code_view=CodeView(8))


def texts_alone(tokenizer, masking=MASKS, **options):
    special = special_of(tokenizer, image=None)
    corruption = Dropping(masking) if masking.corruption == "drop" else Replacement(masking, special)
    return Collator(Reader(tokenizer, **options), SeparateLayout(special), corruption)


def images_alone(masking=MASKS):
    special = SpecialTokens(cls=3, mask=4, pad=0, vocab_size=9)
    corruption = Dropping(masking) if masking.corruption == "drop" else Replacement(masking, special)
    return Collator(Reader(image_transform=transform()), ImageLayout(8), corruption)


def pairs(tokenizer, layout, corruption="replace"):
    """Of pairs, by the numbers of MASKS."""
    options = {"mlm_probability": 0.5, "mim_ratio": [0.5, 0.5], "corruption": corruption}
    return collator_of(tokenizer, transform(), layout, **options)


def test_the_separate_layout_is_the_joint_one_with_its_placeholders_cut_out(tokenizer):
    joint, separate = (pairs(tokenizer, layout)(items()) for layout in (JointLayout, SeparateLayout))
    assert joint.keys() == separate.keys()
    widened = ("input_ids", "attention_mask", "masked_input_ids")
    for name in widened:
        left = torch.cat([joint[name][:, :1], joint[name][:, 1 + N :]], dim=1)
        assert torch.equal(left, separate[name]) and joint[name].shape[1] == separate[name].shape[1] + N, name
    for name in separate.keys() - set(widened):
        assert torch.equal(joint[name], separate[name]), name
    assert not (separate["input_ids"] == 1).any() and (separate["input_ids"][:, 0] == 3).all()
    assert text_slots(joint) == text_slots(separate) == separate["input_ids"].shape[1] - 1


def test_texts_and_images_alone_are_what_a_reader_of_both_would_choose(tokenizer):
    """Of the text, bit by bit; an image is drawn behind the same draw of a caption."""
    both = pairs(tokenizer, SeparateLayout)
    both.seed = 0
    both, texts, images = both(items()), texts_alone(tokenizer)(items()), images_alone()(items())
    assert set(texts) == {"input_ids", "attention_mask", "masked_input_ids", "ids", "rows"} | PER_TOKEN
    assert set(images) == {"pixel_values", "code_pixel_values", "bool_masked_pos", "mim_index", "ids", "rows"}
    assert torch.equal(texts["input_ids"], both["input_ids"]) and torch.equal(texts["ids"], both["ids"])
    for name in ("pixel_values", "code_pixel_values"):
        assert torch.equal(images[name], both[name])
    assert images["bool_masked_pos"].sum(1).tolist() == [2] * len(TEXTS)
    assert (texts["input_ids"] != texts["masked_input_ids"]).any()


@pytest.mark.parametrize("corruption", ["replace", "drop"])
@pytest.mark.parametrize("layout", [JointLayout, SeparateLayout, "texts", "images"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_chunks_are_what_their_rows_collate_to(tokenizer, layout, corruption, count):
    masking = MASKS if corruption == "replace" else DROPS
    if layout == "texts":
        make = texts_alone(tokenizer, masking)
    elif layout == "images":
        make = images_alone(masking)
    else:
        make = pairs(tokenizer, layout, corruption)
    rows = items()
    chunks, start = split_pairs(make(rows), count), 0
    for chunk in chunks:
        end = start + len(chunk["rows"])
        alone = make(rows[start:end])
        assert chunk.keys() == alone.keys()
        for name, value in alone.items():
            found = chunk[name]
            if name in ("input_ids", "attention_mask", "masked_input_ids"):  # at the width of the whole batch
                assert not found[:, value.shape[1] :].any()  # [PAD] is 0 here
                found = found[:, : value.shape[1]]
            elif name == "text_index":  # places in slots of the whole batch
                slots, mine = text_slots(chunk), text_slots(alone)
                found = found // slots * mine + found % slots
            assert torch.equal(found, value), name
        start = end
    assert start == len(rows) and max(map(len, (c["rows"] for c in chunks))) - 7 // count <= 1


@pytest.mark.parametrize("layout", [JointLayout, SeparateLayout])
def test_dropped_tokens_are_neither_cls_nor_padding(tokenizer, layout):
    make = pairs(tokenizer, layout, "drop")
    batch = make(items())
    assert "masked_input_ids" not in batch
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert 1 in lengths and max(lengths) > 5
    slots = text_slots(batch)
    text = batch["input_ids"][:, -slots:]
    dropped = batch["text_index"][batch["mlm_index"]]
    assert torch.equal(text.flatten()[dropped], batch["mlm_labels"])
    assert torch.bincount(dropped // slots, minlength=7).tolist() == [length // 2 for length in lengths]
    assert not torch.isin(batch["mlm_labels"], torch.tensor([0, 1, 3])).any()
    assert batch["bool_masked_pos"].sum(1).tolist() == [2] * len(TEXTS)


def test_a_draw_does_not_depend_on_the_batch(tokenizer):
    for make in (texts_alone(tokenizer, DROPS), images_alone(DROPS), pairs(tokenizer, SeparateLayout, "drop")):
        whole, alone = make(items()), make(items()[3:4])
        (mine,) = split_pairs(make(items()[3:4]), 1)
        chunk = split_pairs(whole, 7)[3]
        for name in ("mlm_labels", "mlm_index", "bool_masked_pos", "mim_index", "pixel_values"):
            if name in whole:
                assert torch.equal(chunk[name], alone[name]) and torch.equal(mine[name], alone[name]), name


def test_parts_that_do_not_fit_are_refused(tokenizer):
    special, reader = special_of(tokenizer), Reader(tokenizer, transform())
    with pytest.raises(ValueError, match="ImageLayout and the reader do not fit: expected a layout of texts"):
        Collator(reader, ImageLayout(8))
    with pytest.raises(ValueError, match="SeparateLayout and the reader do not fit: expected a tokenizer"):
        Collator(Reader(image_transform=transform()), SeparateLayout(special, 8))
    with pytest.raises(ValueError, match="needs the layout's patch_size, got none"):
        Collator(reader, SeparateLayout(special), Replacement(MASKS, special))
    with pytest.raises(ValueError, match="a tokenizer, an image transform or both, got neither"):
        Reader()
    with pytest.raises(ValueError, match=r"must be different ids in \[0, 9\), got {'cls': 3, 'mask': 3, 'pad': 0}"):
        SpecialTokens(cls=3, mask=3, pad=0, vocab_size=9)


# Windows


@pytest.fixture(scope="module")
def document(tokenizer):
    """25 tokens of which no two windows of 10 are alike."""
    words = ["red", "apple", "big", "green", "tree", "wind", "car", "blue"]
    text = " ".join(words[number % 8] if number % 3 else words[(number * 5) % 7] for number in range(25))
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_window_of_a_long_text_is_drawn_and_none_else(tokenizer, document):
    text, ids = document
    assert len(ids) == 25
    make, seen = texts_alone(tokenizer, windows=True, max_text_length=10), {}
    for epoch in range(300):
        batch = make([(RowKey(5, epoch, 0.0), {"captions": [text], "image": None, "id": 1})])
        (row,) = batch["input_ids"].tolist()
        assert row[0] == 3 and len(row) == 11
        seen[tuple(row[1:])] = seen.get(tuple(row[1:]), 0) + 1
    assert set(seen) == {tuple(ids[:10]), tuple(ids[10:20]), tuple(ids[15:25])}  # the last one reaches back
    assert min(seen.values()) > 70  # 100 expected of each


def test_what_fits_is_one_window_and_a_multiple_is_cut_evenly(tokenizer, document):
    text, ids = document
    fifths = {tuple(ids[start : start + 5]) for start in range(0, 25, 5)}
    for length, expected in ((25, {tuple(ids)}), (40, {tuple(ids)}), (5, fifths)):
        make = texts_alone(tokenizer, windows=True, max_text_length=length)
        rows = [(RowKey(5, epoch, 0.0), {"captions": [text], "id": 1}) for epoch in range(120)]
        batch = make(rows)
        found = {
            tuple(row[1 : 1 + int(mask.sum()) - 1])
            for row, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"], strict=True)
        }
        assert found == expected


def test_without_windows_a_text_is_cut(tokenizer, document):
    text, ids = document
    make = texts_alone(tokenizer, max_text_length=10)
    rows = [(RowKey(5, epoch, 0.0), {"captions": [text], "id": 1}) for epoch in range(20)]
    assert {tuple(row[1:]) for row in make(rows)["input_ids"].tolist()} == {tuple(ids[:10])}


def test_a_window_is_the_row_s_own_whatever_the_batch(tokenizer, document):
    make = texts_alone(tokenizer, windows=True, max_text_length=10)
    rows = [(RowKey(number, 0, 0.0), {"captions": [document[0]], "id": 1}) for number in range(40)]
    whole = make(rows)
    for number in (0, 7, 11):
        assert torch.equal(make(rows[number : number + 1])["input_ids"], whole["input_ids"][number : number + 1])
    assert len({tuple(row) for row in whole["input_ids"].tolist()}) == 3
