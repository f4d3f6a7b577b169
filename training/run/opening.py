"""The rows that a run trains on, and its list of those that cannot be used."""

from oner.processing.data.mixture import open_mixture
from oner.processing.data.quarantine import Quarantine
from oner.processing.data.rows import PairRows, PairStream
from oner.training.parallel.distributed import rank

from .arguments import DataArguments


def open_training_pairs(data: DataArguments, output_dir: str | None = None) -> PairRows | PairStream:
    """
    The training pairs, columns checked; rows found bad are left to the quarantine of `PairLoader`.

    Raises:
        PairDataError: data that cannot be read as rows of pairs; names the file and what is wrong.
        BadRowsError: if `output_dir` is given: too many rows are bad. Its quarantine.jsonl lists them.
    """
    pairs = open_mixture(
        data.train_data,
        data.image_column,
        data.text_column,
        data.id_column,
        split=data.split,
        streaming=data.streaming,
        bad_rows="skip",
        weights=data.data_weights,
    )
    if output_dir is not None:
        quarantine_of(pairs, output_dir, data.max_bad_rows).check_opening()
    return pairs


def quarantine_of(pairs: PairRows | PairStream, output_dir: str, max_bad_rows: float) -> Quarantine:
    """The list of bad rows of a run over `pairs`, with those that are known already."""
    if isinstance(pairs, PairStream):
        return Quarantine(output_dir, max_bad_rows, is_main=rank() == 0)
    opened = [(*pairs.where(row), reason) for row, reason in sorted(pairs.bad.items())]
    return Quarantine(output_dir, max_bad_rows, opened, len(pairs), is_main=rank() == 0)
