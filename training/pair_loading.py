"""From arguments to processor, model, and batches: what a run of any family on pairs begins with."""

from collections.abc import Iterable

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForPreTraining, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from oner.processing.image_augmentation import TrainingImageTransform
from oner.processing.image_processing_vl import OneRImageProcessor
from oner.processing.processing_vl import OneRProcessor
from oner.processing.vl_collation import PairCollator
from oner.processing.vl_dataset import PairRows, PairStream, PairTrainingSet, PairTrainingStream, open_pairs
from oner.processing.vl_sampling import PairBatchSampler, steps_in_epoch
from oner.processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer

from .arguments import Arguments, DataArguments
from .distributed import rank, world_size


def open_training_pairs(data: DataArguments) -> PairRows | PairStream:
    """The training pairs, columns checked. Raises `PairDataError` that names rows and reasons."""
    source = data.train_data if len(data.train_data) > 1 else data.train_data[0]
    return open_pairs(
        source, data.image_column, data.text_column, data.id_column, split=data.split, streaming=data.streaming
    )


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
    if model.initial_model is not None:
        tokenizer = AutoProcessor.from_pretrained(model.initial_model).tokenizer
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
    image_processor = _image_processor(config.image_size, config.patch_size, arguments.data.eval_crop)
    return OneRProcessor(image_processor, tokenizer, max_text_length=config.max_text_length), config


def _image_processor(image_size: int, patch_size: int, eval_crop: float) -> OneRImageProcessor:
    side = round(image_size / eval_crop)
    options = {"size": {"height": side, "width": side}, "patch_size": patch_size}
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
    """The student in fp32: from `initial_model`, or from scratch. What no checkpoint gives is drawn by `seed`."""
    torch.manual_seed(arguments.run.seed)
    options = {}
    if arguments.model.attn_implementation is not None:
        options["attn_implementation"] = arguments.model.attn_implementation
    if arguments.model.initial_model is not None:
        model = AutoModelForPreTraining.from_pretrained(
            arguments.model.initial_model, config=config, dtype=torch.float32, **options
        )
    else:
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32, **options)
    if arguments.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


class PairLoader:
    """
    `loader(start_step)` yields this process's batches from that step to the end of the run, the same whether the run
    was ever stopped. A stream is the exception, and says so: `resume_note`.

    Attributes:
        epoch_steps, total_steps (`int`): Length of an epoch and of the run; a stream's epoch is the whole run.
        resume_note (`str`, *optional*): Why resuming cannot be exact, if it cannot.

    Raises:
        ValueError: a stream without max_steps, or with a warm-up that would last as long as the run.
    """

    def __init__(self, arguments: Arguments, pairs: PairRows | PairStream, processor: OneRProcessor, config):
        data, run = arguments.data, arguments.run
        self.arguments, self.pairs = arguments, pairs
        self.groups = pairs.ids() if data.one_row_per_id and isinstance(pairs, PairRows) else None
        if isinstance(pairs, PairStream):
            if run.max_steps is None:
                raise ValueError("a stream has no length, so the run needs max_steps, got none")
            if run.warmup_epochs >= 1:
                raise ValueError(
                    f"warmup_epochs is {run.warmup_epochs}, which would warm up to the end of {run.max_steps} steps; "
                    f"for a stream, warmup_epochs is a share of max_steps below 1"
                )
            self.total_steps, self.epoch_steps = run.max_steps, run.max_steps
            self.resume_note = pairs.resume_note
        else:
            self.epoch_steps = steps_in_epoch(len(pairs), run.batch_size, self.groups)
            self.total_steps = run.max_steps or round(run.epochs * self.epoch_steps)
            self.resume_note = None
        self.collator = PairCollator(
            processor.tokenizer,
            TrainingImageTransform(
                config.image_size,
                scale=tuple(data.crop_scale),
                margin=data.crop_margin,
                hflip=data.horizontal_flip,
                color_jitter=data.color_jitter,
                grayscale=data.grayscale,
                rand_augment=data.rand_augment,
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
            max_pixels=data.max_pixels,
            source=", ".join(data.train_data),
        )

    def __call__(self, start_step: int) -> Iterable[dict[str, torch.Tensor]]:
        run = self.arguments.run
        place = {"rank": rank(), "world_size": world_size(), "seed": run.seed, "start_step": start_step}
        if isinstance(self.pairs, PairStream):
            stream = PairTrainingStream(self.pairs, run.batch_size, self.total_steps, **place)
            return self._loader(stream, batch_size=None)
        sampler = PairBatchSampler(
            len(self.pairs), run.batch_size, total_steps=self.total_steps, groups=self.groups, **place
        )
        return self._loader(PairTrainingSet(self.pairs), batch_sampler=sampler)

    def _loader(self, dataset, **options) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=self.collator,
            num_workers=self.arguments.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            # its own, or opening a loader would draw from the generator that a resumed run has just restored
            generator=torch.Generator().manual_seed(self.arguments.run.seed),
            **options,
        )
