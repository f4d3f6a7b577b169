"""Checks of captions and queries, and the text cleaning of ALBEF's family before tokenisation."""

import re
from typing import Any

MAX_CAPTION_LENGTH = 65_536  # characters; the slowest kind of text is tokenised in 90 ms at this length
MAX_TEXT_LENGTH = 4_194_304  # characters of a text that is read in windows; enough for a long book

# ALBEF's code drops twelve punctuation marks and splits compounds; none of this is in the paper
_MARKS = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_WIDE_SPACE = re.compile(r"\s\s+")


def pre_caption(text: str, max_words: int = 30) -> str:
    """Cleans a caption as ALBEF, TCL and SIMLA do: lower case, no punctuation, `<person>` as a word, truncated."""
    text = text.lower().translate(_MARKS).replace("<person>", "person")
    return _first_words(_WIDE_SPACE.sub(" ", text).rstrip("\n").strip(" "), max_words)


def pre_question(text: str, max_words: int = 30) -> str:
    """Cleans a question; `<person>` and inner spaces are kept (ALBEF's code; its tests take 50 words)."""
    return _first_words(text.lower().translate(_MARKS).rstrip(" "), max_words)


def _first_words(text: str, count: int) -> str:
    if count < 1:
        raise ValueError(f"max_words must be positive, got {count}")
    return " ".join(text.split(" ")[:count])


def caption_reason(caption: Any, what: str = "caption", longest: int = MAX_CAPTION_LENGTH) -> str | None:
    """Why a caption is bad, or None; messages call it `what`, and it may have at most `longest` characters."""
    if caption is None:
        return f"the {what} is null"
    if not isinstance(caption, str):
        return f"the {what} must be a string or a list of strings, got {type(caption).__name__} {caption!r:.40}"
    if not caption.strip():
        return f"the {what} is empty"
    if len(caption) > longest:
        return f"the {what} has {len(caption)} characters; expected at most {longest}"
    if "\0" in caption:
        return f"the {what} holds NUL (character {caption.index(chr(0))}), so it is no text"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"the {what} holds a lone surrogate (character {error.start}), so it is no Unicode text"
    return None
