"""Images that a run must not see, those of the sets it will be measured on, known by the SHA-256 of their files.

MoMo leaves out what is in the validation and test parts of its tasks (section 3.4), by UNITER's procedure, which
compares numbers of images. Hashes need no numbers, but do not know an image that was encoded anew.
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
    All hashes of text files, one a line as `sha256sum` writes them: the hash first, then whatever there is.

    Raises:
        PairDataError: a file that cannot be read, or a line that begins with no hash.
    """
    hashes: set[str] = set()
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PairDataError(f"{file}: cannot be read as a list of hashes: {error}") from error

        # sha256sum marks a name that it had to escape
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
    The SHA-256 of a row's image, bytes or a path or {"bytes", "path"}; None of anything else.

    Raises:
        OSError: a file that cannot be read.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return sha256(image).hexdigest()
    if not isinstance(image, str):
        return None
    return sha256(Path(image).read_bytes()).hexdigest()
