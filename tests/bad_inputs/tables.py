"""Whole files of rows: csv, lines of JSON, parquet and tar with something wrong with them.

Each function writes a source into a folder that holds good pictures, 0.png to 5.png, and returns it. `UNREADABLE`
cannot be used at all, before any step, with words of the error; of `PARTLY` the rows named are bad, with words of
their reasons, and all others can be used.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [(f"{number}.png", text) for number, text in enumerate(["apple", "pear", "plum, ripe", "fig", "lemon", "lime"])]
UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {}
PARTLY: dict[str, tuple[Callable[[Path], Path], dict[int, str]]] = {}


def unreadable(name: str, words: str) -> Callable:
    def enter(make: Callable[[Path], Path]) -> Callable:
        UNREADABLE[name] = make, words
        return make

    return enter


def partly(name: str, rows: dict[int, str]) -> Callable:
    def enter(make: Callable[[Path], Path]) -> Callable:
        PARTLY[name] = make, rows
        return make

    return enter


def csv_lines() -> list[str]:
    return ["file_name,text"] + [f'{name},"{text}"' for name, text in ROWS]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def changed(line: int, to: str) -> str:
    lines = csv_lines()
    lines[line] = to
    return "\n".join(lines) + "\n"


CSV = {
    "csv with a missing column": ("file_name,caption_\n0.png,apple\n", "none of the columns captions, caption, text"),
    "csv without lines": ("", "the first line must name the columns"),
    "csv of a header alone": ("file_name,text\n", "cannot be read as csv"),
    "csv with a column twice": ("file_name,text,text\n0.png,a,b\n", "the first line must name the columns, each once"),
    "csv with semicolons": ("file_name;text\n0.png;apple\n", "the first line is one field, .*; expected commas"),
    "csv with a quote that is never closed": (changed(2, '1.png,"pear'), "row 1: has wrong quoting, from line 3 on"),
    "csv with a quote that the next row closes": (
        'file_name,text\n0.png,apple\n1.png,"pear\n2.png,plum\n3.png,"fig\n4.png,lemon\n',
        "row 1: has wrong quoting, from line 3",
    ),
    "csv with a comma outside quotes": (changed(3, "2.png,plum, ripe"), "row 2: has 3 fields where the header has 2"),
    "csv with text behind a quote": (changed(1, '0.png,"apple" red'), "row 0: has wrong quoting, from line 2 on"),
    "csv that is HTML": ("<!DOCTYPE html>\n<html><body>404</body></html>\n", "none of the columns"),
}  # fmt: skip
for _name, (_content, _words) in CSV.items():
    UNREADABLE[_name] = (lambda folder, content=_content: written(folder, "pairs.csv", content)), _words


@unreadable("csv in UTF-16", "is UTF-16; expected UTF-8")
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", "\n".join(csv_lines()).encode("utf-16"))


@unreadable("JSON lines of lists", "is not a JSON object, but list")
def _(folder: Path) -> Path:
    return written(folder, "pairs.jsonl", "\n".join(json.dumps(row) for row in ROWS))


@unreadable("JSON lines without lines", "cannot be read as json: (no rows|.*no data)")
def _(folder: Path) -> Path:
    return written(folder, "pairs.jsonl", "\n")


@unreadable("parquet cut short", "cannot be read as parquet")
def _(folder: Path) -> Path:
    content = parquet_of([text for _, text in ROWS])
    return written(folder, "pairs.parquet", content[: len(content) // 2])


@unreadable("parquet of 0 bytes", "cannot be read as parquet")
def _(folder: Path) -> Path:
    return written(folder, "pairs.parquet", b"")


@unreadable("parquet that is a zip", "cannot be read as parquet")
def _(folder: Path) -> Path:
    return written(folder, "pairs.parquet", b"PK\x03\x04" + bytes(200))


@unreadable("a folder without a table", "not a folder with metadata.csv")
def _(folder: Path) -> Path:
    (folder / "bare").mkdir()
    return folder / "bare"


def parquet_of(texts: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"file_name": [name for name, _ in ROWS], "text": texts}), buffer)
    return buffer.getvalue()


@partly("csv with a caption in Latin-1", {1: r"is not UTF-8 \(line 3\)"})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", changed(2, "1.png,caf\u00e9").encode("latin-1"))


@partly("csv with a short row", {3: "the caption is empty"})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", changed(4, "3.png"))


@partly("csv with blank lines", {})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", "\n\n".join(csv_lines()) + "\n  \n\n")


@partly("csv with a line break in quotes", {})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", changed(2, '1.png,"a pear\nand a ""half"""'))


@partly("csv with Windows line ends and a byte order mark", {})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", "\r\n".join(csv_lines()).encode("utf-8-sig"))


@partly("csv with a field of 1 MB", {0: "has 1000000 characters"})
def _(folder: Path) -> Path:
    return written(folder, "pairs.csv", changed(1, "0.png," + "a" * 1_000_000))


def json_lines() -> list[str]:
    return [json.dumps({"file_name": name, "text": text}) for name, text in ROWS]


BROKEN_LINES = {
    "cut": (b'{"file_name": "1.png", "te', "is not JSON"),
    "a lone surrogate": (b'{"file_name": "1.png", "text": "caf\\ud800"}', "lone surrogate"),
    "a list": (b'["1.png", "pear"]', "is not a JSON object, but list"),
    "Latin-1": (b'{"file_name": "1.png", "text": "caf\xe9"}', "is not UTF-8"),
    "a raw NUL": (b'{"file_name": "1.png", "text": "p\0"}', "is not JSON"),
    "a NUL": (b'{"file_name": "1.png", "text": "p\\u0000"}', "holds NUL"),
    "a missing key": (b'{"file_name": "1.png"}', "the caption is null"),
    "HTML": (b"<html>502 Bad Gateway</html>", "is not JSON"),
    "a key twice": (b'{"file_name": "1.png", "text": "a", "text": "b"}', "a key stands twice"),
    "brackets in brackets": (b"[" * 100_000, "is not JSON"),
}
for _name, (_line, _words) in BROKEN_LINES.items():

    def _(folder: Path, line: bytes = _line) -> Path:
        lines = [text.encode() for text in json_lines()]
        return written(folder, "pairs.jsonl", b"\n".join([lines[0], line, *lines[2:]]))

    PARTLY[f"JSON lines with {_name}"] = _, {1: _words}


@partly("JSON lines with emoji as pairs of surrogates", {})
def _(folder: Path) -> Path:
    lines = json_lines()
    lines[2] = json.dumps({"file_name": "2.png", "text": "an \U0001f34e and \\ud800 spelled out"})
    return written(folder, "pairs.jsonl", "\n".join(lines))


@partly("parquet with text that is not UTF-8", {4: r"the caption is not UTF-8 \(byte 0xe9 at 3\)"})
def _(folder: Path) -> Path:
    texts = pa.array([b"caf\xe9" if number == 4 else b"apple" for number in range(len(ROWS))], pa.binary())
    return written(
        folder, "pairs.parquet", parquet_of(pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()))
    )


def shard(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written(folder, "pairs.tar", buffer.getvalue())


def members(folder: Path) -> list[tuple[str, bytes]]:
    """Twelve members: each row's picture, then its caption."""
    pictures = [(name, (folder / name).read_bytes()) for name, _ in ROWS]
    texts = [(name.replace(".png", ".txt"), text.encode()) for name, text in ROWS]
    return [member for pair in zip(pictures, texts, strict=True) for member in pair]


@unreadable("tar of 0 bytes", "pairs.tar")
def _(folder: Path) -> Path:
    return written(folder, "pairs.tar", b"")


@unreadable("tar that is HTML", "pairs.tar")
def _(folder: Path) -> Path:
    return written(folder, "pairs.tar", b"<!DOCTYPE html><html>404</html>" * 100)


@partly("tar cut short", {5: ""})
def _(folder: Path) -> Path:
    path = shard(folder, members(folder))
    content = path.read_bytes()
    return written(folder, "pairs.tar", content[: content.rindex(b"5.txt") + 200])


@partly("tar with a picture without a caption", {2: ""})
def _(folder: Path) -> Path:
    return shard(folder, [member for member in members(folder) if member[0] != "2.txt"])


@partly("tar with a caption without a picture", {2: ""})
def _(folder: Path) -> Path:
    return shard(folder, [member for member in members(folder) if member[0] != "2.png"])


@partly("tar with an empty picture", {0: ""})
def _(folder: Path) -> Path:
    return shard(folder, [("0.png", b""), *members(folder)[1:]])


@partly("tar with a caption in Latin-1", {0: ""})
def _(folder: Path) -> Path:
    first, _, *others = members(folder)
    return shard(folder, [first, ("0.txt", b"caf\xe9"), *others])
