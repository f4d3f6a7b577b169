"""Images that a run must not see, such as those of its evaluation sets, identified by the SHA-256 of their files.

MoMo excludes the images of its tasks' validation and test sets (section 3.4), by UNITER's procedure, which compares
image ids. Hashes need no ids, but do not match an image that was re-encoded.
"""

import string
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from .places import PairDataError

LENGTH = 64  # hexadecimal digits


def read_hashes(files: Iterable[str]) -> frozenset[str]:
    """
    All hashes in text files with one per line, as `sha256sum` writes them: the hash first, followed by any text.

    Raises:
        PairDataError: a file cannot be read, or a line does not begin with a hash.
    """
    hashes: set[str] = set()
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PairDataError(f"{file}: cannot be read as a list of hashes: {error}") from error

        # sha256sum puts a backslash before the hash if it escaped the name
        for number, line in enumerate(lines, 1):
            first = line.split(maxsplit=1)[0].lstrip("\\").lower() if line.strip() else ""
            if first and (len(first) != LENGTH or not set(first) <= set(string.hexdigits)):
                raise PairDataError(
                    f"{file}, line {number}: expected a SHA-256 of {LENGTH} digits, got {first[:80]!r}"
                )
            hashes.add(first)
    return frozenset(hashes - {""})


def image_hash(image: Any) -> str | None:
    """
    The SHA-256 of a row's image: bytes, a path or {"bytes", "path"}; None for anything else.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return sha256(image).hexdigest()
    if not isinstance(image, str):
        return None
    return sha256(Path(image).read_bytes()).hexdigest()
