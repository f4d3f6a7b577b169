"""The rows that a run trains on, and its list of those that cannot be used."""

from collections.abc import Mapping

from oner.processing.data.mixture import open_mixture
from oner.processing.data.quarantine import Quarantine, Watch
from oner.processing.data.row_checks import ROLES
from oner.processing.data.rows import PairRows, PairStream
from oner.training.parallel.distributed import rank

from .arguments import Arguments, DataArguments


def open_training_rows(data: DataArguments) -> PairRows | PairStream:
    """
    The training rows of a portion, of its kind, columns checked; those found bad are left to the quarantine.

    Raises:
        PairDataError: data that cannot be read as rows of the kind; names the file and what is wrong.
    """
    # columns that the kind does not have are not looked for
    roles = ROLES[data.kind]
    return open_mixture(
        data.train_data,
        data.kind,
        data.image_column if "image" in roles else None,
        data.text_column if "text" in roles else None,
        data.id_column,
        split=data.split,
        streaming=data.streaming,
        bad_rows="skip",
        weights=data.data_weights,
    )


def open_portions(arguments: Arguments) -> dict[str, PairRows | PairStream]:
    """
    The rows of each portion of a run, columns checked, and bad ones left to the quarantine.

    Raises:
        PairDataError: data that cannot be read as rows; names the file and what is wrong.
        BadRowsError: too many rows are bad. quarantine.jsonl in the output directory lists them.
    """
    # the check lists what is bad before anything is built
    rows = {name: open_training_rows(options.data) for name, options in arguments.portions().items()}
    quarantine_of(arguments, rows).check_opening()
    return rows


def quarantine_of(arguments: Arguments, rows: Mapping[str, PairRows | PairStream]) -> Quarantine:
    """The list of bad rows of a run over these portions, with those that are known already."""
    portions = arguments.portions()
    watches = {name: _watch(one, portions[name].data.max_bad_rows) for name, one in rows.items()}
    return Quarantine(arguments.run.output_dir, watches, is_main=rank() == 0)


def _watch(rows: PairRows | PairStream, max_bad_rows: float) -> Watch:
    if isinstance(rows, PairStream):
        return Watch(max_bad_rows)

    # rows of an open data set are known by their file and place
    opened = [(*rows.where(row), reason) for row, reason in sorted(rows.bad.items())]
    return Watch(max_bad_rows, opened, len(rows))
