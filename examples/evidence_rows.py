"""Rows of examples/evidence.py: configuration and script of each, and the command that trains one seed."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from oner import CodisConfig, MomoConfig, OneRConfig, SimlaConfig
from oner.training.publishing.model_card import slug
from oner.training.run.parsing import read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
CLIP, NEOMME = "examples/clip_baseline.py", "examples/neomme_baseline.py"


class Row(NamedTuple):
    """Title in the table, configuration, training script, and further arguments of the script."""

    title: str
    config: str
    script: str = "examples/pretrain.py"
    words: tuple[str, ...] = ()


# OneR's Tables 6, 7 and 4, SIMLA's Table 1, CODIS' Table 4, MoMo's Tables 4 and 6, and the comparison
TITLES = {
    "clip": ("CLIP (open_clip, two towers)", "oner_emoji_itc_cmc.yaml", CLIP),
    "itc": ("ITC", "oner_emoji_itc.yaml"),
    "itc_double": ("ITC, weighted double", "oner_emoji_itc_double.yaml"),
    "itc_two_heads": ("ITC (two heads)", "oner_emoji_itc_two_heads.yaml"),
    "itc_xmc": ("ITC + XMC", "oner_emoji_itc_xmc.yaml"),
    "itc_xmc_cic": ("ITC + XMC + CIC", "oner_emoji_itc_xmc_cic.yaml"),
    "itc_cmc": ("ITC + CMC (OneR)", "oner_emoji_itc_cmc.yaml"),
    "no_mim": ("OneR - MIM", "oner_emoji_no_mim.yaml"),
    "no_mim_mlm": ("OneR - MIM - MLM", "oner_emoji_no_mim_mlm.yaml"),
    "transfer_two_heads": ("two heads: pairs", "oner_emoji_half_two_heads.yaml"),
    "transfer_two_heads_texts": ("two heads: pairs, and texts", "oner_emoji_half_two_heads_texts.yaml"),
    "transfer_one_tower": ("one tower: pairs", "oner_emoji_half.yaml"),
    "transfer_one_tower_texts": ("one tower: pairs, and texts", "oner_emoji_half_texts.yaml"),
    "simla_itm": ("ITM", "simla_emoji_itm.yaml"),
    "simla_itm_itc": ("ITM + ITC", "simla_emoji_itm_itc.yaml"),
    "simla_itm_itc_mlm": ("ITM + ITC + MLM", "simla_emoji_itm_itc_mlm.yaml"),
    "simla_itm_itc_mlm_mim": ("ITM + ITC + MLM + MIM", "simla_emoji_itm_itc_mlm_mim.yaml"),
    "simla_full": ("ITM + ITC + MLM + MIM + PSL (SIMLA)", "simla_emoji_full.yaml"),
    "codis_cross": ("cross (ALBEF)", "codis_scenes_cross.yaml"),
    "codis_intra_cross": ("intra + cross", "codis_scenes_intra_cross.yaml"),
    "codis_cross_codebook": ("cross + codebook", "codis_scenes_cross_codebook.yaml"),
    "codis_student_codebook": ("intra + cross + codebook of student features", "codis_scenes_student_codebook.yaml"),
    "codis_full": ("intra + cross + codebook (CODIS)", "codis_scenes.yaml"),
    "momo_untrained": ("nothing (one step)", "momo_small_stage1.yaml"),
    "momo_stage1": ("stage 1: images", "momo_small_stage1.yaml"),
    "momo_stage2": ("stage 2: texts and images", "momo_small_stage2.yaml"),
    "momo_stage2_text_only": ("stage 2: texts alone", "momo_small_stage2_text_only.yaml"),
    "momo_stage3": ("stage 3: texts and pairs", "momo_small_stage3.yaml"),
    "momo_stage3_no_cmga": ("stage 3 without CMGA", "momo_small_stage3_no_cmga.yaml"),
    "compare_oner": ("OneR", "compare_oner.yaml"),
    "compare_simla": ("SIMLA", "compare_simla.yaml"),
    "compare_albef": ("ALBEF (CODIS without codes)", "compare_albef.yaml"),
    "compare_codis": ("CODIS", "compare_codis.yaml"),
    "compare_momo": ("MoMo (stage 3, pairs alone)", "compare_momo.yaml"),
    "compare_clip": ("CLIP (open_clip)", "compare_oner.yaml", CLIP, ("--conv_stem",)),
    "compare_neomme": ("NeoMME (ITC)", "compare_oner.yaml", NEOMME),
    "compare_siglip": ("CLIP, sigmoid loss (SigLIP)", "compare_oner.yaml", CLIP, ("--conv_stem", "--sigmoid")),
}
ROWS = {name: Row(*told) for name, told in TITLES.items()}
OTHER_TABLES = ("transfer_", "simla_", "codis_", "momo_", "compare_")
TABLE_6 = [name for name in ROWS if not name.startswith(("no_", *OTHER_TABLES))]
# OneR's page also reports queries of image and text in one sequence, which only these rows can embed
ONE_TOWER = [name for name in ROWS if name != "clip" and not name.startswith(OTHER_TABLES)]
TRANSFER = [name for name in ROWS if name.startswith("transfer_")]
TABLE_1 = [name for name in ROWS if name.startswith("simla_")]
TABLE_4 = [name for name in ROWS if name.startswith("codis_")]
COMPARED = [name for name in ROWS if name.startswith("compare_")]
# possible reasons why naive contrast fails: statistics of the heads, pooled feature, temperature, batch size
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
# vocab_size is an argument of the run, an upper bound
MODEL_FIELDS = {entry.name for kind in FAMILIES for entry in fields(kind)} - {"vocab_size"}


@dataclass(frozen=True)
class Run:
    """
    One row of the table with one seed: what to train, and where to store it.

    Attributes:
        before: The run whose model it starts from.
        seconds, pace: Training time, and the run whose speed converts it to steps.
    """

    row: str
    seed: int
    output: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    before: "Run | None" = None
    seconds: float | None = None
    pace: "Run | None" = None

    @property
    def name(self) -> str:
        return self.row.split(":")[0]

    @property
    def title(self) -> str:
        changed = self.row.partition(":")[2].replace(",", ", ")
        return ROWS[self.name].title + (f", {changed}" if changed else "")

    @property
    def place(self) -> str:
        """The name of its files in --output."""
        return slug(self.row) + ("" if self.seconds is None else f"-{self.seconds:g}s")

    @property
    def directory(self) -> Path:
        return self.output / self.place / f"seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.output / f"{self.place}-seed{self.seed}.json"

    @property
    def earlier(self) -> "list[Run]":
        """The runs that must finish first."""
        return [run for run in (self.before, self.pace) if run is not None]

    def arguments(self) -> dict[str, Any]:
        """The arguments set on top of the row's configuration, by name."""
        told = {**self.options, **self.changes, "seed": self.seed}
        model = {key: value for key, value in told.items() if key in MODEL_FIELDS}
        flat = {key: value for key, value in told.items() if key not in MODEL_FIELDS}
        if model:  # a mapping on the command line replaces the file's, so merge the file's into it
            flat["model_config"] = {**self.config().get("model_config", {}), **model}
        if self.before is not None:
            flat["initial_model"] = str(self.before.directory / "model")
        if self.pace is not None:
            flat["max_steps"] = self.steps_in_time()
        return flat

    def steps_in_time(self) -> int:
        """The steps that fit into `seconds`. Raises `ValueError` if the run that gives the speed has no result."""
        if not self.pace.result.is_file():
            raise ValueError(
                f"{self.row}, seed {self.seed}: its speed is not known, for {self.pace.result} is missing; where that "
                f"was removed, remove {self.result} too"
            )
        told = json.loads(self.pace.result.read_text(encoding="utf-8"))
        return max(1, round(self.seconds * told["steps"] / told["quiet_seconds"]))

    def config(self) -> dict[str, Any]:
        """The row's configuration file."""
        return read_config(CONFIGS / ROWS[self.name].config)

    @property
    def learning_rate(self) -> float:
        return {**self.config(), **self.options, **self.changes}["base_learning_rate"]

    def command(self, threads: int) -> list[str]:
        """The command that trains this row, from the root of the repository."""
        told = ROWS[self.name]
        words = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, told.script, *told.words]
        config = os.path.relpath(CONFIGS / told.config, ROOT)
        words += ["--config", config, "--output_dir", str(self.directory)]
        for key, value in {"resume": "auto", **self.arguments()}.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
        return words

    def setup(self) -> dict[str, Any]:
        """The settings that a stored result must match to be reused."""
        told = {key: value for key, value in self.arguments().items() if key != "num_workers"}
        if self.before is not None:
            told["initial_model"] = self.before.setup()
        return json.loads(json.dumps({"row": self.row, "config": self.config(), **told}))

    def batch_sizes(self) -> dict[str, int]:
        """Rows per step, by kind."""
        told = {**self.config(), **self.arguments()}
        portions = told.get("portions") or {told.get("kind", "pairs"): {}}
        return {name: portion.get("batch_size", told.get("batch_size")) for name, portion in portions.items()}


def parse_changes(text: Sequence[str]) -> dict[str, Any]:
    """Parses `key=value` words, with YAML values. Raises `ValueError` for any other word."""
    changes = {}
    for word in text:
        key, equals, value = word.partition("=")
        changes[key] = yaml.safe_load(value)
        if not equals or not key or changes[key] is None:
            raise ValueError(f"expected key=value, got {word!r}")
    return changes
