"""Digests of files, by which a directory of weights is known to be whole."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # weights may be larger than memory
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
