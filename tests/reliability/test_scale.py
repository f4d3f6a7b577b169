"""Memory at full size, by the figures of reliability/scale.py, each in a process of its own."""

import importlib.util
import sys

import pytest
from tiny_pretraining import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scale():
    """Under its own name in `sys.modules`, by which the processes that it spawns import it."""
    path = ROOT / "tests" / "reliability" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    sys.modules["scale"] = module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.parent))
    del sys.modules["scale"]


@pytest.mark.parametrize("with_ids", [False, True])
def test_contrast_of_32k_by_32k_takes_less_than_one_gibibyte(scale, with_ids):
    figures = scale.alone(scale.contrast, 32768, 32768, 256, with_ids)
    assert figures["MiB"] <= 1024 and figures["cosines_MiB"] == 4096
    assert figures["gradient_off_fp64"] < 3e-6


def test_memory_of_a_step_in_pieces_does_not_grow_with_the_batch(scale, tmp_path):
    small, large, plain = (scale.alone(scale.memory, *step, str(tmp_path)) for step in ((16, 2), (64, 8), (16, 1)))
    assert large["MiB"] < 1.15 * small["MiB"] < 1.15 * plain["MiB"]
