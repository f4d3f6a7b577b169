"""examples/finetune.py: each task trains on a tiny set in its official format, resumes exactly, exports, evaluates."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_finetuning import DATA, ONE_TOWER_ALONE, write_codis, write_momo, write_oner, write_simla
from tiny_pretraining import (
    ROOT,
    assert_same_checkpoint,
    evaluated,
    evaluation_of,
    forget_accelerator,
    load_example,
    read_log,
)
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from oner.processing.data.row_checks import PairDataError
from oner.processing.data.rows import PairRows
from oner.training.doctor.command import examine
from oner.training.doctor.reading import read_run
from oner.training.evaluation.results import read_results
from oner.training.objectives.objective import objective_classes
from oner.training.publishing.model_loading import load_model
from oner.training.run.parsing import read_config
from oner.training.tasks.finetuning import TASKS, build_evaluator, find_task

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    # the tiny model's vocabulary is of other texts, and a run says so
    pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning"),
]
# the authors' recipes; those for scenes are tried where these are made, test_scenes_tasks.py
CONFIGS = sorted((ROOT / "examples" / "configs").glob("finetune_*.yaml"))
CONFIGS = [path for path in CONFIGS if not path.stem.startswith("finetune_scenes_")]
TASKS_OF_TWO = [task for task in DATA if task not in ONE_TOWER_ALONE]


@pytest.fixture(scope="module")
def finetune():
    return load_example("finetune")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return write_simla(tmp_path_factory.mktemp("pretrained") / "model")


def line(task: str, pretrained: Path, output_dir: Path, told: dict, **overrides) -> list[str]:
    """A command line: four steps of four rows, at 24 pixels where the pretrained model read 16; with dropout."""
    fields = {
        "task": task,
        "initial_model": pretrained,
        "model_config": json.dumps({"image_size": 24}),
        "batch_size": 4,
        "max_steps": 4,
        "warmup_epochs": 0.5,
        "base_learning_rate": 0.05,
        "num_workers": 0,
        "mixed_precision": "no",
        "log_every": 1,
        "eval_every_epochs": 0,
        "save_every_epochs": 0.25,  # each task's sixteen rows are an epoch of four steps
        "keep_checkpoints": 9,
        "output_dir": output_dir,
        **told,
        **overrides,
    }
    return as_line(fields)


def as_line(fields: dict) -> list[str]:
    """--name value ..., None left out."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    return [str(part) for name, values in lists.items() if values != [None] for part in (f"--{name}", *values)]


@pytest.fixture(scope="module")
def momo(tmp_path_factory) -> Path:
    return write_momo(tmp_path_factory.mktemp("momo") / "model")


@pytest.fixture(scope="module")
def oner(tmp_path_factory) -> Path:
    return write_oner(tmp_path_factory.mktemp("oner") / "model")


@pytest.fixture(scope="module")
def runs(finetune, pretrained, tmp_path_factory):
    """task -> the folder of its data and of an undisturbed run, what its arguments are, and the run's numbers."""
    made = {}

    def run(task: str):
        if task not in made:
            forget_accelerator()
            folder = tmp_path_factory.mktemp(task)
            told = DATA[task](folder)
            made[task] = folder, told, finetune.main(line(task, pretrained, folder / "run", told))
        return made[task]

    return run


@pytest.mark.parametrize("task", TASKS_OF_TWO)
def test_it_trains_exports_and_evaluates(task, runs, pretrained):
    folder, told, metrics = runs(task)
    log = [entry for entry in read_log(folder / "run") if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(value == value and abs(value) < float("inf") for entry in log for value in entry.values())
    name = Path(str(told["eval_data"])).stem
    assert metrics and all(one.startswith(f"{name}/") for one in metrics)
    directory = folder / "run" / "model"
    before = load_file(pretrained / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    # learned positions are a table of the new size, and trained
    positions = "simla.vision.embeddings.position_embeddings"
    assert before[positions].shape[1] == 17 and after[positions].shape[1] == 37
    shared = [key for key in before if key in after and before[key].shape == after[key].shape]
    assert any(not torch.equal(before[key], after[key]) for key in shared)
    model = load_model(find_task(task).model, directory)  # with every weight: nothing is drawn
    assert model.config.image_size == model.config.position_image_size == 24
    assert AutoProcessor.from_pretrained(directory).image_processor.size["height"] == 24
    files = told["train_data"] if isinstance(told["train_data"], list) else [told["train_data"]]
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert all(file.name in card for file in files)


@pytest.mark.parametrize("task", TASKS_OF_TWO)
def test_the_doctor_reads_its_run(task, runs):
    """Log and checkpoint; four steps leave the teacher where it was, if there is one."""
    run = read_run(runs(task)[0] / "run")
    found, notes = examine(run.directory)
    assert ("teacher far behind" in [finding.name for finding in found]) is (run.distance is not None)
    assert notes == ["no sample is checked: rows of a task are not sampled"]


@pytest.mark.parametrize("task", TASKS_OF_TWO)
def test_it_resumes_exactly(task, runs, finetune, pretrained, tmp_path):
    folder, told, metrics = runs(task)
    shutil.copytree(folder / "run" / "checkpoint-00000002", tmp_path / "checkpoint-00000002")
    shutil.copy(folder / "run" / "log.jsonl", tmp_path)
    assert finetune.main([*line(task, pretrained, tmp_path, told), "--resume"]) == metrics
    for step in (3, 4):
        assert_same_checkpoint(folder / "run" / f"checkpoint-{step:08d}", tmp_path / f"checkpoint-{step:08d}")
    assert read_log(tmp_path) == read_log(folder / "run")


@pytest.mark.parametrize("task", TASKS_OF_TWO)
def test_evaluate_finds_what_the_run_found(task, runs, tmp_path, capsys):
    folder, told, metrics = runs(task)
    options = {name: value for name, value in told.items() if name not in ("train_data", "split", "queue_size")}
    options |= {"model": folder / "run" / "model", "data": options.pop("eval_data"), "device": "cpu"}
    options |= {"tasks": "rerank" if task == "retrieval" else task, "output": tmp_path}
    values = evaluated(as_line(options))
    assert values == pytest.approx(metrics, abs=1e-6)
    assert all(f"{name} " in capsys.readouterr().out for name in list(values)[:1])
    (results,) = read_results(tmp_path).values()
    assert results["values"] == values and results["protocol"]["split"] == Path(str(told["eval_data"])).stem


def test_evaluate_leaves_out_matching_where_there_is_none(pretrained, tmp_path, capsys):
    evaluate = load_example("evaluate")
    arguments = evaluation_of(as_line({"model": "x", "data": "y"}))
    rows = [{"id": 0, "image": "a.png"}, {"id": 0, "image": "b.png"}]
    assert "rerank" not in evaluate.chosen_tasks(arguments, "set", rows, None, torch.nn.Linear(1, 1))
    assert "set: no rerank, as Linear has no matching head" in capsys.readouterr().out
    model = load_model(AutoModelForZeroShotImageClassification, pretrained)
    assert "rerank" in evaluate.chosen_tasks(arguments, "set", rows, None, model)
    with pytest.raises(ValueError, match="vqa has a model of its own and is evaluated by itself"):
        evaluation_of(as_line({"model": "x", "data": "y", "tasks": ["vqa", "gap"]}))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_takes_two_steps(path, finetune, pretrained, momo, oner, tmp_path):
    said = read_config(path)
    pretrained = {"momo": momo, "oner": oner}.get(said["family"], pretrained)
    task, arguments = finetune.parse(["--config", str(path)])
    assert task.name == said["task"] and path.stem.startswith(f"finetune_{task.name}")
    flat = arguments.to_dict()
    assert {name: flat[name] for name in said} == said
    told = {**DATA[task.name](tmp_path), "initial_model": pretrained, "output_dir": tmp_path / "run", "max_steps": 2}
    told |= {"batch_size": 4, "num_workers": 0, "model_config": '{"image_size": 24}', "log_every": 1}
    metrics = finetune.main(as_line({"config": path, **told}))
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "loss" in entry] == [1, 2] and metrics
    rate = said["base_learning_rate"] * said["batch_size"] / 256
    assert rate == pytest.approx({"retrieval": 1e-5, "grounding": 1e-5}.get(task.name, 2e-5))  # the code's


def test_a_family_without_a_matching_head_is_fine_tuned_by_its_own_losses(finetune, oner, tmp_path):
    told = {**DATA["retrieval"](tmp_path), "losses": ["itc", "cmc"], "rerank_k": 0, "max_steps": 2}
    del told["queue_size"]
    metrics = finetune.main(line("retrieval", oner, tmp_path / "run", told))
    assert "dataset_coco/tr_r@1" in metrics and not any("rerank" in name for name in metrics)
    logged = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert {"itc", "cmc"} <= logged[-1].keys() and "itm" not in logged[-1]


def test_the_family_is_that_of_the_initial_model_unless_one_is_named(finetune, oner, momo, pretrained, tmp_path):
    file = tmp_path / "run.yaml"
    for family, model in (("oner", oner), ("momo", momo), ("simla", pretrained)):
        told = ["--task", "retrieval", "--train_data", "coco.json"]
        for name in ("--initial_model", "--initial-model"):
            _, arguments = finetune.parse([*told, name, str(model)])
            assert (arguments.model.family, arguments.model.initial_model) == (family, str(model))
            assert isinstance(arguments.objective, objective_classes(family)[1])
        file.write_text(f"task: retrieval\ninitial_model: {model}\n")
        assert finetune.parse(["--config", str(file), *told[2:]])[1].model.family == family
    # one that is named is taken as it is, of a run that is not there yet too
    file.write_text("family: oner\ninitial_model: runs/later/model\n")
    assert finetune.parse(["--config", str(file), *told])[1].model.family == "oner"
    assert finetune.parse(told)[1].model.family == "simla"


@pytest.fixture(scope="module")
def codis(tmp_path_factory) -> Path:
    return write_codis(tmp_path_factory.mktemp("codis") / "model")


@pytest.mark.parametrize("task", TASKS_OF_TWO)
def test_codis_is_fine_tuned_for_each_task(task, finetune, codis, tmp_path):
    told = {**DATA[task](tmp_path), "family": "codis", "max_steps": 2}
    metrics = finetune.main(line(task, codis, tmp_path / "run", told))
    assert metrics and all(value == value for value in metrics.values())
    model = load_model(find_task(task).model, tmp_path / "run" / "model")
    assert model.config.model_type == "codis"
    before, after = (load_file(path / "model.safetensors") for path in (codis, tmp_path / "run" / "model"))
    # a task of texts alone reaches no layer that reads an image
    name = f"codis.text.layers.{'0.attention' if task == 'glue' else '2.cross_attention'}.query.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("task", ["retrieval", "glue"])
def test_momo_is_fine_tuned_for_tasks_that_families_share(task, finetune, momo, tmp_path):
    """In both stages of retrieval, though the task masks nothing; and on texts alone."""
    told = {name: value for name, value in DATA[task](tmp_path).items() if name != "queue_size"}
    metrics = finetune.main(line(task, momo, tmp_path / "run", {**told, "family": "momo", "max_steps": 2}))
    assert metrics and all(value == value for value in metrics.values())
    before, after = (load_file(path / "model.safetensors") for path in (momo, tmp_path / "run" / "model"))
    name = "momo.layers.0.attention.qkv.weight"
    assert not torch.equal(before[name], after[name])
    if task == "retrieval":
        logged = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
        assert "dataset_coco/rerank_tr_r@1" in metrics and {"itc", "itm"} <= logged[-1].keys()
        assert not torch.equal(before["itm_head.weight"], after["itm_head.weight"])


def test_momo_answers_by_classes_that_its_model_names(finetune, momo, tmp_path):
    told = {**DATA["answers"](tmp_path), "family": "momo"}
    metrics = finetune.main(line("answers", momo, tmp_path / "run", told))
    assert 0 <= metrics["val2014_questions/accuracy"] <= 1
    directory = tmp_path / "run" / "model"
    model = load_model(find_task("answers").model, directory)
    classes = json.loads(told["answer_list"].read_text(encoding="utf-8"))
    assert [model.config.id2label[place] for place in range(model.config.num_labels)] == classes
    # and the model answers by its pipeline
    answer = pipeline("image-question-answering", model=str(directory))
    said = answer(Image.new("RGB", (32, 32)), question="is it the", top_k=len(classes))
    assert {one["answer"] for one in said} == set(classes) and said == sorted(said, key=lambda one: -one["score"])
    assert answer(Image.new("RGB", (32, 32)), question="is it the", candidates=classes[:2], top_k=1) == [
        next(one for one in said if one["answer"] in classes[:2])
    ]
    with pytest.raises(ValueError, match=rf"\['a unicorn'\] are none of the {len(classes)} answers that the model kn"):
        answer(Image.new("RGB", (32, 32)), question="is it the", candidates=["a unicorn"])
    assert "image-question-answering" in (directory / "README.md").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "answers" / "val2014_questions.answers.json").read_text(encoding="utf-8"))
    assert len(written) == 6 and {one["answer"] for one in written} <= set(classes)
    options = {name: value for name, value in told.items() if name not in ("train_data", "family", "answer_folder")}
    options |= {"model": directory, "data": options.pop("eval_data"), "device": "cpu", "tasks": "answers"}
    assert evaluated(as_line({**options, "output": tmp_path / "out"})) == pytest.approx(metrics, abs=1e-6)


def test_oner_learns_composed_queries_and_resumes_exactly(finetune, oner, tmp_path):
    told = {**DATA["cir"](tmp_path), "family": "oner"}
    metrics = finetune.main(line("cir", oner, tmp_path / "run", told))
    assert {"cap.dev/composed_both_r@1", "cap.dev/composed_sum_r@1"} <= metrics.keys()
    logged = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert all(entry["composed"] == entry["loss"] for entry in logged)
    # stopped in the middle
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run" / "checkpoint-00000002", again / "checkpoint-00000002")
    shutil.copy(tmp_path / "run" / "log.jsonl", again)
    assert finetune.main([*line("cir", oner, again, told), "--resume"]) == metrics
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-00000004", again / "checkpoint-00000004")
    # evaluated by itself; and what is left retrieves
    options = {name: value for name, value in told.items() if name not in ("train_data", "family")}
    options |= {"model": tmp_path / "run" / "model", "data": options.pop("eval_data"), "device": "cpu"}
    found = evaluated(as_line({**options, "tasks": "cir", "output": tmp_path / "out"}))
    assert found == pytest.approx(metrics, abs=1e-6)
    assert load_model(AutoModelForZeroShotImageClassification, tmp_path / "run" / "model").config.image_size == 24


def test_who_answers_how_is_said(finetune, momo, pretrained, tmp_path):
    told = DATA["answers"](tmp_path)
    with pytest.raises(ValueError, match="QuestionAnswering does not generate answers; expected --task answers"):
        finetune.main(line("vqa", momo, tmp_path / "run", {**told, "family": "momo"}))
    with pytest.raises(ValueError, match="'simla' has no model that classifies answers .*--task vqa.*expected momo"):
        finetune.main(line("answers", pretrained, tmp_path / "run", told))
    with pytest.raises(ValueError, match="expected answer_list, a JSON list of them, got none"):
        finetune.main(line("answers", momo, tmp_path / "run", {**told, "family": "momo", "answer_list": None}))


def test_every_task_of_the_table_is_tried():
    assert DATA.keys() == TASKS.keys() == {path.stem.split("_")[1] for path in CONFIGS}


def test_what_is_missing_is_said(finetune, pretrained, tmp_path):
    told = DATA["retrieval"](tmp_path)
    whole = line("retrieval", pretrained, tmp_path / "run", told)
    with pytest.raises(ValueError, match=f"no task given; expected --task, .* in the file: {', '.join(TASKS)}"):
        finetune.main(whole[2:])
    with pytest.raises(ValueError, match="fine-tuning starts from a pretrained model directory"):
        finetune.main(line("retrieval", pretrained, tmp_path / "run", {**told, "initial_model": None}))
    options = {"streaming": True, "data_weights": [1.0], "eval_captions": "first"}
    with pytest.raises(ValueError, match=f"for retrieval does not read {', '.join(options)}; leave them out"):
        finetune.main(line("retrieval", pretrained, tmp_path / "run", {**told, **options}))
    with pytest.raises(ValueError, match="for vqa does not read data_revision"):
        finetune.main(line("vqa", pretrained, tmp_path / "run", {**DATA["vqa"](tmp_path), "data_revision": "abc"}))
    with pytest.raises(ValueError, match=f"unknown task 'cooking'; expected one of {', '.join(TASKS)}"):
        find_task("cooking")


@pytest.mark.parametrize("task", sorted(DATA.keys() - {"glue"}))
def test_a_picture_to_evaluate_on_that_cannot_be_read_is_named_before_a_step(task, finetune, tmp_path):
    family = {"answers": "momo", "cir": "oner"}.get(task, "simla")
    entry, arguments = finetune.parse(line(task, tmp_path, tmp_path / "run", DATA[task](tmp_path), family=family))
    source = arguments.run.eval_data[0]
    rows = entry.open_rows([source], arguments.objective, arguments.data, False)
    last = getattr(rows, "pictures", ("image",))[-1]
    before = rows.digest() if isinstance(rows, PairRows) else None
    Path(rows[1][last]).write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    # a run that is resumed is told that its pictures have changed
    assert before is None or rows.digest() != before
    with pytest.raises(PairDataError, match=r"rows cannot be used(?s:.*)row 1: cannot read"):
        build_evaluator(entry, source, arguments.objective, arguments.data)


def test_a_file_may_name_the_task(finetune, pretrained, tmp_path):
    (tmp_path / "run.yaml").write_text("task: retrieval\ntrain_data: [x.json]\nrerank_k: 7\nfamily: simla\n")
    task, arguments = finetune.parse(["--config", str(tmp_path / "run.yaml"), "--queue_size", "32"])
    assert task.name == arguments.objective.task == "retrieval"
    assert (arguments.objective.rerank_k, arguments.objective.queue_size) == (7, 32)
    assert arguments.objective.losses == ["itc", "itm"] and arguments.objective.match_ids
