"""Whether a change moved the numbers: 20 steps of each kind of training, recorded in one checkout, held to another.

python tests/reliability/compare_runs.py record  DIR [--tree CHECKOUT] [--runs oner,simla]
python tests/reliability/compare_runs.py compare DIR [--tree CHECKOUT] [--runs oner,simla] [--tolerance 1e-6]

It knows a checkout by its command line only: it writes small sets and YAML files, starts the scripts in processes of
one thread, and reads log.jsonl and the exported weights. `--tree` is its own checkout if not given. `compare` prints,
for each run, whether the logged values and the weights are equal to the bit, or else the largest relative difference,
and exits with 1 where one is above the tolerance. Bits are a matter of processor and library versions, which
`record` notes and `compare` holds against its own: record and compare on one machine, in one environment.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from compare_runs_data import write_sets
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# All options of the command line that are used. {data} is the folder of the small sets, {tree} the checkout. Dropout,
# masks, augmentation, order and hard negatives draw in each run that has them.
EVERY_RUN = {
    "max_steps": STEPS,
    "log_every": 1,
    "warmup_epochs": 0.5,
    "weight_decay": 0.1,
    "mixed_precision": "no",
    "num_workers": 0,
    "eval_every_epochs": 0,
    "save_every_epochs": 100,
    "seed": 7,
}
AUGMENTATION = {"crop_scale": [0.5, 1.0], "horizontal_flip": 0.5}
PRETRAINING = {
    **EVERY_RUN,
    **AUGMENTATION,
    "size": "nano",
    "vocab_size": 400,
    "text_column": "captions",
    "id_column": "hexcode",
    "train_data": ["{data}/pairs.parquet"],
    "eval_data": ["{data}/more_pairs.parquet"],
    "batch_size": 16,
    "base_learning_rate": 0.02,
    "crop_margin": 0.2,
    "mlm_probability": 0.3,
}
# what a run in chunks adds: other sources, order and augmentation, so that more is covered
OTHERWISE = {
    "gradient_cache_chunks": 2,
    "train_data": ["{data}/pairs.parquet", "{data}/more_pairs.parquet"],
    "data_weights": [1, 3],
    "caption_rules": "albef",
    "random_specials": True,
    "one_row_per_id": True,
}
ONER = {
    **PRETRAINING,
    "family": "oner",
    "model_config": {"hidden_size": 64, "num_hidden_layers": 2, "projection_hidden_size": 64, "projection_dim": 32},
    "losses": ["itc", "xmc", "cic", "cmc", "mlm", "mim"],
    "match_ids": True,
    "color_jitter": 0.4,
    "grayscale": 0.2,
}
SIMLA = {
    **PRETRAINING,
    "family": "simla",
    "model_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_text_layers": 2,
        "projection_dim": 32,
        "max_position_embeddings": 64,
        "num_visual_codes": 512,
        "sep_token_id": None,
    },
    "image_tokenizer": "{tree}/examples/checkpoints/emoji-tokenizer",
    "losses": ["itc", "itm", "mlm", "mim", "psl"],
    "match_ids": True,
    "queue_size": 64,
    "distillation_ramp": 0.5,
    "ema_momentum": 0.9,
    "mim_masking": "blocks",
    "mim_min_block": 2,
    "mim_ratio": [0.3, 0.3],
    "code_crop": "common",
    "rand_augment": "albef-n2-m7",
}
TOKENIZER = {
    **EVERY_RUN,
    **AUGMENTATION,
    "family": "discrete_vae",
    "size": "nano",
    "model_config": {"blocks_per_group": 1, "reconstruction": "squared"},
    "text_column": "captions",
    "train_data": ["{data}/pairs.parquet"],
    "eval_data": ["{data}/more_pairs.parquet"],
    "temperatures": [1.0, 0.0625],
    "temperature_share": 0.7,
    "usage_weight": 0.01,
    "batch_size": 16,
    "base_learning_rate": 0.03,
}
TASK = {
    **EVERY_RUN,
    **AUGMENTATION,
    "family": "simla",
    "initial_model": "{tree}/examples/checkpoints/simla-emoji",
    # larger pictures than it was trained on; and dropout, which the checkpoint has none of
    "model_config": {"image_size": 80, "hidden_dropout": 0.1, "text_attention_dropout": 0.1},
    "image_folder": "{data}",
    "rand_augment": "albef-n2-m7",
    "caption_rules": "albef",
    "batch_size": 8,
    "base_learning_rate": 0.02,
    "schedule": "cosine",
}
SOFT_TARGETS = {"distillation": 0.4, "distillation_ramp": 0.5, "ema_momentum": 0.9}
CONTRAST = {**SOFT_TARGETS, "losses": ["itc", "itm"], "match_ids": True, "queue_size": 32}
GROUNDING = {
    **TASK,
    **CONTRAST,
    "task": "grounding",
    "train_data": ["{data}/expressions_train.json"],
    "eval_data": ["{data}/expressions_val.json"],
    "refs": "{data}/refs(unc).json",
    "instances": "{data}/instances.json",
    "detections": "{data}/dets.json",
}
KARPATHY = {"train_data": ["{data}/karpathy.json"], "split": "train"}
PRETRAIN, FINETUNE = "examples/pretrain.py", "examples/finetune.py"
NO_DROPOUT = {"hidden_dropout": 0.0, "text_attention_dropout": 0.0, "attention_dropout": 0.0}
# Name of a run -> script, options. A change of the order in which student and teacher draw their dropout moves every
# run that has any; those that end in "-still" have none.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "oner": (PRETRAIN, ONER),
    "oner-chunks-still": (PRETRAIN, {**ONER, **OTHERWISE}),
    "simla-still": (PRETRAIN, {**SIMLA, "model_config": {**SIMLA["model_config"], **NO_DROPOUT}}),
    "simla-chunks-still": (
        PRETRAIN,
        {**SIMLA, **OTHERWISE, "code_crop": "independent", "model_config": {**SIMLA["model_config"], **NO_DROPOUT}},
    ),
    "retrieval-still": (
        FINETUNE,
        {**TASK, **CONTRAST, **KARPATHY, "task": "retrieval", "eval_data": ["{data}/karpathy.json"],
         "eval_split": "test", "rerank_k": 4, "model_config": {"image_size": 80, **NO_DROPOUT}},
    ),
    "grounding-still": (FINETUNE, {**GROUNDING, "model_config": {"image_size": 80, **NO_DROPOUT}}),
    "oner-chunks": (
        PRETRAIN,
        {**ONER, **OTHERWISE, "model_config": {**ONER["model_config"], "attention_dropout": 0.1}},
    ),
    "simla": (PRETRAIN, SIMLA),
    "simla-chunks": (PRETRAIN, {**SIMLA, **OTHERWISE, "code_crop": "independent"}),
    "tokenizer": ("examples/train_image_tokenizer.py", TOKENIZER),
    "retrieval": (
        FINETUNE,
        {**TASK, **CONTRAST, **KARPATHY, "task": "retrieval", "eval_data": ["{data}/karpathy.json"],
         "eval_split": "test", "rerank_k": 4},
    ),
    "vqa": (
        FINETUNE,
        {**TASK, **SOFT_TARGETS, "task": "vqa",
         "train_data": ["{data}/vqa_train.json", "{data}/vqa_train_people.json"],
         "eval_data": ["{data}/vqa_val.json"], "eval_annotations": ["{data}/vqa_val_people.json"],
         "answer_list": "{data}/answers.json", "answers_in_full": 3},
    ),
    "entailment": (
        FINETUNE,
        {**TASK, **SOFT_TARGETS, "task": "entailment", "train_data": ["{data}/entailment_train.jsonl"],
         "eval_data": ["{data}/entailment_val.jsonl"], "image_folder": "{data}/pictures"},
    ),
    "nlvr2": (
        FINETUNE,
        {**TASK, **SOFT_TARGETS, "task": "nlvr2", "train_data": ["{data}/nlvr2_train.jsonl"],
         "eval_data": ["{data}/nlvr2_dev.jsonl"], "image_folder": "{data}/nlvr2"},
    ),
    "grounding": (FINETUNE, GROUNDING),
    "assignment": (
        FINETUNE,
        {**TASK, **KARPATHY, "task": "assignment", "eval_data": ["{data}/karpathy.json"], "eval_split": "test"},
    ),
}  # fmt: skip
# how keys of a log end that hold no number of the run
TIMES = "_per_second"
WEIGHTS = "model/model.safetensors"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
}


def filled(options: Any, **places: Path) -> Any:
    """The options with {data} and {tree} put in, at any depth."""
    if isinstance(options, dict):
        return {name: filled(value, **places) for name, value in options.items()}
    if isinstance(options, list):
        return [filled(value, **places) for value in options]
    return options.format(**places) if isinstance(options, str) else options


def run(name: str, tree: Path, data: Path, output: Path) -> None:
    """One run of a checkout; leaves log and weights in `output`. Raises `RuntimeError` with its last words."""
    script, options = RUNS[name]
    output.mkdir(parents=True)
    config = output / "run.yaml"
    options = {**filled(options, data=data, tree=tree), "output_dir": str(output)}
    config.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tree / script), "--config", str(config)],
        cwd=tree,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode or not (output / WEIGHTS).is_file():
        raise RuntimeError(f"{name} of {tree} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def result_of(output: Path) -> dict[str, Any]:
    """What a run came to: `values` of each step that it logged, and a digest of the weights."""
    values: dict[str, dict[str, Any]] = {}
    for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        step = values.setdefault(str(logged.pop("step")), {})
        # JSON's decimals give each double back as it was
        step.update(
            {key: float(value) for key, value in logged.items() if _is_number(value) and not key.endswith(TIMES)}
        )
    return {"values": values, "weights": digest(load_file(output / WEIGHTS))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def digest(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over the tensors in the order of their bytes: another name for one changes nothing."""
    each = [
        hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()).digest()
        for value in weights.values()
    ]
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()


def difference(one: float, other: float) -> float:
    """|one - other| by the larger of the two; 0 for equal bits, of NaN too."""
    if one.hex() == other.hex():
        return 0.0
    gap = abs(one - other) / max(abs(one), abs(other), sys.float_info.min)
    return gap if math.isfinite(gap) else math.inf


def compare_values(
    recorded: dict[str, dict[str, float]], found: dict[str, dict[str, float]]
) -> tuple[float, str, set[str]]:
    """
    The largest relative difference, where the first one is, and the names of values that one of the two has alone.

    Such names make no difference, but the loss must be there in every step. Raises `ValueError`.
    """
    if recorded.keys() != found.keys():
        raise ValueError(f"the steps are {sorted(found, key=int)}; expected {sorted(recorded, key=int)}")
    worst, first, alone = 0.0, "", set()
    for step, expected in recorded.items():
        if "loss" in expected and "loss" not in found[step]:
            raise ValueError(f"no loss at step {step}")
        alone |= expected.keys() ^ found[step].keys()
        gaps = {name: difference(expected[name], found[step][name]) for name in expected if name in found[step]}
        name = max(gaps, key=gaps.get)
        worst = max(worst, gaps[name])
        if gaps[name] and not first:
            first = f"from step {step}, {name}"
    return worst, first, alone


def compare_weights(recorded: Path, found: Path) -> tuple[float, str]:
    """The largest difference of a tensor from the recorded one of its name, by that one's largest entry; and where."""
    expected, weights = load_file(recorded), load_file(found)
    if digest(expected) == digest(weights):
        return 0.0, ""
    worst, where = 0.0, "zeros' signs"
    for name in sorted(expected.keys() | weights.keys()):
        one, other = expected.get(name), weights.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            return math.inf, name
        gap = ((one.double() - other.double()).abs().max() / one.double().abs().max().clamp(min=1e-30)).item()
        gap = gap if math.isfinite(gap) else math.inf
        if gap > worst:
            worst, where = gap, name
    return worst, where


def machine() -> dict[str, Any]:
    """What else the bits depend on."""
    names = ("torch", "transformers", "tokenizers", "accelerate", "timm", "numpy", "pillow", "datasets", "safetensors")
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    versions = {name: version(name) for name in names}
    return {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **versions,
    }


def commit_of(tree: Path) -> str:
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "no git"


def record(folder: Path, tree: Path, names: list[str]) -> None:
    """Runs `names` in `tree` and keeps in `folder` their sets, values and weights. Recorded runs are made anew."""
    if not (folder / "data").is_dir():
        write_sets(tree, folder / "data")
    path = folder / "recorded.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    if recorded.setdefault("machine", machine()) != machine():
        raise SystemExit(f"{path} was recorded on {recorded['machine']}; expected {machine()}: take another folder")
    for name, output, seconds in runs_of(folder, tree, names):
        shutil.copyfile(output / WEIGHTS, folder / f"{name}.safetensors")
        recorded["runs"][name] = {"commit": commit_of(tree), **result_of(output)}
        path.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        print(f"{name:<14} recorded, {seconds:.0f} s", flush=True)


def runs_of(folder: Path, tree: Path, names: list[str]) -> Iterator[tuple[str, Path, float]]:
    """Name, output and seconds of each run, made now; the output is gone afterwards."""
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            start, output = time.perf_counter(), Path(scratch) / name
            run(name, tree, folder / "data", output)
            yield name, output, time.perf_counter() - start


def compare(folder: Path, tree: Path, names: list[str], tolerance: float) -> bool:
    """Prints the table; whether nothing differs by more than `tolerance`."""
    recorded = json.loads((folder / "recorded.json").read_text(encoding="utf-8"))
    missing = [name for name in names if name not in recorded["runs"]]
    if missing:
        raise SystemExit(f"{folder} holds no recording of {', '.join(missing)}; it has {', '.join(recorded['runs'])}")
    here, there = machine(), recorded["machine"]
    for name in here.keys() | there.keys():
        if here.get(name) != there.get(name):
            print(f"{name} is {here.get(name)}, and was {there.get(name)}: other bits are to be expected")
    print(f"{'run':<14} {'steps':>5}  {'logged values':<42} {'weights':<42} seconds")
    same = True
    for name, output, seconds in runs_of(folder, tree, names):
        expected, found = recorded["runs"][name], result_of(output)
        gap, first, alone = compare_values(expected["values"], found["values"])
        weights = compare_weights(folder / f"{name}.safetensors", output / WEIGHTS)
        same = same and max(gap, weights[0]) <= tolerance
        steps = sum("loss" in values for values in found["values"].values())
        print(f"{name:<14} {steps:>5}  {verdict(gap, first):<42} {verdict(*weights):<42} {seconds:.0f}", flush=True)
        if alone:
            print(f"{'':<14} only one of the two logs {', '.join(sorted(alone))}")
    return same


def verdict(gap: float, where: str) -> str:
    return f"{gap:.1e} ({where})" if where else "equal to the bit"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--tree", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout to run in"
    )
    parser.add_argument("--runs", default=",".join(RUNS), help="names, with commas between; all if not given")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference; 0 means bits")
    asked = parser.parse_args(argv)
    names = asked.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"unknown runs {', '.join(unknown)}; expected some of {', '.join(RUNS)}")
    folder, tree = asked.folder.resolve(), asked.tree.resolve()
    if asked.what == "record":
        record(folder, tree, names)
    elif not compare(folder, tree, names, asked.tolerance):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
