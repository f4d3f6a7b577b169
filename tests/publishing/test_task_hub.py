"""Fine-tuned models travel with their code: the same answers in a process that has transformers and not oner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_simla import tiny_config
from tiny_tasks import ANSWERS, MASK, TASKS, bold, inputs

from oner import VisionLanguageImageProcessor, VisionLanguageProcessor, train_tokenizer
from oner.training.publishing.hub import export_model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(6)
    return [bold(kind(tiny_config(num_text_layers=4))) for kind in TASKS]


def test_fine_tuned_models_load_elsewhere(models, tmp_path):
    tokenizer = train_tokenizer(["one word or two"] * 2, vocab_size=60, min_frequency=1)
    image_processor = VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=4)
    processor = VisionLanguageProcessor(image_processor, tokenizer, joint_layout=False)
    places = [export_model(model, processor, tmp_path / type(model).__name__) for model in models]
    batch = inputs()
    save_file({**batch, "candidate_ids": ANSWERS, "candidate_mask": MASK}, tmp_path / "inputs.safetensors")
    out = tmp_path / "out.safetensors"
    probe = Path(__file__).parents[1] / "task_probe.py"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(probe), *map(str, places), str(tmp_path / "inputs.safetensors"), str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said, (answering, entailment, reasoning) = load_file(out), models
    with torch.no_grad():
        expected = {
            "scores": answering.rank_answers(**batch, candidate_ids=ANSWERS, candidate_mask=MASK).scores,
            "written": answering.generate_answers(**batch).sequences,
            "entailment": entailment(**batch).logits,
            "reasoning": reasoning(**inputs(pictures=2)).logits,
        }
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(said[name], value, rtol=1e-5, atol=1e-5, msg=name)
