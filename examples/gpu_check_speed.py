"""The cost of the base models' training steps on one accelerator: the part `speed` of examples/gpu_check.py.

Every step is that of a real run: objective with teacher, autocast over fp32 weights, fused AdamW, teacher update.
Batches are on the device; captions have the lengths of web captions, a mean of 12 tokens and one of 64 in each batch.
MFU divides by the fastest bf16 product of 8192 x 8192 x 8192 in the same process.
"""

import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_steps import STEPS, Batch, ObjectiveStep, Step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig

from oner.training.cost.estimate import DEVICES, configuration_of, estimate
from oner.training.cost.flops import counted_flops, gemm_peak, wait_for
from oner.training.cost.flops_oner import PairShape, oner_step_flops
from oner.training.objectives.objective import Example, objective_classes
from oner.training.run.arguments import Arguments
from oner.training.run.gradient_cache import loss_and_gradients
from oner.training.run.launch import make_accelerator
from oner.training.run.optimization import compile_regions
from oner.training.run.parsing import parse_arguments

CONFIGS = Path(__file__).resolve().parent / "configs"
MEAN_TOKENS = 12
# the paper's run: epochs, pairs of its four data sets
PAPER_EPOCHS, PAPER_PAIRS = 40, 5_100_000
Figures = dict[str, Any]
# kind -> pattern of its kernels; the first match counts
KINDS = {
    "compiled": "^triton",
    "attention": "flash|fmha|attention|sdpa|cudnn.*mha",
    "products": "gemm|cutlass|nvjet|cublas|_mm_|wgmma|xmma",
    "convolution": "conv|cudnn|nchw|nhwc|implicit|wgrad|dgrad",
    "norms": "norm|batch_norm",
    "optimiser": "adam|multi_tensor|foreach",
    "copies": "copy|cat|memcpy|memset|fill",
    "reductions": "reduce|softmax",
    "pointwise": "elementwise|gelu",
}


def caption_lengths(pairs: int, longest: int, seed: int) -> list[int]:
    """Tokens per caption, as in web captions: log-normal with mean 12, at most `longest`, which one caption has."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN_TOKENS) - 0.18, 0.6, pairs)
    return [longest, *np.clip(np.round(drawn), 3, longest).astype(int).tolist()[1:]]


class Bench:
    """The device, the number of repeats, the GEMM peak, and functions shared by all cases."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny
        self.repeats = 1 if tiny else 5
        self.peak = 0.0

    def arguments(self, config: str, pairs: int, **overrides: Any) -> Arguments:
        fields = {"batch_size": pairs, "train_data": "none", "vocab_size": 30522, "output_dir": "runs/gpu_check"}
        if self.tiny:
            small = '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, '
            small += '"projection_dim": 16, "max_text_length": 32}'
            fields |= {"vocab_size": 300, "model_config": small, "mixed_precision": "bf16"}
        line = [word for name, value in {**fields, **overrides}.items() for word in (f"--{name}", str(value))]
        return parse_arguments(["--config", str(CONFIGS / config), *line])

    def batches(self, config: PreTrainedConfig, pairs: int, count: int = 2) -> list[Batch]:
        """Batches with equal numbers of pairs and different texts, on the host, pinned if a GPU is used."""
        made = []
        for seed in range(count):
            lengths = caption_lengths(pairs, config.max_text_length, seed)
            family = objective_classes(config.model_type)[0]
            batch = family.example_batches(config, lengths, Example(seed=seed))["pairs"]
            batch["pixel_values"].normal_(generator=torch.Generator().manual_seed(seed))
            made.append({name: self._pinned(value) for name, value in batch.items()})
        return made

    def _pinned(self, value: torch.Tensor) -> torch.Tensor:
        return value.pin_memory() if self.device.type == "cuda" else value

    def on_device(self, batches: list[Batch]) -> list[Batch]:
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]

    def time(self, step: Callable[[Batch], object], batches: list[Batch], pairs: int) -> Figures:
        """Seconds per step over `repeats` consecutive steps, as in training, and their memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(3):
            wait_for(self.device)
            start = time.perf_counter()
            for number in range(self.repeats):
                step(batches[number % len(batches)])
            wait_for(self.device)
            seconds.append((time.perf_counter() - start) / self.repeats)
        median = statistics.median(seconds)
        figures = {"pairs": pairs, "seconds": median, "all_seconds": seconds, "pairs_per_second": pairs / median}
        if self.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return figures

    def rated(self, figures: Figures, flops: float) -> Figures:
        """Adds operations, MFU, and the hours of the paper's run at this rate."""
        rate = flops / figures["seconds"]
        hours = PAPER_EPOCHS * PAPER_PAIRS / figures["pairs_per_second"] / 3600
        shares = {"mfu_of_gemm": rate / self.peak, "mfu_of_data_sheet": rate / (DEVICES["h100"].half * 1e12)}
        return {**figures, "flops": flops, "tflops_per_second": rate / 1e12, **shares, "paper_hours": hours}


def run_cases(cases: dict[str, Callable[[], Figures]], device: torch.device) -> Iterator[tuple[str, Figures]]:
    """Runs each case: an error takes the place of its figures, and the next case starts with an empty device."""
    for name, case in cases.items():
        start = time.perf_counter()
        try:
            figures = case()
        except Exception as error:  # noqa: BLE001  the other cases must still run
            figures = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-3000:]}
        if device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
        yield name, {**figures, "wall_seconds": time.perf_counter() - start}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")


def profiled(step: Callable[[], object], device: torch.device, rows: int = 20) -> Figures:
    """Device time of one step by kernel, the most expensive first, and by kind; how often the host waited."""
    on_gpu = device.type == "cuda"
    wait_for(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        step()
        wait_for(device)
    events = recorded.key_averages()
    spent = {}
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own and (not on_gpu or event.device_type == DeviceType.CUDA):
            spent[event.key] = {"ms": own / 1e3, "calls": event.count}
    kinds: dict[str, float] = {}
    for name, one in spent.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + one["ms"]
    dearest = sorted(spent.items(), key=lambda item: -item[1]["ms"])[:rows]
    waits = {event.key: event.count for event in events if "Synchronize" in event.key or event.key == "aten::item"}
    return {
        "total_ms": sum(kinds.values()),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name[:140], **one} for name, one in dearest],
        "waits": waits,
    }


def formula(step: ObjectiveStep, batches: list[Batch]) -> float:
    """Operations of a step of OneR, with attention over sequences of mean length: its kernel skips padding."""
    counted = []
    for batch in batches:
        pairs, words = len(batch["ids"]), len(batch["text_index"])
        shape = PairShape(pairs, round(words / pairs), words, len(batch["mlm_index"]), keys=pairs)
        counted.append(oner_step_flops(step.config, step.arguments.objective, shape).total)
    return statistics.mean(counted)


def oner_case(bench: Bench, pairs: int, compiled: bool, backend: str = "inductor") -> Figures:
    """OneR's base step without chunks."""
    arguments = bench.arguments("oner_base_224.yaml", pairs)
    config = configuration_of(arguments)
    batches = bench.on_device(bench.batches(config, pairs))
    step = ObjectiveStep(arguments, config, bench.device, half=True)
    first = warm_up(step, batches, compiled, backend)
    figures = bench.rated(bench.time(step, batches, pairs), formula(step, batches))
    figures |= {"first_seconds": first, "profile": profiled(lambda: step(batches[0]), bench.device)}
    return figures


def warm_up(step: ObjectiveStep, batches: list[Batch], compiled: bool, backend: str = "inductor") -> list[float]:
    """Runs both batches twice, after which nothing is compiled or tuned any more; returns the seconds of each."""
    if compiled:
        compile_regions([step.model, *(teacher.model for teacher in step.objective.teachers())], backend)
    seconds = []
    for batch in (*batches, *batches):
        start = time.perf_counter()
        step(batch)
        wait_for(step.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def cached_case(bench: Bench, pairs: int, chunks: int, compiled: bool, backend: str = "inductor") -> Figures:
    """A large batch with the gradient cache. MFU counts the step's operations without the repeated forward."""
    arguments = bench.arguments("oner_base_224.yaml", pairs)
    config = configuration_of(arguments)
    accelerator = make_accelerator(arguments.run)
    batches = bench.batches(config, pairs)
    step = ObjectiveStep(arguments, config, bench.device, half=True)

    def whole(batch: Batch) -> None:
        portions = {"pairs": batch}, 0.5, {"pairs": chunks}
        step.kept = loss_and_gradients(accelerator, step.objective, step.model, *portions).kept
        step.optimizer.step()
        step.optimizer.zero_grad()
        step.after()

    if compiled:
        compile_regions([step.model, *(teacher.model for teacher in step.objective.teachers())], backend)
    start = time.perf_counter()
    whole(batches[0])
    wait_for(bench.device)
    first = time.perf_counter() - start
    repeats, bench.repeats = bench.repeats, 1 if bench.tiny else 2
    figures = bench.time(whole, batches, pairs)
    bench.repeats = repeats
    return {**bench.rated(figures, formula(step, batches)), "chunks": chunks, "first_seconds": [first]}


def other_case(bench: Bench, name: str, pairs: int, compiled: bool = False) -> Figures:
    """A CLIP of equal width and depth on the same batches; its operations are counted by torch."""
    arguments = bench.arguments("oner_base_224.yaml", pairs)
    config = configuration_of(arguments)
    batches = bench.on_device(bench.batches(config, pairs))
    step: Step = STEPS[name](arguments, config, bench.device)
    flops = statistics.mean(counted_flops(lambda batch=batch: step(batch)) for batch in batches)
    if compiled:
        step.compile()
    start = time.perf_counter()
    for batch in (*batches, *batches):
        step(batch)
    wait_for(bench.device)
    first = time.perf_counter() - start
    return {**bench.rated(bench.time(step, batches, pairs), flops), "first_seconds": [first]}


def simla_case(bench: Bench, pairs: int, compiled: bool, backend: str = "inductor") -> Figures:
    """SIMLA's base step at 256 pixels, with given visual codes."""
    extra = {"queue_size": 64} if bench.tiny else {}
    arguments = bench.arguments("simla_base_256.yaml", pairs, **extra)
    arguments.objective.image_tokenizer = None
    config = configuration_of(arguments)
    batches = bench.on_device(bench.batches(config, pairs))
    step = ObjectiveStep(arguments, config, bench.device, half=True)
    flops = statistics.mean(counted_flops(lambda batch=batch: step(batch)) for batch in batches)
    first = warm_up(step, batches, compiled, backend)
    figures = bench.rated(bench.time(step, batches, pairs), flops)
    figures.pop("paper_hours")
    return {**figures, "first_seconds": first, "profile": profiled(lambda: step(batches[0]), bench.device)}


def estimate_case(bench: Bench, pairs: int, measured: Figures) -> Figures:
    """What `oner estimate` predicts for OneR's eager step, and the relative errors."""
    arguments = bench.arguments("oner_base_224.yaml", pairs)
    share = measured.get("mfu_of_data_sheet", 0.4)
    told = estimate(arguments, DEVICES["h100"], mfu=min(1.0, share or 0.4), words=MEAN_TOKENS, pairs=PAPER_PAIRS)
    figures = {"memory_gib": told.memory["total"], "flops_per_pair": told.flops_per_pair}
    figures |= {"pairs_per_second_at_the_measured_mfu": told.pairs_per_second, "memory_by_part": told.memory}
    if "flops" in measured:
        figures["flops_error"] = told.flops_per_pair / (measured["flops"] / pairs) - 1
        figures["rate_error"] = told.pairs_per_second / measured["pairs_per_second"] - 1
    if "memory_gib" in measured:
        figures["memory_error"] = told.memory["total"] / measured["memory_gib"] - 1
    return figures


def peaks(bench: Bench) -> Figures:
    """Peak and sustained FLOP/s of a square bf16 product, and bytes/s of a copy, counting reads and writes."""
    side = 256 if bench.tiny else 8192
    bench.peak = gemm_peak(torch.bfloat16, bench.device, ((side, side, side),), 0.1 if bench.tiny else 1.5)
    one, other = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    count = 2 if bench.tiny else 200
    wait_for(bench.device)
    start = time.perf_counter()
    for _ in range(count):
        one @ other
    wait_for(bench.device)
    mean = count * 2 * side**3 / (time.perf_counter() - start)
    source = torch.randn(1 << (20 if bench.tiny else 29), device=bench.device)
    target = torch.empty_like(source)
    wait_for(bench.device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    wait_for(bench.device)
    copied = 10 * 2 * source.numel() * 4 / (time.perf_counter() - start)
    return {"gemm_flops": bench.peak, "gemm_flops_sustained": mean, "copy_bytes_per_second": copied}


def speed(device: torch.device, tiny: bool, only: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Runs the cases, most important first."""
    bench, told = Bench(device, tiny), {}
    n, large, few = (4, 8, 4) if tiny else (256, 2048, 64)
    backend = "aot_eager" if tiny else "inductor"
    cases = {
        "peaks": lambda: peaks(bench),
        "oner_eager": lambda: oner_case(bench, n, compiled=False),
        "oner_compiled": lambda: oner_case(bench, n, compiled=True, backend=backend),
        "oner_compiled_fp8": lambda: fp8_case(bench, n),
        "transformers_clip_eager": lambda: other_case(bench, "transformers_clip_bf16", n),
        "open_clip_eager": lambda: other_case(bench, "clip_bf16", n),
        "oner_cached": lambda: cached_case(bench, large, large // n, compiled=not tiny, backend=backend),
        "simla_eager": lambda: simla_case(bench, few, compiled=False),
        "estimate": lambda: estimate_case(bench, n, told["oner_eager"]),
        "oner_compiled_larger": lambda: oner_case(bench, 2 * n, compiled=True, backend=backend),
        "transformers_clip_compiled": lambda: other_case(bench, "transformers_clip_bf16", n, compiled=not tiny),
        "open_clip_compiled": lambda: other_case(bench, "clip_bf16", n, compiled=not tiny),
        "simla_compiled": lambda: simla_case(bench, few, compiled=not tiny, backend=backend),
        "simla_eager_larger": lambda: simla_case(bench, 2 * few, compiled=False),
    }
    if only:
        cases = {name: case for name, case in cases.items() if name in ("peaks", *only)}
    for name, figures in run_cases(cases, device):
        told[name] = figures
        yield name, figures


def to_fp8(models: list[torch.nn.Module], emulate: bool) -> int:
    """Gives every linear map of the layers torchao's fp8 products; weights stay in fp32. Returns how many."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    count = 0
    for model in models:
        for layer in (one for one in model.modules() if type(one).__name__ in model._no_split_modules):
            count += sum(isinstance(one, torch.nn.Linear) for one in layer.modules())
            convert_to_float8_training(layer, config=config)
    return count


def fp8_case(bench: Bench, pairs: int) -> Figures:
    """OneR's compiled step with fp8 products in student and teacher; repeats one batch, to compile only one shape."""
    arguments = bench.arguments("oner_base_224.yaml", pairs)
    config = configuration_of(arguments)
    batches = bench.on_device(bench.batches(config, pairs, count=1))
    step = ObjectiveStep(arguments, config, bench.device, half=True)
    with step.autocast():
        before = float(step.loss(batches[0]).detach())
    teachers = step.objective.teachers()
    linears = to_fp8([step.model, *(teacher.model for teacher in teachers)], emulate=bench.device.type == "cpu")
    for teacher in teachers:
        teacher.follow(step.model)
    with step.autocast():
        after = float(step.loss(batches[0]).detach())
    first = warm_up(step, batches, compiled=not bench.tiny)
    figures = bench.rated(bench.time(step, batches, pairs), formula(step, batches))
    figures |= {"linears": linears, "loss_in_bf16": before, "loss_in_fp8": after, "first_seconds": first}
    return {**figures, "profile": profiled(lambda: step(batches[0]), bench.device)}
