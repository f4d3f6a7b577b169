"""examples/evaluate.py on a saved random model and real pairs: a table, files of results, pictures."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import serve
from families import RETRIEVAL
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image
from tiny_pretraining import evaluated, evaluation_of, load_example
from tiny_simla_pictures import make_processor, make_simla

from oner import SimlaForPreTraining
from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.data.sources import PairDataError, open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.commands import evaluate
from oner.training.commands.evaluate import chosen_tasks, read, read_gallery
from oner.training.evaluation.embedding import Gallery, embed_pairs, gallery_vectors, spaced
from oner.training.evaluation.labels import class_numbers, open_labelled
from oner.training.evaluation.results import checkpoint_facts, read_results, write_results
from oner.training.evaluation.suite import check_choices

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "examples" / "data" / "emoji"


@pytest.fixture(scope="module")
def example():
    return load_example("evaluate")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(open_rows(EMOJI / "test_style.parquet").captions(), vocab_size=400)
    torch.manual_seed(0)
    config = OneRConfig.from_size(
        "nano", image_size=32, patch_size=8, vocab_size=len(tokenizer), cls_token_id=3, mask_token_id=4
    )
    OneRForImageTextRetrieval(config).save_pretrained(path)
    VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8), tokenizer
    ).save_pretrained(path)
    return path


def test_numbers_and_the_protocol_are_written(example, model_directory, tmp_path, capsys):
    data = EMOJI / "test_concept.parquet"
    values = evaluated(
        ["--model", str(model_directory), "--data", str(data), "--id_column", "hexcode", "--limit", "120",
         "--tasks", "retrieval", "bootstrap", "multimodal", "--captions", "first", "--templates", "name",
         "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{values['test_concept/tr_r@10']:.4f}" in printed and "test_concept/multimodal_both_r@10" in printed
    results = read_results(tmp_path)
    assert sorted(results) == ["test_concept.bootstrap", "test_concept.multimodal", "test_concept.retrieval"]
    stored = results["test_concept.retrieval"]
    assert stored["values"]["test_concept/ir_r@5"] == values["test_concept/ir_r@5"]
    assert stored["protocol"]["split"] == "test_concept" and stored["protocol"]["pictures"] == 120
    digest = hashlib.sha256((model_directory / "model.safetensors").read_bytes()).hexdigest()
    assert stored["checkpoint"] == {"path": model_directory.name, "sha256": {"model.safetensors": digest}}
    assert stored["model"]["image_size"] == 32 and torch.__version__.startswith(stored["versions"]["torch"])
    assert results["test_concept.bootstrap"]["protocol"]["templates"] == ["{}"]
    assert set().union(*(result["values"] for result in results.values())) == set(values)


def test_numbers_of_rows_are_no_concepts_of_another_source(tmp_path, capsys):
    """Without a column of ids row 3 of the data has nothing to do with row 3 of the gallery."""
    line = ["--model", "oner-emoji", "--data", str(EMOJI / "test_style.parquet"), "--output", str(tmp_path)]
    line += ["--gallery", str(EMOJI / "test_style.parquet")]
    for column, shared in (([], False), (["--id_column", "hexcode"], True)):
        a = evaluation_of([*line, *column])
        rows, gallery = read(a.data[0], a, 20), read_gallery(a)
        common = {row["id"] for row in rows} & {row["id"] for row in gallery}
        assert bool(common) is shared
        assert ("multimodal" in chosen_tasks(a, "set", rows, gallery, object())) is shared
    assert "set: no multimodal, as no id of its rows stands in the gallery" in capsys.readouterr().out


def test_sources_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="several sources are called test, and the results of one would replace"):
        evaluation_of(["--model", "x", "--data", "a/test.parquet", "b/test.csv", "c/other.csv"])
    own = SimpleNamespace(
        pool="cls", models=["x"], tasks=["digits"], images=[["digits", *"abc"]], texts=None, pairs=None
    )
    with pytest.raises(ValueError, match="several sets would share the name digits"):
        check_choices(own)


def test_pictures_are_saved(example, model_directory, tmp_path, capsys):
    pytest.importorskip("sklearn")
    evaluated(
        ["--model", str(model_directory), "--data", str(EMOJI / "test_style.parquet"), "--limit", "60",
         "--tasks", "gap", "localization", "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    named = [Path(line.removeprefix("picture: ")) for line in lines if line.startswith("picture: ")]
    assert len(named) == 3 and {path.parent for path in named} == {tmp_path / "pictures"}
    for path in named:
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
        assert min(image.size) > 100 and low < high


def test_a_model_is_only_asked_what_it_can_answer(family, example, capsys):
    """Where nothing is named, all that it can: MoMo matches and does not ground."""
    model = family.build(RETRIEVAL)
    rows = [{"id": 0, "image": "a.png"}, {"id": 0, "image": "b.png"}]
    chosen = example.chosen_tasks(evaluation_of(["--model", "x", "--data", "y"]), "set", rows, None, model)
    said = capsys.readouterr().out
    for task, methods in {"rerank": ("match",), "scenes": ("match", "ground")}.items():
        assert (task in chosen) == all(hasattr(model, method) for method in methods)
        assert task in chosen or f"set: no {task}, as {type(model).__name__} " in said


def test_where_words_are_and_which_are_seen(example, tmp_path, capsys):
    processor = make_processor()
    make_simla(SimlaForPreTraining, processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--data", str(EMOJI / "test_style.parquet"), "--device", "cpu"]
    values = evaluated([*common, "--limit", "30", "--tasks", "scenes", "concepts", "--output", str(tmp_path)])
    assert {"test_style/grounding/pointing_accuracy", "test_style/concepts/concept_precision@5"} <= set(values)
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {
        *(f"test_style-grounding-{name}.png" for name in ("sheet", "words_sheet", "scenes_sheet")),
        *(f"test_style-concepts-{name}_sheet.png" for name in ("concept", "beyond_usual")),
    }
    arguments = evaluation_of(common)
    model = example.load_model(example.AutoModelForZeroShotImageClassification, tmp_path / "model")
    chosen = example.chosen_tasks(
        arguments, "set", [{"id": 0, "image": "a.png"}, {"id": 0, "image": "b.png"}], None, model
    )
    assert "scenes" in chosen and "concepts" not in chosen
    assert "set: no concepts, as it needs the pretraining model; name it in --tasks" in capsys.readouterr().out


def test_what_the_data_do_not_allow_is_said_and_left_out(example, model_directory, tmp_path, capsys, monkeypatch):
    chosen = ("retrieval", "zero_shot", "multimodal")
    monkeypatch.setattr(example, "TASKS", {name: example.TASKS[name] for name in chosen})
    values = evaluated(
        ["--model", str(model_directory), "--data", str(EMOJI / "test_style.parquet"), "--limit", "40",
         "--output", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    assert "test_style: no multimodal, as no concept has two pictures" in capsys.readouterr().out
    assert "test_style/tr_r@10" in values and not any("multimodal" in name for name in values)


def test_class_names_need_no_captions(model_directory, tmp_path):
    folder, names = tmp_path / "three", tmp_path / "names.json"
    for number, (name, ink) in enumerate([("blue", (0, 0, 250)), ("green", (0, 250, 0)), ("red", (250, 0, 0))]):
        (folder / name).mkdir(parents=True)
        for copy in range(2 + number):
            Image.new("RGB", (40, 40), ink).save(folder / name / f"{copy}.png")
    names.write_text(json.dumps(["blue", ["green", "leafy"], "red"]))
    common = ["--model", str(model_directory), "--device", "cpu", "--output", str(tmp_path), "--templates", "name"]
    values = evaluated([*common, "--data", str(folder), "--class_names", str(names)])
    assert values["three/zero_shot_chance1"] == pytest.approx(1 / 3) and "three/bootstrap_top1" in values
    protocol = read_results(tmp_path)["three.bootstrap"]["protocol"]
    assert (protocol["rows"], protocol["classes"], protocol["class_names"]) == (9, 3, names.name)
    assert (tmp_path / "pictures" / "three-bootstrap_sheet.png").is_file()
    rows = open_labelled(str(folder), ["blue", ["green", "leafy"], "red"])
    assert [row["id"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 2] and rows[2]["captions"] == ["green"]
    with pytest.raises(PairDataError, match="its 3 classes .* but 10 class names are given"):
        evaluated([*common, "--data", str(folder), "--class_names", "cifar10"])
    with pytest.raises(ValueError, match="--class_names is for the tasks zero_shot and bootstrap, got gap"):
        evaluated([*common, "--data", str(folder), "--class_names", str(names), "--tasks", "gap"])


def test_zero_shot_asks_as_the_classes_are_named(example):
    """(templates, what stands beside a guided picture, whether the aspect is kept) by default, and as told."""
    rows = [{"image": Image.new("RGB", (9, 9)), "captions": ["a dog"], "id": 0}]

    def asked(*told):
        a = evaluation_of(["--model", "m", "--data", "d", *told])
        evaluator = example.TASKS["bootstrap"](a, "split", rows, None)
        guidance = evaluator.protocol["guidance"]
        return len(evaluator.templates), guidance["text"], guidance["score"], evaluator.keep_aspect

    assert asked() == (1, "{}", "guided", False)
    assert asked("--class_names", "imagenet") == (7, "a photo of a {}", "guided", True)
    assert asked("--class_names", "cifar10", "--guided_score", "sum") == (18, "a photo of a {}", "sum", False)
    assert asked("--class_names", "imagenet", "--no-keep_aspect", "--guided_text", "name") == (
        7,
        "{}",
        "guided",
        False,
    )
    assert asked("--templates", "slip") == (7, "a photo of a {}", "guided", False)


def test_class_numbers_of_a_table_are_checked(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    table = tmp_path / "rows.csv"
    table.write_text("file_name,label\na.png,2\na.png,0\n")
    assert [(row["id"], row["captions"]) for row in open_labelled(str(table), ["x", "y", "z"])] == [
        (2, ["z"]), (0, ["x"]),
    ]  # fmt: skip
    with pytest.raises(PairDataError, match=r"a whole number in 0\.\.1, got '2' in row 0"):
        open_labelled(str(table), ["x", "y"])
    with pytest.raises(PairDataError, match="no column 'kind' for the class numbers; columns found: file_name, label"):
        open_labelled(str(table), ["x", "y"], label_column="kind")
    with pytest.raises(PairDataError, match="got 'b' in row 1 and 1 more"):
        class_numbers([1, "b", -1], 2, "here")


def test_a_gallery_is_embedded_once_and_rows_are_spaced(model_directory):
    model = OneRForImageTextRetrieval.from_pretrained(model_directory).eval()
    processor = VisionLanguageProcessor.from_pretrained(model_directory)
    pairs = open_rows(EMOJI / "test_concept.parquet")
    rows = spaced(pairs, 6)
    assert [row["id"] for row in rows] == [number * len(pairs) // 6 for number in range(6)]
    assert spaced(range(3), 5) == [0, 1, 2]
    gallery = Gallery(rows)
    first = gallery_vectors(model, processor, gallery)
    assert gallery_vectors(model, processor, gallery) is first
    assert torch.equal(first, gallery_vectors(model, processor, rows))


def test_pairs_of_one_picture_with_several_texts_are_as_if_it_were_repeated(model_directory):
    model = OneRForImageTextRetrieval.from_pretrained(model_directory).eval()
    processor = VisionLanguageProcessor.from_pretrained(model_directory)
    images = [row["image"] for row in spaced(open_rows(EMOJI / "test_concept.parquet"), 3)]
    texts = ["a dog", "the sun", "a cat", "rain", "a tree", "snow"]
    found = embed_pairs(model, processor, images, texts, batch_size=3, times=2)  # a batch ends inside a picture
    repeated = embed_pairs(model, processor, [image for image in images for _ in range(2)], texts, batch_size=3)
    assert torch.equal(found, repeated)
    with pytest.raises(ValueError, match="got 3 pictures and 6 texts"):
        embed_pairs(model, processor, images, texts)


def test_a_name_on_the_hub_is_stored_with_its_commit(tmp_path, monkeypatch):
    """Loaded from a Hub of our own, as `from_pretrained` does; the next run may be offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing of that name was loaded from the Hub"):
        checkpoint_facts("someone/some-oner")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    server, url = serve()
    try:
        server.RequestHandlerClass.repositories["someone/some-oner"] = {"config.json": b"{}"}
        hf_hub_download("someone/some-oner", "config.json", endpoint=url)
        commit = HfApi(endpoint=url).model_info("someone/some-oner").sha
    finally:
        server.shutdown()
        server.server_close()
    assert checkpoint_facts("someone/some-oner") == {"name": "someone/some-oner", "commit": commit}


def test_results_refuse_what_would_not_be_evidence(tmp_path):
    with pytest.raises(ValueError, match='must name the "split"'):
        write_results(tmp_path / "a.json", {"x": 1.0}, {"task": "t"})
    with pytest.raises(ValueError, match="finite numbers, got {'x': nan}"):
        write_results(tmp_path / "a.json", {"x": float("nan")}, {"split": "s"})
    with pytest.raises(FileNotFoundError, match="holds no"):
        write_results(tmp_path / "a.json", {"x": 1.0}, {"split": "s"}, checkpoint=tmp_path)
    write_results(tmp_path / "results" / "a.json", {"x": 1.0}, {"split": "s"})
    (tmp_path / "results" / "metrics.json").write_text(json.dumps({"metrics": {}}))
    assert list(read_results(tmp_path)) == ["a"]


def test_composed_queries_and_languages(model_directory, tmp_path):
    table = pq.read_table(EMOJI / "test_style.parquet").slice(0, 24)
    pq.write_table(table, tmp_path / "gallery.parquet")
    asked = table.take([20, 21, 22]).select(["image", "text"])
    asked = asked.append_column("kind", pa.array(["add", "add", "swap"]))
    asked = asked.append_column("target", pa.array([0, 4, 8]))
    asked = asked.append_column("choices", pa.array([[0, 1], [4, 5], [8, 9]]))
    pq.write_table(asked.append_column("names", pa.array([["target", "reference"]] * 3)), tmp_path / "asked.parquet")
    common = ["--model", str(model_directory), "--device", "cpu", "--output", str(tmp_path)]
    queries = [*common, "--data", str(tmp_path / "asked.parquet"), "--tasks", "queries"]
    values = evaluated([*queries, "--gallery", str(tmp_path / "gallery.parquet"), "--id_column", "hexcode"])
    assert {"asked/composed_both_r@10", "asked/swap/composed_sum_choice"} <= set(values)
    with pytest.raises(ValueError, match="their --gallery"):
        evaluation_of(queries)

    # two captions a row, of two languages
    both = pa.array([[text, text[::-1]] for text in table["text"].to_pylist()])
    pq.write_table(table.drop_columns(["captions"]).append_column("captions", both), tmp_path / "two.parquet")
    languages = ["--tasks", "languages", "--languages", "en", "backwards", "--ks", "1", "24"]
    values = evaluated([*common, "--data", str(tmp_path / "two.parquet"), "--id_column", "hexcode", *languages])
    assert values["two/backwards/of_en"] == values["two/en/tr_r@24"] == 1
    assert read_results(tmp_path)["two.languages"]["protocol"]["languages"] == ["en", "backwards"]


def test_a_sheet_that_cannot_be_drawn_costs_no_numbers(tmp_path, monkeypatch, capsys):
    """Without matplotlib, of all tasks: those before it have told theirs, and those behind it tell theirs."""

    def told(model, processor):
        yield "gap", 0.5
        raise ImportError("drawing needs matplotlib")

    monkeypatch.setattr(evaluate, "write_results", lambda *_: None)
    options = SimpleNamespace(output=tmp_path, tasks=None, limit=None, gallery=None, class_names=None, model="m")
    facts = {"task": "gap", "split": "pairs", "rows": 1}
    numbers, drawn = evaluate.record(options, facts, SimpleNamespace(run=told), None, None)
    assert (numbers, drawn) == ({"pairs/gap": 0.5}, {})
    assert "pairs: gap ends here, as drawing needs matplotlib" in capsys.readouterr().out
    options.tasks = ["gap"]
    with pytest.raises(ImportError):
        evaluate.record(options, facts, SimpleNamespace(run=told), None, None)
