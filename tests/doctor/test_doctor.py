"""`oner doctor` on tiny runs: a healthy one says nothing, and each made ill on purpose names its illness.

An ill run differs from the healthy one by what the cure takes back, so that the healthy one shows that the cure works.
"""

import io
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import FAMILIES
from PIL import Image
from safetensors.torch import load_file
from tiny_pretraining import forget_accelerator, tiny_arguments

from oner import DiscreteVAE, DiscreteVAEConfig
from oner.processing.data.training_sets import PairTrainingSet
from oner.training.doctor.command import examine, word
from oner.training.doctor.findings import (
    codes_dead,
    codes_unused,
    directions,
    equal_captions,
    equal_pictures,
    matching_says_no,
    near_duplicates,
    overfitted,
    plans_even,
    recent,
    teacher_behind,
    temperature_at_bound,
    waits_for_data,
)
from oner.training.doctor.reading import read_run, read_sample, teacher_distance
from oner.training.objectives.objective import objective_classes, under
from oner.training.publishing.public import plain
from oner.training.run.checkpoint import list_checkpoints
from oner.training.run.parsing import parse_arguments
from oner_command_line import main as command_line

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (230, 220, 40),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "violet": (150, 40, 200),
    "grey": (128, 128, 128),
}
HEALTHY = {
    "epochs": 20,
    "warmup_epochs": 2,
    "ema_momentum": 0.9,
    "match_ids": True,
    "crop_scale": [1, 1],
    "log_every": 4,
    "save_every_epochs": 20,
    "code_crop": None,
    "image_tokenizer": None,
}
# family -> what it needs to tell eight colours apart within a hundred steps
LEARNS = {
    "oner": {
        "losses": ["itc"],
        "base_learning_rate": 0.1,
        "model_config": {
            "projector_layers": 1,
            "predictor_layers": 0,
            "scale_word_embeddings": True,
            "temperature": 0.07,
        },
    },
    "simla": {
        "losses": ["itc", "itm"],
        "base_learning_rate": 0.2,
        "queue_size": 8,
        "model_config": {
            "initializer_range": 0.1,
            "sep_token_id": None,
            "hidden_dropout": 0.0,
            "text_attention_dropout": 0.0,
        },
    },
}
LEARNS["codis"] = {**LEARNS["simla"], "losses": ["itc", "code", "itm"]}
LEARNS["momo"] = {"losses": ["itc"], "base_learning_rate": 0.1, "corruption": "drop", "model_config": {"decoders": []}}
# ten steps show what is wrong from the start
SHORT = {"epochs": 2, "warmup_epochs": 0, "log_every": 1}
# illness -> what makes a run of any family ill of it
ILL = {
    "contrast knows nothing": {"base_learning_rate": 1e-9},
    "teacher far behind": {"ema_momentum": 0.999},
    "pictures collapsed": {"same": "image"},
    "texts collapsed": {"same": "captions"},
    "near duplicates among the negatives": {"id_column": "number"},
    "words without a token": {"words": ["a", "square"]},
    "waits for data": {"delay": 0.3, "max_steps": 6},
}
# and one of SIMLA, for losses and a temperature that OneR lacks
ILL_OF_SIMLA = {
    "matching says no to everything": {"base_learning_rate": 1e-9},
    "temperature at its lower bound": {"model_config": {"temperature_range": [0.0699, 0.2]}, "base_learning_rate": 0},
    "temperature at its upper bound": {"model_config": {"temperature_range": [0.01, 0.0701]}, "base_learning_rate": 0},
    "dead codes": {"codes": 24, "losses": ["itc", "itm", "mim"], "code_crop": "common"},
}
# and of a codebook: ten steps in which features lie together, or all are one
ILL_OF_CODIS = {
    "dead codes": {"base_learning_rate": 1e-9},
    "plans of transport tell nothing": {"same": "image"},
}


def write_colours(path: Path, shift: int = 0) -> Path:
    """Forty squares of eight colours, named by the colour `shift` places further on."""
    rows = []
    names = list(COLOURS)
    for number in range(40):
        place = number % len(names)
        noise = np.random.default_rng(number).integers(-10, 10, (32, 32, 3))
        pixels = (np.array(COLOURS[names[place]]) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        name = names[(place + shift) % len(names)]
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"image": image, "captions": [f"a {name} square"], "hexcode": name, "number": str(number)})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def command(family, directory: Path, **options) -> list[str]:
    """A run in `directory`/run; of the model's configuration, what `options` say comes on top."""
    learns = LEARNS[family.name]
    fields = {**HEALTHY, **learns, **options}
    fields["model_config"] = {**learns["model_config"], **options.get("model_config", {})}
    if not family.has_teacher:
        fields.pop("ema_momentum", None)
    return tiny_arguments(directory / "pairs.parquet", directory / "run", family.name, **fields)


def make_ill(folder: Path, monkeypatch, **how) -> dict:
    """Arguments of a run, with what is no argument made: data, a vocabulary, a tokenizer of one code, a slow disk."""
    write_colours(folder / "pairs.parquet")
    if column := how.pop("same", None):
        table = pq.read_table(folder / "pairs.parquet")
        cells = pa.array([table[column][0].as_py()] * len(table), table[column].type)
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, column, cells), folder / "pairs.parquet")
    if words := how.pop("words", None):
        special = ["[PAD]", "[IMG]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (folder / "vocab.txt").write_text("\n".join([*special, *words]))
        how["tokenizer"] = folder / "vocab.txt"
    if codes := how.pop("codes", None):
        shape = {"hidden_size": 8, "blocks_per_group": 1, "codebook_dim": 8, "image_size": 16}
        tokenizer = DiscreteVAE(DiscreteVAEConfig(num_codes=codes, decoder=False, **shape))
        tokenizer.encoder.output.bias.data[3] = 1e4
        tokenizer.save_pretrained(folder / "tokenizer")
        how["image_tokenizer"] = folder / "tokenizer"
    if delay := how.pop("delay", None):
        read = PairTrainingSet.__getitems__

        def slowly(self, keys):
            time.sleep(delay)
            return read(self, keys)

        monkeypatch.setattr(PairTrainingSet, "__getitems__", slowly)
    return {**SHORT, **how}


def names(directory: Path) -> list[str]:
    return [finding.name for finding in examine(directory)[0]]


@pytest.fixture(scope="module")
def healthy(family, example, tmp_path_factory) -> Path:
    forget_accelerator()
    directory = tmp_path_factory.mktemp("healthy")
    write_colours(directory / "pairs.parquet")
    example.main(command(family, directory))
    return directory / "run"


def test_a_healthy_run_says_nothing(healthy, capsys):
    assert examine(healthy) == ([], [])
    assert word(healthy) == "doctor: nothing found"
    assert command_line(["doctor", str(healthy)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing found"
    waited = [json.loads(line)["waited_per_second"] for line in (healthy / "log.jsonl").read_text().splitlines()]
    assert len(waited) == 25 and all(0 < share < 1 for share in waited)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning")
@pytest.mark.parametrize("illness", ILL)
def test_an_ill_run_names_its_illness(family, illness, example, tmp_path, monkeypatch, capsys):
    if illness == "teacher far behind" and not family.has_teacher:
        pytest.skip("has no teacher")
    example.main(command(family, tmp_path, **make_ill(tmp_path, monkeypatch, **ILL[illness])))
    # the run's own last word, and the command's status
    assert illness in capsys.readouterr().out.splitlines()[-1]
    assert command_line(["doctor", str(tmp_path / "run"), "--json"]) == 1
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert all(found[illness][part] for part in ("measured", "expected", "cure"))


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("illness", ILL_OF_SIMLA)
def test_an_ill_simla_names_its_illness(illness, example, tmp_path, monkeypatch):
    example.main(command(FAMILIES["simla"], tmp_path, **make_ill(tmp_path, monkeypatch, **ILL_OF_SIMLA[illness])))
    assert illness in names(tmp_path / "run")


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("illness", ILL_OF_CODIS)
def test_an_ill_codebook_names_its_illness(illness, example, tmp_path, monkeypatch):
    example.main(command(FAMILIES["codis"], tmp_path, **make_ill(tmp_path, monkeypatch, **ILL_OF_CODIS[illness])))
    assert illness in names(tmp_path / "run")


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_concept_may_come_late_behind_many_pictures_of_others(example, tmp_path):
    """Its codes are looked at beside its own row, though captions of one concept are one text to retrieval."""
    write_colours(tmp_path / "pairs.parquet")
    pq.write_table(pq.read_table(tmp_path / "pairs.parquet").sort_by("hexcode"), tmp_path / "pairs.parquet")
    example.main(command(FAMILIES["codis"], tmp_path, max_steps=2))
    sample = read_sample(read_run(tmp_path / "run"))
    assert len(sample.captions) == 40 and all(len(vectors) == 40 for vectors in sample.embeddings.values())
    assert len(sample.nearest) == 2 * 8


def test_rows_known_by_heart_alone_are_overfitting(family, healthy, tmp_path):
    """The healthy run, told to be judged by rows in which every word means another colour."""
    if family.name == "momo":
        pytest.skip("knows nothing by heart after so few steps, of which it drops most of what it could read")
    run = shutil.copytree(healthy, tmp_path / "run")
    state = list_checkpoints(run)[-1] / "state.json"
    values = json.loads(state.read_text())
    values["arguments"]["eval_data"] = [str(write_colours(tmp_path / "others.parquet", shift=4))]
    state.write_text(json.dumps(values))
    assert names(run) == ["overfitting"]
    values["arguments"]["eval_data"] = [str(write_colours(tmp_path / "alike.parquet"))]
    state.write_text(json.dumps(values))
    assert names(run) == []


def test_a_run_that_goes_on_is_read_as_far_as_it_is(healthy, tmp_path, capsys):
    run = shutil.copytree(healthy, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 104, "lo')
    assert len(read_run(run).lines) == 25
    found, notes = examine(run)
    assert not found and "no model yet" in notes[0]
    # data that have gone leave log and checkpoint to look at
    (healthy.parent / "pairs.parquet").rename(healthy.parent / "elsewhere.parquet")
    try:
        found, notes = examine(run)
    finally:
        (healthy.parent / "elsewhere.parquet").rename(healthy.parent / "pairs.parquet")
    assert not found and "pairs.parquet" in notes[1]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert command_line(["doctor", str(tmp_path)]) == 2
    assert "log.jsonl: no such file" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert command_line(["doctor", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("step one\n")
    assert command_line(["doctor", str(tmp_path)]) == 2
    assert command_line(["doctor", str(tmp_path), "--no_such_thing"]) == 2
    assert word(tmp_path).startswith("doctor: could not check")


@pytest.mark.parametrize("processes", [1, 2])
def test_what_knowing_nothing_costs(processes):
    """One pair and two strangers a row: H(1/3); and as many keys as a process compares with."""
    objective, kind = objective_classes("simla")
    told = objective.uninformed(kind(queue_size=100), 8, processes)
    entropy = math.log(3) / 3 + 2 * math.log(3 / 2) / 3
    assert told["itm"] == pytest.approx(entropy) and entropy == pytest.approx(0.6365, abs=1e-4)
    assert told["itc"] == pytest.approx(math.log(100 + 8 / processes))
    objective, kind = objective_classes("oner")
    assert objective.uninformed(kind(), 8, processes)["cmc"] == pytest.approx(math.log(8))
    assert not objective.uninformed(kind(scale_by_temperature=True), 8, processes)


def test_contrast_is_of_the_pairs_whose_portion_an_epoch_is_not(tmp_path):
    """MoMo's third stage counts epochs of texts, of which a batch may hold more."""
    told = plain(parse_arguments(["--config", "momo_small_stage3", "--output_dir", str(tmp_path)]).to_dict())
    told["portions"]["pairs"]["batch_size"] = 16
    assert told["epoch_portion"] == "texts" and told["portions"]["texts"]["batch_size"] == 64
    (tmp_path / "model" / "results").mkdir(parents=True)
    (tmp_path / "model" / "results" / "training_config.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "itc": 2.7}) + "\n", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.uninformed == {"itc": pytest.approx(math.log(16))} and run.negatives == 15


def test_teacher_and_student_apart(family, healthy):
    """As by hand, over the weights that both have."""
    if not family.has_teacher:
        pytest.skip("has no teacher")
    checkpoint = list_checkpoints(healthy)[-1]
    student = load_file(checkpoint / "model.safetensors")
    teacher = under("teacher.", load_file(checkpoint / "objective.safetensors"))
    shared = [name for name in teacher if name in student and "running" not in name and "num_batches" not in name]
    assert len(shared) > 10
    flat, kept = (torch.cat([side[name].flatten().double() for name in shared]) for side in (student, teacher))
    assert teacher_distance(checkpoint) == pytest.approx(((flat - kept).norm() / flat.norm()).item())


def test_the_end_of_a_log_is_what_counts():
    lines = [{"itm": value} for value in (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.3)] + [{"eval/r_mean": 1.0}]
    assert recent(lines, "itm") == pytest.approx(0.4)
    assert recent(lines[:3], "itm") is None and recent(lines, "itc") is None
    assert matching_says_no(lines, {"itm": 0.6365}) is None
    assert matching_says_no(lines[:6], {"itm": 0.6365}).measured.startswith("itm 0.900")
    assert matching_says_no(lines[:6], {}) is None
    # the first line has the start of the workers in it
    assert waits_for_data([{"waited_per_second": share} for share in (0.9, 0.1, 0.1, 0.1, 0.1)], 2) is None


def test_directions_of_unit_vectors():
    assert directions(torch.eye(5)[:3]) == pytest.approx(3)
    assert directions(torch.eye(5)[[0, 0, 0]]) == pytest.approx(1)
    # two clouds of equal size, each one vector
    assert directions(torch.eye(5)[[0, 1, 0, 1]]) == pytest.approx(2)


def test_pairs_of_equal_captions():
    """By hand: every two rows of other ids, each of its captions against each of the other's."""
    captions = [["A dog", "a cat"], ["a  dog"], ["a dog"], ["a cat"], ["a bird"]]
    ids = ["x", "y", "y", "z", "z"]
    # (0, 1), (0, 2) agree when row 0 draws the dog; (0, 3) when it draws the cat; (1, 2) are one thing
    assert equal_captions(captions, ids) == pytest.approx(0.5 + 0.5 + 0.5)
    assert equal_captions(captions, range(5)) == pytest.approx(2.5)


def test_pairs_of_equal_pictures():
    pictures = torch.tensor([[0.0, 0.0], [0.01, 0.0], [0.0, 0.01], [1.0, 1.0]])
    assert equal_pictures(pictures, range(4)) == 3
    assert equal_pictures(pictures, ["a", "a", "b", "c"]) == 2
    assert near_duplicates(0, 2, 4, 100) is None  # two pairs may be chance
    assert near_duplicates(0, 3, 4, 1).name.startswith("near duplicates")
    assert near_duplicates(0, 3, 1000, 100) is None


def test_thresholds_of_what_a_checkpoint_shows():
    assert teacher_behind(0.99, 300, 0.1) is None
    assert "96%" in teacher_behind(0.996, 10, 0.1).measured
    assert temperature_at_bound(0.07, (0.001, 0.5)) is None
    assert temperature_at_bound(0.001, (0.001, 0.5)).name == "temperature at its lower bound"
    assert temperature_at_bound(0.5, (0.001, 0.5)).name == "temperature at its upper bound"
    assert overfitted(0.9, 0.3, 100) is None and overfitted(0.3, 0.0, 100) is None
    assert overfitted(0.9, 0.1, 100).name == "overfitting"


def test_codes_are_judged_by_what_a_sample_can_hold():
    """Four places cannot hold five hundred codes; and a code that is in every place is all that there is."""
    assert codes_dead(torch.arange(4), 512) is None
    found = codes_dead(torch.zeros(40, 16, dtype=torch.long), 512)
    assert found.measured == "1 of 512 codes in 640 positions, entropy 0.00 nats"


def test_a_log_tells_of_codes_and_plans():
    """128 features among 128 codes: an even choice has 81 of them nearest of any; all plans even have log 128."""
    lines = [{"codes_used": share, "plan_entropy": 4.8} for share in (0.9, 0.9, 0.9, 0.25)]
    found = codes_unused(lines, 128, 128)
    assert found.measured.startswith("32.0 of 128 codes") and found.expected.endswith("gives 81.1")
    assert codes_unused(lines[:3] + lines[:1], 128, 128) is None and codes_unused(lines[:3], 128, 128) is None
    # eight features can use eight codes at most, and a share is of these
    assert codes_unused([{"codes_used": 0.6}] * 4, 128, 8) is None
    assert "4.80 at the end" in plans_even(recent(lines, "plan_entropy"), 128, "at the end").measured
    assert plans_even(4.7, 128, "") is None and plans_even(None, 128, "") is None
