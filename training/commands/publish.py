"""`oner publish`: uploads a model directory as a Hub repository, or a search page with its indexes as a Space."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from oner.training.publishing.hub import SPACE, check_repo_id, push_to_hub, upload
from oner.training.publishing.shipped import find_model

from .serve import write_page


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Uploads the model directory, the `model` directory of a run, or a newly written Space."""
    how = {"private": options.private, "revision": options.revision, "create_pr": options.create_pr}
    if not options.space:
        message = options.message or "Upload model"
        print(push_to_hub(find_model(options.model), options.repository, commit_message=message, **how))
        return 0
    check_repo_id(options.repository)  # before the embedding, which takes long
    with TemporaryDirectory() as scratch:
        directory = Path(scratch) / "space"
        write_page(options, directory)
        message = options.message or "Upload Space"
        print(upload(directory, options.repository, kind=SPACE, commit_message=message, **how))
    return 0
