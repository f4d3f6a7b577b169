"""Stopped anywhere, any number of times, a run ends as the one that never stopped: to the bit.

120 cells: data workers x pieces of a batch x source x place x number of stops. Each compares parameters, moments,
teacher, queue, generators and counters at the end, the lines of the log, and every batch that was read (order, crops
and masks). A stop is a SIGTERM, which saves, or a crash within the step, after which the last checkpoint counts.
"""

import hashlib
import itertools
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from tiny_pretraining import (
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
    write_pairs,
    write_shard,
)

from oner.training.objectives import oner as objective_oner
from oner.training.run.checkpoint import list_checkpoints, load_checkpoint, step_of
from oner.training.run.engine import Engine

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
WORKERS, CHUNKS, SOURCES, STOPS = (0, 2), (1, 4), ("table", "shards", "mixture"), (1, 3)
# of ten steps in two epochs of five: the stops, the one that names the place first
PLACES = {
    "step 1": (1, 2, 7),
    "mid-epoch": (3, 4, 8),
    "mid-window": (4, 6, 9),
    "epoch edge": (5, 6, 7),
    "last step": (9, 3, 6),
}
CELLS = list(itertools.product(WORKERS, CHUNKS, SOURCES, PLACES, STOPS))
# every pair of a source and a place, and of a place and a number of pieces; workers and stops in turn
QUICK = [
    cell
    for cell in CELLS
    if (SOURCES.index(cell[2]) + list(PLACES).index(cell[3])) % 2 == CHUNKS.index(cell[1])
    and WORKERS.index(cell[0]) == STOPS.index(cell[4]) == list(PLACES).index(cell[3]) % 2
]


class QueuedOneR(objective_oner.OneRObjective):
    """OneR with a queue of past keys, as a family has that contrasts with more than its batch."""

    def __init__(self, student, arguments):
        super().__init__(student, arguments)
        self.weights["queue"] = 0.1
        generator = torch.Generator().manual_seed(0)
        self.queue = torch.randn(24, student.config.projection_dim, generator=generator)
        self.place = torch.zeros((), dtype=torch.int64)

    def compare(self, rows, common, targets, progress):
        compared = super().compare(rows, common, targets, progress)
        compared.parts["queue"] = (rows["image"].float() @ self.queue.T).logsumexp(1).mean()
        compared.kept["latest"] = targets["key of text"].clone()
        return compared

    def after_step(self, applied=None, kept=None):
        super().after_step(applied, kept)
        latest = kept["latest"]
        places = (torch.arange(len(latest)) + self.place) % len(self.queue)
        self.queue[places] = latest
        self.place = (self.place + len(latest)) % len(self.queue)

    def state_dict(self):
        return {**super().state_dict(), "queue": self.queue, "place": self.place}

    def load_state_dict(self, state):
        state = dict(state)
        self.queue, self.place = state.pop("queue").clone(), state.pop("place").clone()
        super().load_state_dict(state)


@pytest.fixture(autouse=True)
def queued(monkeypatch):
    monkeypatch.setattr(objective_oner, "OneRObjective", QueuedOneR)
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    """The same forty pairs as a table, as two shards, and as a table and a shard of which one counts double."""
    folder = tmp_path_factory.mktemp("sources")
    table = write_pairs(folder / "pairs.parquet")
    content = pq.read_table(table)
    rows = [{**row, "key": f"{number:04d}"} for number, row in enumerate(content.to_pylist())]
    shards = [write_shard(folder / f"{n}.tar", rows[20 * n : 20 * n + 20]) for n in (0, 1)]
    pq.write_table(content.slice(0, 20), folder / "half.parquet")
    return {
        "table": {"train_data": [table]},
        "shards": {"train_data": shards},
        "mixture": {"train_data": [folder / "half.parquet", shards[1]], "data_weights": [1, 2]},
    }


def command(sources: dict[str, dict], source: str, workers: int, chunks: int, output_dir: Path) -> list[str]:
    options = {
        **sources[source],
        "num_workers": workers,
        # beside data workers, checkpoints are written beside the steps
        "async_checkpoints": workers > 0,
        "gradient_cache_chunks": chunks,
        "save_every_epochs": 0.2,
        "keep_checkpoints": 2,
        "max_steps": 10,
        # beside pieces, patches are left out of the streams of contrast
        **({"image_keep": 0.5, "image_keep_until": 0.7, "contrast_masked": False} if chunks > 1 else {}),
        # dropout, so that the generators count; no batch norm, which sees pieces
        "model_config": {"attention_dropout": 0.1, "head_norm": "layer", "stem": "linear"},
    }
    return tiny_arguments(None, output_dir, **options)


class Crash(BaseException):
    """Nothing catches it, so nothing is saved: as SIGKILL, but in this process."""


def digest(batches: dict[str, dict[str, torch.Tensor]]) -> str:
    named = {f"{portion}.{name}": value for portion, batch in batches.items() for name, value in batch.items()}
    content = b"".join(name.encode() + named[name].contiguous().numpy().tobytes() for name in sorted(named))
    return hashlib.sha256(content).hexdigest()


def pretrain(
    example, arguments: list[str], batches: dict[int, set[str]], stop: int | None = None, piece: int | None = None
) -> None:
    """
    Runs to the end, or until step `stop`: by SIGTERM, or by a crash before the gradient of its piece number `piece`.
    Digests of all batches are gathered by step.
    """
    train_step, backward, pieces = Engine._train_step, Accelerator.backward, []

    def watched_step(self, batch):
        batches.setdefault(self.step + 1, set()).add(digest(batch))
        if self.step + 1 == stop and piece is None:
            os.kill(os.getpid(), signal.SIGTERM)
        pieces.append(0)
        return train_step(self, batch)

    def watched_backward(self, loss, **named):
        pieces[-1] += 1
        if len(pieces) + first == stop and pieces[-1] == piece:
            raise Crash
        return backward(self, loss, **named)

    output_dir = Path(arguments[arguments.index("--output_dir") + 1])
    found = list_checkpoints(output_dir)
    first = step_of(found[-1]) if found else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_train_step", watched_step)
        patch.setattr(Accelerator, "backward", watched_backward)
        forget_accelerator()
        if piece is None:
            example.main(arguments)
        else:
            with pytest.raises(Crash):
                example.main(arguments)


@pytest.fixture(scope="module")
def undisturbed(example, sources, tmp_path_factory):
    """(source, pieces) -> directory and batches of a run that never stopped and has no data workers; run once each."""
    done: dict[tuple[str, int], tuple[Path, dict[int, set[str]]]] = {}

    def run(source: str, chunks: int) -> tuple[Path, dict[int, set[str]]]:
        if (source, chunks) not in done:
            directory, batches = tmp_path_factory.mktemp("undisturbed"), {}
            pretrain(example, command(sources, source, 0, chunks, directory), batches)
            done[source, chunks] = directory, batches
        return done[source, chunks]

    return run


def name_of(cell: tuple) -> str:
    workers, chunks, source, place, stops = cell
    return f"{workers} workers-{chunks} pieces-{source}-{place}-{stops} stops"


@pytest.mark.parametrize(
    ("workers", "chunks", "source", "place", "stops"),
    [pytest.param(*cell, id=name_of(cell), marks=[] if cell in QUICK else [pytest.mark.slow]) for cell in CELLS],
)
def test_stopped_and_resumed_is_never_stopped(
    example, sources, undisturbed, tmp_path, workers, chunks, source, place, stops
):
    whole, expected = undisturbed(source, chunks)
    arguments, batches = command(sources, source, workers, chunks, tmp_path), {}
    for stop in sorted(PLACES[place][:stops]):
        inside = place == "mid-window"
        pretrain(example, [*arguments, "--resume"], batches, stop, piece=chunks // 2 + 1 if inside else None)
        assert step_of(list_checkpoints(tmp_path)[-1]) == stop - inside
    pretrain(example, [*arguments, "--resume"], batches)
    assert_same_checkpoint(list_checkpoints(whole)[-1], list_checkpoints(tmp_path)[-1])
    assert read_log(whole) == read_log(tmp_path)
    # a step that was taken twice had the same batch twice
    assert batches == expected and {len(seen) for seen in batches.values()} == {1}
    assert (whole / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_the_matrix_is_whole_and_its_runs_differ(undisturbed):
    assert len(CELLS) == len(set(CELLS)) == 120 and len(QUICK) == 15
    for one, other in ((2, 3), (3, 1)):
        assert {(cell[one], cell[other]) for cell in QUICK} == {(cell[one], cell[other]) for cell in CELLS}
    ends = {source: undisturbed(source, 1) for source in SOURCES}
    for directory, batches in ends.values():
        assert sorted(batches) == list(range(1, 11)) and len(set.union(*batches.values())) == 10
        lines = read_log(directory)
        assert [line["epoch"] for line in lines if line["step"] in (5, 10)] == [1.0, 2.0]
        assert len({line["queue"] for line in lines}) == 10
    assert not set.union(*ends["table"][1].values()) & set.union(*ends["mixture"][1].values())
    first, last = (load_checkpoint(path)[0] for path in list_checkpoints(ends["table"][0]))
    for stem, name in (("objective", "queue"), ("objective", "teacher.oner.norm.weight"), ("random", "cpu")):
        assert not torch.equal(first[stem][name], last[stem][name])
