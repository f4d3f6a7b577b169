"""`oner publish`: a model directory becomes a repository on the Hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oner.training.publishing.hub import push_to_hub


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Uploads the directory, or the `model` in it where it is that of a run."""
    directory = Path(options.model)
    if (directory / "model" / "config.json").is_file():
        directory = directory / "model"
    address = push_to_hub(
        directory,
        options.repository,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
        create_pr=options.create_pr,
    )
    print(address)
    return 0
