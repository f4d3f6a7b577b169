"""A trained model as a Hub repository: export to a directory, push the directory.

The directory is complete as it stands. It loads after `import oner` without any flag, and with transformers alone
and `trust_remote_code=True`, because the code files travel with the weights and `config.json` names a class for
every auto class. What to name is read from transformers' own registries, where `oner/__init__.py` put it; so a new
family needs no line here.
"""

import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from oner.training.private_names import registered_models

from .model_card import model_card, plain, slug
from .model_loading import write_digests

MODEL_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForSequenceClassification",
)
# a model of one of these may hold the heads of several tasks; any other is fine-tuned for its own
GENERAL = ("AutoModel", "AutoModelForPreTraining")
Picture = Image.Image | str | Path | Any  # Any: a matplotlib Figure, which this module does not import


def reference(cls: type) -> str:
    """How an `auto_map` names a class: `file.Class`, since all code files lie flat in the repository."""
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def model_classes(config: transformers.PreTrainedConfig) -> dict[str, type]:
    """Auto class → class registered for this configuration.

    Raises ValueError if none is, as for a model that came from `trust_remote_code=True`.
    """
    registered = {}
    for name in MODEL_AUTO_CLASSES:
        mapping = registered_models(getattr(transformers, name))
        if type(config) in mapping:
            registered[name] = mapping[type(config)]
    if "AutoModel" not in registered:
        raise ValueError(
            f"{type(config).__module__}.{type(config).__name__} is not registered with AutoModel, so its code cannot "
            "travel with the weights; `import oner` first and load the model without trust_remote_code"
        )
    return registered


def pipeline_classes(model: PreTrainedModel) -> dict[str, tuple[type, list[str]]]:
    """
    Task → (pipeline class, names of its auto classes): the registered pipelines that are not transformers' own, that
    serve the family, and that find all they read in this model's weights. Others would read heads drawn at random.
    """
    config = model.config
    classes = {}
    known = {}  # auto class -> a model of it without weights, made once
    for task, entry in PIPELINE_REGISTRY.to_dict().items():
        implementation = entry["impl"]
        auto_classes = entry["pt"]

        # only pipelines that came with a family
        if not isinstance(implementation, type) or implementation.__module__.startswith("transformers."):
            continue

        # and of their models those that this family has and these weights fill
        for auto in auto_classes:
            if type(config) not in registered_models(auto):
                continue
            if auto not in known:
                with torch.device("meta"):
                    known[auto] = auto.from_config(copy.deepcopy(config))
            if serves(model, known[auto], implementation):
                classes.setdefault(task, (implementation, []))[1].append(auto.__name__)
    return classes


def serves(model: PreTrainedModel, wanted: PreTrainedModel, implementation: type) -> bool:
    """Whether the weights of `model` make the model `wanted` that a pipeline needs; a pipeline with
    `reads_heads = False` needs those of the tower only."""
    # some pipelines need methods that only one family's models have
    if any(not hasattr(wanted, method) for method in getattr(implementation, "model_methods", ())):
        return False
    if type(model) is type(wanted):
        return True

    # another class of the family: every weight must be there, under the same name and of the same shape
    general = [cls for name, cls in model_classes(model.config).items() if name in GENERAL]
    tower_only = not getattr(implementation, "reads_heads", True)
    return type(model) in general and weights_of(wanted, tower_only) <= weights_of(model)


def weights_of(model: PreTrainedModel, tower_only: bool = False) -> set[tuple[str, torch.Size]]:
    """The weights of `model` as (name without the tower's prefix, shape)."""
    tower = f"{model.base_model_prefix}."
    state = {name: value.shape for name, value in model.state_dict().items()}
    if tower_only:
        state = {name: shape for name, shape in state.items() if name.startswith(tower)}
    return {(name.removeprefix(tower), shape) for name, shape in state.items()}


def copy_code(classes: Sequence[type], directory: Path) -> list[str]:
    """Copies the files that define `classes`, and what these import from their own folders, flat into `directory`.

    Raises ValueError if two different files would get the same name.
    """
    # file name -> where it comes from; a file that several classes share comes once
    copied: dict[str, Path] = {}
    for cls in classes:
        source = sys.modules[cls.__module__].__file__
        for file in map(Path, [source, *get_relative_import_files(source)]):
            earlier = copied.setdefault(file.name, file.resolve())
            if earlier != file.resolve():
                raise ValueError(f"two code files share the name {file.name}: {earlier} and {file.resolve()}")

    # after every name has been checked
    for name, file in copied.items():
        shutil.copyfile(file, directory / name)
    return sorted(copied)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def merge_json(path: Path, **entries: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | entries)


def stored_weights(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor] | None:
    """The state with its parameters cast to `dtype`; None for as they are. Buffers keep their precision.

    Raises OverflowError if a weight does not fit, since an infinite weight would only show at the next load.
    """
    if dtype is None:
        return None
    # tied weights are one storage under several names
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # one copy for tied weights, which save must recognise
    state = {}
    for name, tensor in model.state_dict().items():
        if name in parameters and tensor.is_floating_point():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in cast:
                cast[key] = tensor.to(dtype)
                if torch.isfinite(tensor).all() and not torch.isfinite(cast[key]).all():
                    raise OverflowError(f"{name} has a weight of {tensor.abs().max():.3g}, too large for {dtype}")
            tensor = cast[key]
        state[name] = tensor
    return state


def write_code(model: PreTrainedModel, directory: Path, processor: ProcessorMixin | None = None) -> list[str]:
    """
    Code files, the full `auto_map` and `custom_pipelines` beside saved weights; returns the pipeline tasks.

    transformers' own `save_pretrained` lists only the class that was saved. `processor`: that of the family if none.
    """
    # auto class -> file and class in the repository
    models = model_classes(model.config)
    pipelines = pipeline_classes(model)
    processors = processor_classes(model.config, processor)
    auto_map = {"AutoConfig": reference(type(model.config))}
    auto_map |= {name: reference(cls) for name, cls in models.items()}
    processor_map = {name: reference(cls) for name, cls in processors.items()}

    # the files of all of them, and the entries that name them
    copy_code(
        [type(model.config), *models.values(), *processors.values(), *(cls for cls, _ in pipelines.values())],
        directory,
    )
    offered = {task: {"impl": reference(cls), "pt": names} for task, (cls, names) in pipelines.items()}
    merge_json(directory / "config.json", auto_map=auto_map | processor_map, custom_pipelines=offered)

    # the image processor is read from its own entry inside the processor's file
    path = directory / "processor_config.json"
    if path.is_file():
        nested = json.loads(path.read_text(encoding="utf-8")).get("image_processor", {})
        merge_json(path, auto_map=processor_map, image_processor=nested | {"auto_map": processor_map})
    return list(pipelines)


def processor_classes(config: transformers.PreTrainedConfig, processor: ProcessorMixin | None) -> dict[str, type]:
    """Auto class → class, of a processor, or of the one registered for this configuration; {} if there is none."""
    if processor is not None:
        return {"AutoProcessor": type(processor), "AutoImageProcessor": type(processor.image_processor)}
    if type(config) not in PROCESSOR_MAPPING:
        return {}
    images = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
    return {"AutoProcessor": PROCESSOR_MAPPING[type(config)], "AutoImageProcessor": images}


def write_pictures(pictures: Mapping[str, Picture], directory: Path) -> dict[str, str]:
    """Saves each picture as PNG; returns caption → path inside the repository.

    Raises TypeError for what is neither a PIL image, a figure nor a path, ValueError if two captions give one name.
    """
    written = {}
    for caption, picture in pictures.items():
        path = Path("pictures") / f"{slug(caption)}.png"
        if path.as_posix() in written.values():
            raise ValueError(f"two pictures would both be {path}; the second is captioned {caption!r}")

        # whatever can be drawn becomes a PNG
        target = directory / path
        target.parent.mkdir(exist_ok=True)
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as image:
                image.save(target, format="PNG")
        elif isinstance(picture, Image.Image):
            picture.save(target, format="PNG")
        elif hasattr(picture, "savefig"):
            picture.savefig(target, format="png", bbox_inches="tight", dpi=120)
        else:
            raise TypeError(
                f"picture {caption!r} is a {type(picture).__name__}, expected a PIL image, a Figure, a path"
            )
        written[caption] = path.as_posix()
    return written


def check_replaceable(directory: Path) -> None:
    """Raises FileExistsError unless `directory` is new, empty or an earlier export: it is going to be replaced."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, expected a directory to export into")
    names = {entry.name for entry in directory.iterdir()}
    if names and not {"config.json", "README.md"} <= names:
        raise FileExistsError(f"{directory} holds something else than an exported model ({sorted(names)[:5]})")


def move_into_place(finished: Path, directory: Path) -> None:
    """Renames `finished` to `directory`; a reader sees the old export or the new one, never a mixture."""
    if not directory.exists():
        os.replace(finished, directory)
        return

    # a directory cannot be renamed over another that is not empty: the old one is moved aside first
    old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
    os.replace(directory, old / directory.name)
    os.replace(finished, directory)
    shutil.rmtree(old)


def export_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    directory: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | str | None = None,
    training_config: Mapping[str, Any] | None = None,
    data: Sequence[Mapping[str, Any] | str] | None = None,
    pictures: Mapping[str, Picture] | None = None,
    license: str = "apache-2.0",
    dtype: torch.dtype | None = None,
    repo_id: str | None = None,
) -> Path:
    """Writes `model` and `processor` as a complete Hub repository and returns its path.

    - metrics: `set/metric` → value, shown in the card's table, its metadata and `results/metrics.json`.
    - protocol: what the metrics mean: split, checkpoint, resolution, templates, seed.
    - data: one entry per training set, a name or a mapping (name, rows, licence, ...).
    - pictures: caption → PIL image, matplotlib figure, or path; stored in `pictures/`.
    - dtype: precision in the file, such as `torch.float16` for half its size. The configuration keeps the model's
      own precision, so a plain `from_pretrained` computes in that one.
    - repo_id: the name that the card's snippets use; the directory's name by default.

    Everything is written beside `directory` and renamed into place. Raises FileExistsError if `directory` holds
    something that is no export, ValueError if the model's classes are not registered, OverflowError if a weight
    does not fit into `dtype`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a PreTrainedModel (unwrapped)")
    directory = Path(directory).absolute()
    check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that renaming stays on one file system
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        scratch.chmod(0o755)
        model.save_pretrained(scratch, state_dict=stored_weights(model, dtype))
        processor.save_pretrained(scratch)
        tasks = write_code(model, scratch, processor)
        paths = write_pictures(pictures or {}, scratch)

        # what was measured, and by what training
        (scratch / "results").mkdir()
        if metrics is not None:
            write_json(scratch / "results" / "metrics.json", {"metrics": plain(metrics), "protocol": plain(protocol)})
        if training_config is not None:
            write_json(scratch / "results" / "training_config.json", plain(training_config))

        # the page that says all of it
        computed = str(model.dtype).removeprefix("torch.")
        card = model_card(
            model,
            repo_id or directory.name,
            metrics=metrics,
            protocol=protocol,
            training_config=training_config,
            data=data,
            pictures=paths,
            tasks=tasks,
            license=license,
            stored_dtype=str(dtype or model.dtype).removeprefix("torch."),
            compute_dtype=computed,
        )
        card.save(scratch / "README.md")

        # digests last, of files that no longer change
        write_digests(scratch)
        for file in scratch.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for the owner's eyes only
        move_into_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Uploads an exported directory as the Hub repository `repo_id` (made if needed); returns the commit's address.

    Raises FileNotFoundError if the directory is not a complete export.
    """
    # nothing is uploaded that would not load
    directory = Path(directory)
    missing = [
        name for name in ("config.json", "processor_config.json", "README.md") if not (directory / name).is_file()
    ]
    if not list(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise FileNotFoundError(f"{directory} is no exported model, it lacks {', '.join(missing)}; see export_model")

    # one commit for all files
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
    return commit.commit_url
