"""What a run publishes: refused before its first step if it cannot be, mended on resume, with all it came from."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_pretraining import read_log, tiny_arguments

from oner.training.publishing.hub import STORED_DTYPES, check_stored_dtype, export_model
from oner.training.publishing.origins import PROVENANCE, read_origins
from oner.training.run.arguments import RunArguments, hints_of
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import prepare_publication

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
HOME = "/home/alice/secret-project"


@pytest.fixture(scope="module")
def parent(example, pairs, tmp_path_factory):
    """A run of two steps, with terms and makers, whose arguments name places of this machine."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "MAKERS.md").write_text("Alice drew the apples.")
    example.main(
        tiny_arguments(
            pairs, folder / "apples", max_steps=2, attribution=folder / "MAKERS.md", data_licence="GPL-3.0",
            licence="gpl-3.0", repo_id="org/apples",
        )
    )  # fmt: skip
    return folder / "apples" / "model"


@pytest.mark.parametrize("name", ["int8", "uint8", "bool", "complex64", "fp16", "float8_e4m3fn", "nn", ""])
def test_weights_are_stored_as_floats_that_load(name, pairs, tmp_path, capsys):
    """Integers would be zeros, and other attributes of torch an error after the last step."""
    with pytest.raises(SystemExit):
        parse_arguments(tiny_arguments(pairs, tmp_path, export_dtype=name))
    assert "export_dtype" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(json.dumps({"export_dtype": name}))
    with pytest.raises(ValueError, match="export_dtype is .* expected 'float32' or 'bfloat16'"):
        parse_arguments(["--config", str(tmp_path / "run.yaml"), *tiny_arguments(pairs, tmp_path)])
    with pytest.raises(ValueError, match="cannot be stored as .* expected a floating-point type of torch: float32"):
        check_stored_dtype(getattr(torch, name, name))


def test_every_precision_that_a_run_may_name_is_one_of_those():
    names = hints_of(RunArguments)["export_dtype"].__args__
    assert [getattr(torch, name) for name in names] == list(STORED_DTYPES)
    check_stored_dtype(None)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attribution": "ATTRIBUTON.md"}, ValueError, "attribution is ATTRIBUTON.md, which cannot be read"),
        ({"attribution": "README.md"}, ValueError, "expected a name that model directories do not use"),
        ({"repo_id": "a b"}, ValueError, "repo_id is 'a b'; expected `name` or `owner/name`"),
        ({"eval_data": ["a/test.csv", "b/test.parquet"]}, ValueError, r"several sets called \['test'\]"),
        ({"output_dir": "used"}, FileExistsError, "used/model holds something else than an exported model"),
        ({"initial_model": "runs/stage/1/model"}, ValueError, "runs/stage/1/model: no such model"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_start(example, pairs, tmp_path, monkeypatch, options, error, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used" / "model").mkdir(parents=True)
    (tmp_path / "used" / "model" / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("")
    options = {"output_dir": "run", **options}
    with pytest.raises(error, match=match):
        example.main(tiny_arguments(pairs, **options))
    assert not (tmp_path / options["output_dir"] / "log.jsonl").exists(), "a step was taken"
    assert (tmp_path / "used" / "model" / "notes.txt").read_text() == "mine"


def test_what_is_published_may_change_on_resume(example, pairs, parent, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(parent.parent, run)
    (run / "model" / "notes.txt").write_text("mine")
    (run / "model" / "README.md").write_text("by hand")
    (run / ".model-abcdefgh.partial").mkdir()
    before = read_log(run)
    example.main([*tiny_arguments(pairs, run, max_steps=2, export_dtype="float16", repo_id="fruit"), "--resume"])
    assert read_log(run) == before
    weights = load_file(run / "model" / "model.safetensors")
    full = load_file(parent / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if full[name].ndim > 1} == {torch.float16}
    assert all(value.any() for name, value in weights.items() if full[name].any())
    assert ModelCard.load(run / "model" / "README.md", ignore_metadata_errors=True).text.startswith("\n# fruit\n")

    # what users laid there, and what they changed
    assert (run / "model" / "notes.txt").read_text() == "mine"
    assert [path.read_text() for path in (run / "model" / "previous").iterdir()] == ["by hand"]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_nothing_published_names_the_machine(parent, pairs):
    """The run was told absolute paths of its data, its output and its makers."""
    assert pairs.is_absolute()
    for path in parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in {str(pairs.parent), str(parent.parents[1]), os.path.expanduser("~") + "/"}:
                assert place.encode() not in content, path
    config = json.loads((parent / "results" / "training_config.json").read_text())
    assert config["train_data"] == [pairs.name] and config["output_dir"] == "apples"


def test_a_card_has_its_repository_s_name_and_the_licence_it_was_told(parent):
    card = ModelCard.load(parent / "README.md", ignore_metadata_errors=True)
    assert card.data.license == "gpl-3.0" and card.text.startswith("\n# apples\n")
    assert '`MODEL = "org/apples"`' in card.text and "GPL-3.0" in card.text and "MAKERS.md" in card.text
    assert (parent / "MAKERS.md").read_text() == "Alice drew the apples."


def test_a_model_trained_from_another_inherits_data_makers_and_base_model(example, pairs, parent, tmp_path):
    """And so does one that is trained from that."""
    (tmp_path / "MAKERS.md").write_text("Bob drew the pears.")
    pears = tmp_path / "pears.parquet"
    shutil.copy(pairs, pears)
    options = {"max_steps": 1, "size": None, "vocab_size": None}
    example.main(
        tiny_arguments(pears, tmp_path / "child", initial_model=parent, attribution=tmp_path / "MAKERS.md", **options)
    )
    child = tmp_path / "child" / "model"
    example.main(tiny_arguments(pears, tmp_path / "grandchild", initial_model=child, **options))
    card = ModelCard.load(tmp_path / "grandchild" / "model" / "README.md", ignore_metadata_errors=True)
    assert card.data.base_model == ["child"] and card.data.license is None and "# grandchild\n" in card.text
    told = json.loads((tmp_path / "grandchild" / "model" / PROVENANCE).read_text())
    assert told["data"] == [
        {"name": "pears.parquet"},
        {"name": "pears.parquet", "attribution": "MAKERS.md", "by": "child"},
        {"name": pairs.name, "licence": "GPL-3.0", "attribution": "apples-MAKERS.md", "by": "org/apples"},
    ]
    for file, words in {"MAKERS.md": "Bob drew the pears.", "apples-MAKERS.md": "Alice drew the apples."}.items():
        assert (tmp_path / "grandchild" / "model" / file).read_text() == words and file in card.text


def test_origins_of_models_without_a_record(root, tmp_path):
    """Directories from before there was one, single files, and names on a Hub that is out of reach."""
    (tmp_path / "deit.pth").write_bytes(b"")
    (tmp_path / "runs" / "old" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "model" / "ATTRIBUTION.md").write_text("Carol")
    origins = read_origins([tmp_path / "deit.pth", tmp_path / "runs" / "old" / "model", "org/nowhere"])
    assert origins.models == ("deit.pth", "old", "org/nowhere") and origins.makers == {"ATTRIBUTION.md": b"Carol"}
    assert [entry["name"] for entry in origins.data] == [
        "what old was trained on", "what org/nowhere was trained on",
    ]  # fmt: skip


def test_publication_of_several_portions_takes_each_file_of_makers(pairs, tmp_path):
    for name in ("A.md", "B.md"):
        (tmp_path / name).write_text(name)
    portions = {name: {"attribution": str(tmp_path / f"{name}.md")} for name in ("A", "B")}
    arguments = parse_arguments(tiny_arguments(pairs, tmp_path / "run", portions=json.dumps(portions)))
    assert prepare_publication(arguments).origins.makers == {"A.md": b"A.md", "B.md": b"B.md"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-9])
def test_weights_that_would_be_lost_are_not_published(family, value, tmp_path):
    model = family.build("AutoModelForPreTraining")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(value)
    with pytest.raises((ValueError, OverflowError), match=r"NaN or infinite|too large for|all 0 in"):
        export_model(model, None, tmp_path / "model", dtype=torch.float16)
    assert not any(tmp_path.iterdir())
