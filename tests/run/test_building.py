"""What a run says of its tokenizer before the first step."""

import logging
import warnings
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from oner.processing.data.sources import open_rows
from oner.training.run.building import build_processor_and_config
from oner.training.run.parsing import parse_arguments

CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "oner-emoji"


@pytest.fixture
def pairs(tmp_path):
    """Makes a source of pictures with these captions."""

    def make(*captions: str) -> str:
        lines = ["file_name,text", *(f"{number}.png,{text}" for number, text in enumerate(captions))]
        for number in range(len(captions)):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path)

    return make


def built(source: str, *options: str):
    arguments = parse_arguments(["--family", "oner", "--size", "nano", "--train_data", source, *options])
    return build_processor_and_config(arguments, {"pairs": open_rows(source)})


@pytest.mark.parametrize("option", ["initial_model", "tokenizer"])
def test_words_that_a_given_vocabulary_does_not_know_are_counted(pairs, option):
    source = pairs("a red apple", "一只青蛙", "a green tree")
    with pytest.warns(UserWarning, match=r"does not know 4 of 10 tokens \(40.0%\) of the texts of pairs.*'一'"):
        built(source, f"--{option}", str(CHECKPOINT))


def test_a_vocabulary_that_knows_all_words_or_is_trained_on_them_says_nothing(pairs):
    source = pairs("a red apple", "a green tree")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(source, "--initial_model", str(CHECKPOINT))
        built(source, "--vocab_size", "100")


def test_a_run_keeps_the_crop_of_the_model_that_it_starts_from(pairs):
    source = pairs("a red apple")
    first = built(source, "--initial_model", str(CHECKPOINT))[0].image_processor
    shipped = AutoProcessor.from_pretrained(CHECKPOINT).image_processor
    assert first.do_center_crop and (first.size, first.crop_size) == (shipped.size, shipped.crop_size)
    other = built(source, "--initial_model", str(CHECKPOINT), "--eval_crop", "1")[0].image_processor
    assert not other.do_center_crop and other.size == shipped.crop_size


def test_a_second_vocabulary_is_refused(pairs):
    with pytest.raises(ValueError, match="tokenizer, lower_case cannot be combined with initial_model"):
        built(pairs("a"), "--initial_model", str(CHECKPOINT), "--tokenizer", "vocab.txt", "--lower_case", "false")


def test_captions_that_are_wrong_of_a_mirrored_picture_are_counted(pairs, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("oner"), "propagate", True)
    source = pairs("an arrow to the right", "a bright copyright", "the leftmost tree", "a left-handed man")
    built(source, "--vocab_size", "100")
    assert "name a side" not in caplog.text
    built(source, "--vocab_size", "100", "--horizontal_flip", "0.5")
    assert "3 of 4 captions of pairs name a side ('an arrow to the right'), and horizontal_flip 0.5" in caplog.text


def test_the_reading_of_a_trained_vocabulary_is_told_by_arguments(pairs):
    source = pairs("Red café", "Red cafés")
    options = ("--vocab_size", "60")
    assert {"red", "##e"} <= set(built(source, *options)[0].tokenizer.get_vocab())
    assert {"Red", "##é"} <= set(built(source, *options, "--lower_case", "false")[0].tokenizer.get_vocab())
    assert "##é" in built(source, *options, "--strip_accents", "false")[0].tokenizer.get_vocab()
    with pytest.warns(UserWarning, match="limit_alphabet"):
        built(source, *options, "--limit_alphabet", "2")
