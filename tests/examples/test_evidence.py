"""The evidence runner: rows as commands, skipping what is done, the CLIP baseline, and the text of the tables."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from oner import OneRConfig
from oner.training.run.parsing import parse_arguments, read_config

TINY = ["hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "image_size=32", "projection_dim=16"]
TINY += ["batch_size=8", "vocab_size=300", "log_every=1"]
PAPER_ROWS = {
    "itc": ["itc", "mlm", "mim"],
    "itc_two_heads": ["itc", "mlm", "mim"],
    "itc_xmc": ["itc", "xmc", "mlm", "mim"],
    "itc_xmc_cic": ["itc", "xmc", "cic", "mlm", "mim"],
    "itc_cmc": ["itc", "cmc", "mlm", "mim"],
    "no_mim": ["itc", "cmc", "mlm"],
    "no_mim_mlm": ["itc", "cmc"],
}


@pytest.fixture(scope="module", autouse=True)
def examples_on_path(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root / "examples"))
    yield
    sys.path.remove(str(root / "examples"))


@pytest.fixture(scope="module")
def few(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen concepts of the emoji set: their training pictures and their pictures in the unseen style."""
    folder = tmp_path_factory.mktemp("few")
    test = pd.read_parquet(emoji_folder / "test_style.parquet").head(16)
    train = pd.read_parquet(emoji_folder / "train.parquet")
    test.to_parquet(folder / "test.parquet")
    train[train.hexcode.isin(test.hexcode)].to_parquet(folder / "train.parquet")
    return folder


def options(few: Path, output: Path, *rows: str) -> list[str]:
    arguments = ["--rows", *rows, "--steps", "2", "--jobs", "1", "--threads", "1", "--output", str(output)]
    arguments += ["--docs", str(output / "docs"), "--data", str(few / "test.parquet")]
    arguments += ["--gallery", str(few / "train.parquet")]
    return [*arguments, "--set", f"train_data={json.dumps([str(few / 'train.parquet')])}", *TINY]


def made_up(row: str, title: str, seed: int, score: float, multimodal: bool = True) -> dict:
    """A result as the runner writes it; the numbers are inputs of the table's test, not measurements."""
    values = {f"{c}/{w}_{n}@{k}": score for c in ("first", "all") for w in ("tr", "ir") for n in ("r", "chance")
              for k in (1, 5, 10)}  # fmt: skip
    values |= {"gap/distance": score, "gap/cosine_paired": 0.5, "gap/cosine_unpaired": 0.25}
    values |= {"gap/centroid_separability": 0.75}
    if multimodal:
        values |= {f"joint/multimodal_{kind}_r@10": score for kind in ("both", "image", "text")}
        values["joint/multimodal_chance@10"] = 0.1
    machine = {"processor": "abacus", "cores": 2, "versions": {"torch": "0"}}
    sizes = {"parameters": 2_000_000, "pairs": 1234, "steps": 10, "train_seconds": 60.0, "wall_seconds": 90.0}
    sizes["resumed"] = seed == 1
    named = {"row": row, "title": title, "seed": seed, "command": ["python", "x y"], "machine": machine}
    return {**named, **sizes, "values": values}


def test_itc_weighted_double_has_the_weight_of_itc_and_cmc(root: Path) -> None:
    def contrast(row: str) -> float:
        told = parse_arguments(["--config", str(root / "examples" / "configs" / f"oner_emoji_{row}.yaml")]).objective
        return sum((told.loss_weights or {}).get(name, 1) for name in told.losses if name in ("itc", "cmc"))

    assert contrast("itc_double") == contrast("itc_cmc") == 2 * contrast("itc")


@pytest.mark.parametrize("table", ["emoji", "table6"])
@pytest.mark.parametrize("row", PAPER_ROWS)
def test_every_row_of_the_papers_tables_is_a_configuration(root: Path, row: str, table: str) -> None:
    prefix = "oner_table7_" if table == "table6" and row.startswith("no_") else f"oner_{table}_"
    arguments = parse_arguments(["--config", str(root / "examples" / "configs" / f"{prefix}{row}.yaml")])
    assert arguments.objective.losses == PAPER_ROWS[row]
    assert (arguments.model.model_config or {}).get("two_heads", False) == (row == "itc_two_heads")
    base = read_config(
        root / "examples" / "configs" / ("oner_emoji.yaml" if table == "emoji" else "oner_base_224.yaml")
    )
    assert arguments.run.batch_size == base.get("batch_size", 4096)


def test_a_row_becomes_a_command_with_its_changes(few: Path, tmp_path: Path) -> None:
    import evidence

    row = "itc_two_heads:head_norm=layer,temperature=0.07,batch_size=4"
    (run,) = evidence.plan(evidence.parse(options(few, tmp_path, row)))
    command = run.command(threads=1)
    parsed = parse_arguments(command[command.index("--config") :])
    assert parsed.run.max_steps == 2 and parsed.run.batch_size == 4 and parsed.run.seed == 0
    told = parsed.model.model_config
    assert told["two_heads"] is True and told["head_norm"] == "layer" and told["temperature"] == 0.07
    assert told["max_text_length"] == 32, "the configuration's own fields stay"
    assert parsed.data.train_data == [str(few / "train.parquet")]


def test_every_question_parses(few: Path, tmp_path: Path) -> None:
    import evidence

    runs = evidence.plan(evidence.parse([*options(few, tmp_path, "itc"), "--questions"]))
    assert len(runs) == 1 + len(evidence.QUESTIONS)
    for run in runs:
        command = run.command(threads=1)
        arguments = parse_arguments(command[command.index("--config") :])
        OneRConfig.from_size(arguments.model.size, **arguments.model.model_config)


def test_unknown_rows_and_changes_are_refused(few: Path, tmp_path: Path) -> None:
    import evidence

    with pytest.raises(ValueError, match="unknown row 'itm'; expected one of clip, itc"):
        evidence.main(options(few, tmp_path, "itm"))
    with pytest.raises(ValueError, match="expected key=value, got 'layer'"):
        evidence.main(options(few, tmp_path, "itc:layer"))


def test_clip_reads_the_processors_layout() -> None:
    pytest.importorskip("open_clip")
    from clip_baseline import ClipBaseline

    config = OneRConfig.from_size(
        "nano", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, projection_dim=16,
        cls_token_id=3, mask_token_id=4, max_text_length=6, image_size=32,
    )  # fmt: skip
    model = ClipBaseline(config).eval()
    assert len(model.clip.visual.transformer.resblocks) == len(model.clip.transformer.resblocks) == 2
    text = torch.tensor([[3, 10, 11, 12, 0], [3, 20, 0, 0, 0]])
    patches = torch.full((2, 4), config.image_token_id)
    joint = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
    ids = model.clip_ids(text, (text != 0).long())
    assert ids.tolist() == [[3, 10, 11, 12, 50, 0], [3, 20, 50, 0, 0, 0]]
    assert torch.equal(ids, model.clip_ids(joint, (joint != 0).long()))
    whole = torch.nn.functional.pad(ids, (0, model.clip.context_length - ids.shape[1]))
    torch.testing.assert_close(model.encode_text(ids), model.clip.encode_text(whole))
    with pytest.raises(ValueError, match="a text of 9 tokens.* in 8 places"):
        model.encode_text(torch.zeros(1, 9, dtype=torch.long))


def test_clip_learns_a_batch_and_keeps_its_temperature_in_bounds() -> None:
    pytest.importorskip("open_clip")
    from clip_baseline import MAX_LOGIT_SCALE, ClipBaseline, ClipObjective

    config = OneRConfig.from_size(
        "nano", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, projection_dim=16,
        cls_token_id=3, mask_token_id=4, max_text_length=6, image_size=32,
    )  # fmt: skip
    model = ClipBaseline(config)
    objective = ClipObjective(model)
    ids = torch.cat([torch.full((8, 1), 3), torch.arange(10, 34).view(8, 3)], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(8, 3, 32, 32)}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, parts, kept = objective(model, batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(kept=kept)
        losses.append(parts["clip"].item())
    assert abs(losses[0] - math.log(8)) < 1.5 and losses[-1] < 0.1
    model.clip.logit_scale.data.fill_(9.0)
    objective.after_step(kept=kept)
    assert model.clip.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    from evidence import TABLES
    from evidence_table import BEGIN, END, write_evidence

    oner = TABLES["oner"]
    contents = [made_up("itc", "ITC", 0, 0.1), made_up("itc", "ITC", 1, 0.3), made_up("clip", "CLIP", 0, 0.2, False)]
    facts = {"command": ["python", "examples/evidence.py"], "jobs": 1, "threads": 2}
    facts |= {"data": "test.parquet", "pictures": 16, "gallery": "train.parquet"}
    table = write_evidence(tmp_path, contents, facts, oner)
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()
    }
    assert lines["ITC"][0] == "20.0 ± 14.1" and lines["ITC"][6] == "0.20 ± 0.14", "mean and deviation over seeds"
    assert lines["ITC"][-1] == "0.8 / 0.7" and lines["CLIP"][0] == "20.0"
    assert {len(cells) for cells in lines.values()} == {10}
    page = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert page.count("not possible") == 3 and "abacus, 2 cores" in page and "1,234" in page and "'x y'" in page
    assert "| ITC | 0, 1 | 2.0 M | 1,234 | 1.0 ± 0.0 | not known, resumed |" in page
    assert len(json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))["rows"]) == 3

    edited = page.replace(BEGIN, f"Above.\n{BEGIN}").replace(END, f"{END}\nWhat we make of it.")
    (tmp_path / "evidence.md").write_text(edited, encoding="utf-8")
    write_evidence(tmp_path, contents, facts, oner)
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == edited, "what stands outside the marks is kept"
    (tmp_path / "evidence.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_evidence(tmp_path, contents, facts, oner)


def reranked(row: str, title: str, **log: float) -> dict:
    """A result of a family that matches pairs; the numbers are inputs of a test."""
    content = made_up(row, title, 0, 0.1)
    ranked = {f"first/rerank_{way}_r@{k}": 0.25 for way in ("tr", "ir") for k in (1, 5, 10)}
    content["values"] |= ranked | {f"first/rerank_{way}_reach": 0.5 for way in ("tr", "ir")}
    content["values"] |= {f"log/{name}": value for name, value in log.items()}
    return content


@pytest.mark.parametrize(
    ("table", "row", "paper"), [("simla", "simla_full", "86.2 / 69.5"), ("codis", "codis_full", "71.1 / 52.1")]
)
def test_a_table_of_re_ranking_has_both_stages(tmp_path: Path, table: str, row: str, paper: str) -> None:
    from evidence import TABLES
    from evidence_table import write_evidence

    assert row in TABLES[table].rows and len(TABLES[table].rows) == 5
    facts = {"command": ["python", "examples/evidence.py"], "jobs": 1, "threads": 2, "rerank_k": 128}
    facts |= {"data": "test.parquet", "pictures": 16, "gallery": "train.parquet"}
    printed = write_evidence(tmp_path, [reranked(row, "All")], facts, TABLES[table])
    assert f"| All | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | {paper} |" in printed
    page = (tmp_path / f"evidence_{table}.md").read_text(encoding="utf-8")
    assert "| All | 10.0 | 10.0 | 10.0 | 10.0 | 50.0 | 50.0 |" in page and "128 candidates" in page


def test_codes_and_plans_stand_beside_rows_that_have_them(few: Path, tmp_path: Path) -> None:
    import evidence
    from evidence_table_codis import codes_table

    (run,) = evidence.plan(evidence.parse([*options(few, tmp_path, "codis_full"), "--table", "codis", "--seeds", "0"]))
    run.directory.mkdir(parents=True)
    # a resumed run tells of step 2 twice
    told = [(1, 0.25, 2.0), (2, 0.9, 9.0), (2, 0.75, 4.0)]
    lines = [{"step": step, "codes_used": used, "plan_entropy": entropy} for step, used, entropy in told]
    log = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 1.0}])
    (run.directory / "log.jsonl").write_text(log, encoding="utf-8")
    assert evidence.watched(run) == {"log/codes_used": 0.5, "log/plan_entropy": 3.0}

    table = codes_table(
        [reranked("codis_full", "All", codes_used=0.5, plan_entropy=3.0), reranked("codis_cross", "C")]
    )
    assert "| All | 50.0 | 3.00 |" in table and "| C |" not in table


def test_rows_are_trained_evaluated_and_not_repeated(few: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    pytest.importorskip("open_clip")
    import evidence

    command, failing = evidence.Run.command, [sys.executable, "-c", "raise SystemExit('no power')"]
    monkeypatch.setattr(
        evidence.Run, "command", lambda run, threads: failing if run.name == "itc" else command(run, threads)
    )
    assert evidence.main(options(few, tmp_path, "itc", "itc_cmc", "clip")) == 1
    printed = "".join(capfd.readouterr())
    assert "FAILED itc, seed 0: the training ended with code 1" in printed and "no power" in printed
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["clip-seed0.json", "itc_cmc-seed0.json"]
    results = [json.loads((tmp_path / f"{row}-seed0.json").read_text(encoding="utf-8")) for row in ("itc_cmc", "clip")]
    assert [result["pairs"] for result in results] == [16, 16]
    assert all(0 <= result["values"]["first/tr_r@10"] <= 1 and result["train_seconds"] > 0 for result in results)
    assert "joint/multimodal_both_r@10" in results[0]["values"]
    page = (tmp_path / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert "ITC + CMC (OneR)" in page and "CLIP (open_clip, two towers)" in page and "| ITC |" not in page

    monkeypatch.setattr(evidence, "work", lambda *_: pytest.fail("a finished row was trained again"))
    told = options(few, tmp_path, "itc_cmc", "clip")
    assert evidence.main(told) == 0
    with pytest.raises(ValueError, match="max_steps: 2 -> 3"):
        evidence.main([*told, "--steps", "3"])


@pytest.mark.slow
@pytest.mark.parametrize("row", PAPER_ROWS)
def test_every_row_runs(few: Path, tmp_path: Path, row: str) -> None:
    import evidence

    assert evidence.main(options(few, tmp_path, row)) == 0
    content = json.loads((tmp_path / f"{row}-seed0.json").read_text(encoding="utf-8"))
    assert content["steps"] == 2 and math.isfinite(content["loss"])
