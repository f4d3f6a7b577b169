"""`oner publish`: a model directory becomes a repository on the Hub; or, with what it searches, a Space there."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from oner.training.publishing.hub import SPACE, check_repo_id, push_to_hub, upload
from oner.training.publishing.shipped import find_model

from .serve import write_page


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Uploads the directory, or the `model` in it where it is that of a run; of a Space, what is written for it."""
    how = {"private": options.private, "revision": options.revision, "create_pr": options.create_pr}
    if not options.space:
        message = options.message or "Upload model"
        print(push_to_hub(find_model(options.model), options.repository, commit_message=message, **how))
        return 0
    check_repo_id(options.repository)  # before everything is embedded
    with TemporaryDirectory() as scratch:
        directory = Path(scratch) / "space"
        write_page(options, directory)
        message = options.message or "Upload Space"
        print(upload(directory, options.repository, kind=SPACE, commit_message=message, **how))
    return 0
