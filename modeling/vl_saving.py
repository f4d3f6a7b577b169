"""The files that a saved model needs besides its weights, so that every saved repository loads.

transformers copies the code of the saved class only. A repository also needs the family's other classes, its
processor and its pipelines. If `oner` is installed, it writes them all; otherwise the code that came with the weights
is copied.
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
# digests of the repository's files, which a save invalidates
DIGESTS = "digests.json"
# files of the processor, copied from the model's origin
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


class SavedWhole:
    """Must come before `PreTrainedModel` among a family's bases; the configuration is a `VisionLanguageConfig`."""

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        directory = Path(save_directory)
        writes = args[0] if args else kwargs.get("is_main_process", True)
        # an adapter is saved without a config.json and needs no code
        if writes and (directory / "config.json").is_file():
            (directory / DIGESTS).unlink(missing_ok=True)
            if self.config.write_code is None:
                take_code_along(self.config, directory)
            else:
                self.config.write_code(self, directory)
            take_processor_along(self.config, directory)

        # only once the directory is complete
        if push_to_hub:
            known = ("commit_message", "private", "token", "revision", "create_pr")
            told = {name: value for name, value in kwargs.items() if name in known}
            self.push_to_hub(kwargs.get("repo_id", directory.name), **told)


def take_code_along(config: PreTrainedConfig, directory: Path) -> None:
    """Copies the code files that a saved config.json names from the model's origin; removes names without a file."""
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))

    # auto class -> file.Class, prefixed with the repository's name for a model from the Hub
    auto_map = {}
    for auto, reference in values.get("auto_map", {}).items():
        if isinstance(reference, str) and _take(reference.rpartition("--")[2], config, directory):
            auto_map[auto] = reference.rpartition("--")[2]

    # task -> file.Class of the pipeline
    pipelines = {}
    for task, entry in values.get("custom_pipelines", {}).items():
        if _take(entry["impl"].rpartition("--")[2], config, directory):
            pipelines[task] = {**entry, "impl": entry["impl"].rpartition("--")[2]}
    values |= {"auto_map": auto_map} | ({"custom_pipelines": pipelines} if pipelines else {})
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def take_processor_along(config: PreTrainedConfig, directory: Path) -> None:
    """Copies the processor files of the model's origin, unless present; a processor saved later replaces them."""
    for name in PROCESSOR_FILES:
        source = None if (directory / name).exists() else find_origin(config, name)
        if source is not None:
            shutil.copyfile(source, directory / name)


def find_origin(config: PreTrainedConfig, name: str) -> Path | None:
    """A file of the directory or Hub repository that a configuration was loaded from; None if it is not there."""
    if not config.name_or_path:
        return None
    # code from the Hub is in a folder named after its commit; otherwise only cached files are used
    commit = HERE.name if re.fullmatch("[0-9a-f]{40}", HERE.name) else None
    try:
        return Path(cached_file(config.name_or_path, name, revision=commit, local_files_only=commit is None))
    except OSError:
        return None


def _take(reference: str, config: PreTrainedConfig, directory: Path) -> bool:
    """Copies the file of `file.Class` and all files that it imports; False, with a warning, if one is missing."""
    waiting = [reference.partition(".")[0]]
    seen = set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        target = directory / f"{module}.py"

        # from this file's folder, or from the model's origin
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
