"""Exports a trained model as a directory, and uploads the directory as a Hub repository.

The directory is self-contained. It loads after `import oner` without any flag, and with transformers alone and
`trust_remote_code=True`, because it contains the code files, and `config.json` names a class for every auto class.
These classes come from transformers' registries, where `oner/__init__.py` registers them, so a new family needs no
change here.
"""

import copy
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

from .model_card import keep_evaluation, model_card, rename_card, slug
from .model_loading import write_digests
from .origins import PROVENANCE, Origins, check_repo_id, files_of, repository_name, write_provenance
from .placing import carry_over, check_replaceable, put_in_place, scratch_beside, set_modes
from .public import plain
from .sentence_files import write_sentence_files

MODEL_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForSequenceClassification",
)
# models of these classes may have the heads of several tasks; any other is fine-tuned for one task
GENERAL = ("AutoModel", "AutoModelForPreTraining")
# dtypes in which weights can be stored and loaded; a cast to integers would give zeros
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# JSON files of vocabularies, whose tokens may look like paths or secrets
VOCABULARIES = ("tokenizer.json", "vocab.json")
# files that `rename_card` changes
RENAMED = ("README.md", PROVENANCE)
# how a new repository is created
MODEL = {"repo_type": "model"}
SPACE = {"repo_type": "space", "space_sdk": "gradio"}
Picture = Image.Image | str | Path | Any  # Any: a matplotlib Figure, which this module does not import


def reference(cls: type) -> str:
    """The name of a class in an `auto_map`: `file.Class`, since all code files are at the top of the repository."""
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def model_classes(config: transformers.PreTrainedConfig) -> dict[str, type]:
    """Auto class → class registered for this configuration.

    Raises ValueError if there is none, as for a model loaded with `trust_remote_code=True`.
    """
    registered = {}
    for name in MODEL_AUTO_CLASSES:
        mapping = registered_models(getattr(transformers, name))
        if type(config) in mapping:
            registered[name] = mapping[type(config)]
    if "AutoModel" not in registered:
        raise ValueError(
            f"{type(config).__module__}.{type(config).__name__} is not registered with AutoModel, so its code cannot "
            "be exported with the weights; `import oner` first and load the model without trust_remote_code"
        )
    return registered


def pipeline_classes(model: PreTrainedModel) -> dict[str, tuple[type, list[str]]]:
    """
    Task → (pipeline class, names of its auto classes), for each registered pipeline that is not transformers' own,
    supports the family, and finds all its weights in this model. Other pipelines would use randomly initialised heads.
    """
    config = model.config
    classes = {}
    known = {}  # auto class -> a model of it without weights, made once
    for task, entry in PIPELINE_REGISTRY.to_dict().items():
        implementation = entry["impl"]
        auto_classes = entry["pt"]

        # only our own pipelines
        if not isinstance(implementation, type) or implementation.__module__.startswith("transformers."):
            continue

        # and only the model classes that this family has and these weights fill
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
    if hasattr(implementation, "lacks") and implementation.lacks(wanted) is not None:
        return False
    if type(model) is type(wanted):
        return True

    # for another class of the family, every weight must exist with the same name and shape
    general = [cls for name, cls in model_classes(model.config).items() if name in GENERAL]
    tower_only = not getattr(implementation, "reads_heads", True)
    return not {type(model), type(wanted)}.isdisjoint(general) and weights_of(wanted, tower_only) <= weights_of(model)


def weights_of(model: PreTrainedModel, tower_only: bool = False) -> set[tuple[str, torch.Size]]:
    """The weights of `model` as (name without the tower's prefix, shape)."""
    tower = f"{model.base_model_prefix}."
    state = {name: value.shape for name, value in model.state_dict().items()}
    if tower_only:
        state = {name: shape for name, shape in state.items() if name.startswith(tower)}
    return {(name.removeprefix(tower), shape) for name, shape in state.items()}


def copy_code(classes: Sequence[type], directory: Path) -> list[str]:
    """Copies the files that define `classes`, and their relative imports, into `directory` without subfolders.

    Raises ValueError if two different files have the same name.
    """
    # file name -> its source; a file that several classes share is copied once
    copied: dict[str, Path] = {}
    for cls in classes:
        source = sys.modules[cls.__module__].__file__
        for file in map(Path, [source, *get_relative_import_files(source)]):
            earlier = copied.setdefault(file.name, file.resolve())
            if earlier != file.resolve():
                raise ValueError(f"two code files share the name {file.name}: {earlier} and {file.resolve()}")

    # copied only after all names are checked
    for name, file in copied.items():
        shutil.copyfile(file, directory / name)
    return sorted(copied)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def merge_json(path: Path, **entries: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | entries)


def check_stored_dtype(dtype: Any) -> None:
    """Raises ValueError for a dtype in which weights cannot be stored; None means the model's own."""
    if dtype is not None and dtype not in STORED_DTYPES:
        expected = ", ".join(str(one).removeprefix("torch.") for one in STORED_DTYPES)
        raise ValueError(f"weights cannot be stored as {dtype}; expected a floating-point type of torch: {expected}")


def stored_weights(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor] | None:
    """The state dict with parameters cast to `dtype`, or None if `dtype` is None. Buffers keep their dtype.

    Raises ValueError for a weight that is NaN or infinite, OverflowError if a weight overflows or a whole parameter
    becomes zero in `dtype`: otherwise this would be noticed only at the next load.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has weights that are NaN or infinite; such a model is not published")
    if dtype is None:
        return None

    # tied weights share one storage under several names
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # one copy for tied weights, so that saving recognises them
    for name, tensor in state.items():
        if name in parameters and tensor.is_floating_point():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in cast:
                cast[key] = tensor.to(dtype)
                if not torch.isfinite(cast[key]).all():
                    raise OverflowError(f"{name} has a weight of {tensor.abs().max():.3g}, too large for {dtype}")
                if tensor.any() and not cast[key].any():
                    raise OverflowError(f"{name} has no weight above {tensor.abs().max():.3g}, all 0 in {dtype}")
            state[name] = cast[key]
    return state


def write_code(model: PreTrainedModel, directory: Path, processor: ProcessorMixin | None = None) -> list[str]:
    """
    Adds the code files, the full `auto_map` and `custom_pipelines` to saved weights; returns the tasks of our
    pipelines.

    transformers' `save_pretrained` lists only the saved class. If `processor` is None, the family's classes are used.
    """
    # auto class -> file and class in the repository
    models = model_classes(model.config)
    pipelines = pipeline_classes(model)
    processors = processor_classes(model.config, processor)
    auto_map = {"AutoConfig": reference(type(model.config))}
    auto_map |= {name: reference(cls) for name, cls in models.items()}
    processor_map = {name: reference(cls) for name, cls in processors.items()}

    # their code files, and the entries that name them
    copy_code(
        [type(model.config), *models.values(), *processors.values(), *(cls for cls, _ in pipelines.values())],
        directory,
    )
    offered = {task: {"impl": reference(cls), "pt": names} for task, (cls, names) in pipelines.items()}
    merge_json(directory / "config.json", auto_map=auto_map | processor_map, custom_pipelines=offered)

    # the image processor has its own entry in the processor's file
    path = directory / "processor_config.json"
    if path.is_file():
        nested = json.loads(path.read_text(encoding="utf-8")).get("image_processor", {})
        merge_json(path, auto_map=processor_map, image_processor=nested | {"auto_map": processor_map})
    return [task for task, (cls, _) in pipelines.items() if hasattr(cls, "task_name")]


def processor_classes(config: transformers.PreTrainedConfig, processor: ProcessorMixin | None) -> dict[str, type]:
    """Auto class → class, for a processor, or for the one registered for this configuration; {} if there is none."""
    if processor is not None:
        return {"AutoProcessor": type(processor), "AutoImageProcessor": type(processor.image_processor)}
    if type(config) not in PROCESSOR_MAPPING:
        return {}
    images = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
    return {"AutoProcessor": PROCESSOR_MAPPING[type(config)], "AutoImageProcessor": images}


def write_pictures(pictures: Mapping[str, Picture], directory: Path) -> dict[str, str]:
    """Saves each picture as PNG; returns caption → path inside the repository.

    Raises TypeError if a picture is not a PIL image, figure or path, ValueError if two captions give the same name.
    """
    written = {}
    for caption, picture in pictures.items():
        path = Path("pictures") / f"{slug(caption)}.png"
        if path.as_posix() in written.values():
            raise ValueError(f"two pictures would both be {path}; the second is captioned {caption!r}")

        # everything is saved as PNG
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


def gate_configurations(directory: Path) -> None:
    """Removes local paths and secrets from the configurations that transformers wrote."""
    for path in directory.glob("*.json"):
        if path.name in VOCABULARIES or path.name.endswith(".index.json"):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if (published := plain(content)) != content:
            write_json(path, published)


def finish_export(scratch: Path, directory: Path, name: str, licence: str | None, origins: Origins) -> None:
    """Completes an export: attribution files, digests, provenance, modes, the user's own files; then moves it into
    place."""
    for file, content in origins.makers.items():
        (scratch / file).write_bytes(content)
    gate_configurations(scratch)

    # the card keeps an earlier evaluation of identical weights
    if directory.is_dir():
        keep_evaluation(directory, scratch)

    # digests and provenance, once the files no longer change
    write_digests(scratch)
    write_provenance(scratch, name, licence, origins)
    set_modes(scratch)
    if directory.is_dir():
        carry_over(directory, scratch, files_of(directory))
    put_in_place(scratch, directory)


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
    license: str | None = None,
    languages: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    repo_id: str | None = None,
    origins: Origins | None = None,
) -> Path:
    """Writes `model` and `processor` as a complete Hub repository and returns its path.

    - metrics: `set/metric` → value, for the card's table and metadata and `results/metrics.json`.
    - protocol: how the metrics were measured: split, checkpoint, resolution, templates, seed.
    - data: one entry per training set, a name or a mapping (name, rows, licence, ...).
    - pictures: caption → PIL image, matplotlib figure, or path; stored in `pictures/`.
    - license: of the weights, as the Hub names it (`apache-2.0`, `cc-by-4.0`, `other`); if None, the card says so.
    - languages: of the texts, as the Hub names them (`en`), for the card's metadata.
    - dtype: dtype of the weights in the file, such as `torch.float16` for half its size. The configuration keeps the
      model's own dtype, in which a plain `from_pretrained` loads it.
    - repo_id: name of the repository and the card; by default the directory's, or its parent's if that is `model`.
    - origins: from `read_origins`: the models that the training started from, and attributions of the data.

    The export is written beside `directory` and moved there in one step; files that users added to an earlier export
    stay. No text in it contains an absolute path or a secret (`public.py`). Raises FileExistsError if `directory`
    contains something other than an export, ValueError if the model's classes are not registered or `dtype` is not a
    float, OverflowError if a weight overflows in `dtype`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a PreTrainedModel (unwrapped)")
    check_stored_dtype(dtype)
    directory = Path(directory).resolve()  # a symbolic link stays, and its target is replaced
    check_replaceable(directory)
    name = plain(repo_id or repository_name(directory))
    origins = origins or Origins()
    origins = replace(origins, data=(*plain(list(data or ())), *origins.data))
    with scratch_beside(directory) as scratch:
        model.save_pretrained(scratch, state_dict=stored_weights(model, dtype))
        processor.save_pretrained(scratch)
        tasks = write_code(model, scratch, processor)
        if "image-text-retrieval" in tasks:
            write_sentence_files(scratch)
        paths = write_pictures(pictures or {}, scratch)
        write_facts(scratch, metrics, protocol, training_config)

        # the model card
        card = model_card(
            model,
            name,
            metrics=metrics,
            protocol=protocol,
            training_config=training_config,
            origins=origins,
            pictures=paths,
            tasks=tasks,
            license=license,
            languages=languages,
            stored_dtype=str(dtype or model.dtype).removeprefix("torch."),
            compute_dtype=str(model.dtype).removeprefix("torch."),
        )
        card.save(scratch / "README.md")
        finish_export(scratch, directory, name, license, origins)
    return directory


def write_facts(
    directory: Path,
    metrics: Mapping[str, float] | None,
    protocol: Mapping[str, Any] | str | None,
    training_config: Mapping[str, Any] | None,
) -> None:
    """Writes the metrics and the training configuration to `results/`."""
    results = directory / "results"
    results.mkdir()
    if metrics is not None:
        write_json(results / "metrics.json", {"metrics": plain(metrics), "protocol": plain(protocol)})
    if training_config is not None:
        write_json(results / "training_config.json", plain(training_config))


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
    """Uploads an exported directory to the Hub repository `repo_id`, created if needed; returns the commit's URL.

    The card is renamed to the repository, and stays as it was if the upload fails. Raises FileNotFoundError if the
    directory is not a complete export. (The checkpoints that come with oner are not: they lack the model's code.)
    """
    check_repo_id(repo_id)
    # refuse to upload a model that would not load
    directory = Path(directory)
    missing = [
        name for name in ("config.json", "processor_config.json", "README.md") if not (directory / name).is_file()
    ]
    if not list(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if "config.json" not in missing:
        missing += missing_code(directory)
    if missing:
        raise FileNotFoundError(f"{directory} is no exported model: {', '.join(missing)} missing; see export_model")

    earlier = {name: (directory / name).read_bytes() for name in RENAMED if (directory / name).is_file()}
    rename_card(directory, repo_id)
    commit = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
    try:
        return upload(directory, repo_id, private, token=token, **commit)
    except BaseException:
        for name, content in earlier.items():
            (directory / name).write_bytes(content)
        raise


def missing_code(directory: Path) -> list[str]:
    """Names of the files with the model's code that `config.json` refers to, or should, and that do not exist."""
    classes = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not classes:
        return ["auto_map in config.json"]
    files = {f"{name.split('.')[0]}.py" for name in classes.values() if "--" not in name}
    return sorted(name for name in files if not (directory / name).is_file())


def upload(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    kind: Mapping[str, str] = MODEL,
    token: str | None = None,
    **commit: Any,
) -> str:
    """
    Uploads all files of a directory in one commit to a repository, created if needed; returns the commit's URL.

    Args:
        kind: Arguments of `create_repo` for a new repository; `repo_type` is used for the commit too.
        commit: Arguments of `upload_folder`: message, revision, `create_pr`.

    Raises:
        ConnectionError: the Hub does not respond.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, **kind)
        made = api.upload_folder(repo_id=repo_id, folder_path=directory, repo_type=kind["repo_type"], **commit)
    except Exception as error:
        # from httpx or httpx2, depending on the release of huggingface_hub
        if any(cls.__name__ == "TransportError" for cls in type(error).__mro__):
            raise ConnectionError(f"{api.endpoint} does not respond: {error}") from error
        raise
    return made.commit_url
