"""Captions of scenes in other languages: of every concept, of the same content, each language in its own script."""

import csv
import sys
import unicodedata
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from scenes_reader import SCENES

sys.path.insert(0, str(SCENES))

import scenes  # noqa: E402
from scenes_concepts import concept_table  # noqa: E402
from scenes_languages import LANGUAGES, names, translate  # noqa: E402
from scenes_statements import Phrase, Statement  # noqa: E402

SCRIPTS = {"ja": ("CJK", "HIRAGANA", "KATAKANA"), "zh": ("CJK",), "ko": ("HANGUL",), "hi": ("DEVANAGARI",),
           "th": ("THAI",), "ru": ("CYRILLIC",)}  # fmt: skip
DOG, CAT = Phrase("1F415", 1), Phrase("1F408", 2)


def test_every_concept_has_its_own_name_in_every_language():
    with (SCENES / "scenes_names.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["hexcode", *LANGUAGES]
    for language in LANGUAGES:
        assert set(names(language)) == set(concept_table())
        assert all(name.strip() == name and name for name in names(language).values())
        assert len(set(names(language).values())) > 0.97 * len(concept_table())


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_are_written_in_the_script(language):
    for index in range(40):
        for caption in scenes.scene(0, "train", index, hard=False).captions:
            text = translate(caption.statement, language)
            letters = [unicodedata.name(letter) for letter in text if letter.isalpha()]
            own = SCRIPTS.get(language, ("LATIN",))
            share = sum(letter.startswith(own) for letter in letters) / len(letters)
            assert share > 0.5 and "{" not in text
            for phrase in caption.statement.phrases:
                assert names(language)[phrase.hexcode] in text
                assert phrase.count == 1 or str(phrase.count) in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_hard_caption_changes_is_said(language):
    """Whatever differs in English differs in translation."""
    for index in range(40):
        one = scenes.scene(1, "train", index)
        for hard in one.hard:
            true = one.captions[hard.of].statement
            assert translate(hard.statement, language) != translate(true, language)


def test_left_and_right_are_named_in_turn():
    statement = Statement("plain", (DOG,), "left", (CAT,), colour="blue")
    assert translate(statement, "de") == "links Hund, rechts 2 × Katze, auf blauem Hintergrund"
    assert translate(statement, "fr") == "à gauche chien, à droite 2 × chat, sur fond bleu"
    assert translate(statement, "ja") == "左にイヌ、右にネコ×2、背景は青色"
    assert translate(replace(statement, relation="below"), "ru") == "снизу собака, сверху 2 × кошка, на голубом фоне"
    placed = Statement("plain", (replace(DOG, place="top left", size="small"), CAT))
    assert translate(placed, "es") == "arriba a la izquierda perro de tamaño pequeño, 2 × gato"


def test_parquet_holds_the_languages_side_by_side(tmp_path):
    scenes.main([str(tmp_path), "--pairs", "3", "--languages", "all"])
    for row in pq.read_table(tmp_path / "train.parquet").to_pylist():
        assert all(len(row[f"captions_{language}"]) == len(row["captions"]) for language in LANGUAGES)
        assert len(row["captions_all"]) == 10 * len(row["captions"])
    scenes.main([str(tmp_path), "--pairs", "3", "--languages", "th"])
    columns = pq.read_schema(tmp_path / "train.parquet").names
    assert "captions_th" in columns and "captions_de" not in columns


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="one of en, de, .* got 'it'"):
        translate(Statement("plain", (DOG,)), "it")
