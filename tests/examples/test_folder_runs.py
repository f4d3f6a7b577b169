"""`oner train FOLDER` and what follows: captions by name, the tenth held out, the run, the search of its pictures."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from tiny_folder import write_named
from tiny_pretraining import load_example, tiny_arguments

import oner_run_options
from oner.training.commands import folder as folders
from oner.training.commands.folder import (
    FolderError,
    Pair,
    captions_of,
    concepts,
    describe,
    hold_out,
    mirroring,
    read_folder,
    words_of,
)
from oner.training.evaluation.curves import draw_log, read_series
from oner.training.run.parsing import parse_arguments, read_config
from oner_command_line import main as command_line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red_apple", "red apple"),
        ("red-apple_03", "red apple"),
        ("redApple (2)", "red Apple"),
        ("1st place medal", "1st place medal"),
        ("IMG_2041", ""),
        ("DSC01234", ""),
        ("Screenshot 2024-01-02", ""),
        ("photo", ""),
        ("photo of a dog", "photo of a dog"),
        ("a3f9c2e1b7", ""),
        ("0001", ""),
        ("яблоко_1", "яблоко"),
        ("赤いりんご", "赤いりんご"),
        ("caf\udce9", "caf\ufffd"),
    ],
)
def test_words_of_a_name(name, words):
    assert words_of(name) == words


def colour(folder: Path, name: str, shade: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def test_captions_beside_a_picture_in_its_name_and_in_its_folder(tmp_path, capsys):
    for shade in range(30):
        colour(tmp_path, f"apple/{shade}.png", shade)
    colour(tmp_path, "green tree.png", 100)
    colour(tmp_path, "IMG_1.png", 101)
    colour(tmp_path, "IMG_2.png", 102)
    (tmp_path / "IMG_2.txt").write_text("a dog\n\nthe face of a dog\n")
    pairs = {Path(pair.image).name: pair.captions for pair in read_folder(tmp_path)}
    assert pairs["7.png"] == ["apple"] and pairs["green tree.png"] == ["green tree"]
    assert pairs["IMG_2.png"] == ["a dog", "the face of a dog"] and "IMG_1.png" not in pairs
    assert "1 of 33 pictures have no words in their names: left out" in capsys.readouterr().out

    # a damaged file says nothing of the others
    (tmp_path / "a page.jpg").write_text("<html>")
    assert len(read_folder(tmp_path)) == len(pairs)
    assert "1 of 33 pictures cannot be used: left out; the first: cannot read" in capsys.readouterr().out


def test_captions_beside_a_picture_are_read_as_they_are_written(tmp_path):
    (tmp_path / "0.txt").write_bytes("\ufeffa café\r\n".encode())
    assert captions_of(tmp_path / "0.png", tmp_path) == ["a café"]
    for encoding in ("cp1252", "utf-16"):
        (tmp_path / "0.txt").write_bytes("a café".encode(encoding))
        with pytest.raises(FolderError, match=r"0.txt: is not UTF-8 \(byte"):
            captions_of(tmp_path / "0.png", tmp_path)


def test_a_table_says_what_its_pictures_show(tmp_path, capsys):
    names = [f"{shade}.png" for shade in range(24)]
    for shade, name in enumerate(names):
        colour(tmp_path, name, shade)
    (tmp_path / "words.csv").write_text("file_name,text\n" + "".join(f"{name},thing {name[0]}\n" for name in names))
    with (tmp_path / "words.csv").open("a") as table:
        table.write("gone.png,what is not there\n")
    assert [pair.captions for pair in read_folder(tmp_path)][:2] == [["thing 0"], ["thing 1"]]
    assert "1 of 25 rows of words.csv cannot be used: left out; the first: row 24: " in capsys.readouterr().out
    (tmp_path / "more.csv").write_text("file_name,text\n")
    with pytest.raises(
        FolderError, match="more.csv, words.csv are all tables; expected one, or one called metadata.csv"
    ):
        read_folder(tmp_path)


def test_columns_of_a_folders_table_are_named_on_the_line(tmp_path, monkeypatch):
    """A table whose columns have other names than the usual, or whose usual ones say something else."""
    for shade in range(24):
        colour(tmp_path / "photos", f"{shade}.png", shade)
    monkeypatch.chdir(tmp_path)
    line = ["--text_column", "title", "--id-column", "kind", "--image_column=picture"]
    for header, cells in (
        ("picture,title,kind", "{0}.png,title {0},{1}"),
        ("file_name,text,picture,title,kind", "no.png,text {0},{0}.png,title {0},{1}"),
    ):
        rows = [cells.format(shade, "odd" if shade % 2 else "even") for shade in range(24)]
        (tmp_path / "photos" / "words.csv").write_text("\n".join([header, *rows]))
        written = parse_arguments(folders.folder_line("photos", [*line, "--epochs", "5"])).data
        assert (written.image_column, written.text_column, written.id_column) == ("image", "captions", "id")
        found = pq.read_table(written.train_data[0]).to_pylist()
        ids = {Path(row["image"]).stem: row["id"] for row in found}
        assert {len(row["captions"]) for row in found} == {1} and len(found) == 22
        assert all(row["captions"] == [f"title {Path(row['image']).stem}"] for row in found)
        assert len(set(ids.values())) == 2 and ids["3"] == ids["5"] != ids["4"]

    (tmp_path / "photos" / "words.csv").unlink()
    with pytest.raises(FolderError, match="no table in it; expected one for --text_column title, --id_column kind"):
        read_folder(tmp_path / "photos", image_column=None, text_column="title", id_column="kind")


def test_a_folder_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(FolderError, match="there is no picture in it"):
        read_folder(tmp_path)
    for shade in range(30):
        colour(tmp_path, f"IMG_{shade}.png", shade)
    with pytest.raises(FolderError, match="not one of 30 pictures has a name that says what it shows"):
        read_folder(tmp_path)
    colour(tmp_path, "a tree.png", 99)
    with pytest.raises(FolderError, match="1 different pictures that can be read and have captions; expected 20"):
        read_folder(tmp_path)


def test_a_tenth_of_the_pictures_is_held_out_and_equal_ones_stay_together(tmp_path):
    for copy in range(2):
        for shade in range(40):
            colour(tmp_path, f"shade {chr(97 + shade % 20)} {'of red' * copy}.{shade}.png", shade)
    pairs = read_folder(tmp_path)
    train, held_out = hold_out(pairs, seed=0)
    assert len(held_out) == 8 and sorted(train + held_out) == list(range(80))
    assert not {pairs[row].picture for row in train} & {pairs[row].picture for row in held_out}
    assert hold_out(pairs, 0) == (train, held_out) and hold_out(pairs, 1)[1] != held_out

    # equal captions make one thing of two pictures, equal pictures of two captions
    ids = concepts(pairs)
    assert set(Counter(ids).values()) == {4} and len(set(ids)) == 20
    (said, repeated) = describe(tmp_path, pairs, len(held_out))
    assert "80 pairs, 8 held out" in said and "40 of 80 captions repeat an earlier one" in repeated


def test_pictures_are_not_mirrored_where_captions_often_name_sides(capsys):
    pairs = [Pair(b"", ["a bright car", "a copyright"], number) for number in range(19)]
    assert mirroring([*pairs, Pair(b"", ["a car on the left"], 19)]) == {} and not capsys.readouterr().out
    pairs[0] = Pair(b"", ["the rightmost car", "a car to the left"], 0)
    assert mirroring(pairs) == {"horizontal_flip": 0.0}
    assert "2 of 38 captions name a side" in capsys.readouterr().out


def test_a_size_or_another_family_begins_at_random(tmp_path, monkeypatch):
    write_named(tmp_path / "photos", 22)
    monkeypatch.chdir(tmp_path)
    for line, begins in (([], True), (["--size", "tiny"], False), (["--config", "simla_emoji"], False)):
        folders.folder_line("photos", line)
        told = read_config("runs/photos/run.yaml")
        assert (told["initial_model"] is not None) is begins and told["size"] == (
            line[1] if "tiny" in line else "nano"
        )
    with pytest.raises(FolderError, match="--family simla: oner_folder is of oner; expected --config too"):
        folders.folder_line("photos", ["--family", "simla"])
    with pytest.raises(FolderError, match="is a file; expected a directory"):
        folders.folder_line("photos", ["--output_dir", "runs/photos/run.yaml"])


def test_what_a_run_has_learned_from_is_not_written_over(tmp_path, monkeypatch):
    photos = write_named(tmp_path / "photos", 23)
    monkeypatch.chdir(tmp_path)
    folders.folder_line("photos", [])
    before = [Path(f"runs/photos/{name}.parquet").read_bytes() for name in ("pairs", "held_out")]
    Path("runs/photos/checkpoint-00000001").mkdir()
    sorted(photos.iterdir())[3].unlink()
    with pytest.raises(FolderError, match="others than when runs/photos began; --output_dir begins a new run"):
        folders.folder_line("photos", [])
    assert before == [Path(f"runs/photos/{name}.parquet").read_bytes() for name in ("pairs", "held_out")]
    folders.folder_line("photos", ["--allow_changes"])
    assert before[0] != Path("runs/photos/pairs.parquet").read_bytes()


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning")
def test_a_folder_is_trained_on_and_searched(tmp_path, monkeypatch, capsys):
    photos = write_named(tmp_path / "photos", 30)
    monkeypatch.chdir(tmp_path)
    assert command_line(["train", "photos", "--max_steps", "2", "--batch_size", "8"]) == 0
    said = capsys.readouterr().out
    assert "30 pairs, 3 held out" in said and "captions repeat an earlier one" in said
    assert "this will take about " in said and "2 steps of 8 pairs" in said
    assert "on 3 pictures that it has not seen: words find their picture" in said
    assert (
        'search it: oner search runs/photos "' in said and "doctor: " in said and "drawn: runs/photos/log.png" in said
    )
    for name in ("log.png", "held_out.png"):
        with Image.open(tmp_path / "runs" / "photos" / name) as drawn:
            assert min(drawn.size) > 300 and drawn.convert("L").getextrema()[0] < 128

    # the run's own file says it all, and no pair of the held-out pictures was trained on
    told = yaml.safe_load((tmp_path / "runs" / "photos" / "run.yaml").read_text())
    assert told["epochs"] == folders.EPOCHS[1] and told["initial_model"].endswith("oner-emoji")
    train, held_out = (
        pq.read_table(tmp_path / "runs" / "photos" / f"{name}.parquet").to_pylist() for name in ("pairs", "held_out")
    )
    assert len(train) == 27 and not {row["image"] for row in train} & {row["image"] for row in held_out}

    # its pictures are found by themselves
    first = sorted(photos.iterdir())[0]
    assert command_line(["search", "runs/photos", "--image", str(first), "--top-k", "2"]) == 0
    assert f"   1  +1.000  {first.stem}  {first}\n" in capsys.readouterr().out
    assert (tmp_path / "runs" / "photos" / "index").is_dir() and (tmp_path / "results.png").is_file()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_without_evaluation_says_so(pairs, tmp_path, capsys):
    load_example("pretrain").main(tiny_arguments(pairs, tmp_path / "run", max_steps=2))
    said = capsys.readouterr().out
    assert "nothing was measured, for the run has no eval_data" in said and "{}" not in said
    losses, recalls = read_series(tmp_path / "run" / "log.jsonl")
    assert [step for step, _ in losses["loss"]] == [1, 2] and not recalls
    assert draw_log(tmp_path / "run" / "log.jsonl").size == (900, 380)


def test_a_log_with_several_evaluations_has_a_second_panel(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "itc": None}, {"step": 1, "a/ir_r@10": 0.1}, {"step": 2, "a/ir_r@10": 0.3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_log(tmp_path / "log.jsonl").size == (900, 760)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no line has a loss"):
        draw_log(tmp_path / "log.jsonl")


def test_a_configuration_that_ships_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: oner_emoji\nbatch_size: 16\n")
    told = read_config("mine.yaml")
    assert told["batch_size"] == 16 and told["size"] == "nano" == read_config("oner_emoji")["size"]

    # the makers and the licence of its pairs are not those of others
    portions = json.dumps({"pairs": {"kind": "pairs", "train_data": ["photos"]}})
    for other in (["--train_data", "photos"], ["--train-data=photos"], ["--portions", portions]):
        arguments = parse_arguments(["--config", "mine.yaml", *other])
        assert arguments.data.attribution is None and arguments.data.data_licence is None
        assert all(one.data.attribution is None for one in arguments.portions().values())
        mine = [*other, "--attribution", "MAKERS.md"]
        assert parse_arguments(["--config", "mine.yaml", *mine]).data.attribution == "MAKERS.md"
    assert parse_arguments(["--config", "mine.yaml"]).data.attribution == told["attribution"]


@pytest.mark.parametrize("reader", [read_config, oner_run_options.read_config])
def test_the_makers_of_a_bases_data_are_not_those_of_other_data(tmp_path, reader):
    own, terms = tmp_path / "own.yaml", ("attribution", "data_licence")
    for told in ("train_data: [photos]", "portions: {texts: {kind: texts, train_data: [notes.txt]}}"):
        own.write_text(f"base: momo_small_stage2\n{told}\n")
        assert not any(name in reader(own) for name in terms) and reader(own)["size"] == "nano"
    own.write_text("base: momo_small_stage2\ntrain_data: [photos]\nattribution: mine.md\n")
    assert reader(own)["attribution"] == "mine.md"
    own.write_text("base: momo_small_stage2\nbatch_size: 8\n")
    assert all(name in reader(own) for name in terms)


def test_what_every_portion_has_of_its_own_is_not_asked_for_outside_a_checkout(tmp_path, monkeypatch):
    """As docs/howto_momo_stages.md has it: a stage on data of one's own, over a file that ships."""
    monkeypatch.chdir(tmp_path)
    texts, images = "{kind: texts, train_data: [notes.txt]}", "{kind: images, train_data: [pictures/]}"
    own = tmp_path / "own.yaml"
    own.write_text(f"base: momo_small_stage2.yaml\nportions: {{texts: {texts}, images: {images}}}\n")
    oner_run_options.check_line(["--config", str(own)])
    own.write_text(f"base: momo_small_stage2.yaml\nportions: {{texts: {texts}, images: {{kind: images}}}}\n")
    with pytest.raises(oner_run_options.Mistake, match=r"examples/data/emoji/train.parquet \(train_data\)"):
        oner_run_options.check_line(["--config", str(own)])
    # nor the makers of the file's pairs, where the line names others
    own.write_text("train_data: [notes.txt]\nattribution: examples/data/emoji/ATTRIBUTION.md\n")
    oner_run_options.check_line(["--config", str(own), "--portions", f"{{'texts': {texts}}}"])
    with pytest.raises(oner_run_options.Mistake, match=r"ATTRIBUTION.md \(attribution\)"):
        oner_run_options.check_line(["--config", str(own)])


def test_outside_a_checkout_it_is_said_what_only_a_checkout_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line(["train", "--config", "oner_emoji"]) == 2
    said = capsys.readouterr().err
    assert "examples/data/emoji/train.parquet (train_data)" in said and said.count("\n") == 1
    assert command_line(["train", "--config", "oner_emoji", "--train_data", "nowhere", "--eval_data"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("oner train: nowhere: ") and "Traceback" not in said


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: draw_log(),
        lambda: words_of(None),
        lambda: Pair(1, [], 2, 3, 4),
        lambda: torch.nn.Linear(2, 2)("words"),
        lambda: torch.zeros("words"),
    ],
)
def test_a_wrong_call_keeps_its_traceback(tmp_path, monkeypatch, wrong):
    """A `TypeError` in our code is a refusal only where our code raises it."""

    def run(*_):
        return wrong()

    # as if the call stood in a module of ours
    for function in (run, wrong):
        monkeypatch.setitem(function.__globals__, "__name__", "oner.training.doctor.command")
    monkeypatch.setattr("oner.training.doctor.command.run", run)
    with pytest.raises(TypeError):
        command_line(["doctor", str(tmp_path)])


def test_a_fault_of_another_library_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_):
        return json.loads("{")

    monkeypatch.setattr("oner.training.doctor.command.run", fail)
    with pytest.raises(ValueError, match="Expecting"):
        command_line(["doctor", str(tmp_path)])
