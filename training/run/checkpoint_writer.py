"""Writes checkpoints asynchronously: a step only waits for a copy of the state, a thread writes it to disk.

Own code: `async_save` of torch.distributed.checkpoint writes pickles in its own layout, while our checkpoints are
safetensors and JSON, written by one process.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# file stem -> name -> tensor
Tensors = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """
    A copy of the state in host memory. The memory is reused for the next copy, since allocating gigabytes takes longer
    than copying them.
    """

    def __init__(self) -> None:
        self._places: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, tensors: Tensors) -> Tensors:
        """Copies the tensors to the CPU, contiguous, each in its own memory; overwrites the previous copy."""
        before = self._places
        self._places = {
            stem: {name: _copied(value, before.get(stem, {}).get(name)) for name, value in content.items()}
            for stem, content in tensors.items()
        }

        # copies from an accelerator run asynchronously to pinned memory; wait once for all
        if any(value.device.type != "cpu" for content in tensors.values() for value in content.values()):
            torch.accelerator.synchronize()
        return self._places


def _copied(value: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    if place is None or place.shape != value.shape or place.dtype != value.dtype:
        place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return place.copy_(value, non_blocking=True)


class CheckpointWriter:
    """
    Writes one copy of the state at a time while the run continues. Leaving the `with` block waits for the last one.

    It needs host memory for one copy of the state, never two: the next copy waits until this one is written.
    """

    def __init__(self) -> None:
        self._copy = HostCopy()
        # a thread is enough: digests, disk writes and safetensors (from 0.8 on) release the GIL
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Calls `write` in the thread with a copy of `tensors`. Raises the error of the previous write, if any."""
        self.wait()
        copy = self._copy(tensors)
        self._pending = self._thread.submit(write, copy)

    def wait(self) -> None:
        """Waits for the current write. Raises its error, once."""
        pending = self._pending
        if pending is not None:
            pending.exception()
            self._pending = None
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # the error that ends the run takes precedence; a failed last checkpoint is logged
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            logger.error(f"the last checkpoint failed too: {type(failed).__name__}: {failed}")
        finally:
            self._thread.shutdown()
            # free its memory for what follows, such as an export
            self._copy = HostCopy()
