"""Mixtures of sources: shares, evenness, ids across sources, and one order for any workers, processes and start."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_loading import collator_of
from torch.utils.data import DataLoader

from oner.processing.data.mixture import PairMixture, PairStreamMixture, open_mixture
from oner.processing.data.sampling import EXTRA_TURN, PairBatchSampler, PairOrder, RowKey, epoch_visits, shares_of
from oner.processing.data.sources import PairDataError, PairTrainingSet, PairTrainingStream, open_rows
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.run.arguments import DataArguments
from oner.training.run.loading import open_training_rows
from oner.training.run.parsing import parse_arguments


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value=9):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 8, 7)).save(buffer, "png")
    return buffer.getvalue()


def source(name, n, ids=None):
    columns = {"image": [png(i) for i in range(n)], "text": [f"{name}{i}" for i in range(n)]}
    return datasets.Dataset.from_dict(columns | ({} if ids is None else {"k": ids}))


def visits_of(order, epochs):
    """(epochs, V) rows and turns, in the order of the run."""
    total = order.steps_per_epoch * epochs
    keys = [key for step in range(total) for key in order.keys(step, total)]
    shape = (epochs, -1)
    return np.array([key.row for key in keys]).reshape(shape), np.array([key.turn for key in keys]).reshape(shape)


@pytest.mark.parametrize(
    "sizes, weights",
    [
        ((70, 30), (1, 1)),  # the second is visited 5 / 3 times as often as it has rows
        ((70, 30), (0.7, 0.3)),
        ((50, 30, 20), (0.1, 0.2, 0.7)),
        ((97, 3), (0.5, 0.5)),  # seventeen times an epoch
        ((40, 60), (0.999, 0.041)),
        ((100,), (5.0,)),
    ],
)
def test_shares_are_exact_and_every_source_is_walked_evenly(sizes, weights):
    n, size, epochs = sum(sizes), 8, 25
    order = PairOrder(n, size, seed=3, sizes=sizes, weights=weights)
    assert order.steps_per_epoch == n // size
    rows, turns = visits_of(order, epochs)
    places = order.steps_per_epoch * size
    edges = np.cumsum([0, *sizes])
    share = np.array(weights) / sum(weights)
    for epoch in range(epochs):
        counts = np.histogram(rows[epoch], edges)[0]
        assert np.abs(counts - share * places).max() < 1  # exact but for whole rows
        so_far = np.bincount(rows[: epoch + 1].ravel(), minlength=n)
        for first, end in zip(edges, edges[1:], strict=False):
            assert np.ptp(so_far[first:end]) <= 1  # no row of a source is twice ahead of another
    # a row meets a turn once in a run, so copies within an epoch are drawn for apart
    assert len(set(zip(rows.ravel(), turns.ravel(), strict=True))) == rows.size


def test_epochs_differ_and_sources_are_mixed_within_them():
    order = PairOrder(100, 10, seed=1, sizes=(50, 50), weights=(1, 1))
    rows, _ = visits_of(order, 3)
    assert not np.array_equal(rows[0], rows[1]) and sorted(rows[0]) == sorted(rows[1]) == list(range(100))
    of = (rows.reshape(3, 10, 10) >= 50).sum(2)
    assert of.min() >= 1 and of.max() <= 9 and len(np.unique(of)) > 2
    other, _ = visits_of(PairOrder(100, 10, seed=2, sizes=(50, 50), weights=(1, 1)), 3)
    assert not np.array_equal(rows, other)


RECORDED = [
    [(2, 0), (9, 0), (1, 0), (7, 0), (6, 0)],
    [(7, 2), (3, 0), (0, 1), (1, 1), (7, 1)],
]
RECORDED_GROUPED = [6, 9, 0, 4]


def test_the_order_of_a_mixture_does_not_change_between_versions():
    # Recorded: a change here breaks the exact resume of every run that was started before it.
    order = PairOrder(10, 5, seed=0, sizes=(7, 3), weights=(1, 1))
    assert [[(key.row, key.turn) for key in order.keys(step, 4)] for step in (0, 3)] == RECORDED
    with_ids = PairOrder(10, 2, seed=0, groups=[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], sizes=(7, 3), weights=(1, 1))
    assert [key.row for step in (0, 7) for key in with_ids.keys(step, 10)] == RECORDED_GROUPED


def test_without_weights_the_order_is_that_of_one_source():
    keys = PairOrder(60, 8, seed=4).keys(9, 20)
    assert [key.row for key in keys] == [key.row for key in list(PairBatchSampler(60, 8, seed=4, total_steps=20))[9]]
    assert {key.turn for key in keys} == {1} and [key.position for key in keys] == list(range(72, 80))


@pytest.mark.parametrize("weights", [(1, 1), (0.2, 0.8), (0.9, 0.1)])
def test_one_row_per_id_over_sources_with_weights(weights):
    rng = np.random.default_rng(0)
    sizes, size, epochs = (600, 200), 32, 12
    groups = np.concatenate([rng.integers(0, 90, 600), rng.integers(60, 120, 200)])  # 30 ids stand in both
    order = PairOrder(800, size, seed=2, groups=groups, sizes=sizes, weights=weights)
    rows, turns = visits_of(order, epochs)
    batches = groups[rows.reshape(-1, size)]
    assert (np.diff(np.sort(batches, axis=1), axis=1) != 0).all()
    assert len(set(zip(rows.ravel(), turns.ravel(), strict=True))) == rows.size
    used = np.bincount(rows.ravel(), minlength=800)
    share = used[:600].sum() / used.sum()
    assert order.steps_per_epoch == 800 // 32 and abs(share - weights[0] / sum(weights)) < 0.001
    assert np.ptp(used[:600]) <= 1 + 2 * (weights[1] > 0.5) and np.ptp(used[600:]) <= 1 + 2 * (weights[1] > 0.5)


def test_one_large_id_shortens_the_epoch_but_never_stands_twice_in_a_batch():
    groups = np.concatenate([np.zeros(40, int), np.arange(1, 61)])  # 40 of 100 rows show one concept
    order = PairOrder(100, 10, seed=0, groups=groups, sizes=(50, 50), weights=(1, 1))
    assert order.steps_per_epoch == 6  # 60 ids of one row and 6 of the 40 fill six batches of ten, but no seventh
    rows, turns = visits_of(order, 10)
    for batch in groups[rows.reshape(-1, 10)]:
        assert len(set(batch)) == 10
    assert np.bincount(rows.ravel())[:40].sum() >= 50  # the large id has its place in nearly every batch
    with pytest.raises(ValueError, match="one row per group cannot be filled from 2 groups, 2.0 of which"):
        PairOrder(60, 3, groups=[0, 1] * 30, sizes=(30, 30), weights=(1, 1))


def test_an_epoch_that_meets_an_id_too_often_is_filled_up():
    """45 rows of one id among the 90 of a source that 60 visits walk: 30 on average, one a step, and at times more."""
    groups = np.concatenate([np.zeros(45, int), np.arange(1, 46), np.arange(46, 136)])
    order = PairOrder(180, 6, seed=1, groups=groups, sizes=(90, 90), weights=(1, 2))
    rows, turns = visits_of(order, 40)
    visited = [np.bincount(groups[epoch_visits((90, 90), (60, 120), 1, epoch)[0]])[0] for epoch in range(40)]
    assert order.steps_per_epoch == 30 and min(visited) < 30 < max(visited)
    extra = turns >= EXTRA_TURN
    assert rows.shape == (40, 180) and (extra.sum(1) == np.maximum(np.array(visited) - 30, 0)).all()
    for batch in groups[rows.reshape(-1, 6)]:
        assert len(set(batch)) == 6


def test_the_bound_on_steps_holds_for_random_mixtures():
    rng = np.random.default_rng(5)
    tried = 0
    while tried < 60:
        sizes = rng.integers(5, 60, int(rng.integers(1, 4)))
        groups = rng.integers(0, int(rng.integers(4, 40)), sizes.sum()) ** 2 % 37
        options = {"groups": groups, "sizes": sizes, "weights": rng.uniform(0.1, 1, len(sizes))}
        try:
            order = PairOrder(int(sizes.sum()), int(rng.integers(2, 8)), seed=tried, **options)
        except ValueError as error:
            assert "cannot be filled" in str(error)
            continue
        for batch in groups[visits_of(order, 6)[0].reshape(-1, order.batch_size)]:
            assert len(set(batch)) == order.batch_size
        tried += 1


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_and_starts_share_the_order_of_a_mixture(grouped):
    groups = np.random.default_rng(1).integers(0, 60, 300) if grouped else None
    options = {"n_rows": 300, "batch_size": 12, "seed": 7, "total_steps": 70}
    options |= {"sizes": (200, 100), "weights": (0.3, 0.7), "groups": groups}
    whole = list(PairBatchSampler(**options))
    for world_size in (2, 3):
        parts = [list(PairBatchSampler(**options, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [sum(step, []) for step in zip(*parts, strict=True)] == whole
    for start in (1, 24, 25, 26, 69):
        assert list(PairBatchSampler(**options, start_step=start)) == whole[start:]


@pytest.mark.parametrize(
    "weights, message",
    [
        ((1,), "one positive number for each of 2 sources, got"),
        ((1, 0), "one positive number"),
        ((1, -1), "one positive number"),
        ((1, float("nan")), "one positive number"),
        ((1, 1e-9), "give a source none of the 96 places of an epoch"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        PairOrder(100, 8, sizes=(50, 50), weights=weights)
    with pytest.raises(ValueError, match="weights need the sizes of the sources, 100 rows in sum"):
        PairOrder(100, 8, sizes=(50, 40), weights=(1, 1))


def test_shares_round_to_the_whole():
    assert shares_of(10, [1, 1, 1], 3) == (4, 3, 3) and shares_of(96, [0.3, 0.7], 2) == (29, 67)
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.uniform(0.05, 1, int(rng.integers(1, 9)))
        shares = shares_of(1000, weights, len(weights))
        assert sum(shares) == 1000 and np.abs(np.array(shares) - weights / weights.sum() * 1000).max() < 1


def test_visits_follow_passes():
    rows, passes = zip(*(epoch_visits((7,), (3,), seed=0, epoch=epoch) for epoch in range(7)), strict=True)
    walked, passes = np.concatenate(rows), np.concatenate(passes)
    for number in range(3):
        assert sorted(walked[number * 7 : number * 7 + 7]) == list(range(7))
        assert (passes[number * 7 : number * 7 + 7] == number).all()


def test_many_rows_in_little_time():
    """An epoch of 5 million visits is arithmetic on arrays."""
    order = PairOrder(5_000_000, 4096, sizes=(4_000_000, 1_000_000), weights=(1, 1))
    keys = order.keys(1219 + 7, 4880)
    assert len(keys) == 4096 and keys[0].epoch == 1 and abs(sum(key.row < 4_000_000 for key in keys) - 2048) < 200


def test_the_rows_of_a_mixture(emoji_folder):
    first = open_rows(emoji_folder / "test_style.parquet", id_column="hexcode")
    second = open_rows(emoji_folder / "test_concept.parquet", id_column="hexcode")
    both = PairMixture([first, second])
    assert len(both) == 1259 + 663 and both.sizes == (1259, 663) and both.has_ids
    assert both.take([1259, 0, 1921, 5]) == [second[0], first[0], second[662], first[5]]
    assert both.ids().tolist() == [*first.ids(), *second.ids()]
    assert list(both.captions()) == [*first.captions(), *second.captions()]
    assert both.where(1260) == (second.name, 1) and both.where(1258) == (first.name, 1258)
    assert both[-1] == second[662]
    with pytest.raises(IndexError, match="row 1922 of .*test_style.parquet \\+ .*test_concept.parquet"):
        both[1922]
    for sources in ([first, first], [second, first, second]):
        assert len(PairMixture(sources)) == sum(map(len, sources))


def test_without_ids_rows_of_two_sources_are_never_one_concept():
    mixture = PairMixture([open_rows(source("a", 3)), open_rows(source("b", 3))])
    assert mixture.ids().tolist() == list(range(6)) == [row["id"] for row in mixture.take(range(6))]


def test_ids_that_could_never_meet_are_refused():
    options = {"id_column": "k"}
    numbers = open_rows(source("a", 2, [1, 2]), **options)
    text = open_rows(source("b", 2, ["1", "2"]), **options)
    with pytest.raises(PairDataError, match="can never be equal, since they differ in kind"):
        PairMixture([numbers, text])
    with pytest.raises(PairDataError, match="differ in kind: .*'none'"):
        PairMixture([numbers, open_rows(source("c", 2))])
    with pytest.raises(PairDataError, match="at least one source"):
        PairMixture([])


def test_bad_rows_keep_their_numbers_in_a_mixture():
    bad = datasets.Dataset.from_dict({"image": [png(), None, png()], "text": ["x", "y", ""], "k": ["a", "b", None]})
    kept = open_rows(bad, id_column="k", bad_rows="skip")
    assert dict(kept.bad) == {
        1: "the picture is null",
        2: "the caption is empty; the id must be an int or a string, got null",
    }
    assert list(kept.captions()) == ["x"] and len(set(kept.ids().tolist())) == 3
    mixture = PairMixture([open_rows(source("a", 4, list("abcd")), id_column="k"), kept])
    assert mixture.reason(5) == "the picture is null" and mixture.reason(4) is None and len(mixture) == 7
    assert mixture.where(5) == ("the given Dataset", 1) and list(mixture.captions()) == ["a0", "a1", "a2", "a3", "x"]
    with pytest.raises(PairDataError, match="2 of 3 rows"):
        open_rows(bad, id_column="k")
    with pytest.raises(ValueError, match='bad_rows must be "raise" or "skip"'):
        open_rows(bad, bad_rows="ignore")


def test_entries_of_one_kind_stay_one_source_unless_weighed(emoji_folder, tmp_path):
    files = [str(emoji_folder / "test_style.parquet"), str(emoji_folder / "test_concept.parquet")]
    as_one, apart = open_mixture(files), open_mixture(files, weights=[1, 1])
    assert not isinstance(as_one, PairMixture) and isinstance(apart, PairMixture)
    assert as_one.take([0, 1300]) == apart.take([0, 1300])  # the same rows under the same numbers, and ids
    (tmp_path / "0.png").write_bytes(png())
    table = tmp_path / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": "0.png", "captions": ["zero"]}))
    mixed = open_mixture([files[0], str(tmp_path)])
    assert isinstance(mixed, PairMixture) and mixed[1259]["captions"] == ["zero"]
    with pytest.raises(ValueError, match="one positive number for each of 2 sources"):
        open_mixture(files, weights=[1])


def test_data_workers_deliver_a_mixture_in_order(emoji_folder):
    files = [str(emoji_folder / name) for name in ("test_style.parquet", "test_concept.parquet")]
    rows = open_training_rows(DataArguments(train_data=files, data_weights=[1, 3], id_column="hexcode"))
    options = {"n_rows": len(rows), "batch_size": 40, "total_steps": 50, "sizes": rows.sizes, "weights": (1, 3)}
    sampler = PairBatchSampler(**options, groups=rows.ids(), start_step=44)  # over the edge of an epoch
    plain = list(DataLoader(PairTrainingSet(rows), batch_sampler=sampler, collate_fn=list))
    spread = list(DataLoader(PairTrainingSet(rows), batch_sampler=sampler, collate_fn=list, num_workers=2))
    assert plain == spread and len(plain) == 6 and {key.epoch for batch in plain for key, _ in batch} == {0, 1}
    for batch in plain:
        assert [row for _, row in batch] == rows.take([key.row for key, _ in batch])


def test_weights_are_arguments():
    given = ["--family", "oner", "--train_data", "a.parquet", "b.parquet", "--data_weights", "1", "2.5"]
    assert parse_arguments(given).data.data_weights == [1.0, 2.5]
    assert parse_arguments(given[:5]).data.data_weights is None
    with pytest.raises(ValueError, match="expected one for each of the 2 in train_data"):
        parse_arguments(given[:-1])


def test_draws_of_a_key():
    one, again = RowKey(5, 2, 0.0), RowKey(5, 2, 0.5, turn=2, position=9)
    assert one.generator(7).integers(1 << 40) == again.generator(7).integers(1 << 40)
    assert one.generator(7).integers(1 << 40) == np.random.default_rng([7, 2, 5]).integers(1 << 40)
    others = [again._replace(turn=3).generator(7), again.generator(8), again.generator(7, 1)]
    assert len({one.generator(7).integers(1 << 40), *(g.integers(1 << 40) for g in others)}) == 4


def stream(name, n, **options):
    with pytest.warns(UserWarning, match="is read as a sequential stream"):
        return open_rows(source(name, n).to_iterable_dataset(), **options)


def words(mixture):
    return [row["captions"][0] for row in mixture]


def test_streams_are_read_one_after_the_other_or_woven_by_weight():
    streams = [stream("a", 3), stream("b", 12)]
    assert words(PairStreamMixture(streams)) == [f"a{i}" for i in range(3)] + [f"b{i}" for i in range(12)]
    woven = list(PairStreamMixture(streams, [1, 2]))
    of_b = np.array([row["captions"][0].startswith("b") for row in woven])
    assert np.abs(np.cumsum(of_b) - np.arange(1, len(woven) + 1) * 2 / 3).max() < 1
    assert [row["captions"][0] for row in woven if row["captions"][0][0] == "b"] == [f"b{i}" for i in range(12)]
    assert words(PairStreamMixture(streams, [1, 2])).count("a0") == 2  # the shorter one is read again
    assert len({row["id"] for row in woven}) == 12  # rows of one picture are one concept, in any stream
    with pytest.raises(PairDataError, match="is read by row numbers and cannot be woven"):
        PairStreamMixture([streams[0], open_rows(source("c", 2))])
    with pytest.raises(PairDataError, match="no rows"):
        list(PairStreamMixture([streams[0], stream_of_nothing()], [1, 1]))


def stream_of_nothing():
    nothing = stream("d", 1)
    nothing.data = nothing.data.take(0)
    return nothing


def test_a_woven_stream_trains_as_a_stream_and_names_bad_rows(emoji_folder):
    files = [str(emoji_folder / name) for name in ("test_style.parquet", "test_concept.parquet")]
    with pytest.warns(UserWarning, match="sequential stream"):
        woven = open_mixture(files, id_column="hexcode", streaming=True, weights=[1, 3])
    assert "test_style.parquet + " in woven.resume_note and "not exact" in woven.resume_note
    options = {"batch_size": 20, "total_steps": 6, "seed": 1, "buffer_size": 50}
    whole = list(PairTrainingStream(woven, **options))
    spread = list(DataLoader(PairTrainingStream(woven, **options), batch_size=None, num_workers=2, collate_fn=list))
    assert spread == whole and list(PairTrainingStream(woven, **options, start_step=4)) == whole[4:]
    bad = datasets.Dataset.from_dict({"image": [png(), png()], "text": ["x", ""]}).to_iterable_dataset()
    with pytest.warns(UserWarning):
        mixture = PairStreamMixture([open_rows(bad, bad_rows="skip"), stream("a", 1, bad_rows="skip")])
    assert [reason for _, _, reason in mixture.checked()] == [
        None,
        "the given IterableDataset, row 1: the caption is empty",
        None,
    ]


def test_copies_of_a_row_in_one_epoch_are_corrupted_apart(emoji_folder):
    """A source of 20 rows fills half of the places of an epoch of 100: each of its rows comes two or three times."""
    table = open_rows(emoji_folder / "test_style.parquet", id_column="hexcode")
    small, large = table.data.select(range(20)), table.data.select(range(20, 100))
    rows = PairMixture([open_rows(part, id_column="hexcode") for part in (small, large)])
    tokenizer = train_tokenizer(rows.captions(), vocab_size=300)
    collator = collator_of(tokenizer)
    order = PairOrder(100, 10, seed=3, sizes=rows.sizes, weights=(1, 1))
    keys = [key for step in range(order.steps_per_epoch) for key in order.keys(step, 10)]
    most = max((key.row for key in keys), key=[key.row for key in keys].count)
    copies = [key for key in keys if key.row == most]
    assert len(copies) >= 2 and most < 20
    first, second = (collator([(key, rows[most])]) for key in copies[:2])
    again = collator([(copies[0]._replace(position=7), rows[most])])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["pixel_values"], again["pixel_values"])  # where the row stands decides nothing
