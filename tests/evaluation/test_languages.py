"""Recall by language: exact numbers with embeddings that the test lays down."""

import numpy as np
import pytest
from test_evaluation_retrieval import Colours, colour_processor, colour_row, share_found, unit, words

from oner.training.evaluation.languages import LanguagesEvaluator

LANGUAGES = ("en", "de", "th")


def test_numbers_equal_loops_by_hand():
    rng = np.random.default_rng(5)
    colours = rng.integers(1, 256, (30, 3))
    noise = (30, 60, 120)  # the later ones are known worse
    texts = [np.clip(colours + rng.integers(-size, size, colours.shape), 1, 255) for size in noise]
    # Two captions of each language, of which the first is asked.
    rows = [
        colour_row(colour, [text for own in texts for text in (words(own[number]), "9 9 9")])
        for number, colour in enumerate(colours)
    ]
    values = dict(
        LanguagesEvaluator(rows, LANGUAGES, 7, (1, 5), "set", progress=False).run(Colours(), colour_processor)
    )
    pictures, sentences = unit(colours), [unit(own) for own in texts]
    recalls = []
    for number, language in enumerate(LANGUAGES):
        own = sentences[number]
        found = [
            [share_found(*pair, lambda q, g: q == g, k) for pair in ((pictures, own), (own, pictures))] for k in (1, 5)
        ]
        others = [share_found(own, other, lambda q, g: q == g, 5) for other in sentences if other is not own]
        for k, (tr, ir) in zip((1, 5), found, strict=True):
            assert values[f"set/{language}/tr_r@{k}"] == pytest.approx(tr)
            assert values[f"set/{language}/ir_r@{k}"] == pytest.approx(ir)
        assert values[f"set/{language}/tt_r@5"] == pytest.approx(np.mean(others))
        assert values[f"set/{language}/chance@5"] == pytest.approx(5 / 30)
        recalls.append(np.mean(found[1]))
    assert values["set/of_en"] == pytest.approx(np.mean(recalls[1:]) / recalls[0]) and values["set/of_en"] < 1
    assert "set/en/of_en" not in values


def test_texts_that_a_concept_shares_stand_once_and_what_cannot_be_is_refused():
    rows = [colour_row((9, 9, 9), ["1 2 3", "3 2 1"], "one"), colour_row((8, 8, 8), ["1 2 3", "2 2 1"], "one")]
    protocol = LanguagesEvaluator(rows, ("en", "de")).protocol
    assert protocol["texts"] == {"en": 1, "de": 2}
    with pytest.raises(ValueError, match="row 0 has 2 captions; expected equally many in each of en, de, th"):
        LanguagesEvaluator(rows, LANGUAGES)
    for languages in ((), ("en",), ("en", "en")):
        with pytest.raises(ValueError, match="two or more different"):
            LanguagesEvaluator(rows, languages)
    with pytest.raises(ValueError, match="no rows"):
        LanguagesEvaluator([], LANGUAGES)
