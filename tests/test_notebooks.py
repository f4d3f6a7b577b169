"""docs/notebooks: scripts that run, and pages that are of these very scripts."""

import json
import re
import sys

import pytest
from docs_pages import ROOT, blocks_of

sys.path.insert(0, str(ROOT / "docs" / "site"))

import notebooks  # noqa: E402

SCRIPTS = sorted(notebooks.FOLDER.glob("*.py"))
NAMES = [script.stem for script in SCRIPTS]


def test_there_are_four():
    assert len(SCRIPTS) >= 4
    assert {path.stem for path in notebooks.FOLDER.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_of_its_script(name):
    """Change the script, and `python docs/site/notebooks.py NAME` writes the page anew."""
    page = f"docs/notebooks/{name}.md"
    shown = [block.text.strip() for block in blocks_of(page) if block.language in ("python", "bash")]
    assert shown == [cell.text for cell in notebooks.cells(notebooks.FOLDER / f"{name}.py") if cell.kind != "markdown"]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert all(cell.text in text for cell in notebooks.cells(notebooks.FOLDER / f"{name}.py"))
    assert "```text" in text and str(ROOT) not in text and "/tmp/" not in text


def test_pages_and_pictures_are_small_and_used():
    pictures = set()
    for path in notebooks.FOLDER.glob("*.md"):
        pictures |= set(re.findall(r"\]\(pictures/(.+?)\)", path.read_text(encoding="utf-8")))
    assert pictures == {path.name for path in (notebooks.FOLDER / "pictures").iterdir()}
    assert all(path.stat().st_size <= 100_000 for path in notebooks.FOLDER.rglob("*.*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_jupyter_reads(name):
    script = notebooks.FOLDER / f"{name}.py"
    made = json.loads(notebooks.notebook(script))
    assert made["nbformat"] == 4 and made["cells"][0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"]) == len(notebooks.cells(script))
    for cell, (kind, text) in zip(made["cells"], notebooks.cells(script), strict=True):
        assert "".join(cell["source"]).replace("!", "") == text.replace("!", "")
        assert cell["source"][0].startswith("!") or kind != "shell"


def test_cells_outputs_and_pictures(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(
        "# %% [markdown]\n# # Title\n#\n# words\n\n# %%\nfrom PIL import Image\nprint('said')\nx = 1\n\n"
        "# %%\nx + 1\n\n# %%\nImage.new('RGB', (2000, 100))\n\n# %%\n# !python -c 'print(3)'\n"
    )
    kinds = [cell.kind for cell in notebooks.cells(script)]
    assert kinds == ["markdown", "code", "code", "code", "shell"]
    outputs = [(output, picture) for _, output, picture in notebooks.run(script, tmp_path)]
    assert outputs == [("", None), ("said\n", None), ("2\n", None), ("", "small-1.jpg"), ("3\n", None)]
    assert (tmp_path / "small-1.jpg").is_file()
    shown = notebooks.page(script, tmp_path, str(tmp_path))
    assert shown.startswith("# Title\n\nwords\n\n```python\nfrom PIL") and "](pictures/small-1.jpg)" in shown
    script.write_text("x = 1\n")
    with pytest.raises(ValueError, match="expected '# %%' first"):
        notebooks.cells(script)


def test_a_long_output_is_cut_and_names_no_place(tmp_path):
    lines = "\n".join(f"{tmp_path}/{number} {ROOT}/x" for number in range(100))
    shown = notebooks.shortened(lines, str(tmp_path)).split("\n")
    assert len(shown) == notebooks.MOST + 1 and shown[0] == "0 x" and shown[-1] == "99 x"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    results = list(notebooks.run(notebooks.FOLDER / f"{name}.py", tmp_path))
    assert sum(bool(output or picture) for _, output, picture in results) >= 4
