"""Every test runs offline, seeded, and with one thread per process."""

import os

# Before transformers, datasets and huggingface_hub are imported: they read these once.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# ours, and pytest's own for tests of it
pytest_plugins = ["deprecation_report", "pytester"]


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; what is `slow_but_one` is slow, but for the first family."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow_but_one") and item.callspec.indices["family"]:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs on each one of the list, and with `auto` on each of its classes."""
    if "family" in metafunc.fixturenames:
        from families import FAMILIES

        if "auto" in metafunc.fixturenames:
            pairs = [(family, auto) for family in FAMILIES.values() for auto in family.classes]
            ids = [f"{family.name}-{auto}" for family, auto in pairs]
            metafunc.parametrize(("family", "auto"), pairs, ids=ids, scope="module")
        else:
            metafunc.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys(), scope="module")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def emoji_folder() -> Path:
    """The embedded pairs: train, train_extra, test_style and test_concept as parquet files."""
    return ROOT / "examples" / "data" / "emoji"


# Runs of examples/pretrain.py in this process; the helpers are imported late, for most tests need no training


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/pretrain.py as a module."""
    from tiny_pretraining import load_example

    return load_example("pretrain")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Forty real pairs in a parquet file."""
    from tiny_pretraining import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in the process: none of an earlier test's, and none is left."""
    from tiny_pretraining import forget_accelerator

    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="module")
def undisturbed(example, pairs, tmp_path_factory) -> Path:
    """A run of ten steps that nobody stops, with a checkpoint after each."""
    from tiny_pretraining import EVERY_STEP, forget_accelerator, tiny_arguments

    forget_accelerator()
    directory = tmp_path_factory.mktemp("undisturbed")
    example.main(tiny_arguments(pairs, directory, **EVERY_STEP))
    return directory
