"""Captions, ids and places of pictures as cells of a row: to be refused, with words of the reason, or to be read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAPTIONS_REFUSED: dict[str, tuple[Any, str]] = {
    "null": (None, "the caption is null"),
    "empty": ("", "the caption is empty"),
    "white space": (" \t\n\u3000", "the caption is empty"),
    "NUL alone": ("\0", "holds NUL"),
    "NUL inside": ("a red\0apple", r"holds NUL \(character 5\)"),
    "1 MB": ("red apple " * 100_000, "has 1000000 characters; expected at most 65536"),
    "1 MB of one word": ("a" * 1_000_000, "has 1000000 characters"),
    "control characters": ("\x07\x1b", "no token is left"),
    "marks without width": ("\u200b\u2060\ufeff", "no token is left"),
    "a list without captions": ([], "the list of captions is empty"),
    "a list with null": (["an apple", None], "caption 1 of the list: the caption is null"),
    "a list with white space": (["an apple", "  "], "caption 1 of the list: the caption is empty"),
    "a list with 1 MB": (["an apple", "!" * 1_000_000], "caption 1 of the list: .*1000000 characters"),
}
# Arrow holds no lone surrogate, so these reach the collator only from rows that are not read by `open_rows`
CAPTIONS_BEYOND_ARROW: dict[str, tuple[Any, str]] = {
    "lone surrogate": ("caf\ud800", r"lone surrogate \(character 3\)"),
    "surrogates in the wrong order": ("\udc00\ud800 apple", r"lone surrogate \(character 0\)"),
    "bytes": (b"an apple", "must be a string or a list of strings, got bytes"),
    "a number": (3, "must be a string or a list of strings, got int"),
}
CAPTIONS_READ: dict[str, Any] = {
    "plain": "a red apple",
    "several": ["a red apple", "fruit"],
    "a character": "a",
    "emoji": "\U0001f34e \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "right to left": "\u062a\u0641\u0627\u062d\u0629 \u202e elppa",
    "stacked accents": "a" + "\u0301" * 20_000,
    "as long as allowed": "apple " * 10_922 + "pear",
    "HTML": "<b>apple</b> &amp; <script>alert(1)</script>",
    "lines and tabs": "apple\r\npear\tplum",
    "byte order mark": "\ufeffapple",
    "spelled out special tokens": "[MASK] [CLS] [PAD]",
    "replacement characters": "caf\ufffd apple",
    "NA": "NA",
}
IDS_REFUSED: dict[str, tuple[list, str]] = {
    "null among texts": (["a", None, "b"], "the id must be an int or a string, got null"),
    "null among numbers": ([1, None, 3], "the id must be an int or a string, got null"),
}


def missing(folder: Path) -> str:
    return "none.png"


def dead_link(folder: Path) -> str:
    (folder / "link.png").symlink_to(folder / "gone.png")
    return "link.png"


def circle_of_links(folder: Path) -> str:
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    return "a.png"


def directory(folder: Path) -> str:
    (folder / "pictures.png").mkdir()
    return "pictures.png"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return "pipe.png"


def empty_file(folder: Path) -> str:
    (folder / "empty.png").touch()
    return "empty.png"


PLACES_REFUSED: dict[str, tuple[Callable[[Path], str | None], str]] = {
    "missing file": (missing, "no picture file .*none.png"),
    "dead link": (dead_link, "no picture file .*link.png"),
    "links in a circle": (circle_of_links, "no picture file .*a.png"),
    "directory": (directory, "no picture file .*pictures.png"),
    "pipe": (pipe, "no picture file .*pipe.png"),
    "empty file": (empty_file, r"cannot read the picture .*empty.png'?: empty"),
    "null": (lambda folder: None, "the picture is null"),
    "empty name": (lambda folder: "", "no picture file"),
    "name with NUL": (lambda folder: "a\0.png", "no picture file"),
    "name of 5,000 characters": (lambda folder: "a" * 5000 + ".png", "no picture file"),
    "address": (lambda folder: "https://example.com/a.jpg", "no picture file .*example.com"),
    "device": (lambda folder: "/dev/zero", "no picture file /dev/zero"),
}
