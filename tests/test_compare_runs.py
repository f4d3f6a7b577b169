"""tests/reliability/compare_runs.py: what it calls equal, what it refuses, and that its options are still known."""

import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_pretraining import ROOT, load_example

from oner.training.objectives.dvae import DiscreteVAEObjectiveArguments
from oner.training.run.parsing import parse_arguments

VALUES = {"1": {"loss": 0.1, "itc": 0.5}, "2": {"loss": 0.3, "itc": 0.25, "set/r@1": 1.0}}


@pytest.fixture(scope="module")
def compare_runs():
    """The script as a module; it imports its neighbour by name."""
    path = ROOT / "tests" / "reliability" / "compare_runs.py"
    spec = importlib.util.spec_from_file_location("compare_runs", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.parent))


def changed(step: str, **values: float) -> dict[str, dict[str, float]]:
    return {**VALUES, step: {**VALUES[step], **values}}


def test_one_bit_is_a_difference(compare_runs):
    one_bit_more = 0.30000000000000004
    assert compare_runs.compare_values(VALUES, json.loads(json.dumps(VALUES))) == (0.0, "", set())
    gap, where, _ = compare_runs.compare_values(VALUES, changed("2", loss=one_bit_more))
    assert 0 < gap < 2e-16 and where == "from step 2, loss"
    later = {**changed("1", itc=0.25), "2": {**VALUES["2"], "loss": 0.9}}
    assert compare_runs.compare_values(VALUES, later)[:2] == (pytest.approx(2 / 3), "from step 1, itc")
    assert compare_runs.difference(0.0, -0.0) == 0 and compare_runs.difference(float("nan"), float("nan")) == 0
    assert compare_runs.difference(float("nan"), 1.0) == float("inf")
    assert compare_runs.difference(1.0, 1.1) == pytest.approx(0.1 / 1.1)


def test_a_value_that_one_of_the_two_has_alone_is_named(compare_runs):
    found = {"1": {"loss": 0.1, "contrast": 0.5}, "2": VALUES["2"]}
    assert compare_runs.compare_values(VALUES, found) == (0.0, "", {"itc", "contrast"})
    with pytest.raises(ValueError, match="no loss at step 1"):
        compare_runs.compare_values(VALUES, {**VALUES, "1": {"itc": 0.5}})
    with pytest.raises(ValueError, match=r"the steps are \['1'\]; expected \['1', '2'\]"):
        compare_runs.compare_values(VALUES, {"1": VALUES["1"]})


def test_weights_are_equal_whatever_they_are_called(compare_runs, tmp_path):
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    written = {
        "recorded": weights,
        "renamed": {f"model.{name}": value for name, value in weights.items()},
        "other": {**weights, "a": weights["a"] + torch.tensor([0.0, 0, 0, 0.3])},
        "reshaped": {**weights, "b": torch.ones(4)},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in written}
    for name, path in paths.items():
        save_file(written[name], path)
    found = {name: compare_runs.compare_weights(paths["recorded"], path) for name, path in paths.items()}
    assert found["recorded"] == found["renamed"] == (0.0, "")
    assert found["other"] == (pytest.approx(0.1), "a")
    assert found["reshaped"] == (float("inf"), "b")


def test_its_end_says_whether_they_are_equal(compare_runs, tmp_path, monkeypatch, capsys):
    """Runs that are made up: the second tree logs another loss."""
    result = {"values": VALUES, "weights": {"a": torch.ones(2)}}

    def run(name, tree, data, output):
        (output / "model").mkdir(parents=True)
        values = changed("2", loss=0.3001) if tree.name == "other" else VALUES
        lines = [{"step": int(step), "pairs_per_second": 3.0, **logged} for step, logged in values.items()]
        (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_file(result["weights"], output / "model" / "model.safetensors")

    monkeypatch.setattr(compare_runs, "run", run)
    (tmp_path / "recording" / "data").mkdir(parents=True)
    for tree in ("first", "other"):
        (tmp_path / tree).mkdir()
    told = [str(tmp_path / "recording"), "--runs", "oner,vqa", "--tree"]
    compare_runs.main(["record", *told, str(tmp_path / "first")])
    recorded = json.loads((tmp_path / "recording" / "recorded.json").read_text())
    assert recorded["runs"]["vqa"]["values"] == VALUES and recorded["runs"].keys() == {"oner", "vqa"}
    compare_runs.main(["compare", *told, str(tmp_path / "first")])
    assert capsys.readouterr().out.count("equal to the bit") == 4
    with pytest.raises(SystemExit) as caught:
        compare_runs.main(["compare", *told, str(tmp_path / "other")])
    assert caught.value.code == 1 and "3.3e-04 (from step 2, loss)" in capsys.readouterr().out
    compare_runs.main(["compare", *told, str(tmp_path / "other"), "--tolerance", "1e-3"])
    with pytest.raises(SystemExit, match="holds no recording of nlvr2; it has oner, vqa"):
        compare_runs.main(["compare", str(tmp_path / "recording"), "--runs", "nlvr2"])


def test_its_options_are_known_and_its_sets_can_be_read(compare_runs, tmp_path):
    compare_runs.write_sets(ROOT, tmp_path / "data")
    finetune = load_example("finetune")
    for name, (script, options) in compare_runs.RUNS.items():
        path = tmp_path / f"{name}.yaml"
        options = compare_runs.filled(options, data=tmp_path / "data", tree=ROOT)
        path.write_text(compare_runs.yaml.safe_dump(options))
        if script == compare_runs.FINETUNE:
            arguments = finetune.parse(["--config", str(path)])[1]
        else:
            kind = DiscreteVAEObjectiveArguments if name == "tokenizer" else None
            arguments = parse_arguments(["--config", str(path)], kind)
        flat = arguments.to_dict()
        assert {key: flat[key] for key in options} == options
        for source in [*flat["train_data"], *flat["eval_data"]]:
            assert (tmp_path / "data" / source).is_file()


@pytest.mark.slow
def test_a_run_is_recorded_and_found_again(compare_runs, tmp_path, capsys):
    compare_runs.main(["record", str(tmp_path), "--runs", "tokenizer"])
    compare_runs.main(["compare", str(tmp_path), "--runs", "tokenizer"])
    assert capsys.readouterr().out.count("equal to the bit") == 2
