"""What ships with the package, configurations and small checkpoints by name; and where a model lies that is named."""

from pathlib import Path

# a wheel has them beside this room, a checkout among its examples
ROOM = Path(__file__).resolve().parents[2]
FOLDERS = (ROOM, ROOM / "examples")
CHECKPOINT = "oner-emoji"


def shipped_config(name: str) -> Path | None:
    """The file of a configuration that ships, `oner_emoji` or `oner_emoji.yaml`."""
    stem = name.removesuffix(".yaml")
    return next((path for one in FOLDERS if (path := one / "configs" / f"{stem}.yaml").is_file()), None)


def shipped_checkpoint(name: str = CHECKPOINT) -> Path:
    """
    The directory of a checkpoint that ships; by default of the one that a search or a run begins with. A wheel has
    that alone, a checkout those in examples/checkpoints. Raises `FileNotFoundError`, which names those that are there.
    """
    if (found := _checkpoints().get(name)) is not None:
        return found
    there = f"those that do: {', '.join(sorted(_checkpoints()))}" if _checkpoints() else "and no other does"
    raise FileNotFoundError(
        f"the checkpoint {name} is not among {[str(one / 'checkpoints') for one in FOLDERS]}; {there}. Name a model "
        f"directory or a model on the Hub, or train a small one with `make demo`"
    )


def find_model(name: str | Path) -> str:
    """
    The directory of a model that is named by it, by the run that left it, or as one that ships (`oner-emoji`); else
    the name as it is, which the Hub may know.
    """
    place = Path(name)
    if (place / "model" / "config.json").is_file():
        return str(place / "model")
    return str(name if place.exists() else _checkpoints().get(str(name), name))


def _checkpoints() -> dict[str, Path]:
    """Model directories that ship, by name; those of the wheel's own folder first."""
    places = [path.parent for one in FOLDERS for path in sorted(one.glob("checkpoints/*/config.json"))]
    return {place.name: place for place in reversed(places)}
