"""The arguments of `oner serve`; standard library only, like the whole command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oner_run_options import Mistake, check_nothing_more


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Serve a search page in the browser: search by text, by image, or by both; click an answer to see where the text is.

        oner serve runs/photos                                  a run, and the images that it was trained on
        oner serve oner-emoji photos/ art/                      a model, and what to search: folders, tables of
                                                                pairs, or indexes of `oner index`
        oner serve owner/model photos/ --write-space space      the same as a Space for the Hub, with its images

    Needs gradio: pip install 'oner[serve]'. Only this machine can open the page, unless you set --host.
    """
    parser.add_argument("model", help="a model directory, a run, or a name on the Hub")
    parser.add_argument(
        "indexes", nargs="*", metavar="INDEX", help="what to search; default: what the run learned from"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860 on")
    add_page(parser)
    parser.add_argument(
        "--write-space", "--write_space", metavar="DIR",
        help="do not serve, but write the directory of a Space: the page, its code, the model (by name if it "
        "is on the Hub, else its files), and small copies of the images",
    )  # fmt: skip


def add_page(parser: argparse.ArgumentParser) -> None:
    """The title of the page, and the number of items in a Space."""
    parser.add_argument("--title", default="Search by words, by a picture, or by both", help="title of the page")
    parser.add_argument("--limit", type=int, default=500, help="items of each index in a Space (default 500)")


def check_serving(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks that everything to search exists. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    check_places(options)


def check_publishing(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks that what a Space searches exists, and that no index is given without --space. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    if options.space:
        return check_places(options)
    if options.indexes:
        raise Mistake(f"unexpected {options.indexes[0]!r}; what is searched goes along with --space alone")


def check_places(options: argparse.Namespace) -> None:
    """Checks that the named indexes exist, or else that the model is a run. Raises `Mistake`."""
    for place in options.indexes:
        if not Path(place).exists():
            raise Mistake(f"{place}: no such folder or file; expected a saved index, a folder, or a table of pairs")
    is_run = (Path(options.model) / "model" / "config.json").is_file()
    if not options.indexes and not is_run:
        raise Mistake(f"{options.model} is no run; expected what is searched behind it: a folder, a table, an index")
    if options.limit < 1:
        raise Mistake(f"--limit is {options.limit}; expected at least 1")
