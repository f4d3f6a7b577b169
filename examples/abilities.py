"""What a model can do on composed scenes: all abilities of docs/abilities.md in one table, with their aims.

    make scenes
    python examples/abilities.py runs/mine/model --scenes runs/scenes

It reads {split}.parquet of each split, and {split}_queries.parquet and {split}_gallery.parquet if they exist
(examples/data/scenes.md), and writes results/{split}.abilities.json and results/abilities.md under --output. Abilities
that a family lacks are omitted. VQA, entailment and NLVR2 need fine-tuned models: evaluate.py --tasks vqa.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

import oner  # noqa: F401  registers the models with transformers' auto classes
from oner.training.evaluation.embedding import spaced
from oner.training.evaluation.results import write_results
from oner.training.evaluation.scenes import SceneEvaluator
from oner.training.publishing.model_loading import load_model

SPLITS = ("seen", "unseen_pairs", "unseen_style", "unseen_concepts")
SINGLES = "seen"  # images of single things in this split serve as A in "A and B": training styles and concepts


@dataclass(frozen=True)
class Ability:
    """A line of the table: a metric, its chance level, and its aim for training styles and for the unseen style."""

    name: str
    value: str
    chance: str | float | None = None
    aim: float | None = None
    aim_unseen_style: float | None = None
    percent: bool = True

    def chance_on(self, split: str, values: dict[str, float]) -> float | None:
        """The chance level: a constant, or a value measured on the split."""
        return values.get(f"{split}/{self.chance}") if isinstance(self.chance, str) else self.chance

    def aim_on(self, split: str) -> float | None:
        if split == "unseen_concepts":
            return None
        return self.aim_unseen_style if split == "unseen_style" else self.aim


def _looked_for(what: str, kind: str, aims: Sequence[float], style: Sequence[float]) -> list[Ability]:
    return [
        Ability(f"{what}, right quarter", f"{kind}/quarter", f"{kind}/quarter_chance", aims[0], style[0]),
        Ability(f"{what}, in the box", f"{kind}/box", f"{kind}/box_chance", aims[1], style[1]),
    ]


ABILITIES = [
    Ability("picture → text R@10", "retrieval/tr_r@10", "retrieval/tr_chance@10", 0.97, 0.6),
    Ability("text → picture R@10", "retrieval/ir_r@10", "retrieval/ir_chance@10", 0.97, 0.6),
    *_looked_for("localisation by cosine", "localization", (0.85, 0.8), (0.65, 0.6)),
    *_looked_for("Grad-CAM of matching", "grounding_itm", (0.6, 0.6), (0.6, 0.6)),
    *_looked_for("Grad-CAM of contrast", "grounding_itc", (0.6, 0.6), (0.6, 0.6)),
    Ability("true against hard captions by matching, AUC", "hard/itm_auc", 0.5, 0.85, 0.85, False),
    Ability("true against hard captions by cosine, AUC", "hard/cosine_auc", 0.5, percent=False),
    Ability("re-ranked by the logit, R@1 over cosine's", "rerank/logit_over_cosine", None, 1.3, 1.3, False),
    Ability("re-ranked by the difference", "rerank/difference_over_cosine", None, 1.3, 1.3, False),
    Ability("re-ranked by the sum", "rerank/sum_over_cosine", None, 1.3, 1.3, False),
    Ability('A\'s picture + "a B" → both, R@10', "pairs/both_r@10", "pairs/chance@10"),
    Ability("  over the better of picture and words", "pairs/both_over_better", None, 2.5, 2.5, False),
    Ability("  over the sum of the two embeddings", "pairs/both_over_sum", None, 1.2, 1.1, False),
    Ability("composed queries of eight kinds, R@10", "composed/both_r@10", "composed/chance@10"),
    Ability("  over the better of picture and words", "composed/both_over_better", percent=False),
    Ability("  over the sum of the two embeddings", "composed/both_over_sum", percent=False),
    Ability("  the target among its ten choices", "composed/both_choice_r@1", 0.1),
    Ability("picture + its caption → the same redrawn, R@1", "same/both_r@1", "same/chance@1"),
    Ability("  over words alone", "same/both_over_words", None, 1.1, 1.1, False),
    Ability("single things by name, top-1", "guidance/guided/zero_shot_top1", "guidance/guided/zero_shot_chance1"),
    Ability("  guided by s', gain", "guidance/guided_gain", None, 0.0, 0.0),
    Ability("  guided by s + s', gain", "guidance/sum_gain", None, 0.0, 0.0),
    Ability("other languages, mean R@10 over English's", "language/mean_over_english", None, 0.7, 0.7, False),
]


def read(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a parquet file with all columns, at most `limit`, evenly spaced; empty if the file does not exist."""
    return spaced(pq.read_table(path).to_pylist(), limit) if path.is_file() else []


def evaluators(a: argparse.Namespace) -> Iterator[SceneEvaluator]:
    """One evaluator per split."""
    rows = {split: read(a.scenes / f"{split}.parquet", a.limit) for split in SPLITS}
    if missing := [split for split in a.splits if not rows[split]]:
        raise SystemExit(f"{a.scenes} has no {' and no '.join(f'{one}.parquet' for one in missing)}: make scenes")

    # query images are in training styles, except for unseen concepts
    known = [row for row in rows[SINGLES] if len(row["names"]) == 1]
    for split in a.splits:
        own = [row for row in rows[split] if len(row["names"]) == 1]
        yield SceneEvaluator(
            rows[split],
            known + own if split != "unseen_style" else known,
            read(a.scenes / f"{split}_queries.parquet", a.limit),
            read(a.scenes / f"{split}_gallery.parquet"),
            split,
            a.batch_size,
            progress=not a.quiet,
        )


def shown(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.2f}"


def table(values: dict[str, float], scenes: dict[str, int]) -> str:
    """The abilities as a Markdown table: for each split the value and, in brackets, chance and aim.

    `scenes` gives the number of scenes per split: recall is easier among fewer.
    """
    splits = list(scenes)
    lines = ["| ability | " + " | ".join(splits) + " |", "|---" * (1 + len(splits)) + "|"]
    for ability in ABILITIES:
        cells = [cell(ability, split, values) for split in splits]
        if any(cells):
            lines.append(f"| {ability.name} | " + " | ".join(cells) + " |")
    counted = ", ".join(f"{count:,} of {split}" for split, count in scenes.items())
    note = f"Scenes: {counted}; the aims of recall are for 1,000. In brackets: what chance gives, and the aim; "
    note += "✓ where it is reached."
    tested = [name for name in values if name.endswith("_mcnemar_p")]
    note += "".join(f" McNemar's p, {name.removesuffix('_mcnemar_p')}: {values[name]:.2g}." for name in tested)
    return "\n".join([*lines, "", note, ""])


def cell(ability: Ability, split: str, values: dict[str, float]) -> str:
    value = values.get(f"{split}/{ability.value}")
    if value is None:
        return ""
    chance = ability.chance_on(split, values)
    aim = ability.aim_on(split)
    notes = [shown(chance, ability.percent)] * (chance is not None)
    notes += [f"≥ {shown(aim, ability.percent)}"] * (aim is not None)
    reached = " ✓" if aim is not None and value >= aim else ""
    return shown(value, ability.percent) + (f" ({', '.join(notes)})" if notes else "") + reached


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a name on the Hub")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"), help="output folder of `make scenes`")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--limit", type=int, help="maximum number of scenes and queries per split, evenly spaced")
    parser.add_argument("--output", help="default: the model directory")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    a = parse(arguments)
    model = load_model(AutoModelForZeroShotImageClassification, a.model).to(a.device).float().eval()
    processor = AutoProcessor.from_pretrained(a.model)
    results = Path(a.output or a.model) / "results"
    values: dict[str, float] = {}
    scenes: dict[str, int] = {}
    for evaluator in evaluators(a):
        found = dict(evaluator.run(model, processor))
        for score in ("guided", "sum"):
            name = f"{evaluator.name}/guidance/{score}"
            if f"{name}_top1" in found:
                found[f"{name}_gain"] = found[f"{name}_top1"] - found[f"{name}_without_top1"]
        protocol = {**evaluator.protocol, "split": evaluator.name, "source": str(a.scenes), "limit": a.limit}
        write_results(results / f"{evaluator.name}.abilities.json", found, protocol, model, a.model)
        values |= found
        scenes[evaluator.name] = len(evaluator.rows)

    # one table for all splits
    text = table(values, scenes)
    (results / "abilities.md").write_text(text, encoding="utf-8")
    print(text)
    return values


if __name__ == "__main__":
    main()
