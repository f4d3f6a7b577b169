"""Captions apart: an epoch has each caption as a pair of its own, a batch no image twice unless that is said."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_pretraining import tiny_arguments

from oner import open_rows
from oner.processing.data.captions_apart import CaptionsApart
from oner.processing.data.mixture import PairMixture, open_mixture
from oner.processing.data.quarantine import BadRowsError
from oner.processing.data.row_checks import PairDataError
from oner.training.run.building import build_processor_and_config
from oner.training.run.collators import build_collators
from oner.training.run.loading import RunLoader, open_portions, quarantine_of
from oner.training.run.parsing import parse_arguments

# captions of each image
TEXTS = [["a", "b", "c"], ["d"], ["e", "f"], ["g", "h", "i", "j"], ["k"], ["l", "m"], ["n"], ["o", "p"]]
ROWS = [row for row, texts in enumerate(TEXTS) for _ in texts]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 90, 9)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path):
    """A folder of images whose metadata.jsonl lists their captions."""
    home = tmp_path / "home"
    home.mkdir()
    for number in range(len(TEXTS)):
        (home / f"{number}.png").write_bytes(png(number))
    lines = [
        {"file_name": f"{number}.png", "captions": texts, "kind": number // 2} for number, texts in enumerate(TEXTS)
    ]
    (home / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return home


@pytest.fixture
def shards(tmp_path):
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number, texts in enumerate(TEXTS):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.json", json.dumps({"captions": texts}))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else content.encode()))
    return tmp_path / "pairs.tar"


@pytest.mark.parametrize("source", ["table", "shards"])
def test_every_caption_is_a_pair(request, source):
    apart = CaptionsApart(open_rows(str(request.getfixturevalue(source))))
    assert len(apart) == sum(map(len, TEXTS)) and apart.images().tolist() == ROWS
    order = np.random.default_rng(0).permutation(len(apart)).tolist()
    flat = [text for texts in TEXTS for text in texts]
    assert [row["captions"] for row in apart.take(order)] == [[flat[pair]] for pair in order]
    assert [row["id"] for row in apart.take(order)] == [ROWS[pair] for pair in order] == apart.ids()[order].tolist()
    assert list(apart.captions()) == flat and apart.where(6)[1] == 3


@pytest.mark.parametrize(
    "captions",
    [
        pa.array([["a", "b"], ["c", "d"], ["e", "f"]], pa.list_(pa.string(), 2)),
        [{"raw": ["a", "b"]}, {"raw": ["c", "d"]}, {"raw": ["e", "f"]}],
        [[{"raw": "a"}, {"raw": "b"}], [{"raw": "c"}, {"raw": "d"}], [{"raw": "e"}, {"raw": "f"}]],
    ],
    ids=["lists of a fixed length", "objects of lists", "lists of objects"],
)
def test_captions_are_counted_however_they_are_kept(tmp_path, captions):
    pq.write_table(pa.table({"image": [png(1), png(2), png(3)], "captions": captions}), tmp_path / "rows.parquet")
    apart = CaptionsApart(open_rows(str(tmp_path / "rows.parquet")))
    assert [row["captions"] for row in apart.take(range(len(apart)))] == [[text] for text in "abcdef"]


def test_sources_of_a_mixture_are_counted_in_pairs(table, shards):
    both = open_mixture([str(table), str(shards)], weights=[1, 2])
    assert isinstance(both, PairMixture)
    apart = CaptionsApart(both)
    assert apart.sizes == (16, 16) and apart[16]["captions"] == ["a"] and apart[16]["id"] == len(TEXTS)


def test_single_texts_and_bad_rows_keep_one_place(table):
    lines = [json.loads(line) for line in (table / "metadata.jsonl").read_text().splitlines()]
    lines[2]["captions"] = ["", "f"]
    lines[4]["captions"] = ["\x00" * 3, "k"]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    apart = CaptionsApart(open_rows(str(table), bad_rows="skip"))
    assert apart.images(sorted(apart.bad)).tolist() == [2, 4] and len(apart) == 15
    assert apart.reason(4).startswith("caption 0") and apart.reason(5) is None
    with pytest.raises(PairDataError):
        open_rows(str(table))
    (table / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "one"}))
    assert CaptionsApart(open_rows(str(table)))[0]["captions"] == ["one"]


def batches(table, directory, start=0, **options):
    """Captions and images of each batch of two epochs, from a step on, and the length of an epoch."""
    told = {"captions_apart": True, "id_column": None, "one_row_per_id": False, "batch_size": 4, **options}
    arguments = parse_arguments(tiny_arguments(table, directory, text_column="captions", epochs=2, **told))
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    loader = RunLoader(arguments, rows, build_collators(arguments, processor, config))
    order = loader.portions["pairs"]._loader(start, loader.total_steps).batch_sampler
    keys = [[(key.row, key.turn) for key in batch] for batch in order]
    read = [tuple(map(tuple, batch["pairs"]["input_ids"].tolist())) for batch in loader(start)]
    return keys, read, loader.epoch_steps, rows


@pytest.mark.usefixtures("fresh_accelerator")
def test_an_epoch_shows_every_caption_and_a_batch_no_image_twice(table, tmp_path):
    keys, read, steps, rows = batches(table, tmp_path / "run")
    assert steps == 4  # 16 captions, 4 a batch
    for epoch in (keys[:steps], keys[steps:]):
        assert Counter(row for batch in epoch for row, _ in batch) == Counter(range(16))
        assert all(len({ROWS[row] for row, _ in batch}) == 4 for batch in epoch)
    # the run goes on from any step as if it had not stopped
    later = batches(table, tmp_path / "later", start=3)
    assert later[0] == keys[3:] and later[1] == read[3:]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.filterwarnings("ignore:.* rows show 8 different pictures:UserWarning")
@pytest.mark.parametrize("options", [{}, {"captions_apart": False, "one_row_per_id": True}], ids=["apart", "one row"])
def test_a_table_of_a_row_a_caption_has_no_image_twice_in_a_batch(table, tmp_path, options):
    flat = [(row, text) for row, texts in enumerate(TEXTS) for text in texts]
    lines = [json.dumps({"file_name": f"{row}.png", "captions": text}) for row, text in flat]
    (table / "metadata.jsonl").write_text("\n".join(lines))
    keys, _, steps, _ = batches(table, tmp_path / "run", **options)
    assert steps == 4 and all(len({ROWS[row] for row, _ in batch}) == 4 for batch in keys)


@pytest.mark.usefixtures("fresh_accelerator")
def test_an_image_may_repeat_if_that_is_said(table, tmp_path):
    keys, _, steps, _ = batches(table, tmp_path / "run", image_repeats=True)
    assert steps == 4 and any(len({ROWS[row] for row, _ in batch}) < 4 for batch in keys)
    # ids are coarser than images
    keys, _, _, rows = batches(table, tmp_path / "ids", id_column="kind", one_row_per_id=True, batch_size=2)
    assert all(len({rows["pairs"].ids()[row] for row, _ in batch}) == 2 for batch in keys)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("apart", [False, True])
def test_bad_rows_are_a_share_of_the_rows_however_many_captions_the_others_have(table, tmp_path, apart):
    lines = [json.loads(line) for line in (table / "metadata.jsonl").read_text().splitlines()]
    lines[4]["captions"] = [""]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def opened(allowed):
        options = {"captions_apart": apart, "id_column": None, "one_row_per_id": False, "max_bad_rows": allowed}
        return parse_arguments(tiny_arguments(table, tmp_path, text_column="captions", **options))

    # one of 8 rows at opening, though it is one of 16 pairs
    with pytest.raises(BadRowsError, match="1 of 8 rows cannot be used, more than max_bad_rows=0.1 allows"):
        open_portions(opened(0.1))
    arguments = opened(0.125)
    rows = open_portions(arguments)

    # what the steps read are pairs
    message = f"4 of 8 {'pairs' if apart else 'rows'} could not be used, beside 1 of 8 rows at opening; more than"
    with pytest.raises(BadRowsError, match=message):
        quarantine_of(arguments, rows).check("pairs", bad=4, seen=8)


def test_what_has_no_captions_by_number_is_refused(table, tmp_path):
    for extra, what in ((["--streaming"], "got kind pairs as a stream"), (["--kind", "images"], "got kind images")):
        with pytest.raises(ValueError, match=f"captions_apart needs rows of pairs by number, {what}"):
            parse_arguments([*tiny_arguments(table, tmp_path, captions_apart=True, one_row_per_id=False), *extra])
