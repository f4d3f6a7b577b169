"""300,000 named icons of 200 sets from the npm package @iconify/json, drawn as pairs for training and evaluation.

    python examples/data/icons.py runs/icons                       everything, fetched by npm
    python examples/data/icons.py runs/icons --package FILE.tgz    from a package that was downloaded before
    python examples/data/icons.py runs/icons --sets lucide tabler carbon

Each set is drawn into its own file, which is written atomically: after an interruption, the same command continues.
Then the sets are joined into train/, unseen_names.parquet, unseen_sets.parquet, composed queries and ATTRIBUTION.md.
"""

import argparse
import json
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from building import fetch, write_table, write_text
from icons_drawing import draw
from icons_names import Naming, why_left_out
from icons_splits import write_splits
from tqdm.auto import tqdm

PACKAGE = "@iconify/json@2.2.535"
SIZE = 64
QUERIES = 2000
MEMBER = "package/json/{}.json"
SCHEMA = pa.schema(
    {"id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}
    | {name: pa.string() for name in ("concept", "style", "set", "category", "license", "attribution")}
    | {"synonyms": pa.list_(pa.string())}
)


def read_collections(package: Path) -> dict[str, Any]:
    """Name, author, licence and category of each set."""
    with tarfile.open(package) as archive:
        for member in archive:
            if member.name == "package/collections.json":
                return json.load(archive.extractfile(member))
    raise ValueError(f"{package}: expected the npm package @iconify/json, got an archive without collections.json")


def read_sets(package: Path, names: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The named sets, in the archive's order; the others are not opened."""
    wanted = {MEMBER.format(name): name for name in names}
    with tarfile.open(package) as archive:
        while wanted and (member := archive.next()):
            if member.name in wanted:
                yield wanted.pop(member.name), json.load(archive.extractfile(member))
    if wanted:
        raise ValueError(f"{package} lacks {', '.join(sorted(wanted))}, which its collections.json lists")


def chosen_icons(content: Mapping[str, Any], dropped: Counter) -> list[dict[str, Any]]:
    """The icons of a set to draw: icon, parsed name, synonyms. Of several pixel sizes, the one closest to 24."""
    shown = {name: icon for name, icon in content["icons"].items() if not icon.get("hidden")}
    dropped["deprecated icon"] += len(content["icons"]) - len(shown)
    naming = Naming(list(shown), content.get("prefixes", {}), content.get("suffixes", {}))
    # One size per drawing.
    best: dict[str, tuple[int, str]] = {}
    said = {name: naming.read(name) for name in shown}
    for name, read in said.items():
        if read is not None:
            best[read.drawing] = min(best.get(read.drawing, (999, "")), (abs(read.pixels - 24), name))
    kept = sorted(name for _, name in best.values())
    dropped["no word in the name"] += sum(read is None for read in said.values())
    dropped["another pixel size"] += sum(read is not None for read in said.values()) - len(kept)

    # Other names of the same image. Aliases that transform it are other images, whose names may be wrong.
    synonyms: dict[str, set[str]] = {}
    for alias, what in content.get("aliases", {}).items():
        read = naming.read(alias)
        if read is not None and set(what) <= {"parent", "hidden"}:
            synonyms.setdefault(what["parent"], set()).add(read.text)
    sizes = {"left": 0, "top": 0, "width": 16, "height": 16}
    sizes |= {key: content[key] for key in sizes if key in content}
    categories = {name: category for category, names in content.get("categories", {}).items() for name in names}
    return [
        {
            "name": name,
            "said": said[name],
            "icon": sizes | shown[name],
            "synonyms": sorted(synonyms.get(name, set()) - {said[name].text}),
            "category": categories.get(name),
        }
        for name in kept
    ]


def set_rows(
    prefix: str, content: Mapping[str, Any], facts: Mapping[str, Any], size: int, pool: Any, dropped: Counter
) -> Iterator[dict[str, Any]]:
    """The rows of a set."""
    chosen = chosen_icons(content, dropped)
    licence = facts["license"].get("spdx", facts["license"]["title"])
    attribution = f"{facts['name']}, (c) {facts['author']['name']}, {licence}"
    drawn = pool.imap(partial(draw, size=size), [one["icon"] for one in chosen], chunksize=32)
    for one, png in zip(chosen, drawn, strict=True):
        if isinstance(png, str):
            dropped[png] += 1
            continue
        name = f"{prefix}:{one['name']}"
        yield {
            "id": name,
            "image": {"bytes": png, "path": f"{prefix}-{one['name']}.png"},
            "text": one["said"].text,
            "synonyms": one["synonyms"],
            "concept": one["said"].concept,
            "style": one["said"].style,
            "set": prefix,
            "category": one["category"] or facts.get("category"),
            "license": licence,
            "attribution": attribution,
        }


def draw_sets(package: Path, output: Path, sets: Mapping[str, Any], size: int, workers: int) -> None:
    """Writes a file of rows per set, and beside it how many icons were left out and why; both atomically."""
    lacking = {name for name in sets if not (output / f"{name}.parquet").is_file()}
    with workers_of(workers) as pool:
        bar = tqdm(read_sets(package, lacking), "sets drawn", len(lacking), unit=" sets")
        for name, content in bar:
            dropped: Counter = Counter()
            rows = list(set_rows(name, content, sets[name], size, pool, dropped))
            # The reasons first, so that they exist whenever the rows do.
            counts = {reason: count for reason, count in sorted(dropped.items()) if count}
            write_text(output / f"{name}.json", json.dumps(counts))
            write_table(output / f"{name}.parquet", pa.Table.from_pylist(rows, SCHEMA))


@contextmanager
def workers_of(number: int) -> Iterator[Any]:
    """An object with `imap`: a pool of processes, or this process."""
    if number > 1:
        with multiprocessing.get_context("fork").Pool(number) as processes:
            yield processes
    else:
        yield argparse.Namespace(imap=lambda make, items, chunksize: map(make, items))


def check_folder(folder: Path, made_of: dict[str, Any]) -> None:
    """Raises `ValueError` if the folder's sets were drawn with other settings."""
    path = folder / "made_of.json"
    if path.is_file() and (found := json.loads(path.read_text())) != made_of:
        raise ValueError(f"{folder} holds sets of {found}, expected {made_of}; remove it or name another folder")
    write_text(path, json.dumps(made_of))


def arguments() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--package", type=Path, help=f"a .tgz of @iconify/json (default: npm fetches {PACKAGE})")
    parser.add_argument("--sets", nargs="+", help="prefixes of sets; default: all permitted ones")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels per side (default %(default)s)")
    parser.add_argument("--queries", type=int, default=QUERIES, metavar="N", help="composed ones per split, at most")
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    return parser


def main(given: list[str] | None = None) -> None:
    """The command."""
    args = arguments().parse_args(given)
    package = args.package or fetch(PACKAGE, args.output)
    collections = read_collections(package)
    why = {name: why_left_out(name, facts) for name, facts in collections.items()}
    for name in args.sets or ():
        if name not in why or why[name] is not None:
            raise ValueError(f"set {name!r} is not drawn: {why.get(name, 'the package holds no such set')}")
    sets = {name: collections[name] for name in args.sets or why if why[name] is None}

    # Draw each set, then join them.
    import resvg_py

    drawn = args.output / "sets"
    check_folder(drawn, {"package": package.name, "size": args.size, "resvg": resvg_py.__resvg_version__})
    draw_sets(package, drawn, sets, args.size, args.workers)
    left_out = {
        name: {"icons": facts.get("total", 0), "why": why[name]}
        for name, facts in collections.items()
        if why[name] is not None
    }
    write_splits(args.output, drawn, sets, left_out, args.queries)


if __name__ == "__main__":
    main()
