"""A page with written words and generated tables, which stand between marks."""


def between_marks(text: str, begin: str, end: str, content: str) -> str:
    """
    `text` with `content` in place of what stood between two marks.

    Raises:
        ValueError: a mark is missing, stands there twice, or the second comes first.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page lacks the marks {begin!r} and {end!r}: expected the marks once, in this order")
    return f"{text.partition(begin)[0]}{begin}{content}{end}{text.partition(end)[2]}"
