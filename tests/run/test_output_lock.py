"""One run at a time in a directory, however the one before ended."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from tiny_pretraining import EVERY_STEP, tiny_arguments

from oner.training.run import output_lock
from oner.training.run.output_lock import DirectoryInUseError, alone_in

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
CPU = torch.device("cpu")


class Holder:
    """Another process that holds a directory, and a data worker of it that outlives it."""

    def __init__(self, directory: Path):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with alone_in(directory, CPU):
                worker = os.fork()
                if worker:
                    os.write(writer, b"%d" % worker)
                signal.pause()
            os._exit(0)
        self.worker = int(os.read(reader, 20))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def holder(tmp_path):
    held = Holder(tmp_path)
    yield held
    os.kill(held.worker, signal.SIGKILL)


def test_a_second_run_is_refused_by_name_and_touches_nothing(example, pairs, tmp_path, holder):
    who = rf"is in use by another run, process {holder.pid} on {socket.gethostname()}, since 20"
    for more in ([], ["--resume"]):
        with pytest.raises(DirectoryInUseError, match=f"{re.escape(str(tmp_path))} {who}"):
            example.main([*tiny_arguments(pairs, tmp_path, **EVERY_STEP), *more])
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    holder.kill()


def test_a_dead_run_holds_nothing_even_while_its_worker_lives(example, pairs, tmp_path, holder):
    holder.kill()
    assert (tmp_path / "run.lock").is_file()
    example.main([*tiny_arguments(pairs, tmp_path, max_steps=1, **EVERY_STEP)])
    assert not (tmp_path / "run.lock").exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(tmp_path, monkeypatch):
    lockf = output_lock.fcntl.lockf
    calls = []

    def removed(descriptor, how):
        if not calls:
            (tmp_path / "run.lock").unlink()
        calls.append(how)
        return lockf(descriptor, how)

    monkeypatch.setattr(output_lock.fcntl, "lockf", removed)
    with alone_in(tmp_path, CPU):
        assert len(calls) == 2 and (tmp_path / "run.lock").is_file()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_lock.fcntl, "lockf", refuse)
    with alone_in(tmp_path, CPU):
        assert "this file system has no locks" in caplog.text


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), alone_in(tmp_path / "file" / "run", CPU):
        time.sleep(0)


def test_a_directory_that_became_read_only_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise OSError(30, "Read-only file system", str(self))

    with pytest.raises(KeyError, match="what ended it"):
        with alone_in(tmp_path, torch.device("cpu")):
            monkeypatch.setattr(Path, "unlink", refuse)
            raise KeyError("what ended it")
    # the file that stays locks nobody out
    monkeypatch.undo()
    with alone_in(tmp_path, torch.device("cpu")):
        assert (tmp_path / "run.lock").is_file()
