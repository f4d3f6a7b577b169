"""Resolves the paths of data: an existing path is taken literally, a pattern is expanded to the matching files."""

import glob
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any

HUB = "hf://"
REPOSITORY = re.compile(
    r"(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)"
)
SPANS = re.compile(r"\{\d+\.\.\d+\}")  # ranges of shards, cc-{000..127}.tar


class PairDataError(ValueError):
    """The data cannot be used; the message names the source, the rows and the reasons."""


def expand(source: Any) -> Any:
    """
    Expands patterns and files on the Hub to local files, sorted by name; any other source is returned unchanged.

    Raises:
        PairDataError: no file matches a pattern, or the Hub does not provide a file.
    """
    if isinstance(source, (list, tuple)):
        expanded = [expand(one) for one in source]
        return [file for one in expanded for file in (one if isinstance(one, list) else [one])]
    if not isinstance(source, (str, os.PathLike)):
        return source
    text = str(source)
    if text.startswith(HUB):
        files = _from_hub(text)
        return files[0] if len(files) == 1 else files
    if not glob.has_magic(text) or os.path.lexists(text) or SPANS.search(text):
        return source
    files = sorted(glob.glob(text, recursive=True))
    if not files:
        raise PairDataError(f"{text}: no such file, and no file fits this pattern")
    return files[0] if len(files) == 1 else files


def _from_hub(address: str) -> list[str]:
    """Files of a repository, downloaded into the cache if missing."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    found = []
    try:
        addresses = [address]
        if glob.has_magic(address):
            addresses = [HUB + path for path in sorted(HfFileSystem().glob(address))]
        for one in addresses:
            parts = REPOSITORY.fullmatch(one.removeprefix(HUB))
            if parts is None:
                raise PairDataError(f"{one}: expected hf://datasets/OWNER/NAME/FILE, with @REVISION behind the name")
            options = {"repo_type": (parts["kind"] or "models").removesuffix("s"), "revision": parts["revision"]}
            found.append(hf_hub_download(parts["name"], parts["file"], **options))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PairDataError):
            raise
        raise PairDataError(f"{address}: the Hub does not give it: {error}") from error
    if not found:
        raise PairDataError(f"{address}: no file on the Hub fits this pattern")
    return found


def regular(path: str | os.PathLike) -> Path:
    """
    The path of a regular file. Reading a pipe might block for ever, and a device may be endless.

    Raises:
        PairDataError: the path does not exist, or is a folder, a pipe, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PairDataError(f"{os.fspath(path)}: cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise PairDataError(f"{os.fspath(path)}: is {kinds.get(stat.S_IFMT(mode), 'a device')}; expected a file")
    return Path(path)


def located(path: str) -> str:
    """
    The path of an image that a table names: as written, or, if a file exists there, with another system's separators
    or Unicode normalisation.
    """
    if (path.isascii() and "\\" not in path) or os.path.isfile(path):
        return path
    for turned in dict.fromkeys((path, path.replace("\\", "/"))):
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, turned)
            if os.path.isfile(other):
                return other
    return path
