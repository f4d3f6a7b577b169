"""Models of texts alone: what they read and what they cost, what they leave alone, and how they are scored."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from tiny_oner import joint_batch, randomised, text_of
from torch.nn import functional as F

from oner.modeling.vl_task_heads import text_losses
from oner.training.evaluation.metric_text_task import TextTaskMetric
from oner.training.evaluation.texts import TextTaskEvaluator
from oner.training.objectives.classification import TextObjective
from oner.training.tasks.glue import AutoModelForTexts, GlueArguments

TEXTS = text_of(joint_batch([5, 3, 2]))


def made(family: str, labels: int = 3):
    """A tiny model of texts of a family, with weights large enough to tell texts apart."""
    torch.manual_seed(0)
    config = FAMILIES[family].tiny.tiny_config(num_labels=labels)
    return randomised(AutoModelForTexts.models[family](config)).eval()


@pytest.fixture(params=sorted(AutoModelForTexts.models))
def name(request) -> str:
    return request.param


def test_every_family_has_one():
    assert AutoModelForTexts.models.keys() == FAMILIES.keys()


def test_it_reads_the_text_tower_alone(name):
    model = made(name)
    with torch.no_grad():
        output = model(**TEXTS, labels=torch.tensor([0, 2, 1]))
        states = FAMILIES[name].tower(model)(**TEXTS).last_hidden_state
        head = model.classifier
        expected = states[:, 0]
        # MoMo's is linear
        if not isinstance(head, torch.nn.Linear):
            expected = torch.tanh(expected @ head[1].weight.T + head[1].bias)
            head = head[4]
        expected = expected @ head.weight.T + head.bias
        torch.testing.assert_close(output.logits, expected)
        torch.testing.assert_close(output.loss, F.cross_entropy(expected, torch.tensor([0, 2, 1])))
    with pytest.raises(ValueError, match="expects input_ids, got None"):
        model(pixel_values=torch.zeros(3, 3, 16, 16))


def test_one_label_is_a_score(name):
    model, scores = made(name, labels=1), torch.tensor([1.5, 0.0, 5.0])
    with torch.no_grad():
        output = model(**TEXTS, labels=scores)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - scores).square().mean())
    assert text_losses(torch.tensor([[2.0]]), torch.tensor([5.0])).tolist() == [9.0]


def test_whatever_learns_gets_a_gradient(name):
    """A data-parallel engine waits for the gradient of each parameter that is not frozen."""
    model = made(name).train()
    objective = TextObjective(model, GlueArguments())
    batch = {**TEXTS, "labels": torch.tensor([0, 2, 1]), "ids": torch.arange(3)}
    objective(model, batch, 0.5).loss.backward()
    learning = {one for one, parameter in model.named_parameters() if parameter.requires_grad}
    assert {one for one, parameter in model.named_parameters() if parameter.grad is not None} == learning
    assert any("word_embeddings" in one for one in learning) and not any("vision" in one for one in learning)


def test_a_score_may_have_a_teacher():
    model = made("oner", labels=1)
    objective = TextObjective(model, GlueArguments(distillation=0.4))
    objective.teacher.model.eval()  # without dropout, which would draw twice
    with torch.no_grad():
        for parameter in objective.teacher.model.parameters():
            parameter.mul_(1.1)
        scores = torch.tensor([1.0, 2.0, 3.0])
        batch = {**TEXTS, "labels": scores, "ids": torch.arange(3)}
        said = model(**TEXTS).logits[:, 0]
        taught = objective.teacher(**TEXTS).logits[:, 0]
        loss = objective.loss(model, batch, 0.4, torch.tensor(3))
    expected = (0.6 * (said - scores).square() + 0.4 * (said - taught).square()).mean()
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(said, taught)


def test_metrics_are_glues():
    said, right = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert TextTaskMetric("accuracy").compute(predictions=said, references=right) == {"accuracy": 0.6}
    both = TextTaskMetric("f1").compute(predictions=said, references=right)
    assert both == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "accuracy_f1_mean": (0.6 + 2 / 3) / 2})
    # twice the scores and a twist: Spearman sees the ranks alone
    values = TextTaskMetric("correlation").compute(predictions=[0.0, 1.0, 8.0], references=[1.0, 2.0, 3.0])
    assert values["spearman"] == pytest.approx(1) and values["pearson"] == pytest.approx(
        np.corrcoef([0, 1, 8], [1, 2, 3])[0, 1]
    )
    assert TextTaskMetric("correlation").compute(predictions=[1.0, 1.0], references=[1.0, 2.0])["pearson"] == 0
    with pytest.raises(ValueError, match="unknown metric 'matthews'; expected one of accuracy, f1, correlation"):
        TextTaskMetric("matthews")


def test_an_evaluator_refuses_another_tasks_model():
    from tiny_finetuning import tiny_processor

    processor = tiny_processor()
    rows = [{"text": "yes", "second_text": "no", "label": label} for label in (0, 1, 0)]
    model = made("simla", labels=2)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.cls_token_id, model.config.mask_token_id, model.config.image_token_id = (
        processor.tokenizer.cls_token_id, processor.tokenizer.mask_token_id, processor.tokenizer.image_token_id,
    )  # fmt: skip
    values = dict(TextTaskEvaluator(rows, "rte", "dev").run(model, processor))
    assert values["dev/chance"] == pytest.approx(2 / 3) and values["dev/accuracy"] in (1 / 3, 2 / 3)
    with pytest.raises(ValueError, match="the model has 2 labels; expected 3, those of mnli"):
        dict(TextTaskEvaluator(rows, "mnli").run(model, processor))
