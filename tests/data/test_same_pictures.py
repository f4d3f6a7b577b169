"""Captions kept one a row: rows of one picture are one concept, and are measured as if they were one row."""

import csv
import io
import json
import tarfile
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oner.processing.data.mixture import PairMixture
from oner.processing.data.same_pictures import ROW
from oner.processing.data.sources import open_rows
from oner.training.evaluation.embedding import PictureRows
from oner.training.evaluation.retrieval import RetrievalEvaluator

# row -> picture
FLAT = [0, 0, 1, 2, 1, 0]
KINDS = ["csv", "jsonl", "paths in parquet", "bytes in parquet", "images in parquet", "tar", "object", "unnamed bytes"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 90, 0)).save(buffer, "png")
    return buffer.getvalue()


def source(folder: Path, kind: str):
    """Six rows that show three pictures."""
    texts = [f"text {row}" for row in range(len(FLAT))]
    for picture in range(3):
        (folder / f"{picture}.png").write_bytes(png(picture))
    names = [f"{picture}.png" if row != 1 else f"./{picture}.png" for row, picture in enumerate(FLAT)]
    if kind == "csv":
        with open(folder / "p.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *zip(names, texts, strict=True)])
        return folder / "p.csv"
    if kind == "jsonl":
        rows = [{"file_name": name, "text": text} for name, text in zip(names, texts, strict=True)]
        (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "p.jsonl"
    if kind == "tar":
        with tarfile.open(folder / "p.tar", "w") as archive:
            for row, picture in enumerate(FLAT):
                for ending, content in (("png", png(picture)), ("txt", texts[row].encode())):
                    info = tarfile.TarInfo(f"{row}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return folder / "p.tar"
    images = {
        "paths in parquet": names,
        "bytes in parquet": [png(picture) for picture in FLAT],
        "unnamed bytes": [{"bytes": png(picture), "path": f"{row}.png"} for row, picture in enumerate(FLAT)],
    }.get(kind, [{"bytes": png(picture), "path": None} for picture in FLAT])
    if "parquet" in kind:
        pq.write_table(pa.table({"image": images, "text": texts}), folder / "p.parquet")
        return folder / "p.parquet"
    return datasets.Dataset.from_dict({"image": images, "text": texts})


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_picture_share_an_id(tmp_path, kind):
    for _ in range(2):  # read, then from what was kept
        with pytest.warns(UserWarning, match="6 rows show 3 different pictures"):
            rows = open_rows(source(tmp_path, kind))
        assert rows.ids().tolist() == [0, 0, 2, 3, 2, 0] and rows.ids().dtype == np.int64
        assert [row["id"] for row in rows.take(range(6))] == [0, 0, 2, 3, 2, 0] and rows[4]["id"] == 2
        assert not rows.has_ids


@pytest.mark.parametrize("kind", KINDS)
def test_unless_told_otherwise(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = open_rows(source(tmp_path, kind), id_column=ROW)
    assert rows.ids().tolist() == list(range(6)) == [row["id"] for row in rows.take(range(6))]
    if kind in ("csv", "jsonl"):
        named = open_rows(source(tmp_path, kind), id_column="text")
        assert len(set(named.ids())) == 6 and named.has_ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tar"])
def test_of_a_stream_too(tmp_path, kind):
    data = source(tmp_path, kind)
    data = data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data
    with pytest.warns(UserWarning, match="sequential stream"):
        ids = [row["id"] for row in open_rows(data, streaming=True)]
    assert [ids.index(one) for one in ids] == [0, 0, 2, 3, 2, 0]
    with pytest.warns(UserWarning, match="sequential stream"):
        assert [row["id"] for row in open_rows(data, streaming=True, id_column=ROW)] == list(range(6))


def test_in_a_mixture_rows_are_numbered_on(tmp_path):
    with pytest.warns(UserWarning, match="6 rows show 3"):
        sources = [open_rows(source(tmp_path, kind)) for kind in ("csv", "tar")]
    mixture = PairMixture(sources)
    assert mixture.ids().tolist() == [0, 0, 2, 3, 2, 0, 6, 6, 8, 9, 8, 6]
    assert [row["id"] for row in mixture.take(range(12))] == mixture.ids().tolist()


def test_bad_rows_are_not_counted_and_other_kinds_keep_their_numbers(tmp_path):
    data = datasets.Dataset.from_dict({"image": [png(0), png(0), None, None], "text": ["a", "", "b", "c"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = open_rows(data, bad_rows="skip")
        assert rows.ids().tolist() == [0, 0, 2, 3] and sorted(rows.bad) == [1, 2, 3]
        assert open_rows(source(tmp_path, "object"), "images").ids().tolist() == list(range(6))
        assert open_rows(source(tmp_path, "object"), "texts").ids().tolist() == list(range(6))


@pytest.mark.parametrize("captions", ["all", "first"])
@pytest.mark.parametrize("kind", ["csv", "object"])
def test_flat_rows_are_measured_as_grouped_ones(tmp_path, kind, captions):
    with pytest.warns(UserWarning, match="6 rows show 3"):
        flat = open_rows(source(tmp_path, kind))
    grouped = [
        {"image": str(tmp_path / f"{picture}.png"), "id": picture, "captions": [f"text {row}" for row in rows]}
        for picture, rows in enumerate(([0, 1, 5], [2, 4], [3]))
    ]
    one, other = (RetrievalEvaluator(rows, captions=captions, progress=False) for rows in (flat, grouped))
    assert one.texts == other.texts and one.image_ids.tolist() == other.image_ids.tolist() == [0, 1, 2]
    assert one.text_ids.tolist() == other.text_ids.tolist()
    assert {**one.protocol} == {**other.protocol} and one.protocol["pictures"] == 3


def test_pictures_of_rows_that_say_otherwise_stay_apart(tmp_path):
    rows = open_rows(source(tmp_path, "csv"), id_column="text")
    pictures = PictureRows(rows)
    assert len(pictures) == 6 and pictures[4]["captions"] == ["text 4"]
    with pytest.raises(IndexError):
        pictures[6]
