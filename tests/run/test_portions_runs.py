"""Runs of a family of two portions: resumed to the bit, epochs of one portion, bad rows of each, what is published.

24 cells of resuming: ratio of batch sizes x chunks x data workers x place. A stop is a SIGTERM, which saves, or a
crash between the backwards of the two portions of a step, after which the last checkpoint counts.
"""

import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_resume_matrix import pretrain
from tiny_pretraining import assert_same_checkpoint, forget_accelerator, read_log
from toy_family.runs import command, write_sources
from transformers import AutoModel

from oner.processing.data.quarantine import read_quarantine
from oner.training.run.checkpoint import list_checkpoints, step_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
# batch sizes of texts and pairs, chunks of each, data workers
RATIOS, CHUNKS, WORKERS = ((6, 6), (4, 12)), ((1, 1), (2, 3)), (0, 2)
PLACES = {"step 1": (1,), "between portions": (5,), "epoch edge": (6, 8)}
CELLS = list(itertools.product(RATIOS, CHUNKS, WORKERS, PLACES))
QUICK = CELLS[::5]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="module")
def undisturbed(example, sources, tmp_path_factory):
    """(sizes, chunks) -> directory and batches of a run that never stopped; run once each."""
    done = {}

    def run(sizes, chunks):
        if (sizes, chunks) not in done:
            directory, batches = tmp_path_factory.mktemp("undisturbed"), {}
            pretrain(example, command(sources, directory, sizes, chunks), batches)
            done[sizes, chunks] = directory, batches
        return done[sizes, chunks]

    return run


def name_of(cell) -> str:
    sizes, chunks, workers, place = cell
    return f"{sizes[0]} to {sizes[1]}-{chunks[0]} and {chunks[1]} chunks-{workers} workers-{place}"


@pytest.mark.parametrize(
    ("sizes", "chunks", "workers", "place"),
    [pytest.param(*cell, id=name_of(cell), marks=[] if cell in QUICK else [pytest.mark.slow]) for cell in CELLS],
)
def test_stopped_and_resumed_is_never_stopped(example, sources, undisturbed, tmp_path, sizes, chunks, workers, place):
    whole, expected = undisturbed(sizes, chunks)
    arguments, batches = command(sources, tmp_path, sizes, chunks, workers), {}
    for stop in PLACES[place]:
        # before the first backward of the second portion
        inside = place == "between portions"
        pretrain(example, [*arguments, "--resume"], batches, stop, piece=chunks[0] + 1 if inside else None)
        assert step_of(list_checkpoints(tmp_path)[-1]) == stop - inside
    pretrain(example, [*arguments, "--resume"], batches)
    assert_same_checkpoint(list_checkpoints(whole)[-1], list_checkpoints(tmp_path)[-1])
    assert read_log(whole) == read_log(tmp_path)
    assert batches == expected and {len(seen) for seen in batches.values()} == {1}
    for name in ("model.safetensors", "tokenizer.json"):
        assert (whole / "model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_the_cells_are_whole_and_their_runs_differ(undisturbed):
    assert len(CELLS) == 24 and {cell[3] for cell in QUICK} == set(PLACES)
    assert {cell[0] for cell in QUICK} == set(RATIOS) and {cell[1] for cell in QUICK} == set(CHUNKS)
    lines = {sizes: read_log(undisturbed(sizes, (1, 1))[0]) for sizes in RATIOS}
    for sizes, written in lines.items():
        assert [line["epoch"] for line in written] == [round(step / (24 // sizes[0]), 4) for step in range(1, 10)]
        assert {"mlm", "text contrast", "pair contrast"} <= written[0].keys()
        assert len({line["loss"] for line in written}) == 9
        speeds = {"texts_per_second", "pairs_per_second"}
        assert speeds <= json.loads((undisturbed(sizes, (1, 1))[0] / "log.jsonl").read_text().splitlines()[0]).keys()


def test_every_parameter_of_every_portion_learns(undisturbed):
    first, last = (
        load_file(path / "model.safetensors") for path in list_checkpoints(undisturbed((6, 6), (1, 1))[0])[::2]
    )
    assert {"lm_head.weight", "toy.stem.weight", "logit_scale"} <= first.keys()
    assert not [name for name, value in first.items() if torch.equal(value, last[name])]


def test_an_epoch_is_of_one_portion_as_often_as_it_repeats(example, sources, tmp_path):
    """Twenty-four texts five times, by eight: fifteen steps an epoch, each text five times."""
    seen = {}
    options = {"epochs": 1, "max_steps": None, "save_every_epochs": 1}
    pretrain(example, command(sources, tmp_path, (8, 6), texts={"repeat": 5}, **options), seen)
    assert len(seen) == 15 and read_log(tmp_path)[-1]["epoch"] == 1


def test_the_rate_is_that_of_the_epochs_batch(example, sources, tmp_path):
    pretrain(example, command(sources, tmp_path, (8, 12), max_steps=1), {})
    assert read_log(tmp_path)[0]["learning_rate"] == pytest.approx(0.3 * 8 / 256)


def test_bad_rows_of_each_portion_are_replaced_and_listed(example, sources, tmp_path):
    notes = tmp_path / "notes.txt"
    good = Path(sources["texts"]).read_bytes().splitlines()
    notes.write_bytes(b"\n".join([*good[:5], "café".encode("latin-1"), *good[5:]]) + b"\n")
    table = pq.read_table(sources["pairs"])
    captions = table["captions"].to_pylist()
    captions[7] = []
    place = table.column_names.index("captions")
    pq.write_table(table.set_column(place, table.field("captions"), [captions]), tmp_path / "pairs.parquet")
    spoilt = {"texts": str(notes), "pairs": str(tmp_path / "pairs.parquet")}
    with pytest.warns(UserWarning, match="1 of (24|25|40) rows cannot be used"):
        pretrain(example, command(spoilt, tmp_path / "run", max_bad_rows=0.2), {})
    lines = read_quarantine(tmp_path / "run" / "quarantine.jsonl")
    assert {(line["portion"], line["row"]) for line in lines} == {("texts", 5), ("pairs", 7)}


def test_what_is_published_loads(undisturbed):
    model = AutoModel.from_pretrained(undisturbed((6, 6), (1, 1))[0] / "model")
    assert model.config.model_type == "toy"
    assert model(torch.tensor([[101, 5, 6]]), torch.ones(1, 3)).pooler_output.shape == (1, 16)
