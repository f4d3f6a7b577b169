"""How ALBEF's family reads captions and questions, against the rules spelt out one by one."""

import pytest

from oner.processing.vl_captions import pre_caption, pre_question

MARKS = ",.'!?\"()*#:;~"


def one_by_one(text: str) -> str:
    """Lower case, without marks, compounds opened: a character at a time."""
    return "".join(" " if mark in "-/" else mark for mark in text.lower() if mark not in MARKS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog, a cat & 2 birds.", "a dog a cat & 2 birds"),
        ("black-and-white t-shirt/jeans", "black and white t shirt jeans"),
        ("<PERSON>'s (old) hat!", "persons old hat"),
        ("  two   spaces \t\n and lines\n\n", "two spaces and lines"),
        ("one\ttab stays", "one\ttab stays"),
        ("a - b", "a b"),
        ('It\'s 5:30~ "now"; #1 *star*?', "its 530 now 1 star"),
        ("Ärger & 日本語", "ärger & 日本語"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_a_caption_is_rewritten(text, expected):
    assert pre_caption(text) == expected
    assert pre_caption(expected) == expected  # nothing is left to do


def test_marks_are_those_of_the_code_and_no_others():
    for mark in map(chr, range(33, 127)):
        found = pre_caption(f"a{mark}b")
        assert found == one_by_one(f"a{mark}b"), mark
    assert pre_caption("a[b]{c}+d=e_f@g%h^i|j\\k$l") == "a[b]{c}+d=e_f@g%h^i|j\\k$l"


def test_words_are_counted_at_single_spaces():
    text = " ".join(f"w{i}" for i in range(50))
    assert pre_caption(text).split() == text.split()[:30]
    assert pre_caption(text, max_words=2) == "w0 w1" and pre_question(text, 50) == text
    assert pre_caption("a  b") == "a b" and pre_question("a  b", 2) == "a "  # the empty word between counts
    with pytest.raises(ValueError, match="max_words must be positive, got 0"):
        pre_caption("a", 0)


def test_a_question_keeps_its_spaces_and_persons():
    assert pre_question("Is the <person>  left-handed?  ") == "is the <person>  left handed"
    assert pre_question(" What's this?") == " whats this"
    assert pre_question("why\n") == "why\n"
