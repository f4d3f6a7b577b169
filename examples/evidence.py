"""Ablations of each family on small data (OneR's Table 6, SIMLA's 1, CODIS' 4, MoMo's 4 and 6), and a comparison.

    python examples/evidence.py                                   six rows, one seed, two rows at a time on two cores
    python examples/evidence.py --seeds 0 1 2 --jobs 1            three seeds, one row at a time, as on a GPU
    python examples/evidence.py --questions                       and ITC with other heads, pooling, temperature, batch
    python examples/evidence.py --table simla                     the five rows of SIMLA's Table 1, with re-ranking
    python examples/evidence.py --table codis                     the five rows of CODIS' Table 4, with re-ranking
    python examples/evidence.py --table momo --fraction 0.5       MoMo's stages in sequence, with half the steps
    python examples/evidence.py --rows itc itc:head_norm=batch,head_statistics=separate --epochs 5
    python examples/evidence.py --table compare --seconds 180     all families and CLIP, for equal pairs and equal time
    python examples/evidence.py --table compare --rates           each row at the best of three learning rates

A row is `name` or `name:key=value,...`; a key is an argument of examples/pretrain.py or a field of the model's
configuration. All rows see the same pairs in the same order for the same number of steps. With --seconds, each row is
also trained a second time, for as many steps as fit into that time at the speed of the first run. A finished row is
stored as a JSON file in --output and not trained again; an interrupted run resumes from its last checkpoint. The
tables are written to docs/evidence*.md and docs/compare_families.md.
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
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from evidence_compare import compare_values, held_out_recall, load, trials_of
from evidence_rows import (
    COMPARED,
    CONFIGS,
    ONE_TOWER,
    QUESTIONS,
    ROOT,
    ROWS,
    TABLE_1,
    TABLE_4,
    TABLE_6,
    TRANSFER,
    Run,
    parse_changes,
)
from evidence_stages import BEFORE, PROBES, lengths, stage_values
from evidence_table import Table, machine_facts, main_table, page, write_evidence
from evidence_table_codis import main_table as codis_main_table
from evidence_table_codis import page as codis_page
from evidence_table_compare import figure as compare_figure
from evidence_table_compare import main_table as compare_main_table
from evidence_table_compare import page as compare_page
from evidence_table_momo import main_table as momo_main_table
from evidence_table_momo import page as momo_page
from evidence_table_simla import main_table as simla_main_table
from evidence_table_simla import page as simla_page
from evidence_table_transfer import main_table as transfer_main_table
from evidence_table_transfer import page as transfer_page
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from oner import open_rows
from oner.training.evaluation.embedding import embed_images, embed_texts, row_ids, spaced
from oner.training.evaluation.gap import centroid_separability, linear_separability, paired_cosines
from oner.training.evaluation.metrics import centroid_distance
from oner.training.evaluation.reranking import RerankingEvaluator
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.run.parsing import read_config

TABLES = {
    "oner": Table(TABLE_6, "evidence", "Does contextual mixup close the gap?", page, main_table),
    "transfer": Table(
        TRANSFER, "evidence_transfer", "Do texts without pictures help?", transfer_page, transfer_main_table
    ),
    "simla": Table(TABLE_1, "evidence_simla", "What does each loss of SIMLA bring?", simla_page, simla_main_table),
    "codis": Table(TABLE_4, "evidence_codis", "What does CODIS' codebook add?", codis_page, codis_main_table),
    "momo": Table(list(BEFORE), "evidence_momo", "What does each stage of MoMo bring?", momo_page, momo_main_table),
    "compare": Table(
        COMPARED, "compare_families", "The families side by side", compare_page, compare_main_table, compare_figure
    ),
}
# default evaluation data: the embedded emoji, or scenes, where each row is its own concept
EMBEDDED = "examples/data/emoji/test_style.parquet"
SCENES = {"momo": "runs/scenes/seen.parquet", "codis": "runs/scenes/unseen_pairs.parquet"}
WATCHED = ("codes_used", "plan_entropy")  # log values of runs with a codebook
# candidates that the matching head re-ranks; a scene has four times as many patches as an emoji
RERANK_K, RERANK_K_SCENES = 128, 16


def run_of(row: str, seed: int, a: argparse.Namespace) -> Run:
    """The run of a row and seed, linked to the runs of earlier stages. Raises `ValueError` for an unknown row."""
    name, _, changes = row.partition(":")
    if name not in ROWS:
        raise ValueError(f"unknown row {name!r}; expected one of {', '.join(ROWS)}")
    options: dict[str, Any] = {"eval_every_epochs": 0, "keep_checkpoints": 1, "num_workers": 0}
    if name not in BEFORE:
        options["save_every_epochs"] = 2 if name in COMPARED else 5
    if a.steps is not None:
        options["max_steps"] = a.steps
    elif name in BEFORE:
        options |= lengths(name, read_config(CONFIGS / ROWS[name].config), a.fraction)
    else:
        options["epochs"] = a.epochs
    options |= {"head_norm": a.head_norm} if a.head_norm else {}
    options |= {"head_statistics": a.head_statistics} if a.head_statistics else {}
    options |= parse_changes(a.set)
    told = parse_changes(changes.split(",")) if changes else {}
    before = BEFORE.get(name)
    return Run(row, seed, Path(a.output), told, options, None if before is None else run_of(before, seed, a))


def plan(a: argparse.Namespace) -> list[Run]:
    """The requested runs, each after those it depends on. Raises `ValueError` for an unknown row."""
    runs: dict[Path, Run] = {}
    for row in dict.fromkeys([*a.rows, *(QUESTIONS if a.questions else [])]):
        for seed in a.seeds:
            line = [run_of(row, seed, a)]
            while line[0].before is not None:
                line.insert(0, line[0].before)
            if a.seconds is not None:
                line.append(in_time(line[-1], a.seconds))
            runs = {**runs, **{run.result: run for run in line if run.result not in runs}}
    return list(runs.values())


def in_time(run: Run, seconds: float) -> Run:
    """The same row with a budget of training seconds instead of a number of steps."""
    options = {name: value for name, value in run.options.items() if name not in ("epochs", "max_steps")}
    return replace(run, options=options, seconds=seconds, pace=run)


def choose_rates(
    a: argparse.Namespace, data: tuple[Sequence, Sequence]
) -> tuple[list[str], dict[str, dict[str, float]], list[BaseException]]:
    """
    The rows of `a`, each at the one of three learning rates with the best held-out recall for the first seed.

    Returns:
        The rows; for each row, the recall at each multiple of its learning rate; errors of failed trials.
    """
    trials = trials_of(a)
    told = {**vars(a), "rows": [row for rates in trials.values() for row in rates.values()]}
    runs = plan(argparse.Namespace(**told | {"seeds": a.seeds[:1], "seconds": None}))
    errors = work_all([run for run in runs if finished(run) is None], a.jobs, a.threads, data, a.limit)
    results = {run.row: content for run in runs if (content := finished(run)) is not None}

    # failed trials cannot be chosen
    chosen = {row: row for row in a.rows}
    found: dict[str, dict[str, float]] = {}
    for row, rates in trials.items():
        known = {factor: held_out_recall(results[trial]) for factor, trial in rates.items() if trial in results}
        found[row] = {f"{factor:g}": recall for factor, recall in known.items()}
        if known:
            chosen[row] = rates[max(known, key=known.get)]
    return list(chosen.values()), found, errors


def finished(run: Run) -> dict[str, Any] | None:
    """The stored result of a finished run, or None.

    Raises:
        ValueError: it was made with different settings.
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


def train(run: Run, threads: int, children: list[subprocess.Popen]) -> float:
    """Trains a row in a separate process, with its output in `train.log`. Returns the peak memory in GiB.

    Raises:
        RuntimeError: it failed or was stopped; the message has the end of the log.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    log = run.directory / "train.log"
    with open(log, "ab") as stream:
        child = subprocess.Popen(run.command(threads), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        children.append(child)
        # unlike `child.wait()`, this returns the resource usage
        _, status, used = os.wait4(child.pid, 0)
        code = child.returncode = os.waitstatus_to_exitcode(status)
    if code or not (run.directory / "model" / "config.json").is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{run.row}, seed {run.seed}: the training ended with code {code}; {log} ends with\n{tail}")
    return used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def training_facts(run: Run) -> dict[str, Any]:
    """
    Steps, pairs and seconds of a training run from its log, in which a resumed run may repeat some steps.
    `quiet_seconds` is the time of all steps at the highest logged speed, as other processes can only slow a run down.
    """
    lines = [json.loads(line) for line in (run.directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # any kind of rows gives the speed of the step
    sizes = run.batch_sizes()
    name, batch = next(iter(sizes.items()))
    speeds = {line["step"]: line[f"{name}_per_second"] for line in lines if f"{name}_per_second" in line}
    steps = sorted(speeds)
    seconds = sum((b - a) * batch / max(speeds[b], 0.1) for a, b in zip([0, *steps], steps, strict=False))
    last = max((line for line in lines if "loss" in line), key=lambda line: line["step"])
    rows = steps[-1] * sum(sizes.values())
    quiet = steps[-1] * batch / max(*speeds.values(), 0.1)
    return {
        "steps": steps[-1], "pairs": rows, "train_seconds": seconds, "quiet_seconds": quiet, "loss": last["loss"]
    }  # fmt: skip


def watched(run: Run) -> dict[str, float]:
    """`log/...`: means over the run of the logged codebook values; empty without a codebook."""
    lines = [json.loads(line) for line in (run.directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    series = {name: {line["step"]: line[name] for line in lines if name in line} for name in WATCHED}
    return {f"log/{name}": fmean(values.values()) for name, values in series.items() if values}


def evaluate(
    model: Any, processor: Any, rows: Sequence, gallery: Sequence, multimodal: bool, rerank_k: int = RERANK_K
) -> dict[str, float]:
    """All metrics of a row: `first/...` and `all/...` (retrieval), `gap/...`, `joint/...` (image + caption queries).

    A model with a matching head also re-ranks the best candidates of `first/`.

    `gap/` compares images with first captions: distance of the centroids, mean cosine of pairs and of other
    combinations, and how well images can be separated from captions (.5: not at all).
    """
    values: dict[str, float] = {}
    for captions in ("first", "all"):
        how = {"name": captions, "captions": captions, "progress": False}
        if captions == "first" and hasattr(model, "match"):
            evaluator = RerankingEvaluator(rows, 128, rerank_k=rerank_k, **how)
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


def candidates(run: Run) -> int:
    """How many candidates the matching head re-ranks."""
    return RERANK_K_SCENES if run.name in TABLE_4 else RERANK_K


def measure(run: Run, data: tuple[Sequence, Sequence], limit: int | None) -> tuple[dict[str, float], int]:
    """All metrics of a trained row, and its number of parameters."""
    if run.name in BEFORE:
        directory = run.directory / "model"
        return stage_values(directory, run.config(), data[0], run.seed, limit, ROOT / "examples" / "data")
    if run.name in COMPARED:
        values, parameters = compare_values(run, limit, ROOT / "examples" / "data")
        return values | watched(run), parameters
    model, processor = load(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    values = evaluate(model, processor, *data, run.name in ONE_TOWER, candidates(run)) | watched(run)
    return values, sum(parameter.numel() for parameter in model.parameters())


def work(run: Run, threads: int, data: tuple[Sequence, Sequence], limit: int | None, children: list) -> dict[str, Any]:
    """Trains and evaluates one run and writes its result."""
    start, resumed = time.perf_counter(), any(run.directory.glob("checkpoint-*"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = train(run, threads, children)
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
        "seconds": run.seconds,  # its time budget, if any
        "learning_rate": run.learning_rate,
        "values": values,
        "parameters": parameters,
        **training_facts(run),
        "wall_seconds": time.perf_counter() - start,  # of this process only, if resumed
        "memory_gib": memory,  # of the last process only, if resumed
        "resumed": resumed,
        "command": command,
        "setup": run.setup(),
        "machine": machine_facts(device),
    }
    write_result(run, content)
    for checkpoint in run.directory.glob("checkpoint-*"):  # the model is kept
        shutil.rmtree(checkpoint)
    return content


def write_result(run: Run, content: Mapping[str, Any]) -> None:
    """Writes the result atomically."""
    partial = run.result.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(run.result)


def measure_again(runs: Sequence[Run], data: tuple[Sequence, Sequence], limit: int | None) -> None:
    """Evaluates finished rows again, for metrics added after they were trained."""
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
    """Trains and evaluates all runs, `jobs` at a time, with a progress bar; returns the errors of failed runs."""
    children: list[subprocess.Popen] = []
    # torch's number of threads is set per calling thread, that of numpy and scikit-learn per process
    pool, errors = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,)), []
    waiting = list(reversed(runs))  # the longest first
    running: dict[Future, Run] = {}
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tqdm(total=len(runs), desc="rows", unit="row") as bar:
            while waiting or running:
                # a stage waits for the previous one, a run with a time budget for the run that gives its speed
                unfinished = {run.result for run in [*waiting, *running.values()]}
                ready = [run for run in waiting if not unfinished & {one.result for one in run.earlier}]
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
            child.terminate()  # the engine then writes a checkpoint
        signal.signal(signal.SIGTERM, previous)
    return errors


def summary(content: Mapping[str, Any]) -> str:
    values = content["values"]
    if content["row"].partition(":")[0] in BEFORE:
        probes = [f"{name} {values[f'cls/{name}/logistic_accuracy']:.1%}" for name in PROBES]
        return f"{', '.join(probes)}, {content['wall_seconds'] / 60:.1f} min"
    if content["row"].partition(":")[0] in COMPARED:
        found = [f"{way.upper()}@10 {values[f'test_style/{way}_r@10']:.1%}" for way in ("tr", "ir")]
        return f"{', '.join(found)}, {content['steps']} steps, {content['wall_seconds'] / 60:.1f} min"
    return (
        f"TR@10 {values['first/tr_r@10']:.1%}, IR@10 {values['first/ir_r@10']:.1%}, gap {values['gap/distance']:.2f}, "
        f"{content['wall_seconds'] / 60:.1f} min"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="oner", help="whose rows to train and which pages to write")
    parser.add_argument("--rows", nargs="+", help=f"any of {', '.join(ROWS)}, or name:key=value,...")
    parser.add_argument("--questions", action="store_true", help="also the rows that test why naive contrast fails")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: 0 1 2 on an accelerator and for momo, codis and compare, else 0"
    )
    parser.add_argument("--epochs", type=float, help="default: 20, 6 for compare, 12 for transfer; codis uses --steps")
    parser.add_argument("--seconds", type=float, help="also train each row again, for this many seconds")
    parser.add_argument("--rates", action="store_true", help="use the best of three learning rates; only for compare")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the steps in momo's files")
    parser.add_argument("--steps", type=int, help="steps instead of epochs; default for codis: 120")
    parser.add_argument("--head-norm", choices=("batch", "layer", "none"), help="for all rows except CLIP")
    parser.add_argument("--head-statistics", choices=("shared", "separate"), help="for all rows except CLIP")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all rows")
    parser.add_argument("--data", help="default: test_style of the embedded pairs; scenes for momo and codis")
    parser.add_argument("--gallery", default=str(ROOT / "examples/data/emoji/train.parquet"))
    parser.add_argument("--id-column", help="default: hexcode; for scenes, each row is its own concept")
    parser.add_argument("--limit", type=int, help="evaluate on only this many rows, evenly spaced")
    parser.add_argument("--measure-again", action="store_true", help="evaluate finished rows again, train nothing")
    parser.add_argument("--output", default="runs/evidence", help="models, logs, one JSON per finished row")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="folder of the pages and their JSON files")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, help="rows at a time; default: 1 on an accelerator and for compare")
    parser.add_argument("--threads", type=int, help="per job; default: cores divided by jobs")
    a = parser.parse_args(argv)
    if a.rates and a.table != "compare":
        parser.error("--rates is for --table compare, whose rows are measured on held-out pictures")
    if (a.head_norm or a.head_statistics) and a.table not in ("oner", "transfer"):
        parser.error("--head-norm and --head-statistics are for --table oner and transfer: other families lack them")
    if a.table == "codis" and a.epochs is None:
        a.steps = a.steps or 120
    a.epochs = a.epochs or {"compare": 6, "transfer": 12}.get(a.table, 20)
    a.rows = a.rows or list(TABLES[a.table].rows)
    a.seeds = a.seeds or ([0, 1, 2] if torch.cuda.is_available() or a.table in ("momo", "codis", "compare") else [0])
    a.data = a.data or str(ROOT / SCENES.get(a.table, EMBEDDED))
    a.id_column = a.id_column or ("__row__" if a.table in SCENES else "hexcode")
    a.jobs = a.jobs or (1 if torch.cuda.is_available() or a.table == "compare" else min(cores, 4))
    a.threads = a.threads or max(1, cores // a.jobs)
    a.output = str(Path(a.output).resolve())
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """Trains missing rows, writes the pages, and returns the number of rows that failed."""
    a = parse(argv)
    plan(a)  # unknown rows fail before any data is read
    data = (
        spaced(open_rows(a.data, id_column=a.id_column), a.limit),
        # images of the same concepts, which scenes lack
        [] if a.table in SCENES else open_rows(a.gallery, id_column=a.id_column),
    )
    torch.set_num_threads(a.threads)
    threadpool_limits(a.threads, user_api="blas")
    errors: list[BaseException] = []
    rates: dict[str, dict[str, float]] = {}
    if a.rates:
        a.rows, rates, errors = choose_rates(a, data)
    runs = plan(a)
    missing = [run for run in runs if finished(run) is None]
    if a.measure_again:
        measure_again(runs, data, a.limit)
    elif missing:
        errors += work_all(missing, a.jobs, a.threads, data, a.limit)
    contents = [content for run in runs if (content := finished(run)) is not None]
    if contents:
        command = ["python", "examples/evidence.py", *(sys.argv[1:] if argv is None else argv)]
        facts = {"command": command, "jobs": a.jobs, "threads": a.threads, "data": Path(a.data).name}
        facts |= {"pictures": len(data[0]), "gallery": Path(a.gallery).name, "rates": rates}
        facts |= {"rerank_k": candidates(runs[0])}
        print(write_evidence(Path(a.docs), contents, facts, TABLES[a.table]))
    return len(errors)


if __name__ == "__main__":
    sys.exit(main())
