"""A lock that saves work and nothing else: what it guards is written beside its place and renamed."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 600  # seconds to wait for a process that may hang; then the work is done twice


@contextmanager
def waiting_lock(place: Path) -> Iterator[None]:
    """
    Of the processes of this user on this machine that make the file `place`, one is inside at a time.

    The lock lies in a folder that no other user can reach into, and not beside `place`, where locks would stay behind
    and some file systems have none. Where there is no such folder, nobody waits.
    """
    folder = private_folder()
    lock = folder and folder / f"{blake2b(os.fsencode(os.path.abspath(place)), digest_size=16).hexdigest()}.lock"
    with ExitStack() as stack:
        if lock is not None:
            try:
                stack.enter_context(FileLock(lock, timeout=PATIENCE))
                # who still waits for it finds the file, or makes it again
                stack.callback(lock.unlink, missing_ok=True)
            except (Timeout, OSError, NotImplementedError):
                pass  # without the lock the work is done twice, and no worse
        yield


def private_folder() -> Path | None:
    """This user's folder among the temporary ones; None if it cannot be had, or others can reach into it."""
    user = getattr(os, "geteuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"oner-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)  # a link leads to where others may write
    except OSError:
        return None
    if os.name != "posix":
        return folder  # temporary folders are a user's own
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
    return folder if private else None
