"""A run whose data do not come, as from a file server that hangs, and the signals by which runs are stopped."""

import logging
import os
import signal
import threading
import time

import psutil
import pytest
from tiny_pretraining import EVERY_STEP, assert_same_checkpoint, read_log, tiny_arguments

from oner.training.run import engine as engine_module
from oner.training.run.checkpoint import list_checkpoints
from oner.training.run.data_workers import STOPPING
from oner.training.run.engine import DataStalledError, Engine

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
OPTIONS = {**EVERY_STEP, "save_every_epochs": 9, "num_workers": 2, "epochs": 8}


@pytest.fixture
def stalled(monkeypatch):
    """Both data workers stop for good after the second step; what is appended is called in another thread later."""
    train_step, later, workers = Engine._train_step, [], []

    def stop_workers(self, batch):
        if self.step + 1 == 2:
            workers.extend(psutil.Process().children())
            for worker in workers:
                worker.suspend()
            for one in later:
                threading.Timer(1.5, one).start()
        return train_step(self, batch)

    monkeypatch.setattr(Engine, "_train_step", stop_workers)
    yield later
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGHUP, signal.SIGUSR1))],
    ids=lambda one: one.name,
)
def test_a_signal_stops_a_run_that_waits_for_its_data(example, pairs, undisturbed, tmp_path, stalled, number):
    stalled.append(lambda: os.kill(os.getpid(), number))
    assert example.main(tiny_arguments(pairs, tmp_path, **OPTIONS)) is None
    steps = len(read_log(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{steps:08d}"] and 2 <= steps < 40


def test_a_run_that_waits_says_for_what_and_saves_at_the_end_of_its_patience(
    example, pairs, undisturbed, tmp_path, stalled, monkeypatch, caplog
):
    monkeypatch.setattr(engine_module, "REMIND", 1)
    with caplog.at_level(logging.WARNING), pytest.raises(DataStalledError) as error:
        example.main(tiny_arguments(pairs, tmp_path, data_timeout=2.5, **OPTIONS))
    steps = len(read_log(tmp_path))
    told = f"step {steps + 1} has been waiting for a batch of {pairs} for "
    assert told in caplog.text and told in str(error.value) and f"saved at step {steps}" in str(error.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{steps:08d}"]
    del error


@pytest.mark.parametrize("number", STOPPING, ids=lambda one: one.name)
def test_every_signal_of_a_scheduler_saves_and_stops(example, pairs, undisturbed, tmp_path, monkeypatch, number):
    train_step = Engine._train_step

    def signalled(self, batch):
        if self.step + 1 == 3:
            os.kill(os.getpid(), number)
        return train_step(self, batch)

    monkeypatch.setattr(Engine, "_train_step", signalled)
    # whoever started the tests may ignore one, as nohup does
    outside = signal.signal(number, signal.SIG_DFL)
    try:
        assert example.main(tiny_arguments(pairs, tmp_path, **{**EVERY_STEP, "save_every_epochs": 9})) is None
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000003"]
    assert_same_checkpoint(undisturbed / "checkpoint-00000003", tmp_path / "checkpoint-00000003")


def test_what_nohup_ignores_stays_ignored(example, pairs, tmp_path, monkeypatch):
    train_step = Engine._train_step

    def hung_up(self, batch):
        os.kill(os.getpid(), signal.SIGHUP)
        return train_step(self, batch)

    monkeypatch.setattr(Engine, "_train_step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert example.main(tiny_arguments(pairs, tmp_path, max_steps=2, **EVERY_STEP)) == {}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_slow_worker_changes_nothing(example, pairs, undisturbed, tmp_path, monkeypatch):
    train_step = Engine._train_step

    def suspended(self, batch):
        if self.step + 1 == 4:
            workers = psutil.Process().children()
            for worker in workers:
                worker.suspend()
                threading.Timer(1.3, worker.resume).start()
        return train_step(self, batch)

    monkeypatch.setattr(Engine, "_train_step", suspended)
    start = time.monotonic()
    example.main(tiny_arguments(pairs, tmp_path, **{**EVERY_STEP, "num_workers": 2}))
    assert time.monotonic() - start > 1
    assert_same_checkpoint(list_checkpoints(undisturbed)[-1], list_checkpoints(tmp_path)[-1])
