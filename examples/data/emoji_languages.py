"""The embedded emoji with their names in ten languages.

    python examples/data/emoji_languages.py runs/emoji_languages
    python examples/data/emoji_languages.py runs/emoji_languages --package FILE.tgz --languages en de ja

Names and keywords are those of Unicode CLDR, from the npm package `emojibase-data`. Each file of `examples/data/emoji`
is copied with columns `captions_de` and so on, two captions per language (the name; the name and two keywords), and
`captions_all`, those of all languages in turn: a run draws one of them each time, and `evaluate.py --tasks languages`
compares them.
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from building import fetch, write_table
from scenes_languages import PACKAGE, plain
from scenes_sprites import EMOJI, LEFT_OUT

LANGUAGES = ("en", "de", "fr", "es", "ja", "zh", "ko", "hi", "th", "ru")
FILES = ("train", "test_style", "test_concept")
TOGETHER = {"ja": "、", "zh": "、"}  # between a name and its keywords; a comma in other languages


def read_names(package: Path, languages: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """
    language -> hexcode -> the name and its keywords.

    Raises:
        ValueError: the package lacks a language.
    """
    found = {}
    with tarfile.open(package) as archive:
        members = {member.name: member for member in archive.getmembers()}
        for language in languages:
            name = f"package/{language}/data.json"
            if name not in members:
                raise ValueError(f"{package} has no language {language!r}")
            entries = json.load(archive.extractfile(members[name]))
            found[language] = {plain(entry["hexcode"]): terms(entry) for entry in entries}
    return found


def terms(entry: dict[str, Any]) -> list[str]:
    """The name of an emoji, up to its first comma, and the keywords that do not repeat it."""
    name = entry["label"].split(", ")[0]
    return list(dict.fromkeys([name, *(tag for tag in entry.get("tags", ()) if tag.lower() != name.lower())]))


def captions_of(found: list[str], language: str) -> list[str]:
    """Two captions: the name, and the name with its first two keywords, if it has any."""
    return [found[0], TOGETHER.get(language, ", ").join(found[:3])]


def with_languages(table: pa.Table, names: dict[str, dict[str, list[str]]]) -> pa.Table:
    """The table with captions in all languages, without rows of reserved sets and rows that lack a name."""
    vendors, hexcodes = table["vendor"].to_pylist(), table["hexcode"].to_pylist()
    kept = [
        row
        for row, (vendor, hexcode) in enumerate(zip(vendors, hexcodes, strict=True))
        if vendor not in LEFT_OUT and all(hexcode in known for known in names.values())
    ]
    table = table.take(kept).select(["id", "image", "hexcode", "vendor", "license", "group", "subgroup"])
    captions = {
        language: [captions_of(known[hexcodes[row]], language) for row in kept] for language, known in names.items()
    }
    # Every language has the same number of captions, so their positions identify the language.
    together = [[text for texts in row for text in texts] for row in zip(*captions.values(), strict=True)]
    strings = pa.list_(pa.string())
    for language, texts in captions.items():
        table = table.append_column(f"captions_{language}", pa.array(texts, strings))
    return table.append_column("captions_all", pa.array(together, strings))


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--package", type=Path, help=f"a .tgz of emojibase-data (default: npm fetches {PACKAGE})")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), help="default: %(default)s")
    args = parser.parse_args(given)
    names = read_names(args.package or fetch(PACKAGE, args.output), args.languages)

    for name in FILES:
        before = pq.read_table(EMOJI / f"{name}.parquet")
        table = with_languages(before, names)
        write_table(args.output / f"{name}.parquet", table)
        print(f"{name}.parquet: {len(table)} of {len(before)} rows in {len(names)} languages")


if __name__ == "__main__":
    main()
