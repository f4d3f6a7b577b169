"""Unpaired texts beside OneR's pairs (Table 4): losses by hand, gradients of both portions, and a run that resumes."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from tiny_oner import APART, joint_batch, randomised, text_of, tiny_config
from tiny_pretraining import (
    ROOT,
    assert_same_checkpoint,
    forget_accelerator,
    load_example,
    read_log,
    tiny_arguments,
    write_pairs,
)

from oner import OneRForPreTraining
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments
from oner.training.run.gradient_cache import loss_and_gradients

ALL = ["itc", "cmc", "mlm", "mim", "text_mlm", "text_nce"]


def build(losses, **fields):
    torch.manual_seed(4)
    student = randomised(OneRForPreTraining(tiny_config(**APART, **fields))).double()
    objective = OneRObjective(student, OneRObjectiveArguments(losses=losses))
    with torch.no_grad():
        for parameter in objective.teacher.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    objective.teacher.model.double()
    return student, objective


def batches(lengths=(3, 5, 2, 4)):
    pairs = joint_batch(list(lengths), dtype=torch.float64)
    other = joint_batch([4, 1, 6, 3], seed=9)
    texts = {**text_of(other), "masked_input_ids": text_of(other, "masked_input_ids")["input_ids"]}
    texts |= {name: other[name] for name in ("text_index", "mlm_index", "mlm_labels", "ids")}
    return {"pairs": pairs, "texts": texts}


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def by_hand(student, teacher, batch):
    """Each text by itself, through the tower that every other class reads texts by."""
    words, queries, keys = [], [], []
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        clean, masked = batch["input_ids"][row, :length], batch["masked_input_ids"][row, :length]
        seen = student.oner(input_ids=masked[None])
        logits = student.lm_head(seen.last_hidden_state[0])  # (T, V)
        hidden = (clean != masked).nonzero().flatten().tolist()
        words += [logits[place].log_softmax(0)[clean[place]] for place in hidden]
        queries.append(student.predictor(seen.pooler_output)[0])
        keys.append(teacher.oner(input_ids=clean[None]).pooler_output[0])
    cosines = unit(torch.stack(queries)) @ unit(torch.stack(keys)).T / student.config.temperature
    return {"text_mlm": -torch.stack(words).mean(), "text_nce": -cosines.log_softmax(1).diagonal().mean()}


def test_losses_of_texts_are_the_sums_by_hand():
    student, objective = build(ALL)
    given = batches()["texts"]
    taken = objective.portions["texts"].take(student, given, 0.5)
    expected = by_hand(student, objective.teacher.model, given)
    assert taken.parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(taken.parts[name], value.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(taken.loss, sum(expected.values()))


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step_has_the_gradients_of_both_portions(chunks):
    student, objective = build(ALL)
    given = batches()
    wanted = {name: torch.zeros_like(one) for name, one in student.named_parameters()}
    for name, portion in objective.portions.items():
        alone = copy.deepcopy(student)
        portion.take(alone, given[name], 0.5).loss.backward()
        for key, parameter in alone.named_parameters():
            wanted[key] += 0 if parameter.grad is None else parameter.grad
    forget_accelerator()
    taken = loss_and_gradients(Accelerator(cpu=True), objective, student, given, 0.5, dict.fromkeys(given, chunks))
    assert set(ALL) <= taken.parts.keys() and list(objective.portions) == ["pairs", "texts"]
    for name, parameter in student.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, wanted[name], rtol=1e-7, atol=1e-9, msg=name)
    # for who has no engine
    torch.testing.assert_close(objective(student, given, 0.5).parts, taken.parts)


def test_pairs_alone_are_what_they_were():
    student, objective = build(["itc", "mlm"])
    both, beside = build(["itc", "mlm", "text_mlm"])
    given = batches()
    assert list(objective.portions) == ["pairs"] and list(beside.portions) == ["pairs", "texts"]
    one, other = objective(student, given["pairs"], 0.5), beside.portions["pairs"].take(both, given["pairs"], 0.5)
    assert one.parts.keys() == other.parts.keys() == {"itc", "mlm"} and torch.equal(one.loss, other.loss)


def test_two_heads_read_texts_by_their_own():
    student, objective = build(["itc", "text_mlm", "text_nce"], two_heads=True)
    taken = objective(student, batches(), 0.5)
    taken.loss.backward()
    assert "text_nce" in taken.parts
    assert all(one.grad.abs().sum() > 0 for one in student.text_predictor.parameters() if one.ndim == 2)


def test_what_cannot_be_is_said():
    student = OneRForPreTraining(tiny_config())
    with pytest.raises(ValueError, match="all of unpaired texts; expected one of pairs beside them"):
        OneRObjective(student, OneRObjectiveArguments(losses=["text_mlm"]))
    given = batches()["texts"]
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"there are no pixel_values for \['mix'\]; expected only 'text'"):
        student(**text, representations=("text", "mix"), masked_streams=())


def test_a_run_reads_both_and_resumes_exactly(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet")
    (tmp_path / "texts.txt").write_text("a red apple and a dog\n" * 40, encoding="utf-8")
    portions = {
        "pairs": {"kind": "pairs", "train_data": [str(pairs)], "batch_size": 6},
        "texts": {
            "kind": "texts", "train_data": [str(tmp_path / "texts.txt")], "batch_size": 6, "text_column": None,
            "id_column": None,
        },
    }  # fmt: skip
    told = {"portions": json.dumps(portions), "losses": ALL, "max_steps": 4, "save_every_epochs": 0.01}
    told |= {"keep_checkpoints": 9, "tokenizer": ROOT / "examples" / "checkpoints" / "oner-emoji"}
    pretrain = load_example("pretrain")
    forget_accelerator()
    pretrain.main(tiny_arguments(pairs, tmp_path / "run", **told))
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(lines) == 4 and set(ALL) <= lines[-1].keys()

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run" / "checkpoint-00000002", again / "checkpoint-00000002")
    shutil.copy(tmp_path / "run" / "log.jsonl", again)
    forget_accelerator()
    pretrain.main([*tiny_arguments(pairs, again, **told), "--resume"])
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-00000004", again / "checkpoint-00000004")
    forget_accelerator()
