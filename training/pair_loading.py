"""From arguments to processor, model, and batches: what a run of any family on pairs begins with."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForPreTraining, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from oner.modeling.convert_towers import initialise
from oner.processing.image_augmentation import NORMALIZATIONS, TrainingImageTransform
from oner.processing.image_processing_vl import OneRImageProcessor
from oner.processing.processing_vl import OneRProcessor
from oner.processing.vl_captions import pre_caption
from oner.processing.vl_collation import PairCollator
from oner.processing.vl_dataset import PairRows, PairStream, PairTrainingSet, PairTrainingStream
from oner.processing.vl_mixture import open_mixture
from oner.processing.vl_quarantine import Quarantine, StandIns, line_of
from oner.processing.vl_sampling import PairBatchSampler, PairOrder
from oner.processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer

from .arguments import Arguments, DataArguments
from .data_workers import outlive_signals_to_the_group
from .distributed import rank, sum_over_processes, world_size
from .model_loading import load_model
from .optimization import checkpoint_activations

logger = logging.get_logger(__name__)

# (RowKey, row, stand-ins) of each place -> batch
Collator = Callable[[list[tuple]], dict[str, Any]]
CAPTION_RULES = {"albef": pre_caption}
CODE_STRIDE = 8  # pixels a side that one visual code stands for in every tokenizer of DALL-E's layout


def open_training_pairs(data: DataArguments, output_dir: str | None = None) -> PairRows | PairStream:
    """
    The training pairs, columns checked; rows found bad are left to the quarantine of `PairLoader`.

    Raises:
        PairDataError: data that cannot be read as rows of pairs; names the file and what is wrong.
        BadRowsError: if `output_dir` is given: too many rows are bad. Its quarantine.jsonl lists them.
    """
    pairs = open_mixture(
        data.train_data,
        data.image_column,
        data.text_column,
        data.id_column,
        split=data.split,
        streaming=data.streaming,
        bad_rows="skip",
        weights=data.data_weights,
    )
    if output_dir is not None:
        quarantine_of(pairs, output_dir, data.max_bad_rows).check_opening()
    return pairs


def quarantine_of(pairs: PairRows | PairStream, output_dir: str, max_bad_rows: float) -> Quarantine:
    """The list of bad rows of a run over `pairs`, with those that are known already."""
    if isinstance(pairs, PairStream):
        return Quarantine(output_dir, max_bad_rows, is_main=rank() == 0)
    opened = [(*pairs.where(row), reason) for row, reason in sorted(pairs.bad.items())]
    return Quarantine(output_dir, max_bad_rows, opened, len(pairs), is_main=rank() == 0)


def build_processor_and_config(
    arguments: Arguments, pairs: PairRows | PairStream
) -> tuple[OneRProcessor, PreTrainedConfig]:
    """
    The tokenizer (given, or trained on the captions: the same on every process), the configuration that fits it, and
    the processor that fits both.

    Raises:
        ValueError: a family or size that does not exist, a stream without a tokenizer.
    """
    model, overrides = arguments.model, dict(arguments.model.model_config or {})
    colours = NORMALIZATIONS[arguments.data.image_normalization or "imagenet"]
    if model.initial_model is not None:
        processor = AutoProcessor.from_pretrained(model.initial_model)
        tokenizer = processor.tokenizer
        if arguments.data.image_normalization is None:
            colours = processor.image_processor.image_mean, processor.image_processor.image_std
        config = AutoConfig.from_pretrained(model.initial_model, **overrides)
    else:
        tokenizer = _tokenizer(arguments, pairs, overrides.get("max_text_length", 64))
        ids = {
            "pad_token_id": tokenizer.pad_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            "image_token_id": tokenizer.image_token_id,
        }
        config_class = CONFIG_MAPPING[model.family]
        config = config_class.from_size(model.size, **{"vocab_size": len(tokenizer), **ids, **overrides})
    image_processor = _image_processor(config.image_size, config.patch_size, arguments.data.eval_crop, *colours)
    return OneRProcessor(image_processor, tokenizer, max_text_length=config.max_text_length), config


def _image_processor(
    image_size: int, patch_size: int, eval_crop: float, mean: Sequence[float], std: Sequence[float]
) -> OneRImageProcessor:
    side = round(image_size / eval_crop)
    options = {"size": {"height": side, "width": side}, "patch_size": patch_size}
    options |= {"image_mean": list(mean), "image_std": list(std)}
    if eval_crop < 1:
        options |= {"do_center_crop": True, "crop_size": {"height": image_size, "width": image_size}}
    return OneRImageProcessor(**options)


def _tokenizer(arguments: Arguments, pairs: PairRows | PairStream, max_text_length: int):
    if arguments.model.tokenizer is not None:
        return tokenizer_from_vocab(arguments.model.tokenizer, max_text_length=max_text_length)
    if isinstance(pairs, PairStream):
        raise ValueError("a stream is read once, so no vocabulary can be trained on it first; expected `tokenizer`")
    return train_tokenizer(pairs.captions(), vocab_size=arguments.model.vocab_size, max_text_length=max_text_length)


def build_model(arguments: Arguments, config: PreTrainedConfig) -> PreTrainedModel:
    """
    The student in fp32: from `initial_model`, or from scratch. Heads that the first stage never had are drawn by
    `seed`, and named.

    Raises:
        ModelDirectoryError: `initial_model` is damaged, or lacks weights of its tower or a part of a head.
        ValueError: `initial_vision` or `initial_text` cannot be read or does not fit; names the keys.
    """
    torch.manual_seed(arguments.run.seed)
    options = {}
    if arguments.model.attn_implementation is not None:
        options["attn_implementation"] = arguments.model.attn_implementation
    if arguments.model.initial_model is not None:
        model = load_model(
            AutoModelForPreTraining,
            arguments.model.initial_model,
            draws_heads=True,
            config=config,
            dtype=torch.float32,
            **options,
        )
    else:
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32, **options)
    if arguments.model.initial_vision is not None or arguments.model.initial_text is not None:
        report = initialise(model, arguments.model.initial_vision, arguments.model.initial_text)
        if rank() == 0:
            logger.warning(report.describe())
    if arguments.model.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def pair_collator(
    arguments: Arguments,
    processor: OneRProcessor,
    config: PreTrainedConfig,
    kind: type[PairCollator] = PairCollator,
    **others: Any,
) -> PairCollator:
    """The collator of a run's pairs, or a `kind` of it for a task; `others` are further arguments of that."""
    data, run = arguments.data, arguments.run
    second_view = {}
    if data.code_crop is not None:
        side = config.image_size // config.patch_size * CODE_STRIDE
        second_view = {"code_size": side, "code_crop": data.code_crop}
    return kind(
        processor.tokenizer,
        TrainingImageTransform(
            config.image_size,
            scale=tuple(data.crop_scale),
            margin=data.crop_margin,
            hflip=data.horizontal_flip,
            color_jitter=data.color_jitter,
            grayscale=data.grayscale,
            rand_augment=data.rand_augment,
            mean=processor.image_processor.image_mean,
            std=processor.image_processor.image_std,
            **second_view,
        ),
        image_token_id=config.image_token_id,
        cls_token_id=config.cls_token_id,
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
        vocab_size=config.vocab_size,
        patch_size=config.patch_size,
        max_text_length=config.max_text_length,
        seed=run.seed,
        mlm_probability=data.mlm_probability,
        mim_ratio=tuple(data.mim_ratio),
        mim_masking=data.mim_masking,
        mim_min_block=data.mim_min_block,
        random_specials=data.random_specials,
        clean_caption=CAPTION_RULES.get(data.caption_rules),
        max_pixels=data.max_pixels,
        source=", ".join(data.train_data),
        **others,
    )


class PairLoader:
    """
    `loader(start_step)` yields this process's batches from that step to the end of the run, the same whether the run
    was ever stopped. A stream is the exception, and says so: `resume_note`.

    A row that cannot be used is replaced and listed in `quarantine.jsonl` in the output directory. `collator` is that
    of rows other than pairs, with which a task is fine-tuned.

    Attributes:
        quarantine (`Quarantine`): That list.
        epoch_steps, total_steps (`int`): Length of an epoch and of the run; a stream's epoch is the whole run.
        resume_note (`str`, *optional*): Why resuming cannot be exact, if it cannot.

    Raises:
        ValueError: a stream without max_steps, or with a warm-up that would last as long as the run.
        BadRowsError: more rows are bad than `max_bad_rows` allows, here or while the batches are read.
    """

    def __init__(
        self,
        arguments: Arguments,
        pairs: PairRows | PairStream,
        processor: OneRProcessor,
        config: PreTrainedConfig,
        collator: Collator | None = None,
    ):
        data, run = arguments.data, arguments.run
        self.arguments, self.pairs = arguments, pairs
        self.quarantine = quarantine_of(pairs, run.output_dir, data.max_bad_rows)
        self.quarantine.check_opening()
        groups = pairs.ids() if data.one_row_per_id and isinstance(pairs, PairRows) else None
        if isinstance(pairs, PairStream):
            if run.max_steps is None:
                raise ValueError("a stream has no length, so the run needs max_steps, got none")
            if run.schedule == "albef":
                raise ValueError("schedule albef falls with each epoch, and a stream has none; expected cosine")
            if run.warmup_steps is None and run.warmup_epochs >= 1:
                raise ValueError(
                    f"warmup_epochs is {run.warmup_epochs}, which would warm up to the end of {run.max_steps} steps; "
                    f"for a stream, warmup_epochs is a share of max_steps below 1"
                )
            self.total_steps, self.epoch_steps = run.max_steps, run.max_steps
            self.resume_note = pairs.resume_note
        else:
            self.mixture = {"groups": groups}
            if data.data_weights is not None:
                self.mixture |= {"sizes": pairs.sizes, "weights": data.data_weights}
            self.epoch_steps = PairOrder(len(pairs), run.batch_size, **self.mixture).steps_per_epoch
            self.total_steps = run.max_steps or round(run.epochs * self.epoch_steps)
            self.resume_note = None
        self.collator = pair_collator(arguments, processor, config) if collator is None else collator

    def __call__(self, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        return self._watched(self._loader_from(start_step), start_step)

    def _watched(self, batches: Iterable[dict[str, Any]], start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, while what they tell of bad rows goes into the quarantine."""
        run, quarantine, device = self.arguments.run, self.quarantine, PartialState().device
        quarantine.begin(start_step)
        if quarantine.opened and quarantine.is_main:
            count, total, path = len(quarantine.opened), quarantine.total, quarantine.path
            warnings.warn(f"{count} of {total} rows cannot be used and will be replaced; see {path}", stacklevel=3)
        earlier = sum_over_processes(quarantine.before if quarantine.is_main else (0, 0), device)
        for step, batch in enumerate(batches, start_step):
            failed = batch.pop("quarantine", [])
            if failed and quarantine.new == (0, 0):
                warnings.warn(f"a row cannot be used: {failed[0]['reason']}; see {quarantine.path}", stacklevel=3)
            quarantine.add(step, [self._line(**row) for row in failed])
            # several processes agree only now and then: the question makes an accelerator wait
            if world_size() == 1 or (step + 1) % run.log_every == 0 or step + 1 == self.total_steps:
                failures, stand_ins = map(sum, zip(earlier, sum_over_processes(quarantine.new, device), strict=True))
                quarantine.check(failures, (step + 1) * run.batch_size + stand_ins)
            yield batch

    def _line(self, row: int, **what: Any) -> dict[str, Any]:
        place = (self.pairs.name, row) if isinstance(self.pairs, PairStream) else self.pairs.where(row)
        return line_of(*place, **what)

    def _loader_from(self, start_step: int) -> DataLoader:
        run = self.arguments.run
        place = {"rank": rank(), "world_size": world_size(), "seed": run.seed, "start_step": start_step}
        if isinstance(self.pairs, PairStream):
            stream = PairTrainingStream(self.pairs, run.batch_size, self.total_steps, **place)
            return self._loader(stream, batch_size=None)
        sampler = PairBatchSampler(
            len(self.pairs), run.batch_size, total_steps=self.total_steps, **self.mixture, **place
        )
        stand_ins = StandIns(self.pairs, sampler.order, self.total_steps)
        return self._loader(PairTrainingSet(self.pairs, stand_ins), batch_sampler=sampler)

    def _loader(self, dataset, **options) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=self.collator,
            num_workers=self.arguments.data.num_workers,
            worker_init_fn=outlive_signals_to_the_group,
            pin_memory=torch.cuda.is_available(),
            # its own, or opening a loader would draw from the generator that a resumed run has just restored
            generator=torch.Generator().manual_seed(self.arguments.run.seed),
            **options,
        )
