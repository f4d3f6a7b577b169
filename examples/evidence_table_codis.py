"""docs/evidence_codis.md: the paper's Table 4 on composed scenes, with statistics of the codebook."""

from collections.abc import Mapping, Sequence
from typing import Any

from evidence_table import (
    Content,
    by_row,
    cell,
    cost_table,
    how_made,
    reranked_table,
    stages_table,
    two_places,
)

from oner.training.publishing.model_card import markdown_table

# CODIS' Table 4, MS-COCO zero-shot after 4 M images, re-ranked (per cent): TR@1, TR@10, IR@1, IR@10
PAPER = {
    "codis_cross": (68.6, 94.7, 50.1, 84.5),
    "codis_intra_cross": (69.86, 94.42, 50.52, 85.17),
    "codis_cross_codebook": (70.74, 94.88, 51.39, 85.6),
    "codis_student_codebook": (71.12, 94.78, 51.4, 85.53),
    "codis_full": (71.1, 95.1, 52.1, 85.9),
}


def main_table(contents: Sequence[Content]) -> str:
    """Re-ranked recall, as in the paper's Table 4."""
    return reranked_table(contents, "Alignment", PAPER)


def codes_table(contents: Sequence[Content]) -> str:
    """Logged code usage and plan entropy, means over the run; rows without a codebook are omitted."""
    lines = []
    for seeds in by_row(contents).values():
        if "log/codes_used" in seeds[0]["values"]:
            codes = [cell(seeds, "log/codes_used"), cell(seeds, "log/plan_entropy", two_places)]
            lines.append([seeds[0]["title"], *codes])
    return markdown_table(["Alignment", "codes used, %", "plan entropy, nats"], lines)


def page(contents: Sequence[Content], facts: Mapping[str, Any]) -> str:
    """The generated part of docs/evidence_codis.md."""
    return f"""\
{main_table(contents)}

Per cent, on {facts["pictures"]} scenes of `{facts["data"]}` (no training image contains such a concept pair) with
their first captions; only the scene's own caption or image is right. Dot products select
{facts["rerank_k"]} candidates, and the matching head orders them. The last column is from the paper: MS-COCO after
4 M images at base size. You can compare the order of the rows, but not the numbers. Every row starts from a
vision tower trained on scenes, and includes matching and masked tokens.

{stages_table(contents, "Alignment")}

{codes_table(contents)}

Means over the run of values that the log gives for each batch: the number of codes that are nearest to some feature,
as a share of the possible number, and the entropy of a feature's distribution in the transport plan; for K codes the
uniform distribution has log K (4.85 for the 128 of the shipped configurations).

{cost_table(contents)}

{how_made(contents, facts)}
"""
