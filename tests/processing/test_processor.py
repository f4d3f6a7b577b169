"""One sequence from text, pictures or both."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoImageProcessor, BertTokenizer, PreTrainedConfig, ViTImageProcessor

from oner.processing.image_processing_vl import ImageDecodeError, VisionLanguageImageProcessor, open_image
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji" / "test_concept.parquet"
PAD, IMG, UNK, CLS, MASK = range(5)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return pq.read_table(EMOJI, columns=["image", "captions"]).to_pylist()[::80]


@pytest.fixture(scope="module")
def images(rows) -> list[dict]:
    return [row["image"] for row in rows]


@pytest.fixture(scope="module")
def texts(rows) -> list[str]:
    return [max(row["captions"], key=len) for row in rows]


@pytest.fixture(scope="module")
def processor(rows) -> VisionLanguageProcessor:
    class Config(PreTrainedConfig):
        model_type = "oner-processor-test"

    AutoImageProcessor.register(
        Config, image_processor_classes={"torchvision": VisionLanguageImageProcessor}, exist_ok=True
    )
    tokenizer = train_tokenizer([caption for row in rows for caption in row["captions"]], vocab_size=300)
    return VisionLanguageProcessor(VisionLanguageImageProcessor(size=32, patch_size=16), tokenizer)


def test_pairs_have_the_layout(processor, images, texts):
    batch = processor(images=images, text=texts)
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values"] == processor.model_input_names
    assert batch["pixel_values"].shape == (len(images), 3, 32, 32)
    words = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, words))
    assert min(map(len, words)) < longest
    for ids, mask, row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), words, strict=True):
        assert ids == [CLS, IMG, IMG, IMG, IMG, *row] + [PAD] * (longest - len(row))
        assert mask == [1] * (5 + len(row)) + [0] * (longest - len(row))
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_text_only_and_picture_only(processor, images, texts):
    text_only = processor(text=texts)
    assert list(text_only) == ["input_ids", "attention_mask"]
    plain = processor.tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(text_only["input_ids"], plain["input_ids"])
    assert torch.equal(text_only["attention_mask"], plain["attention_mask"])
    picture_only = processor(images=images)
    assert picture_only["input_ids"].tolist() == [[CLS] + [IMG] * 4] * len(images)
    assert picture_only["attention_mask"].min() == 1
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(picture_only["pixel_values"], pixels)


def test_without_the_joint_layout_each_is_as_it_is(processor, images, texts, tmp_path):
    apart = VisionLanguageProcessor(
        processor.image_processor, processor.tokenizer, max_text_length=9, joint_layout=False
    )
    text, pair = apart(text=texts), apart(images=images, text=texts)
    assert list(apart(images=images)) == ["pixel_values"]
    assert pair["input_ids"].shape[1] <= 1 + 9 and not pair["input_ids"].eq(IMG).any()
    assert all(torch.equal(pair[name], text[name]) for name in ("input_ids", "attention_mask"))
    assert torch.equal(pair["pixel_values"], processor(images=images)["pixel_values"])
    assert apart(images=images[:1], text=texts, padding="max_length")["input_ids"].shape == (len(texts), 1 + 9)
    # which of the two is saved
    for one, joint in ((apart, False), (processor, True)):
        one.save_pretrained(tmp_path)
        assert VisionLanguageProcessor.from_pretrained(tmp_path).joint_layout is joint


def test_single_inputs_make_a_batch_of_one(processor, images, texts):
    one = processor(images=open_image(images[0]), text=texts[0])
    listed = processor(images=images[:1], text=texts[:1])
    assert all(torch.equal(one[key], listed[key]) for key in listed)


def test_placeholders_follow_the_pixels(processor, images, texts):
    for size, n_patches in ((48, 9), ({"height": 32, "width": 64}, 8)):
        batch = processor(images=images, text=texts, size=size)
        assert batch["input_ids"].eq(IMG).sum(1).tolist() == [n_patches] * len(images)
        assert batch["input_ids"][:, 1 : n_patches + 1].eq(IMG).all()
        assert processor.num_image_tokens(*batch["pixel_values"].shape[-2:]) == n_patches
    nested = processor(images=images, text=texts, images_kwargs={"size": 48}, text_kwargs={"max_length": 2})
    assert nested["input_ids"].shape == (len(images), 1 + 9 + 2)


def test_truncation_cuts_words_only(processor, images):
    long = "umbrella " * 500
    batch = processor(images=images[0], text=long)
    assert batch["input_ids"].shape == (1, 1 + 4 + 64)
    assert processor(images=images[0], text=long, max_length=3)["input_ids"].shape == (1, 1 + 4 + 3)
    assert processor(text=long, max_length=3)["input_ids"].shape == (1, 1 + 3)
    assert processor(text=long, truncation=False)["input_ids"].shape[1] > 500
    short = VisionLanguageProcessor(processor.image_processor, processor.tokenizer, max_text_length=2)
    assert short(images=images[0], text=long)["input_ids"].eq(IMG).sum() == 4
    assert short(text=long)["input_ids"].shape == (1, 3)


def test_padding_choices(processor, images, texts):
    full = processor(images=images, text=texts, padding="max_length", max_length=20)
    assert full["input_ids"].shape == (len(texts), 1 + 4 + 20)
    assert processor(text=texts, pad_to_multiple_of=8)["input_ids"].shape[1] % 8 == 0
    lists = processor(text=texts, padding=False, return_tensors=None)
    assert len({len(row) for row in lists["input_ids"]}) > 1
    assert all(len(ids) == sum(mask) for ids, mask in zip(lists["input_ids"], lists["attention_mask"], strict=True))
    padded = processor(text=texts, return_tensors=None)
    assert isinstance(padded["input_ids"], list) and padded["input_ids"] == processor(text=texts)["input_ids"].tolist()
    arrays = processor(images=images, text=texts, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    with pytest.raises(ValueError, match="padding=False, but the sequences differ"):
        processor(text=texts, padding=False)
    with pytest.raises(ValueError, match="padding must be True"):
        processor(text=texts, padding="most")


def test_words_already_split(processor):
    plain = processor(text=["a closed umbrella", "umbrella"])
    split = processor(text=[["a", "closed", "umbrella"], ["umbrella"]], is_split_into_words=True)
    assert all(torch.equal(plain[key], split[key]) for key in plain)
    one = processor(text=["a", "closed", "umbrella"], is_split_into_words=True)
    assert torch.equal(one["input_ids"], plain["input_ids"][:1])
    assert processor(text=[[], ["umbrella"]], is_split_into_words=True)["attention_mask"][0].tolist()[:2] == [1, 0]


INJECTIONS = ["[IMG]", "[IMG][IMG] umbrella", "a[IMG]b", "[CLS] [PAD] [MASK] [IMG]", " [IMG] ", "[img]"]


def test_a_caption_cannot_inject_special_tokens(processor, images):
    batch = processor(images=[images[0]] * len(INJECTIONS), text=INJECTIONS)
    assert batch["input_ids"].eq(IMG).sum(1).tolist() == [4] * len(INJECTIONS)
    words = [row[5 : sum(mask)] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert not any(torch.isin(row, torch.tensor([PAD, IMG, CLS, MASK])).any() for row in words)
    split = processor(text=[[text] for text in INJECTIONS], is_split_into_words=True)
    assert not torch.isin(split["input_ids"][:, 1:], torch.tensor([IMG, CLS, MASK])).any()
    # The tokenizer itself reads specials for others again afterwards, as fill-mask needs.
    assert MASK in processor.tokenizer("a [MASK]")["input_ids"]


def test_mask_can_be_let_in_but_nothing_else(processor):
    ids = processor(text="[MASK] [IMG] [CLS] [PAD] umbrella", split_special_tokens=False)["input_ids"][0].tolist()
    assert ids[:5] == [CLS, MASK, UNK, UNK, UNK]


def test_borrowed_vocabularies(processor, images, tmp_path):
    lines = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "closed",
        "umbrella",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    ours, theirs = tokenizer_from_vocab(tmp_path / "vocab.txt"), BertTokenizer(str(tmp_path / "vocab.txt"))
    for tokenizer in (ours, theirs):  # BERT's own would add [SEP] and token types: the processor lets neither in
        batch = VisionLanguageProcessor(processor.image_processor, tokenizer)(
            images=images[0], text="A [unused0] umbrella"
        )
        assert list(batch) == ["input_ids", "attention_mask", "pixel_values"]
        ids = batch["input_ids"][0].tolist()
        assert ids[:6] == [101, 1, 1, 1, 1, 104] and ids[-1] == 106
        assert ids.count(1) == 4 and 102 not in ids


def test_decode_delegates(processor):
    ids = processor(text=["a closed umbrella", "umbrella"])["input_ids"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a closed umbrella"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a closed umbrella", "umbrella"]


def test_other_numbers_of_pictures_and_texts_are_held_against_each_other(processor, images, texts):
    """CLIP's snippet: one picture and the labels it may have, in one call."""
    for pictures, words in ((images[:1], texts[:2]), (images[:3], texts[:2]), (images[:2], texts[0])):
        batch = processor(images=pictures, text=words, return_tensors="pt", padding=True)
        alone = processor(text=words)
        assert torch.equal(batch["input_ids"], alone["input_ids"])
        assert torch.equal(batch["attention_mask"], alone["attention_mask"])
        assert torch.equal(batch["pixel_values"], processor(images=pictures)["pixel_values"])


def test_input_errors(processor, images, texts):
    cases = [
        ({}, ValueError, "neither images nor text"),
        ({"text": []}, ValueError, "got an empty list"),
        ({"images": []}, ValueError, "empty list"),
        ({"text": ["a", None]}, ValueError, "text 1 is None of type NoneType, expected a str"),
        ({"text": ["a", "b\ud800"]}, ValueError, "text 1 is .* a lone surrogate; expected Unicode"),
        ({"text": ["b\ud800"], "is_split_into_words": True}, ValueError, "text 0 is .* a lone surrogate"),
        ({"text": [["a"], ["b"]]}, ValueError, "need is_split_into_words=True"),
        ({"text": 3}, ValueError, "got int"),
        ({"text": "a", "is_split_into_words": True}, ValueError, "got str"),
        ({"text": "a", "max_length": 0}, ValueError, "max_length must be a positive number of words, got 0"),
        ({"text": "a", "maxlength": 5}, TypeError, r"does not know \['maxlength'\]"),
        ({"text": "a", "text_kwargs": {"foo": 1}}, TypeError, r"does not know \['foo'\]"),
        ({"text": "a", "return_token_type_ids": True}, ValueError, "not possible"),
        ({"images": [images[0], b"<html>"]}, ImageDecodeError, "image 1 of 2"),
        ({"images": images[0], "size": 40}, ValueError, "40x40 is not a multiple of patch_size=16"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            processor(**arguments)


def test_construction_errors(processor, tmp_path):
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    with pytest.raises(ValueError, match=r"lacks image_token='\[PATCH\]'"):
        VisionLanguageProcessor(image_processor, tokenizer, image_token="[PATCH]")
    with pytest.raises(ValueError, match="max_text_length must be a positive int, got 0"):
        VisionLanguageProcessor(image_processor, tokenizer, max_text_length=0)
    with pytest.raises(ValueError, match="has no patch_size"):
        VisionLanguageProcessor(ViTImageProcessor(), tokenizer)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ValueError, match=r"no image token: its vocabulary lacks \[IMG\] and \[unused0\]"):
        VisionLanguageProcessor(image_processor, BertTokenizer(str(tmp_path / "vocab.txt")))


def test_round_trip(processor, images, texts, tmp_path):
    original = VisionLanguageProcessor(processor.image_processor, processor.tokenizer, max_text_length=7)
    before = original(images=images, text=texts)
    original.save_pretrained(tmp_path)
    loaded = VisionLanguageProcessor.from_pretrained(tmp_path)
    assert (loaded.max_text_length, loaded.image_token, loaded.image_token_id) == (7, "[IMG]", IMG)
    after = loaded(images=images, text=texts)
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_travels_without_oner(processor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(VisionLanguageProcessor, "_auto_class", "AutoProcessor")
    monkeypatch.setattr(VisionLanguageImageProcessor, "_auto_class", "AutoImageProcessor")
    processor.save_pretrained(tmp_path / "saved")
    open_image(images[0]).save(tmp_path / "a.png")
    code = f"""
import sys
sys.modules["oner"] = None
from transformers import AutoImageProcessor, AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
batch = processor(images={str(tmp_path / "a.png")!r}, text="a [IMG] Umbrella")
print(type(processor).__name__, batch["input_ids"].tolist(), round(batch["pixel_values"].double().sum().item(), 3))
alone = AutoImageProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
print(type(alone).__name__, alone.patch_size)
"""
    run = [sys.executable, "-c", code]
    environment = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    out = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert out.returncode == 0, out.stderr
    batch = processor(images=images[0], text="a [IMG] Umbrella")
    total = round(batch["pixel_values"].double().sum().item(), 3)
    expected = [f"VisionLanguageProcessor {batch['input_ids'].tolist()} {total}", "VisionLanguageImageProcessor 16"]
    assert out.stdout.splitlines() == expected


def test_what_is_saved_does_not_depend_on_earlier_calls(processor, texts, tmp_path):
    processor.save_pretrained(tmp_path / "fresh")
    processor.tokenizer(texts, truncation=True, max_length=5, padding="max_length")
    processor(text=texts)
    processor.tokenizer(texts, truncation=True, max_length=7, padding=True)
    processor.save_pretrained(tmp_path / "used")
    for file in sorted((tmp_path / "fresh").iterdir()):
        assert (tmp_path / "used" / file.name).read_bytes() == file.read_bytes(), file.name
