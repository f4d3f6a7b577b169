"""examples/with_trainer.py: Trainer minimises the objective, its teacher follows, and what it saves is whole."""

import pytest
import torch
from tiny_pretraining import load_example, tiny_arguments
from transformers import AutoModel, AutoProcessor

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("name", ["oner", "simla"])
def test_trainer_takes_the_steps(name, pairs, tmp_path):
    trained = load_example("with_trainer").main(tiny_arguments(pairs, tmp_path, name, max_steps=3, epochs=None))
    losses = [told["loss"] for told in trained.state.log_history if "loss" in told]
    assert len(losses) == 3 and len(set(losses)) == 3

    # the teacher lags behind the student, and moved from where it began beside it
    teacher = dict(next(iter(trained.objective.teachers())).model.named_parameters())
    student = dict(trained.model.named_parameters())
    behind = [name for name, value in teacher.items() if not torch.equal(value, student[name])]
    assert len(behind) > 0.5 * len(teacher)
    saved = AutoModel.from_pretrained(tmp_path)
    assert saved.config.model_type == name and AutoProcessor.from_pretrained(tmp_path).tokenizer is not None
