"""Pages for readers, and what becomes of their blocks in tests/test_docs.py.

An HTML comment above a block, which a rendered page does not show, says it:

    (none)                          python: run, in one namespace from the top of the page to its end
    <!-- test: run ARGUMENTS -->    bash: every command is run, with ARGUMENTS behind it
    <!-- test: check FILES -->      bash: programs, files, targets, extras and arguments of each command exist, where
                                    FILES (apple.png) stand for what the reader has made before;
                                    python, of models that only a long run makes: it is read, not run
    <!-- test: file NAME -->        any: written as NAME into the folder where everything runs
    <!-- test: recorded -->         python: run, the Hub's API replaced by one that writes down what it is asked
    <!-- test: without oner -->     python: run in a process that cannot import oner
    <!-- test: needs PACKAGES -->   python: run where these packages of the extras are installed
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# those whose blocks are followed from top to bottom; of the others bash is checked and python compiled
FOLLOWED = (
    "README.md",
    "docs/getting_started.md",
    "docs/evaluation.md",
    "docs/families.md",
    "docs/howto_bigger_machines.md",
    "docs/howto_ecosystem.md",
    "docs/howto_finetune.md",
    "docs/howto_lora.md",
    "docs/howto_momo_stages.md",
    "docs/howto_onnx.md",
    "docs/howto_own_folder.md",
    "docs/howto_own_shards.md",
    "docs/howto_publish.md",
    "docs/howto_read_the_numbers.md",
    "docs/howto_resume.md",
    "docs/howto_search.md",
    "docs/howto_serve.md",
    "docs/howto_trainer.md",
    "docs/results.md",
    "docs/search.md",
    "docs/skill/SKILL.md",
    "docs/training.md",
)
# it exports three graphs, twice
SLOW = ("docs/howto_onnx.md",)
PAGES = sorted({*FOLLOWED, "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))})


class Block(NamedTuple):
    """
    Attributes:
        line: The number of its fence.
        directive: What the comment above it says; none is "".
    """

    line: int
    language: str
    directive: str
    text: str


def text_of(page: str) -> str:
    """A page by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page in order, those inside lists too."""
    text = text_of(page)
    pattern = re.compile(r"(?:^ *<!-- test: (.*?) -->\n)?^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)
    return [
        Block(
            text[: found.start(3)].count("\n") + 1,
            found[3],
            found[1] or "",
            re.sub(f"^{found[2]}", "", found[4], flags=re.M),
        )
        for found in pattern.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, continuation lines joined, comments gone."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.M | re.S)


def links_of(page: str) -> list[str]:
    """Targets of the links and pictures of a page that point into the repository."""
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose_of(page))


def headings_of(page: str) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title)).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def named_paths(page: str) -> list[str]:
    """Inline code that looks like a path of this repository."""
    tops = {entry.name for entry in ROOT.iterdir()} - {"runs", "build"}
    code = re.findall(r"`([\w./-]+)`", prose_of(page))
    return sorted({path for path in code if "/" in path and path.split("/")[0] in tops})
