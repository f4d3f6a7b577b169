"""Checkpoints written beside the training: a step waits for a copy of the state, a thread for the disk.

Own code: `async_save` of torch.distributed.checkpoint writes pickles and a layout of its own, where a checkpoint here
is safetensors and JSON, whole on one process.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# by the stem of their file, then by name
Tensors = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """
    A state in memory of the host, which is kept for the next copy: to be given gigabytes by the system takes longer
    than to copy them.
    """

    def __init__(self) -> None:
        self._places: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, tensors: Tensors) -> Tensors:
        """The same by stem and name, contiguous on the CPU, each in memory of its own; the copy before is gone."""
        before = self._places
        self._places = {
            stem: {name: _copied(value, before.get(stem, {}).get(name)) for name, value in content.items()}
            for stem, content in tensors.items()
        }

        # copies from an accelerator are queued there, in page-locked memory, and waited for once
        if any(value.device.type != "cpu" for content in tensors.values() for value in content.values()):
            torch.accelerator.synchronize()
        return self._places


def _copied(value: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    if place is None or place.shape != value.shape or place.dtype != value.dtype:
        place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return place.copy_(value, non_blocking=True)


class CheckpointWriter:
    """
    Writes one copy of a state at a time while the run goes on. To leave the block is to wait for the last one.

    With it a process holds one copy of the state more than without, on the host, and never a second: the next copy
    waits until this one is written.
    """

    def __init__(self) -> None:
        self._copy = HostCopy()
        # a thread, since digests, the disk and safetensors (from 0.8 on) let the interpreter go on meanwhile
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """`write` is called beside the run, with a copy of `tensors`. Raises what the one before has raised."""
        self.wait()
        copy = self._copy(tensors)
        self._pending = self._thread.submit(write, copy)

    def wait(self) -> None:
        """Until nothing is being written. Raises what the writing has raised, once."""
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
        # an error that ends the run comes first, and does not hide that its last checkpoint failed too
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            logger.error(f"beside the error that ends the run: {type(failed).__name__}: {failed}")
        finally:
            self._thread.shutdown()
            # what follows, such as an export, has its memory
            self._copy = HostCopy()
