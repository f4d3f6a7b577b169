"""Floating-point operations: counted by torch while a step runs, and what a machine's matrix products reach.

A multiplication with its addition counts as two. Only matrix products and convolutions count, as in torch's counter.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from oner.training.private_names import fused_attention_of_the_cpu

# rows, inner, columns: a square that caches like, and the two maps of a feed-forward of base size over 4,096 tokens
GEMM_SHAPES = ((2048, 2048, 2048), (4096, 768, 3072), (4096, 3072, 768), (4096, 4096, 4096))


def flop_counter() -> FlopCounterMode:
    """torch's counter, which some of its releases keep ignorant of the CPU's fused attention."""
    forward, backward = fused_attention_of_the_cpu()

    def count(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def count_backward(gradient, query, key, value, *_, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    # shapes in, operations out: the counter never sees values
    return FlopCounterMode(display=False, custom_mapping={forward: count, backward: count_backward})


def counted_flops(function: Callable[[], object]) -> float:
    """Operations of one call, by torch's `FlopCounterMode`; what is recomputed in a backward counts again."""
    with flop_counter() as counter:
        function()
    return float(counter.get_total_flops())


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def gemm_peak(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = GEMM_SHAPES,
    seconds: float = 1.0,
) -> float:
    """
    FLOP/s of the fastest single linear map of any of `shapes`, each repeated for `seconds`: the best that a step of
    the same type could do on this machine at this time, if it were nothing but that map.
    """
    best = 0.0
    for rows, inner, columns in shapes:
        # the first product chooses a kernel and is not timed
        activations = torch.randn(rows, inner, device=device).to(dtype)  # (rows, inner)
        weights = torch.randn(columns, inner, device=device).to(dtype)  # (columns, inner)
        F.linear(activations, weights)
        wait_for(device)

        # the fastest of many: other processes and clocks only ever slow it down
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            F.linear(activations, weights)
            wait_for(device)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - start))
    return best


def linear_flops(rows: float, inner: int, outer: int) -> float:
    """(rows, inner) by (inner, outer)."""
    return 2.0 * rows * inner * outer


def attention_flops(batch: int, queries: int, keys: int, width: int) -> float:
    """Both products of `batch` sequences over all heads, (queries, keys) padded."""
    return 4.0 * batch * queries * keys * width
