"""Digests of files, to check that a directory of weights is complete and unchanged."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file as hex, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # weights may be larger than memory
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
