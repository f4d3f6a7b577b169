"""The gradient of a step: portion after portion, in one go or in chunks (GradCache: Gao et al., 2021, section 3).

1. Each chunk's targets are made, and it is represented without gradient: (B, P) numbers stay of each.
2. The whole batch is compared, which gives the loss and its slope at each representation.
3. Each chunk is represented again, with the random numbers of the first time, and its slopes go back through it.

That is one more forward of the student than in one go, with the activations of one chunk, whatever B is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states
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
    Adds the gradient of a step to the student's parameters: portion after portion, processes averaged with the last.

    Args:
        batches: By portion, this process's share, still on the CPU: it reaches the device a chunk at a time.
        progress: Share of the run that is done.
        chunks: By portion; 1 or none takes a share in one go, more by cached gradients. Only what normalises by batch
            statistics (BatchNorm) then sees chunks, which a warning says; running statistics move once a step all the
            same.
        apart: Other steps of the optimiser reach parameters that this one does not.

    Returns:
        The loss and its parts, 0-dim, detached, and what the objective's `after_step` takes along.

    Raises:
        ValueError: more chunks than rows; batches of other portions than the objective's.
    """
    if batches.keys() != objective.portions.keys():
        raise ValueError(f"got batches of {sorted(batches)}; expected one of each of {sorted(objective.portions)}")

    # what moves before a step, and gradients that an engine may have kept of the last one
    objective.before_step()
    several = apart or len(objective.portions) > 1
    if several:
        forget_gradients(accelerator, student)
    networks = [student, *(teacher.model for teacher in objective.teachers())]
    parts: Batch = {}
    kept: Batch = {}
    losses = []

    # one backward a portion; only the last exchanges gradients
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
    One portion's share of a step. `rows`, `common` and `slopes` are as `Representations` names them.

    Args:
        networks: Student and teachers, whose running statistics are kept by chunk.
        last: With the last portion's last chunk the processes exchange gradients.
        several: Other portions may reach parameters that this one does not.
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
        """The same of a batch in chunks."""
        counts = mean_counts(_moved(counts, self.accelerator.device))
        statistics = RunningStatistics(self.networks)
        statistics.warn(len(chunks))

        # 1. every chunk represented, without gradient
        passes = self.represent(chunks, statistics)

        # 2. the whole batch compared: its loss, and the loss's slope at each representation
        compared, slopes = self.compare(passes)

        # 3. every chunk represented again, and its slopes taken back through it
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
        """Targets, rows and what is common of each chunk, and the generators as its student's pass found them."""
        passes = []
        statistics.begin()
        for chunk in chunks:
            chunk = _moved(chunk, self.accelerator.device)
            with self.accelerator.autocast():
                targets = self.portion.targets(self.student, chunk, self.progress)
                statistics.add()
                rng_state = RngState(self.accelerator.device)
                online = self.portion.represent(self.student, chunk, targets, self.progress)
                statistics.back()  # the second pass counts
            rows = {name: in_full(value) for name, value in online.rows.items()}  # (b, P) each
            passes.append(ChunkPass(targets, rows, online.common, rng_state))
        statistics.settle()
        return passes

    def compare(self, passes: list["ChunkPass"]) -> tuple[Comparison, "Slopes"]:
        """The parts of the loss that see the whole batch, detached, and their slopes at rows and at what is common."""
        # the whole batch, as leaves
        whole = _laid_end_to_end([one.rows for one in passes])
        rows = {name: value.requires_grad_() for name, value in whole.items()}  # (B, P) each
        common = {name: value.clone().requires_grad_() for name, value in passes[-1].common.items()}
        targets = _laid_end_to_end([one.targets.rows for one in passes])  # (B, ...)
        with self.accelerator.autocast():
            compared = self.portion.compare(rows, common, targets, self.progress)
        if not compared.parts:
            return compared, Slopes({}, {}, len(passes))

        # its slopes, those of rows cut as the chunks are
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
        """The gradient of one chunk. Its own parts come back; with the last one the processes meet."""
        # a first pass that gave nothing drew nothing either
        rng_state = before.rng_state.replayed() if before.rows else nullcontext()
        with exchanging_gradients(self.accelerator, self.student, last), rng_state:
            # the same forward as the first, now with its graph
            chunk = _moved(chunk, self.accelerator.device)
            with self.accelerator.autocast():
                online = self.portion.represent(self.student, chunk, before.targets, self.progress, counts)
            reached = {**{name: in_full(value) for name, value in online.rows.items()}, **online.common}
            pulls = [(reached[name] * slope).sum() for name, slope in slopes.items()]  # 0-dim each
            self.backward(self.portion.weigh(online.parts) + sum(pulls), last)
        return {name: part.detach() for name, part in online.parts.items()}

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """`last`: the processes exchange gradients, also of what only earlier portions reached."""
        if last and self.several:
            loss = loss + reach_all(self.accelerator, self.student)
        self.accelerator.backward(loss)


@dataclass
class ChunkPass:
    """What the first pass leaves of a chunk."""

    targets: Targets
    rows: Batch
    common: Batch
    rng_state: "RngState"


@dataclass
class Slopes:
    """The loss's slopes at the rows of each chunk, and at what all chunks give alike."""

    rows: dict[str, Sequence[torch.Tensor]]
    common: Batch
    chunks: int

    def of_chunk(self, number: int) -> Batch:
        """What goes back through a chunk: the slopes of its rows, and an even share of the common ones."""
        # a share with every chunk: ZeRO-3 adds to the gradient of the step before where the first chunk gives none
        shares = {name: slope / self.chunks for name, slope in self.common.items()}
        # each slope meets the representation it is the slope of
        return {**{name: slopes[number] for name, slopes in self.rows.items()}, **shares}


class RngState:
    """The state of torch's generators, of the CPU and of a device, as it is now."""

    def __init__(self, device: torch.device):
        self.device_type = device.type if device.type != "cpu" else "cuda"
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(torch.empty(0, device=device))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The numbers that were drawn then are drawn again; afterwards the generators stand where they stood."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


class RunningStatistics:
    """
    The running means and variances of every BatchNorm of some networks that is training. Each chunk moves them from
    where they stood at the beginning; the mean of where the chunks would have them is where they settle.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        norms = [layer for network in networks for layer in network.modules() if isinstance(layer, BatchNorm)]
        self.layers = [layer for layer in norms if layer.training]
        tracked = [layer for layer in self.layers if layer.running_mean is not None]
        self.buffers = [buffer for layer in tracked for buffer in (layer.running_mean, layer.running_var)]
        self.counters = [layer.num_batches_tracked for layer in tracked]
        self.chunks = 0

    def warn(self, chunks: int) -> None:
        """Says once what batch statistics mean here, before anything is computed."""
        if self.layers:
            logger.warning_once(
                f"{len(self.layers)} BatchNorm layers normalise by the statistics of a chunk of the batch, since "
                f"gradient_cache_chunks is {chunks}: the loss is then not to the bit that of the batch in one go, but "
                f"that of {chunks} times as many processes. Layers that normalise each row alone make no difference."
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
        """Where they stood at the beginning."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.start)
            torch._foreach_copy_(self.counters, self.start_counts)

    @torch.no_grad()
    def add(self) -> None:
        """Counts what a chunk has moved, and goes back."""
        self.chunks += 1
        if self.buffers:
            torch._foreach_add_(self.moved, torch._foreach_sub(self.buffers, self.start))
            self.end_counts = [counter.clone() for counter in self.counters]
            self.back()

    @torch.no_grad()
    def settle(self) -> None:
        """At the mean over the chunks; what none of them moved stays to the bit."""
        if self.buffers:
            torch._foreach_add_(self.buffers, self.moved, alpha=1 / self.chunks)
            torch._foreach_copy_(self.counters, self.end_counts)


def _moved(batch: Batch, device: torch.device) -> Batch:
    # from pinned memory the copy runs beside the computation
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _laid_end_to_end(chunks: list[Batch]) -> Batch:
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}  # (B, ...) of (b, ...)
