"""Provenance of a model: its training data, with attribution and licence, and the models that it was trained from.

An export writes it to `results/provenance.json`, and exports of models trained from this one read it there. The file
also lists the digests of all exported files, so that a later export to the same directory can tell them from a user's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import cached_file

from .digests import sha256_of
from .public import plain

PROVENANCE = "results/provenance.json"
ON_THE_HUB = "hf://datasets/"
# attribution file of models exported before provenance.json existed
ATTRIBUTION = "ATTRIBUTION.md"
# names used by the export, which an attribution file may not have
RESERVED = {"README.md", "config.json", "digests.json", "results", "pictures", "previous"}


@dataclass(frozen=True)
class Origins:
    """
    Attributes:
        models: Names of the models that the training started from, for the card's `base_model`.
        data: An entry for each training set: name, licence, attribution, and which of `models` was trained on it.
        makers: Name of an attribution file -> its content.
    """

    models: tuple[str, ...] = ()
    data: tuple[Mapping[str, Any], ...] = ()
    makers: Mapping[str, bytes] = field(default_factory=dict)


def read_origins(
    sources: Iterable[str | Path] = (),
    data: Sequence[Mapping[str, Any] | str] = (),
    attributions: Iterable[str | Path] = (),
) -> Origins:
    """
    Reads the provenance at the start of a run, while the sources exist, for the export at its end.

    Args:
        sources: Models that the training starts from: directories, files, or names on the Hub.
        data: The training sets of this run.
        attributions: Files that name the creators of these data.

    Raises:
        ValueError: a file of makers cannot be read, or has a name that an export needs; a model that is neither a
            directory nor has a name as on the Hub, such as that of a run that has not ended.
    """
    # attribution of the run's own data, under the names given in `data`
    makers: dict[str, bytes] = {}
    for file in map(Path, attributions):
        if file.name in RESERVED or file.suffix in (".safetensors", ".json", ".py"):
            raise ValueError(f"attribution is {file}; expected a name that model directories do not use, "
                             f"such as {ATTRIBUTION}")  # fmt: skip
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"attribution is {file}, which cannot be read: {error}") from error
        if makers.setdefault(file.name, content) != content:
            raise ValueError(f"attribution names two files {file.name}; expected different names")
    entries = [{"name": one} if isinstance(one, str) else dict(one) for one in data]

    # the data of the models, each with its own attribution file
    models = []
    for source in dict.fromkeys(map(str, sources)):
        name, inherited, files = _of_model(source)
        models.append(name)
        renamed = {}
        for file, content in files.items():
            # a file with the same name and other content gets the model's name as a prefix
            kept = file if makers.get(file, content) == content else f"{Path(name).name}-{file}"
            makers[kept] = content
            renamed[file] = kept
        for entry in inherited:
            given = dict(entry)
            if "attribution" in given:
                given["attribution"] = renamed.get(given["attribution"], given["attribution"])
            entries.append({**given, "by": given.get("by", name)})
    return Origins(tuple(models), tuple(plain(entries)), makers)


def attributions_of(directory: str | Path) -> dict[str, bytes]:
    """The attribution files of a model directory: name -> content."""
    return _of_model(str(directory))[2]


def _of_model(source: str) -> tuple[str, list[dict[str, Any]], dict[str, bytes]]:
    """The model's name, its data, and its attribution files."""
    if Path(source).is_file():
        return plain(Path(source).name), [], {}
    if not Path(source).is_dir() and not may_be_on_the_hub(source):
        raise ValueError(
            f"{source}: no such model; expected a directory, as a run leaves it at its end, a file, or a name on the "
            "Hub"
        )
    record = _read(source, PROVENANCE)
    told = json.loads(record) if record is not None else {}

    # exports made before provenance.json existed have only a card and an attribution file
    name = told.get("name") or (_name_on_card(source) if Path(source).is_dir() else source)
    entries = [dict(entry) for entry in told.get("data", [])]
    # names alone: copies are written under them, and a path could lead out of their directory
    for entry in entries:
        if entry.get("attribution"):
            entry["attribution"] = Path(entry["attribution"]).name
    files = {entry["attribution"] for entry in entries if entry.get("attribution")} | {ATTRIBUTION}
    makers = {file: content for file in sorted(files) if (content := _read(source, file)) is not None}
    if not entries:
        entries = [{"name": f"what {name} was trained on", **({"attribution": ATTRIBUTION} if makers else {})}]
    return plain(name), entries, makers


def _read(source: str, name: str) -> bytes | None:
    """A file of a model directory or Hub repository; None if it does not exist or the Hub cannot be reached."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path.read_bytes() if path.is_file() else None
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(source, name, **{f"_raise_exceptions_for_{kind}": False for kind in quiet})
    return None if found is None else Path(found).read_bytes()


def may_be_on_the_hub(name: str) -> bool:
    """Whether it has the form of a name there: `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _name_on_card(directory: str) -> str:
    card = Path(directory) / "README.md"
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("model_name") if card.is_file() else None
    return named or repository_name(directory)


def repository_name(directory: str | Path) -> str:
    """Name of a model directory: its own, or its run's if it is called `model`."""
    directory = Path(directory).resolve()
    return directory.parent.name if directory.name == "model" and directory.parent.name else directory.name


def check_repo_id(name: str | None) -> None:
    """Raises ValueError unless it is a valid name of a Hub repository."""
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {name!r}; expected `name` or `owner/name`, as on the Hub: {error}") from error


def base_models(origins: Origins) -> list[str]:
    """The models that a card's metadata can list: names of repositories, not files."""
    named = []
    for name in origins.models:
        if may_be_on_the_hub(name) and Path(name).suffix not in (".pt", ".pth", ".bin", ".safetensors", ".pkl"):
            named.append(name)
    return named


def hub_datasets(origins: Origins) -> list[str]:
    """Names of the data sets on the Hub; only those given as hf://datasets/..., since `owner/name` may be a folder."""
    places = [entry if isinstance(entry, str) else str(entry.get("name", "")) for entry in origins.data]
    paths = [place.removeprefix(ON_THE_HUB).split("/") for place in places if place.startswith(ON_THE_HUB)]
    return list(dict.fromkeys("/".join(parts[:2]).partition("@")[0] for parts in paths if len(parts) > 1))


def write_provenance(directory: Path, name: str, licence: str | None, origins: Origins) -> None:
    """Writes the provenance of an export, after all other files."""
    path = directory / PROVENANCE
    path.parent.mkdir(exist_ok=True)
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    record = {
        "name": name,
        "licence": licence,
        "base_models": list(origins.models),
        "data": list(origins.data),
        "files": {file.relative_to(directory).as_posix(): sha256_of(file) for file in files},
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def files_of(directory: Path) -> dict[str, str]:
    """
    File -> digest, as the export in `directory` wrote them, including provenance.json; empty if there is no record.
    """
    path = directory / PROVENANCE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {**dict(files), PROVENANCE: sha256_of(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_change(directory: Path, name: str) -> None:
    """Updates the digest of an exported file that one of our programs has changed."""
    path = directory / PROVENANCE
    if files_of(directory):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["files"][name] = sha256_of(directory / name)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
