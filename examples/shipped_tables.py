"""Tables of README.md, docs/suite.md and docs/abilities.md, from the results stored with the shipped checkpoints.

    python examples/shipped_tables.py

writes each table between its marks, so that no figure is typed by hand. The results of a checkpoint are the output of
evaluate.py, abilities.py and `oner suite`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from abilities import ABILITIES, shown
from page_marks import between_marks

from oner.training.evaluation.suite import table as suite_table

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "examples" / "checkpoints"


class Shipped(NamedTuple):
    """A checkpoint and its results; `[name]` in `told` is replaced by the result of that name in per cent."""

    name: str
    told: str


class Family(NamedTuple):
    name: str
    what: str
    shipped: tuple[Shipped, ...]


SCENES = "unseen concept pairs [unseen_pairs/tr_r@10] / [unseen_pairs/ir_r@10] %"
STYLE = "unseen style [unseen_style/tr_r@10] / [unseen_style/ir_r@10] %"
EMOJI = "[test_style/tr_r@10] / [test_style/ir_r@10] % among 1,259, unseen style"
FAMILIES = (
    Family(
        "OneR (Jang, Kong et al., AAAI 2023)",
        "one transformer for text, images, and both together",
        (
            Shipped(
                "oner-emoji",
                "R@10 image→text / text→image among 1,259 emoji in an unseen drawing style: "
                "[test_style/tr_r@10] / [test_style/ir_r@10] % (chance 0.8)",
            ),
            Shipped(
                "oner-icons",
                "R@10 text→image: [unseen_names/ir_r@10] % among 4,890 icons with unseen names (chance 1), "
                "[unseen_sets_5000/ir_r@10] % among 5,000 from unseen icon sets (chance .2)",
            ),
            Shipped(
                "oner-scenes",
                f"R@10 both ways among 1,000 scenes: {SCENES}, {STYLE}, unseen concepts [unseen_concepts/tr_r@10] / "
                "[unseen_concepts/ir_r@10] % (chance 1)",
            ),
        ),
    ),
    Family(
        "SIMLA (Khan et al., ECCV 2022)",
        "two towers in one space, with cross-attention for matching, grounding and question answering",
        (
            Shipped("simla-emoji", EMOJI),
            Shipped(
                "simla-scenes",
                f"{SCENES}, {STYLE}; points to the right quadrant in [unseen_pairs/grounding_itc/quarter] % (chance "
                "[unseen_pairs/grounding_itc/quarter_chance])",
            ),
        ),
    ),
    Family(
        "CODIS (Duan et al., CVPR 2022), ALBEF (Li et al., NeurIPS 2021)",
        "alignment through a learned codebook, with optimal transport",
        (Shipped("codis-scenes", f"ALBEF's published checkpoints can be imported and exported; {SCENES}, {STYLE}"),),
    ),
    Family(
        "MoMo (Chada et al., 2023)",
        "one encoder trained on images, texts and pairs, in three stages",
        (
            Shipped(
                "momo-small",
                f"trained for an hour on one core: {EMOJI}; [what each stage adds](docs/evidence_momo.md)",
            ),
        ),
    ),
)
# columns of README's second table: probe of frozen features -> title
PROBES = {
    "digits": "digits",
    "emoji_groups": "emoji groups",
    "supersense": "gloss topics",
    "hypernym": "hypernyms",
}


def results_of(name: str) -> dict[str, float]:
    """All numbers in a checkpoint's results except the suite's."""
    values: dict[str, float] = {}
    for path in sorted((CHECKPOINTS / name / "results").glob("*.json")):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not path.name.startswith("suite."):
            # a run's own metrics take precedence: they cover all rows
            values = {**content.get("values", {}), **values, **content.get("metrics", {})}
    return values


def suite_of(name: str) -> dict[str, dict[str, float]]:
    """Task of the suite -> its numbers, for measured tasks."""
    paths = sorted((CHECKPOINTS / name / "results").glob("suite.*.json"))
    return {path.name.split(".")[1]: json.loads(path.read_text(encoding="utf-8"))["values"] for path in paths}


def filled(shipped: Shipped) -> str:
    """Its description with the numbers filled in. Raises `KeyError` for one that was not measured."""
    values = results_of(shipped.name)
    # square brackets before a round one are a link
    return re.sub(r"\[([^\]]+)\](?!\()", lambda name: f"{100 * values[name[1]]:.0f}", shipped.told)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose cells may contain Markdown, unlike those of `markdown_table`."""
    rows = ["| " + " | ".join(line) + " |" for line in [header, *lines]]
    return "\n".join([rows[0], "|---" * len(header) + "|", *rows[1:]])


def families_table() -> str:
    lines = []
    for family in FAMILIES:
        for place, shipped in enumerate(family.shipped):
            first = [family.name, family.what] if place == 0 else ["", ""]
            lines.append([*first, f"`{shipped.name}`", filled(shipped)])
    return markdown(["family", "what it is", "what ships", "results"], lines)


def probes_table() -> str:
    """Logistic regression on frozen features, mean and standard deviation over seeds."""
    found = {shipped.name: suite_of(shipped.name) for family in FAMILIES for shipped in family.shipped}
    measured = {name: tasks for name, tasks in found.items() if tasks}
    chance = next(iter(measured.values()))
    lines = [["chance", *(f"{100 * chance[task]['chance']:.0f}" for task in PROBES)]]
    for name, tasks in measured.items():
        numbers = [(tasks[task]["logistic_accuracy"], tasks[task]["logistic_accuracy_sd"]) for task in PROBES]
        lines.append([f"`{name}`", *(f"{100 * mean:.0f}±{100 * deviation:.1f}" for mean, deviation in numbers)])
    return markdown(["probe of frozen features", *PROBES.values()], lines)


def whole_suite() -> str:
    """The suite's own table, for all measured checkpoints."""
    names = [shipped.name for family in FAMILIES for shipped in family.shipped]
    return suite_table({name: tasks for name in names if (tasks := suite_of(name))})


def abilities_table() -> str:
    """A line per ability on unseen pairs and on the unseen style: chance, the aim, each checkpoint."""
    names = [shipped.name for family in FAMILIES for shipped in family.shipped if shipped.name.endswith("-scenes")]
    found = {name: results_of(name) for name in names}
    lines = []
    for split in ("unseen_pairs", "unseen_style"):
        lines.append([f"**{split.replace('_', ' ')}**", *[""] * (2 + len(names))])
        for ability in ABILITIES:
            values = [values.get(f"{split}/{ability.value}") for values in found.values()]
            if any(value is not None for value in values):
                # chance depends only on the data, so any checkpoint's value will do
                chances = [ability.chance_on(split, one) for one in found.values()]
                chance = next((one for one in chances if one is not None), None)
                told = [chance, ability.aim_on(split), *values]
                lines.append([ability.name, *(shown(value, ability.percent) for value in told)])
    return markdown(["ability", "chance", "aim", *names], lines)


TABLES = {
    "README.md": {"families": families_table, "suite": probes_table},
    "docs/suite.md": {"suite": whole_suite},
    "docs/abilities.md": {"abilities": abilities_table},
}


def with_table(text: str, name: str, content: str) -> str:
    """`text` with `content` as the table of that name. Raises `ValueError` if its marks are missing."""
    begin, end = f"<!-- {name}: by examples/shipped_tables.py -->\n", f"<!-- /{name} -->"
    return between_marks(text, begin, end, f"{content}\n")


def main() -> None:
    for page, tables in TABLES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, build in tables.items():
            text = with_table(text, name, build())
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
