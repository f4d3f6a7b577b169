"""What a model is made from: its data, their makers and terms, and the models that its training began with.

An export writes it down in `results/provenance.json`, where the export of a model trained from it reads it again; and
the names and digests of its files, by which a later export into the same directory knows its own from a user's.
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
# where models from before there was one name their data's makers
ATTRIBUTION = "ATTRIBUTION.md"
# the export's own names, which no file of makers may take
RESERVED = {"README.md", "config.json", "digests.json", "results", "pictures", "previous"}


@dataclass(frozen=True)
class Origins:
    """
    Attributes:
        models: Names of the models that the training began with, for the card's `base_model`.
        data: An entry for each training set: name, licence, attribution, and by which of `models` it comes.
        makers: Name of a file that names makers -> its content.
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
    Reads now, while it is there, what an export will say at the end.

    Args:
        sources: Models that the training begins with: directories, files, or names on the Hub.
        data: What it is trained on itself.
        attributions: Files that name the makers of these data.

    Raises:
        ValueError: a file of makers cannot be read, or has a name that an export needs; a model that is neither a
            directory nor has a name as on the Hub, such as that of a run that has not ended.
    """
    # the makers of its own data, under the names that `data` says
    makers: dict[str, bytes] = {}
    for file in map(Path, attributions):
        if file.name in RESERVED or file.suffix in (".safetensors", ".json", ".py"):
            raise ValueError(f"attribution is {file}; expected a name that a model directory has no use for itself, "
                             f"such as {ATTRIBUTION}")  # fmt: skip
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"attribution is {file}, which cannot be read: {error}") from error
        if makers.setdefault(file.name, content) != content:
            raise ValueError(f"attribution names two files {file.name}; expected different names")
    entries = [{"name": one} if isinstance(one, str) else dict(one) for one in data]

    # and what comes with the models, each with its own file of makers
    models = []
    for source in dict.fromkeys(map(str, sources)):
        name, inherited, files = _of_model(source)
        models.append(name)
        renamed = {}
        for file, content in files.items():
            # another model's of the same name and other content gets the model's name
            kept = file if makers.get(file, content) == content else f"{Path(name).name}-{file}"
            makers[kept] = content
            renamed[file] = kept
        for entry in inherited:
            given = dict(entry)
            if "attribution" in given:
                given["attribution"] = renamed.get(given["attribution"], given["attribution"])
            entries.append({**given, "by": given.get("by", name)})
    return Origins(tuple(models), tuple(plain(entries)), makers)


def _of_model(source: str) -> tuple[str, list[dict[str, Any]], dict[str, bytes]]:
    """Its name, its data, and the files that name their makers."""
    if Path(source).is_file():
        return plain(Path(source).name), [], {}
    if not Path(source).is_dir() and not may_be_on_the_hub(source):
        raise ValueError(
            f"{source}: no such model; expected a directory, as a run leaves it at its end, a file, or a name on the "
            "Hub"
        )
    record = _read(source, PROVENANCE)
    told = json.loads(record) if record is not None else {}

    # an export from before there was a record has a card, and makers beside it
    name = told.get("name") or (_name_on_card(source) if Path(source).is_dir() else source)
    entries = told.get("data", [])
    files = {entry["attribution"] for entry in entries if entry.get("attribution")} | {ATTRIBUTION}
    makers = {file: content for file in sorted(files) if (content := _read(source, Path(file).name)) is not None}
    if not entries:
        entries = [{"name": f"what {name} was trained on", **({"attribution": ATTRIBUTION} if makers else {})}]
    return plain(name), entries, makers


def _read(source: str, name: str) -> bytes | None:
    """A file of a model directory or of a repository on the Hub; None if it has none, or the Hub is out of reach."""
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
    """What a model directory is called: by its own name, or its run's where that is `model`."""
    directory = Path(directory).resolve()
    return directory.parent.name if directory.name == "model" and directory.parent.name else directory.name


def check_repo_id(name: str | None) -> None:
    """Raises ValueError unless it is a name that a repository on the Hub can have."""
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {name!r}; expected `name` or `owner/name` as on the Hub: {error}") from error


def base_models(origins: Origins) -> list[str]:
    """Those of its models that can stand in the metadata of a card: names of repositories, no files."""
    named = []
    for name in origins.models:
        if may_be_on_the_hub(name) and Path(name).suffix not in (".pt", ".pth", ".bin", ".safetensors", ".pkl"):
            named.append(name)
    return named


def hub_datasets(origins: Origins) -> list[str]:
    """Names of those of its data that lie on the Hub; `owner/name` alone may as well be a folder."""
    places = [entry if isinstance(entry, str) else str(entry.get("name", "")) for entry in origins.data]
    paths = [place.removeprefix(ON_THE_HUB).split("/") for place in places if place.startswith(ON_THE_HUB)]
    return list(dict.fromkeys("/".join(parts[:2]).partition("@")[0] for parts in paths if len(parts) > 1))


def write_provenance(directory: Path, name: str, licence: str | None, origins: Origins) -> None:
    """The record of an export, last of all its files but the digests."""
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
    """File -> digest, as the export in `directory` wrote them; itself among them. Empty if it says nothing of that."""
    path = directory / PROVENANCE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {**dict(files), PROVENANCE: sha256_of(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_change(directory: Path, name: str) -> None:
    """Takes a file of the export as it is now for the export's own: one of our programs has changed it."""
    path = directory / PROVENANCE
    if files_of(directory):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["files"][name] = sha256_of(directory / name)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
