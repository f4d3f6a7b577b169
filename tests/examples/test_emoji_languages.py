"""The embedded emoji in several languages, with names of a small made-up package."""

import io
import json
import sys
import tarfile

import pyarrow.parquet as pq
import pytest
from scenes_reader import SCENES

from oner import open_rows

sys.path.insert(0, str(SCENES))

import emoji_languages  # noqa: E402

LETTERS = {"de": "äöüçaeb", "th": "กขคีู่อ", "hi": "कखगीूेि"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The builder's folder; one concept has no name in German."""
    folder = tmp_path_factory.mktemp("languages")
    table = pq.read_table(SCENES / "emoji" / "train.parquet", columns=["hexcode", "name"])
    table2 = pq.read_table(SCENES / "emoji" / "test_concept.parquet", columns=["hexcode", "name"])
    english = {row["hexcode"]: row["name"] for row in (*table.to_pylist(), *table2.to_pylist())}
    lacking = sorted(english)[0]
    with tarfile.open(folder / "names.tgz", "w:gz") as archive:
        for language in ("en", *LETTERS):
            entries = []
            for number, (hexcode, name) in enumerate(sorted(english.items())):
                letters = LETTERS.get(language)
                label = name if letters is None else "".join(letters[int(digit) % 7] for digit in f"{number:05}")
                tags = [] if number % 5 == 0 else [label.upper(), f"{label} {label}", "third", "fourth"]
                if (language, hexcode) != ("de", lacking):
                    entries.append({"hexcode": hexcode + "-FE0F", "label": f"{label}, otherwise", "tags": tags})
            text = json.dumps(entries).encode()
            member = tarfile.TarInfo(f"package/{language}/data.json")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    emoji_languages.main([str(folder), "--package", str(folder / "names.tgz"), "--languages", "en", *LETTERS])
    return folder, lacking


def test_each_row_has_its_captions_in_every_language(built):
    folder, lacking = built
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    assert lacking not in {row["hexcode"] for row in rows} and len(rows) > 6000
    for row in rows[:300]:
        each = [row[f"captions_{language}"] for language in ("en", *LETTERS)]
        assert row["captions_all"] == [text for texts in each for text in texts] and len(row["captions_all"]) == 8
        for name, more in each:
            assert "otherwise" not in name and more in (name, f"{name}, {name} {name}, third")
    assert not any(row["vendor"] == "streamline" for row in pq.read_table(folder / "test_concept.parquet").to_pylist())
    assert len(open_rows(str(folder / "train.parquet"), "pairs", None, "captions_all", "hexcode")) == len(rows)
    with pytest.raises(ValueError, match="no language 'xx'"):
        emoji_languages.main([str(folder), "--package", str(folder / "names.tgz"), "--languages", "en", "xx"])
