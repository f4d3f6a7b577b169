"""A lock that allows only one run at a time in an output directory."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from transformers.utils import logging

from oner.training.parallel.distributed import any_process, rank

from .checkpoint import CheckpointError

logger = logging.get_logger(__name__)

LOCK = "run.lock"


class DirectoryInUseError(CheckpointError):
    """Another run is using the output directory; the message names its host, process and start time."""


@contextlib.contextmanager
def alone_in(output_dir: str | Path, device: torch.device) -> Iterator[None]:
    """
    Holds a lock on `run.lock` in the directory, which is created if needed. The system releases the lock however the
    process ends. Collective: the first process holds it for the whole run.

    Raises:
        DirectoryInUseError: another run holds it, on this machine or, if the file system has locks, on another.
        OSError: the directory cannot be created or written.
    """
    descriptor = None
    error = None
    if rank() == 0:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            descriptor = _take(Path(output_dir) / LOCK)
        except (DirectoryInUseError, OSError) as caught:
            error = caught
    if any_process(error is not None, device):
        raise error or DirectoryInUseError(f"{output_dir}: the first process could not take it")
    try:
        yield
    finally:
        if descriptor is not None:
            # if the directory cannot be written, the run has already raised, and the file stays
            with contextlib.suppress(OSError):
                (Path(output_dir) / LOCK).unlink()
            os.close(descriptor)


def _take(path: Path) -> int:
    """Opens and locks the file; returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # a process lock: data workers do not inherit it, so it ends with the run, not with the last worker
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 1000).decode("utf-8", "replace")
            os.close(descriptor)
            raise DirectoryInUseError(_told(path.parent, holder)) from None
        except OSError as error:
            logger.warning(f"{path}: this file system has no locks, so a second run here cannot be detected: {error}")
            break
        # a run that ended in the meantime may have removed the file, and with it the lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)

    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode())
    return descriptor


def _told(directory: Path, holder: str) -> str:
    try:
        told = json.loads(holder)
        who = f"process {told['pid']} on {told['host']}, since {told['started']}"
    except (ValueError, TypeError, KeyError):
        who = "an unknown process"
    return f"{directory} is in use by another run, {who}: wait for its end, stop it, or choose another output_dir"
