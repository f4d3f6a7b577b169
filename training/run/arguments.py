"""The arguments of a run, as dataclasses. `parsing.py` fills them from a flat YAML file and the command line."""

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_type_hints

from oner.processing.data.augmentation import Crop
from oner.processing.data.masking import Masking
from oner.processing.data.sampling import concept_id

from .values import fit


@dataclass(frozen=True)
class Launch:
    """
    Settings that a launcher (torchrun, `accelerate launch`) put into the environment; Accelerate reads them too.

    Args:
        ranked: It gave this process a rank.
        cpu: It was told to use the CPU.
        fsdp, deepspeed, megatron: Engines that were requested.
        processes: Number of processes on all machines; 1 without a launcher.
    """

    ranked: bool
    cpu: bool
    fsdp: bool
    deepspeed: bool
    megatron: bool
    processes: int


# environment variables in which torchrun and MPI launchers store the number of processes
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def read_launch() -> Launch:
    """Read when called, not at import: a launcher may run in the same process."""

    def flag(name: str) -> bool:
        return os.environ.get(f"ACCELERATE_{name}", "").lower() in ("true", "1", "yes")

    return Launch(
        ranked=int(os.environ.get("LOCAL_RANK", "-1")) >= 0,
        cpu=flag("USE_CPU"),
        fsdp=flag("USE_FSDP"),
        deepspeed=flag("USE_DEEPSPEED"),
        megatron=flag("USE_MEGATRON_LM"),
        processes=max(int(os.environ.get(name, "1")) for name in SIZES),
    )


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """What is trained, and from which weights."""

    # the special tokens of a text, and two letters
    BOUNDS: ClassVar[dict[str, str]] = {"vocab_size": "[7, inf)", "limit_alphabet": "[1, inf)", "lora": "[1, inf)"}

    # what is trained
    family: str | None = field(
        default=None, metadata=_help("Model family: its model and its objective; if none, that of initial_model.")
    )
    size: str = field(default="base", metadata=_help("Named size of the model, when training from scratch."))
    model_config: dict | str | None = field(default=None, metadata=_help("Fields of the model configuration."))

    # what it starts from; from scratch if all of these are none
    initial_model: str | None = field(
        default=None,
        metadata=_help("Weights and processor to start from: directory, run, Hub id or shipped checkpoint."),
    )
    initial_objective: str | None = field(
        default=None,
        metadata=_help(
            "Teacher and queues to start from: a file written by `oner convert`, or its directory; if not given, "
            "objective.safetensors of initial_model if it has one. none: a new teacher."
        ),
    )
    initial_vision: str | None = field(
        default=None,
        metadata=_help("ViT, DeiT, MAE or DINOv2 weights and shape for the image tower: file, directory or Hub id."),
    )
    initial_text: str | None = field(
        default=None,
        metadata=_help("BERT or MiniLM for the text tower (one tower: its words only); vocabulary: `tokenizer`."),
    )
    fold_token_types: bool = field(
        default=True,
        metadata=_help("Add initial_text's first token type to its positions, as BERT does; SIMLA's code drops it."),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=_help("BERT vocabulary (vocab.txt) or saved tokenizer; if none, one is trained on the captions."),
    )
    vocab_size: int = field(default=30522, metadata=_help("Maximum size of a trained vocabulary."))
    lower_case: bool | None = field(
        default=None,
        metadata=_help("Lower-case texts, for a vocab.txt or trained vocabulary; if none, as the file says, or yes."),
    )
    strip_accents: bool | None = field(
        default=None,
        metadata=_help(
            "Drop the accents of Latin, Greek and Cyrillic letters (vocab.txt: of all scripts); if none, as the file "
            "says, or as lower_case unless the captions are Vietnamese."
        ),
    )
    limit_alphabet: int | None = field(
        default=None,
        metadata=_help(
            "Maximum characters in a trained vocabulary; if none, 1,000 or enough for 99.9 % of the captions."
        ),
    )

    # which weights are trained
    lora: int | None = field(
        default=None,
        metadata={
            **_help("Train LoRA adapters of this rank (16 without a value), tower frozen; merged in the export."),
            "nargs": "?",
            "const": 16,
        },
    )

    # how its layers compute
    attn_implementation: str | None = field(
        default=None, metadata=_help("eager, sdpa, flash_attention_2, flex_attention; if none, transformers chooses.")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("Recompute activations to save memory."))


@dataclass
class SourceArguments:
    """What a run reads, except for the cropping of images and the masking."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "data_weights": "(0, inf)",
        "eval_crop": "(0, 1]",
        "rows_together": "[1, inf)",
        "max_text_length": "[1, inf)",
        "max_pixels": "[1, inf)",
        "max_bad_rows": "[0, 1]",
        "num_workers": "[0, inf)",
    }

    # what is read, and from where
    kind: Literal["pairs", "images", "texts"] = field(
        default="pairs", metadata=_help("Kind of a row: an image with captions, an image, or a text.")
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Files, glob patterns, shards (cc-{00..15}.tar), folders, names known to `datasets`, "
            "hf://datasets/NAME/FILE; several form a mixture."
        ),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_help("Relative share of each entry of train_data; if none, in proportion to their rows."),
    )
    data_licence: str | None = field(default=None, metadata=_help("Licence of the pairs, for the model card."))
    attribution: str | None = field(
        default=None, metadata=_help("File that names the pairs' makers; copied into the model directory.")
    )

    # which rows and columns of it
    split: str | None = field(default=None, metadata=_help("Split of a data set that has several."))
    data_config: str | None = field(default=None, metadata=_help("Configuration of a data set that has several."))
    data_revision: str | None = field(default=None, metadata=_help("Branch, tag or commit of a data set on the Hub."))
    image_column: str | None = field(default=None, metadata=_help("Column of images; none: by its usual names."))
    text_column: str | None = field(default=None, metadata=_help("Column of captions: one caption or a list per row."))
    id_column: str | None = field(default=None, metadata=_help("Rows with the same id here are positives."))
    streaming: bool = field(default=False, metadata=_help("Read the data once, in order; resuming is then not exact."))
    one_row_per_id: bool = field(default=False, metadata=_help("Keep rows of one id or image out of one batch."))
    captions_apart: bool = field(
        default=False,
        metadata=_help("An epoch shows each caption of a row as a separate pair, instead of one random caption."),
    )
    image_repeats: bool = field(
        default=False, metadata=_help("Let captions_apart put several captions of one image into a batch.")
    )
    rows_together: int = field(
        default=1,
        metadata=_help(
            "This many consecutive rows are always in the same batch, such as images that differ in one "
            "detail: hard negatives of each other."
        ),
    )

    # processing of images
    eval_crop: float | None = field(
        default=None,
        metadata=_help(
            "timm's crop_pct, saved in the processor. Below 1, images are resized to image_size / eval_crop and "
            "centre-cropped, so that objects are as large as in training crops; 1 squeezes the whole image. If none, "
            "1, or as in the processor of initial_model."
        ),
    )
    image_normalization: Literal["imagenet", "clip"] | None = field(
        default=None,
        metadata=_help(
            "imagenet or clip: mean and deviation of the colours, saved in the processor; if none, imagenet, or as in "
            "the processor of initial_model. ALBEF and SIMLA use clip."
        ),
    )
    code_crop: Literal["common", "independent"] | None = field(
        default=None,
        metadata=_help(
            "Second view with 8 pixels per patch, for an image tokenizer: common, the same crop (BEiT), or "
            "independent (SIMLA's code)."
        ),
    )

    # processing of texts
    max_text_length: int | None = field(
        default=None,
        metadata=_help("Maximum text length in tokens; if none, the model's; longer text rows are read in windows."),
    )
    caption_rules: Literal["albef"] | None = field(
        default=None,
        metadata=_help("albef: lower-case captions without punctuation, at most 30 words; none: as written."),
    )

    # rows that cannot be used
    max_pixels: int | None = field(default=None, metadata=_help("Largest image to decode, in pixels."))
    excluded_images: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Files of hashes, as written by sha256sum, of images that must not be trained on: those of evaluation "
            "sets. Their rows are replaced and listed, but do not count as bad rows."
        ),
    )
    max_bad_rows: float = field(
        default=0.01,
        metadata=_help("Maximum share of unusable rows, which are replaced and listed; above it the run stops."),
    )
    num_workers: int = field(default=2, metadata=_help("Data workers per process."))


@dataclass
class DataArguments(SourceArguments):
    """All arguments of a portion's data; flat in a file and on the command line."""

    crop: Crop = field(default_factory=Crop)
    masking: Masking = field(default_factory=Masking)


@dataclass
class RunArguments:
    """Length, learning rate, precision, logging, checkpoints, evaluation and export of a run."""

    BOUNDS: ClassVar[dict[str, str]] = {
        # generators take 32 bits; process and step numbers are added to the seed
        "seed": "[0, 2147483647]",
        "repeat": "[1, inf)",
        "epochs": "(0, inf)",
        "max_steps": "[1, inf)",
        "batch_size": "[2, inf)",
        "gradient_cache_chunks": "[1, inf)",
        # rates and AdamW
        "base_learning_rate": "[0, inf)",
        "min_learning_rate": "[0, inf)",
        "warmup_epochs": "[0, inf)",
        "warmup_steps": "[0, inf)",
        "warmup_learning_rate": "[0, inf)",
        "weight_decay": "[0, inf)",
        "adam_beta1": "[0, 1)",
        "adam_beta2": "[0, 1)",
        "max_grad_norm": "(0, inf)",
        # how often, and how long
        "log_every": "[1, inf)",
        "save_every_epochs": "[0, inf)",
        "keep_checkpoints": "[1, inf)",
        "max_nonfinite_steps": "[1, inf)",
        "data_timeout": "(0, inf)",
        "eval_every_epochs": "[0, inf)",
    }

    # where the run writes, and the seed of all random draws
    output_dir: str = field(default="runs/oner", metadata=_help("Checkpoints, log.jsonl, the final `model/`."))
    seed: int = field(default=0, metadata=_help("Seed of initial weights, row order, captions, crops and masks."))

    # what a step consists of
    portions: dict | str | None = field(
        default=None,
        metadata=_help(
            "Several kinds of batches in a step, by name and in order: for each, arguments that it adds or overrides "
            "(data arguments, batch_size, repeat, gradient_cache_chunks). If none, there is one portion."
        ),
    )
    epoch_portion: str | None = field(
        default=None, metadata=_help("Portion whose rows define an epoch; none: the first.")
    )
    repeat: int = field(default=1, metadata=_help("How many times an epoch reads each row."))

    # how long the run is, and how large a step
    epochs: float = field(default=1, metadata=_help("Length of the run in epochs."))
    max_steps: int | None = field(default=None, metadata=_help("Length of the run in steps instead of epochs."))
    batch_size: int = field(default=256, metadata=_help("Global batch size: rows per step over all processes."))
    gradient_cache_chunks: int = field(
        default=1,
        metadata=_help(
            "Process each process's share of a batch in this many chunks, with loss and gradient of the whole batch "
            "(GradCache). Saves memory, for one more forward pass."
        ),
    )

    # the learning rate over the run: peak, end, shape, warm-up
    base_learning_rate: float = field(
        default=1e-4,
        metadata=_help("Learning rate for a batch of 256; scaled by batch_size / 256 (of epoch_portion if several)."),
    )
    min_learning_rate: float = field(default=0.0, metadata=_help("Learning rate at the end of the cosine."))
    schedule: Literal["cosine", "albef"] = field(
        default="cosine",
        metadata=_help(
            "cosine: decays with each step. albef: warms up in stairs of 100 steps, is constant to the end of the "
            "first epoch, and decays with each later epoch."
        ),
    )
    warmup_epochs: float = field(
        default=0,
        metadata=_help("Linear warm-up of the cosine, in epochs; for a stream, a share of max_steps below 1."),
    )
    warmup_steps: int | None = field(
        default=None, metadata=_help("Warm-up in steps instead of epochs; for albef, 2000 if none.")
    )
    warmup_learning_rate: float = field(
        default=0.0, metadata=_help("Learning rate at the start of the warm-up; ALBEF and SIMLA use 1e-5.")
    )

    # AdamW
    weight_decay: float = field(default=0.05, metadata=_help("AdamW's weight decay."))
    decay_norm_and_bias: bool = field(
        default=False, metadata=_help("Decay 1-D parameters too, as MoCo-v3's code does.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW's decay of the first moment."))
    adam_beta2: float = field(default=0.999, metadata=_help("AdamW's decay of the second moment."))
    max_grad_norm: float | None = field(default=None, metadata=_help("Clip the gradient norm; OneR's paper does not."))

    # how it computes
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = field(
        default="auto", metadata=_help("no, bf16, fp16, or auto: bf16 if the hardware supports it, else no.")
    )
    compile: bool = field(default=False, metadata=_help("Compile the layers with torch.compile."))

    # what it writes while it runs
    log_every: int = field(default=10, metadata=_help("Steps between lines of log.jsonl."))
    report_to: list[str] = field(default_factory=list, metadata=_help("Accelerate trackers: tensorboard, wandb..."))
    tracker_project: str = field(default="oner", metadata=_help("Project name for the trackers."))
    run_name: str | None = field(
        default=None, metadata=_help("Name of the run in the trackers; if none, they choose one.")
    )
    save_every_epochs: float = field(
        default=1, metadata=_help("Epochs between checkpoints, at least one step; 0: only at the end.")
    )
    keep_checkpoints: int = field(default=2, metadata=_help("Number of most recent checkpoints to keep."))
    async_checkpoints: bool = field(
        default=False, metadata=_help("Write checkpoints in the background, from a copy of the state in host memory.")
    )

    # what happens after a stop, or after non-finite numbers
    resume: str | None = field(
        default=None,
        metadata={
            **_help("Without a value, or `auto`: the last intact checkpoint of output_dir, if any; or a path."),
            "nargs": "?",
            "const": "auto",
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata=_help("Consecutive updates that may be skipped because of NaN or infinity before the run stops."),
    )
    data_timeout: float | None = field(
        default=1800,
        metadata=_help("Seconds to wait for data workers before it saves and stops; none, or no workers: no limit."),
    )
    allow_changes: bool = field(default=False, metadata=_help("Resume even if the configuration or the data differ."))

    # evaluation during the run
    eval_data: list[str] = field(default_factory=list, metadata=_help("Sources for retrieval during training."))
    eval_captions: Literal["all", "first"] = field(
        default="all", metadata=_help("Which captions of a row the evaluation uses.")
    )
    eval_every_epochs: float = field(default=1, metadata=_help("Epochs between evaluations; 0: only at the end."))

    # what is published at the end
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32", metadata=_help("Precision of the published weights.")
    )
    licence: str | None = field(
        default=None,
        metadata=_help("Licence of the published weights, by its name on the Hub; the card states if there is none."),
    )
    language: list[str] = field(
        default_factory=list,
        metadata=_help("Languages of the texts, by their codes on the Hub (en), for the model card."),
    )
    repo_id: str | None = field(
        default=None,
        metadata=_help("Repository name for the card, `name` or `owner/name`; if none, that of output_dir."),
    )


# fields of a run that a portion may set for itself
PORTION_FIELDS = ("batch_size", "repeat", "gradient_cache_chunks")


@dataclass
class Arguments:
    """All arguments of a run; `objective` is the family's own dataclass."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    objective: Any

    def portions(self) -> dict[str, "Arguments"]:
        """
        The arguments of each portion of a step, in order. A portion's seed determines its row order, captions,
        crops and masks; the first portion uses the run's seed.

        Raises:
            ValueError: a portion sets an argument that portions do not have.
        """
        if self.run.portions is None:
            return {self.data.kind: self}
        return {name: self._portion(name, options) for name, options in self.run.portions.items()}

    def _portion(self, name: str, options: dict[str, Any]) -> "Arguments":
        # a portion may set all data arguments, and a few fields of the run
        hints = {**hints_of(*DATA), **{known: hints_of(RunArguments)[known] for known in PORTION_FIELDS}}
        if foreign := sorted(set(options) - set(hints)):
            raise ValueError(f"portion {name!r} sets {foreign}; expected data arguments, or {PORTION_FIELDS}")
        values = {key: fit(key, value, hints[key], f"portion {name!r}") for key, value in options.items()}

        # the first portion keeps the run's seed; the others derive theirs from the run's seed and their name
        first = name == next(iter(self.run.portions))
        seed = self.run.seed if first else concept_id(f"{self.run.seed}/{name}")

        # the arguments of a portion contain no portions
        own = {key: value for key, value in values.items() if key in PORTION_FIELDS}
        return dataclasses.replace(
            self,
            data=data_arguments({**flat(self.data), **{key: values[key] for key in values.keys() - own.keys()}}),
            run=dataclasses.replace(self.run, **own, seed=seed, portions=None, epoch_portion=None),
        )

    def epoch_of(self) -> "Arguments":
        """The arguments of the portion that defines an epoch. Raises `ValueError` if there is no such portion."""
        portions = self.portions()
        name = self.run.epoch_portion or next(iter(portions))
        if name not in portions:
            raise ValueError(f"epoch_portion is {name!r}; expected one of the portions {sorted(portions)}")
        return portions[name]

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in the YAML file."""
        return {name: value for part in self._parts() for name, value in flat(part).items()}

    def defaults(self) -> dict[str, Any]:
        """The default of each argument, also flat: the behaviour of runs from before the argument existed."""
        return {name: value for part in self._parts() for name, value in flat(type(part)()).items()}

    def _parts(self) -> tuple[Any, ...]:
        return self.model, self.data, self.run, self.objective


# the dataclasses that the data arguments consist of
DATA = (SourceArguments, Crop, Masking)


def data_arguments(values: Mapping[str, Any]) -> DataArguments:
    """Builds the data arguments from flat values."""
    sources, crop, masking = ({key: value for key, value in values.items() if key in hints_of(kind)} for kind in DATA)
    return DataArguments(**sources, crop=Crop(**crop), masking=Masking(**masking))


def flat(part: Any) -> dict[str, Any]:
    """A dataclass as a mapping, with the fields of nested dataclasses at the same level as its own."""
    # one level: no two fields of nested dataclasses share a name
    values: dict[str, Any] = {}
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {one.name: copy.deepcopy(value)}
    return values


def hints_of(*kinds: type) -> dict[str, Any]:
    """Field -> its type, for the given dataclasses."""
    return {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
