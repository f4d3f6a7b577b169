"""What a run reads: its tokenizer, kept in its directory, and a digest of every input, kept in its checkpoints.

Rows are covered as `processing/data/row_digest.py` says; files whole; of a directory that holds a model the files that
loading reads, or of a name on the Hub the commit.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from oner.processing.data.listed_rows import rows_digest
from oner.processing.data.rows import PairStream
from oner.processing.vl_tokenizer import tokenizer_from_vocab
from oner.training.publishing.digests import sha256_of

from .arguments import Arguments, RunArguments
from .checkpoint import CheckpointError, list_checkpoints

logger = logging.get_logger(__name__)

TOKENIZER = "tokenizer"  # the run's own, a directory in output_dir
SAVED = "tokenizer.json"  # in it
# arguments that name what is read beside rows; of the lists each entry
FILES = (
    *("initial_model", "initial_objective", "initial_vision", "initial_text", "tokenizer", "image_tokenizer"),
    *("answer_list", "eval_annotations", "refs", "instances", "detections", "excluded_images"),
)
# of a model's directory, what loading does not read
UNREAD = {".md", ".png", ".py"}
UNREAD_NAMES = {"digests.json"}


class Inputs:
    """
    The digests of what a run reads, by name, and its tokenizer.

    Args:
        arguments (`Arguments`): The run's.
        rows: Of each portion; a stream has no digest.
        tokenizer (*optional*): Of the run's processor.
        evaluators: Of their `rows`, where they have them, the digests are taken too.
    """

    def __init__(
        self,
        arguments: Arguments,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerFast | None = None,
        evaluators: Iterable[Any] = (),
    ):
        self.tokenizer = tokenizer
        self.digests: dict[str, str] = {}

        # rows that are trained and measured on
        for name, one in rows.items():
            if not isinstance(one, PairStream):
                self.digests[f"rows of {name} ({one.name})"] = one.digest()
        for one in evaluators:
            if getattr(one, "rows", None) is not None:
                self.digests[f"rows of evaluation {one.name}"] = rows_digest(one.rows)

        # the tokenizer that is used, and everything that is named
        if tokenizer is not None:
            self.digests["tokenizer of the run"] = digest_of_tokenizer(tokenizer)
        told = arguments.to_dict()
        for name in FILES:
            values = told.get(name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None:
                    self.digests[f"{name} {value}"] = _digest_of(value)

    def keep(self, output_dir: Path) -> None:
        """Writes the tokenizer into the run's directory, beside its place and renamed into it."""
        if self.tokenizer is None:
            return
        place = output_dir / TOKENIZER
        beside = output_dir / f".{TOKENIZER}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        self.tokenizer.save_pretrained(beside)
        if (place / SAVED).is_file() and (place / SAVED).read_bytes() == (beside / SAVED).read_bytes():
            shutil.rmtree(beside)
            return
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)

    def check(self, path: Path, then: Mapping[str, str] | None, allow_changes: bool) -> None:
        """Raises `CheckpointError` that names each input of the run at `path` which is another now."""
        if then is None:
            logger.warning(f"{path} does not say what its run read: whether that has changed since is not known")
            return
        now = self.digests
        changed = [
            f"{name} {'differs' if name in then and name in now else 'is new' if name in now else 'is not read now'}"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        if not changed:
            return
        if not allow_changes:
            raise CheckpointError(
                f"{path} was trained on other inputs than there are now; " + "; ".join(changed) + " (bring back what "
                "the run began with, or allow_changes goes on with what there is, and with the tokenizer of the run)"
            )
        logger.warning(f"resumes {path} with other inputs; " + "; ".join(changed))


def kept_tokenizer(run: RunArguments, max_text_length: int) -> PreTrainedTokenizerFast | None:
    """That of the run which is going to be resumed, if it kept one: its weights know no other ids."""
    if run.resume is None or not (run.resume != "auto" or list_checkpoints(run.output_dir)):
        return None
    place = (Path(run.output_dir) if run.resume == "auto" else Path(run.resume).parent) / TOKENIZER
    return tokenizer_from_vocab(place, max_text_length=max_text_length) if place.is_dir() else None


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """By which two that make the same tokens are known to."""
    # how a text is cut or padded is left in a fast tokenizer by its last call
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told = {name: value for name, value in told.items() if name not in ("truncation", "padding")}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest_of(source: str) -> str:
    path = Path(source)
    if path.is_file():
        return sha256_of(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        read = [file for file in files if file.suffix not in UNREAD and file.name not in UNREAD_NAMES]
        return sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in read).encode()).hexdigest()

    # on the Hub: its files lie in a folder that is called after the commit
    try:
        found = try_to_load_from_cache(source, "config.json")
    except HFValidationError:
        found = None
    return Path(found).parent.name if isinstance(found, str) else "not found here"
