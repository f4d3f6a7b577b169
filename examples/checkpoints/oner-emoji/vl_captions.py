"""What makes a string unfit to be a caption or a query."""

from typing import Any

MAX_CAPTION_LENGTH = 65_536  # characters; the slowest kind of text is tokenised in 90 ms at this length


def caption_reason(caption: Any) -> str | None:
    """What is wrong with a caption; None if nothing."""
    if caption is None:
        return "the caption is null"
    if not isinstance(caption, str):
        return f"the caption must be a string or a list of strings, got {type(caption).__name__} {caption!r:.40}"
    if not caption.strip():
        return "the caption is empty"
    if len(caption) > MAX_CAPTION_LENGTH:
        return f"the caption has {len(caption)} characters; expected at most {MAX_CAPTION_LENGTH}"
    if "\0" in caption:
        return f"the caption holds NUL (character {caption.index(chr(0))}), so it is no text"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"the caption holds a lone surrogate (character {error.start}), so it is no Unicode text"
    return None
