"""What a run may be told: dataclasses, filled from a flat YAML file and the command line, in this order."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from oner.training.objectives.objective import objective_classes


@dataclass(frozen=True)
class Launch:
    """
    What a launcher (torchrun, `accelerate launch`) left in the environment, where Accelerate reads it too.

    Args:
        ranked: It numbered this process among others.
        cpu: It was told to take the CPU.
        fsdp, deepspeed, megatron: Engines it was asked for.
    """

    ranked: bool
    cpu: bool
    fsdp: bool
    deepspeed: bool
    megatron: bool


def read_launch() -> Launch:
    """Read now, not at import: a launcher may run in this very process."""

    def flag(name: str) -> bool:
        return os.environ.get(f"ACCELERATE_{name}", "").lower() in ("true", "1", "yes")

    return Launch(
        ranked=int(os.environ.get("LOCAL_RANK", "-1")) >= 0,
        cpu=flag("USE_CPU"),
        fsdp=flag("USE_FSDP"),
        deepspeed=flag("USE_DEEPSPEED"),
        megatron=flag("USE_MEGATRON_LM"),
    )


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    family: str = field(default="oner", metadata=_help("Which system: its model and its objective."))
    size: str = field(default="base", metadata=_help("Named size of the family, when training from scratch."))
    model_config: dict | str | None = field(default=None, metadata=_help("Fields of the model's configuration."))
    initial_model: str | None = field(
        default=None, metadata=_help("Directory or Hub id to start from (weights, processor), as the 384 stage does.")
    )
    initial_vision: str | None = field(
        default=None, metadata=_help("A ViT, DeiT or MAE for the tower that reads images: file, directory or Hub id.")
    )
    initial_text: str | None = field(
        default=None,
        metadata=_help("A BERT for texts likewise, of one tower its words; its vocabulary is `tokenizer`."),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=_help("A BERT vocabulary (vocab.txt) or saved tokenizer; trained on the captions if none."),
    )
    vocab_size: int = field(default=30522, metadata=_help("Upper bound of a trained vocabulary."))
    attn_implementation: str | None = field(
        default=None, metadata=_help("eager, sdpa, flash_attention_2, flex_attention; transformers chooses if none.")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("Trade a second forward for memory."))


@dataclass
class DataArguments:
    train_data: list[str] = field(
        default_factory=list,
        metadata=_help("Files, shards (cc-{00..15}.tar), folders, names known to `datasets`; several are a mixture."),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_help("Share of each entry of train_data, on any scale; by their numbers of rows if none."),
    )
    data_licence: str | None = field(default=None, metadata=_help("Licence of the pairs, for the model card."))
    attribution: str | None = field(
        default=None, metadata=_help("File that names the pairs' makers; copied into the model directory.")
    )
    split: str | None = field(default=None, metadata=_help("Split of a data set that has several."))
    image_column: str | None = field(default=None, metadata=_help("Column of pictures; found by its usual names."))
    text_column: str | None = field(default=None, metadata=_help("Column of captions, one or a list a row."))
    id_column: str | None = field(default=None, metadata=_help("Rows that share an id are positives of each other."))
    streaming: bool = field(default=False, metadata=_help("Read once in order; resuming can then not be exact."))
    one_row_per_id: bool = field(default=False, metadata=_help("Never two rows of one id in a batch."))
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata=_help("Area range of RandomResizedCrop (appendix E, facts 19).")
    )
    eval_crop: float = field(
        default=1.0,
        metadata=_help(
            "timm's crop_pct, kept in the processor: below 1, pictures are resized to image_size / eval_crop and "
            "their middle is taken, which shows things as large as training crops do; 1 squeezes the whole picture."
        ),
    )
    crop_margin: float = field(
        default=0.0,
        metadata=_help("White ground laid round a picture before the crop, up to this share of each side."),
    )
    horizontal_flip: float = field(default=0.0, metadata=_help("Probability; the paper names no flip."))
    color_jitter: float = field(default=0.0, metadata=_help("Strength; the paper found none helps (appendix E)."))
    grayscale: float = field(default=0.0, metadata=_help("Probability of losing colour; likewise."))
    rand_augment: str | None = field(
        default=None,
        metadata=_help(
            'timm\'s RandAugment by its string, "rand-m7-n2-mstd0.5", or ALBEF\'s, "albef-n2-m7"; likewise.'
        ),
    )
    image_normalization: str | None = field(
        default=None,
        metadata=_help(
            "imagenet or clip: mean and deviation of the colours, kept in the processor; if none, imagenet's, or what "
            "the processor of initial_model says. ALBEF and SIMLA take clip's."
        ),
    )
    code_crop: str | None = field(
        default=None,
        metadata=_help(
            "A second view of 8 pixels a patch, for a tokenizer of pictures: common, the same crop (BEiT), or "
            "independent (SIMLA's code)."
        ),
    )
    caption_rules: str | None = field(
        default=None, metadata=_help("albef: captions in lower case, without marks, of 30 words; as written if none.")
    )
    mlm_probability: float = field(default=0.15, metadata=_help("Share of words to predict (appendix C)."))
    mim_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5],
        metadata=_help("Share of masked patches at the start and the end, linear in progress (appendix C)."),
    )
    random_specials: bool = field(
        default=False, metadata=_help("A random word may be a special token, as in ALBEF's code.")
    )
    mim_masking: str = field(default="random", metadata=_help("random patches, or blocks of them as BEiT masks."))
    mim_min_block: int = field(
        default=16, metadata=_help("Patches of the smallest block; of 14 x 14 or 16 x 16, BEiT's and SIMLA's is 16.")
    )
    max_pixels: int | None = field(default=None, metadata=_help("Largest picture to decode, in pixels."))
    max_bad_rows: float = field(
        default=0.01,
        metadata=_help("Share of rows that may be unusable; those are replaced and listed, above it the run stops."),
    )
    num_workers: int = field(default=2, metadata=_help("Data workers a process."))


@dataclass
class RunArguments:
    output_dir: str = field(default="runs/oner", metadata=_help("Checkpoints, log.jsonl, and the final `model/`."))
    seed: int = field(default=0, metadata=_help("Decides weights, order, captions, crops and masks."))
    epochs: float = field(default=40, metadata=_help("Length of the run (appendix C)."))
    max_steps: int | None = field(default=None, metadata=_help("Length in steps instead of epochs."))
    batch_size: int = field(default=4096, metadata=_help("Pairs a step over all processes (appendix C)."))
    gradient_cache_chunks: int = field(
        default=1,
        metadata=_help(
            "Pieces in which a process's share of a batch passes the model; loss and gradient are the whole batch's "
            "(GradCache). More pieces, less memory, for one more forward."
        ),
    )
    base_learning_rate: float = field(
        default=1e-4, metadata=_help("The rate is this times batch_size / 256 (appendix C).")
    )
    min_learning_rate: float = field(default=0.0, metadata=_help("Where the cosine ends."))
    schedule: str = field(
        default="cosine",
        metadata=_help(
            "cosine: falls with each step. albef: climbs in stairs of 100 steps, is level to the end of the first "
            "epoch, and falls with each one after."
        ),
    )
    warmup_epochs: float = field(
        default=4,
        metadata=_help("Linear warm-up of the cosine (appendix C); of a stream, a share of max_steps below 1."),
    )
    warmup_steps: int | None = field(
        default=None, metadata=_help("Length of the warm-up in steps instead of epochs; of albef, 2000 if none.")
    )
    warmup_learning_rate: float = field(
        default=0.0, metadata=_help("Where the warm-up begins; ALBEF's and SIMLA's at 1e-5.")
    )
    weight_decay: float = field(default=0.1, metadata=_help("AdamW's (appendix C)."))
    decay_norm_and_bias: bool = field(
        default=False, metadata=_help("Decay 1-D parameters too, literally as MoCo-v3's code does.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW's first moment."))
    adam_beta2: float = field(default=0.999, metadata=_help("AdamW's second moment."))
    max_grad_norm: float | None = field(default=None, metadata=_help("Clip the gradient's norm; the paper does not."))
    mixed_precision: str = field(
        default="bf16", metadata=_help("no, bf16, fp16, or auto: bf16 where the hardware multiplies it, else no.")
    )
    compile: bool = field(default=False, metadata=_help("torch.compile of the layers."))
    log_every: int = field(default=10, metadata=_help("Steps between lines of log.jsonl."))
    report_to: list[str] = field(default_factory=list, metadata=_help("Trackers of Accelerate: tensorboard, wandb..."))
    save_every_epochs: float = field(default=1, metadata=_help("Epochs between checkpoints."))
    keep_checkpoints: int = field(default=2, metadata=_help("How many of the last checkpoints to keep."))
    resume: str | None = field(
        default=None,
        metadata={
            **_help("Alone, or `auto`: the last whole checkpoint of output_dir, if any; or a checkpoint's path."),
            "nargs": "?",
            "const": "auto",
        },
    )
    max_nonfinite_steps: int = field(
        default=3, metadata=_help("Updates in a row that may be skipped, for NaN or infinity, before the run stops.")
    )
    allow_changes: bool = field(default=False, metadata=_help("Resume although the configuration differs."))
    eval_data: list[str] = field(default_factory=list, metadata=_help("Files for retrieval while training."))
    eval_captions: str = field(default="all", metadata=_help("all or first: which captions of a row are texts."))
    eval_every_epochs: float = field(default=1, metadata=_help("Epochs between evaluations; 0: only at the end."))
    export_dtype: str = field(default="float32", metadata=_help("Precision of the published weights."))


@dataclass
class Arguments:
    """Everything a run was told; `objective` is the family's own dataclass."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    objective: Any

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in the YAML file."""
        flat = {}
        for part in dataclasses.fields(self):
            flat.update(dataclasses.asdict(getattr(self, part.name)))
        return flat

    def defaults(self) -> dict[str, Any]:
        """What each argument is where nothing was said of it, likewise flat: what runs did before it existed."""
        flat = {}
        for part in dataclasses.fields(self):
            flat.update(dataclasses.asdict(type(getattr(self, part.name))()))
        return flat


def read_config(path: str | Path) -> dict[str, Any]:
    """A flat YAML file; `base: other.yaml` (relative to it) is read first and overridden. Raises `ValueError`."""
    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of argument names, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    merged = read_config(path.parent / base)
    if isinstance(merged.get("model_config"), dict) and isinstance(values.get("model_config"), dict):
        values["model_config"] = {**merged["model_config"], **values["model_config"]}
    return {**merged, **values}


def parse_arguments(argv: Sequence[str] | None = None, objective: type | None = None) -> Arguments:
    """
    `--config FILE.yaml`, then `--name value` for anything to override.

    Args:
        objective: Dataclass to fill instead of the family's, as a task does to which the family is fine-tuned. All its
            fields have defaults, and none is named as a field of the other three.

    Raises:
        ValueError: names that no argument has, or values out of range.
        SystemExit: what argparse itself refuses, and `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--family")
    known, rest = first.parse_known_args(argv)
    values = read_config(known.config) if known.config else {}
    family = known.family or values.get("family", "oner")
    if objective is None:
        objective = objective_classes(family)[1]
    kinds = [ModelArguments, DataArguments, RunArguments, objective]
    parser = HfArgumentParser(kinds, allow_abbrev=False)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    if foreign := sorted(set(values) - set(hints)):
        raise ValueError(f"{known.config}: unknown arguments {foreign}; `--help` lists those there are")
    values = {name: _fit(name, value, hints[name], known.config) for name, value in values.items()}
    parser.set_defaults(**{**values, "family": family})
    parts = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    arguments = Arguments(*parts)
    for part in (arguments.model, arguments.objective):
        for name in ("model_config", "loss_weights"):
            if isinstance(getattr(part, name, None), str):
                setattr(part, name, _read_json(name, getattr(part, name)))
    _check(arguments)
    return arguments


def _fit(name: str, value: Any, hint: Any, file: str) -> Any:
    """A YAML value as its field's type: YAML reads 1e-4 as text and `no` as false, and one file needs no brackets."""
    if name == "mixed_precision" and value is False:
        return "no"
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in alternatives:
        return None
    kind = alternatives[0]  # of `str | None`; a dict may also be given as JSON
    is_list = get_origin(kind) is list
    item = get_args(kind)[0] if is_list else kind
    try:
        if is_list:
            return [_scalar(one, item) for one in (value if isinstance(value, list) else [value])]
        return _scalar(value, item)
    except (TypeError, ValueError) as error:
        expected = f"a list of {item.__name__}" if is_list else item.__name__
        raise ValueError(f"{file}: {name} is {value!r}; expected {expected}") from error


def _scalar(value: Any, kind: type) -> Any:
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if isinstance(value, str) and kind is dict:
        return value  # JSON, read later
    raise TypeError(f"got {type(value).__name__}")


def _read_json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {text!r}; expected a JSON object")
    return value


# name -> the words that it may be
CHOICES = {
    "image_normalization": (None, "imagenet", "clip"),
    "code_crop": (None, "common", "independent"),
    "caption_rules": (None, "albef"),
    "mim_masking": ("random", "blocks"),
    "schedule": ("cosine", "albef"),
    "eval_captions": ("all", "first"),
}


def _check(arguments: Arguments) -> None:
    data, run = arguments.data, arguments.run
    for name, words in CHOICES.items():
        value = getattr(data if hasattr(data, name) else run, name)
        if value not in words:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, words))}")
    if not data.train_data:
        raise ValueError("train_data is empty; expected files, a folder, or the name of a data set")
    if data.data_weights is not None and len(data.data_weights) != len(data.train_data):
        raise ValueError(
            f"data_weights is {data.data_weights}; expected one for each of the {len(data.train_data)} in train_data"
        )
    if run.batch_size < 2:
        raise ValueError(f"batch_size is {run.batch_size}; contrast needs at least 2 pairs a step")
    if not 1 <= run.gradient_cache_chunks <= run.batch_size:
        raise ValueError(
            f"gradient_cache_chunks is {run.gradient_cache_chunks}; expected 1 to the batch_size of {run.batch_size}"
        )
    if run.max_steps is not None and run.max_steps < 1:
        raise ValueError(f"max_steps is {run.max_steps}; expected at least 1, or none for a run of `epochs`")
    for name in ("log_every", "keep_checkpoints", "max_nonfinite_steps"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is {getattr(run, name)}; expected at least 1")
    if data.mim_min_block < 1:
        raise ValueError(f"mim_min_block is {data.mim_min_block}; expected at least 1")
    if run.warmup_learning_rate < 0:
        raise ValueError(f"warmup_learning_rate is {run.warmup_learning_rate}; expected 0 or more")
    if run.warmup_steps is not None and run.warmup_steps < 0:
        raise ValueError(f"warmup_steps is {run.warmup_steps}; expected 0 or more, or none for `warmup_epochs`")
    if run.schedule == "albef" and (run.warmup_steps or 0) % 100:
        raise ValueError(f"warmup_steps is {run.warmup_steps}; expected stairs of 100 steps under schedule albef")
    for name in ("crop_scale", "mim_ratio"):
        low_high = getattr(data, name)
        if len(low_high) != 2 or not 0 <= low_high[0] <= 1 or not 0 <= low_high[1] <= 1:
            raise ValueError(f"{name} is {low_high}; expected two numbers in [0, 1]")
    if not 0 <= data.max_bad_rows <= 1:
        raise ValueError(f"max_bad_rows is {data.max_bad_rows}; expected a share in [0, 1]")
    if not 0 < data.eval_crop <= 1:
        raise ValueError(f"eval_crop is {data.eval_crop}; expected a share in (0, 1]")
    if run.mixed_precision not in ("no", "bf16", "fp16", "auto"):
        raise ValueError(f"mixed_precision is {run.mixed_precision!r}; expected no, bf16, fp16 or auto")
    if data.one_row_per_id and data.id_column is None:
        raise ValueError("one_row_per_id needs id_column, got none")
    if data.one_row_per_id and data.streaming:
        raise ValueError("one_row_per_id needs all ids at the start, which a stream cannot give; drop one of the two")
