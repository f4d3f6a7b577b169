"""A directory that is written beside its place and put there whole, and what others laid into the one before.

A reader sees the old directory or the new one; killed at any moment, there is one of them. What a killed process left
beside it is known by its name and by nobody holding it, and is cleared away by the next that writes there.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from .digests import sha256_of

# of Linux's fcntl.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
WRITING, ASIDE = ".partial", ".aside"
# where a file of an earlier export goes that was changed since, and has a successor
KEPT = "previous"


def check_replaceable(directory: Path) -> None:
    """Raises FileExistsError unless `directory` is new, empty or an earlier export: it is going to be replaced."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, expected a directory to export into")
    if os.path.ismount(directory):
        raise FileExistsError(f"{directory} is where a file system is mounted, which cannot be replaced: name another")
    names = {entry.name for entry in directory.iterdir()}
    if names and not {"config.json", "README.md"} <= names:
        raise FileExistsError(f"{directory} holds something else than an exported model ({sorted(names)[:5]})")


@contextlib.contextmanager
def scratch_beside(place: Path) -> Iterator[Path]:
    """
    A new directory beside `place`, on the same file system, which is gone at the end unless it was put there. Raises
    OSError where weights cannot be written.
    """
    clear_leftovers(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-", suffix=WRITING))
    held = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # the kernel lets go of it, however this process ends
        with _sigterm_as_exit():
            yield scratch
    except SafetensorError as error:
        # it knows no file: of a full disk, say
        raise OSError(f"{place}: cannot be written, what was there is as it was: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the process by an exception meanwhile, so that it cleans up; handlers of others are left alone."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def clear_leftovers(place: Path) -> None:
    """Removes what killed processes left beside `place`, and puts back what one of them had moved aside."""
    if not place.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(place.name)}-\w{{8}}(?:{WRITING}|{ASIDE})")
    for left in [path for path in place.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]:
        held = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left.suffix == ASIDE and (left / place.name).exists() and not place.exists():
                os.replace(left / place.name, place)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # another process is at work
        finally:
            os.close(held)


def put_in_place(finished: Path, place: Path) -> None:
    """
    Flushes the directory `finished` to the disk and renames it to `place`; an old one goes where `finished` was.

    On file systems that cannot exchange two names in one step (NFS), the old one is aside for the moment between two
    renames; `clear_leftovers` puts it back where a kill made that moment last.
    """
    for path in [finished, *finished.rglob("*")]:
        if path.is_dir() or path.is_file():
            flush(path)
    if not place.exists() or not any(place.iterdir()):
        os.replace(finished, place)
    elif not _exchange(finished, place):
        aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-", suffix=ASIDE))
        os.replace(place, aside / place.name)
        os.replace(finished, place)
        shutil.rmtree(aside, ignore_errors=True)
    flush(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step of the kernel; False where it, the C library or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def flush(path: Path) -> None:
    """What the kernel holds of a file, or of the names in a directory, goes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_modes(directory: Path) -> None:
    """
    Readable for those whom the umask lets read, writable for the owner only: safetensors writes for the owner's eyes,
    and an empty umask would let everybody write.
    """
    # what an ordinary file gets; the umask itself can only be read by changing it
    probe = directory / ".probe"
    probe.touch()
    mode = probe.stat().st_mode & 0o644
    probe.unlink()
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():
            # who may read a directory may enter it
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def carry_over(old: Path, new: Path, written: Mapping[str, str]) -> None:
    """
    Links into `new` all of `old` that the export there did not write, or that was changed since.

    Args:
        written: Path in `old` -> SHA-256 of what the earlier export wrote there.
    """
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        target = new / name
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                target.mkdir(parents=True, exist_ok=True)
            continue

        # the earlier export's own files go with it, unless somebody changed them
        regular = path.is_file() and not path.is_symlink()
        digest = sha256_of(path) if regular else None
        if digest is not None and written.get(name) == digest:
            continue

        # a name that is taken by the new export: the same again, or both are kept
        if os.path.lexists(target):
            if regular and target.is_file() and sha256_of(target) == digest:
                continue
            target = new / KEPT / path.relative_to(old).with_stem(f"{path.stem}-{(digest or 'link')[:8]}")
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # no hard links here, or none to other people's files
        if not (source.is_file() or source.is_symlink()):
            raise
        shutil.copy2(source, target, follow_symlinks=False)
