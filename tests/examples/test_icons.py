"""Icons, of a small made-up package: what is taken, what names say, nothing held out in training, stopped builds."""

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scenes_reader import SCENES

from oner import open_rows
from oner.processing.image_processing_vl import open_image

resvg_py = pytest.importorskip("resvg_py", reason="pip install 'oner[icons]'")
sys.path.insert(0, str(SCENES))

import icons  # noqa: E402
import icons_names  # noqa: E402
from icons_drawing import draw  # noqa: E402
from icons_names import Naming, concept_of, is_reserved, why_left_out  # noqa: E402

THINGS = ("bell", "user", "map", "cup", "key ring", "mail", "tree", "door", "hat", "lamp")
MARKS = ("off", "plus", "check", "lock")
PARTS = {
    "bell": "M6 4h12v12H6z", "user": "M8 2h8v6H8zM4 12h16v8H4z", "map": "M2 6h20v4H2zM2 14h20v4H2z",
    "cup": "M4 8h8v12H4z",
    "key ring": "M2 2h6v6H2zM8 5h14v2H8z", "mail": "M2 6h20v12H2z", "tree": "M11 2h2v20h-2zM5 4h14v6H5z",
    "door": "M7 2h10v20H7z", "hat": "M2 16h20v3H2zM7 6h10v10H7z", "lamp": "M11 10h2v12h-2zM4 4h16v6H4z",
    "off": "M3 1h2v22H3z", "plus": "M17 17h6v6h-6z", "check": "M1 20h8v3H1z", "lock": "M18 1h5v5h-5z",
}  # fmt: skip


def body(name: str, shift: float = 0, colour: str = "currentColor") -> str:
    paths = [PARTS[name]] if name in PARTS else [PARTS[part] for part in name.rsplit(" ", 1)]
    drawn = "".join(f'<path fill="{colour}" d="{path}"/>' for path in paths)
    return f'<g transform="translate({shift} 0)">{drawn}</g>'


def drawn_set(prefix: str, suffix: str = "", **how) -> dict:
    """A set with every thing, and each with every mark."""
    names = [*THINGS, *(f"{thing} {mark}" for thing in THINGS for mark in MARKS)]
    bodies = {f"{name.replace(' ', '-')}{suffix}": {"body": body(name, **how)} for name in names}
    return {"prefix": prefix, "icons": bodies, "width": 24, "height": 24}


def facts(spdx: str = "MIT", **more) -> dict:
    return {"name": "A set", "author": {"name": "Someone"}, "license": {"title": spdx, "spdx": spdx}, **more}


@pytest.fixture
def package(tmp_path) -> Path:
    """Two sets to train on, a held-out one, and others that are not taken, one of which cannot be opened at all."""
    sets = {
        "alpha": drawn_set("alpha", "-outline") | {"suffixes": {"outline": "Outline", "filled": "Filled"}},
        "beta": drawn_set("beta", shift=1.5),
        "carbon": drawn_set("carbon", shift=-2.5, colour="#c02010"),
        "copyleft": drawn_set("copyleft"),
    }
    sets["alpha"]["aliases"] = {"chime-outline": {"parent": "bell-outline"}, "llab": {"parent": "cup", "hFlip": True}}
    sets["beta"]["icons"] |= {
        "white": {"body": body("hat", colour="#fff")},
        "broken": {"body": "<path"},
        "x": {"body": body("hat")},
        "old-hat": {"body": body("hat"), "hidden": True},
    }
    sets["carbon"]["icons"]["copy-of-bell"] = {"body": body("bell", shift=1.5)}
    collections = {"alpha": facts(), "beta": facts("CC-BY-4.0"), "carbon": facts("Apache-2.0")}
    collections |= {"copyleft": facts("CC-BY-SA-4.0"), "hugeicons": facts(), "streamline-new": facts()}

    # The reserved ones hold what no reader of JSON survives.
    files = {"collections.json": json.dumps(collections)} | {f"json/{n}.json": json.dumps(s) for n, s in sets.items()}
    files |= {"json/hugeicons.json": "not to be opened", "json/streamline-new.json": "not to be opened"}
    path = tmp_path / "icons.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in sorted(files.items()):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture(autouse=True)
def more_held_out(monkeypatch):
    monkeypatch.setattr(icons_names, "ONE_NAME_IN", 4)


def build(package: Path, output: Path, *options: str) -> dict[str, str]:
    """Digest of each file."""
    icons.main([str(output), "--package", str(package), *options])
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_names_say():
    names = ["bell", "bell-off-outline", "home-2", "home", "dice-5", "dice", "color-fill", "traffic-light", "boulder2"]
    naming = Naming([*names, "boulder", "24-hours"], suffixes={"": "Filled", "outline": "Outline"})
    said = {name: naming.read(name) for name in [*names, "24-hours", "h", "4k"]}
    texts = {name: read and read.text for name, read in said.items()}
    assert texts == {
        "bell": "bell", "bell-off-outline": "bell off", "home-2": "home", "home": "home", "dice-5": "dice 5",
        "dice": "dice", "color-fill": "color fill", "traffic-light": "traffic light", "boulder2": "boulder",
        "24-hours": "24 hours", "h": None, "4k": None,
    }  # fmt: skip
    assert (said["bell"].style, said["bell-off-outline"].style) == ("filled", "outline")
    sized = Naming(["bell-16-filled", "bell-24-filled"], suffixes={"16-filled": "16 Filled", "24-filled": "24 Filled"})
    small, large = sized.read("bell-16-filled"), sized.read("bell-24-filled")
    assert small.drawing == large.drawing and (small.pixels, large.pixels) == (16, 24) and large.style == "filled"
    assert concept_of(("user", "circle")) == concept_of(("circle", "user"))


def test_reserved_and_copyleft_sets_are_refused_by_name(package, tmp_path):
    for name in ("hugeicons", "healthicons", "keyline-icons", "streamline", "streamline-emojis"):
        assert is_reserved(name, facts()) and why_left_out(name, facts()) == "reserved"
    assert why_left_out("covid", facts(author={"name": "Streamline"})) == "reserved"
    assert why_left_out("any", facts("GPL-3.0")) == "licence GPL-3.0" and why_left_out("any", facts()) is None
    for name, reason in (("hugeicons", "reserved"), ("copyleft", "licence CC-BY-SA-4.0"), ("none", "no such set")):
        with pytest.raises(ValueError, match=reason):
            icons.main([str(tmp_path / "built"), "--package", str(package), "--sets", name])


def test_splits_hold_nothing_of_each_other(package, tmp_path):
    build(package, tmp_path / "built")
    splits = {name: pq.read_table(tmp_path / "built" / f"{name}.parquet") for name in ("unseen_names", "unseen_sets")}
    splits["train"] = pq.read_table(tmp_path / "built" / "train")
    rows = {name: table.to_pylist() for name, table in splits.items()}
    assert {row["set"] for row in rows["train"]} == {"alpha", "beta"} == {row["set"] for row in rows["unseen_names"]}
    assert {row["set"] for row in rows["unseen_sets"]} == {"carbon"}
    seen = {row["concept"] for row in rows["train"]}
    assert seen and not seen & {row["concept"] for row in rows["unseen_names"]}
    assert all(row["seen_name"] == (row["concept"] in seen) for row in rows["unseen_sets"])
    captions = {concept_of(text.split()) for row in rows["train"] for text in row["captions"]}
    assert not captions & {row["concept"] for row in rows["unseen_names"]}

    # What is not taken is counted; a held-out drawing that training has goes too.
    dropped = json.loads((tmp_path / "built" / "counts.json").read_text())["dropped"]
    assert {reason.split(":")[0]: count for reason, count in dropped.items()} == {
        "blank": 1, "not drawn": 1, "no word in the name": 1, "deprecated icon": 1,
        "held-out set, but like a picture of training": 1,
    }  # fmt: skip
    (bell,) = [row for name in rows for row in rows[name] if row["id"] == "alpha:bell-outline"]
    assert bell["captions"][:2] == ["bell", "bell outline"] and bell["license"] == "MIT"
    assert "Someone, MIT" in bell["attribution"]
    cited = (tmp_path / "built" / "ATTRIBUTION.md").read_text()
    assert all(f"`{name}`" in cited for name in ("alpha", "beta", "carbon")) and "copyleft" not in cited


def test_runs_read_it(package, tmp_path):
    build(package, tmp_path / "built", "--size", "32")
    rows = open_rows(str(tmp_path / "built" / "train"), "pairs", None, "captions", "concept")
    assert open_image(rows[0]["image"]).size == (32, 32)
    assert Counter(row["id"] for row in rows).most_common(1)[0][1] == 2  # alpha's and beta's are positives
    assert len(open_rows(str(tmp_path / "built" / "unseen_sets.parquet"), "pairs", None, "text", "concept")) > 40


def test_a_stopped_build_goes_on_to_the_same_bytes(package, tmp_path, monkeypatch):
    whole = build(package, tmp_path / "whole")
    assert whole == build(package, tmp_path / "whole") == build(package, tmp_path / "shared", "--workers", "2")

    def killed(icon, size):
        if "translate(1.5" in icon["body"]:  # in the second set
            raise KeyboardInterrupt
        return draw(icon, size)

    monkeypatch.setattr(icons, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        build(package, tmp_path / "stopped")
    left = {path.name for path in (tmp_path / "stopped").rglob("*.*")}
    assert "alpha.parquet" in left and "beta.parquet" not in left and not (tmp_path / "stopped" / "train").exists()
    monkeypatch.setattr(icons, "draw", draw)
    assert build(package, tmp_path / "stopped") == whole
    with pytest.raises(ValueError, match="holds sets of"):
        build(package, tmp_path / "stopped", "--size", "48")


@pytest.mark.parametrize("split", ["unseen_names", "unseen_sets"])
def test_composed_queries_ask_for_the_thing_with_the_word(package, tmp_path, split):
    build(package, tmp_path / "built")
    queries = pq.read_table(tmp_path / "built" / f"{split}_queries.parquet").to_pylist()
    gallery = pq.read_table(tmp_path / "built" / f"{split}_gallery.parquet").to_pylist()
    assert len(queries) > 5
    pictures = {row["image"]["bytes"] for row in gallery}
    for query in queries:
        shown = [gallery[place] for place in query["choices"]]
        assert shown[0] is gallery[query["target"]] and shown[0]["concepts"] == query["concepts"]
        assert concept_of([*query["reference_text"].split(), query["text"]]) == query["concepts"]
        assert query["image"]["bytes"] not in pictures
        # Ten pictures of ten things; each is what it is said to be.
        assert len({row["concept"] for row in shown}) == len(shown) == 10 == len(query["names"])
        base = concept_of(query["reference_text"].split())
        for name, row in zip(query["names"][1:], shown[1:], strict=True):
            words = row["text"].split()
            assert name != "reference" or row["concept"] == base
            assert name != "words alone" or query["text"] in words
            assert name != "other change" or concept_of(words[:-1]) == base
    assert {query["kind"] for query in queries} <= {"within", "across"}
