"""transformers' Trainer on every class with a loss: what is accumulated over batches is what one batch would give."""

import copy

import pytest
import tiny_simla
import tiny_tasks
import torch
from families import FAMILIES, MASKED_LM, RETRIEVAL
from tiny_oner import joint_batch, text_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from oner import DiscreteVAE, DiscreteVAEConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PAIR = {name: value for name, value in joint_batch([5, 3]).items() if name in ("input_ids", "pixel_values")}
TEXT = text_of(joint_batch([5, 3]))
PIXELS = {"pixel_values": PAIR["pixel_values"]}
LABELS = {"labels": torch.tensor([1, 0])}


def dvae() -> DiscreteVAE:
    config = DiscreteVAEConfig(num_codes=24, hidden_size=8, blocks_per_group=1, codebook_dim=8, image_size=16)
    return DiscreteVAE(config)


PAIRED = ("AutoModelForSequenceClassification", "AutoModelForVisualQuestionAnswering")
# name -> how to make a model, and two rows of what it is trained on; every class that gives a loss
CASES = {
    **{
        f"{name}-{auto}": (lambda family=family, auto=auto: family.build(auto), rows)
        for name, family in FAMILIES.items()
        for auto, rows in {
            RETRIEVAL: {**TEXT, **PIXELS, "return_loss": True},
            MASKED_LM: {**TEXT, "labels": TEXT["input_ids"].masked_fill(TEXT["attention_mask"] == 0, -100)},
            "AutoModelForImageClassification": {**PIXELS, **LABELS},
            "AutoModelForSequenceClassification": {**TEXT, **PIXELS, **LABELS},
            "AutoModelForVisualQuestionAnswering": {
                **TEXT,
                **PIXELS,
                "answer_ids": tiny_tasks.ANSWERS[:2],
                "answer_mask": tiny_tasks.MASK[:2],
            },
        }.items()
        # of one tower a model of texts reads them alone, and answers are classes
        if auto in family.classes and (auto not in PAIRED or family.tiny.tiny_config().pair_layout == "separate")
    },
    **{
        f"{name}-{auto}": (lambda family=family, auto=auto: family.build(auto), rows)
        for name, family in FAMILIES.items()
        for auto, rows in {
            "AutoModelForSequenceClassification": {**TEXT, **LABELS},
            "AutoModelForVisualQuestionAnswering": {**PAIR, **LABELS},
        }.items()
        if auto in family.classes and family.tiny.tiny_config().pair_layout == "joint"
    },
    "SimlaForVisualReasoning": (
        lambda: tiny_tasks.SimlaForVisualReasoning(tiny_simla.tiny_config(num_labels=2)),
        {**TEXT, "pixel_values": torch.stack([PIXELS["pixel_values"]] * 2, 1), **LABELS},
    ),
    "DiscreteVAE": (dvae, {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
}


class Gradients(TrainerCallback):
    """What the optimiser is about to apply."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(model, batches: list[dict], directory) -> tuple[float, dict]:
    """The loss that Trainer tells, and the gradient, of one step over some batches."""
    gradients = Gradients()
    arguments = TrainingArguments(
        str(directory),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(batches),
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, train_dataset=batches, data_collator=lambda rows: rows[0], callbacks=[gradients]
    )
    return trainer.train().training_loss, gradients.seen


@pytest.mark.parametrize("name", CASES)
def test_accumulation_over_equal_batches_changes_nothing(name, tmp_path):
    build, batch = CASES[name]
    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, gradient = one_step(copy.deepcopy(model), [batch], tmp_path)
    again, accumulated = one_step(model, [batch] * 4, tmp_path)
    assert again == pytest.approx(loss, rel=1e-5)
    assert gradient.keys() == accumulated.keys()
    for weight, value in gradient.items():
        torch.testing.assert_close(accumulated[weight], value, rtol=1e-4, atol=1e-6, msg=weight)


def test_masked_tokens_weigh_alike_however_they_are_spread(family, tmp_path):
    """Two batches of 5 and of 2 tokens are one batch of 7, not two halves."""
    model = family.build(MASKED_LM)
    ids = TEXT["input_ids"]
    labels = ids.masked_fill(TEXT["attention_mask"] == 0, -100)
    labels[1, 2:] = -100
    whole = {**TEXT, "labels": labels}
    halves = [{key: value[row : row + 1] for key, value in whole.items()} for row in range(2)]
    loss, gradient = one_step(copy.deepcopy(model), [whole], tmp_path)
    again, accumulated = one_step(model, halves, tmp_path)
    assert again == pytest.approx(loss, rel=1e-5)
    for weight, value in gradient.items():
        torch.testing.assert_close(accumulated[weight], value, rtol=1e-4, atol=1e-6, msg=weight)
