"""Files of rows as they come from other programs and other machines, and from those who mean harm."""

import csv
import json
import os
import socket
import unicodedata
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oner.processing.data import parquet_batches, table_files, text_tables
from oner.processing.data.sources import PairDataError, open_rows

FORMS = ("csv", "jsonl", "parquet")
# what readers that guess types take for something else than the text it is
WORDS = [
    "null",
    "NA",
    "None",
    "nan",
    "007",
    "1e5",
    "true",
    "#N/A",
    "-inf",
    "2020-01-01",
    "12:30",
    "2020-01-01T00:00:00Z",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A folder of four pictures, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "home").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "home" / f"{number}.png")
    return tmp_path / "home"


def written(path: Path, texts: list[str], names: list[str] | None = None) -> Path:
    names = names or [f"{number}.png" for number in range(len(texts))]
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file_name", "text"), *zip(names, texts, strict=True)])
    elif path.suffix == ".jsonl":
        rows = [{"file_name": name, "text": text} for name, text in zip(names, texts, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(path, "wb") as file:  # a path is a pattern to pyarrow too
            pq.write_table(pa.table({"file_name": names, "text": texts}), file)
    return path


def captions(source, **options) -> list[list[str]]:
    rows = open_rows(source, **options)
    return [rows[number]["captions"] for number in range(len(rows))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("word", WORDS)
def test_words_come_back_as_they_are_written(home, form, word):
    # alone in its column, where a reader would guess a type for all of it, and beside another word
    for texts in ([word], [word, word], [word, "a cat"]):
        assert captions(written(home / f"p.{form}", texts)) == [[text] for text in texts]


def test_an_unread_field_may_be_anything(home):
    plain = written(home / "p.jsonl", list("abc")).read_text().splitlines()
    for value in ("[" * 63 + "]" * 63, '{"a": 2020}', "1e999", '["2020-01-01", 3, {}]', '"[[[[" '):
        plain[1] = f'{{"file_name": "1.png", "text": "b", "z": {value}}}'
        (home / "p.jsonl").write_text("\n".join(plain))
        assert captions(home / "p.jsonl") == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("depth", [300, 2_000, 10_000, 200_000])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_json_is_one_bad_row(home, depth, place, brackets):
    lines = written(home / "p.jsonl", list("abc")).read_text().splitlines()
    opening, closing = ("[", "]") if brackets == "[]" else ('{"k":', "}")
    lines[place] = f'{{"file_name": "1.png", "text": "b", "z": {opening * depth}1{closing * depth}}}'
    (home / "p.jsonl").write_text("\n".join(lines))
    rows = open_rows(home / "p.jsonl", bad_rows="skip")
    assert len(rows) == 3 and list(rows.bad) == [place] and f"{depth + 1} deep" in rows.bad[place]
    # the whole of a document that is not lines
    (home / "p.json").write_text(f"[\n{lines[place]}\n]")
    with pytest.raises(PairDataError, match=rf"p\.json: .*{depth + 2} deep"):
        open_rows(home / "p.json")


def test_a_list_in_a_json_file_is_its_rows(home):
    rows = [{"file_name": f"{number}.png", "captions": ["a", "b"]} for number in range(2)]
    for content in (json.dumps(rows), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        (home / "p.json").write_text(content)
        assert captions(home / "p.json") == [["a", "b"]] * 2
    (home / "p.json").write_text(json.dumps({"images": rows}, indent=1))
    with pytest.raises(PairDataError, match="expected a JSON object a line or a list of them, got dict"):
        open_rows(home / "p.json")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pairs[1]", "p*", "what?", "{0..1}", "a,b"])
def test_a_file_that_is_there_is_no_pattern(home, form, name):
    for other in ("pairs1", "pp", "whatx", "0", "1"):
        written(home / f"{other}.{form}", ["wrong"])
    assert captions(written(home / f"{name}.{form}", ["right"])) == [["right"]]
    assert captions([home / f"{name}.{form}"]) == [["right"]]


@pytest.mark.parametrize("name", ["photos [2024]", "a*b", "what?"])
def test_a_folder_that_is_there_is_no_pattern(tmp_path, home, name):
    for other in (name, "photos 2", "axb", "whatx"):
        (tmp_path / other).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / other / "0.png")
        for form in ("csv", "jsonl", "parquet"):
            written(tmp_path / other / f"metadata.{form}", ["right" if other == name else "wrong"])
    assert captions(tmp_path / name) == [["right"]]
    assert captions(tmp_path / name / "metadata.parquet") == [["right"]]


def test_a_pattern_stands_for_the_files_that_fit(home):
    for number in (2, 0, 1):
        written(home / f"part-{number}.jsonl", [f"text {number}"], [f"{number}.png"])
    (home / "deep" / "er").mkdir(parents=True)
    written(home / "deep" / "er" / "p.parquet", ["below"], ["../../0.png"])
    assert captions(home / "part-*.jsonl") == [["text 0"], ["text 1"], ["text 2"]]
    assert captions([str(home / "part-[12].jsonl")]) == [["text 1"], ["text 2"]]
    assert captions(str(home / "**" / "p.parquet")) == [["below"]]
    with pytest.raises(PairDataError, match="no file fits this pattern"):
        open_rows(home / "none-*.csv")


def test_a_replaced_file_is_read_anew(home):
    for form in FORMS:
        path = written(home / f"p.{form}", ["one"])
        assert captions(path) == [["one"]]
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        written(path, ["two"])
        os.utime(path, ns=times)
        assert captions(path) == [["two"]]


def test_the_same_file_is_written_once(home, monkeypatch):
    path = written(home / "p.csv", ["a", ""])
    first = open_rows(path, bad_rows="skip")
    monkeypatch.setattr(table_files, "_write", None)
    again = open_rows(path, bad_rows="skip")
    assert again.bad == first.bad == {1: "the caption is empty"} and again[0] == first[0]


def test_what_pandas_writes_by_default(home):
    frame = pandas.DataFrame({"file_name": ["0.png", "1.png"], "caption": ["a, b", 'the "c"'], "k": [7, 8]})
    frame.to_csv(home / "metadata.csv")  # with an index that has no name
    assert captions(home) == [["a, b"], ['the "c"']]
    assert open_rows(home, id_column="k")[1]["id"] == "8"
    frame.set_index("file_name").to_csv(home / "indexed.csv")
    assert captions(home / "indexed.csv") == [["a, b"], ['the "c"']]
    frame["caption"] = frame["caption"].astype("category")
    frame.to_parquet(home / "p.parquet")
    assert captions(home / "p.parquet") == [["a, b"], ['the "c"']]


def test_a_list_written_into_a_csv_is_told_of(home):
    frame = pandas.DataFrame({"file_name": ["0.png", "1.png"], "captions": [["a cat", "the cat"], ["a dog"]]})
    frame.to_csv(home / "p.csv")
    with pytest.warns(UserWarning, match=r"2 captions .* look like lists .*'a cat', 'the cat'"):
        open_rows(home / "p.csv")


SENTENCES = [
    [{"raw": "a cat", "tokens": ["a", "cat"]}, {"raw": "the cat", "tokens": []}],
    [{"raw": "a dog", "tokens": []}],
]


@pytest.mark.parametrize("column", ["sentences", "sentences[].raw", "sentences.raw"])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "object"])
def test_sentences_of_coco(home, form, column):
    rows = [{"file_name": f"{number}.png", "sentences": one} for number, one in enumerate(SENTENCES)]
    source = home / f"p.{form}"
    if form == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source = datasets.Dataset.from_list([{**row, "file_name": str(home / row["file_name"])} for row in rows])
    assert captions(source, text_column=column) == [["a cat", "the cat"], ["a dog"]]
    assert list(open_rows(source, text_column=column).captions()) == ["a cat", "the cat", "a dog"]


def test_one_sentence_a_row_as_an_object(home):
    data = datasets.Dataset.from_list([{"image": str(home / "0.png"), "sentences": {"raw": "a cat", "imgid": 3}}])
    assert captions(data, text_column="sentences") == [["a cat"]]
    with pytest.raises(PairDataError, match="no column 'sentence.raw'"):
        open_rows(data, text_column="sentence.raw")


def test_a_column_that_stands_twice_in_parquet_is_named(home):
    cells = [pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(cells, names=["image", "caption", "caption"]), home / "twice.parquet")
    with pytest.raises(PairDataError, match="several columns are called 'caption'; expected one"):
        open_rows(home / "twice.parquet")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("sub/0.png", "sub\\0.png"),
        ("sub/0.png", "./sub/0.png"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
        (unicodedata.normalize("NFD", "é/ガ.png"), unicodedata.normalize("NFC", "é\\ガ.png")),
    ],
)
def test_names_from_other_systems(home, form, stored, name):
    (home / stored).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(home / stored)
    rows = open_rows(written(home / f"p.{form}", ["hello"], [name]))
    assert os.path.samefile(rows[0]["image"], home / stored)
    # one that is there as it is written wins
    if "\\" in name:
        (home / name).write_bytes(b"as it is written")
        assert Path(open_rows(home / f"p.{form}")[0]["image"]).read_bytes() == b"as it is written"
    with pytest.raises(PairDataError, match=r"no picture file .*none\\0.png \(nor with / for its \\\)"):
        open_rows(written(home / f"q.{form}", ["hello"], ["none\\0.png"]))


def test_long_lines_are_bounded(home, monkeypatch):
    monkeypatch.setattr(text_tables, "LONGEST_LINE", 1000)
    written(home / "p.jsonl", ["a", "b" * 2000, "c"])
    rows = open_rows(home / "p.jsonl", bad_rows="skip")
    assert rows.bad == {1: "has more than 1000 bytes"} and rows[2]["captions"] == ["c"]
    (home / "p.txt").write_text("a\n" + "b" * 2000 + "\nc")
    rows = open_rows(home / "p.txt", "texts", bad_rows="skip")
    assert rows.bad == {1: "has more than 1000 characters (line 2)"} and rows[2]["captions"] == ["c"]
    # a csv that has one cannot be divided into rows, nor one whose quote swallows the others
    for content in ("file_name,text\n0.png," + "b" * 2000, "x" * 2000, 'file_name,text\n0.png,"b' + "\nb" * 2000):
        (home / "p.csv").write_text(content)
        with pytest.raises(PairDataError, match=r"more than 1000 characters|field larger than field limit \(1000\)"):
            open_rows(home / "p.csv", bad_rows="skip")


@pytest.mark.parametrize("column", ["text", "list", "bytes"])
def test_a_dictionary_that_unpacks_into_too_much(home, monkeypatch, column):
    values = ["b" * 100_000] if column != "bytes" else [b"b" * 100_000]
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(values))
    if column == "list":
        cells = pa.ListArray.from_arrays(pa.array(range(5001), pa.int32()), cells)
    images = cells if column == "bytes" else pa.array(["0.png"] * 5000)
    table = pa.table({"image": images, "text": pa.array(["a"] * 5000) if column == "bytes" else cells})
    pq.write_table(table, home / "p.parquet", dictionary_pagesize_limit=1 << 20, store_schema=False)
    assert (home / "p.parquet").stat().st_size < 100_000  # of 500 MB
    monkeypatch.setattr(parquet_batches, "UNPACKED", 1 << 20)
    before = pa.total_allocated_bytes()
    with pytest.raises(PairDataError, match="p.parquet: becomes more than 100 times as long"):
        open_rows(home / "p.parquet", bad_rows="skip")
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert not list((home.parent / "cache").glob("oner/*")) and not list((home.parent / "cache").glob("oner/.*"))


@pytest.fixture
def special(tmp_path, monkeypatch):
    """Makes a path that is no file."""
    opened = []

    def make(path: Path, kind: str) -> Path:
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            monkeypatch.chdir(path.parent)  # the name of a socket must be short
            opened.append(socket.socket(socket.AF_UNIX))
            opened[-1].bind(path.name)
        return path

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize("form", [*FORMS, "json", "tsv", "txt", "tar"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket"])
def test_only_files_are_opened(home, special, form, kind):
    path = special(home / f"p.{form}", kind)
    for source in (path, [path], str(path)):
        with pytest.raises(PairDataError, match=rf"p\.{form}: is {kind}; expected a file"):
            open_rows(source, "texts" if form == "txt" else "pairs")
