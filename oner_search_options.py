"""What `oner search` and `oner index` may be told, from the standard library alone, as all of the command line."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from oner_run_options import Mistake, beside, check_nothing_more

# options of `oner index`, and the backends that they are of
OWN = {"kind": ("faiss",), "recall": ("faiss",), "url": ("lancedb", "qdrant")}
BACKENDS = ("exact", "faiss", "lancedb", "qdrant")


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Search images by text, by an image, or by both as one query, and draw the answers as a contact sheet.

        oner search runs/photos "red fruit"                        the images that a run was trained on, with its model
        oner search photos/ "made of glass" --image photo.png      a folder, a table of pairs, or a saved index
        oner search "red fruit" --index photos/ --model runs/photos/model
        oner search photos/ "a horse" --plus 0.7:stripes --minus "a rider" --where licence=MIT
        oner search photos/ --like photos/apple.jpg --json

    The index of a folder or table is cached in a hidden directory beside it. It is updated when a file's name, size
    or modification time changes, or when the model does.
    """
    parser.add_argument("place", nargs="?", help="a run, a folder of images, a table of pairs, or a saved index")
    parser.add_argument("words", nargs="?", help="the text to search for")
    parser.add_argument("--image", help="an image to search for; with words, both form one query")
    parser.add_argument("--index", help="the place to search; the positional argument is then the text to search for")
    parser.add_argument("--model", help="a model directory, a run, a name on the Hub, or a shipped model (oner-emoji)")
    parser.add_argument(
        "--plus", action="append", default=[], metavar="[WEIGHT:]WORDS", help="add a query; repeatable"
    )
    parser.add_argument("--minus", action="append", default=[], metavar="[WEIGHT:]WORDS", help="subtract a query")
    parser.add_argument("--plus-image", action="append", default=[], metavar="[WEIGHT:]FILE", help="add an image")
    parser.add_argument("--minus-image", action="append", default=[], metavar="[WEIGHT:]FILE", help="subtract one")
    parser.add_argument("--like", metavar="ITEM", help="nearest neighbours of an indexed item: its path or number")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="condition on a table's column: licence=MIT, licence!=MIT|BSD, year>=2020; repeatable, all must hold",
    )  # fmt: skip
    parser.add_argument("--rerank", type=int, metavar="K", help="re-rank the best K by tokens and patches (MaxSim)")
    parser.add_argument("--backend", choices=BACKENDS, default="exact", help="see docs/search.md")
    parser.add_argument("--top-k", "--top_k", type=int, default=12)
    parser.add_argument(
        "--json", action="store_true", help="print the answers as JSON; draw a contact sheet only with --out"
    )
    parser.add_argument("--out", help="path of the contact sheet; default: results.png")
    parser.add_argument("--index-cache", help="where to cache the index; default: beside the source")


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Embed images once and save them as an index for `oner search` and the pipeline.

        oner index photos/ photos-index --model runs/photos/model
        oner search photos-index "red fruit" --model runs/photos/model
        accelerate launch -m oner_command_line index photos/ photos-index     each process embeds a share

    The index is saved in parts: if the command is killed, run it again to continue. When you run it on an existing
    index, it embeds only new or changed items and drops deleted ones. docs/search.md says which backend to choose.
    """
    parser.add_argument("source", help="a folder of images, read recursively, or a table of pairs")
    parser.add_argument("destination", help="directory of the index")
    parser.add_argument("--model", help="a model directory, a run, a name on the Hub, or a shipped model (oner-emoji)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="exact", help="backend to build; exact needs no extra package"
    )
    parser.add_argument("--kind", choices=["ivf", "hnsw"], help="faiss: lists (ivf, the default) or a graph (hnsw)")
    parser.add_argument("--recall", type=float, help="faiss: target recall of the exact top 10 (0.98)")
    parser.add_argument("--url", help="lancedb, qdrant: address of the database; default: in the index directory")


def check_search(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks that there is a query and a place to search; sets `place` and `words`. Raises `Mistake`."""
    if rest and options.words and not rest[0].startswith("-"):
        raise Mistake(f'unexpected {rest[0]!r}; expected all words as one: "{" ".join([options.words, *rest])}"')
    check_nothing_more(options, rest, known)
    if options.index is not None:
        if options.words is not None:
            raise Mistake(f"got {options.place!r}, {options.words!r} and --index; expected the words alone beside it")
        options.words, options.place = options.place, options.index
    where = "--index " if options.index is not None else ""
    if options.place is None:
        raise Mistake("where? expected a run, a folder of pictures, a table of pairs, or a saved index")
    if not Path(options.place).exists():
        raise Mistake(f"{where}{options.place}: no such folder or file{beside(options.place)}")
    check_query(options)
    check_answers(options)
    if options.image is not None and not Path(options.image).is_file():
        raise Mistake(f"--image {options.image}: no such file{beside(options.image)}")


def check_index(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks that the source exists, and that options of a backend are of the one named. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    if not Path(options.source).exists():
        raise Mistake(f"{options.source}: no such folder or file{beside(options.source)}")
    for name, backends in OWN.items():
        if getattr(options, name) is not None and options.backend not in backends:
            raise Mistake(f"--{name} is of {' and '.join(backends)}, got --backend {options.backend}")
    if options.recall is not None and not 0 < options.recall <= 1:
        raise Mistake(f"--recall is {options.recall}; expected a share above 0, up to 1")
    if options.batch_size < 1:
        raise Mistake(f"--batch_size is {options.batch_size}; expected at least 1")


def check_answers(options: argparse.Namespace) -> None:
    """Checks how many answers are wanted, and that their sheet can be written. Raises `Mistake`."""
    for name in ("top_k", "rerank"):
        if (count := getattr(options, name)) is not None and count < 1:
            raise Mistake(f"--{name} is {count}; expected at least 1")
    if options.json and options.out is None:
        return
    sheet = Path(options.out or "results.png")
    if not sheet.parent.is_dir():
        raise Mistake(f"--out {sheet}: there is no folder {sheet.parent}")
    if not os.access(sheet if sheet.exists() else sheet.parent, os.W_OK):
        raise Mistake(f"{sheet.absolute()} cannot be written; --out FILE names another place, --json needs none")


def check_query(options: argparse.Namespace) -> None:
    """Checks that there is exactly one query. Raises `Mistake`."""
    asked = bool(options.words or options.image)
    parts = bool(options.plus or options.minus or options.plus_image or options.minus_image)
    if not asked and not parts and options.like is None:
        raise Mistake("give words, --image, or both; or --like an item, or --plus and --minus")
    if options.like is not None and (asked or parts):
        raise Mistake("--like is a question of its own; words, pictures, --plus and --minus do not go with it")
    if options.rerank is not None and (parts or options.like is not None):
        raise Mistake("--rerank compares one query's tokens and patches; it goes with words, --image, or both")
