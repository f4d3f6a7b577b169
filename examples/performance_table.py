"""Fills the tables of docs/performance.md, between pairs of marks, from docs/performance.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
GIGA, GIB = 1e9, 2**30
# pairs of the paper's two stages: 5.1 M, 40 epochs at 224 and 5 at 384 (appendix C)
PAPER_PAIRS = 5.1e6 * 40, 5.1e6 * 5


def peaks(figures: Figures) -> dict[str, float]:
    """dtype -> the highest FLOP/s of a matrix product in the whole run."""
    found: dict[str, float] = {}
    for case in steps(figures).values():
        found[case["dtype"]] = max(found.get(case["dtype"], 0.0), case["peak_flops"])
    return found


def steps(figures: Figures) -> dict[str, dict[str, Any]]:
    """The finished cases that measure a step."""
    return {name: case for name, case in figures["cases"].items() if "peak_flops" in case}


def mfu(figures: Figures, name: str) -> float | None:
    """Share of the peak that a case reached, with operations counted by torch; None if it was not measured."""
    case = steps(figures).get(name)
    return None if case is None else case["flops"] / case["seconds"] / peaks(figures)[case["dtype"]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine_text(figures: Figures) -> str:
    machine = figures["machine"]
    device = machine.get("accelerator") or f"{machine['processor']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    found = ", ".join(f"{dtype} {peak / GIGA:,.0f} GFLOP/s" for dtype, peak in sorted(peaks(figures).items()))
    return (
        f"Measured on {device}; {figures['threads']} threads, load average {figures['load']:.1f} at the start; "
        f"{versions}. `{figures['command']}`. Highest matrix product of the run: {found or 'not measured'}."
    )


def step_table(figures: Figures) -> str:
    rows = []
    for name, case in figures["cases"].items():
        if "error" in case:
            rows.append([name, case["error"], *[""] * 6])
        elif "peak_flops" in case:
            rows.append(
                [
                    name,
                    str(case["pairs"]),
                    f"{case['seconds']:.2f}",
                    f"{case['pairs'] / case['seconds']:.2f}",
                    f"{case['flops'] / case['pairs'] / GIGA:.1f}",
                    "" if not case["formula_flops"] else f"{case['formula_flops'] / case['flops']:.4f}",
                    f"{mfu(figures, name):.1%}",
                    f"{case['memory_bytes'] / GIB:.1f}",
                ]
            )
    head = ["case", "pairs", "s a step", "pairs/s", "GFLOP a pair", "formula / counted", "MFU", "peak GiB"]
    return table(head, rows)


def phase_table(figures: Figures) -> str:
    cases = {name: case["phases"] for name, case in steps(figures).items()}
    names = sorted({phase for phases in cases.values() for phase in phases}, key=PHASES.index)
    rows = []
    for name, phases in cases.items():
        total = sum(phases.values())
        rows.append([name, *(f"{phases[phase] / total:.1%}" if phase in phases else "" for phase in names)])
    return table(["case", *names], rows)


PHASES = ("forward", "teacher forward", "loss", "backward", "optimizer", "teacher update")


def ratio(figures: Figures, one: str, other: str) -> float | None:
    """MFU of one case over another's."""
    mine, theirs = mfu(figures, one), mfu(figures, other)
    return None if mine is None or theirs is None else mine / theirs


def packing(figures: Figures) -> float | None:
    """Time of the packed step over that of the padded step, divided by the share of real tokens."""
    packed, whole = steps(figures).get("oner_bf16"), steps(figures).get("oner_bf16_padded")
    if packed is None or whole is None:
        return None
    return packed["seconds"] / whole["seconds"] / (packed["tokens"] / whole["tokens"])


def kinds(figures: Figures) -> dict[str, dict[str, float]]:
    """The measurements of dropped tokens, by kind of rows."""
    case = figures["cases"].get("visible", {})
    return {} if "error" in case else case


def dropping(figures: Figures, part: str) -> float | None:
    """Share of time over share of work when tokens are dropped, the worst of images, texts and pairs."""
    return best([case[f"{part}_time"] / case[f"{part}_share"] for case in kinds(figures).values()])


def best(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def paper_hours(figures: Figures) -> float | None:
    """Device-hours of the paper's run at the best rate; a pair costs 390 GFLOP at 224 pixels and 1028 at 384."""
    cases = [steps(figures).get(name) for name in ("oner_bf16", "oner_bf16_compiled")]
    rate = best([case["pairs"] / case["seconds"] for case in cases if case])
    return None if rate is None else (PAPER_PAIRS[0] + PAPER_PAIRS[1] * 1028 / 390) / rate / 3600


def goal_rows(figures: Figures) -> list[tuple[str, str, float | None, str]]:
    """(what, goal, figure, format of the figure)."""
    cases, gpu = figures["cases"], "accelerator" in figures["machine"]
    halves = best([mfu(figures, "oner_bf16"), mfu(figures, "oner_bf16_compiled")])
    fastest = best([c["pairs"] / c["seconds"] for n, c in steps(figures).items() if n.startswith("oner_")])
    loader = best(list(cases.get("loader", {}).get("pairs_per_second", {}).values()))
    phases = steps(figures).get("oner_bf16", steps(figures).get("oner_fp32", {})).get("phases", {})
    teacher = phases["teacher update"] / sum(phases.values()) if phases else None
    saving = cases.get("checkpoint", {}).get("seconds")
    # checkpoints are saved once per epoch by default; the paper's epoch has 5.1 M pairs
    stall = None if saving is None or fastest is None else saving / (saving + 5.1e6 / fastest)
    best_mine = "oner_bf16" if mfu(figures, "oner_bf16") == halves else "oner_bf16_compiled"
    return [
        ("step, share of the GEMM peak, bf16", "≥ 45 %" if gpu else "≥ 50 %", halves, "{:.1%}"),
        ("step, share of the GEMM peak, fp32", "≥ 50 %", mfu(figures, "oner_fp32"), "{:.1%}"),
        ("device-hours of the paper's run", "≤ 48 (H100)", paper_hours(figures) if gpu else None, "{:.0f}"),
        ("MFU over open_clip's, eager", "≥ 1.5", ratio(figures, best_mine, "clip_bf16"), "{:.2f}"),
        ("MFU over open_clip's, compiled", "≥ 1.0", ratio(figures, best_mine, "clip_bf16_compiled"), "{:.2f}"),
        ("packed over padded time, over the share of real tokens", "≤ 1.10", packing(figures), "{:.2f}"),
        ("MoMo's encoder: time over share of tokens", "≤ 1.15", dropping(figures, "encoder"), "{:.2f}"),
        ("MoMo's step: time over share of work", "≤ 1.15", dropping(figures, "step"), "{:.2f}"),
        ("pairs/s of the loader over the step's", "≥ 1.2", loader / fastest if loader and fastest else None, "{:.1f}"),
        ("time of one checkpoint per 5.1 M pairs", "< 2 %", stall, "{:.4%}"),
        ("a step's wait for a background checkpoint", "≤ 0.5 s", waiting(figures), "{:.2f} s"),
        ("teacher update, share of the step", "< 3 %", teacher, "{:.2%}"),
        ("`oner --help`", "≤ 1 s", cases.get("starts", {}).get("oner --help"), "{:.2f} s"),
    ]


def waiting(figures: Figures) -> float | None:
    """Seconds that a step waits for a copy of the state: the minimum, without the first, which allocates memory."""
    stalls = figures["cases"].get("checkpoint", {}).get("stalls")
    return None if stalls is None else min(stalls[1:])


def goal_table(figures: Figures) -> str:
    rows = []
    for what, goal, value, form in goal_rows(figures):
        written = "not measured here" if value is None else form.format(value)
        rows.append([what, goal, written, "" if value is None else "yes" if meets(goal, value) else "**no**"])
    return table(["what", "goal", "figure", "met"], rows)


def meets(goal: str, value: float) -> bool:
    """Whether a value is on the right side of a goal such as `≥ 45 %` or `≤ 0.5 s`."""
    sign, number = re.match(r"([≥≤<]) ([\d.]+)", goal).groups()
    bound = float(number) / (100 if "%" in goal else 1)
    return {"≥": value >= bound, "≤": value <= bound, "<": value < bound}[sign]


def other_table(figures: Figures) -> str:
    cases = figures["cases"]
    rows = []
    for workers, rate in cases.get("loader", {}).get("pairs_per_second", {}).items():
        rows.append([f"loader alone, {workers} workers", f"{rate:.0f} pairs/s"])
    if "seconds" in cases.get("checkpoint", {}):
        case = cases["checkpoint"]
        rows.append(["checkpoint", f"{case['seconds']:.1f} s for {case['bytes'] / GIB:.2f} GiB"])
        if (stall := waiting(figures)) is not None:
            first, beside = case["stalls"][0], min(case["beside"])
            figure = f"a step waits {stall:.2f} s, the first time {first:.2f} s; written in {beside:.1f} s"
            rows.append(["checkpoint, `async_checkpoints`", figure])
    if "matrices" in cases.get("transport", {}):
        case = cases["transport"]
        figure = f"{1000 * case['seconds']:.0f} ms, {case['bytes'] / 2**20:.1f} MiB: {case['matrices']:.2f} matrices"
        rows.append(["transport plan, 512 features, 4,000 codes, fp32", figure])
    for kind, case in kinds(figures).items():
        figure = ", ".join(
            f"{part} {case[f'{part}_time']:.1%} of the time for {case[f'{part}_share']:.1%} of the work"
            for part in ("encoder", "step")
        )
        rows.append([f"MoMo with dropping: {kind}", figure])
    for name, seconds in cases.get("starts", {}).items():
        rows.append([f"start of `{name}`", f"{seconds:.2f} s" if isinstance(seconds, float) else str(seconds)])
    return table(["what", "figure"], rows)


TABLES = {
    "machine": machine_text,
    "goals": goal_table,
    "steps": step_table,
    "phases": phase_table,
    "others": other_table,
}


def write_tables(figures: Figures, page: Path) -> None:
    """
    Fills every `<!-- table: NAME -->` ... `<!-- end -->` of the page and leaves the rest unchanged.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    text = page.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        if not mark.search(text):
            raise ValueError(f"{page}: no `<!-- table: {name} -->` ... `<!-- end -->`")
        filled = make(figures)
        text = mark.sub(lambda found, filled=filled: f"{found[1]}{filled}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
