"""docs/evidence_simla.md: the paper's Table 1 on the embedded pairs, and what re-ranking adds."""

from collections.abc import Mapping, Sequence
from typing import Any

from evidence_table import Content, cost_table, how_made, reranked_table, stages_table

# SIMLA's Table 1, Flickr30k true zero-shot after 4 M pairs, re-ranked (per cent): TR@1, TR@10, IR@1, IR@10
PAPER = {
    "simla_itm": (6.1, 11.6, 7.3, 11.7),
    "simla_itm_itc": (73.1, 88.5, 56.6, 83.6),
    "simla_itm_itc_mlm": (84.0, 97.8, 69.5, 93.9),
    "simla_itm_itc_mlm_mim": (85.1, 99.2, 70.1, 94.6),
    "simla_full": (86.2, 98.7, 69.5, 94.7),
}


def main_table(contents: Sequence[Content]) -> str:
    """Re-ranked recall, as in the paper's Table 1."""
    return reranked_table(contents, "Losses", PAPER)


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of docs/evidence_simla.md."""
    return f"""\
{main_table(contents)}

Per cent, on {facts["pictures"]} images of `{facts["data"]}` (known concepts in an unseen style) with their first
captions; any text or image of the same concept is right. Dot products select {facts["rerank_k"]} candidates, and the
matching head orders them. The last column is from the paper: Flickr30k after 4 M pairs at base size. You can compare
the order of the rows, but not the numbers. The row with matching alone has projections that no loss trains, so its
candidates are random.

{stages_table(contents, "Losses")}

{cost_table(contents)}

{how_made(contents, facts)}
"""
