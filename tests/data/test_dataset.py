"""Sources of pairs: every kind reads to the same rows, and every kind of bad row is named before the first step."""

import io
import json
import pickle
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_pretraining import write_shard
from torch.utils.data import DataLoader

from oner.processing.data.mixture import open_mixture
from oner.processing.data.sampling import RowKey, concept_id
from oner.processing.data.sources import (
    PairDataError,
    PairRows,
    PairStream,
    PairTrainingSet,
    PairTrainingStream,
    open_rows,
)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 90)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four pictures under `pictures/`, no table yet."""
    home = tmp_path / "home"
    (home / "pictures").mkdir(parents=True)
    for i in range(4):
        (home / "pictures" / f"{i}.png").write_bytes(png(i))
    return home


NAMES = [f"pictures/{i}.png" for i in range(4)]
TEXTS = ["one, two", 'a "quoted" word', "NA", "007"]


def write_csv(path, header, rows, quote=True):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if quote and ("," in text or '"' in text) else text

    lines = [",".join(map(cell, row)) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def message(*args, **options):
    with pytest.raises(PairDataError) as caught:
        open_rows(*args, **options)
    return str(caught.value)


def test_emoji_parquet(emoji_folder):
    rows = open_rows(emoji_folder / "test_style.parquet", id_column="hexcode")
    assert isinstance(rows, PairRows) and rows.exact_resume and len(rows) == 1259
    first = rows[0]
    assert first["captions"][:2] == ["copyright", "copyright sign"] and first["id"] == "00A9"
    assert first["image"]["bytes"].startswith(b"\x89PNG")
    ids = rows.ids()
    assert ids.dtype == np.int64 and len(set(ids)) == 1259 and ids[0] == concept_id("00A9")
    everything = list(rows.captions())
    assert everything[0] == "copyright" and len(everything) == sum(len(rows[i]["captions"]) for i in range(1259))
    assert rows[-1]["id"] == rows[1258]["id"]
    with pytest.raises(IndexError, match="row 1259 of .* which has 1259 rows"):
        rows[1259]


def test_a_named_text_column_wins_over_the_rule(emoji_folder):
    rows = open_rows(str(emoji_folder / "test_style.parquet"), text_column="text")
    assert rows[0]["captions"] == ["copyright"] and rows[5]["id"] == 5
    assert rows.ids().tolist() == list(range(1259))


def test_several_parquet_files_are_one_source(emoji_folder):
    files = [emoji_folder / "test_style.parquet", emoji_folder / "test_concept.parquet"]
    rows = open_rows(files, id_column="hexcode")
    assert len(rows) == 1259 + 663 and rows[1259]["captions"][0] == "closed umbrella"


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl", "pairs.csv", "pairs.tsv", "pairs.jsonl", "object"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_source_gives_the_same_rows(folder, kind, streaming):
    image = "file_name" if kind.startswith("metadata") else "picture"
    options = {"image_column": None if kind.startswith("metadata") else "picture", "text_column": "caption"}
    if kind == "object":
        paths = [str(folder / name) for name in NAMES]
        source = datasets.Dataset.from_dict({image: paths, "caption": TEXTS})
        source = source.to_iterable_dataset() if streaming else source
    elif kind.endswith(".jsonl"):
        source = write_jsonl(folder / kind, [{image: n, "caption": t} for n, t in zip(NAMES, TEXTS, strict=True)])
    elif kind.endswith(".tsv"):
        source = folder / kind
        source.write_text("\n".join("\t".join(row) for row in [[image, "caption"], *zip(NAMES, TEXTS, strict=True)]))
    else:
        source = write_csv(folder / kind, [image, "caption"], zip(NAMES, TEXTS, strict=True))
    source = folder if kind.startswith("metadata") else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = open_rows(source, streaming=streaming and kind != "object", **options)
    assert isinstance(rows, PairStream if streaming else PairRows)
    rows = list(rows) if streaming else [rows[i] for i in range(len(rows))]
    assert [row["captions"] for row in rows] == [[text] for text in TEXTS]
    assert [row["image"] for row in rows] == [str(folder / name) for name in NAMES]
    # a stream does not know yet which rows show the same picture, and tells pictures apart
    assert [row["id"] for row in rows] == [0, 1, 2, 3] if not streaming else len({row["id"] for row in rows}) == 4


def test_decoded_pictures_of_a_data_set_stay_encoded():
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    data = datasets.Dataset.from_dict({"image": pictures, "text": list("abc"), "label": [5, 5, 6]})
    data = data.cast_column("image", datasets.Image())
    rows = open_rows(data, id_column="label")
    assert rows[1]["image"]["bytes"].startswith(b"\x89PNG") and rows.ids().tolist() == [5, 5, 6]
    chosen = open_rows(data.select([2, 0]), id_column="label")
    assert chosen.ids().tolist() == [6, 5] and chosen[0]["captions"] == ["c"]
    assert pickle.loads(pickle.dumps(chosen))[1]["captions"] == ["a"]  # as a spawned data worker gets it


def test_saved_data_sets_and_folders_of_splits(folder, tmp_path, emoji_folder):
    data = datasets.Dataset.from_dict({"image": [png()], "text": ["x"]})
    data.save_to_disk(tmp_path / "saved")
    assert open_rows(tmp_path / "saved")[0]["captions"] == ["x"]
    both = datasets.DatasetDict({"train": data, "test": data})
    assert "has several splits; choose one of ['test', 'train']" in message(both)
    assert "has no split 'dev'; choose one of ['test', 'train']" in message(both, split="dev")
    assert len(open_rows(both, split="test")) == 1
    (folder / "train").mkdir()
    (folder / "train" / "0.png").write_bytes(png())
    write_csv(folder / "train" / "metadata.csv", ["file_name", "text"], [["0.png", "zero"]])
    assert open_rows(folder, split="train")[0]["image"] == str(folder / "train" / "0.png")
    assert len(open_rows(emoji_folder, split="test_style")) == 1259  # not joined with test_concept


@pytest.mark.parametrize("form", ["file", "list", "folder", "shard", "shards", "images", "texts", "data set", "saved"])
def test_a_split_of_what_has_none_is_refused(tmp_path, form):
    (tmp_path / "0.png").write_bytes(png())
    kind = form if form in ("images", "texts") else "pairs"
    if form in ("file", "list", "folder"):
        write_csv(tmp_path / "metadata.csv", ["file_name", "text"], [["0.png", "x"]])
    elif form in ("shard", "shards"):
        row = {"key": "0", "image": {"bytes": png()}, "captions": ["x"], "hexcode": "0"}
        write_shard(tmp_path / "0.tar", [row])
    elif form == "texts":
        (tmp_path / "notes.txt").write_text("x\n")
    sources = {
        "file": tmp_path / "metadata.csv",
        "list": [tmp_path / "metadata.csv"],
        "shard": tmp_path / "0.tar",
        "data set": datasets.Dataset.from_dict({"image": [png()], "text": ["x"]}),
    }
    if form == "saved":
        sources["data set"].save_to_disk(tmp_path / "saved")
        sources["saved"] = tmp_path / "saved"
    source = sources.get(form, tmp_path)
    assert len(open_rows(source, kind)) == len(open_rows(source, kind, split="train")) == 1
    assert "has no split 'test'" in message(source, kind=kind, split="test")
    assert "a split is a name, got '../x'" in message(source, kind=kind, split="../x")


def test_a_column_of_strings_and_lists(folder):
    source = write_jsonl(
        folder / "mixed.jsonl",
        [{"image": NAMES[0], "captions": "alone"}, {"image": NAMES[1], "captions": ["one", "two"]}],
    )
    rows = open_rows(source)
    assert [rows[i]["captions"] for i in (0, 1)] == [["alone"], ["one", "two"]]


def test_ids_of_integers_and_strings_are_refused(folder):
    source = write_jsonl(
        folder / "mixed.jsonl",
        [{"image": n, "text": "x", "k": k} for n, k in zip(NAMES, [7, "b", "7", 7], strict=True)],
    )
    assert "the id column 'k' mixes types" in message(source, id_column="k")


def test_missing_sources(tmp_path, folder):
    assert "none.parquet: cannot be read: No such file" in message(tmp_path / "none.parquet")
    assert "cannot open it as a folder or a name on the Hub" in message("nobody/has-this-data-set")
    (tmp_path / "bare").mkdir()
    assert "bare: not a file, not a folder with metadata.csv" in message(tmp_path / "bare")
    assert "got int" in message(3)
    assert "expected files of one kind" in message([tmp_path / "a.csv", tmp_path / "b.parquet"])
    (folder / "pairs.txt").write_text("a")
    assert "expected files of one kind" in message(folder / "pairs.txt")
    (folder / "empty.csv").write_text("")
    assert "the first line must name the columns" in message(folder / "empty.csv")
    write_csv(folder / "head.csv", ["image", "text"], [])
    assert "cannot be read as csv" in message(folder / "head.csv") and "no data" in message(folder / "head.csv")
    assert "no rows" in message(datasets.Dataset.from_dict({"image": [], "text": []}))


def test_missing_columns_name_what_was_found(folder):
    source = write_csv(folder / "pairs.csv", ["file", "words"], [[NAMES[0], "x"]])
    assert "none of the columns image, file_name, image_path for the pictures; columns found: file, words" in message(
        source
    )
    assert "no column 'pic' for the pictures; columns found: file, words" in message(source, image_column="pic")
    text = message(source, image_column="file")
    assert "none of the columns captions, caption, text for the captions; columns found: file, words" in text
    text = message(source, image_column="file", text_column="words", id_column="concept")
    assert "no column 'concept' for the ids" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "columns found: file, words" in message(source, streaming=True)


def test_bad_captions_are_listed_by_row_with_the_total():
    n = 3000  # several chunks of the check
    texts = [f"caption {i}" for i in range(n)]
    for row in (7, 1500, 2999):
        texts[row] = None
    texts[8], texts[2000] = "", " \t\n"
    data = datasets.Dataset.from_dict({"image": [png()] * n, "text": texts})
    text = message(data)
    assert "5 of 3000 rows cannot be used (row numbers count from 0)" in text
    for line in ("row 7: the caption is null", "row 8: the caption is empty", "row 1500: the caption is null"):
        assert line in text
    assert "row 2000: the caption is empty" in text and "row 2999: the caption is null" in text and "more" not in text


def test_only_the_first_ten_are_shown():
    data = datasets.Dataset.from_dict({"image": [png()] * 50, "text": ["x"] * 20 + [""] * 30})
    text = message(data)
    assert "30 of 50 rows" in text and "row 29:" in text and "row 30:" not in text and "... and 20 more" in text


@pytest.mark.parametrize("start", [0, 1500])
def test_bad_lists_of_captions(start):
    lists = [["fine", "also fine"]] * start + [["a"], [], None, ["b", None], ["c", "d", "  "], ["e"]]
    data = datasets.Dataset.from_dict({"image": [png()] * len(lists), "captions": lists})
    text = message(data)
    assert f"4 of {start + 6} rows" in text
    assert f"row {start + 1}: the list of captions is empty" in text
    assert f"row {start + 2}: the caption is null" in text
    assert f"row {start + 3}: caption 1 of the list: the caption is null" in text
    assert f"row {start + 4}: caption 2 of the list: the caption is empty" in text
    assert "4 of 6 rows" in message(data.select(range(start, start + 6)))  # the same through an index


def test_captions_of_a_wrong_type(folder):
    data = datasets.Dataset.from_dict({"image": [png()] * 2, "text": [1, 2]})
    assert "row 0: the caption must be a string or a list of strings, got int 1" in message(data)
    data = datasets.Dataset.from_dict({"image": [png()] * 2, "text": [None, None]})
    assert "2 of 2 rows" in message(data) and "row 0: the caption is null" in message(data)
    rows = [{"image": NAMES[0], "text": "x"}, {"image": NAMES[1], "text": {"a": 5}}]
    text = message(write_jsonl(folder / "mixed.jsonl", rows))
    assert "1 of 2 rows" in text and "row 1: the caption must be a string or a list of strings, got dict" in text


def test_bad_pictures(folder):
    rows = [[NAMES[0], "x"], ["pictures/none.png", "y"], ["", "z"], ["pictures", "a folder"]]
    text = message(write_csv(folder / "pairs.csv", ["image", "text"], rows))
    assert "3 of 4 rows" in text and f"row 1: no picture file {folder}/pictures/none.png" in text
    assert "row 2: no picture file" in text and "row 3: no picture file" in text
    for kind in (pa.binary(), pa.large_binary()):
        table = pa.table({"image": pa.array([png(), b"", None], kind), "text": ["x"] * 3})
        pq.write_table(table, folder / "bytes.parquet")
        text = message(folder / "bytes.parquet")
        assert "2 of 3 rows" in text and "row 1: the picture has 0 bytes" in text
        assert "row 2: the picture is null" in text
    structs = [{"bytes": png(), "path": None}, {"bytes": None, "path": NAMES[0]}, None]
    structs += [{"bytes": None, "path": None}, {"bytes": None, "path": "none.png"}, {"bytes": b"", "path": "x.png"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(structs, kind), "text": ["x"] * 6}), folder / "s.parquet")
    text = message(folder / "s.parquet")
    assert "4 of 6 rows" in text and "row 2: the picture is null" in text and "row 3: the picture is null" in text
    assert "row 4: no picture file" in text and "row 5: the picture has 0 bytes" in text
    data = datasets.Dataset.from_dict({"image": [1.5], "text": ["x"]})
    assert "row 0: the picture must be bytes, a path or {bytes, path}, got float" in message(data)


def test_bad_ids():
    options = {"image": [png()] * 2, "text": ["x", "y"]}
    assert "row 1: the id must be an int or a string, got null" in message(
        datasets.Dataset.from_dict({**options, "k": ["a", None]}), id_column="k"
    )
    assert "row 0: the id must be an int or a string, got float" in message(
        datasets.Dataset.from_dict({**options, "k": [0.5, 1.0]}), id_column="k"
    )
    big = datasets.Dataset(pa.table({**options, "k": pa.array([1, 2**64 - 1], pa.uint64())}))
    assert "row 1: the id 18446744073709551615 does not fit into 64 bits" in message(big, id_column="k")


def test_one_line_holds_all_that_is_wrong_with_a_row():
    data = datasets.Dataset.from_dict({"image": [None, png()], "text": ["", "x"]})
    text = message(data)
    assert "1 of 2 rows" in text and "row 0: the caption is empty; the picture is null" in text


def test_broken_text_files_are_named_by_row(folder):
    rows = [[NAMES[0], "fine"], [NAMES[1], "unquoted, comma"], [NAMES[2], "fine"]]
    text = message(write_csv(folder / "comma.csv", ["image", "text"], rows, quote=False))
    assert "row 1: has 3 fields where the header has 2" in text
    rows = [[NAMES[0], "unquoted, comma"], [NAMES[1], "unquoted, comma"]]
    text = message(write_csv(folder / "all.csv", ["image", "text"], rows, quote=False))
    assert "2 rows cannot be used" in text and "row 0: has 3 fields" in text
    # With the picture last a shifted row would still have its picture, and half of its caption.
    rows = [["red, apple", NAMES[0]], ["green, pear", NAMES[1]]]
    text = message(write_csv(folder / "shifted.csv", ["text", "image"], rows, quote=False))
    assert "row 0: has 3 fields where the header has 2" in text
    (folder / "latin.csv").write_bytes("image,text\na.png,fine\na.png,caf\xe9\n".encode("latin-1"))
    assert "row 1: is not UTF-8" in message(folder / "latin.csv")
    (folder / "broken.jsonl").write_text('{"image": "a.png", "text": "x"}\n{"image": "a.png", "te\n')
    assert "row 1: is not JSON" in message(folder / "broken.jsonl")
    (folder / "broken.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as parquet" in message(folder / "broken.parquet")
    write_csv(folder / "short.csv", ["image", "text"], [[NAMES[0], "x"], [NAMES[1]]])
    assert "row 1: the caption is empty" in message(folder / "short.csv")
    write_csv(folder / "twice.csv", ["text", "text"], [])
    assert "the first line must name the columns, each once" in message(folder / "twice.csv")


def stream_of(n, bad=None):
    texts = [f"t{i}" for i in range(n)]
    if bad is not None:
        texts[bad] = ""
    data = datasets.Dataset.from_dict({"image": [png()] * n, "text": texts}).to_iterable_dataset()
    with pytest.warns(UserWarning, match="the given IterableDataset is read as a sequential stream.*not exact"):
        return open_rows(data)


def test_a_stream_says_that_it_cannot_resume_and_names_bad_rows():
    stream = stream_of(6, bad=4)
    assert not stream.exact_resume and "a resumed run can only read on from the beginning" in stream.resume_note
    with pytest.raises(PairDataError, match="row 4: the caption is empty"):
        list(stream)


def keys(batches):
    return [[key for key, _ in batch] for batch in batches]


def test_a_training_stream_has_one_order():
    stream = stream_of(22)
    options = {"batch_size": 4, "total_steps": 12, "seed": 3, "buffer_size": 8}
    whole = list(PairTrainingStream(stream, **options))
    assert [batch[0][0].epoch for batch in whole] == [0] * 5 + [1] * 5 + [2] * 2
    first = [key.row for batch in keys(whole[:5]) for key in batch]
    assert len(set(first)) == 20 and first != sorted(first)
    assert all(row["captions"] == [f"t{key.row}"] for batch in whole for key, row in batch)
    loader = DataLoader(PairTrainingStream(stream, **options), batch_size=None, num_workers=2, collate_fn=list)
    assert keys(loader) == keys(whole)
    parts = [keys(PairTrainingStream(stream, **options, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == keys(whole)
    assert keys(PairTrainingStream(stream, **options, start_step=7)) == keys(whole)[7:]
    with pytest.raises(PairDataError, match="ended before one batch of 50 rows"):
        list(PairTrainingStream(stream, batch_size=50, total_steps=1))
    with pytest.raises(ValueError, match="do not fit"):
        PairTrainingStream(stream, batch_size=5, total_steps=1, world_size=2)


def test_the_training_set_answers_keys(emoji_folder):
    data = PairTrainingSet(open_rows(emoji_folder / "test_concept.parquet", id_column="hexcode"))
    wanted = [RowKey(5, 0, 0.0), RowKey(3, 1, 0.5)]
    one_by_one, at_once = [data[key] for key in wanted], data.__getitems__(wanted)
    assert one_by_one == at_once and [key for key, _ in at_once] == wanted and len(data) == 663
    assert at_once[0][1] == data.rows[5]


def test_a_configuration_and_a_revision_of_a_data_set_on_the_hub(monkeypatch):
    asked = []

    def load(path, **options):
        asked.append((path, options))
        if "name" not in options:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']")
        return datasets.Dataset.from_dict({"image": [png()], "text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_rows("owner/name", config="de", revision="v1", split="train")) == 1
    assert asked == [("owner/name", {"split": "train", "streaming": False, "name": "de", "revision": "v1"})]
    assert len(open_mixture(["owner/name", "owner/other"], config="en")) == 2
    assert asked[-1] == ("owner/other", {"split": None, "streaming": False, "name": "en"})
    assert "pick one among the available configs: ['de', 'en']; data_config names one" in message("owner/name")


def test_files_on_the_hub(folder, monkeypatch):
    import huggingface_hub

    write_csv(folder / "a.csv", ["image", "text"], [[NAMES[0], "one"]])
    write_csv(folder / "b.csv", ["image", "text"], [[NAMES[1], "two"]])
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(folder / file.removeprefix("data/"))

    class Files:
        def glob(self, pattern):
            assert pattern == "hf://datasets/owner/name/data/*.csv"
            return [f"datasets/owner/name/data/{name}.csv" for name in "ba"]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    assert open_rows("hf://datasets/owner/name@v1/data/a.csv")[0]["captions"] == ["one"]
    assert asked == [("owner/name", "data/a.csv", {"repo_type": "dataset", "revision": "v1"})]
    both = open_rows("hf://datasets/owner/name/data/*.csv")
    assert [both[row]["captions"] for row in range(2)] == [["one"], ["two"]]
    assert "expected hf://datasets/OWNER/NAME/FILE" in message("hf://datasets/owner")
    monkeypatch.undo()
    assert "hf://datasets/owner/absent/a.csv: the Hub does not give it" in message("hf://datasets/owner/absent/a.csv")
    assert "the Hub does not give it" in message("hf://datasets/owner/absent/*.csv")
