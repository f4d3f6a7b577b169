"""A batch of pairs in pieces, as if each had been collated by itself at the width of the whole.

B rows, N patches, W word slots, n words of the batch, M words or patches to predict.
"""

from collections.abc import Mapping

import torch

# packed over the batch: places and labels of words or patches, not rows
PACKED = ("text_index", "mlm_index", "mlm_labels", "mim_index")


def split_pairs(batch: Mapping[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    """
    The collator's batch in `pieces` of consecutive rows, sizes differing by one at most. Rows are views; the packed
    indices count anew in every piece. Meant for the CPU: an accelerator would have to wait for the edges.

    Raises:
        ValueError: more pieces than rows, or a tensor of the batch that has neither a row each nor is known as packed.
    """
    batch_size = len(batch["input_ids"])
    if not 1 <= pieces <= batch_size:
        raise ValueError(f"got a batch of {batch_size} rows to split into {pieces} pieces; expected 1 to {batch_size}")
    for name, value in batch.items():
        if name not in PACKED and len(value) != batch_size:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {batch_size} rows first")
    starts = [batch_size * piece // pieces for piece in range(pieces + 1)]
    rows = {name: value for name, value in batch.items() if name not in PACKED}
    split = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        piece = {name: value[start:end] for name, value in rows.items()}
        split.append({**piece, **_split_words(batch, start, end), **_split_patches(batch, start, end)})
    return split


def _split_words(batch: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """The packed tensors of rows `start` to `end`."""
    if "text_index" not in batch:
        return {}
    n_patches = batch["bool_masked_pos"].shape[1]
    slots = batch["input_ids"].shape[1] - 1 - n_patches
    text_index = batch["text_index"]
    edges = torch.tensor([start * slots, end * slots], device=text_index.device)
    first, last = torch.searchsorted(text_index.contiguous(), edges).tolist()
    packed = {"text_index": text_index[first:last] - start * slots}
    if "mlm_index" in batch:
        edges = torch.tensor([first, last], device=text_index.device)
        mine = slice(*torch.searchsorted(batch["mlm_index"].contiguous(), edges).tolist())
        packed["mlm_index"] = batch["mlm_index"][mine] - first
        packed["mlm_labels"] = batch["mlm_labels"][mine]
    return packed


def _split_patches(batch: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Places of the masked patches of rows `start` to `end`."""
    if "mim_index" not in batch:
        return {}
    places, n_patches = batch["mim_index"].contiguous(), batch["bool_masked_pos"].shape[1]
    edges = torch.tensor([start * n_patches, end * n_patches], device=places.device)
    return {"mim_index": places[slice(*torch.searchsorted(places, edges).tolist())] - start * n_patches}
