"""Computes the gradient of a step by portion, at once or in chunks (GradCache: Gao et al., 2021, section 3).

1. For each chunk, compute the targets, and the representations (B, P) without gradient.
2. Compute the loss of the whole batch, and its gradient with respect to each representation.
3. For each chunk, repeat the forward with the same random numbers, and backpropagate its gradients.

This needs one more forward of the student, but only the activations of one chunk, for any B. Slopes are the gradients
of the loss with respect to representations.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from oner.training.objectives.losses import in_full
from oner.training.objectives.objective import Batch, Comparison, Objective, Portion, Taken, Targets
from oner.training.parallel.distributed import mean_counts
from oner.training.private_names import BatchNorm

from .launch import exchanging_gradients, forget_gradients, reach_all

logger = logging.get_logger(__name__)


def loss_and_gradients(
    accelerator: Accelerator,
    objective: Objective,
    student: nn.Module,
    batches: Mapping[str, Batch],
    progress: float,
    chunks: Mapping[str, int] | None = None,
    apart: bool = False,
) -> Taken:
    """
    Adds the gradient of a step to the student's parameters, one portion after the other; processes average at the
    last.

    Args:
        batches: This process's batch by portion, on the CPU; it is moved to the device one chunk at a time.
        progress: Share of the run that is done.
        chunks: Number of chunks by portion, by default 1; more than one use cached gradients. Only BatchNorm then
            depends on the chunks, with a warning; its running statistics are still updated once per step.
        apart: Other optimiser steps train parameters that this one does not.

    Returns:
        The loss and its parts, 0-dim, detached, and the tensors for the objective's `after_step`.

    Raises:
        ValueError: there are more chunks than rows, or batches of other portions than the objective's.
    """
    if batches.keys() != objective.portions.keys():
        raise ValueError(f"got batches of {sorted(batches)}; expected one for each of {sorted(objective.portions)}")

    # updates before a step, and gradients that an engine may have kept from the last one
    objective.before_step()
    several = apart or len(objective.portions) > 1
    if several:
        forget_gradients(accelerator, student)
    networks = [student, *(teacher.model for teacher in objective.teachers())]
    parts: Batch = {}
    kept: Batch = {}
    losses = []

    # one backward per portion; only the last exchanges gradients
    for number, (name, portion) in enumerate(objective.portions.items()):
        last = number == len(batches) - 1
        step = PortionStep(accelerator, portion, student, networks, progress, last, several)
        taken = step.take(batches[name], (chunks or {}).get(name, 1))
        losses.append(taken.loss)
        parts.update(taken.parts)
        kept.update(taken.kept)
    return Taken(torch.stack(losses).sum(), parts, kept)


@dataclass
class PortionStep:
    """
    One portion's part of a step. `rows`, `common` and `slopes` are explained in `Representations`.

    Args:
        networks: Student and teachers, whose running statistics are tracked by chunk.
        last: Whether this is the last portion; with its last chunk the processes exchange gradients.
        several: Whether other portions may train parameters that this one does not.
    """

    accelerator: Accelerator
    portion: Portion
    student: nn.Module
    networks: list[nn.Module]
    progress: float
    last: bool
    several: bool

    def take(self, batch: Batch, chunks: int) -> Taken:
        """Loss and gradient of a batch on the CPU."""
        if chunks > 1:
            return self.in_chunks(self.portion.split(batch, chunks), self.portion.count(batch))
        with exchanging_gradients(self.accelerator, self.student, self.last):
            with self.accelerator.autocast():
                taken = self.portion.take(self.student, _moved(batch, self.accelerator.device), self.progress)
            self.backward(taken.loss, self.last)
        return taken._replace(loss=taken.loss.detach())

    def in_chunks(self, chunks: list[Batch], counts: Batch) -> Taken:
        """Loss and gradient of a batch in chunks."""
        counts = mean_counts(_moved(counts, self.accelerator.device))
        statistics = RunningStatistics(self.networks)
        statistics.warn(len(chunks))

        # 1. represent every chunk, without gradient
        passes = self.represent(chunks, statistics)

        # 2. compare the whole batch: the loss, and its slope at each representation
        compared, slopes = self.compare(passes)

        # 3. represent every chunk again, and backpropagate its slopes
        parts = dict(compared.parts)
        statistics.begin()
        for number, chunk in enumerate(chunks):
            last = self.last and number == len(chunks) - 1
            for name, part in self.pull(chunk, passes[number], slopes.of_chunk(number), counts, last).items():
                parts[name] = parts[name] + part if name in parts else part
            statistics.add()
        statistics.settle()
        return Taken(self.portion.weigh(parts), parts, compared.kept)

    @torch.no_grad()
    def represent(self, chunks: list[Batch], statistics: "RunningStatistics") -> list["ChunkPass"]:
        """Targets, rows and common representations of each chunk, and the seed of its forward."""
        passes = []
        statistics.begin()
        for chunk in chunks:
            chunk = _moved(chunk, self.accelerator.device)
            with self.accelerator.autocast():
                targets = self.portion.targets(self.student, chunk, self.progress)
                statistics.add()
                # not the generator's state: the second pass draws more than the first, such as hard negatives, and
                # the next chunk's numbers would follow where those began
                seed = draw_seed()
                with seeded(seed, self.accelerator.device):
                    online = self.portion.represent(self.student, chunk, targets, self.progress)
                statistics.back()  # only the second pass counts
            rows = {name: in_full(value) for name, value in online.rows.items()}  # (b, P) each
            passes.append(ChunkPass(targets, rows, online.common, seed))
        statistics.settle()
        return passes

    def compare(self, passes: list["ChunkPass"]) -> tuple[Comparison, "Slopes"]:
        """
        The parts of the loss over the whole batch, detached, and their slopes at rows and common representations.
        """
        # the whole batch, as leaf tensors
        whole = _laid_end_to_end([one.rows for one in passes])
        rows = {name: value.requires_grad_() for name, value in whole.items()}  # (B, P) each
        common = {name: value.clone().requires_grad_() for name, value in passes[-1].common.items()}
        targets = _laid_end_to_end([one.targets.rows for one in passes])  # (B, ...)
        with self.accelerator.autocast():
            compared = self.portion.compare(rows, common, targets, self.progress)
        if not compared.parts:
            return compared, Slopes({}, {}, len(passes))

        # the slopes; those of rows are split into chunks
        leaves = {**rows, **common}
        loss = self.portion.weigh(compared.parts)  # 0-dim
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # as the leaves
        slopes = {name: slope for name, slope in zip(leaves, gradients, strict=True) if slope is not None}
        sizes = {name: [len(one.rows[name]) for one in passes] for name in rows}
        of_rows = {name: slopes[name].split(sizes[name]) for name in rows if name in slopes}  # chunks of (b, P)
        of_common = {name: slopes[name] for name in common if name in slopes}
        parts = {name: part.detach() for name, part in compared.parts.items()}
        return Comparison(parts, compared.kept), Slopes(of_rows, of_common, len(passes))

    def pull(
        self, chunk: Batch, before: "ChunkPass", slopes: dict[str, torch.Tensor], counts: Batch, last: bool
    ) -> Batch:
        """Computes the gradient of one chunk and returns its own loss parts; the last one exchanges gradients."""
        noise = seeded(before.seed, self.accelerator.device)
        with exchanging_gradients(self.accelerator, self.student, last), noise:
            # the same forward as before, now with a graph
            chunk = _moved(chunk, self.accelerator.device)
            with self.accelerator.autocast():
                online = self.portion.represent(self.student, chunk, before.targets, self.progress, counts)
            reached = {**{name: in_full(value) for name, value in online.rows.items()}, **online.common}
            pulls = [(reached[name] * slope).sum() for name, slope in slopes.items()]  # 0-dim each
            self.backward(self.portion.weigh(online.parts) + sum(pulls), last)
        return {name: part.detach() for name, part in online.parts.items()}

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """`last`: the processes exchange gradients, also of parameters that only earlier portions trained."""
        if last and self.several:
            loss = loss + reach_all(self.accelerator, self.student)
        self.accelerator.backward(loss)


@dataclass
class ChunkPass:
    """Results of the first pass over a chunk."""

    targets: Targets
    rows: Batch
    common: Batch
    seed: int


@dataclass
class Slopes:
    """Slopes of the loss at the rows of each chunk, and at the representations common to all chunks."""

    rows: dict[str, Sequence[torch.Tensor]]
    common: Batch
    chunks: int

    def of_chunk(self, number: int) -> Batch:
        """The slopes to backpropagate in a chunk: those of its rows, and an equal share of the common ones."""
        # shared equally: if the first chunk gave none, ZeRO-3 would add to the gradient of the previous step
        shares = {name: slope / self.chunks for name, slope in self.common.items()}
        # each slope has the name of its representation
        return {**{name: slopes[number] for name, slopes in self.rows.items()}, **shares}


def draw_seed() -> int:
    return int(torch.randint(2**62, ()))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Takes random numbers from `seed`, on the CPU and `device`; afterwards the generators have their former state."""
    devices = [] if device.type == "cpu" else [torch.empty(0, device=device).get_device()]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


class RunningStatistics:
    """
    Running means and variances of all BatchNorm layers in training mode. Each chunk updates them from their values at
    the start of the step; in the end they are set to the mean over the chunks.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        norms = [layer for network in networks for layer in network.modules() if isinstance(layer, BatchNorm)]
        self.layers = [layer for layer in norms if layer.training]
        tracked = [layer for layer in self.layers if layer.running_mean is not None]
        self.buffers = [buffer for layer in tracked for buffer in (layer.running_mean, layer.running_var)]
        self.counters = [layer.num_batches_tracked for layer in tracked]
        self.chunks = 0

    def warn(self, chunks: int) -> None:
        """Warns once, before anything is computed, that batch statistics depend on the chunks."""
        if self.layers:
            logger.warning_once(
                f"{len(self.layers)} BatchNorm layers normalise by the statistics of a chunk of the batch, since "
                f"gradient_cache_chunks is {chunks}: the loss is then not exactly that of the undivided batch, but "
                f"that of {chunks} times as many processes. Layers that normalise each row by itself are not "
                "affected."
            )

    @torch.no_grad()
    def begin(self) -> None:
        self.start = [buffer.clone() for buffer in self.buffers]
        self.start_counts = [counter.clone() for counter in self.counters]
        self.moved = [torch.zeros_like(buffer) for buffer in self.buffers]
        self.end_counts = self.start_counts
        self.chunks = 0

    @torch.no_grad()
    def back(self) -> None:
        """Resets the statistics to the start of the step."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.start)
            torch._foreach_copy_(self.counters, self.start_counts)

    @torch.no_grad()
    def add(self) -> None:
        """Adds up the change by a chunk, and resets."""
        self.chunks += 1
        if self.buffers:
            torch._foreach_add_(self.moved, torch._foreach_sub(self.buffers, self.start))
            self.end_counts = [counter.clone() for counter in self.counters]
            self.back()

    @torch.no_grad()
    def settle(self) -> None:
        """Sets the statistics to the mean over the chunks; unchanged ones stay bit-exact."""
        if self.buffers:
            torch._foreach_add_(self.buffers, self.moved, alpha=1 / self.chunks)
            torch._foreach_copy_(self.counters, self.end_counts)


def _moved(batch: Batch, device: torch.device) -> Batch:
    # from pinned memory the copy is asynchronous
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _laid_end_to_end(chunks: list[Batch]) -> Batch:
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}  # (B, ...) of (b, ...)
