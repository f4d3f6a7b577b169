"""How much of each image does OneR need during training? A share of the patches, or smaller images, at first.

    python examples/less_work.py --data runs/scenes                        a small model, one seed
    python examples/less_work.py --data runs/scenes --seeds 0 1 2 --full_size --steps 1950

All ways start from the same weights and read the same pairs in the same order; `--lengths` also trains on whole images
for a share of the steps, to compare at equal time. The seconds of a way are its steps times the seconds of a step,
which are measured for all ways in turn; on a CPU they are CPU time of the process. A finished run is stored as a JSON
file in --output and not trained again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmark_steps import ObjectiveStep
from benchmark_visible import seconds_of

from oner.training.commands.train import main as trained
from oner.training.publishing.model_card import markdown_table
from oner.training.run.building import build_processor_and_config
from oner.training.run.collators import build_collators
from oner.training.run.launch import choose_precision
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED

CONFIG = Path(__file__).resolve().parent / "configs" / "oner_scenes.yaml"
# a model that one thread trains in minutes; the learning rate suits its width
SMALL = {
    "model_config": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_hidden_size": 64,
        "projection_dim": 64,
    },
    "batch_size": 32,
    "base_learning_rate": 16.0e-3,
}
SIDE = 64  # of the scenes, in pixels
UNTIL = 0.85  # share of the steps in the cheap first part; the rest reads whole images
WARMUP, LAST_WARMUP = 0.08, 0.2  # shares of the steps, for a first run and for one that continues another
LAST_RATE = 0.5  # share of the peak learning rate, for a run that continues another
RECALLS = ("tr_r@10", "ir_r@10")
HEADER = ["way", "s a step, first part", "seconds of the run", "TR@10 by seed", "IR@10 by seed", "mean"]


@dataclass(frozen=True)
class Way:
    """
    Args:
        options: Options of the run for its first part; with an image_size, the second part is a separate run.
        until: Share of the steps in the first part.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    until: float = UNTIL

    @property
    def image_size(self) -> int | None:
        return self.options.get("image_size")

    def runs(self, steps: int, peak: float) -> Iterator[dict[str, Any]]:
        """Options of each run; a later run starts from the model of the previous one."""
        first = round(self.until * steps)
        if self.image_size is None:
            yield {**self.options, "max_steps": steps, "warmup_steps": round(WARMUP * steps)}
            return
        yield {
            "model_config": {"image_size": self.image_size},
            "max_steps": first,
            "warmup_steps": round(WARMUP * steps),
        }
        rest = steps - first
        yield {
            "model_config": {"image_size": SIDE},
            "max_steps": rest,
            "warmup_steps": round(LAST_WARMUP * rest),
            "base_learning_rate": LAST_RATE * peak,
        }


def kept(share: float, **options: Any) -> Way:
    return Way({"image_keep": share, "image_keep_until": UNTIL, **options})


WAYS = {
    "whole": Way(until=1.0),
    "half of the patches": kept(0.5, keep_in_keys=True),
    "a quarter": kept(0.25, keep_in_keys=True),
    "a quarter, keys of whole pictures": kept(0.25),
    "half of the side": Way({"image_size": 32}),
}


class Runs:
    """The runs of these arguments: their options and their results."""

    def __init__(self, a: argparse.Namespace):
        self.a = a
        self.output = Path(a.output)
        self.base = {"base": str(CONFIG), **({} if a.full_size else SMALL)}
        self.base |= {
            "train_data": [f"{a.data}/train.parquet"],
            "eval_data": [f"{a.data}/unseen_pairs.parquet"],
            "eval_captions": "first",
            "eval_every_epochs": 0,
            "save_every_epochs": 0,
            "tokenizer": str(self.output / "tokenizer"),
        }
        self.check_setup()
        if not (self.output / "tokenizer" / "tokenizer_config.json").is_file():
            self.train_tokenizer()

    def check_setup(self) -> None:
        """Refuses an output directory whose results belong to another model or other data."""
        setup = self.output / "setup.json"
        if setup.is_file() and json.loads(setup.read_text()) != self.base:
            raise SystemExit(f"{self.output} has results of other data or another size: name another --output")
        self.output.mkdir(parents=True, exist_ok=True)
        setup.write_text(json.dumps(self.base, indent=1) + "\n")

    def train_tokenizer(self) -> None:
        """Trains one tokenizer for all runs, on the captions."""
        arguments = parse_arguments(self.arguments("vocabulary", 0, {"tokenizer": None}))
        processor, _ = build_processor_and_config(arguments, open_portions(arguments))
        processor.tokenizer.save_pretrained(self.output / "tokenizer")

    def arguments(self, name: str, seed: int, options: Mapping[str, Any]) -> list[str]:
        """Writes the configuration of a run and returns its command line."""
        directory = self.output / name.replace(" ", "_").replace(",", "") / f"seed{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        fields = {**self.base.get("model_config", {}), **options.get("model_config", {})}
        told = {**self.base, **options, "seed": seed, "output_dir": str(directory), "model_config": fields}
        (directory / "run.yaml").write_text(yaml.safe_dump(told))
        return ["--config", str(directory / "run.yaml")]

    def recall(self, title: str, way: Way, steps: int, seed: int) -> dict[str, float]:
        """Recall of a way's last model, which is trained unless its result file exists."""
        result = self.output / f"{title.replace(' ', '_')}_{steps}_seed{seed}.json"
        if result.is_file():
            return json.loads(result.read_text())
        peak = parse_arguments(self.arguments(title, seed, {})).run.base_learning_rate
        before: dict[str, Any] = {}
        for number, options in enumerate(way.runs(steps, peak)):
            line = self.arguments(f"{title} {steps} part{number}", seed, {**options, **before})
            values = trained(line)
            if values is None:
                raise SystemExit(STOPPED)  # stopped by a signal: no result is written
            before = {"initial_model": str(Path(line[1]).parent / "model"), "tokenizer": None}
        found = {name.split("/")[1]: value for name, value in values.items()}
        result.write_text(json.dumps(found))
        return found

    def seconds(self, ways: Mapping[str, Way]) -> dict[str, float]:
        """Seconds of a step in the first part, by way: medians over alternating rounds, data loading included."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        calls = {title: self.step(title, way, device) for title, way in ways.items()}
        took: dict[str, list[float]] = {title: [] for title in ways}
        for turn in range(self.a.repeats + 2):
            for title, call in calls.items():
                spent = seconds_of(call, device)
                if turn > 1:  # the first two rounds are warm-up
                    took[title].append(spent)
        return {title: statistics.median(times) for title, times in took.items()}

    def step(self, title: str, way: Way, device: torch.device) -> Callable[[], None]:
        """A function that reads the next batch of a way's first part and takes a step on it."""
        options = next(way.runs(self.a.steps, 1.0))
        arguments = parse_arguments(self.arguments(f"{title} timed", 0, options))
        rows = open_portions(arguments)
        processor, config = build_processor_and_config(arguments, rows)
        batches = RunLoader(arguments, rows, build_collators(arguments, processor, config))(0)
        step = ObjectiveStep(arguments, config, device, choose_precision(arguments.run.mixed_precision) == "bf16")

        def call() -> None:
            step({name: value.to(device) for name, value in next(batches)["pairs"].items()})

        return call


def lines(runs: Runs) -> list[list[str]]:
    """Lines of the table: seconds of a step, time of the run relative to whole images, and recalls of all seeds."""
    a = runs.a
    ways = {title: WAYS[title] for title in a.ways}
    seconds = runs.seconds({"whole": WAYS["whole"], **ways})
    planned = {title: (way, a.steps) for title, way in ways.items()}
    for length in a.lengths:
        planned[f"whole, {length:g} of the pairs"] = (WAYS["whole"], round(length * a.steps))
    table = []
    for title, (way, steps) in planned.items():
        cheap = seconds[title] if title in seconds else seconds["whole"]
        share = (way.until * cheap + (1 - way.until) * seconds["whole"]) / seconds["whole"] * steps / a.steps
        found = [runs.recall(title, way, steps, seed) for seed in a.seeds]
        recalls = [" ".join(f"{100 * one[name]:.1f}" for one in found) for name in RECALLS]
        mean = f"{100 * statistics.fmean(one[name] for one in found for name in RECALLS):.1f}" if found else ""
        table.append([title, f"{cheap:.3f}", f"{100 * share:.0f} %", *recalls, mean])
        print(markdown_table(HEADER, table), flush=True)
    return table


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/scenes", help="Output folder of `make scenes`.")
    parser.add_argument("--output", default="runs/less_work")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument(
        "--lengths", nargs="*", type=float, default=[0.55], help="Also whole images for shares of --steps."
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="If empty, only time is measured.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7, help="Rounds of timed steps.")
    parser.add_argument("--full_size", action="store_true", help="Use the model and batch of oner_scenes.yaml.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    runs = Runs(options(argv))
    table = markdown_table(HEADER, lines(runs))
    (runs.output / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
