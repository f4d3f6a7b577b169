"""The accelerator's check, small and on this CPU: every part gives its figures, and one that fails does not end it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pretraining import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from gpu_check_speed import caption_lengths, kind_of, run_cases  # noqa: E402

SCENES = ROOT / "examples" / "data" / "scenes.py"


def check(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "examples" / "gpu_check.py"), "--device", "cpu", "--tiny"]
    command += ["--output", str(output), "--model", str(tmp_path / "model.tar"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


def test_speed_and_checks_give_figures_side_by_side_with_what_failed(tmp_path):
    cases = ("oner_eager", "transformers_clip_eager", "open_clip_eager", "estimate")
    told = check(tmp_path, "--parts", "speed", "checks", "--cases", *cases)
    assert told["machine"]["device"] == "cpu" and told["checks"]["exit_status"] == 0
    speed = told["speed"]
    assert speed["peaks"]["gemm_flops"] > 0
    for name in ("oner_eager", "transformers_clip_eager"):
        figures = speed[name]
        assert 0 < figures["mfu_of_gemm"] < 1, name
        rate = figures["pairs"] / figures["seconds"]
        assert figures["pairs_per_second"] == pytest.approx(rate)
        assert figures["paper_hours"] == pytest.approx(40 * 5.1e6 / rate / 3600)
    assert sum(speed["oner_eager"]["profile"]["kinds_ms"].values()) > 0
    assert abs(speed["estimate"]["flops_error"]) < 0.1
    # open_clip is no requirement: where it is missing, its absence stands in its place and the rest is measured
    assert "pairs_per_second" in speed["open_clip_eager"] or "open_clip" in speed["open_clip_eager"]["error"]


@pytest.mark.slow
@pytest.mark.skipif(not SCENES.is_file(), reason="examples/data/scenes.py draws the scenes")
def test_a_model_is_trained_measured_and_packed(tmp_path):
    training = check(tmp_path, "--parts", "training")["training"]
    assert "error" not in training, training["traceback"]
    assert training["trained"]["pairs"] > 0 and training["saved"]["bytes"] > 0
    assert 0 <= training["measured"]["retrieval seen"]["IR"]["R@10"] <= 100
    assert training["measured"]["four seen"]["asked"] == 40
    assert (tmp_path / "model.tar").stat().st_size > training["saved"]["bytes"]


def test_a_case_that_raises_leaves_its_reason_and_the_next_one_runs():
    import torch

    def broken() -> dict:
        raise RuntimeError("out of everything")

    told = dict(run_cases({"one": broken, "two": lambda: {"seconds": 1.0}}, torch.device("cpu")))
    assert told["one"]["error"] == "RuntimeError: out of everything" and "broken" in told["one"]["traceback"]
    assert told["two"]["seconds"] == 1.0


def test_captions_are_as_long_as_said():
    lengths = caption_lengths(4096, 64, seed=0)
    assert max(lengths) == 64 and min(lengths) >= 3
    assert sum(lengths) / len(lengths) == pytest.approx(12, abs=0.5)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NNN", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_per_fused__to_copy_native_layer_norm_0", "compiled"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel", "convolution"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", "copies"),
        ("void at::native::batch_norm_backward_kernel", "norms"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl", "pointwise"),
        ("spin", "other"),
    ],
)
def test_a_kernel_belongs_to_a_kind(kernel, kind):
    assert kind_of(kernel) == kind
