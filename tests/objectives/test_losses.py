"""Losses against naive loops in fp64 and against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oner.training.objectives.losses import info_nce, masked_image_loss, masked_language_loss


def naive_info_nce(queries, keys, temperature, query_ids=None, key_ids=None, offset=0) -> float:
    """One query, one key at a time, numpy fp64."""
    q, k = (np.asarray(side.detach(), dtype=np.float64) for side in (queries, keys))
    total = 0.0
    for i in range(len(q)):
        cosines = [q[i] @ row / np.linalg.norm(q[i]) / np.linalg.norm(row) / temperature for row in k]
        log_sum = math.log(sum(math.exp(cosine) for cosine in cosines))
        positives = [
            j for j in range(len(k)) if (j == i + offset if query_ids is None else query_ids[i] == key_ids[j])
        ]
        total += sum(log_sum - cosines[j] for j in positives) / len(positives)
    return total / len(q)


@pytest.mark.parametrize("offset", [0, 3])
def test_info_nce_equals_a_naive_loop(offset):
    queries, keys = torch.randn(4, 6), torch.randn(7, 6) * 3
    expected = naive_info_nce(queries, keys, 0.2, offset=offset)
    assert info_nce(queries, keys, 0.2, offset=offset).item() == pytest.approx(expected, abs=5e-6)
    assert abs(expected - naive_info_nce(queries, keys, 0.2, offset=1)) > 1e-3  # the offset matters here


def test_info_nce_with_ids_equals_a_naive_loop():
    queries, keys = torch.randn(4, 6), torch.randn(6, 6)
    query_ids, key_ids = torch.tensor([7, 7, 2, 5]), torch.tensor([7, 7, 2, 5, 2, 9])
    expected = naive_info_nce(queries, keys, 0.1, query_ids.tolist(), key_ids.tolist())
    assert info_nce(queries, keys, 0.1, query_ids, key_ids).item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected - naive_info_nce(queries, keys, 0.1)) > 1e-2


def test_distinct_ids_mean_the_own_key():
    queries, keys, ids = torch.randn(5, 6), torch.randn(5, 6), torch.tensor([4, 2, 9, 1, 0])
    assert info_nce(queries, keys, 0.2, ids, ids).item() == pytest.approx(
        info_nce(queries, keys, 0.2).item(), abs=5e-6
    )


@pytest.mark.parametrize("ids", [None, torch.tensor([1, 1, 2, 3, 1])])
def test_info_nce_of_equal_keys_is_log_of_their_number(ids):
    queries, keys = torch.randn(5, 3), torch.ones(5, 3)
    assert info_nce(queries, keys, 0.07, ids, ids).item() == pytest.approx(math.log(5), abs=1e-5)


def test_info_nce_of_orthogonal_keys_has_a_closed_form():
    keys, temperature = torch.eye(8), 0.5
    expected = math.log(1 + 7 * math.exp(-1 / temperature))  # one cosine of 1, seven of 0
    assert info_nce(5.0 * keys, keys, temperature).item() == pytest.approx(expected, abs=5e-6)
    shifted = math.log(math.exp(1 / temperature) + 7)  # the positive is one of the zeros
    assert info_nce(keys[:4], keys, temperature, offset=4).item() == pytest.approx(shifted, abs=5e-6)
    # two positives of equal weight: half of the mass of each
    ids = torch.arange(8) // 2
    paired = math.log(math.exp(1 / temperature) + 7) - 0.5 / temperature
    assert info_nce(keys, keys, temperature, ids, ids).item() == pytest.approx(paired, abs=5e-6)


def test_info_nce_of_one_hot_logits_vanishes():
    assert info_nce(torch.eye(4), torch.eye(4), 0.01).item() < 1e-6


def test_info_nce_takes_a_temperature_that_learns():
    queries, keys = torch.randn(3, 4), torch.randn(3, 4)
    temperature = torch.tensor([0.3], requires_grad=True)
    loss = info_nce(queries, keys, temperature)
    assert loss.shape == () and loss.item() == pytest.approx(info_nce(queries, keys, 0.3).item(), abs=5e-6)
    loss.backward()
    step = 1e-5
    slope = (naive_info_nce(queries, keys, 0.3 + step) - naive_info_nce(queries, keys, 0.3 - step)) / (2 * step)
    assert temperature.grad.item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("ids", [None, ([3, 3, 1], [3, 3, 1, 1])])
def test_gradient_of_info_nce_equals_finite_differences(ids):
    queries, keys = torch.randn(3, 4), torch.randn(4, 4)
    q_ids, k_ids = ids or (None, None)
    tensors = (None, None) if ids is None else (torch.tensor(q_ids), torch.tensor(k_ids))
    queries.requires_grad_(), keys.requires_grad_()
    info_nce(queries, keys, 0.5, *tensors).backward()
    step = 1e-5
    for side, grad in ((0, queries.grad), (1, keys.grad)):
        for row in range(len(grad)):
            for column in range(4):
                values = []
                for sign in (1, -1):
                    both = [queries.detach().double(), keys.detach().double()]
                    both[side][row, column] += sign * step
                    values.append(naive_info_nce(*both, 0.5, q_ids, k_ids))
                assert grad[row, column].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=5e-6)


def test_info_nce_of_halves_is_computed_in_full():
    queries, keys = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    loss = info_nce(queries, keys, 0.2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_info_nce(queries.float(), keys.float(), 0.2), abs=1e-5)


def test_a_query_without_a_positive_key_is_an_error():
    with pytest.raises(ValueError, match=r"query_ids \[8\] have no key"):
        info_nce(torch.randn(2, 4), torch.randn(2, 4), 0.2, torch.tensor([1, 8]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="key_ids"):
        info_nce(torch.randn(2, 4), torch.randn(2, 4), 0.2, torch.tensor([1, 8]))


def test_masked_language_loss_equals_a_naive_loop():
    logits, labels = (torch.randn(5, 9) * 4).requires_grad_(), torch.tensor([0, 8, 3, 3, 1])
    loss = masked_language_loss(logits, labels)
    values = logits.detach().double().numpy()
    expected = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(values, labels.tolist(), strict=True)]
    assert loss.item() == pytest.approx(np.mean(expected), abs=5e-6)
    loss.backward()
    probabilities = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    np.testing.assert_allclose(logits.grad.numpy(), (probabilities - np.eye(9)[labels]) / 5, atol=1e-6)
    assert masked_language_loss(torch.zeros(3, 11), torch.tensor([1, 2, 3])).item() == pytest.approx(math.log(11))


def test_no_masked_words_cost_nothing_but_keep_the_graph():
    weight = torch.randn(4, 9, requires_grad=True)
    loss = masked_language_loss(torch.zeros(0, 4) @ weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and weight.grad.abs().sum() == 0


def naive_image_loss(predictions, pixels, masked, p, normalise) -> float:
    """Patch by patch, pixel by pixel; the patch's variance divides by n - 1."""
    total, count = 0.0, 0
    side = pixels.shape[-1] // p
    for b, n in masked.nonzero().tolist():
        y, x = n // side * p, n % side * p
        target = [pixels[b, c, y + i, x + j].item() for i in range(p) for j in range(p) for c in range(3)]
        if normalise:
            mean = sum(target) / len(target)
            variance = sum((value - mean) ** 2 for value in target) / (len(target) - 1)
            target = [(value - mean) / math.sqrt(variance + 1e-6) for value in target]
        errors = [(a - b) ** 2 for a, b in zip(predictions[b, n].tolist(), target, strict=True)]
        total, count = total + sum(errors) / len(errors), count + 1
    return total / count


@pytest.mark.parametrize("normalise", [True, False])
def test_masked_image_loss_equals_a_naive_loop(normalise):
    pixels, predictions = torch.randn(2, 3, 8, 8) * 2 + 1, torch.randn(2, 16, 12, requires_grad=True)
    masked = torch.rand(2, 16) < 0.4
    loss = masked_image_loss(predictions, pixels, masked, 2, normalise)
    expected = naive_image_loss(predictions.detach().double(), pixels.double(), masked, 2, normalise)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert (predictions.grad.abs().sum(-1) > 0).equal(masked)  # only masked patches teach


def test_masked_image_loss_closed_forms():
    pixels = torch.full((1, 3, 4, 4), 0.7)
    masked = torch.tensor([[True, False, True, False]])
    zeros = torch.zeros(1, 4, 12)
    assert masked_image_loss(zeros, pixels, masked, 2, norm_pixels=True).item() == pytest.approx(0, abs=1e-5)
    assert masked_image_loss(zeros, pixels, masked, 2, norm_pixels=False).item() == pytest.approx(0.49, abs=5e-6)
    # normalised by the unbiased variance, a patch has a mean square of (n - 1) / n
    noise = torch.randn(1, 3, 4, 4)
    assert masked_image_loss(zeros, noise, masked, 2).item() == pytest.approx(11 / 12, abs=1e-4)


def test_no_masked_patches_cost_nothing_but_keep_the_graph():
    predictions = torch.randn(1, 4, 12, requires_grad=True)
    loss = masked_image_loss(predictions, torch.randn(1, 3, 4, 4), torch.zeros(1, 4, dtype=torch.bool), 2)
    loss.backward()
    assert loss.item() == 0 and predictions.grad.abs().sum() == 0


def test_info_nce_is_fp32_under_autocast():
    queries, keys = torch.randn(6, 16), torch.randn(6, 16)
    expected = info_nce(queries, keys, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(queries, keys, 0.07)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


# In blocks


class LargestTensor(TorchDispatchMode):
    """The numbers in the largest tensor that is made while it is on."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.numbers = max([self.numbers, *(one.numel() for one in made if isinstance(one, torch.Tensor))])
        return result


def slow_info_nce(queries, keys, temperature, query_ids=None, key_ids=None, offset=0) -> torch.Tensor:
    """All cosines at once, for autograd."""
    logits = (queries / queries.norm(dim=1, keepdim=True)) @ (keys / keys.norm(dim=1, keepdim=True)).T / temperature
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    if query_ids is None:
        return -sum(logs[i, i + offset] for i in range(len(logs))) / len(logs)
    rows = [logs[i][key_ids == one].mean() for i, one in enumerate(query_ids)]
    return -sum(rows) / len(rows)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), [(7, 9, 9), (7, 9, 20), (8, 30, 1), (1, 3, 2), (6, 6, 1 << 20)])
def test_blocks_of_any_size_make_the_loss_and_every_gradient(with_ids, rows, columns, block):
    queries, keys = torch.randn(rows, 5).double() * 3, torch.randn(columns, 5).double()
    temperature = torch.tensor([0.13]).double()
    key_ids = torch.arange(columns) % 4
    arguments = (torch.arange(rows) % 3, key_ids) if with_ids else (None, None, columns - rows)
    results = []
    for loss_of, options in ((info_nce, {"block": block}), (slow_info_nce, {})):
        leaves = [tensor.clone().requires_grad_() for tensor in (queries, keys, temperature)]
        loss = loss_of(*leaves, *arguments, **options)
        (loss * 3).sum().backward()
        results.append([loss.detach().reshape(()), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_keys_without_gradient_get_none_and_cost_none():
    queries, keys = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    info_nce(queries, keys, 0.2).backward()
    assert keys.grad is None and queries.grad.abs().sum() > 0
    with torch.no_grad():
        assert not info_nce(queries, keys, 0.2).requires_grad


@pytest.mark.parametrize("with_ids", [False, True])
def test_no_tensor_is_larger_than_a_block_or_an_input(with_ids):
    queries, keys = torch.randn(200, 8, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    ids = (torch.arange(200), torch.arange(400)) if with_ids else ()
    with LargestTensor() as largest:
        info_nce(queries, keys, 0.2, *ids, block=5 * 400).backward()
    assert largest.numbers == 400 * 8  # against 200 * 400 cosines


def test_a_lonely_query_is_found_in_any_block():
    ids = torch.tensor([1, 2, 3, 8])
    with pytest.raises(ValueError, match=r"query_ids \[8\] have no key"):
        info_nce(torch.randn(4, 4), torch.randn(3, 4), 0.2, ids, torch.tensor([1, 2, 3]), block=3)


def test_counts_of_the_whole_batch_divide_the_sum_of_a_part():
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 3, 1, 7])
    parts = [masked_language_loss(logits[rows], labels[rows], 6) for rows in (slice(0, 1), slice(1, 6), slice(6, 6))]
    assert sum(parts).item() == pytest.approx(masked_language_loss(logits, labels).item(), rel=1e-6)
    pixels, predictions = torch.randn(3, 3, 8, 8), torch.randn(3, 16, 12)
    masked = torch.rand(3, 16) < 0.4
    count = masked.sum()
    parts = [
        masked_image_loss(predictions[i], pixels[i], masked[i], 2, True, count) for i in (slice(0, 1), slice(1, 3))
    ]
    assert sum(parts).item() == pytest.approx(masked_image_loss(predictions, pixels, masked, 2).item(), rel=1e-6)


def test_losses_of_doubles_are_doubles():
    queries, keys = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert info_nce(queries, keys, 0.2).dtype == torch.float64
    assert masked_language_loss(queries, torch.tensor([0, 1, 3])).dtype == torch.float64
