"""docs/compare_families.md and its figure: the families, ALBEF and CLIP trained on the same pairs."""

import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence_table import Content, by_row, cell, commands, machines, percent, spread, steps_of, two_places

from oner.training.evaluation.sheets import new_figure
from oner.training.publishing.model_card import markdown_table

SPLITS = {"test_style": "unseen style", "test_concept": "unseen concepts"}
WAYS = ("tr", "ir")
KS = (1, 10)
COMPOSED = {"joint": "both in one pass", "picture": "picture alone", "text": "caption alone", "sum": "sum of the two"}
COLOURS = ("#2f6fdb", "#e0452b", "#2ca25f", "#8e44ad", "#e69f00", "#111111", "#7f7f7f", "#17a2b8")
FEWEST = 6  # runs for which a rank correlation is worth reporting


def title_of(seeds: Sequence[Content]) -> str:
    """The row's title without its learning rate, which has its own column."""
    return re.sub(r", base_learning_rate=[^,]+", "", seeds[0]["title"])


def has(seeds: Sequence[Content], name: str, form: Callable[[float], str] = percent) -> str:
    """As `cell`, with a dash if the row lacks the metric."""
    return cell(seeds, name, form) if all(name in content["values"] for content in seeds) else "-"


def chance(contents: Sequence[Content], name: str) -> str:
    """The chance level, from the first row that has it."""
    known = [content["values"][name] for content in contents if name in content["values"]]
    return percent(known[0]) if known else ""


def by_length(contents: Sequence[Content]) -> tuple[list[Content], list[Content]]:
    """Runs with equal pairs, and runs with equal seconds."""
    return (
        [content for content in contents if content["seconds"] is None],
        [content for content in contents if content["seconds"] is not None],
    )


def recall(content: Content, split: str = "test_style") -> float:
    """R@10 by dot products, mean of both directions."""
    return statistics.fmean(content["values"][f"{split}/{way}_r@10"] for way in WAYS)


def retrieval_table(contents: Sequence[Content], split: str) -> str:
    """Recall by dot products, and re-ranked."""
    header = [SPLITS[split], *(f"{way.upper()}@{k}" for way in WAYS for k in KS)]
    header += [f"re-ranked {way.upper()}@{k}" for way in WAYS for k in KS]
    lines = [["chance", *(chance(contents, f"{split}/{way}_chance@{k}") for way in WAYS for k in KS), *[""] * 4]]
    for seeds in by_row(contents).values():
        line = [title_of(seeds), *(has(seeds, f"{split}/{way}_r@{k}") for way in WAYS for k in KS)]
        lines.append([*line, *(has(seeds, f"{split}/rerank_{way}_r@{k}") for way in WAYS for k in KS)])
    return markdown_table(header, lines)


def composed_table(contents: Sequence[Content]) -> str:
    """R@10 of image + caption queries on both splits."""
    header = ["picture + caption, R@10", *(f"{name}: {way}" for name in SPLITS.values() for way in COMPOSED.values())]
    lines = [["chance", *(chance(contents, f"{split}/composed_chance@10") for split in SPLITS for _ in COMPOSED)]]
    for seeds in by_row(contents).values():
        cells = [has(seeds, f"{split}/composed_{way}_r@10") for split in SPLITS for way in COMPOSED]
        lines.append([title_of(seeds), *cells])
    return markdown_table(header, lines)


def space_table(contents: Sequence[Content]) -> str:
    """Probe accuracy of frozen features, and the gaps between images and captions."""
    header = ["features and gap", "pictures: logistic", "kNN", "texts: logistic", "kNN"]
    header += [f"{what}, {name}" for name in SPLITS.values() for what in ("centroid gap", "distribution gap (within)")]
    probes = [f"{what}/{how}_accuracy" for what in ("pictures", "texts") for how in ("logistic", "knn")]
    known = [chance(contents, f"{what}/chance") for what in ("pictures", "pictures", "texts", "texts")]
    lines = [["chance", *known, *[""] * 4]]
    for seeds in by_row(contents).values():
        line = [title_of(seeds), *(has(seeds, probe) for probe in probes)]
        for split in SPLITS:
            gaps = [has(seeds, f"{split}/gap_{name}", two_places)
                    for name in ("centroid", "distribution", "distribution_within")]  # fmt: skip
            line += [gaps[0], f"{gaps[1]} ({gaps[2]})"]
        lines.append(line)
    return markdown_table(header, lines)


def cost_table(contents: Sequence[Content]) -> str:
    """Size, operations, pairs, time and memory of every row."""
    header = ["cost", "seeds", "rate", "parameters", "GFLOP a pair", "steps", "pairs seen"]
    header += ["training, s", "as it went, s", "memory, GiB"]
    lines = []
    for seeds in by_row(contents).values():
        first = seeds[0]
        line = [title_of(seeds), ", ".join(str(content["seed"]) for content in seeds), f"{first['learning_rate']:g}"]
        line += [f"{first['parameters'] / 1e6:.1f} M", f"{first['values']['flops_per_pair'] / 1e9:.2f}"]
        for name, form in (
            ("steps", "{:.0f}"),
            ("pairs", "{:,.0f}"),
            ("quiet_seconds", "{:.0f}"),
            ("train_seconds", "{:.0f}"),
            ("memory_gib", "{:.1f}"),
        ):
            same = len({content[name] for content in seeds}) == 1
            line.append(spread([content[name] for content in (seeds[:1] if same else seeds)], form.format))
        lines.append(line)
    return markdown_table(header, lines)


def tables(contents: Sequence[Content]) -> str:
    """All tables of one length of training."""
    parts = [*(retrieval_table(contents, split) for split in SPLITS), composed_table(contents)]
    return "\n\n".join([*parts, space_table(contents), cost_table(contents)])


def main_table(contents: Sequence[Content]) -> str:
    """The printed tables: the unseen style for each length of training."""
    return "\n\n".join(retrieval_table(part, "test_style") for part in by_length(contents) if part)


def foretold(contents: Sequence[Content]) -> str:
    """Whether a gap predicts recall: Spearman's rank correlation over all rows, seeds and lengths, per split."""
    from scipy.stats import spearmanr

    if len(contents) < FEWEST:
        return f"Of fewer than {FEWEST} runs no rank correlation is told."
    told = []
    for split, name in SPLITS.items():
        recalls = [recall(content, split) for content in contents]
        ranks = []
        for gap in ("centroid", "distribution"):
            found = spearmanr(recalls, [content["values"][f"{split}/gap_{gap}"] for content in contents])
            ranks.append(f"{found.statistic:.2f} with the {gap} gap (p {found.pvalue:.2g})")
        told.append(f"{name} {' and '.join(ranks)}")
    return f"Spearman's rank correlation of R@10 (mean of both ways) over {len(contents)} runs: {'; '.join(told)}."


def rates_table(rates: Mapping[str, Mapping[str, float]], contents: Sequence[Content]) -> str:
    """Held-out recall of each row at each multiple of its own learning rate."""
    if not rates:
        return "Each row takes the learning rate of its own configuration; none was tuned here."
    titles = {content["row"].partition(":")[0]: content["title"] for content in contents}
    factors = sorted({factor for found in rates.values() for factor in found}, key=float)
    lines = [
        [re.sub(r", base_.*", "", titles.get(row.partition(":")[0], row))]
        + [percent(found[factor]) if factor in found else "failed" for factor in factors]
        for row, found in rates.items()
    ]
    table = markdown_table(["rate, held-out R@10", *(f"x {factor}" for factor in factors)], lines)
    return f"""\
The learning rate of each row is the best of three by R@10 (mean of both directions) on the images of
`train_extra.parquet`, which no row trains on and no other table uses, with the first seed:

{table}"""


def confounds() -> str:
    """Differences between the rows other than the method."""
    return """\
Equal for all rows: images of 64 x 64 pixels in 16 patches, vocabulary, longest text, width 192, four layers of four
heads for images, batches of 128, order of pairs, crop ranges, schedule (cosine, one epoch of warm-up), training
from scratch. **Not equal**, and possibly the reason for a difference instead of the method:

- Learning rate, weight decay, AdamW's moments, temperature, loss weights and teachers are those of each family's small
  configuration, which trains OneR for 8 epochs and SIMLA and CODIS for 32. CLIP and NeoMME use OneR's.
- Towers: OneR, MoMo and NeoMME read texts with the same layers as images; SIMLA, ALBEF and CODIS have two extra layers
  for texts, CODIS and ALBEF two for fusion, CLIP four for texts. Parameters and operations differ as shown in the
  table.
- Stem: MoMo's is one linear layer per patch, as in its paper, NeoMME's an MLP on it; all others use the same
  convolutions, including CLIP.
- MoMo is designed for stages, with images and texts before pairs. Here it is its third stage without texts, from
  scratch, with half of 16 patches hidden, where the paper hides three quarters of 196.
- SIMLA's image tokenizer was trained on images of the same training set, in a run whose time is not counted.
- Contrast counts twice in OneR (ITC and CMC, with weight 3 for CMC); half precision and threads depend on the machine.
- Equal seconds hold for one machine and this code: another CPU gives different numbers of steps.
- Pooling: probes read [CLS] of each tower (the last token for CLIP's texts) before the projections; for NeoMME the
  mean of all tokens, which is also its embedding."""


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of docs/compare_families.md."""
    equal, timed = by_length(contents)
    given = ", ".join(f"{seconds:g}" for seconds in sorted({content["seconds"] for content in timed}))
    parts = []
    if equal:
        parts.append(f"## Equal pairs\n\nAll rows of a seed: {steps_of(equal)} steps.\n\n{tables(equal)}")
    if timed:
        parts.append(
            f"## Equal seconds\n\nEvery row was given {given} seconds of training: as many steps as its run of equal "
            f"pairs and the same seed\nwould have made in that time, with a matching schedule.\n\n{tables(timed)}"
        )
    length = "\n\n".join(parts)
    return f"""\
![R@10 over seconds of training, for each family](pictures/compare_families.png)

Per cent, mean ± standard deviation over seeds (of the sample; a single seed has none, so small differences may be
chance). *Unseen style*: emoji of known concepts, drawn by a team that is not in the training set. *Unseen concepts*:
emoji whose concepts are not in the training set, seven drawings each. Texts are first captions; any text or image of
the concept is right. Re-ranked: dot products select 32 candidates, the matching head orders them; *-*: not possible.

{length}

*Picture + caption*: queries that retrieve images of the same concept in other styles, from `train.parquet` for the
unseen style, and among the other images for unseen concepts. *pictures*: group of an emoji with an unseen concept;
*texts*: WordNet's lexicographer file of a gloss; both from frozen features. *centroid gap*: distance of the centroids
of normalised images and captions; *distribution gap*: how much the two distributions differ beyond that (squared
Fréchet distance as a share of their variance), and in brackets the same for two samples of one distribution.
Operations are those of a training step, by `oner estimate`. *training*: all steps at the speed of the fastest ten,
because other processes on a machine only slow a run down, and the actual time; without evaluation and start. Memory is
the peak of the process.

{foretold(contents)} Rows are families: correlation with a gap need not mean that the gap is the cause.

## What may decide instead

{confounds()}

{rates_table(facts.get("rates", {}), contents)}

## How it was made

{facts["jobs"]} row(s) at a time, {facts["threads"]} thread(s) each. Machine: {machines(contents)}.

`{shlex.join(facts["command"])}` ran:

{commands(contents)}
"""


def figure(contents: Sequence[Content], path: Path) -> None:
    """R@10 over seconds of training on both splits: filled markers for equal pairs, open ones for equal seconds."""
    drawn = new_figure(8.0, 3.6)
    titles = list(dict.fromkeys(title_of([content]) for content in contents))
    colours = {title: COLOURS[place % len(COLOURS)] for place, title in enumerate(titles)}
    for place, (split, name) in enumerate(SPLITS.items()):
        axes = drawn.add_axes((0.07 + 0.36 * place, 0.14, 0.29, 0.74))
        for part, filled in zip(by_length(contents), (True, False), strict=True):
            for seeds in by_row(part).values():
                times = [content["quiet_seconds"] for content in seeds]
                recalls = [100 * recall(content, split) for content in seeds]
                deviation = statistics.stdev(recalls) if len(recalls) > 1 else None
                title = title_of(seeds)
                axes.errorbar(
                    statistics.fmean(times), statistics.fmean(recalls), deviation, fmt="o", markersize=6, capsize=3,
                    color=colours[title], markerfacecolor=colours[title] if filled else "white",
                    label=title if filled or not by_length(contents)[0] else None,
                )  # fmt: skip
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("training, s", fontsize=8)
        axes.set_xlim(0, 1.1 * max(content["quiet_seconds"] for content in contents))
        axes.set_ylim(0, 115 * max(recall(content, split) for content in contents) or None)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, linewidth=0.5)
    drawn.axes[0].set_ylabel("R@10, mean of both ways, %", fontsize=8)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="center right", fontsize=7, frameon=False)
    drawn.text(0.99, 0.02, "full: equal pairs; open: equal seconds", ha="right", fontsize=7, color="0.3")
    drawn.savefig(path)
