"""Two processes with a part of a batch each make the loss, the gradient and the state that one process makes.

What that is, a family defines: OneR's processes gather each other's keys, so the parts are one batch; SIMLA's have
their own keys and negatives beside a queue that they share. Norms see one row, nothing is drawn, and the processes
hold different numbers of masked words and patches. (Batch norm across processes is `SyncBatchNorm`, which exists on
accelerators only.)
"""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PROGRESS = 0.5


def make_parts(family) -> list[dict[str, torch.Tensor]]:
    """Two pairs of six words in all for each process, two or one of them masked; ids with a positive in the other."""
    parts = [family.tiny.make_batch(lengths, slots=5, seed=seed) for seed, lengths in enumerate(([4, 2], [1, 5]))]
    for part, ids in zip(parts, ([3, 8], [3, 9]), strict=True):
        part["ids"] = torch.tensor(ids)
    parts[1]["mlm_index"], parts[1]["mlm_labels"] = parts[1]["mlm_index"][:1], parts[1]["mlm_labels"][:1]
    parts[1]["bool_masked_pos"][1] = torch.arange(16) == 2
    assert [len(part["mlm_index"]) for part in parts] == [2, 1]
    assert [part["bool_masked_pos"].sum() for part in parts] == [10, 6]
    return parts


def make(family):
    from families import PRETRAINING

    torch.manual_seed(0)
    student = family.build(PRETRAINING, **family.tiny.APART).train()
    objective = family.objective(student, losses=list(family.pair_losses), match_ids=True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return student, objective


def result_of(student, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict:
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters() if value.requires_grad}
    return {"loss": loss.detach(), "parts": parts, "gradients": gradients}


def state_of(objective) -> dict[str, torch.Tensor]:
    """As each process holds it; a checkpoint's state is the first one's alone."""
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    for number, teacher in enumerate(objective.teachers()):
        state |= {f"{number}.{name}": value.clone() for name, value in teacher.model.state_dict().items()}
    return {name: value for name, value in state.items() if not name.startswith("teacher.")}


def one_rank(rank: int, folder: str) -> None:
    from families import FAMILIES

    from oner.training.parallel import distributed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, family in FAMILIES.items():
        student, objective = make(family)
        wrapped = DistributedDataParallel(student)
        taken = objective(wrapped, make_parts(family)[rank], PROGRESS)
        results[name] = result_of(student, taken.loss, taken.parts)
        objective.after_step(kept=taken.kept)
        results[name]["state"] = state_of(objective)
    result = {"families": results}
    result["gathered"] = distributed.gather_without_gradient(torch.tensor([[rank, 0], [rank, 1]]))
    own = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1)).requires_grad_()
    everyone = distributed.gather_with_gradient(own)
    (everyone * torch.arange(8.0).view(4, 2) * (1 + 10 * rank)).sum().backward()
    result["gathered with gradient"], result["its gradient"] = everyone.detach(), own.grad
    result["counts"] = distributed.mean_counts({"few": torch.tensor(rank), "none": torch.tensor(0)})
    result["votes"] = [distributed.any_process(flag, torch.device("cpu")) for flag in (rank == 1, False)]
    result["rank"] = (distributed.rank(), distributed.world_size())
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Forks before any thread of autograd exists: one import serves both processes."""
    import families

    for family in families.FAMILIES.values():
        make(family)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    sys.exit(max(abs(process.exitcode) if process.exitcode is not None else 1 for process in processes))


@pytest.fixture(scope="module")
def ranks(root, tmp_path_factory) -> list[dict]:
    """What each of the two processes saw, of all families."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(Path(__file__)), str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_equal_one(family, ranks):
    both = [rank["families"][family.name] for rank in ranks]
    student, objective = make(family)
    whole = result_of(student, *family.tiny.in_one_process(objective, student, make_parts(family), PROGRESS))

    assert list(both[0]["parts"]) == list(whole["parts"])
    assert [name for name in whole["parts"] if name in family.losses] == list(family.pair_losses)
    for name, value in whole["parts"].items():
        mean = (both[0]["parts"][name] + both[1]["parts"][name]) / 2
        torch.testing.assert_close(mean, value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close((both[0]["loss"] + both[1]["loss"]) / 2, whole["loss"], rtol=1e-5, atol=1e-6)
    assert both[0]["loss"] != both[1]["loss"]  # each saw its own pairs
    assert both[0]["gradients"].keys() == whole["gradients"].keys()
    for name, value in whole["gradients"].items():
        scale = value.abs().max().clamp_min(1e-3).item()
        for rank in both:  # averaged over the processes by the data-parallel wrapper
            torch.testing.assert_close(rank["gradients"][name], value, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_two_processes_keep_the_state_of_one(family, ranks):
    """Teacher and queues after the step, to the bit on both; in a queue, the rows of the processes in their order."""
    one, other = (rank["families"][family.name]["state"] for rank in ranks)
    student, objective = make(family)
    before = state_of(objective)
    family.tiny.in_one_process(objective, student, make_parts(family), PROGRESS)
    expected = state_of(objective)
    assert one.keys() == other.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-6, msg=name)
    moved = sum(not torch.equal(value, before[name]) for name, value in expected.items())
    assert moved > 0.5 * len(expected) or not expected


def test_a_process_alone_computes_something_else(family, ranks):
    """Without the other process's keys, or its share of what is counted, the loss would be another."""
    student, objective = make(family)
    alone, parts, _ = objective(student, make_parts(family)[0], PROGRESS)
    seen = ranks[0]["families"][family.name]["parts"]
    assert max(abs(parts[name] - seen[name]).item() for name in parts) > 1e-2


def test_what_processes_say_to_each_other(ranks):
    for number, rank in enumerate(ranks):
        assert rank["gathered"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert rank["gathered with gradient"].tolist() == [[1, 2], [3, 4], [2, 4], [6, 8]]
        # once from its own process's loss, eleven times from the other's
        assert rank["its gradient"].tolist() == [[12.0 * (4 * number + 2 * i + j) for j in (0, 1)] for i in (0, 1)]
        # of one thing counted in all, each process has half; of nothing too, so that nothing is divided by zero
        assert {name: count.item() for name, count in rank["counts"].items()} == {"few": 0.5, "none": 0.5}
        assert rank["votes"] == [True, False]
        assert rank["rank"] == (number, 2)


def test_one_process_is_the_identity():
    from oner.training.parallel import distributed

    tensor = torch.randn(3, 2, requires_grad=True)
    gathered = distributed.gather_without_gradient(tensor)
    assert torch.equal(gathered, tensor) and not gathered.requires_grad
    assert distributed.gather_with_gradient(tensor) is tensor
    assert distributed.mean_counts({"words": torch.tensor(7)})["words"] == 7 and distributed.mean_counts({}) == {}
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)
    assert distributed.any_process(True, torch.device("cpu")) and not distributed.any_process(
        False, torch.device("cpu")
    )


if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # families, oner
    main(sys.argv[1])
