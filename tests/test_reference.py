"""Every public name is documented and in the reference; mkdocs.yml names pages that there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "site"))

import commands_page  # noqa: E402
import public_names  # noqa: E402

import oner  # noqa: E402
import oner.modeling  # noqa: E402
import oner.processing  # noqa: E402
import oner_run_options  # noqa: E402
from oner_command_line import COMMANDS  # noqa: E402

PLACES = public_names.everything()


def test_every_name_of_the_package_is_in_the_reference():
    shown = {name for names in public_names.by_page().values() for name in names}
    assert {f"oner.{name}" for name in oner.__all__} <= shown
    # what `oner` has already stands there under its shorter name
    for room in (oner.modeling, oner.processing):
        own = {name for name in room.__all__ if name not in oner.__all__}
        assert {f"{room.__name__}.{name}" for name in own} <= shown


def test_the_source_says_what_importing_says():
    assert list(public_names.top_level()) == list(oner.__all__)
    for place, public in PLACES.items():
        module, name = public.rsplit(".", 1)
        if module in ("oner", "oner.modeling", "oner.processing"):
            found = getattr(sys.modules[module], name)
            assert getattr(found, "__module__", f"oner.{place.rsplit('.', 1)[0]}").startswith("oner."), public
            assert public_names.definition(place) is not None or not isinstance(found, type) or found.__doc__


@pytest.mark.parametrize("place", [place for place in PLACES if public_names.definition(place) is not None])
def test_a_public_class_or_function_has_a_docstring(place):
    assert public_names.first_sentence(place), f"oner.{place} has no docstring"


def test_the_page_of_commands_has_all_of_them_and_their_options():
    text = commands_page.text()
    for name, command in COMMANDS.items():
        assert f"## oner {name}\n" in text
        if not command.is_run:
            options = [one for action in command.parser(name)._actions for one in action.option_strings]
            assert all(f"{option}" in text for option in options)
    for group in oner_run_options.run_options().values():
        assert all(f"| `{option.name}` |" in text for option in group)


def test_the_navigation_and_llms_txt_name_pages_that_there_are():
    pages = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    listed = re.findall(r"\]\(([\w/.]+\.md)\)", (ROOT / "docs/llms.txt").read_text(encoding="utf-8"))
    assert len(pages) > 20 and len(listed) > 15
    for page in (*pages, *listed):
        assert page.startswith("reference/") or (ROOT / "docs" / page).is_file(), page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """As `make docs`; where its extra is installed."""
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "site/reference/oner.html").read_text(encoding="utf-8")
    assert 'id="oner.modeling.modeling_oner.OneRModel"' in page
