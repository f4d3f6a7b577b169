"""Who stands in for a bad row, the list of them on disk, and the share at which a run stops."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tiny_loading import collator_of, dataset_of, loader_of, real_pairs
from torch.utils.data import DataLoader

from oner.processing.data.mixture import PairMixture
from oner.processing.data.quarantine import (
    SHOWN,
    BadRow,
    BadRowsError,
    Quarantine,
    StandIns,
    Watch,
    line_of,
    read_quarantine,
    read_rows,
)
from oner.processing.data.sampling import PairOrder
from oner.processing.data.sources import PairTrainingStream, open_rows
from oner.processing.vl_tokenizer import train_tokenizer

BROKEN = b"\x89PNG\r\n\x1a\n nothing more"
BAD = (1, 4, 9, 16, 25, 36, 37, 38)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def pairs(emoji_folder):
    return real_pairs(emoji_folder)


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return train_tokenizer(pairs[1], vocab_size=300)


def broken(pairs, bad=BAD, **columns):
    """Forty rows: the even ones of `bad` have a picture that does not decode, the odd ones no caption."""
    pictures = [BROKEN if row in bad and row % 2 == 0 else picture for row, picture in enumerate(pairs[0])]
    texts = ["" if row in bad and row % 2 else text for row, text in enumerate(pairs[1])]
    return dataset_of((pictures, texts), **columns)


def joined(parts):
    """The slices of one step as the global batch's rows, pixels, masks and lines."""
    names = ("rows", "ids", "pixel_values", "bool_masked_pos")
    lines = [line for part in parts for line in part.get("quarantine", [])]
    return {name: torch.cat([part[name] for part in parts]) for name in names}, lines


def assert_same_batches(one, other):
    for (tensors, lines), (tensors_other, lines_other) in zip(one, other, strict=True):
        assert lines == lines_other
        for name, value in tensors.items():
            assert torch.equal(value, tensors_other[name]), name


# Candidates


def order_of(n_rows, batch_size, groups=None, **mixture):
    return PairOrder(n_rows, batch_size, seed=5, groups=groups, **mixture)


def candidates_of(order, step, total_steps=100):
    rows = SimpleNamespace(reason=lambda row: None)
    keys = order.keys(step, total_steps)
    stand_ins = StandIns(rows, order, total_steps)
    return keys, [list(stand_ins.candidates(key)) for key in keys]


@pytest.mark.parametrize("n_rows, batch_size", [(40, 8), (41, 8), (97, 4), (1000, 32), (33, 32), (6, 6), (5000, 2)])
def test_every_row_outside_the_batch_is_dealt_to_one_place(n_rows, batch_size):
    order = order_of(n_rows, batch_size)
    for step in (0, order.steps_per_epoch + 1):
        keys, candidates = candidates_of(order, step)
        batch = {key.row for key in keys}
        outside = [[row for row in rows if row not in batch] for rows in candidates]
        assert sorted(row for rows in outside for row in rows) == sorted(set(range(n_rows)) - batch)
        for key, rows, first in zip(keys, candidates, outside, strict=True):
            # rows of the batch come last, each at most once, and never the bad row itself
            assert rows[: len(first)] == first and len(set(rows)) == len(rows) and key.row not in rows
            assert set(rows[len(first) :]) <= batch


def test_with_ids_the_rows_of_the_own_id_come_first_and_no_id_is_met_twice():
    groups = np.random.default_rng(1).integers(0, 60, 300)
    order = order_of(300, 16, groups)
    for step in range(4):
        keys, candidates = candidates_of(order, step)
        inside = {int(order.groups[key.row]) for key in keys}
        dealt = []
        for key, rows in zip(keys, candidates, strict=True):
            own = [row for row in rows if order.groups[row] == order.groups[key.row]]
            assert rows[: len(own)] == own
            assert set(own) == set(np.flatnonzero(order.groups == order.groups[key.row])) - {key.row}
            others = {int(order.groups[row]) for row in rows[len(own) :]}
            assert not others & inside and len(set(rows)) == len(rows)
            dealt.append(others)
        assert sum(map(len, dealt)) == len(set().union(*dealt)) == order.groups.max() + 1 - 16


def test_of_weighted_sources_the_own_one_comes_first():
    sizes = (30, 50, 20)
    order = order_of(100, 8, sizes=sizes, weights=(1, 1, 2))
    ends, found = np.cumsum(sizes), 0
    for step in range(5):
        keys, candidates = candidates_of(order, step)
        for key, rows in zip(keys, candidates, strict=True):
            sources = [int(np.searchsorted(ends, row, side="right")) for row in rows]
            outside = [place for place, row in enumerate(rows) if row not in {other.row for other in keys}]
            own = [sources[place] == np.searchsorted(ends, key.row, side="right") for place in outside]
            assert own == sorted(own, reverse=True)
            found += sum(own)
    assert found > 40


def test_candidates_change_with_place_step_and_seed():
    order = order_of(400, 8)
    first, second = candidates_of(order, 0)[1], candidates_of(order, 1)[1]
    assert first[0][:20] != first[1][:20] and first[0][:20] != second[0][:20]
    assert first == candidates_of(order_of(400, 8), 0)[1]
    assert first != candidates_of(PairOrder(400, 8, seed=6), 0)[1]


# Batches


@pytest.mark.parametrize("grouped", [False, True])
def test_workers_processes_and_resume_change_nothing(pairs, tokenizer, grouped):
    rows = open_rows(broken(pairs, key=[row // 2 for row in range(40)]), id_column="key", bad_rows="skip")
    options = {"batch_size": 8, "groups": rows.ids() if grouped else None}
    make = collator_of(tokenizer)
    whole = [joined([batch]) for batch in loader_of(rows, make, 11, **options)]
    assert {line["row"] for _, lines in whole for line in lines} == {4, 16, 36, 38}
    for tensors, _ in whole:
        assert tensors["rows"].shape == (8,) and not set(tensors["rows"].tolist()) & set(BAD)
        if grouped:
            assert len(set(tensors["ids"].tolist())) == 8
    assert_same_batches([joined([b]) for b in loader_of(rows, make, 11, workers=2, **options)], whole)
    assert_same_batches([joined([b]) for b in loader_of(rows, make, 11, start_step=7, **options)], whole[7:])
    for world_size in (2, 4):
        parts = [loader_of(rows, make, 11, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        assert_same_batches([joined(step) for step in zip(*parts, strict=True)], whole)


def test_many_bad_rows_and_few_ids(pairs, tokenizer):
    """Half of all rows are bad, and the ids of a batch of four processes stay different from each other."""
    ids = [row % 20 for row in range(40)]
    rows = open_rows(broken(pairs, bad=tuple(range(0, 40, 2)), key=ids), id_column="key", bad_rows="skip")
    loaders = [
        loader_of(rows, collator_of(tokenizer), 30, batch_size=8, groups=rows.ids(), rank=rank, world_size=4)
        for rank in range(4)
    ]
    with pytest.raises(BadRowsError, match=r"row \d+ of the data set cannot be used, and none of \d+ rows that could"):
        for parts in zip(*loaders, strict=True):
            shown = joined(parts)[0]["ids"].tolist()
            assert len(set(shown)) == 8 and not {number for number in shown if number % 2 == 0}


def test_a_sibling_stands_in_first(pairs, tokenizer):
    ids = [row // 2 for row in range(40)]
    rows = open_rows(broken(pairs, bad=(6, 12), key=ids), id_column="key", bad_rows="skip")
    lines = [
        line
        for batch in loader_of(rows, collator_of(tokenizer), 20, batch_size=8, groups=rows.ids())
        for line in batch.get("quarantine", [])
    ]
    assert {(line["row"], line["replaced_by"]) for line in lines} == {(6, 7), (12, 13)}


def test_a_stand_in_draws_for_itself(pairs, tokenizer):
    """The row that stands in is cropped otherwise than in its own turn of the epoch."""
    rows = open_rows(broken(pairs, bad=(8,)), bad_rows="skip")
    batches = list(loader_of(rows, collator_of(tokenizer), 10))
    (line,) = [line for batch in batches for line in batch.get("quarantine", [])]
    turns = [
        batch["pixel_values"][place]
        for batch in batches
        for place in np.flatnonzero(batch["rows"] == line["replaced_by"])
    ]
    assert len(turns) == 2 and not torch.equal(*turns)


@pytest.mark.filterwarnings("ignore:.*different pictures")
def test_failed_stand_ins_are_listed_too(pairs, tokenizer):
    bad = tuple(range(0, 32, 2))
    rows = open_rows(broken(pairs, bad=bad), bad_rows="skip")
    lines = [line for batch in loader_of(rows, collator_of(tokenizer), 10) for line in batch.get("quarantine", [])]
    assert {line["row"] for line in lines if line["attempt"] == 0} == set(bad)
    tried = [line for line in lines if line["attempt"] > 0]
    assert tried and {line["row"] for line in tried} <= set(bad)
    assert all(line["replaced_by"] not in bad for line in lines)


def test_without_stand_ins_a_bad_row_is_an_error(pairs, tokenizer):
    rows = open_rows(broken(pairs, bad=(8,)))
    with pytest.raises(ValueError, match=r"row 8 of the data set: cannot read the picture \(bytes\)"):
        list(loader_of(rows, collator_of(tokenizer), 10, skipping=False))


def test_a_row_that_cannot_be_read_spares_its_neighbours(pairs):
    rows = open_rows(dataset_of(pairs))

    class Rows(PairMixture):
        def take(self, indices):
            if 3 in indices:
                raise OSError("Input/output error")
            return super().take(indices)

    read = read_rows(Rows([rows]), [2, 3, 4])
    assert [row["captions"] for row in (read[0], read[2])] == [[pairs[1][2]], [pairs[1][4]]]
    assert read[1] == BadRow("cannot be read: OSError: Input/output error")


# Streams


def stream_of(data):
    with pytest.warns(UserWarning, match="is read as a sequential stream"):
        return open_rows(data.to_iterable_dataset(), bad_rows="skip")


@pytest.mark.parametrize("bad", [BAD, tuple(range(0, 20))])
def test_a_stream_replaces_from_the_batches_before(pairs, tokenizer, bad):
    stream, make = stream_of(broken(pairs, bad=bad)), collator_of(tokenizer)

    def read(workers=0, **options):
        data = PairTrainingStream(stream, batch_size=8, total_steps=7, seed=2, buffer_size=16, **options)
        return [joined([batch]) for batch in DataLoader(data, batch_size=None, num_workers=workers, collate_fn=make)]

    whole = read()
    assert len(whole) == 7 and all(len(tensors["rows"]) == 8 for tensors, _ in whole)
    assert not {row for tensors, _ in whole for row in tensors["rows"].tolist()} & set(bad)
    first = [line for _, lines in whole[:5] for line in lines if line["attempt"] == 0]
    assert sorted(line["row"] for line in first) == sorted(bad)  # once an epoch, those without a caption too
    assert_same_batches(read(workers=2), whole)
    assert_same_batches(read(start_step=4), whole[4:])
    parts = [read(rank=rank, world_size=2) for rank in (0, 1)]
    glued = [
        ({name: torch.cat([a[name], b[name]]) for name in a}, lines + more)
        for (a, lines), (b, more) in zip(*parts, strict=True)
    ]
    assert_same_batches(glued, whole)


def test_a_stream_of_bad_rows_ends(pairs, tokenizer):
    stream = stream_of(broken(pairs, bad=tuple(range(40))))
    data = PairTrainingStream(stream, batch_size=8, total_steps=2)
    with pytest.raises(BadRowsError, match="cannot be used, and none of"):
        list(DataLoader(data, batch_size=None, collate_fn=collator_of(tokenizer)))


# The list


def quarantine_in(directory, allowed, opened=(), total=None):
    return Quarantine(directory, {"pairs": Watch(allowed, opened, total)})


def lines_of(step, *rows):
    return [line_of("pairs.csv", row, f"reason {step}", epoch=0, attempt=0, replaced_by=99) for row in rows]


def written(path):
    return [(line["step"], line["row"]) for line in read_quarantine(path)]


def test_the_list_is_cut_at_a_resume_and_is_the_same_afterwards(tmp_path):
    opened = [("pairs.csv", 3, "the caption is null")]
    for directory, stops in ((tmp_path / "whole", ()), (tmp_path / "stopped", (2, 5, 5, 0))):
        start = 0
        for stop in (*stops, None):
            quarantine = quarantine_in(directory, 0.5, opened, 100)
            quarantine.begin(start)
            for step in range(start, 8):
                quarantine.add("pairs", step, lines_of(step, step, step + 10) if step % 2 else [])
            start = stop
    assert quarantine.path.read_bytes() == (tmp_path / "whole" / "quarantine.jsonl").read_bytes()
    assert written(quarantine.path) == [(None, 3)] + [
        (step, row) for step in (1, 3, 5, 7) for row in (step, step + 10)
    ]
    resumed = quarantine_in(tmp_path / "whole", 0.5, opened, 100)
    resumed.begin(4)
    watch = resumed.watches["pairs"]
    assert watch.before == (4, 0) and watch.new == (0, 0)


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    quarantine = quarantine_in(tmp_path, 0.5)
    quarantine.add("pairs", 0, lines_of(0, 1))
    quarantine.add("pairs", 1, lines_of(1, 2))
    content = quarantine.path.read_bytes()
    for length in range(len(content)):
        quarantine.path.write_bytes(content[:length])
        quarantine.begin(9)
        whole = content[:length].count(b"\n")
        assert written(quarantine.path) == [(0, 1), (1, 2)][:whole]
        assert quarantine.path.exists() == (whole > 0)


def test_a_line_says_all_and_holds_any_text(tmp_path):
    quarantine = quarantine_in(tmp_path, 0.5)
    quarantine.add("pairs", 4, [line_of("a.tar", 7, "caf\udce9 \ud800", epoch=1, attempt=2, replaced_by=11)])
    (line,) = read_quarantine(quarantine.path)
    expected = {
        "portion": "pairs",
        "source": "a.tar",
        "row": 7,
        "epoch": 1,
        "step": 4,
        "attempt": 2,
        "replaced_by": 11,
    }
    assert line == {**expected, "reason": "caf\udce9 \ud800"}


def test_nothing_bad_leaves_no_file(tmp_path):
    quarantine = quarantine_in(tmp_path / "run", 0.01, total=100)
    quarantine.begin(0)
    quarantine.add("pairs", 3, [])
    quarantine.check("pairs", 0, 0)
    assert not quarantine.path.exists()


@pytest.mark.parametrize(
    "allowed, seen, most", [(0.01, 100, 4), (0.01, 10_000, 130), (0.05, 1000, 71), (0.0, 10**6, 0), (1.0, 50, 50)]
)
def test_the_share_that_stops_a_run(tmp_path, allowed, seen, most):
    quarantine = quarantine_in(tmp_path, allowed)
    quarantine.add("pairs", 0, lines_of(0, *range(30)))
    quarantine.check("pairs", most, seen)
    if allowed < 1:
        with pytest.raises(BadRowsError) as caught:
            quarantine.check("pairs", most + 1, seen)
        text = str(caught.value)
        assert f"{most + 1} of {seen} rows could not be used; more than max_bad_rows={allowed}" in text
        assert str(quarantine.path) in text and text.count("\n  row ") == SHOWN and "row 29 of pairs.csv" in text


def test_a_share_below_the_limit_does_not_stop_by_chance(tmp_path):
    quarantine, rng = quarantine_in(tmp_path, 0.01), np.random.default_rng(0)
    stopped = {0.008: 0, 0.02: 0}
    for share in stopped:
        for _ in range(200):
            bad = np.cumsum((rng.random((200, 64)) < share).sum(1))
            try:
                for step, count in enumerate(bad.tolist(), 1):
                    quarantine.check("pairs", count, 64 * step)
            except BadRowsError:
                stopped[share] += 1
    assert stopped[0.008] <= 10 and stopped[0.02] >= 195, stopped


def test_what_was_found_at_opening_counts(tmp_path):
    opened = [("pairs.csv", row, "the caption is null") for row in range(8)]
    quarantine = quarantine_in(tmp_path, 0.01, opened, 1000)
    quarantine.check_opening()
    quarantine.check("pairs", 6, 1000)  # 0.2 % are left: 2 of 1000, and 4.2 for chance
    with pytest.raises(BadRowsError, match="7 of 1000 rows could not be used, beside 8 of 1000 rows at opening"):
        quarantine.check("pairs", 7, 1000)
    with pytest.raises(BadRowsError, match=r"8 of 700 rows cannot be used, more than max_bad_rows=0.01 allows"):
        quarantine_in(tmp_path / "b", 0.01, opened, 700).check_opening()
    assert len(read_quarantine(tmp_path / "b" / "quarantine.jsonl")) == 8
    with pytest.raises(ValueError, match=r"max_bad_rows is 1.5; expected a share in \[0, 1\]"):
        quarantine_in(tmp_path, 1.5)


def test_portions_of_a_run_share_one_list(tmp_path):
    """Each has its own share and its own counts; neither writes over the other's lines, nor does a resume."""

    def opened():
        watches = {"texts": Watch(0.5, [("a.txt", 2, "not UTF-8")], 10), "pairs": Watch(0.0)}
        return Quarantine(tmp_path, watches)

    quarantine = opened()
    quarantine.begin(0)
    for step in range(4):
        quarantine.add("texts", step, lines_of(step, step))
        quarantine.check("texts", step + 1, 10 * (step + 1))
    quarantine.add("pairs", 3, lines_of(3, 7))
    with pytest.raises(BadRowsError, match="1 of 40 rows could not be used; more than max_bad_rows=0.0"):
        quarantine.check("pairs", 1, 40)
    resumed = opened()
    resumed.begin(2)
    assert [(line["portion"], line["step"]) for line in read_quarantine(resumed.path)] == [
        ("texts", None),
        ("texts", 0),
        ("texts", 1),
    ]
    assert resumed.watches["texts"].before == (2, 0) and resumed.watches["pairs"].before == (0, 0)
