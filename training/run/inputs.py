"""Records the inputs of a run: its tokenizer is saved in its directory, digests of all inputs in its checkpoints.

Digests cover rows as described in `processing/data/row_digest.py`, whole files, the loaded files of a model
directory, and the commit of a name on the Hub.
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

TOKENIZER = "tokenizer"  # the run's tokenizer, a directory in output_dir
SAVED = "tokenizer.json"  # file in it
# arguments that name other inputs than rows; for lists each entry
FILES = (
    *("initial_model", "initial_objective", "initial_vision", "initial_text", "tokenizer", "image_tokenizer"),
    *("answer_list", "eval_annotations", "refs", "instances", "detections", "excluded_images"),
)
# files of a model directory that loading does not read
UNREAD = {".md", ".png", ".py"}
UNREAD_NAMES = {"digests.json"}


class Inputs:
    """
    The digests of a run's inputs by name, and its tokenizer.

    Args:
        arguments (`Arguments`): The run's.
        rows: Rows of each portion; streams have no digest.
        tokenizer (*optional*): Of the run's processor.
        evaluators: Digests of their `rows` are included, if they have any.
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

        # training and evaluation rows
        for name, one in rows.items():
            if not isinstance(one, PairStream):
                self.digests[f"rows of {name} ({one.name})"] = one.digest()
        for one in evaluators:
            if getattr(one, "rows", None) is not None:
                self.digests[f"rows of evaluation {one.name}"] = rows_digest(one.rows)

        # the tokenizer, and all inputs named in arguments
        if tokenizer is not None:
            self.digests["tokenizer of the run"] = digest_of_tokenizer(tokenizer)
        told = arguments.to_dict()
        for name in FILES:
            values = told.get(name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None:
                    self.digests[f"{name} {value}"] = _digest_of(value)

    def keep(self, output_dir: Path) -> None:
        """Saves the tokenizer in the run's directory, under another name first and then renamed."""
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
        """Raises `CheckpointError` that names each input that has changed since the checkpoint at `path`."""
        if then is None:
            logger.warning(f"{path} does not record its inputs: whether they have changed since is unknown")
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
                f"{path} was trained on other inputs than there are now; " + "; ".join(changed) + " (restore the "
                "original inputs, or set allow_changes to continue with the current ones and the run's tokenizer)"
            )
        logger.warning(f"resumes {path} with other inputs; " + "; ".join(changed))


def kept_tokenizer(run: RunArguments, max_text_length: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the run to be resumed, if it saved one: its weights fit only these token ids."""
    if run.resume is None or not (run.resume != "auto" or list_checkpoints(run.output_dir)):
        return None
    place = (Path(run.output_dir) if run.resume == "auto" else Path(run.resume).parent) / TOKENIZER
    return tokenizer_from_vocab(place, max_text_length=max_text_length) if place.is_dir() else None


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """A digest that is equal for tokenizers that produce the same tokens."""
    # without truncation and padding, which the last call leaves in a fast tokenizer
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

    # on the Hub: the cache folder of its files is named after the commit
    try:
        found = try_to_load_from_cache(source, "config.json")
    except HFValidationError:
        found = None
    return Path(found).parent.name if isinstance(found, str) else "not found here"
