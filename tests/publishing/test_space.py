"""The search page as gradio is told it, `oner serve`, and a Space that works where there is no oner."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from families import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_search import Refused, fake_gradio, handlers_of, search_of

from oner.processing.retrieval_index import RetrievalIndex
from oner.processing.retrieval_page import SearchPage
from oner.training.commands.serve import named
from oner.training.publishing import space_layout
from oner.training.publishing.hub import export_model
from oner.training.publishing.origins import attributions_of, read_origins
from oner.training.publishing.space import copy_model
from oner.training.run.parsing import parse_arguments
from oner_command_line import main as command_line

# OneR has a map of cosines, SIMLA and CODIS one of their gradients, MoMo none
SHOWN = ("oner", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "oner"))
# a machine of the Hub: transformers, the Space, and a gradio that takes everything
ASK = """
import json, runpy, sys
from pathlib import Path
from unittest.mock import MagicMock
sys.modules["oner"] = None
sys.modules["gradio"] = MagicMock()
sys.path.insert(0, sys.argv[1])
page = runpy.run_path(sys.argv[1] + "/app.py")["page"]
queries = ("a face", None), ("a face", sys.argv[2])
found = [page.search(name, *query, top_k=3).found for name in page.sizes for query in queries]
located = page.locate("a face", found[0][0].item)
print("FOUND", json.dumps({
    "sizes": page.sizes,
    "names": [[one.name for one in three] for three in found],
    "scores": [[one.score for one in three] for three in found],
    "places": [one.place for one in found[0]],
    "map": located.map and located.map.size,
    "shown": [page.preview(one.item).size for one in found[0]],
}))
"""


@pytest.fixture(scope="module", params=SHOWN)
def search(request, emoji_folder, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp(f"space-{request.param}")
    made = search_of(FAMILIES[request.param], emoji_folder, folder)
    made.model = export_model(made.pipe.model, made.processor, folder / "model")
    return made


def makes_maps(search: SimpleNamespace) -> bool:
    return hasattr(search.pipe.model, "ground")


@pytest.fixture
def gradio(monkeypatch):
    fake = fake_gradio()
    monkeypatch.setitem(sys.modules, "gradio", fake)
    return fake


def test_the_page_shows_answers_and_where_the_words_are(search, gradio):
    page = SearchPage(search.pipe, search.indexes)
    space_layout.build_page(page)
    ask, locate = handlers_of(gradio)
    gallery, remark, answer, chosen, where, facts = ask("named", "a face", str(search.pictures[0]), 5)
    assert len(gallery.value) == 5 and "as one query" in remark and (chosen, where, facts) == (None, None, "")
    for (picture, caption), one in zip(gallery.value, answer.found, strict=True):
        assert max(picture.size) <= 320 and caption == f"{one.score:+.3f}  {one.name}"

    chosen, where, facts = locate(answer, SimpleNamespace(index=1))
    assert facts.startswith("**2.**") and f"{answer.found[1].score:+.4f}" in facts
    assert where.size == chosen.size if makes_maps(search) else (where is None and "makes no maps" in facts)
    assert locate(None, SimpleNamespace(index=0)) == (None, None, "")
    assert ask("named", "  ", None, 5)[:2] == (SimpleNamespace(value=[], select=gradio.select, selected_index=None),
                                               "Enter words, a picture, or both.")  # fmt: skip


def test_the_page_names_an_upload_that_cannot_be_read_by_its_file_alone(search, gradio, tmp_path):
    space_layout.build_page(SearchPage(search.pipe, search.indexes))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Refused, match="broken.png") as refused:
        handlers_of(gradio)[0]("named", "", str(tmp_path / "broken.png"), 5)
    assert str(tmp_path) not in str(refused.value)


def test_markdown_is_left_as_it_is():
    shown = space_layout.plain("<b>**a_b** [x](y)</b>")
    assert not set(shown) & set("<>*[]()_")


def test_gradio_is_not_imported_before_a_page_is_made_and_its_lack_is_named(monkeypatch, search, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"oner\[serve\]"):
        space_layout.build_page(SearchPage(search.pipe, search.indexes))
    line = ["serve", str(search.model), str(search.indexes["named"])]
    assert command_line(line) == 2 and "oner[serve]" in capsys.readouterr().err


def test_serve_opens_folders_and_indexes_and_tells_the_address(search, gradio, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in search.pictures[:3]:
        Image.open(path).save(photos / path.name)
    line = ["serve", str(search.model), str(photos), str(search.indexes["named"]), "--port", "7999"]
    assert command_line(line) == 0
    assert "search page: http://x" in capsys.readouterr().out
    launched = gradio.Blocks.return_value.__enter__.return_value.queue.return_value.launch.call_args.kwargs
    assert launched["server_name"] == "127.0.0.1" and launched["server_port"] == 7999
    choices = gradio.Dropdown.call_args.args[0]
    assert choices == [("photos (3)", "photos"), ("index-named (24)", "index-named")]
    answer = handlers_of(gradio)[0]("photos", "", str(search.pictures[1]), 3)[2]
    # vectors of an untrained model lie close together, and those of an index are rounded
    (own,) = [one for one in answer.found if one.place == str(photos / "1.png")]
    assert own.score == pytest.approx(answer.found[0].score, abs=1e-3)


def test_a_run_is_served_with_the_pictures_and_the_model_that_it_has_now(search, gradio, tmp_path):
    """After `oner search RUN` a picture is added, and then the run learns on: neither leaves the page as it was."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for path in search.pictures[:3]:
        shutil.copy(path, photos)
    shutil.copytree(search.model, run / "model")
    (run / "folder.json").write_text(json.dumps({"folder": str(photos)}))
    assert command_line(["search", str(run), "a face", "--out", str(tmp_path / "answers.png")]) == 0

    shutil.copy(search.pictures[3], photos)
    assert command_line(["serve", str(run)]) == 0
    assert gradio.Dropdown.call_args.args[0] == [("run (4)", "run")]
    trained = run / "model" / "model.safetensors"
    save_file({name: 1.5 * one for name, one in load_file(trained).items()}, trained, {"format": "pt"})
    (run / "model" / "digests.json").unlink()
    assert command_line(["serve", str(run), "--write-space", str(tmp_path / "space")]) == 0
    assert len(RetrievalIndex.load(tmp_path / "space" / "indexes" / "run")) == 4


def test_a_run_on_a_table_is_served_without_a_search_before(search, gradio, tmp_path):
    run, table = tmp_path / "run", tmp_path / "pairs.csv"
    table.write_text("photo,title\n" + "".join(f"{path},a face\n" for path in search.pictures[:3]))
    shutil.copytree(search.model, run / "model")
    (run / "model" / "results").mkdir(exist_ok=True)
    line = ["--family", "oner", "--train_data", str(table), "--image_column", "photo", "--text_column", "title"]
    (run / "model" / "results" / "training_config.json").write_text(json.dumps(parse_arguments(line).to_dict()))
    (run / "log.jsonl").write_text("")
    assert command_line(["serve", str(run)]) == 0
    assert gradio.Dropdown.call_args.args[0] == [("run (3)", "run")]


def test_indexes_of_one_name_are_told_apart():
    places = {Path("a/photos"): Path("1"), Path("b/photos"): Path("2"), Path("photos.parquet"): Path("3")}
    assert list(named(places)) == ["photos", "photos 2", "photos 3"]


@pytest.fixture(scope="module")
def space(search, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("spaces") / "space"
    line = ["serve", str(search.model), *map(str, (search.indexes["named"], search.indexes["words"]))]
    assert command_line([*line, "--write-space", str(directory), "--limit", "20", "--title", 'It\'s "mine" """']) == 0
    return directory


def test_a_space_answers_without_oner(search, space, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ASK, str(space), str(search.pictures[0])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("FOUND ")]
    got = json.loads(line.removeprefix("FOUND "))

    # as the indexes that were written say, asked here
    assert got["sizes"] == {"index-named": 20, "index-words": 20}
    assert got["map"] == ([512, 512] if makes_maps(search) else None)
    for number, name in enumerate(("index-named", "index-words")):
        index = RetrievalIndex.load(space / "indexes" / name)
        for place, query in enumerate(("a face", {"text": "a face", "image": search.pictures[0]})):
            scores, _ = index.search(search.pipe.embed([query]), top_k=3)
            assert got["scores"][2 * number + place] == pytest.approx(scores[0].tolist(), abs=1e-5)
    captions = {row["captions"][0] for row in search.rows}
    assert {name for three in got["names"] for name in three} <= captions
    assert all(place.startswith("indexes/index-named/pictures/") for place in got["places"])


def test_a_space_is_whole_and_names_no_place_of_this_machine(search, space):
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and header["title"] == 'It\'s "mine" """'
    needed = {line.split(">=")[0] for line in (space / "requirements.txt").read_text().split()}
    imported = set()
    for path in [space / "app.py", *space.glob("*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {module.split(".")[0] for module in modules}
    imported -= sys.stdlib_module_names | {"oner_page", "gradio"}
    assert {{"PIL": "pillow"}.get(name, name).replace("_", "-") for name in imported} <= needed

    place = str(search.indexes["named"].parent)
    written = [path for path in space.rglob("*") if path.suffix in (".py", ".json", ".md", ".txt")]
    assert len(written) > 20 and not [path for path in written if place in path.read_text(encoding="utf-8")]
    assert len(list((space / "indexes" / "index-named" / "pictures").iterdir())) == 20


def test_a_space_names_the_makers_of_what_its_model_was_trained_on(search, tmp_path):
    credits = tmp_path / "credits.md"
    credits.write_text("Drawn by A. Maker", encoding="utf-8")
    origins = read_origins(data=[{"name": "photos", "attribution": "credits.md"}], attributions=[credits])
    model = export_model(search.pipe.model, search.processor, tmp_path / "model", origins=origins)
    copy_model(model, tmp_path / "space" / "model", search.pipe)
    assert (
        attributions_of(tmp_path / "space" / "model") == attributions_of(model) == {"credits.md": b"Drawn by A. Maker"}
    )


def test_an_attribution_of_a_foreign_model_stays_in_its_directory(tmp_path):
    (tmp_path / "model" / "results").mkdir(parents=True)
    (tmp_path / "model" / "credits.md").write_text("Drawn by A. Maker")
    told = {"name": "m", "data": [{"name": "photos", "attribution": "../../credits.md"}]}
    (tmp_path / "model" / "results" / "provenance.json").write_text(json.dumps(told))
    assert attributions_of(tmp_path / "model") == {"credits.md": b"Drawn by A. Maker"}
    origins = read_origins([tmp_path / "model"])
    assert list(origins.makers) == ["credits.md"] == [entry["attribution"] for entry in origins.data]


def test_a_space_by_name_leaves_the_model_where_it_is(search, tmp_path, monkeypatch):
    from oner.training.publishing.space import Space, write_space

    shown = Space("owner/photos", {"named": search.indexes["named"]}, lambda item: None, limit=5)
    assert write_space(shown, tmp_path / "space", search.pipe) == {"named": 5}
    assert not (tmp_path / "space" / "model").exists()
    assert 'MODEL = "owner/photos"' in (tmp_path / "space" / "app.py").read_text()
    header = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert header["models"] == ["owner/photos"]
    with pytest.raises(FileExistsError, match="already exists"):
        write_space(shown, tmp_path / "space", search.pipe)


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What the Hub's API was asked, the uploaded files' names among it."""
    asked = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options) -> None:
            asked.append({"made": repo_id, **options})

        def upload_folder(self, folder_path: Path, **options) -> SimpleNamespace:
            asked.append({"files": sorted(path.name for path in folder_path.iterdir()), **options})
            return SimpleNamespace(commit_url="https://hub/spaces/commit/1")

    monkeypatch.setattr("oner.training.publishing.hub.HfApi", Api)
    return asked


def test_a_space_is_published_as_one_commit(search, asked, capsys):
    line = ["publish", str(search.model), "owner/search", str(search.indexes["words"]), "--space", "--private"]
    assert command_line([*line, "--limit", "3"]) == 0
    made, uploaded = asked
    kind = {"repo_type": "space", "space_sdk": "gradio"}
    assert made == {"made": "owner/search", "private": True, "exist_ok": True, **kind}
    assert uploaded["repo_type"] == "space" and uploaded["commit_message"] == "Upload Space"
    assert {"app.py", "README.md", "requirements.txt", "indexes", "model"} <= set(uploaded["files"])
    said = capsys.readouterr().out
    assert "index-words: 3 items" in said and "https://hub/spaces/commit/1" in said


def test_a_hub_that_does_not_answer_is_said_in_a_line(search, monkeypatch, capsys):
    class TransportError(Exception): ...

    class ConnectError(TransportError): ...

    class Api:
        endpoint = "https://hub"

        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options) -> None:
            raise ConnectError("no such name")

    monkeypatch.setattr("oner.training.publishing.hub.HfApi", Api)
    assert command_line(["publish", str(search.model), "owner/photos"]) == 2
    assert capsys.readouterr().err == "oner publish: https://hub does not respond: no such name\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["owner/photos", "owner/search", "nowhere", "--space"], "nowhere: no such folder or file"),
        (["owner/photos", "owner/search", "--space"], "owner/photos is no run; expected what is searched behind it"),
        (
            ["owner/photos", "owner/search", "photos/"],
            "unexpected 'photos/'; what is searched goes along with --space",
        ),
        (["MODEL", "no name", "INDEX", "--space"], "no name"),
    ],
)
def test_what_cannot_be_published_is_told_before_anything_is(line, says, search, asked, capsys):
    places = {"MODEL": str(search.model), "INDEX": str(search.indexes["words"])}
    assert command_line(["publish", *(places.get(word, word) for word in line)]) == 2
    assert says in capsys.readouterr().err and not asked
