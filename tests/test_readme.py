"""README.md and docs/ambiguities.md keep their word: snippets run, commands, paths and fields exist.

An HTML comment above a block, which a rendered README does not show, says what becomes of it here:

    (none)                          python: run, in one namespace from the top of the README to its end
    <!-- test: run ARGUMENTS -->    bash: every command is run, with ARGUMENTS behind it
    <!-- test: check -->            bash: programs, files, targets, extras and arguments of each command exist;
                                    python, of models that only a long run makes: it is read, not run
    <!-- test: file NAME -->        any: written as NAME into the folder where everything runs
    <!-- test: recorded -->         python: run, the Hub's API replaced by one that writes down what it is asked
    <!-- test: without oner -->     python: run in a process that cannot import oner

Where the shipped checkpoint or a run's model is missing, a model of one layer stands at its path.
"""

import configparser
import csv
import dataclasses
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from tiny_pretraining import load_example
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import oner
from oner.processing.data.augmentation import Crop
from oner.processing.data.masking import Masking
from oner.training.evaluation.localization import similarity_maps
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator
from oner.training.objectives.dvae import DiscreteVAEObjectiveArguments
from oner.training.objectives.oner import OneRObjectiveArguments
from oner.training.publishing.hub import export_model
from oner.training.run.arguments import DataArguments, ModelArguments, RunArguments
from oner.training.run.parsing import parse_arguments
from oner_command_line import COMMANDS
from oner_command_line import main as command_line

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AMBIGUITIES = (ROOT / "docs" / "ambiguities.md").read_text(encoding="utf-8")
CHECKPOINT = "examples/checkpoints/oner-emoji"
MADE_BY_LONG_RUNS = {CHECKPOINT, "docs/evidence.md"}  # skipped, not passed, until they are there
HIDE_ONER = "import sys\nsys.modules['oner'] = None\n"
# the README's warning: without auto_map, flag and import, AutoProcessor gives a tokenizer that ignores pictures
LOSE_AUTO_MAP = """
import json, pathlib, shutil
lost = shutil.copytree(name, "lost")
for file in ("config.json", "processor_config.json"):
    values = json.loads(pathlib.Path(lost, file).read_text())
    del values["auto_map"]
    values.get("image_processor", {}).pop("auto_map", None)
    pathlib.Path(lost, file).write_text(json.dumps(values))
bare = AutoProcessor.from_pretrained(lost)
print("lost auto_map:", type(processor).__name__, type(bare).__name__, sorted(bare(text="a dog", images=0)))
try:
    AutoProcessor.from_pretrained(name, trust_remote_code=False)
except ValueError:
    print("asks for trust")
"""


class Block(NamedTuple):
    line: int
    language: str
    directive: str
    text: str


def blocks() -> list[Block]:
    """The fenced blocks of the README in order."""
    pattern = re.compile(r"(?:^<!-- test: (.*?) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
    return [
        Block(README[: found.start(2)].count("\n") + 1, found[2], found[1] or "", found[3])
        for found in pattern.finditer(README)
    ]


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, continuation lines joined, comments gone."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = blocks()
CHECKED = [
    pytest.param(words, id=" ".join(words)[:40])
    for block in BLOCKS
    if block.language == "bash" and block.directive == "check"
    for words in commands(block)
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model repository of one layer, its batch norms set by real pictures and captions."""
    rows = oner.open_rows(ROOT / "examples/data/emoji/test_concept.parquet").take(range(8))
    captions = [row["captions"][0] for row in rows]
    tokenizer = oner.train_tokenizer(captions, vocab_size=300)
    image_processor = oner.VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8)
    processor = oner.VisionLanguageProcessor(image_processor, tokenizer)
    torch.manual_seed(0)
    config = oner.OneRConfig.from_size(
        "nano", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_hidden_size=32, projection_dim=16, vocab_size=len(tokenizer), pooling="mean",
        pad_token_id=tokenizer.pad_token_id, image_token_id=processor.image_token_id,
        cls_token_id=tokenizer.cls_token_id, mask_token_id=tokenizer.mask_token_id,
    )  # fmt: skip
    model = oner.OneRForPreTraining(config).train()
    batch = processor(images=[oner.open_image(row["image"]) for row in rows], text=captions)
    with torch.no_grad():
        model(**batch)
    return export_model(model.eval(), processor, tmp_path_factory.mktemp("tiny") / "oner-emoji")


@pytest.fixture
def workshop(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the README is followed: the examples, somebody's photos, photo.png, a checkpoint."""
    examples = tmp_path / "examples"
    examples.mkdir()
    for entry in (ROOT / "examples").iterdir():
        if entry.name != "checkpoints":
            (examples / entry.name).symlink_to(entry)
    (examples / "checkpoints").mkdir()
    for shipped in (ROOT / "examples" / "checkpoints").iterdir():
        (examples / "checkpoints" / shipped.name).symlink_to(shipped)
    if not (ROOT / CHECKPOINT).is_dir():
        (tmp_path / CHECKPOINT).symlink_to(tiny_model)
    (tmp_path / "photos").mkdir()
    for number, row in enumerate(oner.open_rows(ROOT / "examples/data/emoji/test_style.parquet").take(range(6))):
        oner.open_image(row["image"]).save(tmp_path / "photos" / f"{number}.png")
    oner.open_image(tmp_path / "photos" / "0.png").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def test_following_the_readme_from_top_to_bottom(workshop, monkeypatch):
    namespace: dict[str, Any] = {"__name__": "readme"}
    followed = {"python": 0, "bash": 0}
    for block in BLOCKS:
        verb, _, rest = block.directive.partition(" ")
        try:
            if verb == "file":
                write_file(workshop / rest, block.text)
            elif block.language == "bash" and verb == "run":
                for words in commands(block):
                    run_command(words + shlex.split(rest), monkeypatch)
            elif block.language == "python" and verb == "check":
                padded(block)
                continue
            elif block.language == "python" and block.directive == "without oner":
                run_without_oner(block, workshop)
            elif block.language == "python" and verb == "recorded":
                run_recorded(block, namespace, monkeypatch)
            elif block.language == "python":
                exec(padded(block), namespace)
            else:
                continue
        except BaseException as error:  # an example that exits is as wrong as one that raises
            raise AssertionError(f"README.md line {block.line}, {block.language}: {error!r}") from error
        followed[block.language] = followed.get(block.language, 0) + 1
    assert followed["python"] >= 8 and followed["bash"] >= 3, followed
    for made in (
        "results.png",
        "where.png",
        "attention.png",
        "gap.png",
        "photos-index",
        "runs/mine/model/config.json",
    ):
        assert (workshop / made).exists(), f"the README promises {made}"
    for made in ("results/test_style.retrieval.json", "pictures/test_style-localization-sheet.png"):
        assert (workshop / "runs/evaluation" / made).is_file(), f"the README promises {made}"


def padded(block: Block) -> Any:
    """The snippet compiled so that tracebacks count lines as the README does."""
    return compile("\n" * block.line + block.text, str(ROOT / "README.md"), "exec")


def write_file(path: Path, text: str) -> None:
    """Writes what the reader is told to write; beside a metadata.csv also the pictures that it names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if path.name == "metadata.csv":
        photos = sorted(Path("photos").iterdir())
        for photo, row in zip(photos, csv.DictReader(text.splitlines()), strict=False):
            (path.parent / row["file_name"]).write_bytes(photo.read_bytes())


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python SCRIPT ...`, `accelerate launch ... SCRIPT ...` or `oner ...`, in this process, for speed."""
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[0] == "oner":
        assert command_line(words[1:]) == 0
        return
    assert words[0] == "python", f"cannot run {words[0]}: mark the block as checked"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(str(Path(words[1]).parent))
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"ended with {ended.code}"
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def run_without_oner(block: Block, workshop: Path) -> None:
    """A fresh interpreter with transformers alone."""
    script = workshop / "without_oner.py"
    script.write_text(HIDE_ONER + block.text + LOSE_AUTO_MAP, encoding="utf-8")
    environment = os.environ | {"HF_HOME": str(workshop / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=workshop, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "torch.Size([1, " in result.stdout and "asks for trust" in result.stdout, result.stdout
    processor, bare = re.search(r"lost auto_map: (\w+) (\w+) \['attention_mask', 'input_ids'", result.stdout).groups()
    assert processor == "VisionLanguageProcessor" and bare != processor


def run_recorded(block: Block, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A snippet that would publish: it must make a repository and upload the directory that the README trained."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class RecordingApi:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> Any:
            asked.append(("upload", options))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    with monkeypatch.context() as patch:
        patch.setattr("oner.training.publishing.hub.HfApi", RecordingApi)
        exec(padded(block), namespace)
    (create, repository), (upload, options) = asked
    assert (create, upload) == ("create", "upload") and repository["private"] is True
    assert options["repo_id"] == repository["repo_id"] and (Path(options["folder_path"]) / "config.json").is_file()


@pytest.mark.parametrize("words", CHECKED)
def test_what_a_command_names_exists(words, workshop):
    if words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        assert set(words[1:]) <= set(targets)
    elif words[0] == "source":
        venv = re.search(r"^VENV \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
        assert words[1:] == [f"{venv}/bin/activate"]
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:])
    elif words[0] == "hf":
        scripts = Path(sys.executable).parent
        result = subprocess.run([str(scripts / "hf"), *words[1:], "--help"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    elif words[0] == "oner":
        COMMANDS[words[1]].parser(words[1]).parse_known_args(words[2:])
    elif words[:2] == ["pip", "install"]:
        assert (ROOT / words[2] / "pyproject.toml").is_file()
    elif words[:2] == ["python", "examples/evaluate.py"]:
        COMMANDS["evaluate"].read("evaluate", words[2:])
    elif words[:2] == ["python", "examples/abilities.py"]:
        load_example("abilities").parse(words[2:])
    else:
        pytest.fail(f"no check for {words[0]}: add one here")


def check_launch(words: list[str]) -> None:
    """The launcher's options, its configuration file, the script, and the script's own arguments."""
    launch = launch_command_parser().parse_args(words)
    assert Path(launch.training_script).is_file()
    if launch.config_file is not None:
        config = accelerate.commands.config.config_args.load_config_from_file(launch.config_file)
        assert config.num_processes >= 8
    script, line = Path(launch.training_script).stem, launch.training_script_args
    if script == "finetune":
        _, arguments = load_example(script).parse(line)
        assert arguments.model.initial_model
        return
    if script == "train_image_tokenizer":
        arguments = parse_arguments(line, DiscreteVAEObjectiveArguments)
        CONFIG_MAPPING["discrete_vae"].from_size(arguments.model.size, **(arguments.model.model_config or {}))
        return
    arguments = parse_arguments(line)
    family = CONFIG_MAPPING[arguments.model.family]
    family.from_size(arguments.model.size, **(arguments.model.model_config or {}))
    assert arguments.data.train_data == ["pairs/"] or Path(arguments.data.train_data[0]).is_file()


def test_every_bash_block_says_what_becomes_of_it():
    silent = [block.line for block in BLOCKS if block.language == "bash" and not block.directive]
    assert not silent, f"bash blocks without a test comment in lines {silent}"


def test_every_python_block_that_loads_by_transformers_imports_oner():
    """Blocks are copied one by one, and the shipped checkpoints hold no code."""
    blocks = [block for block in BLOCKS if block.language == "python" and "from transformers" in block.text]
    assert {block.directive for block in blocks if "import oner\n" not in block.text} == {"without oner"}


def test_extras_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(re.findall(r"pip install -e '\.\[(\w+)\]'", README))
    assert named and named <= set(setup["options.extras_require"])


def named_paths(text: str) -> list[str]:
    """Link targets, and inline code that looks like a path of this repository."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    code = re.findall(r"`([\w./-]+)`", prose)
    tops = {entry.name for entry in ROOT.iterdir()} | {"docs", "examples"}
    return sorted(set(links) | {path for path in code if "/" in path and path.split("/")[0] in tops - {"runs"}})


@pytest.mark.parametrize("path", sorted({*named_paths(README), *named_paths(AMBIGUITIES)}))
def test_named_path_exists(path):
    if path in MADE_BY_LONG_RUNS and not (ROOT / path).exists():
        pytest.skip(f"{path} has not been made yet")
    assert (ROOT / path).exists()


def test_no_number_is_left_to_fill_in():
    assert not re.findall(r"@@\w*@@", README)


def test_parameter_counts_of_the_zoo():
    rows = re.findall(r"^\| `OneRConfig.from_size\(\"(\w+)\"\)`.*?\| ([\d.]+) M \|", README, re.M)
    assert len(rows) == 5
    for size, millions in rows:
        with torch.device("meta"):
            model = oner.OneRModel(oner.OneRConfig.from_size(size), add_pooling_layer=False)
        assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == millions, size


def names_of(dataclass: type) -> set[str]:
    return {field.name for field in dataclasses.fields(dataclass)}


def options_of(*callables: Any) -> set[str]:
    return {name for function in callables for name in inspect.signature(function).parameters}


def test_ambiguities_name_real_fields():
    known = {
        "model": names_of(oner.OneRConfig),
        "objective": names_of(OneRObjectiveArguments),
        "data": names_of(DataArguments) | names_of(Crop) | names_of(Masking),
        "run": names_of(RunArguments) | names_of(ModelArguments),
        "evaluator": options_of(
            ZeroShotClassificationEvaluator, RetrievalEvaluator, MultimodalRetrievalEvaluator, similarity_maps
        ),
    }
    rows = re.findall(r"^\| (\d+) \|.*\| (.*?) \|$", AMBIGUITIES, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 28))
    for number, where in rows:
        if where == "none":
            continue
        for part in where.split("; "):
            group, _, fields = part.partition(": ")
            named = re.findall(r"`(\w+)`", fields)
            assert named and set(named) <= known[group], f"row {number}: {set(named) - known[group]} not in {group}"
