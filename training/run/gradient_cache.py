"""A batch in pieces, with the loss and the gradient of the whole (GradCache: Gao et al., 2021, section 3).

1. Each piece is represented without gradient, and its targets are made: (B, P) numbers stay of each.
2. The whole batch is compared, which gives the loss and its slope at each representation.
3. Each piece is represented again, with the random numbers of the first time, and its slopes go back through it.

That is one more forward of the student than in one go, with the activations of one piece, whatever B is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.utils import logging

from oner.training.objectives.losses import in_full
from oner.training.objectives.objective import Objective
from oner.training.parallel.distributed import mean_counts
from oner.training.private_names import BatchNorm

logger = logging.get_logger(__name__)

Tensors = dict[str, torch.Tensor]


def loss_and_gradients(
    accelerator: Accelerator,
    objective: Objective,
    student: nn.Module,
    batch: Tensors,
    progress: float,
    pieces: int = 1,
) -> tuple[torch.Tensor, Tensors]:
    """
    Adds the gradient of a batch to the student's parameters, processes averaged.

    Args:
        batch: This process's share, still on the CPU: it reaches the device a piece at a time.
        progress: Share of the run that is done.
        pieces: 1 takes the share in one go, more by cached gradients. Only what normalises by batch statistics
            (BatchNorm) then sees pieces, which a warning says; running statistics move once a step all the same.

    Returns:
        The loss and its parts, 0-dim, detached.

    Raises:
        ValueError: more pieces than rows.
    """
    if pieces > 1:
        return _CachedStep(accelerator, objective, student, batch, progress, pieces).run()
    with accelerator.autocast():
        loss, parts = objective(student, _moved(batch, accelerator.device), progress)
    accelerator.backward(loss)
    return loss.detach(), parts


class _CachedStep:
    """One step of a batch in pieces. `rows`, `common` and `slopes` are as `Representations` names them."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        student: nn.Module,
        batch: Tensors,
        progress: float,
        pieces: int,
    ):
        self.accelerator, self.objective, self.student, self.progress = accelerator, objective, student, progress
        self.pieces = objective.split(batch, pieces)
        self.counts = mean_counts(_moved(objective.count(batch), accelerator.device))
        self.statistics = RunningStatistics([student, *(teacher.model for teacher in objective.teachers())])
        self.statistics.warn(pieces)
        self.chances: list[Chance] = []
        self.slopes: dict[str, list[torch.Tensor]] = {}
        self.common_slopes: Tensors = {}

    def run(self) -> tuple[torch.Tensor, Tensors]:
        self.objective.before_step()
        parts = self.compare(*self.represent())
        self.statistics.begin()
        for number in range(len(self.pieces)):
            for name, part in self.pull(number).items():
                parts[name] = parts[name] + part if name in parts else part
            self.statistics.add()
        self.statistics.settle()
        return self.objective.weigh(parts), parts

    @torch.no_grad()
    def represent(self) -> tuple[dict[str, list[torch.Tensor]], Tensors, Tensors]:
        """Rows piece by piece, what is common, and the targets of the whole share. Nothing, if nothing compares."""
        rows, targets = [], []
        self.statistics.begin()
        for piece in self.pieces:
            piece = _moved(piece, self.accelerator.device)
            self.chances.append(Chance(self.accelerator.device))
            with self.accelerator.autocast():
                online = self.objective.represent(self.student, piece, self.progress)
                if not online.rows:
                    self.chances.clear()
                    return {}, {}, {}
                self.statistics.back()
                targets.append(self.objective.targets(self.student, piece, self.progress))
            rows.append({name: in_full(value) for name, value in online.rows.items()})
            self.statistics.add()
        self.statistics.settle()
        common = {name: value.clone() for name, value in online.common.items()}
        return _turned(rows), common, {name: torch.cat(values) for name, values in _turned(targets).items()}

    def compare(self, rows: dict[str, list[torch.Tensor]], common: Tensors, targets: Tensors) -> Tensors:
        """The parts of the loss that see the whole batch; their slopes at rows and at what is common are kept."""
        sizes = {name: [len(piece) for piece in values] for name, values in rows.items()}
        whole = {name: torch.cat(values).requires_grad_() for name, values in rows.items()}
        common = {name: value.requires_grad_() for name, value in common.items()}
        with self.accelerator.autocast():
            parts = self.objective.compare(whole, common, targets, self.progress)
        if not parts:
            return {}
        leaves = [*whole.values(), *common.values()]
        slopes = torch.autograd.grad(self.objective.weigh(parts), leaves, allow_unused=True)
        for name, slope in zip(whole, slopes[: len(whole)], strict=True):
            if slope is not None:
                self.slopes[name] = slope.split(sizes[name])
        found = zip(common, slopes[len(whole) :], strict=True)
        self.common_slopes = {name: slope for name, slope in found if slope is not None}
        return {name: part.detach() for name, part in parts.items()}

    def pull(self, number: int) -> Tensors:
        """The gradient of one piece. Its own parts come back; with the last piece the processes meet."""
        last = number == len(self.pieces) - 1
        chance = self.chances[number].replayed() if self.chances else nullcontext()
        with _synchronised(self.accelerator, self.student, last), chance:
            piece = _moved(self.pieces[number], self.accelerator.device)
            with self.accelerator.autocast():
                online = self.objective.represent(self.student, piece, self.progress, self.counts)
            pulls = [(in_full(online.rows[name]) * slopes[number]).sum() for name, slopes in self.slopes.items()]
            # a share with every piece: ZeRO-3 adds to the gradient of the step before where the first piece gives none
            common = self.common_slopes.items()
            pulls += [(online.common[name] * (slope / len(self.pieces))).sum() for name, slope in common]
            self.accelerator.backward(self.objective.weigh(online.parts) + sum(pulls))
        return {name: part.detach() for name, part in online.parts.items()}


class Chance:
    """torch's generators, of the CPU and of a device, as they are now."""

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
    The running means and variances of every BatchNorm of some networks that is training. Each piece moves them from
    where they stood at the beginning; the mean of where the pieces would have them is where they settle.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        found = [layer for network in networks for layer in network.modules() if isinstance(layer, BatchNorm)]
        self.layers = [layer for layer in found if layer.training]
        tracked = [layer for layer in self.layers if layer.running_mean is not None]
        self.buffers = [buffer for layer in tracked for buffer in (layer.running_mean, layer.running_var)]
        self.counters = [layer.num_batches_tracked for layer in tracked]
        self.pieces = 0

    def warn(self, pieces: int) -> None:
        """Says once what batch statistics mean here, before anything is computed."""
        if self.layers:
            logger.warning_once(
                f"{len(self.layers)} BatchNorm layers normalise by the statistics of a piece of the batch, since "
                f"gradient_cache_chunks is {pieces}: the loss is then not to the bit that of the batch in one go, but "
                f"that of {pieces} times as many processes. Layers that normalise each row alone make no difference."
            )

    @torch.no_grad()
    def begin(self) -> None:
        self.start, self.start_counts = ([b.clone() for b in side] for side in (self.buffers, self.counters))
        self.moved = [torch.zeros_like(buffer) for buffer in self.buffers]
        self.end_counts, self.pieces = self.start_counts, 0

    @torch.no_grad()
    def back(self) -> None:
        """Where they stood at the beginning."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.start)
            torch._foreach_copy_(self.counters, self.start_counts)

    @torch.no_grad()
    def add(self) -> None:
        """Counts what a piece has moved, and goes back."""
        self.pieces += 1
        if self.buffers:
            torch._foreach_add_(self.moved, torch._foreach_sub(self.buffers, self.start))
            self.end_counts = [counter.clone() for counter in self.counters]
            self.back()

    @torch.no_grad()
    def settle(self) -> None:
        """At the mean over the pieces; what none of them moved stays to the bit."""
        if self.buffers:
            torch._foreach_add_(self.buffers, self.moved, alpha=1 / self.pieces)
            torch._foreach_copy_(self.counters, self.end_counts)


@contextmanager
def _synchronised(accelerator: Accelerator, student: nn.Module, now: bool) -> Iterator[None]:
    """Whether a backward ends with the exchange of gradients between processes."""
    if now:
        yield
        return
    accelerator.sync_gradients = False  # DeepSpeed goes by this, the others by no_sync
    try:
        with accelerator.no_sync(student):
            yield
    finally:
        accelerator.sync_gradients = True


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}


def _turned(pieces: list[Tensors]) -> dict[str, list[torch.Tensor]]:
    """Pieces of names -> names of pieces."""
    return {name: [piece[name] for piece in pieces] for name in pieces[0]}
