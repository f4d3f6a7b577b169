"""Packed rows of unequal length, such as the visible tokens of a batch, processed without padding.

R rows, n tokens of all rows, X any width, D width of the layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import is_tracing

from .vl_layers import Sequences, Stream, attends_unpadded, sequences_of, split_streams


@dataclass
class Ragged:
    """
    Tokens of R rows, concatenated row by row; a row may be empty.

    Attributes:
        states (`(n, X)`): The tokens.
        row (`(n,)`): Row index of each token, ascending.
        rows (`int`): R.
        each (`int`, *optional*): Tokens per row, if all rows have the same number.
    """

    states: torch.Tensor
    row: torch.Tensor
    rows: int
    each: int | None = None

    @classmethod
    def of_rectangle(cls, states: torch.Tensor) -> "Ragged":
        """Packs (R, S, X), in which every row has S tokens."""
        rows, each = states.shape[:2]
        row = torch.arange(rows, device=states.device).repeat_interleave(each)  # (R * S,)
        return cls(states.flatten(0, 1), row, rows, each)

    @property
    def counts(self) -> torch.Tensor:
        """Number of tokens in each row, (R,)."""
        return self.row.new_zeros(self.rows).index_add(0, self.row, torch.ones_like(self.row))

    def keep(self, index: torch.Tensor) -> "Ragged":
        """Keeps the tokens at ascending indices (m,), in the same rows."""
        return Ragged(self.states.index_select(0, index), self.row.index_select(0, index), self.rows)

    def select(self, index: torch.Tensor) -> "Ragged":
        """Selects whole rows by index (R',), with or without repetition."""
        counts = self.counts
        wanted = counts.index_select(0, index)  # (R',)

        # total number of tokens; rows of unequal length need a device synchronisation
        if self.each is not None:
            total = self.each * len(index)
        elif is_tracing(index):
            total = len(self.row) * len(index) // self.rows
        else:
            total = int(wanted.sum())

        # index of each token: the start of its row plus its offset in the row
        row = torch.arange(len(index), device=index.device).repeat_interleave(wanted, output_size=total)  # (n',)
        skipped = (counts.cumsum(0) - counts).index_select(0, index) - (wanted.cumsum(0) - wanted)  # (R',)
        place = torch.arange(total, device=index.device) + skipped.index_select(0, row)  # (n',)
        return Ragged(self.states.index_select(0, place), row, len(index), self.each)

    def width(self) -> int:
        """Number of tokens in the longest row, at least 1; the mean number under tracing, which cannot read values."""
        if self.each is not None:
            return max(1, self.each)
        if is_tracing(self.row):
            return max(1, -(-len(self.row) // self.rows))
        return max(1, int(self.counts.max()))

    def slots(self, width: int) -> torch.Tensor:
        """Index of each token in the flat (R, width). -> (n,)."""
        counts = self.counts
        before = (counts.cumsum(0) - counts).index_select(0, self.row)  # (n,)
        return self.row * width + torch.arange(len(self.row), device=self.row.device) - before


@dataclass
class Joined:
    """
    Several parts joined row by row: each row holds the tokens of the first part, then those of the second, and so on.

    Attributes:
        whole (`Ragged`): The joined rows.
        order (`(n,)`): Index of each joined token in the concatenated parts.
        sizes (`list[int]`): Number of tokens in each part.
    """

    whole: Ragged
    order: torch.Tensor
    sizes: list[int]

    @classmethod
    def of(cls, parts: Sequence[Ragged]) -> "Joined":
        row = torch.cat([part.row for part in parts])  # (n,)
        states = torch.cat([part.states for part in parts])  # (n, X)
        sizes = [len(part.row) for part in parts]
        each = sum(part.each for part in parts) if all(part.each is not None for part in parts) else None
        order = row.argsort(stable=True)  # (n,)
        whole = Ragged(states.index_select(0, order), row.index_select(0, order), parts[0].rows, each)
        return cls(whole, order, sizes)

    def apart(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Splits states (n, X) of the joined tokens back into the parts."""
        return torch.empty_like(states).index_copy(0, self.order, states).split(self.sizes)


def complement(index: torch.Tensor, count: int) -> torch.Tensor:
    """Indices below `count` that are not in `index`, ascending, without synchronising. (m,) -> (count - m,)."""
    taken = torch.zeros(count, dtype=torch.uint8, device=index.device).index_fill(0, index, 1)
    return taken.argsort(stable=True)[: count - len(index)]


def through_layers(
    layers: Iterable[nn.Module],
    norm: nn.Module,
    config: PreTrainedConfig,
    passes: Sequence[tuple[torch.Tensor, Ragged]],
    training: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Runs several batches of rows through the same layers at once; each row attends to itself alone.

    Args:
        layers, norm: `PreNormLayer`s and the final norm.
        config: Configuration with the attention settings.
        passes: For each batch, [CLS] of every row (R, D) and the tokens that follow it.

    Returns:
        For each batch, [CLS] (R, D) and tokens (n, D), in the order given.
    """
    # each batch is a stream: [CLS] of all rows, then the tokens, concatenated
    streams, masks, packed = [], [], []
    for number, (cls, rest) in enumerate(passes):
        width = rest.width()
        slots = rest.slots(width)  # (n,)
        streams.append(Stream(str(number), rest.rows, 1, width, slots))
        masks.append((torch.arange(width, device=slots.device) < rest.counts[:, None]).long())  # (R, width)
        packed += [cls, rest.states]
    dtype = torch.promote_types(packed[0].dtype, packed[-1].dtype)
    states = torch.cat([part.to(dtype) for part in packed])  # (n of all, D)

    # unpadded: reorder once for all layers, so that each row's tokens are contiguous
    if attends_unpadded(config, streams, states, training):
        places, sequences = _side_by_side(streams, masks)
        states = torch.empty_like(states).index_copy(0, places, states)
        for layer in layers:
            states = layer(states, None, sequences)
        states = norm(states.index_select(0, places))

    # padded: each batch is padded for its own attention
    else:
        for stream, mask, (_, rest) in zip(streams, masks, passes, strict=True):
            full = rest.each == stream.text_slots
            stream.set_mask(config, None if full else stream.key_mask(mask), like=states)
        for layer in layers:
            states = layer(states, None, streams)
        states = norm(states)
    made = split_streams(states, streams)
    return [(made[stream.name][0][:, 0], made[stream.name][1]) for stream in streams]


def _side_by_side(streams: Sequence[Stream], masks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sequences]:
    """`sequences_of` for streams that each have their own mask."""
    places, starts, end, longest = [], [], 0, 0
    for stream, mask in zip(streams, masks, strict=True):
        own, sequences = sequences_of([stream], mask)
        places.append(own + end)
        starts.append(sequences.starts[:-1] + end)
        end += len(own)
        longest = max(longest, sequences.longest)
    starts.append(starts[0].new_full((1,), end))
    return torch.cat(places), Sequences(torch.cat(starts), longest)


__all__ = ["Joined", "Ragged", "complement", "through_layers"]
