"""Two processes with b pairs each make the loss and the gradient of one process with 2b.

Layer norm and a linear stem: no row sees another but through the contrast. (Batch norm across processes is
`SyncBatchNorm`, which exists on accelerators only.) The processes hold different numbers of masked words and patches.
"""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ARGUMENTS = {"losses": ["itc", "xmc", "cic", "cmc", "mlm", "mim"], "match_ids": True}


def whole_batch() -> dict[str, torch.Tensor]:
    from tiny_oner import joint_batch

    batch = joint_batch([4, 2, 1, 5], slots=5)
    batch["ids"] = torch.tensor([3, 8, 3, 9])  # a positive in the other process
    batch["mlm_index"], batch["mlm_labels"] = batch["mlm_index"][:3], batch["mlm_labels"][:3]
    batch["bool_masked_pos"][3] = torch.arange(16) == 2
    return batch


def part_of(batch: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Rows 2r and 2r + 1, with the word indices counted from there: six words each, two or one of them masked."""
    rows = slice(2 * rank, 2 * rank + 2)
    part = {
        name: value[rows] for name, value in batch.items() if name not in ("text_index", "mlm_index", "mlm_labels")
    }
    part["text_index"] = part["attention_mask"][:, 17:].flatten().nonzero().flatten()
    mine = batch["mlm_index"] // 6 == rank
    part["mlm_index"], part["mlm_labels"] = batch["mlm_index"][mine] - 6 * rank, batch["mlm_labels"][mine]
    assert len(part["mlm_index"]) == 2 - rank and len(part["text_index"]) == 6
    assert part["bool_masked_pos"].sum() == (10, 6)[rank]
    return part


def make():
    from tiny_oner import randomised, tiny_config

    from oner import OneRForPreTraining
    from oner.training.objective_oner import OneRObjective, OneRObjectiveArguments

    torch.manual_seed(0)
    config = tiny_config(head_norm="layer", stem="linear", pooling="mean", learnable_temperature=True)
    student = randomised(OneRForPreTraining(config)).train()
    objective = OneRObjective(student, OneRObjectiveArguments(**ARGUMENTS))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return student, objective


def step(wrapped, student, objective, batch) -> dict:
    loss, parts = objective(wrapped, batch, 0.0)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    return {"loss": loss.detach(), "parts": parts, "gradients": gradients}


def one_rank(rank: int, folder: str) -> None:
    from oner.training import distributed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, objective = make()
    wrapped = DistributedDataParallel(student)
    result = step(wrapped, student, objective, part_of(whole_batch(), rank))
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
    whole_batch(), make()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    sys.exit(max(abs(process.exitcode) if process.exitcode is not None else 1 for process in processes))


def test_two_processes_equal_one(tmp_path, root):
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    student, objective = make()
    whole = step(student, student, objective, whole_batch())

    for name, value in whole["parts"].items():
        mean = (ranks[0]["parts"][name] + ranks[1]["parts"][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole["loss"], rtol=1e-5, atol=1e-6)
    assert ranks[0]["loss"] != ranks[1]["loss"]  # each saw its own queries
    for name, value in whole["gradients"].items():
        scale = value.abs().max().clamp_min(1e-3).item()
        for rank in ranks:  # averaged over the processes by the data-parallel wrapper
            torch.testing.assert_close(rank["gradients"][name], value, rtol=1e-3, atol=1e-4 * scale, msg=name)

    # without the other process's keys the contrast would be another
    lonely, objective = make()
    alone = step(lonely, lonely, objective, part_of(whole_batch(), 0))
    assert abs(alone["parts"]["itc"] - ranks[0]["parts"]["itc"]) > 1e-2

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
    from oner.training import distributed

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
    sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # tiny_oner, oner
    main(sys.argv[1])
