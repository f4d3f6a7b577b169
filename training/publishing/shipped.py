"""Finds shipped configurations and checkpoints by name, and the directory of a named model."""

import difflib
from pathlib import Path

# a wheel has them beside this package, a checkout in its examples
ROOM = Path(__file__).resolve().parents[2]
FOLDERS = (ROOM, ROOM / "examples")
CHECKPOINT = "oner-emoji"


def shipped_config(name: str) -> Path | None:
    """The file of a shipped configuration, `oner_emoji` or `oner_emoji.yaml`; None if there is none."""
    stem = name.removesuffix(".yaml")
    return next((path for one in FOLDERS if (path := one / "configs" / f"{stem}.yaml").is_file()), None)


def shipped_checkpoint(name: str = CHECKPOINT) -> Path:
    """
    The directory of a shipped checkpoint, by default the one that searches and runs start from. A wheel contains only
    this one, a checkout those in examples/checkpoints. Raises `FileNotFoundError`, which lists the available ones.
    """
    if (found := _checkpoints().get(name)) is not None:
        return found
    there = f"available: {', '.join(sorted(_checkpoints()))}" if _checkpoints() else "there are no others"
    raise FileNotFoundError(
        f"the checkpoint {name} is not in {[str(one / 'checkpoints') for one in FOLDERS]}; {there}. Give a model "
        f"directory or a model on the Hub, or train a small model with `make demo`"
    )


def find_model(name: str | Path) -> str:
    """
    The directory of a model, given the directory itself, its run's, or the name of a shipped one (`oner-emoji`); any
    other name is returned unchanged, since it may be on the Hub.
    """
    place = Path(name)
    if (place / "model" / "config.json").is_file():
        return str(place / "model")
    return str(name if place.exists() else _checkpoints().get(str(name), name))


def meant(name: str | Path, neighbours: bool = True) -> str:
    """What a model that is not there may have been, one that ships or a neighbour, as the end of a message."""
    folder = Path(name).parent
    there = [str(folder / one.name) for one in folder.iterdir()] if neighbours and folder.is_dir() else []
    close = difflib.get_close_matches(str(name), [*_checkpoints(), *there], 1)
    return f"; did you mean {close[0]}?" if close else ""


def _checkpoints() -> dict[str, Path]:
    """Shipped model directories by name; the wheel's own folder takes precedence."""
    places = [path.parent for one in FOLDERS for path in sorted(one.glob("checkpoints/*/config.json"))]
    return {place.name: place for place in reversed(places)}
