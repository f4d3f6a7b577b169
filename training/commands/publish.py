"""`oner publish`: a model directory becomes a repository on the Hub."""

import argparse
from collections.abc import Sequence

from oner.training.publishing.hub import push_to_hub
from oner.training.publishing.shipped import find_model


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Uploads the directory, or the `model` in it where it is that of a run."""
    address = push_to_hub(
        find_model(options.model),
        options.repository,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
        create_pr=options.create_pr,
    )
    print(address)
    return 0
