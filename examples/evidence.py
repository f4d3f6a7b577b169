"""The families' ablations on small data (OneR's Table 6, SIMLA's 1, CODIS' 4, MoMo's 4 and 6): docs/evidence*.md.

    python examples/evidence.py                                   six rows, one seed, two rows at a time on two cores
    python examples/evidence.py --seeds 0 1 2 --jobs 1            three seeds, one after the other, as on a GPU
    python examples/evidence.py --questions                       and ITC with other heads, pooling, temperature, batch
    python examples/evidence.py --table simla                     the five rows of SIMLA's Table 1, re-ranked
    python examples/evidence.py --table codis                     the five rows of CODIS' Table 4, re-ranked
    python examples/evidence.py --table momo --fraction 0.5       MoMo's stages one after the other, half as long
    python examples/evidence.py --rows itc itc:head_norm=batch,head_statistics=separate --epochs 5

A row is `name` or `name:key=value,...`; a key is an argument of examples/pretrain.py or a field of the model's
configuration. Every row sees the same pairs in the same order for the same number of steps. A finished row is a JSON
file in --output and is not trained again; an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from clip_baseline import ClipBaseline
from evidence_stages import BEFORE, PROBES, lengths, stage_values
from evidence_table import Table, machine_facts, main_table, page, write_evidence
from evidence_table_codis import main_table as codis_main_table
from evidence_table_codis import page as codis_page
from evidence_table_momo import main_table as momo_main_table
from evidence_table_momo import page as momo_page
from evidence_table_simla import main_table as simla_main_table
from evidence_table_simla import page as simla_page
from tqdm.auto import tqdm
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from oner import CodisConfig, MomoConfig, OneRConfig, SimlaConfig, open_rows
from oner.training.evaluation.embedding import embed_images, embed_texts, row_ids, spaced
from oner.training.evaluation.gap import centroid_separability, linear_separability, paired_cosines
from oner.training.evaluation.metrics import centroid_distance
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.publishing.model_card import slug
from oner.training.publishing.model_loading import load_model
from oner.training.run.parsing import read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
# name -> (title in the table, configuration); in the order of OneR's Tables 6 and 7, SIMLA's Table 1, CODIS' Table 4,
# MoMo's Tables 4 and 6
ROWS = {
    "clip": ("CLIP (open_clip, two towers)", "oner_emoji_itc_cmc.yaml"),
    "itc": ("ITC", "oner_emoji_itc.yaml"),
    "itc_two_heads": ("ITC (two heads)", "oner_emoji_itc_two_heads.yaml"),
    "itc_xmc": ("ITC + XMC", "oner_emoji_itc_xmc.yaml"),
    "itc_xmc_cic": ("ITC + XMC + CIC", "oner_emoji_itc_xmc_cic.yaml"),
    "itc_cmc": ("ITC + CMC (OneR)", "oner_emoji_itc_cmc.yaml"),
    "no_mim": ("OneR - MIM", "oner_emoji_no_mim.yaml"),
    "no_mim_mlm": ("OneR - MIM - MLM", "oner_emoji_no_mim_mlm.yaml"),
    "simla_itm": ("ITM", "simla_emoji_itm.yaml"),
    "simla_itm_itc": ("ITM + ITC", "simla_emoji_itm_itc.yaml"),
    "simla_itm_itc_mlm": ("ITM + ITC + MLM", "simla_emoji_itm_itc_mlm.yaml"),
    "simla_itm_itc_mlm_mim": ("ITM + ITC + MLM + MIM", "simla_emoji_itm_itc_mlm_mim.yaml"),
    "simla_full": ("ITM + ITC + MLM + MIM + PSL (SIMLA)", "simla_emoji_full.yaml"),
    "codis_cross": ("cross (ALBEF)", "codis_emoji_cross.yaml"),
    "codis_intra_cross": ("intra + cross", "codis_emoji_intra_cross.yaml"),
    "codis_cross_codebook": ("cross + codebook", "codis_emoji_cross_codebook.yaml"),
    "codis_student_codebook": ("intra + cross + codebook of student features", "codis_emoji_student_codebook.yaml"),
    "codis_full": ("intra + cross + codebook (CODIS)", "codis_emoji_full.yaml"),
    "momo_untrained": ("nothing (one step)", "momo_small_stage1.yaml"),
    "momo_stage1": ("stage 1: images", "momo_small_stage1.yaml"),
    "momo_stage2": ("stage 2: texts and images", "momo_small_stage2.yaml"),
    "momo_stage2_text_only": ("stage 2: texts alone", "momo_small_stage2_text_only.yaml"),
    "momo_stage3": ("stage 3: texts and pairs", "momo_small_stage3.yaml"),
    "momo_stage3_no_cmga": ("stage 3 without CMGA", "momo_small_stage3_no_cmga.yaml"),
}
OTHER_FAMILIES = ("simla_", "codis_", "momo_")
TABLE_6 = [name for name in ROWS if not name.startswith(("no_", *OTHER_FAMILIES))]
# one sequence of picture and words is theirs alone, and their page tells of it
ONE_TOWER = [name for name in ROWS if name != "clip" and not name.startswith(OTHER_FAMILIES)]
TABLE_1 = [name for name in ROWS if name.startswith("simla_")]
TABLE_4 = [name for name in ROWS if name.startswith("codis_")]
TABLES = {
    "oner": Table(TABLE_6, "evidence", "Does contextual mixup close the gap?", page, main_table),
    "simla": Table(TABLE_1, "evidence_simla", "What does each loss of SIMLA bring?", simla_page, simla_main_table),
    "codis": Table(TABLE_4, "evidence_codis", "What does CODIS' codebook add?", codis_page, codis_main_table),
    "momo": Table(list(BEFORE), "evidence_momo", "What does each stage of MoMo bring?", momo_page, momo_main_table),
}
# what rows are measured on, unless told
DATA = {"momo": "runs/scenes/seen.parquet"}
EMBEDDED = "examples/data/emoji/test_style.parquet"
WATCHED = ("codes_used", "plan_entropy")  # of a log, where a run has a codebook
RERANK_K = 128
# what may decide whether naive contrast fails: statistics of the heads, pooled feature, temperature, batch size
QUESTIONS = [
    "itc:head_norm=batch,head_statistics=shared,projector_layers=3,predictor_layers=2",
    "itc:head_norm=batch,head_statistics=separate,projector_layers=3,predictor_layers=2",
    "itc:head_norm=layer,projector_layers=3,predictor_layers=2",
    "itc_cmc:head_norm=batch,head_statistics=shared,projector_layers=3,predictor_layers=2",
    "itc:pooling=mean",
    "itc:temperature=0.07",
    "itc:batch_size=64",
]
FAMILIES = (OneRConfig, SimlaConfig, CodisConfig, MomoConfig)
# the run's vocab_size is an upper bound
MODEL_FIELDS = {entry.name for kind in FAMILIES for entry in fields(kind)} - {"vocab_size"}


@dataclass(frozen=True)
class Run:
    """One row of the table with one seed: what to train, and where it goes."""

    row: str
    seed: int
    output: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    before: "Run | None" = None  # whose model it begins with

    @property
    def name(self) -> str:
        return self.row.split(":")[0]

    @property
    def title(self) -> str:
        changed = self.row.partition(":")[2].replace(",", ", ")
        return ROWS[self.name][0] + (f", {changed}" if changed else "")

    @property
    def directory(self) -> Path:
        return self.output / slug(self.row) / f"seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.output / f"{slug(self.row)}-seed{self.seed}.json"

    def arguments(self) -> dict[str, Any]:
        """Everything told on top of the row's configuration, as names of arguments."""
        told = {**self.options, **self.changes, "seed": self.seed}
        model = {key: value for key, value in told.items() if key in MODEL_FIELDS}
        flat = {key: value for key, value in told.items() if key not in MODEL_FIELDS}
        if model:  # a mapping on the command line replaces the file's, so that one is merged in
            flat["model_config"] = {**self.config().get("model_config", {}), **model}
        if self.before is not None:
            flat["initial_model"] = str(self.before.directory / "model")
        return flat

    def config(self) -> dict[str, Any]:
        """What the row's file says."""
        return read_config(CONFIGS / ROWS[self.name][1])

    def command(self, threads: int) -> list[str]:
        """The command that trains this row, from the top of the repository."""
        script = "examples/clip_baseline.py" if self.name == "clip" else "examples/pretrain.py"
        words = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, script]
        config = os.path.relpath(CONFIGS / ROWS[self.name][1], ROOT)
        words += ["--config", config, "--output_dir", str(self.directory)]
        for key, value in {"resume": "auto", **self.arguments()}.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
        return words

    def setup(self) -> dict[str, Any]:
        """What a finished result must agree with to be taken over."""
        told = {key: value for key, value in self.arguments().items() if key != "num_workers"}
        if self.before is not None:
            told["initial_model"] = self.before.setup()
        return json.loads(json.dumps({"row": self.row, "config": self.config(), **told}))

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a step by their kind."""
        told = {**self.config(), **self.arguments()}
        portions = told.get("portions") or {told.get("kind", "pairs"): {}}
        return {name: portion.get("batch_size", told.get("batch_size")) for name, portion in portions.items()}


def parse_changes(text: Sequence[str]) -> dict[str, Any]:
    """`key=value` words to a mapping; values are read as YAML. Raises `ValueError`."""
    changes = {}
    for word in text:
        key, equals, value = word.partition("=")
        changes[key] = yaml.safe_load(value)
        if not equals or not key or changes[key] is None:
            raise ValueError(f"expected key=value, got {word!r}")
    return changes


def run_of(row: str, seed: int, a: argparse.Namespace) -> Run:
    """One row of one seed, and of a later stage those before it. Raises `ValueError` for an unknown row."""
    name, _, changes = row.partition(":")
    if name not in ROWS:
        raise ValueError(f"unknown row {name!r}; expected one of {', '.join(ROWS)}")
    options: dict[str, Any] = {"eval_every_epochs": 0, "keep_checkpoints": 1, "num_workers": 0}
    if name not in BEFORE:
        options["save_every_epochs"] = 5
    if a.steps is not None:
        options["max_steps"] = a.steps
    elif name in BEFORE:
        options |= lengths(name, read_config(CONFIGS / ROWS[name][1]), a.fraction)
    else:
        options["epochs"] = a.epochs
    options |= {"head_norm": a.head_norm} if a.head_norm else {}
    options |= {"head_statistics": a.head_statistics} if a.head_statistics else {}
    options |= parse_changes(a.set)
    told = parse_changes(changes.split(",")) if changes else {}
    before = BEFORE.get(name)
    return Run(row, seed, Path(a.output), told, options, None if before is None else run_of(before, seed, a))


def plan(a: argparse.Namespace) -> list[Run]:
    """The runs asked for, each after those that it begins with. Raises `ValueError` for an unknown row."""
    runs: dict[Path, Run] = {}
    for row in dict.fromkeys([*a.rows, *(QUESTIONS if a.questions else [])]):
        for seed in a.seeds:
            line = [run_of(row, seed, a)]
            while line[0].before is not None:
                line.insert(0, line[0].before)
            runs = {**runs, **{run.result: run for run in line if run.result not in runs}}
    return list(runs.values())


def finished(run: Run) -> dict[str, Any] | None:
    """The result of a run that was done before.

    Raises:
        ValueError: it was made with other settings.
    """
    if not run.result.is_file():
        return None
    content = json.loads(run.result.read_text(encoding="utf-8"))
    then, now = content["setup"], run.setup()
    if then != now:
        names = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
        changed = "; ".join(f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in names)
        raise ValueError(f"{run.result} has other settings ({changed}): remove it or name another --output")
    return content


def train(run: Run, threads: int, children: list[subprocess.Popen]) -> None:
    """Trains a row in a process of its own; what it prints goes to `train.log`.

    Raises:
        RuntimeError: it failed or was stopped, with the end of its log.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    log = run.directory / "train.log"
    with open(log, "ab") as stream:
        child = subprocess.Popen(run.command(threads), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        children.append(child)
        code = child.wait()
    if code or not (run.directory / "model" / "config.json").is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{run.row}, seed {run.seed}: the training ended with code {code}; {log} ends with\n{tail}")


def training_facts(run: Run) -> dict[str, Any]:
    """Steps, pairs and seconds of the training from its log, in which a resumed run may repeat some steps."""
    lines = [json.loads(line) for line in (run.directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # all kinds of rows of a step tell of the same speed
    sizes = run.batch_sizes()
    name, batch = next(iter(sizes.items()))
    speeds = {line["step"]: line[f"{name}_per_second"] for line in lines if f"{name}_per_second" in line}
    steps = sorted(speeds)
    seconds = sum((b - a) * batch / max(speeds[b], 0.1) for a, b in zip([0, *steps], steps, strict=False))
    last = max((line for line in lines if "loss" in line), key=lambda line: line["step"])
    rows = steps[-1] * sum(sizes.values())
    return {"steps": steps[-1], "pairs": rows, "train_seconds": seconds, "loss": last["loss"]}


def watched(run: Run) -> dict[str, float]:
    """`log/...`: means over the run of what its log tells of a codebook; nothing where it has none."""
    lines = [json.loads(line) for line in (run.directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    series = {name: {line["step"]: line[name] for line in lines if name in line} for name in WATCHED}
    return {f"log/{name}": fmean(values.values()) for name, values in series.items() if values}


def load(run: Run, device: torch.device) -> tuple[Any, Any]:
    """The trained model and its processor."""
    directory = run.directory / "model"
    if run.name == "clip":
        model = ClipBaseline.from_directory(directory)
    else:
        model = load_model(AutoModelForZeroShotImageClassification, directory)
    return model.to(device).eval(), AutoProcessor.from_pretrained(directory)


def evaluate(model: Any, processor: Any, rows: Sequence, gallery: Sequence, multimodal: bool) -> dict[str, float]:
    """All numbers of a row: `first/...` and `all/...` retrieval, `gap/...`, `joint/...` for picture + caption.

    A model that matches pairs puts the best of `first/` in order too.

    `gap/` is taken on pictures and first captions: distance of the centroids, mean cosine of pairs and of others, and
    how well a picture is told from a caption (.5: not at all).
    """
    values: dict[str, float] = {}
    for captions in ("first", "all"):
        how = {"name": captions, "captions": captions, "progress": False}
        if captions == "first" and hasattr(model, "match"):
            evaluator = RerankingEvaluator(rows, 128, rerank_k=RERANK_K, **how)
        else:
            evaluator = RetrievalEvaluator(rows, 128, **how)
        values |= dict(evaluator.run(model, processor))
    image = embed_images(model, processor, [row["image"] for row in rows], 128).cpu()
    text = embed_texts(model, processor, [str(row["captions"][0]) for row in rows], 512).cpu()
    paired, unpaired = paired_cosines(image, text, row_ids(rows))
    values |= {
        "gap/distance": centroid_distance(image, text),
        "gap/cosine_paired": paired,
        "gap/cosine_unpaired": unpaired,
        "gap/centroid_separability": centroid_separability(image, text),
        "gap/linear_separability": linear_separability(image, text),
    }
    if multimodal:
        evaluator = MultimodalRetrievalEvaluator(rows, gallery, 128, name="joint", progress=False)
        values |= dict(evaluator.run(model, processor))
    return values


def measure(run: Run, data: tuple[Sequence, Sequence], limit: int | None) -> tuple[dict[str, float], int]:
    """All numbers of a trained row, and how many parameters it has."""
    if run.name in BEFORE:
        directory = run.directory / "model"
        return stage_values(directory, run.config(), data[0], run.seed, limit, ROOT / "examples" / "data")
    model, processor = load(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    values = evaluate(model, processor, *data, multimodal=run.name in ONE_TOWER) | watched(run)
    return values, sum(parameter.numel() for parameter in model.parameters())


def work(run: Run, threads: int, data: tuple[Sequence, Sequence], limit: int | None, children: list) -> dict[str, Any]:
    """Trains and evaluates one run and writes its result."""
    start, resumed = time.perf_counter(), any(run.directory.glob("checkpoint-*"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(run, threads, children)
    values, parameters = measure(run, data, limit)
    if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
        raise ValueError(f"{run.row}, seed {run.seed}: not finite: {wrong}")
    command = [str(word) for word in run.command(threads)]
    command[2] = "python"
    content = {
        "row": run.row,
        "title": run.title,
        "before": None if run.before is None else run.before.title,
        "seed": run.seed,
        "values": values,
        "parameters": parameters,
        **training_facts(run),
        "wall_seconds": time.perf_counter() - start,  # of this process, when resumed
        "resumed": resumed,
        "command": command,
        "setup": run.setup(),
        "machine": machine_facts(device),
    }
    write_result(run, content)
    for checkpoint in run.directory.glob("checkpoint-*"):  # the model stays
        shutil.rmtree(checkpoint)
    return content


def write_result(run: Run, content: Mapping[str, Any]) -> None:
    """Beside its place and renamed into it."""
    partial = run.result.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(run.result)


def measure_again(runs: Sequence[Run], data: tuple[Sequence, Sequence], limit: int | None) -> None:
    """The finished rows once more, for numbers that they were not asked for when they were trained."""
    for run in runs:
        if (content := finished(run)) is not None:
            write_result(run, {**content, "values": measure(run, data, limit)[0]})


def steps_done(run: Run) -> int:
    """The step of the last line in a run's log."""
    log = run.directory / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def work_all(
    runs: Sequence[Run], jobs: int, threads: int, data: tuple[Sequence, Sequence], limit: int | None
) -> list[BaseException]:
    """All runs, `jobs` at a time, under a progress bar; returns the errors of those that failed."""
    children: list[subprocess.Popen] = []
    pool, errors = ThreadPoolExecutor(jobs), []
    waiting = list(reversed(runs))  # the longest first
    running: dict[Future, Run] = {}
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tqdm(total=len(runs), desc="rows", unit="row") as bar:
            while waiting or running:
                # a stage waits for the one before it
                unfinished = {run.result for run in [*waiting, *running.values()]}
                ready = [run for run in waiting if run.before is None or run.before.result not in unfinished]
                running |= {pool.submit(work, run, threads, data, limit, children): run for run in ready}
                waiting = [run for run in waiting if run not in ready]
                done, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
                for future in done:
                    run = running.pop(future)
                    bar.update()
                    if error := future.exception():
                        errors.append(error)
                        bar.write(f"FAILED {error}")
                    else:
                        bar.write(f"{run.row}, seed {run.seed}: {summary(future.result())}")
                active = [run for future, run in running.items() if future.running()]
                bar.set_postfix_str(", ".join(f"{run.row} step {steps_done(run)}" for run in active))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()  # the engine answers with a checkpoint
        signal.signal(signal.SIGTERM, previous)
    return errors


def summary(content: Mapping[str, Any]) -> str:
    values = content["values"]
    if content["row"].partition(":")[0] in BEFORE:
        probes = [f"{name} {values[f'cls/{name}/logistic_accuracy']:.1%}" for name in PROBES]
        return f"{', '.join(probes)}, {content['wall_seconds'] / 60:.1f} min"
    return (
        f"TR@10 {values['first/tr_r@10']:.1%}, IR@10 {values['first/ir_r@10']:.1%}, gap {values['gap/distance']:.2f}, "
        f"{content['wall_seconds'] / 60:.1f} min"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="oner", help="whose rows, and which documents are written")
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(ROWS)}, or name:key=value,...")
    parser.add_argument("--questions", action="store_true", help="also the rows that ask why naive contrast fails")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2 on an accelerator and for momo, else 0")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--fraction", type=float, default=1.0, help="of momo's steps as its files have them")
    parser.add_argument("--steps", type=int, help="length in steps instead of epochs")
    parser.add_argument("--head-norm", choices=("batch", "layer", "none"), help="of all rows but CLIP")
    parser.add_argument("--head-statistics", choices=("shared", "separate"), help="of all rows but CLIP")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all rows")
    parser.add_argument("--data", help="default: test_style of the embedded pairs; for momo runs/scenes/seen.parquet")
    parser.add_argument("--gallery", default=str(ROOT / "examples/data/emoji/train.parquet"))
    parser.add_argument("--id-column", help="default: hexcode; for momo each picture stands alone")
    parser.add_argument("--limit", type=int, help="evaluate on so many rows only, evenly spaced")
    parser.add_argument("--measure-again", action="store_true", help="rows that are done, by their models; train none")
    parser.add_argument("--output", default="runs/evidence", help="models, logs, one JSON for each finished row")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="where evidence.md and evidence.json go")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else min(cores, 4))
    parser.add_argument("--threads", type=int, help="of a job; default: the cores divided by the jobs")
    a = parser.parse_args(argv)
    a.rows = a.rows or list(TABLES[a.table].rows)
    a.seeds = a.seeds or ([0, 1, 2] if torch.cuda.is_available() or a.table == "momo" else [0])
    a.data = a.data or str(ROOT / DATA.get(a.table, EMBEDDED))
    a.id_column = a.id_column or ("__row__" if a.table == "momo" else "hexcode")
    a.threads = a.threads or max(1, cores // a.jobs)
    a.output = str(Path(a.output).resolve())
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, writes the documents, and returns the number of rows that failed."""
    a = parse(argv)
    runs = plan(a)
    missing = [run for run in runs if finished(run) is None]
    data = (
        spaced(open_rows(a.data, id_column=a.id_column), a.limit),
        # pictures of the same concepts, of which stages know nothing
        [] if a.table == "momo" else open_rows(a.gallery, id_column=a.id_column),
    )
    torch.set_num_threads(a.threads)
    errors: list[BaseException] = []
    if a.measure_again:
        measure_again(runs, data, a.limit)
    elif missing:
        errors = work_all(missing, a.jobs, a.threads, data, a.limit)
    contents = [content for run in runs if (content := finished(run)) is not None]
    if contents:
        command = ["python", "examples/evidence.py", *(sys.argv[1:] if argv is None else argv)]
        facts = {"command": command, "jobs": a.jobs, "threads": a.threads, "data": Path(a.data).name}
        facts |= {"pictures": len(data[0]), "gallery": Path(a.gallery).name, "rerank_k": RERANK_K}
        print(write_evidence(Path(a.docs), contents, facts, TABLES[a.table]))
    return len(errors)


if __name__ == "__main__":
    sys.exit(main())
