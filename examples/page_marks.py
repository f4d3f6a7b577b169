"""Pages of handwritten text with generated tables between marks."""


def between_marks(text: str, begin: str, end: str, content: str) -> str:
    """
    `text` with the part between two marks replaced by `content`.

    Raises:
        ValueError: a mark is missing or occurs twice, or the marks are in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page lacks the marks {begin!r} and {end!r}: expected the marks once, in this order")
    return f"{text.partition(begin)[0]}{begin}{content}{end}{text.partition(end)[2]}"
