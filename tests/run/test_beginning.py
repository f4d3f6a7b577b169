"""A run that begins with a teacher and queues that lie beside its model, as `oner convert` leaves them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_finetuning import DATA, ONE_TOWER_ALONE, write_simla
from tiny_pretraining import load_example, tiny_arguments
from transformers import AutoModelForPreTraining

from oner.training.conversion.checkpoints import resize_position_table
from oner.training.objectives.objective import build_objective
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments
from oner.training.run.beginning import begin_objective, objective_file
from oner.training.run.building import build_model, build_processor_and_config
from oner.training.run.checkpoint import load_checkpoint
from oner.training.run.parsing import parse_arguments
from oner.training.tasks.finetuning import load_task_model, task_objective

QUEUE = 20
POSITIONS = "simla.vision.embeddings.position_embeddings"
# tasks of SIMLA whose objective has a teacher, and of these those with queues
TAUGHT = sorted(DATA.keys() - {*ONE_TOWER_ALONE, "assignment", "glue"})
QUEUED = {"retrieval", "grounding"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A model, and another beside it as its teacher, whose every weight differs."""
    directory = write_simla(tmp_path_factory.mktemp("pretrained") / "model")
    torch.manual_seed(5)
    objective = SimlaObjective(
        AutoModelForPreTraining.from_pretrained(directory), SimlaObjectiveArguments(queue_size=QUEUE)
    )
    for value in objective.teacher.model.parameters():
        value.add_(torch.randn_like(value) * 0.05)
    objective.queue.push({name: torch.randn(3, 8) for name in ("image", "text")}, torch.arange(3))
    # a file of tensors that share no memory
    save_file(
        {name: value.clone() for name, value in objective.state_dict().items()}, directory / "objective.safetensors"
    )
    return directory


def teacher_of(directory: Path) -> dict[str, torch.Tensor]:
    given = load_file(directory / "objective.safetensors")
    return {name.removeprefix("teacher."): value for name, value in given.items() if name.startswith("teacher.")}


def begun_task(task: str, pretrained: Path, *further: str):
    line = ["--task", task, "--initial_model", str(pretrained), "--train_data", "x.json", "--output_dir", "out"]
    if task in QUEUED:
        line += ["--queue_size", str(QUEUE)]
    found, arguments = load_example("finetune").parse([*line, "--model_config", '{"image_size": 24}', *further])
    _, config = build_processor_and_config(arguments, {})
    student = load_task_model(found, arguments, config)
    objective = task_objective(found, student, arguments.objective)
    begin_objective(objective, arguments, partial(load_task_model, found, config=config))
    return student, objective


@pytest.mark.parametrize("task", TAUGHT)
def test_a_task_begins_with_the_teacher_of_its_model(task, pretrained):
    """Its tower as it is, its positions resized, its decoder from its own tower, a drawn head as the student's."""
    student, objective = begun_task(task, pretrained)
    taught, ours = objective.teacher.model.state_dict(), student.state_dict()
    given = teacher_of(pretrained)
    for name, value in taught.items():
        if name == POSITIONS:
            torch.testing.assert_close(value, resize_position_table(given[name], 6), rtol=0, atol=1e-6)
        elif name in given:
            assert torch.equal(value, given[name]) and not torch.equal(value, ours[name]), name
        elif name.startswith(("decoder.", "second_layers.")):
            assert not torch.equal(value, ours[name]), name
        else:
            assert name.startswith("classifier.") and torch.equal(value, ours[name]), name
    if task == "vqa":
        words, layer = "embeddings.word_embeddings.weight", "layers.0.attention.query.weight"
        assert torch.equal(taught[f"decoder.{words}"], given[f"simla.text.{words}"])
        assert torch.equal(taught[f"decoder.{layer}"], given["simla.text.layers.1.attention.query.weight"])
        assert torch.equal(taught["decoder.lm_head.dense.weight"], given["lm_head.dense.weight"])
    if task == "nlvr2":
        kind = "attention.query.weight"
        assert torch.equal(taught[f"second_layers.0.{kind}"], given[f"simla.text.layers.1.{kind}"])


@pytest.mark.parametrize("task", sorted(QUEUED))
def test_a_task_begins_with_the_queues(task, pretrained):
    _, objective = begun_task(task, pretrained)
    given = load_file(pretrained / "objective.safetensors")
    assert all(torch.equal(value, given[f"queue.{name}"]) for name, value in objective.queue.state_dict().items())
    assert objective.queue.pointer.tolist() == [3]


def test_what_is_taken_and_what_is_left_is_said(pretrained, caplog):
    begun_task("entailment", pretrained)
    given = load_file(pretrained / "objective.safetensors")
    assert "tensors of" in caplog.text and "left over: [" in caplog.text
    left = [name for name in given if f"'{name}'" in caplog.text]
    assert "queue.image" in left and "teacher.lm_head.dense.weight" in left
    assert not any(name.startswith("teacher.simla.text.layers.") for name in left)


def test_none_begins_with_a_copy(pretrained):
    student, objective = begun_task("entailment", pretrained, "--initial_objective", "none")
    ours = student.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in objective.teacher.model.state_dict().items())


def test_a_queue_of_another_size_is_refused_with_both_sizes(pretrained):
    message = rf"safetensors belongs to another run.*\({QUEUE}, 8\), expected \(21, 8\).*initial_objective none"
    with pytest.raises(ValueError, match=message):
        begun_task("retrieval", pretrained, "--queue_size", "21")


def test_a_damaged_file_and_another_models_are_refused(pretrained, tmp_path):
    given = load_file(pretrained / "objective.safetensors")
    name = "teacher.simla.vision.norm.bias"
    save_file({**given, name: given[name] * float("nan")}, tmp_path / "objective.safetensors")
    with pytest.raises(ValueError, match="objective.safetensors: 1 damaged weights.*simla.vision.norm.bias': 'NaN'"):
        begun_task("entailment", pretrained, "--initial_objective", str(tmp_path))
    foreign = {f"teacher.oner.{name}": value for name, value in teacher_of(pretrained).items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign.* contains no teacher of .*which has no .'oner.concept_head"):
        begun_task("entailment", pretrained, "--initial_objective", str(tmp_path / "foreign.safetensors"))


def test_a_file_without_a_model_is_refused():
    model = parse_arguments(["--family", "oner", "--train_data", "x", "--initial_objective", "a.safetensors"]).model
    with pytest.raises(ValueError, match="'a.safetensors', the teacher of a model; expected initial_model too"):
        objective_file(model)


@pytest.mark.filterwarnings("ignore:the tokenizer of")  # which was trained on other captions
def test_pretraining_goes_on_with_them(pretrained, pairs, example, fresh_accelerator, tmp_path):
    """By the program: the state of its first checkpoint has followed the given teacher, and its queue went on."""
    told = {"initial_model": pretrained, "queue_size": QUEUE, "max_steps": 1, "losses": ["itc", "mlm"]}
    told |= {"model_config": {}, "size": None, "vocab_size": None, "code_crop": None, "image_tokenizer": None}
    line = tiny_arguments(pairs, tmp_path, "simla", **told, save_every_epochs=0.2, keep_checkpoints=5)
    del line[line.index("--model_config") : line.index("--model_config") + 2]
    example.main(line)
    state = load_checkpoint(tmp_path / "checkpoint-00000001")[0]["objective"]
    given = load_file(pretrained / "objective.safetensors")
    before = load_file(pretrained / "model.safetensors")
    momentum = SimlaObjectiveArguments().ema_momentum
    name = "simla.vision.norm.weight"
    expected = momentum * given[f"teacher.{name}"] + (1 - momentum) * before[name]
    torch.testing.assert_close(state[f"teacher.{name}"], expected, rtol=0, atol=1e-6)
    assert state["queue.pointer"].tolist() == [3 + 8]
    assert torch.equal(state["queue.image"][:3], given["queue.image"][:3])
    arguments = parse_arguments(line)
    _, config = build_processor_and_config(arguments, {})
    objective = build_objective("simla", build_model(arguments, config), arguments.objective)
    begin_objective(objective, arguments, partial(build_model, config=config))
    assert torch.equal(objective.teacher.model.state_dict()[name], given[f"teacher.{name}"])
