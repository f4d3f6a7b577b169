"""docs/evidence_transfer.md: OneR's Table 4 on half of the embedded pairs, with or without texts of the other half."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evidence_table import KS, Content, by_row, cell, cost_table, how_made, percent

from oner.training.publishing.model_card import markdown_table

# OneR's Table 4, MS-COCO zero-shot after SBU, and with the captions of CC3M (per cent): TR@1, IR@1
PAPER = {
    "transfer_two_heads": (8.88, 5.73),
    "transfer_two_heads_texts": (10.41, 6.87),
    "transfer_one_tower": (8.60, 5.77),
    "transfer_one_tower_texts": (11.31, 7.20),
}
WAYS = [f"first/{way}_r@{k}" for way in ("tr", "ir") for k in KS]
# the gain from texts for each architecture: title, row without, row with
GAINS = (
    ("gain of two heads", "transfer_two_heads", "transfer_two_heads_texts"),
    ("gain of one tower", "transfer_one_tower", "transfer_one_tower_texts"),
)


def main_table(contents: Sequence[Content]) -> str:
    """Recall, as in the paper's Table 4, and the gains from texts."""
    header = ["trained on", *(f"TR@{k}" for k in KS), *(f"IR@{k}" for k in KS), "paper TR@1 / IR@1"]
    chance = contents[0]["values"]
    lines = [["chance", *(percent(chance[name.replace("_r@", "_chance@")]) for name in WAYS), ""]]
    rows = by_row(contents)
    for row, seeds in rows.items():
        paper = "{:.2f} / {:.2f}".format(*PAPER[row]) if row in PAPER else ""
        lines.append([seeds[0]["title"], *(cell(seeds, name) for name in WAYS), paper])

    # differences of the means, if both rows exist
    for title, without, with_texts in GAINS:
        if {without, with_texts} <= rows.keys():
            gains = [f"{100 * (mean(rows[with_texts], name) - mean(rows[without], name)):+.1f}" for name in WAYS]
            paper = (more - less for more, less in zip(PAPER[with_texts], PAPER[without], strict=True))
            lines.append([title, *gains, " / ".join(f"{gain:+.2f}" for gain in paper)])
    return markdown_table(header, lines)


def mean(seeds: Sequence[Content], name: str) -> float:
    return fmean(one["values"][name] for one in seeds)


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of docs/evidence_transfer.md."""
    return f"""\
{main_table(contents)}

Per cent, on {facts["pictures"]} images of `{facts["data"]}` (known concepts in an unseen style; half of the concepts
are in the pairs, and the rows with texts have read the captions of the others) with their first captions; any text or
image of the same concept is right. *Pairs*: half of the concepts. *Texts*: in addition to each batch of pairs, a batch
of captions of the other half and of WordNet's definitions, with masked words only (`text_mlm`); the paper does not say
which loss it uses on them. The last column is from the paper: MS-COCO after SBU, and with the captions of CC3M. You
can compare the sign and the order of the gains.

{cost_table(contents)}

{how_made(contents, facts)}
"""
