"""The public names of the package and where each is defined, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"OneR": "OneR", "Simla": "SIMLA", "Codis": "CODIS", "Momo": "MoMo", "DiscreteVAE": "Image tokenizer"}
# of wings without a list of public names: those that a program of a user's own has a use for
MORE = {
    "training.evaluation.attention": ["attention_maps", "attention_sheet"],
    "training.evaluation.gap": ["embed_rows", "gap_figure", "gap_measures"],
    "training.evaluation.localization": ["localization_sheet", "similarity_maps"],
    "training.evaluation.relevance": ["masked_maps", "relevance_sheet"],
    "training.evaluation.reranking": ["RerankingEvaluator"],
    "training.evaluation.retrieval": ["MultimodalRetrievalEvaluator", "RetrievalEvaluator"],
    "training.evaluation.zero_shot": ["ZeroShotClassificationEvaluator"],
    "training.objectives.objective": ["Objective", "SinglePortion"],
    "training.publishing.hub": ["export_model", "push_to_hub"],
    "training.publishing.shipped": ["find_model", "shipped_checkpoint"],
    "training.run.arguments": ["DataArguments", "ModelArguments", "RunArguments"],
}


@cache
def tree(module: str) -> ast.Module:
    """The syntax of a module by its name below the repository, such as `modeling.modeling_oner`."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def literal(module: str, name: str) -> list | dict:
    """What a module assigns to a name; nothing if it does not."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return ast.literal_eval(node.value)
    return []


def imported(module: str) -> dict[str, str]:
    """Name -> dotted path of its definition, of what a package takes from its own files."""
    found = {}
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            # the rooms stand beside oner/ in a checkout
            inside = "" if module == "oner" and node.module.split(".")[0] != "registration" else f"{module}."
            for alias in node.names:
                found[alias.name] = f"{inside}{node.module}.{alias.name}"
    return found


def top_level() -> dict[str, str]:
    """`oner.__all__`: name -> definition."""
    taken, rooms = imported("oner"), imported("modeling")
    return {name: rooms.get(name, taken[name]) for name in literal("oner", "__all__")}


def modeling() -> dict[str, str]:
    """`oner.modeling.__all__`."""
    taken = imported("modeling")
    return {name: taken[name] for name in literal("modeling", "__all__")}


def processing() -> dict[str, str]:
    """`oner.processing.__all__`, whose names are imported when they are used."""
    files = literal("processing", "_FILES")
    return {name: f"processing.{files[name]}.{name}" for name in literal("processing", "__all__")}


def training() -> dict[str, str]:
    """What the modules of `oner.training` list as public, and `MORE`."""
    found = {}
    for path in sorted((ROOT / "training").glob("*/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in (literal(module, "__all__") or []) + MORE.get(module, []):
            found[f"{module}.{name}"] = f"{module}.{name}"
    return found


def everything() -> dict[str, str]:
    """Definition -> public path of every public name."""
    found = {}
    for prefix, names in (
        ("oner.training", training()), ("oner.processing", processing()), ("oner.modeling", modeling()),
        ("oner", top_level()),
    ):  # fmt: skip
        for name, place in names.items():
            found[place] = f"oner.{place}" if prefix == "oner.training" else f"{prefix}.{name}"
    return found


def definition(place: str) -> ast.AST | None:
    """The class or function at a dotted path; none where it is a value."""
    module, name = place.rsplit(".", 1)
    found = [node for node in tree(module).body if getattr(node, "name", None) == name]
    return found[0] if found else None


def first_sentence(place: str) -> str:
    """The first paragraph of a docstring on one line, or nothing."""
    node = definition(place)
    text = ast.get_docstring(node) if node is not None else None
    return " ".join((text or "").split("\n\n")[0].split())


def page_of(place: str) -> str:
    """The title of the page that a definition is described on."""
    room, name = place.split(".")[0], place.rsplit(".", 1)[1]
    if room == "modeling":
        fits = [title for start, title in FAMILIES.items() if name.upper().startswith(start.upper())]
        return fits[0] if fits else "Image tokenizer"
    if room == "training":
        wings = {"evaluation": "Evaluation and sheets", "conversion": "Conversion"}
        return wings.get(place.split(".")[1], "Training and publishing")
    return "Search and pipelines" if "ipeline" in name or "ndex" in name else "Rows and processors"


def by_page() -> dict[str, dict[str, str]]:
    """Title of a page -> its names: what each is called there -> the path that mkdocstrings is given."""
    titles = [*FAMILIES.values(), "Search and pipelines", "Rows and processors", "Evaluation and sheets",
              "Training and publishing", "Conversion"]  # fmt: skip
    found: dict[str, dict[str, str]] = {title: {} for title in titles}
    for place, public in sorted(everything().items(), key=lambda pair: pair[1].lower()):
        found[page_of(place)][public] = f"oner.{place}"
    return {title: names for title, names in found.items() if names}


def slug(title: str) -> str:
    """A title as a file's name."""
    return re.sub(r"\W+", "_", title.lower())


def overview() -> str:
    """A page that lists every public name with the first sentence of its docstring."""
    return "\n".join(_overview())


def _overview() -> Iterator[str]:
    yield "# Reference\n"
    yield "Every public name. [Commands](commands.md) lists what is done from a shell.\n"
    for title, names in by_page().items():
        yield f"## [{title}]({slug(title)}.md)\n"
        for public, path in names.items():
            said = first_sentence(path.removeprefix("oner."))
            yield f"- [`{public}`]({slug(title)}.md#{path})" + (f": {said}" if said else "")
        yield ""
