"""Prompt templates and class names for zero-shot classification, read from the JSON files in `data/`.

A template holds one "{}" where the class name goes. A class is one name, or a list of synonyms whose prompts are
averaged together (SLIP). Class names are in the order of the data set's label numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parent / "data"
ClassName = str | Sequence[str]


def _read(path: Path, what: str, known: Sequence[str]) -> dict:
    if not path.is_file():
        raise ValueError(f"unknown {what}; known: {', '.join(known)}, or the path of a JSON file")
    return json.loads(path.read_text(encoding="utf-8"))


def template_sets() -> list[str]:
    """Names that `load_templates` knows."""
    return sorted(_read(DATA / "templates.json", "templates", ()))


def load_templates(name: str) -> list[str]:
    """Templates by the name of a shipped set, or from a JSON file that holds a list of strings.

    Raises:
        ValueError: an unknown name, or a template without exactly one "{}".
    """
    # a shipped name takes precedence over a file of that name
    shipped = _read(DATA / "templates.json", "templates", ())
    if name in shipped:
        return list(shipped[name]["templates"])
    return check_templates(_read(Path(name), f"templates {name!r}", sorted(shipped)))


def usual_templates(class_names: str | None) -> str:
    """The templates that belong to a set of class names: CIFAR's own, else SLIP's of ImageNet.

    For None, classes are named by captions, which are used unchanged: "a photo of a" before an emoji's name would add
    words that the model has never read.
    """
    if class_names is None:
        return "name"
    return "cifar" if class_names in ("cifar10", "cifar100") else "slip"


def check_templates(templates: Sequence[str]) -> list[str]:
    """Checks templates and returns them as a list. Raises ValueError for one without exactly one "{}"."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates must be a list of at least one string, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f'a template must hold exactly one "{{}}", got {template!r}')
    return list(templates)


def class_name_sets() -> list[str]:
    """Names that `load_class_names` knows."""
    return sorted(path.stem.removeprefix("class_names_") for path in DATA.glob("class_names_*.json"))


def load_class_names(name: str) -> list[ClassName]:
    """Class names by the name of a shipped set (cifar10, cifar100, imagenet), or from a JSON file with a list.

    Raises:
        ValueError: an unknown name, or a file that holds something else.
    """
    # a shipped name wins over a file of that name
    known = class_name_sets()
    path = DATA / f"class_names_{name}.json" if name in known else Path(name)

    # shipped files contain the source of the names beside the list
    content = _read(path, f"class names {name!r}", known)
    names = content["names"] if isinstance(content, dict) else content
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} must hold a list of class names, got {type(names).__name__}")
    return names


def fill(templates: Sequence[str], name: ClassName) -> list[str]:
    """Every template with every synonym of a class."""
    synonyms = [name] if isinstance(name, str) else list(name)
    # `replace`, not `format`, since names may contain braces
    return [template.replace("{}", synonym) for template in templates for synonym in synonyms]
