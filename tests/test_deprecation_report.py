"""deprecation_report.py: which deprecations are ours, where they are shown, and what fails by them."""

import sys

import pytest

LIBRARY = {
    # warns of its caller, as it should; of itself; in a helper; when imported
    "library/__init__.py": """
        import warnings

        def renamed(**options):
            warnings.warn("`old` is renamed", FutureWarning, stacklevel=2)

        def going():
            warnings.warn("going() goes", DeprecationWarning)

        def through_a_helper():
            going()

        def not_deprecated():
            warnings.warn("strange numbers", UserWarning)
    """,
    "library/old_place.py": """
        import warnings

        warnings.warn("library.old_place has moved", DeprecationWarning)
    """,
    "other/__init__.py": """
        import library

        def used_by_ours():
            library.renamed(old=1)
            library.going()
    """,
}
OURS = """
import library
import other

def asks_by_its_old_name():
    library.renamed(old=1)

def calls():
    library.through_a_helper()

def imports():
    import library.old_place

def not_ours():
    other.used_by_ours()
    library.not_deprecated()
"""
TESTS = """
import ours

def test_names(): ours.asks_by_its_old_name()
def test_names_again(): ours.asks_by_its_old_name()
def test_calls(): ours.calls()
def test_imports(): ours.imports()
"""


@pytest.fixture
def project(pytester):
    """A library, a package that uses it, our file and its tests, with the plugin and setup.cfg's filters."""
    for name, text in LIBRARY.items():
        path = pytester.path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[8:] for line in text.splitlines()))
    folder = pytester.path / "src"
    folder.mkdir()
    (folder / "ours.py").write_text(OURS)
    filters = ("default", "error:::ours", "default::DeprecationWarning", "default::FutureWarning")
    pytester.makeini(
        f"[pytest]\npythonpath = {folder} {pytester.path / 'site'}\ndeprecations_of = {folder}\n"
        + "\n    ".join(("filterwarnings =", *filters))
    )
    pytester.makepyfile(test_ours=TESTS)
    yield pytester
    for name in ("ours", "other", "library", "library.old_place", "test_ours"):
        sys.modules.pop(name, None)


def run(project, *options):
    return project.runpytest_subprocess("-p", "deprecation_report", *options)


@pytest.fixture(autouse=True)
def importable(monkeypatch, root):
    monkeypatch.setenv("PYTHONPATH", str(root / "tests"))


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_they_are_listed_by_our_line_and_fail_nothing(project, options):
    done = run(project, *options)
    done.assert_outcomes(passed=4, warnings=4)
    assert done.ret == 0
    told = done.stdout.str().partition("deprecated, and called by us")[2]
    line = {name: 1 + OURS.splitlines().index(f"    {name}") for name in (
        "library.renamed(old=1)", "library.through_a_helper()", "import library.old_place")}  # fmt: skip
    first, second, third = line.values()
    assert f"ours.py:{first}: FutureWarning: `old` is renamed" in told
    assert f"ours.py:{second}: DeprecationWarning: going() goes" in told
    assert f"ours.py:{third}: DeprecationWarning: library.old_place has moved" in told
    assert told.count("first in test_ours.py::") == 3 and told.count("is renamed") == 1


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_they_fail_the_run_where_it_is_asked_for(project, options):
    done = run(project, "--fail-on-deprecations", *options)
    done.assert_outcomes(passed=4, warnings=4)
    assert done.ret == 1 and "deprecated, and called by us" in done.stdout.str()
    ignored = [f"-W=ignore:{text}" for text in ("`old` is renamed", "going() goes", "library.old_place has moved")]
    assert run(project, "--fail-on-deprecations", *options, *ignored).ret == 0


def test_what_another_package_calls_is_not_ours(project):
    project.makepyfile(test_ours="import ours\n\ndef test_it(): ours.not_ours()\n")
    done = run(project, "--fail-on-deprecations")
    done.assert_outcomes(passed=1, warnings=3)
    assert done.ret == 0 and "deprecated, and called by us" not in done.stdout.str()


def test_a_failed_test_stays_one(project):
    project.makepyfile(test_ours="import ours\n\ndef test_it(): ours.calls(); assert False\n")
    done = run(project)
    done.assert_outcomes(failed=1, warnings=1)
    assert done.ret == 1
