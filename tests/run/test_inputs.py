"""What a run reads, and what becomes of it between a stop and a resume: nothing changes without a word."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_simla
from tiny_finetuning import DATA, write_simla
from tiny_pretraining import (
    EVERY_STEP,
    assert_same_checkpoint,
    forget_accelerator,
    load_example,
    tiny_arguments,
    write_pairs,
    write_shard,
)

from oner import DiscreteVAE, DiscreteVAEConfig
from oner.processing.data import row_digest
from oner.processing.data.mixture import open_mixture
from oner.processing.data.sources import open_rows
from oner.training.run import building
from oner.training.run.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from oner.training.run.inputs import Inputs
from oner.training.run.parsing import parse_arguments

pytestmark = [pytest.mark.usefixtures("fresh_accelerator")]
EXTRA = 77


def swap(rows: list, extra: list, field: str) -> None:
    rows[3][field], rows[4][field] = rows[4][field], rows[3][field]


CHANGES = {
    "a new letter in a caption": lambda rows, extra: rows[3].update(captions=["zebra qu\u0142artz"]),
    "a caption moves to the next row": lambda rows, extra: rows[4]["captions"].insert(0, rows[3]["captions"].pop()),
    "captions swapped": lambda rows, extra: swap(rows, extra, "captions"),
    "pictures swapped": lambda rows, extra: swap(rows, extra, "image"),
    "a bit of a picture": lambda rows, extra: rows[3]["image"].update(bytes=flipped(rows[3]["image"]["bytes"])),
    "ids swapped": lambda rows, extra: swap(rows, extra, "hexcode"),
    "rows reversed": lambda rows, extra: rows.reverse(),
    "a row for another": lambda rows, extra: rows.__setitem__(3, extra[0]),
    "rows appended": lambda rows, extra: rows.extend(extra[:3]),
}


def flipped(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


def changed(pairs: Path, change: str, target: Path) -> Path:
    table = pq.read_table(pairs)
    rows = table.to_pylist()
    # two captions in the row from which one moves
    rows[3]["captions"] = [*rows[3]["captions"][:1], "another caption"]
    extra = pq.read_table(Path(__file__).parents[2] / "examples/data/emoji/train.parquet").slice(EXTRA, 8).to_pylist()
    if change:
        CHANGES[change](rows, extra)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), target)
    return target


@pytest.fixture(scope="module", params=["table", "shards", "files", "mixture"])
def opened(request, pairs, tmp_path_factory):
    """change -> the rows, from a table, shards, picture files beside a jsonl, or two sources."""

    def open_changed(change: str):
        folder = tmp_path_factory.mktemp("source")
        table = changed(pairs, change, folder / "pairs.parquet")
        rows = [{**row, "key": f"{n:04d}"} for n, row in enumerate(pq.read_table(table).to_pylist())]
        if request.param == "table":
            return open_rows(table, id_column="hexcode")
        if request.param == "shards":
            return open_rows(write_shard(folder / "0.tar", rows), id_column="hexcode")
        if request.param == "mixture":
            first = write_shard(folder / "0.tar", rows[:8])
            pq.write_table(pq.read_table(table).slice(8), folder / "rest.parquet")
            return open_mixture([first, folder / "rest.parquet"], id_column="hexcode")
        lines = []
        for row in rows:
            (folder / f"{row['key']}.png").write_bytes(row["image"]["bytes"])
            told = {"file_name": f"{row['key']}.png", "captions": row["captions"], "hexcode": row["hexcode"]}
            lines.append(json.dumps(told) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
        return open_rows(folder, id_column="hexcode")

    return open_changed


def test_every_change_of_rows_is_another_digest(opened):
    digests = {change: opened(change).digest() for change in ("", *CHANGES)}
    assert len(set(digests.values())) == len(digests), digests
    assert opened("").digest() == digests[""]


def test_a_digest_of_many_rows_looks_into_some_pictures(pairs, monkeypatch):
    rows = open_rows(pairs)
    monkeypatch.setattr(row_digest, "PICTURES", 8)
    taken = []
    monkeypatch.setattr(type(rows), "take", lambda self, numbers: taken.extend(numbers) or [])
    rows.digest()
    assert taken == [0, 5, 10, 15, 20, 25, 30, 35]


# Through the commands


@pytest.fixture(scope="module")
def stopped(family, tmp_path_factory) -> tuple[Path, Path]:
    """Pairs, and the directory of a run over them that has only the checkpoint of its fifth step of ten."""
    forget_accelerator()
    folder = tmp_path_factory.mktemp("stopped")
    pairs = write_pairs(folder / "pairs.parquet")
    load_example("pretrain").main(tiny_arguments(pairs, folder / "whole", family.name, **EVERY_STEP))
    forget_accelerator()
    shutil.copytree(folder / "whole", folder / "run", ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    shutil.copytree(folder / "whole" / "checkpoint-00000005", folder / "run" / "checkpoint-00000005")
    return pairs, folder


@pytest.mark.parametrize("change", ["a new letter in a caption", "pictures swapped"])
def test_a_resume_over_changed_rows_is_refused_and_where_allowed_keeps_its_words(
    family, stopped, tmp_path, change, caplog
):
    pairs, folder = stopped
    example = load_example("pretrain")
    before = pairs.read_bytes()
    line = [*tiny_arguments(pairs, shutil.copytree(folder / "run", tmp_path / "run"), family.name, **EVERY_STEP)]
    changed(pairs, change, pairs)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-00000005 was trained on other inputs.*rows of pairs"):
            example.main([*line, "--resume"])
        assert not (tmp_path / "run" / "model").exists()
        forget_accelerator()
        with caplog.at_level(logging.WARNING):
            example.main([*line, "--resume", "--allow_changes"])
    finally:
        pairs.write_bytes(before)
    assert "with other inputs; rows of pairs" in caplog.text
    words = [(path / "model" / "tokenizer.json").read_bytes() for path in (folder / "whole", tmp_path / "run")]
    assert words[0] == words[1]


def test_a_resume_reads_the_tokenizer_of_its_run_and_ends_as_without_a_stop(family, stopped, tmp_path, monkeypatch):
    pairs, folder = stopped
    run = shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.setattr(building, "train_tokenizer", None)  # not called
    load_example("pretrain").main([*tiny_arguments(pairs, run, family.name, **EVERY_STEP), "--resume"])
    assert_same_checkpoint(list_checkpoints(folder / "whole")[-1], list_checkpoints(run)[-1])
    for file in (folder / "whole" / "model").iterdir():
        if file.suffix == ".json" or file.suffix == ".safetensors":
            assert file.read_bytes() == (run / "model" / file.name).read_bytes(), file.name


def test_a_finished_run_is_not_exported_again_with_other_words(example, pairs, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    export = {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}
    before = pairs.read_bytes()
    changed(pairs, "a new letter in a caption", pairs)
    try:
        with pytest.raises(CheckpointError, match="other inputs than there are now; rows of pairs"):
            example.main([*tiny_arguments(pairs, run, **EVERY_STEP), "--resume"])
    finally:
        pairs.write_bytes(before)
    assert {path: path.read_bytes() for path in export} == export


def test_a_swapped_tokenizer_of_the_run_is_named(example, pairs, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    file = run / "tokenizer" / "tokenizer.json"
    told = json.loads(file.read_text())
    words = [word for word in told["model"]["vocab"] if not word.startswith("[")]
    first, last = words[0], words[-1]
    vocab = told["model"]["vocab"]
    vocab[first], vocab[last] = vocab[last], vocab[first]
    file.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="other inputs than there are now; tokenizer of the run differs"):
        example.main([*tiny_arguments(pairs, run, **EVERY_STEP), "--resume"])


def test_a_checkpoint_that_does_not_name_its_inputs_goes_on_with_a_warning(
    example, pairs, undisturbed, tmp_path, caplog
):
    tensors, state = load_checkpoint(undisturbed / "checkpoint-00000009")
    state.pop("inputs")
    save_checkpoint(tmp_path, 9, tensors, state)
    with caplog.at_level(logging.WARNING):
        example.main([*tiny_arguments(pairs, tmp_path, **EVERY_STEP), "--resume"])
    assert "does not record its inputs" in caplog.text


def test_another_image_tokenizer_at_the_same_path_is_named(pairs, tmp_path):
    def write(bias: float) -> None:
        config = DiscreteVAEConfig(
            num_codes=tiny_simla.CODES, hidden_size=8, blocks_per_group=1, codebook_dim=8, image_size=16, decoder=False
        )
        model = DiscreteVAE(config)
        next(model.parameters()).data.fill_(bias)
        model.save_pretrained(tmp_path / "codes")

    write(0.1)
    example = load_example("pretrain")
    line = tiny_arguments(
        pairs, tmp_path / "run", "simla", image_tokenizer=tmp_path / "codes", max_steps=2, **EVERY_STEP
    )
    example.main(line)
    write(0.2)
    forget_accelerator()
    with pytest.raises(CheckpointError, match=r"image_tokenizer .*codes differs"):
        example.main([*line, "--resume"])


@pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning")
@pytest.mark.parametrize("what", ["initial_model", "rows of pairs", "rows of evaluation"])
def test_fine_tuning_over_other_inputs_is_named(tmp_path, what):
    initial = write_simla(tmp_path / "initial")
    forget_accelerator()
    (tmp_path / "data").mkdir()
    told = DATA["retrieval"](tmp_path / "data")
    fields = {
        "task": "retrieval",
        "initial_model": initial,
        "batch_size": 4,
        "max_steps": 1,
        "num_workers": 0,
        "mixed_precision": "no",
        "eval_limit": 4,
        "output_dir": tmp_path / "run",
        **told,
    }
    line = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    example = load_example("finetune")
    example.main(line)
    forget_accelerator()
    if what == "initial_model":
        file = initial / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] = dict(
            zip(content["model"]["vocab"], reversed(content["model"]["vocab"].values()), strict=True)
        )
        file.write_text(json.dumps(content))
        (initial / "digests.json").unlink()
    else:
        # one file holds both: the first picture is trained on, the last is measured on
        file = Path(told["train_data"])
        content = file.read_text()
        place = (content.index if what == "rows of pairs" else content.rindex)('"raw": "') + 8
        file.write_text(content[:place] + "x" + content[place + 1 :])
    with pytest.raises(CheckpointError, match=f"other inputs than there are now.*{what}"):
        example.main([*line, "--resume"])


# A file that was replaced, with its time of change


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "tar"])
def test_a_replaced_file_of_the_same_time_and_length_is_read_anew(pairs, tmp_path, ending):
    picture = pq.read_table(pairs).to_pylist()[0]["image"]["bytes"]
    (tmp_path / "0.png").write_bytes(picture)
    path = tmp_path / f"pairs.{ending}"

    def put(word: str) -> list[str]:
        if ending == "csv":
            path.write_text(f"file_name,text\n0.png,{word}\n")
        elif ending == "jsonl":
            path.write_text(json.dumps({"file_name": "0.png", "text": word}) + "\n")
        elif ending == "parquet":
            pq.write_table(pa.table({"file_name": ["0.png"], "text": [word]}), path)
        else:
            write_shard(path, [{"key": "0", "captions": [word], "hexcode": "0", "image": {"bytes": picture}}])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        return open_rows(path)[0]["captions"]

    assert put("apple") == ["apple"]
    time.sleep(0.02)  # a file system counts time in ticks
    assert put("grape") == ["grape"]


def test_inputs_that_are_new_or_gone_are_named(pairs, tmp_path):
    arguments = parse_arguments(tiny_arguments(pairs, tmp_path))
    inputs = Inputs(arguments, {"pairs": open_rows(pairs)})
    (name,) = inputs.digests
    with pytest.raises(CheckpointError, match="codes is not read now; rows of pairs .* is new"):
        inputs.check(tmp_path, {"codes": "0"}, allow_changes=False)
    inputs.check(tmp_path, {name: inputs.digests[name]}, allow_changes=False)
