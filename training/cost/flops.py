"""Counts the floating-point operations of a step with torch, and measures a machine's peak in matrix products.

A multiply-add counts as two. Only matrix products and convolutions count, as in torch's counter.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from oner.training.private_names import fused_attention_of_the_cpu

# rows, inner, columns: a cache-friendly square, both layers of a base-size feed-forward over 4,096 tokens, a large
# square
GEMM_SHAPES = ((2048, 2048, 2048), (4096, 768, 3072), (4096, 3072, 768), (4096, 4096, 4096))


def flop_counter() -> FlopCounterMode:
    """torch's counter, extended by the CPU's fused attention, which some releases of torch do not count."""
    forward, backward = fused_attention_of_the_cpu()

    def count(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def count_backward(gradient, query, key, value, *_, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    # maps shapes to operations: the counter never sees values
    return FlopCounterMode(display=False, custom_mapping={forward: count, backward: count_backward})


def counted_flops(function: Callable[[], object]) -> float:
    """Operations of one call by torch's `FlopCounterMode`, including recomputation in the backward."""
    with flop_counter() as counter:
        function()
    return float(counter.get_total_flops())


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def gemm_peak(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = GEMM_SHAPES,
    seconds: float = 1.0,
) -> float:
    """
    FLOP/s of the fastest single linear layer of any of `shapes`, each repeated for `seconds`: an upper bound for a
    step
    in the same dtype on this machine at this time.
    """
    best = 0.0
    for rows, inner, columns in shapes:
        # the first product selects a kernel and is not timed
        activations = torch.randn(rows, inner, device=device).to(dtype)  # (rows, inner)
        weights = torch.randn(columns, inner, device=device).to(dtype)  # (columns, inner)
        F.linear(activations, weights)
        wait_for(device)

        # the fastest of many, since other processes and clock changes only slow it down
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            F.linear(activations, weights)
            wait_for(device)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - start))
    return best


def linear_flops(rows: float, inner: int, outer: int) -> float:
    """Operations of (rows, inner) times (inner, outer)."""
    return 2.0 * rows * inner * outer


def attention_flops(batch: int, queries: int, keys: int, width: int) -> float:
    """Operations of both attention products for `batch` sequences, all heads, padded to (queries, keys)."""
    return 4.0 * batch * queries * keys * width
