"""The files that a saved model needs besides its weights: every way of saving writes a repository that loads.

transformers copies the code of the class that is saved. A repository offers more: the family's other classes, its
processor, its pipelines. Where `oner` is, it writes them all; where the code came with the weights, it goes along.
"""

import json
import re
import shutil
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

HERE = Path(__file__).parent
# vouches for the bytes of files, which a save replaces
DIGESTS = "digests.json"
# what texts and images are read by; a model that came with it takes it along
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


class SavedWhole:
    """Must come before `PreTrainedModel` among a family's bases; the configuration is a `VisionLanguageConfig`."""

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        directory = Path(save_directory)
        writes = args[0] if args else kwargs.get("is_main_process", True)
        # an adapter is saved without its model's configuration, and needs no code
        if writes and (directory / "config.json").is_file():
            (directory / DIGESTS).unlink(missing_ok=True)
            if self.config.write_code is None:
                take_code_along(self.config, directory)
            else:
                self.config.write_code(self, directory)
            take_processor_along(self.config, directory)

        # not before the directory is whole
        if push_to_hub:
            known = ("commit_message", "private", "token", "revision", "create_pr")
            told = {name: value for name, value in kwargs.items() if name in known}
            self.push_to_hub(kwargs.get("repo_id", directory.name), **told)


def take_code_along(config: PreTrainedConfig, directory: Path) -> None:
    """The code files that a saved config.json names, from where the model came; a name without its file goes."""
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))

    # auto class -> file.Class; of a model from the Hub with the name of its repository before it
    auto_map = {}
    for auto, reference in values.get("auto_map", {}).items():
        if isinstance(reference, str) and _take(reference.rpartition("--")[2], config, directory):
            auto_map[auto] = reference.rpartition("--")[2]

    # task -> file.Class of its pipeline
    pipelines = {}
    for task, entry in values.get("custom_pipelines", {}).items():
        if _take(entry["impl"].rpartition("--")[2], config, directory):
            pipelines[task] = {**entry, "impl": entry["impl"].rpartition("--")[2]}
    values |= {"auto_map": auto_map} | ({"custom_pipelines": pipelines} if pipelines else {})
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def take_processor_along(config: PreTrainedConfig, directory: Path) -> None:
    """What the model came with, where nothing of the name is there; a processor that is saved later replaces it."""
    for name in PROCESSOR_FILES:
        source = None if (directory / name).exists() else find_origin(config, name)
        if source is not None:
            shutil.copyfile(source, directory / name)


def find_origin(config: PreTrainedConfig, name: str) -> Path | None:
    """A file of the repository that a configuration came from, a directory or one on the Hub; None if it has none."""
    if not config.name_or_path:
        return None
    # code from the Hub lies in a folder of its commit's name; else only what was fetched before is looked at
    commit = HERE.name if re.fullmatch("[0-9a-f]{40}", HERE.name) else None
    try:
        return Path(cached_file(config.name_or_path, name, revision=commit, local_files_only=commit is None))
    except OSError:
        return None


def _take(reference: str, config: PreTrainedConfig, directory: Path) -> bool:
    """Copies the file of `file.Class` and all that it imports. False, with a warning, where one is not to be had."""
    waiting = [reference.partition(".")[0]]
    seen = set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        target = directory / f"{module}.py"

        # beside this very file, or where the model came from
        beside = HERE / target.name
        source = beside if beside.is_file() else find_origin(config, target.name)
        if source is None and not target.is_file():
            logger.warning(f"{directory} does not offer {reference}: {target.name} is not to be had")
            return False
        if source is not None and not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        waiting += [name for name in get_relative_imports(target) if name not in seen]
    return True


__all__ = ["SavedWhole"]
