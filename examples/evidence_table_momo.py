"""docs/evidence_momo.md: MoMo's stages on small data, as in the paper's Tables 4 and 6."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from evidence_stages import KS
from evidence_table import Content, by_row, cell, commands, machines, percent, spread

from oner.training.publishing.model_card import markdown_table

# Tables 4 and 6, per cent: ImageNet by linear probe, MNLI fine-tuned, zero-shot COCO (mean of R@1 and R@5 both ways).
# The row without CMGA has runs of 50,000 steps; with CMGA, such runs reach 72.2, 75.6 and 55.4.
PAPER = {
    "momo_stage1": ("66.9", "59.0", "-"),
    "momo_stage2": ("52.9", "78.5", "-"),
    "momo_stage2_text_only": ("9.5", "78.7", "-"),
    "momo_stage3": ("75.7", "78.1", "64.0"),
    "momo_stage3_no_cmga": ("71.9 (72.2)", "75.4 (75.6)", "54.1 (55.4)"),
}


def main_table(contents: Sequence[Content]) -> str:
    """The measures of Tables 4 and 6: images, texts, and both."""
    header = ["After", "images: [CLS]", "mean of patches", "texts: [CLS]", "mean of tokens", "scenes TR@10", "IR@10"]
    header += ["paper: ImageNet", "MNLI", "COCO"]
    probes = [f"{pool}/{name}" for name in ("emoji_groups", "supersense") for pool in ("cls", "mean")]
    ways = ("tr", "ir")
    lines = [
        ["chance", *(chance(contents, f"{probe}/chance") for probe in probes),
         *(chance(contents, f"scenes/{way}_chance@10") for way in ways), "", "", ""]
    ]  # fmt: skip
    for row, seeds in by_row(contents).items():
        line = [seeds[0]["title"], *(cell(seeds, f"{probe}/logistic_accuracy") for probe in probes)]
        line += [trained(seeds, f"scenes/{way}_r@10") for way in ways]
        lines.append([*line, *PAPER.get(row, ("",) * 3)])
    return markdown_table(header, lines)


def chance(contents: Sequence[Content], name: str) -> str:
    """The chance level, from the first row that has it."""
    known = [content["values"][name] for content in contents if name in content["values"]]
    return percent(known[0]) if known else ""


def trained(seeds: Sequence[Content], name: str) -> str:
    """A metric, or a dash for rows without contrast, which lack it."""
    return cell(seeds, name) if all(name in content["values"] for content in seeds) else "-"


def more_table(contents: Sequence[Content]) -> str:
    """Accuracy of kNN, recall across styles, and recall on scenes at lower ranks."""
    header = ["After", "images by kNN: [CLS]", "mean of patches", "texts by kNN: [CLS]", "mean of tokens"]
    header += ["other styles R@10: [CLS]", "mean of patches"]
    header += [f"scenes {way.upper()}@{k}" for way in ("tr", "ir") for k in KS[:-1]]
    ways = ("tr", "ir")
    styles = [f"{pool}/styles" for pool in ("cls", "mean")]
    lines = [
        ["chance", *[""] * 4, *(chance(contents, f"{one}/chance@10") for one in styles),
         *(chance(contents, f"scenes/{way}_chance@{k}") for way in ways for k in KS[:-1])]
    ]  # fmt: skip
    for seeds in by_row(contents).values():
        probes = [f"{pool}/{name}" for name in ("emoji_groups", "supersense") for pool in ("cls", "mean")]
        line = [seeds[0]["title"], *(cell(seeds, f"{probe}/knn_accuracy") for probe in probes)]
        line += [trained(seeds, f"{one}/recall@10") for one in styles]
        lines.append([*line, *(trained(seeds, f"scenes/{way}_r@{k}") for way in ways for k in KS[:-1])])
    return markdown_table(header, lines)


def cost_table(contents: Sequence[Content]) -> str:
    """Steps, rows read, loss and time of each stage, without earlier stages."""
    header = ["Stage", "seeds", "begins with", "steps", "rows read", "last loss", "training, min", "in all, min"]
    lines = []
    for seeds in by_row(contents).values():
        first = seeds[0]
        told = [first["title"], ", ".join(str(content["seed"]) for content in seeds), first["before"] or "nothing"]
        told += [f"{first['steps']:,}", f"{first['pairs']:,}", spread([one["loss"] for one in seeds], "{:.3f}".format)]
        both = ("train_seconds", "wall_seconds")
        times = [spread([one[name] / 60 for one in seeds], "{:.1f}".format) for name in both]
        if any(one["resumed"] for one in seeds):
            times[1] = "not known, resumed"
        lines.append([*told, *times])
    return markdown_table(header, lines)


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of docs/evidence_momo.md."""
    return f"""\
{main_table(contents)}

Per cent. *images*: logistic regression on frozen features predicts the group of an emoji, unseen concepts. *texts*:
the same for the WordNet lexicographer file of a gloss; stage 2 read these glosses without that label. [CLS] is the
feature of the paper's probe; the mean over patches or tokens is shown beside it. *scenes*: {facts["pictures"]} images
of `{facts["data"]}` and their first captions retrieve each other by dot products; only the own one is right. A stage
without contrast has no embedding for retrieval. The last three columns are from the paper: ImageNet by linear probe,
MNLI fine-tuned, COCO zero-shot (the mean of R@1 and R@5 in both directions), at base size. You can compare the order
of the rows, but not the numbers. Without CMGA the paper ran 50,000 steps; the value in brackets is the one with CMGA
after as many steps.

{more_table(contents)}

*other styles*: emoji in an unseen style retrieve the same emoji in the styles of the training set, by cosine of the
features that the probes use; nothing is trained for it.

{cost_table(contents)}

A row starts from the model of the previous stage with the same seed, which is trained once.
{facts["jobs"]} row(s) at a time, {facts["threads"]} thread(s) each. Machine: {machines(contents)}. Standard deviations
are over seeds; a single seed has none, so small differences between rows may be chance.

`{shlex.join(facts["command"])}` ran:

{commands(contents)}
"""
