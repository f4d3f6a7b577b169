"""A folder as a user has it: pictures called by what they show."""

from pathlib import Path

import pyarrow.parquet as pq

# a drawing style that the checkpoint which ships has never seen
EMOJI = Path(__file__).resolve().parents[1] / "examples" / "data" / "emoji" / "test_style.parquet"


def write_named(folder: Path, count: int) -> Path:
    """Pictures called by their captions, numbered where these are equal; every sixth by the one before it."""
    folder.mkdir(parents=True)
    rows = pq.read_table(EMOJI).slice(0, count).to_pylist()
    for number, row in enumerate(rows):
        words = rows[number - 1 if number % 6 == 5 else number]["captions"][0]
        name = "_".join("".join(letter for letter in words if letter.isalnum() or letter == " ").split())
        (folder / f"{name}_{number:03d}.png").write_bytes(row["image"]["bytes"])
    return folder
