"""What is built and installed: the wheel holds the data files, metadata agree, dependencies are declared."""

import ast
import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# import name → distribution name, where they differ
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open_clip_torch"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def declared(text: str) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in text.split("\n") if line.strip()}


def third_party(folder: Path) -> dict[str, str]:
    """Top-level modules that the files under `folder` import, and one file that does."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                name = module.split(".")[0]
                if name not in sys.stdlib_module_names and name != "oner":
                    found[DISTRIBUTIONS.get(name, name).lower().replace("_", "-")] = path.name
    return found


def test_every_import_is_a_declared_dependency(setup):
    core = declared(setup["options"]["install_requires"])
    extras = {name for text in setup["options.extras_require"].values() for name in declared(text)}
    for room in ("modeling", "processing", "training", "oner"):
        undeclared = {name: file for name, file in third_party(ROOT / room).items() if name not in core | extras}
        assert not undeclared, f"{room} imports what setup.cfg does not name: {undeclared}"


def test_portable_rooms_need_core_dependencies_only(setup):
    core = declared(setup["options"]["install_requires"])
    for room in ("modeling", "processing"):
        assert third_party(ROOT / room).keys() <= core


def test_bounds_hold_in_this_environment_and_nothing_is_pinned(setup):
    from importlib.metadata import PackageNotFoundError, version

    checked = 0
    for text in [setup["options"]["install_requires"], *setup["options.extras_require"].values()]:
        for requirement in map(Requirement, filter(None, text.split("\n"))):
            assert {specifier.operator for specifier in requirement.specifier} == {">="}, f"{requirement}"
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                continue
            assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}, have {installed}"
            checked += 1
    assert checked >= 15


def constraints(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = map(Requirement, (line for line in lines if line and not line.startswith("#")))
    return {requirement.name: requirement for requirement in found}


def test_bounds_are_the_lowest_releases_that_are_tried(setup):
    """And what `make test` installs lies within them; both name every direct dependency of the tests, and no other.

    But for two that these bring, and whose newest do not work beside the oldest of these.
    """
    texts = [
        setup["options"]["install_requires"],
        *(setup["options.extras_require"][name] for name in ("plots", "test")),
    ]
    bounds = {one.name: one for text in texts for one in map(Requirement, filter(None, text.split("\n")))}
    lowest, tested = constraints("lowest"), constraints("tested")
    assert lowest.keys() - {"pandas", "typer"} == tested.keys() == bounds.keys()
    for name, bound in bounds.items():
        (pin,) = tested[name].specifier
        assert pin.operator == "==" and bound.specifier.contains(pin.version), f"{tested[name]} for {bound}"
        assert str(lowest[name].specifier) == str(bound.specifier).replace(">=", "=="), f"{lowest[name]} for {bound}"


def test_versions_agree():
    import oner

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.M).group(1) == oner.__version__
    assert f"## {oner.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_pattern_of_package_data_names_a_file(setup):
    places = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().split("\n"))
    for package, text in setup["options.package_data"].items():
        above, _, name = package.rpartition(".")
        folder = ROOT / places[package] if package in places else ROOT / places[above] / name
        for pattern in filter(None, text.split("\n")):
            assert [path for path in folder.glob(pattern) if path.is_file()], f"{package}: {pattern}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the tracked tree → source archive → wheel, with the installed setuptools: no network."""
    import shutil

    folder = tmp_path_factory.mktemp("build")
    names = ["modeling", "processing", "training", "oner", "examples", "tests", ".ci", "constraints"]
    names += [path.name for path in ROOT.iterdir() if path.is_file()]
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / "tree" / name)
    command = "from setuptools import build_meta as b; import sys; print(b.{}('{}'))"
    subprocess.run(
        [sys.executable, "-c", command.format("build_sdist", folder)],
        cwd=folder / "tree",
        check=True,
        capture_output=True,
    )
    archive = next(folder.glob("*.tar.gz"))
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    subprocess.run(
        [sys.executable, "-c", command.format("build_wheel", folder)], cwd=unpacked, check=True, capture_output=True
    )
    return unpacked, next(folder.glob("*.whl"))


BESIDE = {path.name for path in ROOT.glob("oner_*.py")}


def files_of(room: str) -> set[str]:
    """Files of a room that must be installed: everything but caches."""
    paths = (path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT / room).as_posix() for path in paths if path.suffix != ".pyc"}


def test_wheel_holds_every_file_of_every_room(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    for room in ("modeling", "processing", "training"):
        missing = {f"oner/{room}/{name}" for name in files_of(room)} - names
        assert not missing, missing
    assert {"oner/__init__.py", "oner/py.typed", *BESIDE} <= names and not any(
        name.startswith(("examples", "tests")) for name in names
    )


def test_wheel_holds_what_ships(built):
    """Configurations by name, and the checkpoint that a run on a folder begins with."""
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    configs = {path for path in files_of("examples/configs")}
    checkpoint = {name for name in files_of("examples/checkpoints/oner-emoji") if "/" not in name}
    assert {f"oner/configs/{name}" for name in configs} <= names
    assert {f"oner/checkpoints/oner-emoji/{name}" for name in checkpoint} <= names
    assert "model.safetensors" in checkpoint and built[1].stat().st_size < 15e6


def test_source_archive_is_complete(built):
    unpacked = built[0]
    for name in ("Makefile", "LICENSE", "setup.cfg", "constraints/tested.txt", ".ci/run", "tests/conftest.py"):
        assert (unpacked / name).is_file(), name
    assert {f"examples/{name}" for name in files_of("examples")} == {
        path.relative_to(unpacked).as_posix() for path in (unpacked / "examples").rglob("*") if path.is_file()
    }


def test_wheel_imports_from_anywhere(built, tmp_path):
    """The installed package, not the checkout, serves `import oner` and its data files."""
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__name__', '').startswith('_Edit')]\n"
        "import oner, oner.training.publishing.model_card as card\n"
        "assert oner.__file__.startswith(sys.argv[1]) and card.__file__.startswith(sys.argv[1]), oner.__file__\n"
        "assert card.TEMPLATE.is_file()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
