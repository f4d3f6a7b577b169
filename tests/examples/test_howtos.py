"""The Python of the how-tos runs as written, from a folder that holds photo.png and the examples."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_repository import emoji_rows

ROOT = Path(__file__).resolve().parents[2]
HOWTOS = [
    "howto_ecosystem",
    # it exports three graphs
    pytest.param("howto_onnx", marks=pytest.mark.slow),
]
NEEDS = ("sentence_transformers", "onnxruntime", "onnxscript")


@pytest.mark.parametrize("name", HOWTOS)
def test_snippets_run(name, emoji_folder, tmp_path, monkeypatch):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert snippets
    (tmp_path / "photo.png").write_bytes(emoji_rows(emoji_folder)[0]["image"]["bytes"])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        lacking = [package for package in NEEDS if package in snippet and find_spec(package) is None]
        if not lacking:
            exec(compile(snippet, f"{name}.md", "exec"), {"__name__": "__main__"})
