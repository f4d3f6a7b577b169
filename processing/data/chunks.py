"""Splits a batch into chunks of rows, as if each had been collated separately at the width of the whole batch.

B rows, H ids before the text, N patches, W slots of the longest text, n tokens of the batch, M tokens or patches to
predict, R answers.
"""

from collections.abc import Mapping

import torch

# tensors that are packed over the batch instead of having B rows, and their values
PACKED = {
    "text_index": "places of the tokens in a flat (B, W)",
    "mlm_index": "places among those tokens",
    "mlm_labels": "one for each of mlm_index",
    "mim_index": "places of patches in a flat (B, N)",
    "answer_ids": "answers, as many of a row as answers_per_question says",
    "answer_mask": "likewise",
    "answer_weights": "likewise",
}


def split_pairs(batch: Mapping[str, torch.Tensor], chunks: int) -> list[dict[str, torch.Tensor]]:
    """
    Splits the collator's batch, of any layout, into `chunks` of consecutive rows whose sizes differ by at most one.
    Rows are views; packed indices restart in every chunk. Meant for the CPU: finding the edges would synchronise an
    accelerator.

    Raises:
        ValueError: there are more chunks than rows, or a tensor has neither B rows nor is known as packed.
    """
    rows = {name: value for name, value in batch.items() if name not in PACKED}

    # all other tensors must have the same number of rows
    batch_size = len(next(iter(rows.values())))
    for name, value in rows.items():
        if len(value) != batch_size:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {batch_size} rows first")
    if not 1 <= chunks <= batch_size:
        raise ValueError(f"got a batch of {batch_size} rows to split into {chunks} chunks; expected 1 to {batch_size}")

    edges = [batch_size * chunk // chunks for chunk in range(chunks + 1)]
    split = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        chunk = {name: value[start:end] for name, value in rows.items()}  # (b, ...) each
        chunk |= _tokens_of(batch, start, end) | _patches_of(batch, start, end) | _answers_of(batch, start, end)
        split.append(chunk)
    return split


def text_slots(batch: Mapping[str, torch.Tensor]) -> int:
    """W, the number of columns of `input_ids` after [CLS] and the placeholders (none in a separate layout)."""
    batch_size, width = batch["input_ids"].shape
    # the mask of a row counts H ids and its tokens
    n_head = (int(batch["attention_mask"].sum()) - len(batch["text_index"])) // batch_size  # H
    return width - n_head


def _tokens_of(batch: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """The tensors packed by tokens, for rows `start` to `end`."""
    if "text_index" not in batch:
        return {}
    slots = text_slots(batch)
    first, last = _between(batch["text_index"], start * slots, end * slots)
    packed = {"text_index": batch["text_index"][first:last] - start * slots}  # (n of the chunk,)
    if "mlm_index" in batch:
        mine = slice(*_between(batch["mlm_index"], first, last))
        packed["mlm_index"] = batch["mlm_index"][mine] - first  # (M of the chunk,)
        packed["mlm_labels"] = batch["mlm_labels"][mine]
    return packed


def _patches_of(batch: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Indices of the masked patches of rows `start` to `end`."""
    if "mim_index" not in batch:
        return {}
    n_patches = batch["bool_masked_pos"].shape[1]
    mine = slice(*_between(batch["mim_index"], start * n_patches, end * n_patches))
    return {"mim_index": batch["mim_index"][mine] - start * n_patches}  # (M of the chunk,)


def _answers_of(batch: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """The answers of questions `start` to `end`."""
    if "answers_per_question" not in batch:
        return {}
    ends = [0, *batch["answers_per_question"].cumsum(0).tolist()]
    mine = slice(ends[start], ends[end])
    return {name: batch[name][mine] for name in ("answer_ids", "answer_mask", "answer_weights")}  # (R of the chunk, A)


def _between(places: torch.Tensor, low: int, high: int) -> tuple[int, int]:
    """Indices at which the ascending `places` reach `low` and `high`."""
    edges = torch.tensor([low, high], device=places.device)
    first, last = torch.searchsorted(places.contiguous(), edges).tolist()
    return first, last
