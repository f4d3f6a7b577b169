"""`oner doctor RUN`, and the one-line summary at the end of a run."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError

from oner.processing.data.row_checks import PairDataError
from oner.training.publishing.model_loading import ModelDirectoryError
from oner.training.run.loading import Rows

from .findings import (
    OF_CODEBOOK,
    Finding,
    codes_dead,
    codes_unused,
    contrast_knows_nothing,
    equal_captions,
    equal_pictures,
    matching_says_no,
    near_duplicates,
    overfitted,
    plans_even,
    recent,
    side_collapsed,
    teacher_behind,
    temperature_at_bound,
    waits_for_data,
    words_unknown,
)
from .reading import Run, Sample, read_run, read_sample


def findings_of(run: Run, sample: Sample | None = None) -> list[Finding]:
    """All diagnoses; without a sample, those of log and checkpoint."""
    # log and checkpoint
    found = [
        matching_says_no(run.lines, run.uninformed),
        contrast_knows_nothing(run.lines, run.uninformed),
        waits_for_data(run.lines, run.arguments.data.num_workers),
    ]
    # without a contrast nothing moves it
    if run.temperature is not None and run.negatives:
        found.append(temperature_at_bound(run.temperature, run.bounds))
    if run.num_codes:
        found.append(codes_unused(run.lines, run.num_codes, run.rows))
        found.append(plans_even(recent(run.lines, "plan_entropy"), run.num_codes, "at the end of the log"))
    momentum = run.arguments.to_dict().get("ema_momentum")
    if run.distance is not None and momentum is not None:
        found.append(teacher_behind(momentum, run.step, run.distance))
    if sample is not None:
        found += _of_sample(run, sample)
    # what log and sample both show is told as the log has it
    seen: dict[str, Finding] = {}
    for finding in found:
        if finding is not None:
            seen.setdefault(finding.name, finding)
    return list(seen.values())


def _of_sample(run: Run, sample: Sample) -> list[Finding | None]:
    # rows as they are
    found = [words_unknown(sample.unknown, sample.tokens)]
    if run.negatives and len(sample.ids) > 1:
        captions = equal_captions(sample.captions, sample.ids)
        pictures = equal_pictures(sample.pictures, sample.ids)
        found.append(near_duplicates(captions, pictures, len(sample.ids), run.negatives))

    # what the model makes of them
    if sample.embeddings is not None:
        found += [side_collapsed(side, vectors) for side, vectors in sample.embeddings.items()]
    if sample.recalls is not None:
        found.append(overfitted(*sample.recalls))
    if sample.codes is not None:
        found.append(codes_dead(sample.codes, sample.num_codes))
    if sample.nearest is not None:
        found.append(codes_dead(sample.nearest, run.num_codes, OF_CODEBOOK))
        found += [
            plans_even(entropy, run.num_codes, f"in the plan of {side}") for side, entropy in sample.entropies.items()
        ]
    return found


def examine(
    directory: str | Path, rows: Mapping[str, Rows] | None = None, count: int = 256
) -> tuple[list[Finding], list[str]]:
    """
    The problems of a run, and notes on the checks that could not be made.

    Args:
        directory: The run's output_dir.
        rows: Training rows by portion, if they are already open.
        count: Number of rows to sample; 0 for none.

    Raises:
        ValueError: the directory is not a run.
    """
    run = read_run(directory)
    notes, sample = [], None
    if not run.finished:
        notes.append("there is no model yet: temperature, embeddings and codes are not checked")
    if count:
        try:
            sample = read_sample(run, rows, count)
        except (ValueError, OSError, PairDataError, ModelDirectoryError) as error:
            notes.append(f"no sample is checked: {error}")
    return findings_of(run, sample), notes


def word(directory: str | Path, rows: Mapping[str, Rows] | None = None) -> str:
    """One line for the end of a run; errors here must not make the run fail."""
    try:
        found, _ = examine(directory, rows)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return f"doctor: could not check this run: {error}"
    if not found:
        return "doctor: nothing found"
    return f"doctor: {'; '.join(finding.name for finding in found)} (oner doctor {quote(str(directory))} tells more)"


def describe(found: Sequence[Finding], notes: Sequence[str]) -> str:
    """Findings as text, one paragraph each."""
    paragraphs = [
        f"{finding.name}\n  measured  {finding.measured}\n  expected  {finding.expected}\n  cure      {finding.cure}"
        for finding in found
    ]
    paragraphs += [f"({note})" for note in notes]
    return "\n".join(paragraphs if found else ["nothing found", *paragraphs])


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """`oner doctor`: returns 1 if a problem was found, else 0."""
    if rest:
        raise ValueError(f"unknown arguments {list(rest)}; `oner doctor --help` lists those there are")
    found, notes = examine(options.run, count=options.rows)
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in found], "notes": notes}, indent=1))
    else:
        print(describe(found, notes))
    return 1 if found else 0
