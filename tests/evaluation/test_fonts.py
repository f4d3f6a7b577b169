"""Sheets draw the letters of any script that an installed font has."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from oner.training.evaluation import fonts
from oner.training.evaluation.contact_sheet import draw_sheet
from oner.training.evaluation.fonts import font

pytest.importorskip("matplotlib")
# accents, Cyrillic, Greek, Arabic: DejaVu, which matplotlib brings, has them
SCRIPTS = ["äöüßéèñçøåłž–", "красное яблоко", "κόκκινο μήλο", "تفاحة حمراء"]


def drawn(text: str, face) -> np.ndarray:
    canvas = Image.new("L", (400, 60))
    ImageDraw.Draw(canvas).text((4, 4), text, 255, face)
    return np.asarray(canvas)


def test_plain_letters_need_no_search(monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: pytest.fail("no installed font is needed"))
    assert font(20, "a “red” apple…").path == font(20).path


@pytest.mark.parametrize("text", SCRIPTS)
def test_other_scripts_have_letters_of_their_own(text):
    face = font(24, text)
    letters = [character for character in text if not character.isspace()]
    images = {drawn(letter, face).tobytes() for letter in letters}
    assert len(images) == len(set(letters))  # a font that lacks them draws the same box for each
    boxes = {drawn(letter, font(24)).tobytes() for letter in letters}
    assert len(boxes) < len(set(letters))


def test_what_no_font_has_is_said_once(caplog, monkeypatch):
    fonts._file_with.cache_clear()
    monkeypatch.setattr(fonts, "_installed", lambda: iter(()))
    said = []
    monkeypatch.setattr(fonts.logger, "warning_once", said.append)
    assert font(20, "\U00012000 apple").path == font(20).path
    assert len(said) == 1 and "no font was found that has '\U00012000'" in said[0]
    fonts._file_with.cache_clear()


def test_a_sheet_of_answers_writes_them():
    answers = [{"item": "красное яблоко", "score": 0.5}]
    sheet = draw_sheet({"text": SCRIPTS[1]}, answers, 1)
    other = draw_sheet({"text": SCRIPTS[1].replace("к", "т")}, answers, 1)
    assert np.asarray(sheet).shape == np.asarray(other).shape and (np.asarray(sheet) != np.asarray(other)).any()
