"""README.md and docs/ keep their word: snippets run, commands, paths, links, fields and public names exist.

What becomes of a block is said in docs_pages.py.
"""

import configparser
import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from docs_pages import (
    FOLLOWED,
    PAGES,
    ROOT,
    SLOW,
    Block,
    blocks_of,
    commands,
    headings_of,
    links_of,
    named_paths,
    text_of,
)
from tiny_pretraining import load_example
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import oner
import oner_run_options as run_options
from oner.training.objectives.dvae import DiscreteVAEObjectiveArguments
from oner.training.publishing.hub import export_model
from oner.training.run.parsing import parse_arguments
from oner_command_line import COMMANDS
from oner_command_line import main as command_line

HIDE_ONER = "import sys\nsys.modules['oner'] = None\n"
# the warning of docs/howto_publish.md: without auto_map, flag and import, AutoProcessor gives a tokenizer that ignores
# pictures
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
# what a page promises to leave behind
PROMISED = {
    "docs/evaluation.md": [
        "where.png",
        "attention.png",
        "gap.png",
        "runs/evaluation/results/test_style.retrieval.json",
        "runs/evaluation/pictures/test_style-localization-sheet.png",
    ],
    "docs/howto_own_folder.md": ["runs/mine/model/config.json", "runs/mine/log.jsonl"],
    "docs/howto_own_shards.md": ["runs/shards/model/config.json"],
    "docs/howto_search.md": ["results.png", "photos-index", "photos-grown"],
    "docs/howto_serve.md": ["where.png"],
    "docs/howto_trainer.md": ["runs/trainer/config.json"],
    "docs/results.md": ["apple.png"],
}


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
    return export_model(model.eval(), processor, tmp_path_factory.mktemp("tiny") / "oner-mine")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a page is followed: the examples, somebody's photos, photo.png."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "photos").mkdir()
    for number, row in enumerate(oner.open_rows(ROOT / "examples/data/emoji/test_style.parquet").take(range(6))):
        oner.open_image(row["image"]).save(tmp_path / "photos" / f"{number}.png")
    oner.open_image(tmp_path / "photos" / "0.png").save(tmp_path / "photo.png")
    oner.open_image(tmp_path / "photos" / "1.png").save(tmp_path / "apple.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in FOLLOWED]
)
def test_a_page_is_followed_from_top_to_bottom(page, workshop, tiny_model, monkeypatch):
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        try:
            follow(block, page, namespace, workshop, tiny_model, monkeypatch)
        except BaseException as error:  # an example that exits is as wrong as one that raises
            raise AssertionError(f"{page} line {block.line}, {block.language}: {error!r}") from error
    for made in PROMISED.get(page, ()):
        assert (workshop / made).exists(), f"{page} promises {made}"


def follow(
    block: Block, page: str, namespace: dict, workshop: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page tells its reader to do in this block."""
    verb, _, rest = block.directive.partition(" ")
    if verb == "file":
        write_file(workshop / rest, block.text)
    elif block.language == "bash" and verb == "run":
        for words in commands(block):
            run_command(words + shlex.split(rest), monkeypatch)
    elif block.language == "bash" and verb == "check":
        for made in rest.split():
            (workshop / made).parent.mkdir(parents=True, exist_ok=True)
            (workshop / made).touch()
        for words in commands(block):
            check_command(words)
    elif block.language == "bash":
        pytest.fail("no comment says what becomes of it: <!-- test: run --> or <!-- test: check -->")
    elif block.language == "python":
        code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
        if block.directive in ("without oner", "recorded"):
            place_model(model, workshop / "runs/mine/model")
        if block.directive == "without oner":
            run_without_oner(block, workshop)
        elif block.directive == "recorded":
            run_recorded(code, namespace, monkeypatch)
        elif verb != "check" and not (verb == "needs" and any(find_spec(one) is None for one in rest.split())):
            exec(code, namespace)


def place_model(model: Path, place: Path) -> None:
    """Where a run would have left one."""
    if not place.exists():
        place.parent.mkdir(parents=True)
        place.symlink_to(model)


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
    try:
        if words[0] == "oner":
            assert command_line(words[1:]) == 0
            return
        assert words[0] == "python", f"cannot run {words[0]}: mark the block as checked"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            patch.syspath_prepend(str(Path(words[1]).parent))
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


def run_recorded(code: Any, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A snippet that would publish: it must make a repository and upload the directory that it names."""
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
        exec(code, namespace)
    (create, repository), (upload, options) = asked
    assert (create, upload) == ("create", "upload") and repository["private"] is True
    assert options["repo_id"] == repository["repo_id"] and (Path(options["folder_path"]) / "config.json").is_file()


def check_command(words: list[str]) -> None:
    """That the program, the files and the arguments of a command exist."""
    if words[0] == "oner":
        check_oner(words[1], words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:])
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), words[2]
    elif words[0] == "python":
        check_script(words[1], words[2:])
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        assert set(words[1:]) <= set(targets)
    elif words[0] == "source":
        venv = re.search(r"^VENV \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
        assert words[1:] == [f"{venv}/bin/activate"]
    elif words[0] == "hf":
        scripts = Path(sys.executable).parent
        result = subprocess.run([str(scripts / "hf"), *words[1:], "--help"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    elif words[:2] == ["pip", "install"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        named = {extra for group in re.findall(r"\[([\w,]+)\]", words[-1]) for extra in group.split(",")}
        assert named <= set(setup["options.extras_require"]) and words[-1].split("[")[0] in (".", "oner")
    elif words[0] not in ("cd", "git"):
        pytest.fail(f"no check for {words[0]}: add one here")


def check_oner(name: str, line: list[str]) -> None:
    """The options of a command as its own parser takes them; of a run the names and values."""
    command = COMMANDS[name]
    if not command.is_run:
        options, rest = command.parser(name).parse_known_args(line)
        run_options.check_line(rest, list(vars(options)))
        return
    folder = [] if line[0].startswith("--") else line[:1]
    run_options.check_line(line[len(folder) :])
    told = run_options.given(line)
    assert folder or "config" in told, "neither FOLDER nor --config"


def check_script(script: str, line: list[str]) -> None:
    """A script of examples/: it is there, and its own parser takes the line; one that was made before is there."""
    if not script.startswith("examples/"):
        assert Path(script).is_file(), script
        return
    assert (ROOT / script).is_file(), script
    name = Path(script).stem
    if name == "evaluate":
        COMMANDS["evaluate"].read("evaluate", line)
    elif name in ("pretrain", "finetune", "clip_baseline"):
        check_run(name, line)
    elif name == "abilities":
        load_example(name).parse(line)
    else:
        # of the others the names of the options
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in run_options.given(line):
            assert not option or re.search(f'"--{option}"', source), f"{script} has no --{option}"


def check_launch(words: list[str]) -> None:
    """The launcher's options, its configuration file, the script, and the script's own arguments."""
    launch = launch_command_parser().parse_args(words)
    if launch.config_file is not None:
        config = accelerate.commands.config.config_args.load_config_from_file(launch.config_file)
        assert config.num_processes >= 8
    if launch.module:
        assert launch.training_script == "oner_command_line"
        return check_oner(launch.training_script_args[0], launch.training_script_args[1:])
    check_run(Path(launch.training_script).stem, launch.training_script_args)


def check_run(script: str, line: list[str]) -> None:
    """The arguments of a run, in its file and beside it, and the fields of its model."""
    assert (ROOT / "examples" / f"{script}.py").is_file(), script
    if script == "finetune":
        _, arguments = load_example(script).parse(line)
        assert arguments.model.initial_model
        return
    dvae = script == "train_image_tokenizer"
    arguments = parse_arguments(line, DiscreteVAEObjectiveArguments) if dvae else parse_arguments(line)
    family = CONFIG_MAPPING["discrete_vae" if dvae else arguments.model.family]
    family.from_size(arguments.model.size, **(arguments.model.model_config or {}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows show .* different pictures")
def test_the_readme_shows_what_its_search_answers(workshop, monkeypatch, capsys):
    """6,185 pictures are embedded: a minute."""
    blocks = blocks_of("README.md")
    shown = next(block.text for block in blocks if block.language == "text")
    lines = [words for block in blocks if block.language == "bash" for words in commands(block)]
    asked = next(words for words in lines if words[:2] == ["oner", "search"] and words[2].endswith("train.parquet"))
    run_command([*asked, "--index-cache", "cache"], monkeypatch)
    answered = capsys.readouterr().out
    for line in shown.splitlines()[1:]:
        rank, _, name = line.split(maxsplit=2)
        assert re.search(rf"^ *{rank} +\S+ +{name}$", answered, re.M), f"{line!r} not in\n{answered}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FOLLOWED])
def test_commands_of_other_pages_exist(page, workshop):
    """Those of this repository; what they name may be made by long runs."""
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, page, "exec")
        for words in commands(block) if block.language == "bash" else ():
            if words[0] in ("make", "oner"):
                check_command(words)


@pytest.mark.parametrize("page", FOLLOWED)
def test_blocks_are_copied_one_by_one(page):
    """A block that loads by transformers imports oner, for the shipped checkpoints hold no code."""
    for block in blocks_of(page):
        if block.language == "python" and "from transformers" in block.text and block.directive != "without oner":
            assert re.search(r"^import oner\b|^from oner\b", block.text, re.M), f"{page} line {block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    for link in links_of(page):
        target, _, anchor = link.partition("#")
        if target.startswith("reference/"):
            continue  # made by mkdocs, which checks it
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in headings_of(str(path.resolve().relative_to(ROOT))), f"{page}: {link}"
    missing = [path for path in named_paths(page) if not (ROOT / path).exists()]
    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_no_number_is_left_to_fill_in(page):
    assert not re.findall(r"@@\w*@@", text_of(page))


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len(text_of("README.md").split()) <= 1500
    pictures = [link for link in links_of("README.md") if link.endswith(".png")]
    assert len(pictures) >= 2
    assert all((ROOT / picture).stat().st_size <= 150_000 for picture in pictures)


@pytest.mark.parametrize("page", ["README.md", "docs/abilities.md", "docs/suite.md"])
def test_tables_of_what_ships_are_made_of_its_results(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    tables = import_module("shipped_tables")
    text = text_of(page)
    for name, build in tables.TABLES[page].items():
        assert tables.with_table(text, name, build()) == text, "python examples/shipped_tables.py"
    with pytest.raises(ValueError, match="expected the marks"):
        tables.with_table(text, "nothing", "")


def test_an_agent_needs_ten_commands_at_most():
    blocks = [block for block in blocks_of("docs/skill/SKILL.md") if block.language == "bash"]
    assert 0 < sum(len(commands(block)) for block in blocks) <= 10


def test_parameter_counts_of_the_sizes():
    rows = re.findall(r"^\| `OneRConfig.from_size\(\"(\w+)\"\)`.*?\| ([\d.]+) M", text_of("docs/families.md"), re.M)
    assert len(rows) == 5
    for size, millions in rows:
        with torch.device("meta"):
            model = oner.OneRModel(oner.OneRConfig.from_size(size), add_pooling_layer=False)
        assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == millions, size
