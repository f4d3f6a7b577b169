"""A batch in pieces against the batch in one go and against a naive fp64 oracle; chance, BatchNorm, other families.

B rows, P embedding width. What four processes make of the same shapes: distributed/test_loss_four_processes.py.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, PRETRAINING
from naive_pretraining import (
    SHAPES,
    assert_same_step,
    batch_of_shape,
    build_pair,
    build_shape,
    gradients,
    oracle,
    uneven_batch,
)
from tiny_pretraining import forget_accelerator, load_example, read_log, tiny_arguments
from torch import nn

from oner.processing.data.chunks import split_pairs
from oner.training.objectives import momentum, momo
from oner.training.objectives.losses import draw_negatives, info_nce
from oner.training.objectives.objective import Comparison, Objective, Representations, SinglePortion, Targets
from oner.training.run import gradient_cache
from oner.training.run.checkpoint import list_checkpoints, load_checkpoint
from oner.training.run.gradient_cache import RunningStatistics, draw_seed, loss_and_gradients, seeded
from oner.training.run.parsing import parse_arguments


@pytest.fixture
def accelerator() -> Accelerator:
    forget_accelerator()
    yield Accelerator(cpu=True)
    forget_accelerator()


# Right


@pytest.mark.parametrize(("options", "share"), SHAPES)
def test_any_number_of_pieces_makes_the_step_of_the_oracle(accelerator, options, share):
    """In one go, in four even pieces, in uneven ones, and one row at a time."""
    expected, batch = oracle(options, share), batch_of_shape(options, share)
    rows = 4 * share
    uneven = next(pieces for pieces in (3, 5, 7) if rows % pieces and pieces < rows)
    for pieces in sorted({1, 4, uneven, rows}):
        student, objective = build_shape(options)
        loss, parts, kept = loss_and_gradients(
            accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": pieces}
        )
        assert_same_step((loss, gradients(student)), expected)
        widths = objective.arguments.matryoshka_dims
        contrasts = [part for name in objective.contrasts for part in (name, *(f"{name}@{dim}" for dim in widths))]
        assert list(parts) == contrasts + [name for name in ("mlm", "mim") if name in parts]
        assert set(parts) == set(objective.weights) and not any(part.requires_grad for part in parts.values())
        assert objective.weigh(parts).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("options", [0, 1, 3])
@pytest.mark.parametrize("pieces", [1, 4, 7])
def test_in_single_precision_too(accelerator, options, pieces):
    student, objective = build_shape(options, torch.float32)
    batch = batch_of_shape(options, 5)
    expected = oracle(options, 5)
    batch["pixel_values"] = batch["pixel_values"].float()
    step = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": pieces})
    assert step[0].dtype == torch.float32
    found = gradients(student)
    assert abs(step[0].item() - expected[0].item()) <= 5e-6 * expected[0].item()
    off = torch.stack([(found[name].double() - slope).norm() for name, slope in expected[1].items()]).norm()
    # fp64 says above that they are equal; by the make of processor and its threads fp32 is off by 1.4e-6
    assert off <= 1e-5 * torch.stack([slope.norm() for slope in expected[1].values()]).norm()


def test_in_half_precision_pieces_make_the_step_of_one_go():
    """The pass without gradient must be cast as the one with it, and leave no cast of weights behind."""
    forget_accelerator()
    accelerator, steps = Accelerator(cpu=True, mixed_precision="bf16"), []
    for pieces in (1, 4):
        student, objective = build_pair({"losses": ["itc", "mlm"], "teacher": False}, torch.float32)
        batch = uneven_batch(8, 3, repeat_ids=False)
        batch["pixel_values"] = batch["pixel_values"].float()
        loss, *_ = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": pieces})
        steps.append((loss, torch.cat([slope.flatten() for slope in gradients(student).values()])))
    (loss, whole), (other_loss, other) = steps
    forget_accelerator()
    assert loss.dtype == torch.float32 and other_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert len(whole) == len(other) and (whole - other).norm() < 0.03 * whole.norm()


# Random numbers


def one_graph(objective: Objective, student: nn.Module, batch: dict, pieces: int) -> torch.Tensor:
    """The pieces in the order of the first pass, all with gradient, in one graph: nothing cached, nothing repeated."""
    counts, seen, targets = objective.count(batch), [], []
    for piece in split_pairs(batch, pieces):
        targets.append(objective.targets(student, piece, 0.0))
        with seeded(draw_seed(), torch.device("cpu")):
            seen.append(objective.represent(student, piece, targets[-1], 0.0, counts))
    rows = {name: torch.cat([one.rows[name] for one in seen]) for name in seen[0].rows}
    against = {name: torch.cat([one.rows[name] for one in targets]) for name in targets[0].rows}
    compared = objective.compare(rows, seen[-1].common, against, 0.0)
    return objective.weigh(compared.parts) + sum(objective.weigh(one.parts) for one in seen)


@pytest.mark.parametrize("contrast_masked", [True, False])
def test_dropout_is_repeated_and_the_generator_stands_where_one_pass_leaves_it(
    accelerator, monkeypatch, contrast_masked
):
    """Picture and text together are only modelled here, yet draw dropout between the two that are contrasted."""
    arguments = {"losses": ["itc", "mlm", "mim"], "contrast_masked": contrast_masked}
    batch, results = uneven_batch(7, 1, repeat_ids=False), {}
    for way in ("one graph", "repeated", "drawn anew"):
        student, objective = build_pair(arguments, attention_dropout=0.4)
        torch.manual_seed(5)
        if way == "one graph":
            loss = one_graph(objective, student, batch, 3)
            loss.backward()
        else:
            if way == "drawn anew":
                monkeypatch.setattr(gradient_cache, "seeded", lambda seed, device: nullcontext())
            loss, *_ = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": 3})
        results[way] = (loss.detach(), gradients(student)), torch.get_rng_state()
    assert_same_step(results["repeated"][0], results["one graph"][0])
    assert torch.equal(results["repeated"][1], results["one graph"][1])
    with pytest.raises(AssertionError):
        assert_same_step(results["drawn anew"][0], results["one graph"][0], tolerance=1e-2)


def test_a_seed_repeats_what_was_drawn_and_leaves_the_generator_where_it_was():
    seed, here = draw_seed(), torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(seed, torch.device("cpu")):
            drawn.append(torch.rand(5))
    assert torch.equal(*drawn) and torch.equal(torch.get_rng_state(), here) and draw_seed() != seed


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["simla", "codis", "momo"])
def test_no_two_pieces_or_steps_draw_their_negatives_with_the_same_numbers(accelerator, monkeypatch, name, dropout):
    family, drawn = FAMILIES[name], []

    def spy(weights, *args, **options):
        with torch.random.fork_rng([]):
            drawn.append(tuple(torch.rand(4).tolist()))
        return draw_negatives(weights, *args, **options)

    for module in (momentum, momo):
        monkeypatch.setattr(module, "draw_negatives", spy)
    student = family.build(PRETRAINING, **family.tiny.APART).train()
    for layer in student.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    objective = family.objective(student, losses=["ica" if name == "codis" else "itc", "itm"])
    batch = family.tiny.make_batch([5, 3, 2, 4, 1, 6])
    batch = {key: value for key, value in batch.items() if not key.startswith("negative_")}
    for _ in range(2):
        loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.5, {"pairs": 3})
    assert len(set(drawn)) == len(drawn) == 12


# BatchNorm


def test_running_statistics_move_once_a_step(accelerator, caplog):
    batch, arguments = uneven_batch(8, 2, repeat_ids=False), {"losses": ["itc", "mlm"]}
    student, objective = build_pair(arguments, head_norm="batch", stem="conv")
    expected = {}
    for network in (student, objective.teacher.model):
        for name, buffer in network.named_buffers():
            if "running" in name:
                expected[id(network), name] = buffer.clone()
    for piece in split_pairs(batch, 4):
        fresh, other = build_pair(arguments, head_norm="batch", stem="conv")
        with torch.no_grad():
            targets = other.targets(fresh, piece, 0.0)
            other.represent(fresh, piece, targets, 0.0, other.count(piece))
        for network, alone in ((student, fresh), (objective.teacher.model, other.teacher.model)):
            start, moved = dict(network.named_buffers()), dict(alone.named_buffers())
            for name in start:
                if "running" in name:
                    expected[id(network), name] += (moved[name] - start[name]) / 4
    before = copy.deepcopy(dict(student.named_buffers()))
    with caplog.at_level("WARNING"):
        loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": 4})
    moved = 0
    for network in (student, objective.teacher.model):
        for name, buffer in network.named_buffers():
            if "running" in name:
                torch.testing.assert_close(buffer, expected[id(network), name], msg=name)
                moved += 1
            elif name.endswith("num_batches_tracked"):
                assert buffer.item() == 1, name
    assert moved > 20 and not torch.equal(
        before["oner.projector.1.running_mean"], student.oner.projector[1].running_mean
    )


def test_batch_statistics_in_pieces_are_announced_and_nothing_else_is(accelerator, monkeypatch):
    said = []
    monkeypatch.setattr(gradient_cache.logger, "warning_once", said.append)
    batch = uneven_batch(8, 2, repeat_ids=False)
    for norm, stem, pieces in (("layer", "linear", 4), ("batch", "linear", 1)):
        student, objective = build_pair({"losses": ["itc"]}, head_norm=norm, stem=stem)
        loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": pieces})
    assert not said
    student, objective = build_pair({"losses": ["itc"]}, head_norm="batch", stem="linear")
    RunningStatistics([student.eval()]).warn(4)
    assert not said
    loss_and_gradients(accelerator, objective, student.train(), {"pairs": batch}, 0.0, {"pairs": 4})
    assert len(said) == 1 and "BatchNorm layers normalise by the statistics of a chunk" in said[0]
    assert "gradient_cache_chunks is 4" in said[0]


def test_statistics_that_no_piece_moves_stay_to_the_bit():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.copy_(torch.tensor([0.1, 1 / 3, 7.7]))
    before = layer.running_mean.clone()
    statistics = RunningStatistics([layer])
    statistics.begin()
    for _ in range(3):
        statistics.add()
    statistics.settle()
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked == 0


# Another family


class TwoTowers(nn.Module):
    """A linear map and dropout for each side, a temperature, and a head that rows pay for by themselves."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(5, 4), nn.Linear(4, 1)
        self.temperature = nn.Parameter(torch.tensor([0.3]))
        self.calls = []

    def forward(self, left, right, negatives=None):
        self.calls.append((len(left), torch.is_grad_enabled()))
        drop = nn.functional.dropout
        return drop(self.left(left), 0.2), drop(self.right(right), 0.2), self.temperature, self.head


class QueueObjective(SinglePortion):
    """CLIP's two-sided loss with a queue of past right sides, and a loss of chosen hard negatives of the piece."""

    def __init__(self, queue: torch.Tensor):
        self.queue = queue

    def split(self, batch, pieces):
        chunks = {name: value.tensor_split(pieces) for name, value in batch.items()}
        return [dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)]

    def count(self, batch):
        return {"matching": torch.tensor(len(batch["left"]))}

    def represent(self, student, batch, targets, progress, counts=None):
        left, right, temperature, head = student(**batch)
        parts = {} if counts is None else {"matching": head(left * right).square().sum() / counts["matching"]}
        return Representations({"left": left, "right": right}, {"temperature": temperature}, parts)

    def targets(self, student, batch, progress):
        return Targets({"old": batch["right"][:, :4].detach()})

    def compare(self, rows, common, targets, progress):
        left, right, temperature = rows["left"], rows["right"], common["temperature"]
        parts = {
            "left": info_nce(left, torch.cat([right, self.queue]), temperature),
            "right": info_nce(right, left, temperature) * (1 + progress),
        }
        return Comparison(parts, {"newest": targets["old"]})

    def weigh(self, parts):
        return sum({"left": 1.0, "right": 2.0, "matching": 0.5}[name] * part for name, part in parts.items())

    def after_step(self, applied=None, kept=None):
        self.queue = torch.cat([kept["newest"], self.queue])[: len(self.queue)]

    def to(self, device):
        return self

    def state_dict(self):
        return {"queue": self.queue}

    def load_state_dict(self, state):
        self.queue = state["queue"]


@pytest.mark.parametrize("pieces", [2, 3, 9])
def test_a_family_with_a_queue_a_temperature_and_dropout(accelerator, pieces):
    batch = {"left": torch.randn(9, 6).double(), "right": torch.randn(9, 5).double()}
    queue, results = torch.randn(20, 4).double(), []
    for way in ("one graph", "pieces"):
        torch.manual_seed(1)
        student, objective = TwoTowers().double(), QueueObjective(queue)
        if way == "one graph":
            counts = objective.count(batch)
            seen = []
            for one in objective.split(batch, pieces):
                with seeded(draw_seed(), torch.device("cpu")):
                    seen.append(objective.represent(student, one, None, 0.5, counts))
            left, right = (torch.cat([one.rows[side] for one in seen]) for side in ("left", "right"))
            cosines = (
                nn.functional.normalize(left, dim=1) @ nn.functional.normalize(torch.cat([right, queue]), dim=1).T
            )
            logits = cosines / student.temperature
            labels = torch.arange(9)
            loss = nn.functional.cross_entropy(logits, labels) + 3 * nn.functional.cross_entropy(
                logits[:, :9].T, labels
            )
            loss = loss + 0.5 * student.head(left * right).square().mean()
            loss.backward()
        else:
            loss, parts, kept = loss_and_gradients(
                accelerator, objective, student, {"pairs": batch}, 0.5, {"pairs": pieces}
            )
            assert set(parts) == {"left", "right", "matching"}
            objective.after_step(kept=kept)
            assert torch.equal(objective.queue[:9], batch["right"][:, :4]) and torch.equal(
                objective.queue[9:], queue[:11]
            )
            assert [grad for _, grad in student.calls] == [False] * pieces + [True] * pieces
            assert max(rows for rows, _ in student.calls) <= -(-9 // pieces)
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])))
    (loss, slopes), (other_loss, other) = results
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert (slopes - other).norm() < 1e-12 * slopes.norm()


@pytest.mark.parametrize("pieces", [2, 3])
def test_codes_and_queues_of_codis_have_the_gradient_of_one_go(accelerator, pieces):
    """Plans of transport are of the whole batch; matching is left out, whose negatives a piece draws from itself."""
    family, slopes = FAMILIES["codis"], {}
    for number in (1, pieces):
        torch.manual_seed(0)
        student = family.build(PRETRAINING, **family.tiny.APART).double().train()
        objective = family.objective(student, losses=["ica", "code", "mlm"])
        objective.teacher.model.double()
        batch = family.tiny.make_batch([5, 3, 2, 4, 1, 6], dtype=torch.float64)
        loss, _, _ = loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.5, {"pairs": number})
        reached = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        slopes[number] = {"loss": loss.detach(), **reached}
    assert slopes[1].keys() == slopes[pieces].keys() and slopes[1]["codebook.weight"].abs().max() > 0
    for name, value in slopes[1].items():
        torch.testing.assert_close(slopes[pieces][name], value, rtol=1e-9, atol=1e-12, msg=name)


# Pieces of a batch


def test_pieces_laid_end_to_end_are_the_batch():
    batch = uneven_batch(7, 4, repeat_ids=True)
    pieces = split_pairs(batch, 3)
    assert sorted(len(piece["ids"]) for piece in pieces) == [2, 2, 3]
    slots, words, start = batch["input_ids"].shape[1] - 17, 0, 0
    for piece in pieces:
        rows = slice(start, start + len(piece["ids"]))
        for name in (
            "input_ids",
            "attention_mask",
            "pixel_values",
            "masked_input_ids",
            "bool_masked_pos",
            "ids",
            "rows",
        ):
            assert torch.equal(piece[name], batch[name][rows]), name
        assert torch.equal(piece["text_index"], piece["attention_mask"][:, 17:].flatten().nonzero().flatten())
        where = piece["text_index"][piece["mlm_index"]]
        assert torch.equal(piece["input_ids"][:, 17:].flatten()[where], piece["mlm_labels"])
        changed = (piece["input_ids"] != piece["masked_input_ids"])[:, 17:].flatten().nonzero().flatten()
        assert torch.equal(changed, where)
        start, words = start + len(piece["ids"]), words + len(piece["text_index"])
    assert start == 7 and words == len(batch["text_index"]) and slots == 6


def test_what_cannot_be_split_is_named(accelerator):
    batch = uneven_batch(3, 4, repeat_ids=True)
    student, objective = build_pair({"losses": ["itc"]})
    with pytest.raises(ValueError, match="got a batch of 3 rows to split into 4 chunks; expected 1 to 3"):
        loss_and_gradients(accelerator, objective, student, {"pairs": batch}, 0.0, {"pairs": 4})
    with pytest.raises(ValueError, match=r"weights has shape \(2,\); expected 3 rows first"):
        split_pairs({**batch, "weights": torch.ones(2)}, 2)


# The engine


def test_a_run_in_pieces_is_the_run_in_one_go(pairs, tmp_path):
    """Real pairs through the example: ten steps of eight, a teacher and AdamW; LayerNorm, so that rows are alone."""
    options = {"model_config": {"head_norm": "layer", "stem": "linear"}, "match_ids": True}
    weights = {}
    for chunks in (1, 3):
        forget_accelerator()
        directory = tmp_path / str(chunks)
        load_example("pretrain").main(tiny_arguments(pairs, directory, gradient_cache_chunks=chunks, **options))
        weights[chunks] = load_checkpoint(list_checkpoints(directory)[-1])[0]
    forget_accelerator()
    for line, other in zip(*(read_log(tmp_path / str(chunks)) for chunks in (1, 3)), strict=True):
        assert other == pytest.approx(line, rel=1e-5, abs=1e-7)
    for stem in ("model", "objective"):
        for name, value in weights[1][stem].items():
            if "qkv.bias" not in name:  # softmax ignores the keys', so that Adam follows rounding there
                torch.testing.assert_close(weights[3][stem][name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(("chunks", "expected"), [(0, "at least 1"), (9, "1 to the batch_size of 8")])
def test_a_number_of_pieces_that_no_batch_has_is_refused(pairs, tmp_path, chunks, expected):
    with pytest.raises(ValueError, match=f"gradient_cache_chunks is {chunks}; expected {expected}"):
        parse_arguments(tiny_arguments(pairs, tmp_path, gradient_cache_chunks=chunks))
