"""The house's rules, read from the syntax trees of the source files.

Rooms: modeling, processing, training, oner, examples; beside them oner_command_line.py and what it reads.
`modeling` and `processing` travel to the Hub inside every published model, so the rules for them are those of
transformers' copying of code. What does not travel has wings: `processing/data` and those of `training`, whose imports
run one way.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PORTABLE = ("modeling", "processing")
ROOMS = (*PORTABLE, "training", "oner", "examples")
MAY_IMPORT = {
    "modeling": set(),
    "processing": set(),
    "processing/data": {"processing"},
    "training": {"modeling", "processing", "training"},
    "oner": {"modeling", "processing", "training", "oner"},
    "examples": {"modeling", "processing", "training", "oner"},
    # they import the module of a command once it is known which
    "oner_command_line.py": set(),
    "oner_evaluate_options.py": set(),
    "oner_run_options.py": set(),
    "oner_search_options.py": set(),
    "oner_serve_options.py": set(),
}
# a wing of training imports those that stand before it
BELOW_ALL_WINGS = {"private_names"}
WINGS = (
    "parallel",
    "publishing",
    "evaluation",
    "conversion",
    "objectives",
    "run",
    "tasks",
    "cost",
    "doctor",
    "commands",
)
BESIDE = sorted(ROOT.glob("oner_*.py"))
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + BESIDE
PORTABLE_FILES = [path for path in FILES if path.parent.name in PORTABLE and path.parent.parent == ROOT]
# where processes talk to each other; and the launcher, which catches what torchrun raises
# the second counts memory by one of its private tools, the third starts processes
MAY_NAME_DISTRIBUTED = {"training/parallel/distributed.py", "training/private_names.py", "examples/launch.py"}
MAX_LINES, MAX_FUNCTION_LINES = 500, 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def each(files: list[Path]):
    return pytest.mark.parametrize("path", files, ids=map(name_of, files))


def rooms_imported(path: Path, tree: ast.Module) -> set[str]:
    """Rooms that a file imports, absolutely (`oner.training.objectives.losses`) or relatively (`from .losses`)."""
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
            if node.module == "oner":
                names = [f"oner.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and room_of(path) == "oner":
            names = [f"oner.{node.module or node.names[0].name}"]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "oner":
                second = rest.split(".")[0]
                rooms.add(second if second in ROOMS else "oner")
            elif first in ("modeling", "processing", "training", "examples"):
                rooms.add(f"bare {first}")
    return rooms


def test_rules_cover_the_source():
    assert len(PORTABLE_FILES) >= 4 and {room_of(path) for path in FILES} >= {"modeling", "processing", "training"}


@each(FILES)
def test_imports_follow_the_rooms(path):
    """Rule 1: modeling and processing import nothing of oner, training imports those two, examples import oner."""
    imported = rooms_imported(path, ast.parse(path.read_text(encoding="utf-8")))
    folder = path.parent.relative_to(ROOT).as_posix()
    forbidden = imported - MAY_IMPORT.get(folder, MAY_IMPORT[room_of(path)])
    assert not forbidden, f"{name_of(path)} may not import {sorted(forbidden)}"


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def modules_imported(path: Path) -> set[str]:
    """`training.run.engine` and so on: what a file imports of the rooms, at any depth of it."""
    modules, folder = set(), module_of(path).rsplit(".", 1)[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.level == 1:
                modules.add(f"{folder}.{node.module}")
            elif node.module.startswith("oner."):
                module = node.module.removeprefix("oner.")
                modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return modules


def test_every_wing_is_named():
    found = {path.name for path in (ROOT / "training").iterdir() if (path / "__init__.py").is_file()}
    assert found == set(WINGS)


@each([path for path in FILES if room_of(path) == "training" and path.parent.name in WINGS])
def test_arrows_between_wings_run_one_way(path):
    before = WINGS[: WINGS.index(path.parent.name) + 1]
    wings = {module.split(".")[1] for module in modules_imported(path) if module.startswith("training.")}
    wings -= BELOW_ALL_WINGS
    assert wings <= set(before), f"{name_of(path)} may not import {sorted(wings - set(before))}"


@each(PORTABLE_FILES)
def test_portable_files_import_their_own_folder_flat(path):
    """`from .x import y` at the top of the module, of a file that is there: all that the Hub's copying follows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    for node in relative:
        assert node.level == 1 and node.module and "." not in node.module, (
            f"{name_of(path)}:{node.lineno} must read `from .x import y`"
        )
        assert (path.parent / f"{node.module}.py").is_file(), f"{name_of(path)}:{node.lineno}: no {node.module}.py"
        assert node in tree.body, f"{name_of(path)}:{node.lineno}: relative imports stand at the top of the module"


@each(PORTABLE_FILES)
def test_copying_sees_the_same_imports(path):
    """transformers finds relative imports by regular expression, in docstrings too: it must find the real ones."""
    from transformers.dynamic_module_utils import get_relative_imports

    tree = ast.parse(path.read_text(encoding="utf-8"))
    real = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert set(get_relative_imports(path)) == real


def test_no_circles():
    """Imports between the files of a room form no circle, at any depth."""
    files = {module_of(path): path for path in FILES}
    graph = {module: modules_imported(path) & files.keys() for module, path in files.items()}
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        assert node not in trail, "import circle: " + " → ".join([*trail[trail.index(node) :], node])
        if node in graph and node not in done:
            for target in sorted(graph[node]):
                visit(target, [*trail, node])
            done.add(node)

    for node in graph:
        visit(node, [])


def test_basenames_are_unique_across_portable_rooms():
    """Rule 2: in a published model the files of both rooms lie flat in one folder."""
    names = [path.name for path in PORTABLE_FILES if path.name != "__init__.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_portable_rooms_are_flat():
    nested = [path for room in PORTABLE for path in (ROOT / room).rglob("*.py") if path.parent != ROOT / room]
    assert not [name_of(path) for path in nested if path.parent != ROOT / "processing" / "data"]


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").glob("*.py")), ids=lambda p: p.name)
def test_modeling_annotations_are_objects(path):
    """`config: OneRConfig` sets config_class only if it is an object, which the future import prevents."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, `.c` when it starts with something else than a name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}


def reads_environment(node: ast.AST) -> bool:
    """`os.environ`, `os.getenv`, and `from os import` of either."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in {*ENVIRONMENT, "*"} for alias in node.names)
    return isinstance(node, ast.Attribute) and dotted(node) in {
        f"{os}.{n}" for os in ("os", "_os") for n in ENVIRONMENT
    }


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from os import environ", True),
        ("from os import path, getenv as g", True),
        ("from os import *", True),
        ("import os\nx = os.environ['HOME']", True),
        ("import os as _os\nx = _os.getenv('HOME')", True),
        ("from os import path", False),
        ("from mine import environ", False),
    ],
)
def test_the_environment_is_seen(source, found):
    assert any(map(reads_environment, ast.walk(ast.parse(source)))) is found


@each(FILES)
def test_nothing_dangerous(path):
    """Rule 3: no pickle, no weights_only=False, no eval or exec, the environment only in arguments.py."""
    tree, name = ast.parse(path.read_text(encoding="utf-8")), name_of(path)
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', '?')}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            roots = {module.split(".")[0] for module in modules}
            assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, where
            distributed = any(module.startswith("torch.distributed") for module in modules) or (
                isinstance(node, ast.ImportFrom)
                and node.module == "torch"
                and any(alias.name == "distributed" for alias in node.names)
            )
            assert not distributed or name in MAY_NAME_DISTRIBUTED, f"{where}: torch.distributed"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in ("eval", "exec", "builtins.eval", "builtins.exec"), f"{where}: {called}"
            unsafe = [k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", None) is False]
            assert not unsafe, f"{where}: weights_only=False"
            loads_pickle = called == "torch.load" and not any(k.arg == "weights_only" for k in node.keywords)
            assert not loads_pickle, f"{where}: torch.load without weights_only=True"
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", None) for k in node.keywords), where
        if isinstance(node, ast.Attribute):
            if dotted(node).startswith("torch.distributed"):
                assert name in MAY_NAME_DISTRIBUTED, f"{where}: torch.distributed"
        assert not reads_environment(node) or name == "training/run/arguments.py", f"{where}: environment"


@each(FILES)
def test_sizes(path):
    """Rule 4: no file above 500 lines, no function of 60 lines or more besides its docstring."""
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES, f"{name_of(path)} has {source.count(chr(10))} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented and len(node.body) > 1 else node.body
            lines = node.end_lineno - body[0].lineno + 1
            assert lines < MAX_FUNCTION_LINES, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"


@each(FILES)
def test_no_banners_or_leftovers(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(r"#.*\b(TODO|FIXME|XXX)\b|#\s*[-=*#]{4,}", line), f"{name_of(path)}:{number}: {line}"
