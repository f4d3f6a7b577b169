"""What mkdocs is told beside mkdocs.yml: where the package's source is, and the pages that are made of it.

The reference is written from the source, which is read and never imported: neither torch nor transformers is needed to
build the site.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import commands_page  # noqa: E402
import notebooks  # noqa: E402
import public_names  # noqa: E402

ROOMS = ("modeling", "processing", "training")


def on_startup(command: str, dirty: bool) -> None:
    """Lays the package out as a wheel does, in build/api: in a checkout its rooms stand beside it."""
    target = ROOT / "build" / "api" / "oner"
    shutil.rmtree(target, ignore_errors=True)
    only_source = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(ROOT / "oner", target, ignore=only_source)
    for room in ROOMS:
        kept = shutil.ignore_patterns("__pycache__") if room == "processing" else only_source
        shutil.copytree(ROOT / room, target / room, ignore=kept)


def pages() -> Iterator[tuple[str, str, str]]:
    """Path, title and text of each page of the reference."""
    yield "reference/index.md", "Reference", public_names.overview()
    yield "reference/commands.md", "Commands", commands_page.text()
    for title, names in public_names.by_page().items():
        body = "\n\n".join(f"::: {path}" for path in names.values())
        yield f"reference/{public_names.slug(title)}.md", title, f"# {title}\n\n{body}\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Completes the navigation: the reference, and pages of docs/ that mkdocs.yml does not name."""
    sections = {title: entries for section in config.nav for title, entries in section.items()}
    sections["Reference"][:] = [{title: path} for path, title, _ in pages()]
    named = {path for entries in sections.values() for path in paths_of(entries)}
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name not in named:
            sections["How to" if page.name.startswith("howto_") else "Evidence"].append(page.name)
    return config


def paths_of(entries: str | list | dict) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(entries, str):
        yield entries
        return
    for entry in entries.values() if isinstance(entries, dict) else entries:
        yield from paths_of(entry)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Below the title of a notebook's page, where the notebook is."""
    folder, _, name = page.file.src_uri.rpartition("/")
    if folder != notebooks.FOLDER.name:
        return markdown
    title, rest = markdown.split("\n", 1)
    name = name.removesuffix(".md")
    return f"{title}\n[For Jupyter]({name}.ipynb), [as a script]({name}.py)\n\n{rest}"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name classes as transformers' do, [`OneRModel`]: here each becomes a link."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    places = {
        path.rsplit(".", 1)[1]: f"{public_names.slug(title)}.html#{path}"
        for title, names in public_names.by_page().items()
        for path in names.values()
    }

    def linked(found: re.Match) -> str:
        name = found[1]
        return f'<a href="{places[name]}"><code>{name}</code></a>' if name in places else f"<code>{name}</code>"

    return re.sub(r"\[<code>(\w+)</code>\]", linked, html)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is no file of docs/: the pages of the reference, and the notebooks as Jupyter reads them."""
    for path, _, text in pages():
        files.append(File.generated(config, path, content=text))
    for script in sorted(notebooks.FOLDER.glob("*.py")):
        path = f"{notebooks.FOLDER.name}/{script.stem}.ipynb"
        files.append(File.generated(config, path, content=notebooks.notebook(script)))
    return files
