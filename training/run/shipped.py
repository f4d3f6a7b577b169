"""What ships with the package: configurations by name, and a small checkpoint to begin with."""

from pathlib import Path

# a wheel has them beside this room, a checkout among its examples
ROOM = Path(__file__).resolve().parents[2]
FOLDERS = (ROOM, ROOM / "examples")
CHECKPOINT = "oner-emoji"


def shipped_config(name: str) -> Path | None:
    """The file of a configuration that ships, `oner_emoji` or `oner_emoji.yaml`."""
    stem = name.removesuffix(".yaml")
    return next((path for one in FOLDERS if (path := one / "configs" / f"{stem}.yaml").is_file()), None)


def shipped_checkpoint() -> Path:
    """The directory of the checkpoint that a search or a run begins with. Raises `FileNotFoundError`."""
    for folder in FOLDERS:
        if (path := folder / "checkpoints" / CHECKPOINT / "config.json").is_file():
            return path.parent
    raise FileNotFoundError(
        f"the checkpoint {CHECKPOINT} is not among {[str(one / 'checkpoints') for one in FOLDERS]}: name a model "
        f"directory or a model on the Hub, or train a small one with `make demo`"
    )
