"""The families side by side: what is equal, how long each trains and how fast, what is measured, and the text."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from oner import OneRConfig, open_rows
from oner.training.cost.estimate import configuration_of
from oner.training.run.parsing import parse_arguments

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "projection_dim": 16}
TINY |= {"cls_token_id": 3, "mask_token_id": 4, "max_text_length": 6, "image_size": 32}


@pytest.fixture(scope="module", autouse=True)
def examples_on_path(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root / "examples"))
    yield
    sys.path.remove(str(root / "examples"))


def told(output: Path, *more: str) -> list[str]:
    return ["--table", "compare", "--seeds", "3", "--output", str(output), "--jobs", "1", *more]


def made_up(row: str, seed: int, score: float, seconds: float | None = None) -> dict:
    """A result as the runner writes it; the numbers are inputs of a test, not measurements."""
    from evidence import ROWS

    values = {"flops_per_pair": 1e9, "pictures/chance": 0.2, "texts/chance": 0.1}
    for split in ("test_style", "test_concept", "held_out"):
        values |= {
            f"{split}/{way}_{kind}@{k}": score for way in ("tr", "ir") for kind in ("r", "chance") for k in (1, 10)
        }
        values |= {f"{split}/composed_{way}_r@10": score for way in ("picture", "text", "sum")}
        values |= {f"{split}/composed_chance@10": 0.1, f"{split}/gap_centroid": 1 - score}
        values |= {f"{split}/gap_distribution": score, f"{split}/gap_distribution_within": 0.125}
    values |= {f"{what}/{how}_accuracy": score for what in ("pictures", "texts") for how in ("logistic", "knn")}
    name = row.partition(":")[0]
    if name == "compare_oner":
        values["test_style/composed_joint_r@10"] = score
    sizes = {"steps": 10, "pairs": 1280, "train_seconds": 90.0, "quiet_seconds": 60.0, "memory_gib": 1.25}
    named = {"row": row, "title": ROWS[name].title, "seed": seed, "seconds": seconds, "learning_rate": 0.003}
    machine = {"processor": "abacus", "cores": 2, "versions": {"torch": "0"}}
    return {
        **named,
        **sizes,
        "parameters": 2_000_000,
        "command": ["python", "x"],
        "machine": machine,
        "values": values,
    }


def test_rows_are_of_one_size_and_read_the_same_pairs(root: Path, tmp_path: Path) -> None:
    import evidence

    read = []
    for run in evidence.plan(evidence.parse(told(tmp_path))):
        command = run.command(threads=1)
        arguments = parse_arguments(command[command.index("--config") :])
        config, data, told_run = configuration_of(arguments), arguments.data, arguments.run
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
        sizes = [getattr(config, name) for name in (*names, "max_text_length", "projection_dim", "vocab_size")]
        pairs = [data.kind, data.train_data, data.text_column, data.id_column, data.one_row_per_id, data.crop]
        length = [told_run.batch_size, told_run.epochs, told_run.warmup_epochs, told_run.seed, told_run.portions]
        read.append((run.row, [*sizes, *pairs, data.eval_crop, data.max_text_length, *length]))
    assert len(read) == len(evidence.COMPARED) >= 7
    assert all(one == read[0][1] for _, one in read), read


def test_seconds_are_as_many_steps_as_the_speed_of_equal_pairs_gives(tmp_path: Path) -> None:
    import evidence

    a = evidence.parse(told(tmp_path, "--rows", "compare_momo", "--seconds", "30"))
    equal, timed = evidence.plan(a)
    assert (equal.seconds, timed.seconds, timed.earlier) == (None, 30.0, [equal]) and equal.place != timed.place
    with pytest.raises(ValueError, match="its speed is not known"):
        timed.command(threads=1)
    equal.result.write_text(json.dumps({"steps": 288, "quiet_seconds": 144.0, "setup": equal.setup()}))
    command = timed.command(threads=1)
    assert parse_arguments(command[command.index("--config") :]).run.max_steps == 60
    assert "epochs" not in timed.setup() and evidence.finished(timed) is None
    timed.result.write_text(json.dumps({"setup": timed.setup()}))
    assert evidence.finished(timed) == {"setup": timed.setup()}


def test_a_run_of_seconds_waits_for_the_one_that_tells_its_speed(tmp_path: Path, monkeypatch) -> None:
    import evidence

    begun = []

    def work(run, threads, data, limit, children):
        assert all(one.result.is_file() for one in run.earlier)
        begun.append(run.place)
        run.result.write_text("{}", encoding="utf-8")
        return {**made_up(run.row, run.seed, 0.5), "wall_seconds": 60.0}

    monkeypatch.setattr(evidence, "work", work)
    runs = evidence.plan(evidence.parse(told(tmp_path, "--rows", "compare_clip", "compare_oner", "--seconds", "9")))
    assert evidence.work_all(runs, 2, 1, ([], []), None) == []
    assert sorted(begun) == ["compare_clip", "compare_clip-9s", "compare_oner", "compare_oner-9s"]


def test_the_rate_is_the_best_of_three_on_held_out_pictures(tmp_path: Path, monkeypatch) -> None:
    import evidence

    found = {"compare_oner": 0.2, "compare_oner:base_learning_rate=0.0015": 0.1, "compare_codis": 0.3}
    found |= {"compare_oner:base_learning_rate=0.006": 0.4, "compare_codis:base_learning_rate=0.0008": 0.2}

    def work_all(runs, *_):
        for run in runs:
            if run.row in found:  # one trial fails
                content = {**made_up(run.row, run.seed, found[run.row]), "setup": run.setup()}
                run.result.write_text(json.dumps(content), encoding="utf-8")
        return [run.row for run in runs if run.row not in found]

    monkeypatch.setattr(evidence, "work_all", work_all)
    rows = ["compare_oner", "compare_codis", "compare_momo:base_learning_rate=0.001"]
    a = evidence.parse(told(tmp_path, "--rows", *rows, "--seeds", "0", "1", "--rates", "--seconds", "9"))
    chosen, recalls, failed = evidence.choose_rates(a, ([], []))
    assert chosen == ["compare_oner:base_learning_rate=0.006", "compare_codis", rows[2]]
    assert recalls["compare_oner"] == {"0.5": 0.1, "1": 0.2, "2": 0.4} and rows[2] not in recalls
    assert failed == ["compare_codis:base_learning_rate=0.0032"] and set(recalls["compare_codis"]) == {"0.5", "1"}
    with pytest.raises(SystemExit):
        evidence.parse(["--table", "simla", "--rates"])
    with pytest.raises(SystemExit):
        evidence.parse(["--table", "simla", "--head-norm", "batch"])


def eight_pairs() -> dict[str, torch.Tensor]:
    """[CLS], places of four patches, three words; and pictures."""
    words = torch.arange(10, 34).view(8, 3)
    ids = torch.cat([torch.full((8, 1), 3), torch.full((8, 4), OneRConfig().image_token_id), words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(8, 3, 32, 32)}


@pytest.mark.parametrize("kind", [{}, {"conv_stem": True}, {"conv_stem": True, "sigmoid": True}, None])
def test_a_baseline_learns_and_its_file_says_what_it_is(tmp_path: Path, kind: dict[str, bool] | None) -> None:
    pytest.importorskip("open_clip")
    from clip_baseline import ClipBaseline, ClipObjective
    from neomme_baseline import NeoMmeBaseline

    made = NeoMmeBaseline if kind is None else ClipBaseline
    model = made(OneRConfig.from_size("nano", **TINY), **(kind or {}))
    batch = eight_pairs()
    objective = ClipObjective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss, _, kept = objective(model, batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(kept=kept)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    model.save(tmp_path)
    with torch.no_grad():
        *features, learned = model.eval()(**batch)
        assert ("bias" in learned) == bool(kind and kind.get("sigmoid"))
        for one, other in zip(features, made.from_directory(tmp_path).eval()(**batch), strict=False):
            torch.testing.assert_close(one, other)


def test_a_tower_of_clip_ends_below_its_projection() -> None:
    pytest.importorskip("open_clip")
    from clip_baseline import ClipBaseline, ClipTower

    model, batch = ClipBaseline(OneRConfig.from_size("nano", **TINY), conv_stem=True).eval(), eight_pairs()
    tower = ClipTower(model)
    with torch.no_grad():
        images, texts, _ = model(**batch)
        pictures = tower(pixel_values=batch.pop("pixel_values")).last_hidden_state[:, 0] @ model.clip.visual.proj
        words = tower(**batch).last_hidden_state[:, 0] @ model.clip.text_projection
    for states, features in ((pictures, images), (words, texts)):
        torch.testing.assert_close(torch.nn.functional.normalize(states, dim=-1), features)


def test_neomme_has_places_of_a_grid_and_reads_each_patch_at_its_own() -> None:
    from neomme_baseline import NeoMmeBaseline

    model, batch = NeoMmeBaseline(OneRConfig.from_size("nano", **TINY)).eval(), eight_pairs()
    rows, columns = model.positions(batch["input_ids"])[:, 0].tolist()
    assert (rows, columns) == ([0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5])
    assert model.positions(torch.tensor([[3, 10, 11]])).tolist() == [[[0, 1, 2]], [[0, 1, 2]]]
    both = model.get_multimodal_features(**batch).pooler_output
    assert both.shape == (8, 32) and both.isfinite().all()


@pytest.mark.parametrize("name", ["oner-emoji", "simla-emoji"])
def test_pairs_are_retrieved_re_ranked_and_asked_by_both(root: Path, name: str) -> None:
    from evidence_compare import ComposedWays, pair_values

    directory = root / "examples/checkpoints" / name
    model = AutoModelForZeroShotImageClassification.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    known, unseen = (
        open_rows(root / f"examples/data/emoji/{part}.parquet", id_column="hexcode")
        for part in ("train", "test_style")
    )
    rows = [unseen[place] for place in range(0, 64, 4)]
    values = pair_values(model, processor, rows, "s")
    assert values["s/tr_r@10"] > values["s/tr_chance@10"] and 0 <= values["s/gap_distribution"] <= 1
    assert ("s/rerank_ir_r@1" in values) == (name == "simla-emoji")

    asked = {row["id"] for row in rows}
    gallery = [row for row in known.take(range(200)) if row["id"] in asked]
    found = dict(ComposedWays(rows, gallery, 16, (1, 10), "s", progress=False).run(model, processor))
    assert {f"s/composed_{way}_r@10" for way in ("picture", "text", "sum", "joint")} <= found.keys()
    assert all(0 <= value <= 1 for value in found.values())


def test_operations_of_clip_are_counted_beside_those_of_families(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    import evidence
    from evidence_compare import flops_per_pair

    shrunk = [
        f"{name}={value}" for name, value in {"hidden_size": 64, "num_hidden_layers": 1, "batch_size": 8}.items()
    ]
    a = evidence.parse(told(tmp_path, "--rows", "compare_albef", "compare_siglip", "--set", *shrunk))
    albef, siglip = (flops_per_pair(run) for run in evidence.plan(a))
    assert 1e6 < siglip < albef < 1e9


def test_the_page_has_both_lengths_every_column_and_what_differs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from evidence import TABLES
    from evidence_table import write_evidence

    rows = ("compare_oner", "compare_clip")
    contents = [made_up(row, seed, 0.1 + 0.2 * seed, seconds)
                for seconds in (None, 30.0) for row in rows for seed in (0, 1)]  # fmt: skip
    facts = {"command": ["python", "x"], "jobs": 1, "threads": 1, "rates": {"compare_oner": {"0.5": 0.1, "1": 0.3}}}
    printed = write_evidence(tmp_path, contents, facts, TABLES["compare"])
    assert printed.count("| OneR | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | - | - | - | - |") == 2
    page = (tmp_path / "compare_families.md").read_text(encoding="utf-8")
    assert "## Equal pairs" in page and "given 30 seconds" in page and "abacus" in page and "confound" not in printed
    assert page.count("| OneR | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 | - | 20.0 ± 14.1 |") == 2
    assert "| OneR | 0, 1 | 0.003 | 2.0 M | 1.00 | 10 | 1,280 | 60 | 90 | 1.2 |" in page
    assert "over 8 runs: unseen style -1.00 with the centroid gap" in page and "1.00 with the distribution gap" in page
    assert "| OneR | 10.0 | 30.0 |" in page and "MoMo's is one linear layer" in page
    picture = tmp_path / "pictures" / "compare_families.png"
    assert 0 < picture.stat().st_size <= 80_000 and "pictures/compare_families.png" in page
    rows = json.loads((tmp_path / "compare_families.json").read_text(encoding="utf-8"))["rows"]
    assert [row["seed"] for row in rows] == [0, 1] * 4
