"""The rows that a run trains on, and its list of those that cannot be used."""

from oner.processing.data.mixture import open_mixture
from oner.processing.data.quarantine import Quarantine
from oner.processing.data.row_checks import ROLES, Kind
from oner.processing.data.rows import PairRows, PairStream
from oner.training.parallel.distributed import rank

from .arguments import DataArguments


def open_training_rows(
    data: DataArguments, output_dir: str | None = None, kind: Kind = "pairs"
) -> PairRows | PairStream:
    """
    The training rows, columns checked; those found bad are left to the quarantine of `PairLoader`.

    Raises:
        PairDataError: data that cannot be read as rows of the kind; names the file and what is wrong.
        BadRowsError: if `output_dir` is given: too many rows are bad. Its quarantine.jsonl lists them.
    """
    roles = ROLES[kind]
    rows = open_mixture(
        data.train_data,
        kind,
        data.image_column if "image" in roles else None,
        data.text_column if "text" in roles else None,
        data.id_column,
        split=data.split,
        streaming=data.streaming,
        bad_rows="skip",
        weights=data.data_weights,
    )
    if output_dir is not None:
        quarantine_of(rows, output_dir, data.max_bad_rows).check_opening()
    return rows


def quarantine_of(rows: PairRows | PairStream, output_dir: str, max_bad_rows: float) -> Quarantine:
    """The list of bad rows of a run over `rows`, with those that are known already."""
    if isinstance(rows, PairStream):
        return Quarantine(output_dir, max_bad_rows, is_main=rank() == 0)
    opened = [(*rows.where(row), reason) for row, reason in sorted(rows.bad.items())]
    return Quarantine(output_dir, max_bad_rows, opened, len(rows), is_main=rank() == 0)
