"""What `oner serve` may be told, from the standard library alone, as the rest of the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oner_run_options import Mistake, check_nothing_more


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """
    A page in the browser: search by words, by a picture, or by both; click an answer to see where the words are.

        oner serve runs/photos                                  a run, and the pictures that it was trained on
        oner serve oner-emoji photos/ art/                      a model, and what is searched: folders, tables of
                                                                pairs, or indexes of `oner index`
        oner serve owner/model photos/ --write-space space      the same as a Space of the Hub, with its pictures

    Needs gradio: pip install 'oner[serve]'. The page is open to this machine alone, unless --host says otherwise.
    """
    parser.add_argument("model", help="a model directory, a run, or a name on the Hub")
    parser.add_argument("indexes", nargs="*", metavar="INDEX", help="what is searched; that of the run by default")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    add_page(parser)
    parser.add_argument(
        "--write-space", "--write_space", metavar="DIR",
        help="serve nothing, and write the directory of a Space: the page, its code, the model (by its name where it "
        "has one on the Hub, else its files), and small copies of the pictures",
    )  # fmt: skip


def add_page(parser: argparse.ArgumentParser) -> None:
    """What a page is called, and how much of what it searches goes along."""
    parser.add_argument("--title", default="Search by words, by a picture, or by both", help="above the page")
    parser.add_argument("--limit", type=int, default=500, help="items of each index in a Space (default 500)")


def check_serving(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Whether what is searched is there. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    check_places(options)


def check_publishing(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Whether what a Space searches is there, and a model alone has none of it. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    if options.space:
        return check_places(options)
    if options.indexes:
        raise Mistake(f"unexpected {options.indexes[0]!r}; what is searched goes along with --space alone")


def check_places(options: argparse.Namespace) -> None:
    """Whether what is searched is there: what is named, or else the pictures of a run. Raises `Mistake`."""
    for place in options.indexes:
        if not Path(place).exists():
            raise Mistake(f"{place}: no such folder or file; expected a saved index, a folder, or a table of pairs")
    is_run = (Path(options.model) / "model" / "config.json").is_file()
    if not options.indexes and not is_run:
        raise Mistake(f"{options.model} is no run; expected what is searched behind it: a folder, a table, an index")
    if options.limit < 1:
        raise Mistake(f"--limit is {options.limit}; expected at least 1")
