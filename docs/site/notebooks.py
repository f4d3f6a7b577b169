"""The notebooks of docs/notebooks: scripts in jupytext's percent format, and pages that hold what came out of them.

    python docs/site/notebooks.py [NAME ...]     runs them in an empty folder, and writes NAME.md and its pictures

A cell of lines `# !oner ...` or `# !python ...` is a shell's. Jupyter opens the scripts with jupytext, and the site
has each as .ipynb. Run here and not by nbclient: a page is Markdown, for the site and for GitHub, and needs no kernel.
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
LANGUAGES = {"code": "python", "shell": "bash"}
MOST = 30  # lines of an output that a page shows
LONGEST = 240  # letters of a line
WIDEST = 760  # pixels of a picture


class Cell(NamedTuple):
    """
    Attributes:
        kind: "markdown", "code" or "shell".
        text: As a reader sees it, without the script's comment signs.
    """

    kind: str
    text: str


def cells(script: Path) -> list[Cell]:
    """Those of a script in order. Raises `ValueError` for text before the first."""
    before, *parts = re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.M)
    if before.strip():
        raise ValueError(f"{script}: expected '# %%' first, got {before.strip()[:40]!r}")
    return [_cell(*part.split("\n", 1)) for part in parts]


def _cell(head: str, body: str) -> Cell:
    lines = body.strip("\n").split("\n")
    if head.strip() == "[markdown]":
        return Cell("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    if all(line.startswith("# !") for line in lines):
        return Cell("shell", "\n".join(line.removeprefix("# !") for line in lines))
    return Cell("code", "\n".join(lines))


def run(script: Path, pictures: Path) -> Iterator[tuple[Cell, str, str | None]]:
    """Each cell with what it printed or gave, and the name of the picture that it gave; in the working folder."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    number = 0
    for cell in cells(script):
        said, value = io.StringIO(), None
        with contextlib.redirect_stdout(said):
            if cell.kind == "shell":
                for line in cell.text.split("\n"):
                    print(shell(shlex.split(line)), end="")
            elif cell.kind == "code":
                value = execute(cell.text, namespace, str(script))
        if (drawn := picture_of(value)) is None:
            yield cell, said.getvalue() + ("" if value is None else f"{value}\n"), None
            continue
        number += 1
        name = f"{script.stem}-{number}.jpg"
        drawn.thumbnail((WIDEST, 2 * WIDEST))
        drawn.save(pictures / name, quality=80)
        yield cell, said.getvalue(), name


def picture_of(value: Any) -> Image.Image | None:
    """What Jupyter would show as a picture: Pillow's, and matplotlib's figures."""
    if hasattr(value, "savefig"):
        file = io.BytesIO()
        value.savefig(file, format="png", dpi=120)
        value = Image.open(file)
    return value.convert("RGB") if isinstance(value, Image.Image) else None


def execute(code: str, namespace: dict[str, Any], name: str) -> Any:
    """Runs a cell; the value of its last line, if that is an expression."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def shell(words: list[str]) -> str:
    """What a command prints: `oner` in this process, for speed, `python` in its own. Raises `RuntimeError`."""
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True).stdout
    from oner_command_line import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(words[1:])
    if words[0] != "oner" or status not in (0, 1):  # 1: the doctor has found something
        raise RuntimeError(f"{shlex.join(words)} ended with {status}")
    return said.getvalue()


def shortened(output: str, place: str) -> str:
    """An output as a page shows it: no path of this machine, and of a long one the beginning and the end."""
    lines = output.replace(place + "/", "").replace(str(ROOT) + "/", "").strip("\n").split("\n")
    lines = [line for line in lines if "[WARNING]" not in line]  # of other libraries' loggers
    if len(lines) > MOST:
        lines = [*lines[: MOST // 2], "...", *lines[-MOST // 2 :]]
    return "\n".join(line.rstrip()[:LONGEST] for line in lines)


def page(script: Path, pictures: Path, place: str) -> str:
    """Markdown of a script that is run in `place`, the working folder, with what came out."""
    parts = []
    for cell, output, picture in run(script, pictures):
        fence = LANGUAGES.get(cell.kind)
        parts.append(cell.text if fence is None else f"```{fence}\n{cell.text}\n```")
        if output.strip():
            parts.append(f"```text\n{shortened(output, place)}\n```")
        if picture is not None:
            parts.append(f"![What the lines above draw](pictures/{picture})")
    return "\n\n".join(parts) + "\n"


def notebook(script: Path) -> str:
    """The script as .ipynb, without outputs."""
    made = []
    for number, cell in enumerate(cells(script)):
        text = "\n".join(f"!{line}" for line in cell.text.split("\n")) if cell.kind == "shell" else cell.text
        own = {"cell_type": "markdown"} if cell.kind == "markdown" else {
            "cell_type": "code", "execution_count": None, "outputs": []
        }  # fmt: skip
        made.append({**own, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main() -> None:
    """Runs those that are named, or all, each in a folder of its own."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py")):
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            Path("examples").symlink_to(ROOT / "examples")
            text = page(FOLDER / f"{name}.py", FOLDER / "pictures", place)
            os.chdir(ROOT)
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
        print(f"docs/notebooks/{name}.md", flush=True)


if __name__ == "__main__":
    main()
