"""Four processes with b pairs make the loss and the gradient of one process with 4b, in one go and in pieces.

The global batch and the oracle are those of `test_gradient_cache.py`, where one process is compared with it. Words and
patches to predict are spread unevenly, so that a mean over processes of each one's mean would be another loss.
"""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# two processes are compared with one in every run of the tests
pytestmark = pytest.mark.slow
PROCESSES = 4
PLACES = [Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1]]


def steps_of_one_process(rank: int, folder: str) -> None:
    from accelerate import Accelerator
    from naive_pretraining import SHAPES, batch_of_shape, build_shape, gradients

    from oner.processing.data.chunks import split_pairs
    from oner.training.run.gradient_cache import loss_and_gradients

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    # what Accelerate takes for the sign of a launched process; the group is there already
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    accelerator, results = Accelerator(cpu=True), {}
    assert accelerator.num_processes == PROCESSES
    for options, share in SHAPES:
        mine = split_pairs(batch_of_shape(options, share), PROCESSES)[rank]
        for pieces in sorted({1, min(2, share), share}):
            student, objective = build_shape(options)
            wrapped = DistributedDataParallel(student)
            exchanged = []
            wrapped.register_comm_hook(exchanged, count_and_average)
            loss, parts, _ = loss_and_gradients(
                accelerator, objective, wrapped, {"pairs": mine}, 0.0, {"pairs": pieces}
            )
            result = {"loss": loss, "exchanged": len(exchanged), **{f"part of {n}": p for n, p in parts.items()}}
            if rank in (0, PROCESSES - 1):
                result.update({f"slope of {name}": slope for name, slope in gradients(student).items()})
            results[f"{options} {share} {pieces}"] = result
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def count_and_average(exchanged: list, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    exchanged.append(bucket.index())
    total = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return total.then(lambda done: done.value()[0] / PROCESSES)


def main(folder: str) -> None:
    """Forks before any thread of autograd exists: one import serves all processes."""
    import accelerate  # noqa: F401
    import naive_pretraining

    naive_pretraining.build_shape(0)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=steps_of_one_process, args=(rank, folder)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    sys.exit(max(abs(process.exitcode) if process.exitcode is not None else 1 for process in processes))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(folder)], cwd=PLACES[0], capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_the_step_of_four_processes_is_the_oracle(ranks):
    from naive_pretraining import SHAPES, assert_same_step, oracle

    checked = 0
    for options, share in SHAPES:
        expected = oracle(options, share)
        for pieces in sorted({1, min(2, share), share}):
            results = [rank[f"{options} {share} {pieces}"] for rank in ranks]
            loss = torch.stack([result["loss"] for result in results]).mean()
            assert len({result["loss"].item() for result in results}) > 1  # each saw its own rows
            for result in (results[0], results[-1]):
                slopes = {name[9:]: value for name, value in result.items() if name.startswith("slope of ")}
                assert_same_step((loss, slopes), expected)
            checked += 1
    assert checked >= 60


def test_processes_exchange_gradients_once_a_step_however_many_pieces(ranks):
    for rank in ranks:
        assert {result["exchanged"] for result in rank.values()} == {1}


def test_a_mean_of_means_would_be_another_loss(ranks):
    """The counts of words and patches differ enough between the processes for the denominators to matter."""
    from naive_pretraining import batch_of_shape

    from oner.processing.data.chunks import split_pairs

    counts = [len(piece["mlm_labels"]) for piece in split_pairs(batch_of_shape(6, 5), PROCESSES)]
    masked = [int(piece["bool_masked_pos"].sum()) for piece in split_pairs(batch_of_shape(6, 5), PROCESSES)]
    assert max(counts) > 1.2 * min(counts) and max(masked) > 1.2 * min(masked)


if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in PLACES]
    main(sys.argv[1])
