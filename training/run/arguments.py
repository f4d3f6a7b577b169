"""What a run may be told: dataclasses. `parsing.py` fills them from a flat YAML file and the command line."""

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
    What a launcher (torchrun, `accelerate launch`) left in the environment, where Accelerate reads it too.

    Args:
        ranked: It numbered this process among others.
        cpu: It was told to take the CPU.
        fsdp, deepspeed, megatron: Engines it was asked for.
        processes: How many it started, on all machines; 1 if it is not there.
    """

    ranked: bool
    cpu: bool
    fsdp: bool
    deepspeed: bool
    megatron: bool
    processes: int


# where torchrun and the launchers of MPI say how many processes there are
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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
        processes=max(int(os.environ.get(name, "1")) for name in SIZES),
    )


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """What is trained, from which weights, and what is published of it."""

    # the tokens that a text cannot do without, and two letters
    BOUNDS: ClassVar[dict[str, str]] = {"vocab_size": "[7, inf)", "limit_alphabet": "[1, inf)", "lora": "[1, inf)"}

    # what is trained
    family: str | None = field(
        default=None, metadata=_help("Which system: its model and its objective; that of initial_model if none.")
    )
    size: str = field(default="base", metadata=_help("Named size of the family, when training from scratch."))
    model_config: dict | str | None = field(default=None, metadata=_help("Fields of the model's configuration."))

    # what it starts from; from scratch where all of these are none
    initial_model: str | None = field(
        default=None, metadata=_help("Directory, run, Hub id or one that ships: weights and processor to start from.")
    )
    initial_objective: str | None = field(
        default=None,
        metadata=_help(
            "Teacher and queues to start from: a file as `oner convert` writes it, or its directory; "
            "objective.safetensors of initial_model if it has one and this is not given. none: a fresh teacher."
        ),
    )
    initial_vision: str | None = field(
        default=None,
        metadata=_help(
            "A ViT, DeiT, MAE or DINOv2 for the tower that reads images, and its shape: file, directory or Hub id."
        ),
    )
    initial_text: str | None = field(
        default=None,
        metadata=_help("A BERT or MiniLM for texts likewise, of one tower its words; its vocabulary is `tokenizer`."),
    )
    fold_token_types: bool = field(
        default=True,
        metadata=_help("Add initial_text's first token type to its positions, as BERT does; SIMLA's code drops it."),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=_help("A BERT vocabulary (vocab.txt) or saved tokenizer; trained on the captions if none."),
    )
    vocab_size: int = field(default=30522, metadata=_help("Upper bound of a trained vocabulary."))
    lower_case: bool | None = field(
        default=None,
        metadata=_help("Fold case in a vocab.txt or trained vocabulary; as the file says, or yes, if none."),
    )
    strip_accents: bool | None = field(
        default=None,
        metadata=_help(
            "Drop the marks of Latin, Greek and Cyrillic letters (a vocab.txt: of all scripts); if none, as the file "
            "says, or with lower_case unless the captions are Vietnamese."
        ),
    )
    limit_alphabet: int | None = field(
        default=None,
        metadata=_help(
            "Most characters of a trained vocabulary; 1,000 or what covers 99.9 % of the captions if none."
        ),
    )

    # what of it learns
    lora: int | None = field(
        default=None,
        metadata={
            **_help("Rank of LoRA adapters beside the tower's frozen weights; alone 16; the export has them merged."),
            "nargs": "?",
            "const": 16,
        },
    )

    # how its layers compute
    attn_implementation: str | None = field(
        default=None, metadata=_help("eager, sdpa, flash_attention_2, flex_attention; transformers chooses if none.")
    )
    gradient_checkpointing: bool = field(default=False, metadata=_help("Trade a second forward for memory."))


@dataclass
class SourceArguments:
    """What a run reads, beside how images are cropped and what is masked."""

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
        default="pairs", metadata=_help("What a row is: an image with captions, an image, or a text.")
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Files, patterns of them, shards (cc-{00..15}.tar), folders, names known to `datasets`, "
            "hf://datasets/NAME/FILE; several are a mixture."
        ),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_help("Share of each entry of train_data, on any scale; by their numbers of rows if none."),
    )
    data_licence: str | None = field(default=None, metadata=_help("Licence of the pairs, for the model card."))
    attribution: str | None = field(
        default=None, metadata=_help("File that names the pairs' makers; copied into the model directory.")
    )

    # which rows and columns of it
    split: str | None = field(default=None, metadata=_help("Split of a data set that has several."))
    data_config: str | None = field(default=None, metadata=_help("Configuration of a data set on the Hub, likewise."))
    data_revision: str | None = field(default=None, metadata=_help("Branch, tag or commit of a data set on the Hub."))
    image_column: str | None = field(default=None, metadata=_help("Column of pictures; found by its usual names."))
    text_column: str | None = field(default=None, metadata=_help("Column of captions, one or a list a row."))
    id_column: str | None = field(default=None, metadata=_help("Rows that share an id are positives of each other."))
    streaming: bool = field(default=False, metadata=_help("Read once in order; resuming can then not be exact."))
    one_row_per_id: bool = field(default=False, metadata=_help("Never two rows of one id in a batch."))
    captions_apart: bool = field(
        default=False,
        metadata=_help("An epoch shows each caption of a row as a pair of its own, not one that is drawn."),
    )
    image_repeats: bool = field(
        default=False, metadata=_help("captions_apart may put several captions of one image into a batch.")
    )
    rows_together: int = field(
        default=1,
        metadata=_help(
            "So many rows that follow each other are always in a batch together, such as pictures that differ in one "
            "thing: each other's hard negatives."
        ),
    )

    # what becomes of an image
    eval_crop: float = field(
        default=1.0,
        metadata=_help(
            "timm's crop_pct, kept in the processor: below 1, pictures are resized to image_size / eval_crop and "
            "their middle is taken, which shows things as large as training crops do; 1 squeezes the whole picture."
        ),
    )
    image_normalization: Literal["imagenet", "clip"] | None = field(
        default=None,
        metadata=_help(
            "imagenet or clip: mean and deviation of the colours, kept in the processor; if none, imagenet's, or what "
            "the processor of initial_model says. ALBEF and SIMLA take clip's."
        ),
    )
    code_crop: Literal["common", "independent"] | None = field(
        default=None,
        metadata=_help(
            "A second view of 8 pixels a patch, for a tokenizer of pictures: common, the same crop (BEiT), or "
            "independent (SIMLA's code)."
        ),
    )

    # what becomes of a text
    max_text_length: int | None = field(
        default=None,
        metadata=_help("Longest text in tokens, the model's own if none; a row of texts is read in windows of it."),
    )
    caption_rules: Literal["albef"] | None = field(
        default=None, metadata=_help("albef: captions in lower case, without marks, of 30 words; as written if none.")
    )

    # what becomes of rows that cannot be used
    max_pixels: int | None = field(default=None, metadata=_help("Largest picture to decode, in pixels."))
    excluded_images: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Files of hashes, as sha256sum writes them, of pictures that may not be trained on: those of evaluation "
            "sets. Their rows count as bad ones."
        ),
    )
    max_bad_rows: float = field(
        default=0.01,
        metadata=_help("Share of rows that may be unusable; those are replaced and listed, above it the run stops."),
    )
    num_workers: int = field(default=2, metadata=_help("Data workers a process."))


@dataclass
class DataArguments(SourceArguments):
    """All that is told of a portion's data; flat in a file and on a command line."""

    crop: Crop = field(default_factory=Crop)
    masking: Masking = field(default_factory=Masking)


@dataclass
class RunArguments:
    """How long, how fast, on what, and what is kept on the way."""

    BOUNDS: ClassVar[dict[str, str]] = {
        # generators take 32 bits, and the process and the step are added
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

    # where the run writes, and what decides every draw
    output_dir: str = field(default="runs/oner", metadata=_help("Checkpoints, log.jsonl, and the final `model/`."))
    seed: int = field(default=0, metadata=_help("Decides weights, order, captions, crops and masks."))

    # what a step takes
    portions: dict | str | None = field(
        default=None,
        metadata=_help(
            "Batches of several kinds in a step: by name, in their order, what each is told beside or instead of the "
            "rest: arguments of the data, batch_size, repeat, gradient_cache_chunks. One portion if none."
        ),
    )
    epoch_portion: str | None = field(
        default=None, metadata=_help("The portion that an epoch is of; the first if none.")
    )
    repeat: int = field(default=1, metadata=_help("How often an epoch reads its rows."))

    # how long the run is, and how large a step
    epochs: float = field(default=1, metadata=_help("Length of the run."))
    max_steps: int | None = field(default=None, metadata=_help("Length in steps instead of epochs."))
    batch_size: int = field(default=256, metadata=_help("Rows a step over all processes."))
    gradient_cache_chunks: int = field(
        default=1,
        metadata=_help(
            "Chunks in which a process's share of a batch passes the model; loss and gradient are the whole batch's "
            "(GradCache). More chunks, less memory, for one more forward."
        ),
    )

    # the learning rate over the run: peak, end, shape, warm-up
    base_learning_rate: float = field(
        default=1e-4,
        metadata=_help("The rate is this times batch_size / 256; of several portions, the batch that an epoch is of."),
    )
    min_learning_rate: float = field(default=0.0, metadata=_help("Where the cosine ends."))
    schedule: Literal["cosine", "albef"] = field(
        default="cosine",
        metadata=_help(
            "cosine: falls with each step. albef: climbs in stairs of 100 steps, is level to the end of the first "
            "epoch, and falls with each one after."
        ),
    )
    warmup_epochs: float = field(
        default=0,
        metadata=_help("Linear warm-up of the cosine; of a stream, a share of max_steps below 1."),
    )
    warmup_steps: int | None = field(
        default=None, metadata=_help("Length of the warm-up in steps instead of epochs; of albef, 2000 if none.")
    )
    warmup_learning_rate: float = field(
        default=0.0, metadata=_help("Where the warm-up begins; ALBEF's and SIMLA's at 1e-5.")
    )

    # AdamW
    weight_decay: float = field(default=0.05, metadata=_help("AdamW's."))
    decay_norm_and_bias: bool = field(
        default=False, metadata=_help("Decay 1-D parameters too, literally as MoCo-v3's code does.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW's first moment."))
    adam_beta2: float = field(default=0.999, metadata=_help("AdamW's second moment."))
    max_grad_norm: float | None = field(default=None, metadata=_help("Clip the gradient's norm; the paper does not."))

    # how it computes
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = field(
        default="auto", metadata=_help("no, bf16, fp16, or auto: bf16 where the hardware multiplies it, else no.")
    )
    compile: bool = field(default=False, metadata=_help("torch.compile of the layers."))

    # what it writes while it runs
    log_every: int = field(default=10, metadata=_help("Steps between lines of log.jsonl."))
    report_to: list[str] = field(default_factory=list, metadata=_help("Trackers of Accelerate: tensorboard, wandb..."))
    tracker_project: str = field(default="oner", metadata=_help("The project that the trackers file the run under."))
    run_name: str | None = field(
        default=None, metadata=_help("What the trackers that name runs call this one; their own choice if none.")
    )
    save_every_epochs: float = field(
        default=1, metadata=_help("Epochs between checkpoints, a step at the least; 0: only at the end.")
    )
    keep_checkpoints: int = field(default=2, metadata=_help("How many of the last checkpoints to keep."))
    async_checkpoints: bool = field(
        default=False, metadata=_help("Write them beside the steps, from a copy of the state in the host's memory.")
    )

    # what happens after a stop, or after numbers that are not finite
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
    data_timeout: float | None = field(
        default=1800, metadata=_help("Seconds to wait for a batch before the run saves and stops; for ever if none.")
    )
    allow_changes: bool = field(
        default=False, metadata=_help("Resume although the configuration or what the run reads differs.")
    )

    # what it measures while it runs, and the weights it leaves
    eval_data: list[str] = field(default_factory=list, metadata=_help("Files for retrieval while training."))
    eval_captions: Literal["all", "first"] = field(
        default="all", metadata=_help("Which captions of a row are texts of the evaluation.")
    )
    eval_every_epochs: float = field(default=1, metadata=_help("Epochs between evaluations; 0: only at the end."))

    # what is published at the end
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32", metadata=_help("Precision of the published weights.")
    )
    licence: str | None = field(
        default=None, metadata=_help("Licence of the published weights, as the Hub names it; the card says if none.")
    )
    language: list[str] = field(
        default_factory=list, metadata=_help("Languages of the texts, as the Hub names them (en); for the card.")
    )
    repo_id: str | None = field(
        default=None, metadata=_help("Name of the repository, `name` or `owner/name`; that of output_dir if none.")
    )


# what of a run a portion may have for itself
PORTION_FIELDS = ("batch_size", "repeat", "gradient_cache_chunks")


@dataclass
class Arguments:
    """Everything a run was told; `objective` is the family's own dataclass."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    objective: Any

    def portions(self) -> dict[str, "Arguments"]:
        """
        The arguments of each portion of a step, in their order. A portion's own seed decides its order, captions,
        crops and masks; the first one's is the run's.

        Raises:
            ValueError: a portion is told what no portion can be.
        """
        if self.run.portions is None:
            return {self.data.kind: self}
        return {name: self._portion(name, options) for name, options in self.run.portions.items()}

    def _portion(self, name: str, options: dict[str, Any]) -> "Arguments":
        # what a portion may have for itself: all of its data, and a few fields of the run
        hints = {**hints_of(*DATA), **{known: hints_of(RunArguments)[known] for known in PORTION_FIELDS}}
        if foreign := sorted(set(options) - set(hints)):
            raise ValueError(
                f"portion {name!r} is told {foreign}; expected arguments of the data, or {PORTION_FIELDS}"
            )
        values = {key: fit(key, value, hints[key], f"portion {name!r}") for key, value in options.items()}

        # the first portion keeps the run's seed, the others draw from seeds of their own, stable in their name
        first = name == next(iter(self.run.portions))
        seed = self.run.seed if first else concept_id(f"{self.run.seed}/{name}")

        # a portion's arguments hold no portions again
        own = {key: value for key, value in values.items() if key in PORTION_FIELDS}
        return dataclasses.replace(
            self,
            data=data_arguments({**flat(self.data), **{key: values[key] for key in values.keys() - own.keys()}}),
            run=dataclasses.replace(self.run, **own, seed=seed, portions=None, epoch_portion=None),
        )

    def epoch_of(self) -> "Arguments":
        """Those of the portion that an epoch is of. Raises `ValueError` for one that is not there."""
        portions = self.portions()
        name = self.run.epoch_portion or next(iter(portions))
        if name not in portions:
            raise ValueError(f"epoch_portion is {name!r}; expected one of the portions {sorted(portions)}")
        return portions[name]

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in the YAML file."""
        return {name: value for part in self._parts() for name, value in flat(part).items()}

    def defaults(self) -> dict[str, Any]:
        """What each argument is where nothing was said of it, likewise flat: what runs did before it existed."""
        return {name: value for part in self._parts() for name, value in flat(type(part)()).items()}

    def _parts(self) -> tuple[Any, ...]:
        return self.model, self.data, self.run, self.objective


# what the arguments of the data are made of
DATA = (SourceArguments, Crop, Masking)


def data_arguments(values: Mapping[str, Any]) -> DataArguments:
    """Those of flat values."""
    sources, crop, masking = ({key: value for key, value in values.items() if key in hints_of(kind)} for kind in DATA)
    return DataArguments(**sources, crop=Crop(**crop), masking=Masking(**masking))


def flat(part: Any) -> dict[str, Any]:
    """A dataclass as a mapping in which those that it holds are laid out beside its own fields."""
    # one level: no two fields of nested dataclasses share a name
    values: dict[str, Any] = {}
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {one.name: copy.deepcopy(value)}
    return values


def hints_of(*kinds: type) -> dict[str, Any]:
    """Field -> its type, of dataclasses."""
    return {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
