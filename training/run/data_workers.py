"""Data workers: their handling of signals to the process group, and waiting for batches that do not arrive."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

# signals with which a scheduler or a terminal stops a run, possibly sent to all its processes
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# seconds between checks whether the run was told to stop
LOOK = 1


class Waiting(NamedTuple):
    """Yielded by a loader while no batch arrives: the data source, and the worker processes."""

    source: str
    workers: tuple[int, ...]


def outlive_signals_to_the_group(worker: int) -> None:
    """
    A `worker_init_fn`. Ctrl-C and a scheduler's signals reach every process of a run; a worker that obeyed them would
    end before the run could finish its step and save. Only the main process may end a worker.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_sigterm, args=(os.getppid(),), daemon=True).start()


def _end_at_sigterm(parent: int) -> None:
    # the main process sends SIGTERM when it no longer needs its workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def patiently(loader: DataLoader, source: str) -> Iterator[Any]:
    """
    Yields the batches of a loader with workers, and a `Waiting` each second without a batch, so that the caller can
    stop waiting.
    """
    before = multiprocessing.active_children()
    with _sigterm_held():
        batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]

    # in a thread: a loader's own timeout does not cover the transfer of memory, where a stopped worker hangs too
    reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
    coming = None
    try:
        while True:
            coming = reader.submit(next, batches, None)
            while not wait([coming], timeout=LOOK).done:
                yield Waiting(source, tuple(worker.pid for worker in workers))
            batch = coming.result()
            if batch is None:
                return
            yield batch
    finally:
        if coming is not None and not coming.done():
            _kill(workers)
        reader.shutdown()


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Blocks SIGTERM, so that workers forked inside start with it blocked, and so do threads that libraries start."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: list[Any]) -> None:
    """Kills workers that hang: they ignore other signals, and this process would wait for them at its end."""
    # torch would report the death of a worker as an error
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(10)
    signal.signal(signal.SIGCHLD, previous)
