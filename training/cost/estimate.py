"""Estimates the cost of a run before it starts, for `oner estimate`: memory by part, pairs per second, hours.

Operations and activations come from the run's own step on fake tensors (`rehearsal.py`); the speed follows from the
device's peak and an assumed share of it (MFU).
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from oner.training.conversion.towers import tower_fields
from oner.training.publishing.origins import may_be_on_the_hub
from oner.training.run.arguments import Arguments
from oner.training.run.parsing import parse_arguments

from .rehearsal import Rehearsal, rehearse

GIB = 2**30
TERA = 1e12
# default share of the data sheet's peak: that of OneR's base step on one H200, batch 256, eager and compiled
# (docs/gpu.md)
EAGER_MFU = 0.31
COMPILED_MFU = 0.36
# added for the allocator's rounding, libraries' workspaces and gradients in transit
MARGIN = 0.10


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        half (`float`): Dense TFLOP/s in bf16 or fp16, from the manufacturer's data sheet.
        single (`float`): The same in fp32, TF32 off.
        memory (`float`): GiB.
    """

    half: float
    single: float
    memory: float


DEVICES = {
    "v100": Device(125, 15.7, 32),
    "a100": Device(312, 19.5, 80),
    "l4": Device(121, 30.3, 24),
    "l40s": Device(362, 91.6, 48),
    "rtx4090": Device(165, 82.6, 24),
    "h100": Device(989, 67, 80),
    "h200": Device(989, 67, 141),
}
# parts that each kind of sharding divides by the number of devices
SHARDS = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights", "teacher"),
    "fsdp2": ("optimizer", "gradients", "weights", "teacher"),
}


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        memory (`dict[str, float]`): GiB per device, by part; `total` is their sum.
        flops_per_pair (`float`): Operations per pair, including recomputation.
        pairs_per_second (`float`): Of all devices together.
        steps, hours, device_hours (*optional*): Of the whole run, if its length is known.
    """

    memory: dict[str, float]
    flops_per_pair: float
    pairs_per_second: float
    steps: int | None
    hours: float | None
    device_hours: float | None


def configuration_of(arguments: Arguments) -> PreTrainedConfig:
    """
    The model's configuration without data or tokenizer: the vocabulary is `vocab_size`, an upper bound. A later stage
    is estimated by its `size` before the model that it begins with is there.
    """
    model = arguments.model
    overrides = dict(model.model_config or {})
    config_class = CONFIG_MAPPING[model.family]
    if model.initial_model is not None:
        if Path(model.initial_model).exists() or may_be_on_the_hub(model.initial_model):
            return config_class.from_pretrained(model.initial_model, **overrides)
        warnings.warn(f"{model.initial_model} is not there: estimated for the size {model.size!r}", stacklevel=2)
    told = {}
    if model.initial_vision is not None or model.initial_text is not None:
        told = tower_fields(config_class, model.size, overrides, model.initial_vision, model.initial_text)
    return config_class.from_size(model.size, **{"vocab_size": model.vocab_size, **told, **overrides})


def memory_by_part(rehearsal: Rehearsal, arguments: Arguments, count: int, sharding: str, half: bool) -> dict:
    """GiB per device. Weights, gradients, teacher and AdamW's two moments are fp32."""
    # bytes on a single device; activations and batch are already one device's share
    chunks = arguments.run.gradient_cache_chunks
    parts = {
        "weights": 4.0 * rehearsal.parameters + rehearsal.buffers,
        "gradients": 4.0 * rehearsal.trained,
        "optimizer": 8.0 * rehearsal.trained,
        "teacher": 4.0 * rehearsal.teacher,
        # autocast caches a half-precision copy of each weight until the end of the pass
        "half weights": 2.0 * rehearsal.parameters if half else 0.0,
        "activations": float(rehearsal.activations),
        "batch": float(rehearsal.inputs) * chunks,
    }

    # sharded parts are divided by the number of devices
    for name in SHARDS[sharding]:
        parts[name] /= count
    parts["margin"] = MARGIN * sum(parts.values())
    gib = {name: value / GIB for name, value in parts.items()}
    return {**gib, "total": sum(gib.values())}


def default_mfu(arguments: Arguments) -> float:
    """The MFU that is assumed if none is given."""
    return COMPILED_MFU if arguments.run.compile else EAGER_MFU


def estimate(
    arguments: Arguments,
    device: Device,
    count: int = 1,
    mfu: float | None = None,
    words: int = 12,
    pairs: int | None = None,
    sharding: str = "ddp",
) -> Estimate:
    """
    Args:
        count: Number of devices; each takes an equal share of the batch.
        mfu: Share of the device's peak that the step reaches, counting recomputation; if None, the value measured with
            or without `compile`.
        words: Average tokens per caption; one caption of each batch has the maximum length.
        pairs: Number of training pairs, for a run measured in epochs.

    Raises:
        ValueError: the batch size does not suit the number of devices or chunks; a value is out of range.
    """
    run = arguments.run
    chunks = run.gradient_cache_chunks
    mfu = default_mfu(arguments) if mfu is None else mfu
    if count < 1 or not 0 < mfu <= 1 or sharding not in SHARDS:
        raise ValueError(f"got count {count}, mfu {mfu}, sharding {sharding!r}; expected 1 or more, a share in (0, 1] "
                         f"and one of {sorted(SHARDS)}")  # fmt: skip
    if run.batch_size % count or run.batch_size // count < chunks:
        raise ValueError(
            f"batch_size is {run.batch_size}; expected a multiple of {count} devices, with at least {chunks} pairs "
            "each"
        )

    # one chunk of one device's batch, padded to its longest text
    config = configuration_of(arguments)
    share = -(-(run.batch_size // count) // chunks)
    lengths = [config.max_text_length] + [min(words, config.max_text_length)] * (share - 1)
    half = run.mixed_precision != "no"
    rehearsal = rehearse(arguments, config, lengths, "bf16" if half else "no")

    # operations per pair, and the resulting speed
    repeated = rehearsal.repeated if chunks > 1 else 0.0
    work = (rehearsal.flops + repeated) / rehearsal.pairs
    rate = count * mfu * TERA * (device.half if half else device.single) / work

    # length of the run, from max_steps or from epochs of whole batches
    steps = run.max_steps
    if steps is None and pairs is not None:
        steps = round(run.epochs * (pairs // run.batch_size))
    hours = None if steps is None else steps * run.batch_size / rate / 3600
    return Estimate(
        memory=memory_by_part(rehearsal, arguments, count, sharding, half),
        flops_per_pair=work,
        pairs_per_second=rate,
        steps=steps,
        hours=hours,
        device_hours=None if hours is None else hours * count,
    )


def describe(result: Estimate, device: Device, count: int, mfu: float, words: int) -> str:
    """The estimate as lines of text."""
    lines = [f"{'memory a device':<24}{'GiB':>8}"]
    lines += [f"  {name:<22}{value:>8.2f}" for name, value in result.memory.items()]
    fits = (
        "fits" if result.memory["total"] <= device.memory else "DOES NOT FIT; gradient_cache_chunks makes it smaller"
    )
    lines += [
        f"  of {device.memory:.0f} GiB: {fits}",
        f"{result.flops_per_pair / 1e9:.1f} GFLOP a pair ({words} words a caption)",
        f"{result.pairs_per_second:.0f} pairs/s on {count} device(s) at an assumed MFU of {mfu:.0%}",
    ]
    if result.hours is None:
        lines.append("length unknown: give --pairs or --max_steps")
    else:
        lines.append(f"{result.steps} steps, {result.hours:.1f} hours, {result.device_hours:.1f} device-hours")
    return "\n".join(lines)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner estimate`: `rest` is the run's own command line, `--config` and what overrides it."""
    # a device of the table, with the caller's own figures if given
    known = DEVICES[options.device]
    device = Device(
        half=options.peak_tflops or known.half,
        single=options.peak_tflops or known.single,
        memory=options.memory_gib or known.memory,
    )

    # the run's own arguments
    arguments = parse_arguments(rest)
    mfu = default_mfu(arguments) if options.mfu is None else options.mfu
    result = estimate(arguments, device, options.count, mfu, options.words, options.pairs, sharding=options.sharding)
    if options.json:
        print(json.dumps({**asdict(result), "mfu": mfu, "count": options.count}, indent=1))
    else:
        print(describe(result, device, options.count, mfu, options.words))
    return 0
