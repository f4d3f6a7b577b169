"""The options of a run, read from the source of their dataclasses without importing them.

Importing `oner` takes seconds because it imports torch and transformers. Typos, wrong numbers, missing files
and `--help` are handled without it. Lines that pass here are parsed by `oner.training.run.parsing`, which decides.
"""

import argparse
import ast
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# installed, modeling/, processing/ and training/ are inside the package; in a checkout they are beside it
PACKAGES = HERE / "oner" if (HERE / "oner" / "training").is_dir() else HERE
CONFIGS = PACKAGES / "configs" if PACKAGES != HERE else HERE / "examples" / "configs"
RUN = PACKAGES / "training" / "run" / "arguments.py"
OBJECTIVES = PACKAGES / "training" / "objectives" / "objective.py"
TASKS = PACKAGES / "training" / "tasks" / "finetuning.py"
# dataclasses of every run, and the titles of their options in `--help-all`
KINDS = {
    "ModelArguments": "the model",
    "SourceArguments": "the data",
    "Crop": "cropping and augmentation of images",
    "Masking": "masking",
    "RunArguments": "the run",
}
# the options that `--help` shows, in groups
FIRST = {
    "data": ("train_data", "eval_data", "text_column", "id_column"),
    "model": ("config", "initial_model", "family", "size"),
    "training": ("epochs", "batch_size", "base_learning_rate", "mixed_precision"),
    "output and resuming": ("output_dir", "resume", "seed"),
}
NUMBERS = {"int": int, "float": float}


class Mistake(ValueError):
    """An error in what the user typed; the message says what and where, and suggests a correction."""


@dataclass(frozen=True)
class Option:
    """
    Attributes:
        kind: Type of its values: "int", "float", "str", "bool" or "dict", without `| None` and `list[]`.
        default: As written in the source.
        choices: Values of a Literal.
    """

    name: str
    kind: str
    help: str
    default: str
    choices: tuple[Any, ...] = ()
    many: bool = False


@dataclass
class Source:
    """The classes of a source file, and the files that it imports others from."""

    path: Path
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))

    def options_of(self, name: str) -> Iterator[Option]:
        """Options of a dataclass, those of its bases first, in whichever file they are."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                inherited = [one for base in node.bases for one in self.options_of(ast.unparse(base))]
                own = [_option(one) for one in node.body if isinstance(one, ast.AnnAssign) and _is_field(one)]
                # one that is declared again keeps its place
                yield from {one.name: one for one in [*inherited, *own]}.values()
            elif isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                yield from Source(self._file_of(node)).options_of(name)

    def value_of(self, name: str) -> ast.expr:
        """The value assigned to a name of the module."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in map(ast.unparse, targets):
                    return node.value
        raise KeyError(f"{self.path}: no {name}")

    def _file_of(self, node: ast.ImportFrom) -> Path:
        folder = self.path.parent if node.level else PACKAGES
        return folder.joinpath(*node.module.removeprefix("oner.").split(".")).with_suffix(".py")


def _is_field(node: ast.AnnAssign) -> bool:
    return "ClassVar" not in ast.unparse(node.annotation) and isinstance(node.value, ast.Call)


def _option(node: ast.AnnAssign) -> Option:
    # `dict | str | None` is a dict that a command line gives as text
    hint = ast.unparse(node.annotation).split(" | ")[0]
    many = hint.startswith("list[")
    hint = hint.removeprefix("list[").removesuffix("]") if many else hint
    choices = ast.literal_eval(f"({hint.removeprefix('Literal[')[:-1]},)") if hint.startswith("Literal[") else ()

    # field(default=..., metadata=_help("...")), or metadata={"help": "..."} and more
    told = {keyword.arg: keyword.value for keyword in node.value.keywords}
    texts = [one.value for one in ast.walk(told["metadata"]) if isinstance(one, ast.Constant)] if told else []
    text = max((one for one in texts if isinstance(one, str)), key=len, default="")
    default = ast.unparse(told["default"] if "default" in told else told["default_factory"]).removeprefix("lambda: ")
    return Option(node.target.id, "str" if choices else hint, text, default, choices, many)


def version() -> str:
    """Version of the package."""
    return ast.literal_eval(Source(HERE / "oner" / "__init__.py").value_of("__version__"))


def families() -> tuple[str, ...]:
    """Names of the families that can be trained."""
    return tuple(ast.literal_eval(Source(OBJECTIVES).value_of("OBJECTIVES")))


def tasks() -> tuple[str, ...]:
    """Names of the fine-tuning tasks."""
    return tuple(ast.literal_eval(Source(TASKS).value_of("TASKS")))


def run_options(family: str | None = None, task: str | None = None) -> dict[str, list[Option]]:
    """The options of a run in groups: of one family or of all, and with those of a task if one is named."""
    groups = {title: list(Source(RUN).options_of(kind)) for kind, title in KINDS.items()}
    for name, (module, _, arguments) in ast.literal_eval(Source(OBJECTIVES).value_of("OBJECTIVES")).items():
        if family in (None, name):
            groups[f"the losses of {name}"] = list(Source(_module(module)).options_of(arguments))
    if task is not None:
        groups[f"the task {task}"] = task_options(task)
    return groups


def task_options(task: str) -> list[Option]:
    """Options of a task's own dataclass."""
    module, name = ast.literal_eval(Source(TASKS).value_of("TASKS"))[task]
    source = Source(_module(module))
    told = {keyword.arg: keyword.value for keyword in source.value_of(name).keywords}
    return list(source.options_of(ast.unparse(told["arguments"])))


def _module(name: str) -> Path:
    return PACKAGES.joinpath(*name.removeprefix("oner.").split(".")).with_suffix(".py")


def given(line: Sequence[str]) -> dict[str, list[str]]:
    """`--name value ...` by name, spelled as in the dataclasses; words before the first name are under ""."""
    told: dict[str, list[str]] = {"": []}
    name = ""
    for word in line:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            told[name] = [value] if equals else []
        else:
            told[name].append(word)
    return told


def find_config(name: str) -> Path:
    """The file of this path, else the shipped configuration of this name. Raises `Mistake`."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise Mistake(f"--config {name}: no such file, and none of this name ships{meant(stem, shipped)}")


def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """The file's values over those of its bases; unreadable files are left to the parser to report."""
    import yaml  # of what is not in the standard library only this, and only here

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        base = values.pop("base", None)
        if base is None or depth > 20:
            return values
        beside = path.parent / str(base)
        merged = read_config(beside if beside.is_file() else find_config(str(base)), depth + 1)
        # the makers and terms of a base's data are not those of others
        if {"train_data", "portions"} & values.keys():
            merged = {name: value for name, value in merged.items() if name not in ("data_licence", "attribution")}
        return {**merged, **values}
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return {}


def check_nothing_more(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Raises `Mistake` for arguments that belong to no option."""
    if rest:
        raise Mistake(f"unknown arguments {list(rest)}{meant(rest[0].lstrip('-'), known, '--')}")


def check_line(line: Sequence[str], others: Sequence[str] = ()) -> None:
    """
    Names and values of a run's command line and of its file, as far as they can be told from the source.

    Args:
        others: Options that are not of the run.

    Raises:
        Mistake: the first that is wrong.
    """
    # the file, and with it family and task, which decide what there is
    told = given(line)
    file = find_config(told["config"][0]) if told.get("config") else None
    values = {} if file is None else read_config(file)
    task = _last(told, "task") or values.get("task")
    if task is not None and task not in tasks():
        raise Mistake(f"task {task!r} is none of {', '.join(tasks())}{meant(task, tasks())}")
    family = _last(told, "family") or values.get("family")
    if told.get("family") and family not in families():
        raise Mistake(f"--family {family} is none of {', '.join(families())}{meant(family, families())}")

    # names and values of the line, then of the file
    groups = run_options(family if family in families() else None, task)
    known = {option.name: option for group in groups.values() for option in group}
    check_names(line, known, (*others, "config", "task"))
    for name in values if family is None or family in families() else ():
        if name not in (*known, "task"):
            raise Mistake(f"{file}: there is no {name!r}{meant(name, known)}")
    _check_places(file, values, told)


def check_names(line: Sequence[str], known: dict[str, Option], others: Sequence[str] = ()) -> None:
    """Checks that each `--name` is known and that its values have the right type. Raises `Mistake`."""
    flags = [f"no_{option.name}" for option in known.values() if option.kind == "bool"]
    for name, words in given(line).items():
        if name and name not in (*known, *flags, *others):
            raise Mistake(f"there is no --{name}{meant(name, [*known, *others], '--')}")
        if name in known:
            _check_values(known[name], words)


def _check_values(option: Option, words: Sequence[str]) -> None:
    for word in words:
        if option.choices and word not in map(str, option.choices):
            expected = " or ".join(map(str, option.choices))
            raise Mistake(f"--{option.name} is {word!r}; expected {expected}{meant(word, map(str, option.choices))}")
        try:
            NUMBERS.get(option.kind, str)(word)
        except ValueError:
            raise Mistake(f"--{option.name} is {word!r}; expected {option.kind}") from None


def _check_places(file: Path | None, values: dict[str, Any], told: dict[str, list[str]]) -> None:
    """Checks for files of the repository that a shipped configuration names and that are missing here."""
    # what each portion is told for itself is asked for nowhere else
    portions = values.get("portions")
    own = [one for one in portions.values() if isinstance(one, dict)] if isinstance(portions, dict) else []
    missing = {}
    for name, value in [part for one in own or [{}] for part in {**values, **one}.items()]:
        for place in value if isinstance(value, list) else [value]:
            # the makers of its pairs are not those of others
            if name == "attribution" and {"train_data", "portions"} & told.keys():
                continue
            if name not in told and str(place).startswith("examples/") and not Path(place).exists():
                missing.setdefault(name, place)
    if missing:
        listed = ", ".join(f"{place} ({name})" for name, place in missing.items())
        options = " ".join(f"--{name}" for name in missing)
        raise Mistake(
            f"{file} names what only a checkout of the repository holds: {listed}; run in one, or give your own by "
            f"{options} (of lists, the bare option means none)"
        )


def _last(told: dict[str, list[str]], name: str) -> str | None:
    return told[name][-1] if told.get(name) else None


def meant(name: str, known: Any, dashes: str = "") -> str:
    """The nearest known name, as the end of a message."""
    close = difflib.get_close_matches(str(name), list(known), 1, 0.6)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def beside(path: str) -> str:
    """Suggestion for a path that does not exist."""
    folder = Path(path).parent
    names = [str(folder / one.name) for one in folder.iterdir()] if folder.is_dir() else []
    return meant(str(Path(path)), names)


def help_text(name: str, description: str, line: Sequence[str]) -> str:
    """The text of `oner NAME --help` or `--help-all`, for the family and the task named in the line."""
    told = given(line)
    family, task = _last(told, "family"), _last(told, "task")
    groups = run_options(family if family in families() else None, task if task in tasks() else None)
    options = {option.name: option for group in groups.values() for option in group}
    options["config"] = Option(
        "config", "str", "A YAML file with these options, or the name of a shipped one.", "None"
    )
    parser = argparse.ArgumentParser(
        prog=f"oner {name}",
        usage=f"oner {name} " + ("FOLDER [--name value ...]\n       oner train " if name == "train" else "")
        + "--config FILE [--name value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )  # fmt: skip

    # all by where they come from, or the few by what they are for
    shown = groups if "help_all" in told else {title: [options[one] for one in few] for title, few in FIRST.items()}
    if "help_all" not in told and task in tasks():
        shown[f"the task {task}"] = groups[f"the task {task}"]
    parts = [parser.format_help(), *(_group_text(title, group) for title, group in shown.items())]
    if "help_all" not in told:
        left = len(options) - sum(map(len, FIRST.values()))
        parts.append(f"--help-all lists the other {left}; a YAML file may set all of them.\n")
    return "\n".join(parts)


def _group_text(title: str, group: Sequence[Option]) -> str:
    """A group of the help, with its own parser: options of two families may have the same name."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    section = parser.add_argument_group(title)
    for option in group:
        section.add_argument(f"--{option.name}", **_shown(option))
    return parser.format_help()


def _shown(option: Option) -> dict[str, Any]:
    kind = "|".join(map(str, option.choices)) or {"dict": "JSON", "bool": ""}.get(option.kind, option.kind).upper()
    default = "" if option.default in ("None", "list", "False") else f" (default {option.default.strip(chr(39))})"
    text = (option.help + default).replace("%", "%%")
    if option.kind == "bool":
        return {"action": "store_true", "help": text}
    return {"metavar": kind + " ..." * option.many, "help": text}
