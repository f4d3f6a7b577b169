"""`oner suite`: one command measures model directories of any family and leaves a table and JSON files."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_finetuning import write_pretrained, write_simla
from tiny_pretraining import ROOT

from oner import OneRForPreTraining
from oner.training.evaluation.results import read_results
from oner.training.evaluation.suite import model_name, table
from oner.training.evaluation.suite_tasks import QUICK, SUITE, Chosen
from oner_command_line import main

pytest.importorskip("sklearn")
DATA = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    oner = write_pretrained(folder / "tiny-oner", OneRForPreTraining, projection_hidden_size=16)
    return [oner, write_simla(folder / "run" / "model")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small part of examples/data."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "test_concept", "test_style"):
        rows = pq.read_table(DATA / "emoji" / f"{name}.parquet")
        (folder / "emoji").mkdir(exist_ok=True)
        pq.write_table(rows.take(list(range(0, len(rows), len(rows) // 40))), folder / "emoji" / f"{name}.parquet")
    for task in ("supersense", "hypernym"):
        for part in ("train", "dev"):
            (folder / "glosses" / task).mkdir(parents=True, exist_ok=True)
            lines = (DATA / "glosses" / task / f"{part}.tsv").read_text(encoding="utf-8").splitlines(True)
            (folder / "glosses" / task / f"{part}.tsv").write_text("".join(lines[:41]), encoding="utf-8")
    return folder


def test_one_command_measures_models_of_two_families(models, data, tmp_path, capsys):
    told = ["--data", str(data), "--limit", "24", "--seeds", "0", "1", "--output", str(tmp_path)]
    assert main(["suite", *map(str, models), *told]) == 0
    text = (tmp_path / "results" / "suite.md").read_text(encoding="utf-8")
    assert all(f"| {task} | {model} |" in text for task in QUICK for model in ("tiny-oner", "run"))
    assert capsys.readouterr().out.rstrip().endswith(text.split("\n\n", 2)[2].rstrip())
    kept = json.loads((tmp_path / "results" / "suite_table.json").read_text(encoding="utf-8"))
    # each model's own, with what it takes to obtain a number again
    for directory, name in zip(models, ("tiny-oner", "run"), strict=True):
        results = read_results(tmp_path / name)
        assert results.keys() == {f"suite.{task}" for task in QUICK}
        content = results["suite.digits"]
        assert content["values"] == kept["models"][name]["digits"] and content["checkpoint"]["sha256"]
        of_seeds = [content["protocol"]["by_seed"][seed]["logistic_accuracy"] for seed in ("0", "1")]
        assert content["values"]["logistic_accuracy"] == pytest.approx(np.mean(of_seeds))
        assert content["values"]["logistic_accuracy_sd"] == pytest.approx(np.std(of_seeds, ddof=1))
        # the strength is chosen on rows that each seed holds out; neighbours and chance know no seed
        strengths = [content["protocol"]["by_seed"][seed]["logistic_strength"] for seed in ("0", "1")]
        assert content["values"]["logistic_strength_sd"] == pytest.approx(np.std(strengths, ddof=1))
        assert not {"knn_accuracy_sd", "chance_sd"} & content["values"].keys()
        assert (content["values"]["train_rows"], content["values"]["test_rows"]) == (24, 24)
        four = [results["suite.emoji_retrieval"]["values"][one] for one in ("tr_r@1", "tr_r@5", "ir_r@1", "ir_r@5")]
        assert results["suite.emoji_retrieval"]["values"]["r_mean"] == pytest.approx(np.mean(four))
        assert str(directory) not in json.dumps(content)


def test_data_of_ones_own_and_maes_probe(models, data, tmp_path):
    style = str(data / "emoji" / "test_style.parquet")
    glosses = data / "glosses" / "hypernym"
    told = ["--images", "groups", str(data / "emoji" / "train.parquet"), style, "group", "--pairs", "pairs", style]
    told += ["--texts", "above", "rte", str(glosses / "train.tsv"), str(glosses / "dev.tsv"), "--pool", "mean"]
    told += ["--linear", "--linear_epochs", "2", "--limit", "20", "--seeds", "5"]
    assert main(["suite", str(models[1]), *told, "--output", str(tmp_path)]) == 0
    results = read_results(tmp_path / "run")
    assert results.keys() == {"suite.groups", "suite.above", "suite.pairs"}
    assert {"linear_accuracy", "linear_mean_recall"} <= results["suite.groups"]["values"].keys()
    assert results["suite.groups"]["protocol"]["pool"] == "mean"
    assert "logistic_accuracy_sd" not in results["suite.groups"]["values"]  # of one seed
    assert "MAE's probe" in (tmp_path / "results" / "suite.md").read_text(encoding="utf-8")


def test_a_limit_draws_the_same_rows_each_time():
    rows = [{"label": number} for number in range(100)]
    assert Chosen(rows, 10).labels() == Chosen(rows, 10).labels() != list(range(10))
    assert Chosen(rows).labels() == Chosen(rows, 100).labels() == list(range(100))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--tasks", "cooking"], "unknown task 'cooking'; expected one of quick, table3, emoji_groups"),
        (["--data", "nowhere"], "nowhere/emoji/train.parquet: no such file; expected examples/data"),
        (["--tasks", "food101"], "food101: torchvision finds no official files in data"),
        (["--pool", "max"], "--pool is 'max'; expected one of cls, mean"),
        (["--tassk", "digits"], "unknown arguments ['--tassk', 'digits']; did you mean --tasks?"),
        (["--texts", "x", "stsb", "a.tsv", "b.tsv"], "a.tsv: cannot be read"),
        *(
            (["--tasks", *tasks, "--images", own, "a", "b", "label"], f"several sets would share the name {own}, and")
            for tasks, own in ((["digits"], "digits"), (["quick"], "digits"), (["quick", "table3"], "food101"))
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(told, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["suite", "no/model", *told]) == 2
    assert f"oner suite: {message}" in capsys.readouterr().err


def test_the_table():
    probed = {"logistic_accuracy": 0.5, "logistic_accuracy_sd": 0.012, "knn_accuracy": 0.25, "chance": 0.1}
    found = {"b": {"digits": probed, "pairs": {"tr_r@1": 0.125, "r_mean": 0.5}}, "a": {"digits": {"chance": 0.2}}}
    assert table(found).splitlines() == [
        "| task | model | logistic regression | kNN | chance |",
        "|---|---|---|---|---|",
        "| digits | a |  |  | 20.0 |",
        "| digits | b | 50.0 ± 1.2 | 25.0 | 10.0 |",
        "",
        "| task | model | TR@1 | mean of the four |",
        "|---|---|---|---|",
        "| pairs | b | 12.5 | 50.0 |",
    ]
    assert [model_name(one) for one in ("runs/mine/model", "a/b/", "org/name")] == ["mine", "b", "name"]


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["suite", "--help"])
    told = capsys.readouterr().out
    assert all(task in told for task in [*SUITE, "quick", "table3"])
