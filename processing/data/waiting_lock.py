"""A lock that only avoids duplicate work: the files that it guards are written atomically anyway."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 600  # seconds to wait for another process, which may hang; then the work is done twice


@contextmanager
def waiting_lock(place: Path) -> Iterator[None]:
    """
    Admits one process at a time, of this user's processes on this machine that write the file `place`.

    The lock is in a folder that no other user can access, and not beside `place`, where lock files would remain and
    some file systems do not support locks. Without such a folder, no process waits.
    """
    folder = private_folder()
    lock = folder and folder / f"{blake2b(os.fsencode(os.path.abspath(place)), digest_size=16).hexdigest()}.lock"
    with ExitStack() as stack:
        if lock is not None:
            try:
                stack.enter_context(FileLock(lock, timeout=PATIENCE))
                # a process still waiting finds the file, or writes it again
                stack.callback(lock.unlink, missing_ok=True)
            except (Timeout, OSError, NotImplementedError):
                pass  # without the lock the work is done twice, which is harmless
        yield


def private_folder() -> Path | None:
    """This user's private temporary folder; None if it cannot be created, or other users can access it."""
    user = getattr(os, "geteuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"oner-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)  # does not follow a link, whose target others may write to
    except OSError:
        return None
    if os.name != "posix":
        return folder  # temporary folders are per user
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
    return folder if private else None
