"""Writes docs/evidence.md and .json from finished rows of examples/evidence.py; helpers for the other tables."""

import json
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from page_marks import between_marks

from oner.training.evaluation.results import library_versions
from oner.training.publishing.model_card import markdown_table
from oner.training.publishing.public import plain

BEGIN, END = "<!-- begin: written by examples/evidence.py -->", "<!-- end: written by examples/evidence.py -->"
# The paper's Table 6, MS-COCO zero-shot after CC3M (per cent): TR@1, TR@5, IR@1, IR@5; CLIP is SLIP's ViT-B
PAPER = {
    "clip": (15.0, 34.8, 10.9, 26.7),
    "itc": (0.8, 2.5, 0.7, 2.2),
    "itc_two_heads": (10.4, 26.8, 10.7, 26.4),
    "itc_xmc": (25.2, 48.1, 15.2, 33.6),
    "itc_xmc_cic": (25.4, 48.1, 16.3, 35.5),
    "itc_cmc": (25.5, 48.2, 16.9, 36.9),
}
KS = (1, 5, 10)
Content = Mapping[str, Any]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Processor, cores, accelerator if one was used, and versions."""
    processor = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    facts = {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts | {"versions": library_versions()}


def spread(numbers: Sequence[float], form: Callable[[float], str]) -> str:
    """A single number as it is, several as mean ± sample standard deviation."""
    mean = form(statistics.fmean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ± {form(statistics.stdev(numbers))}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def two_places(value: float) -> str:
    return f"{value:.2f}"


def by_row(contents: Sequence[Content]) -> dict[str, list[Content]]:
    """Row -> its results, one per seed, in the order of the rows."""
    rows: dict[str, list[Content]] = {}
    for content in contents:
        rows.setdefault(content["row"], []).append(content)
    return rows


def cell(seeds: Sequence[Content], name: str, form: Callable[[float], str] = percent) -> str:
    """A metric of a row over its seeds, or "not possible" if the row lacks it."""
    if any(name not in content["values"] for content in seeds):
        return "not possible"
    return spread([content["values"][name] for content in seeds], form)


def main_table(contents: Sequence[Content]) -> str:
    """The columns of the paper's Table 6, then the gap and the paper's numbers."""
    header = ["Method", *(f"TR@{k}" for k in KS), *(f"IR@{k}" for k in KS)]
    header += ["gap", "cosine of pairs / others", "told apart", "paper TR@1 / IR@1"]
    chance = contents[0]["values"]
    lines = [
        ["chance", *(percent(chance[f"first/{way}_chance@{k}"]) for way in ("tr", "ir") for k in KS), "", "", "", ""]
    ]
    for row, seeds in by_row(contents).items():
        line = [seeds[0]["title"], *(cell(seeds, f"first/{way}_r@{k}") for way in ("tr", "ir") for k in KS)]
        cosines = [cell(seeds, f"gap/cosine_{kind}", two_places) for kind in ("paired", "unpaired")]
        apart = cell(seeds, "gap/centroid_separability")
        paper = "{0} / {2}".format(*PAPER[row]) if row in PAPER else ""
        lines.append([*line, cell(seeds, "gap/distance", two_places), " / ".join(cosines), apart, paper])
    return markdown_table(header, lines)


def more_table(contents: Sequence[Content]) -> str:
    """Retrieval with all captions, and with image and caption as one sequence."""
    kinds = ("both", "image", "text")
    header = ["Method", "TR@10", "IR@10", "picture + caption R@10", "picture alone", "caption alone"]
    joint = [
        c["values"]["joint/multimodal_chance@10"] for c in contents if "joint/multimodal_chance@10" in c["values"]
    ]
    ways = [percent(contents[0]["values"][f"all/{way}_chance@10"]) for way in ("tr", "ir")]
    lines = [["chance", *ways, *[percent(joint[0]) if joint else ""] * 3]]
    for seeds in by_row(contents).values():
        line = [seeds[0]["title"], cell(seeds, "all/tr_r@10"), cell(seeds, "all/ir_r@10")]
        lines.append([*line, *(cell(seeds, f"joint/multimodal_{kind}_r@10") for kind in kinds)])
    return markdown_table(header, lines)


def reranked_table(contents: Sequence[Content], first: str, paper: Mapping[str, Sequence[float]]) -> str:
    """Re-ranked recall, first column titled `first`; last the paper's TR@1 and IR@1, its first and third number."""
    header = [first, *(f"TR@{k}" for k in KS), *(f"IR@{k}" for k in KS), "paper TR@1 / IR@1"]
    chance = contents[0]["values"]
    lines = [["chance", *(percent(chance[f"first/{way}_chance@{k}"]) for way in ("tr", "ir") for k in KS), ""]]
    for row, seeds in by_row(contents).items():
        line = [seeds[0]["title"], *(cell(seeds, f"first/rerank_{way}_r@{k}") for way in ("tr", "ir") for k in KS)]
        lines.append([*line, "{0} / {2}".format(*paper[row]) if row in paper else ""])
    return markdown_table(header, lines)


def stages_table(contents: Sequence[Content], first: str) -> str:
    """Recall of the first stage alone, and how often its candidates contain a right answer."""
    ways = ("tr", "ir")
    header = [first, *(f"{way.upper()}@{k}, dot products" for way in ways for k in (1, 10))]
    header += [f"{way.upper()}, right answer among the candidates" for way in ways]
    lines = []
    for seeds in by_row(contents).values():
        line = [seeds[0]["title"], *(cell(seeds, f"first/{way}_r@{k}") for way in ways for k in (1, 10))]
        lines.append([*line, *(cell(seeds, f"first/rerank_{way}_reach") for way in ways)])
    return markdown_table(header, lines)


def cost_table(contents: Sequence[Content]) -> str:
    """Size, pairs seen and time of every row."""
    header = ["Method", "seeds", "parameters used in retrieval", "pairs seen", "training, min", "in all, min"]
    lines = []
    for seeds in by_row(contents).values():
        times = [
            spread([content[name] / 60 for content in seeds], lambda minutes: f"{minutes:.1f}")
            for name in ("train_seconds", "wall_seconds")
        ]
        if any(content["resumed"] for content in seeds):
            times[1] = "not known, resumed"
        size = f"{seeds[0]['parameters'] / 1e6:.1f} M"
        names = ", ".join(str(content["seed"]) for content in seeds)
        lines.append([seeds[0]["title"], names, size, f"{seeds[0]['pairs']:,}", *times])
    return markdown_table(header, lines)


def commands(contents: Sequence[Content]) -> str:
    """The training command of each row, from the root of the repository."""
    lines = [shlex.join(content["command"]) for content in contents]
    return "```bash\n" + "\n".join(lines) + "\n```"


def machines(contents: Sequence[Content]) -> str:
    """The machines on which the rows were trained."""
    different = {json.dumps(content["machine"], sort_keys=True): content["machine"] for content in contents}
    words = []
    for machine in different.values():
        device = f", {machine['accelerator']}" if "accelerator" in machine else ""
        words.append(f"{machine['processor']}, {machine['cores']} cores{device}, torch {machine['versions']['torch']}")
    return "; ".join(words)


def steps_of(contents: Sequence[Content]) -> str:
    return " or ".join(map(str, sorted({content["steps"] for content in contents})))


def how_made(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The end of a page whose rows use the same pairs: what they share, the machine, the commands."""
    return f"""\
All rows of a seed use the same pairs in the same order, {steps_of(contents)} steps. {facts["jobs"]} row(s) at a time,
{facts["threads"]} thread(s) each. Machine: {machines(contents)}. Standard deviations are over seeds; a single seed has
none, so small differences between rows may be chance.

`{shlex.join(facts["command"])}` ran:

{commands(contents)}"""


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of OneR's docs/evidence.md."""
    return f"""\
{main_table(contents)}

Per cent, on {facts["pictures"]} images of `{facts["data"]}` (known concepts in an unseen style). Texts are first
captions; any text or image of the same concept is right. *gap*: distance between the centroids of normalised images
and captions; it shrinks if the modalities merge, but also if the space collapses, which *cosine of pairs / others*
shows. *told apart*: how often the nearer centroid gives the right modality of an image or a caption (50: no gap, 100:
separate clouds). The last column is from the paper: zero-shot MS-COCO after CC3M at base size. You can compare the
order of the rows, but not the numbers.

{more_table(contents)}

TR and IR with all captions of an image. Picture + caption: one sequence retrieves images of the same concept in other
styles from `{facts["gallery"]}`; the next columns use the image or the caption alone. A two-tower model cannot embed
such a sequence. With two heads, the sequence goes through the image head, which was never trained on it. CLIP is
open_clip's model and loss: learnable temperature from .07, clean inputs, no teacher, no masked modelling. One-tower
rows include masked modelling unless stated otherwise (- MIM, - MLM).

{cost_table(contents)}

All rows of a seed use the same pairs in the same order, {steps_of(contents)} steps; rows that change the batch
size see other batches. {facts["jobs"]} row(s) at a time, {facts["threads"]} thread(s) each.
Machine: {machines(contents)}.
Standard deviations are over seeds; a single seed has none, so small differences between rows may be chance.

`{shlex.join(facts["command"])}` ran:

{commands(contents)}
"""


@dataclass(frozen=True)
class Table:
    """
    A table of evidence: its default `rows`, the stem of its two files, and the title of a new page.

    `page(contents, facts)` returns the generated part of the page, `main(contents)` the table to print;
    `figure(contents, path)` draws docs/pictures/`stem`.png.
    """

    rows: Sequence[str]
    stem: str
    title: str
    page: Callable[[Sequence[Content], Mapping[str, Any]], str]
    main: Callable[[Sequence[Content]], str]
    figure: Callable[[Sequence[Content], Path], None] | None = None


def write_evidence(directory: Path, contents: Sequence[Content], facts: Mapping[str, Any], table: Table) -> str:
    """Writes both files and returns the main table. Text of the page outside the marks is kept.

    Raises:
        ValueError: the page exists without both marks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # pages contain no paths of this machine
    facts, contents = plain(facts), plain(list(contents))
    content = {"facts": facts, "rows": contents}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (directory / f"{table.stem}.json").write_text(text, encoding="utf-8")
    if table.figure is not None:
        (directory / "pictures").mkdir(exist_ok=True)
        table.figure(contents, directory / "pictures" / f"{table.stem}.png")
    path = directory / f"{table.stem}.md"
    new = f"# {table.title}\n\n{BEGIN}\n{END}\n"
    whole = path.read_text(encoding="utf-8") if path.is_file() else new
    try:
        whole = between_marks(whole, BEGIN, END, f"\n{table.page(contents, facts)}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    path.write_text(whole, encoding="utf-8")
    return table.main(contents)
