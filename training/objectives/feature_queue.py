"""The last keys of past steps, as further negatives (MoCo; SIMLA, section 2.2: memory queues of size M)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

NO_ID = -100


class FeatureQueue:
    """
    A ring of the last `size` unit vectors of each name, the same on every process. It begins with random directions,
    as MoCo's code does. Any number of rows may be pushed at a time.

    Args:
        names: What is kept, "image" and "text" say.
        size (`int`): M; the paper's 65,536.
        dim (`int`): P.

    Attributes:
        rows (`dict[str, torch.Tensor]`): (M, P) each.
        ids (`torch.Tensor`): (M,) int64, -100 where no row has been pushed yet.
        pointer (`torch.Tensor`): (1,) int64, where the next row goes; on the device, so that nobody waits for it.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, names: Sequence[str], size: int, dim: int):
        if size < 1:
            raise ValueError(f"queue_size is {size}; expected at least 1")
        self.size = size
        # random directions until real keys are pushed, and rows of no id
        self.rows = {name: F.normalize(torch.randn(size, dim), dim=1) for name in names}  # (M, P) each
        self.ids = torch.full((size,), NO_ID)  # (M,)
        self.pointer = torch.zeros(1, dtype=torch.long)

    @torch.no_grad()
    def push(self, rows: Mapping[str, torch.Tensor], ids: torch.Tensor, applied: torch.Tensor | None = None) -> None:
        """
        The newest rows, (B, P) of each name, over the oldest; of more than `size`, the last. Nothing moves where
        `applied` (0-dim) is 0.
        """
        keep = slice(max(0, len(ids) - self.size), None)
        ids = ids[keep]

        # the newest rows go where the oldest stand
        places = (self.pointer + torch.arange(len(ids), device=self.pointer.device)) % self.size  # (B,)
        for name, old in self.rows.items():
            self.rows[name] = _overwritten(old, places, rows[name][keep].to(old.dtype), applied)
        self.ids = _overwritten(self.ids, places, ids, applied)

        # the pointer moves on the device, by nothing where the update was not applied
        moved = len(ids) if applied is None else (applied * len(ids)).to(self.pointer.dtype)
        self.pointer = (self.pointer + moved) % self.size

    def to(self, device: torch.device) -> "FeatureQueue":
        self.rows = {name: value.to(device) for name, value in self.rows.items()}
        self.ids = self.ids.to(device)
        self.pointer = self.pointer.to(device)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.rows, "ids": self.ids, "pointer": self.pointer}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Keys of a half become the queue's fp32, ids and pointer whole numbers, whatever file they come from. Raises
        `RuntimeError` with the names and shapes that are not the queue's.
        """
        # what does not fit, all of it in one message
        own = self.state_dict()
        wrong = {name: "missing" for name in own.keys() - state.keys()}
        wrong |= {name: "unexpected" for name in state.keys() - own.keys()}
        wrong |= {
            name: f"{tuple(state[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        }
        if wrong:
            raise RuntimeError(f"the state does not fit the queue: {dict(sorted(wrong.items()))}")
        device = self.pointer.device
        # copies, since what was read from a file may be shared with its reader; fp64 stays fp64
        kinds = {name: torch.promote_types(old.dtype, state[name].dtype) for name, old in self.rows.items()}
        self.rows = {name: state[name].to(device, kind, copy=True) for name, kind in kinds.items()}
        self.ids = state["ids"].to(device, torch.long, copy=True)
        self.pointer = state["pointer"].to(device, torch.long, copy=True)


def _overwritten(
    old: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, applied: torch.Tensor | None
) -> torch.Tensor:
    """A copy of `old` with `rows` at `places`; out of place, for a loss may still hold what was there."""
    if applied is not None:
        rows = torch.where(applied.bool(), rows, old[places])
    return old.index_copy(0, places, rows)
