"""The diagnoses, each a pure function of its inputs: a `Finding`, or None if nothing is wrong or it cannot be decided.

A cure that cites a document was measured there; one that says "first try" is reasoned, not measured.

Lines are those of log.jsonl. n rows of a sample, P width of the embeddings.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oner.training.evaluation.dvae import code_perplexity

# minimum number of log lines, and the share of the log, at its end, that is used
ENOUGH_LINES, RECENT = 4, 0.25
# matching that ended at .96 of "always no" ranked candidates worse than cosines (docs/evidence_simla.md)
HARDLY_MATCHES = 0.95
HARDLY_CONTRASTS = 0.97
# unit vectors in fewer directions than this have a mean cosine of about .995 or more
FEW_DIRECTIONS = 1.01
AT_A_BOUND = 0.01
# largest allowed share of the teacher's weights from before the run
FORGOTTEN = 0.1
# used codes relative to uniform use; entropy of a plan relative to the logarithm of the number of codes
DEAD = 0.5
NEARLY_EVEN = 0.97
# duplicates that a row may have among its negatives, and the pairs of them that a sample must contain
STRANGERS, BELIEVED = 0.1, 3
NEARLY_EQUAL = 0.02  # root mean square difference of pixels in [0, 1]
WAITS = 0.5
UNKNOWN = 0.01
# recall on training rows that is far from chance, and by what factor a lower recall on others is too low
LEARNED, TIMES_LESS = 0.5, 5

# cures of dead codes
OF_TOKENIZER = (
    "usage_weight above 0 in examples/train_image_tokenizer.py: on the emoji, .01 uses 376 of 512 codes in an "
    "unseen style (examples/checkpoints/emoji-tokenizer); for a tokenizer trained on other images, first try "
    "one of your own"
)
OF_CODEBOOK = (
    "first try a num_codes close to the batch of a process, as in examples/configs/codis_emoji.yaml: marginals "
    "spread a feature over at least K / B codes, so that several learn the same; then check whether contrast "
    "has learned anything, because without it all features are close together"
)


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        name: The problem in a few words.
        measured, expected: What was found, and what a healthy run would show.
        cure: What helped in a measured run, or what to try first and why.
    """

    name: str
    measured: str
    expected: str
    cure: str


def recent(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a value over the end of a log; None if too few lines contain it."""
    values = [line[name] for line in lines if line.get(name) is not None]
    if len(values) < ENOUGH_LINES:
        return None
    end = values[-max(1, round(RECENT * len(values))) :]
    return sum(end) / len(end)


def matching_says_no(lines: Sequence[Mapping[str, Any]], uninformed: Mapping[str, float]) -> Finding | None:
    """Matching loss at the entropy of its labels, which a head reaches without looking at the pair."""
    loss = recent(lines, "itm")
    if loss is None or "itm" not in uninformed or loss < HARDLY_MATCHES * uninformed["itm"]:
        return None
    return Finding(
        "matching says no to everything",
        f"itm {loss:.3f} at the end of the log; always saying no gives {uninformed['itm']:.3f}",
        f"itm below {HARDLY_MATCHES * uninformed['itm']:.3f}",
        "do not re-rank yet, and train longer: on the emoji, itm was .61 to .63 after 12 epochs and .46 after "
        "32 (docs/evidence_simla.md). Training contrast first did not help (docs/training_small.md)",
    )


def contrast_knows_nothing(lines: Sequence[Mapping[str, Any]], uninformed: Mapping[str, float]) -> Finding | None:
    """Contrastive losses at the logarithm of the number of keys, where all keys are equally likely."""
    stuck = {}
    for name in sorted(uninformed.keys() - {"itm"}):
        loss = recent(lines, name)
        if loss is not None and loss > HARDLY_CONTRASTS * uninformed[name]:
            stuck[name] = loss
    if not stuck:
        return None
    return Finding(
        "contrast knows nothing",
        ", ".join(f"{name} {loss:.3f} of log {math.exp(uninformed[name]):.0f} = {uninformed[name]:.3f}"
                  for name, loss in stuck.items()),
        ", ".join(f"{name} below {HARDLY_CONTRASTS * uninformed[name]:.3f}" for name in stuck),
        "OneR: linear heads and temperature .07 learn where MoCo-v3's heads stay at chance for 240 steps "
        "(docs/evidence.md); any family: first try another learning rate; both too small and too large lead here",
    )  # fmt: skip


def directions(embeddings: torch.Tensor) -> float:
    """
    The number of directions that unit vectors (n, P) span: the participation ratio of the eigenvalues of their second
    moments, which is 1 if all vectors are equal, and at most n or P.
    """
    vectors = embeddings.double()
    moments = vectors.T @ vectors / len(vectors)  # (P, P), of trace 1
    return (moments.trace().square() / moments.square().sum()).item()


def side_collapsed(side: str, embeddings: torch.Tensor) -> Finding | None:
    """A modality whose embeddings, unit vectors (n, P), are almost all the same vector."""
    found = directions(embeddings)
    if found >= FEW_DIRECTIONS:
        return None
    return Finding(
        f"{side} collapsed",
        f"the embeddings of {len(embeddings)} {side} span {found:.3f} directions",
        f"more than {FEW_DIRECTIONS}; 1 means that all are equal",
        f"first check the {side} themselves: identical rows cause this (tests/doctor); then check contrast: "
        f"if its loss is at the logarithm of its keys, nothing separates the embeddings",
    )


def temperature_at_bound(temperature: float, bounds: tuple[float, float]) -> Finding | None:
    """A learnable temperature at a limit of its range."""
    low, high = bounds
    side = "lower" if temperature <= low * (1 + AT_A_BOUND) else "upper"
    if low * (1 + AT_A_BOUND) < temperature < high * (1 - AT_A_BOUND):
        return None
    why = {
        "lower": "it cannot go lower: pairs are separated already, by memorisation or lack of negatives; first try a "
        "larger batch or queue, then a lower temperature_range",
        "upper": "it cannot go higher: the cosines of pairs are no better than others, so the loss lowers the weight "
        "of all; first check whether contrast has learned anything, then try a wider temperature_range",
    }
    return Finding(f"temperature at its {side} bound", f"{temperature:.4g}", f"within {low:g} and {high:g}", why[side])


def teacher_behind(momentum: float, steps: int, distance: float) -> Finding | None:
    """
    A teacher that still contains a large share of the weights from the start of the run.

    Args:
        distance: Between teacher and student, as a share of the student's norm.
    """
    left = momentum**steps
    if left <= FORGOTTEN:
        return None
    highest = FORGOTTEN ** (1 / steps)
    return Finding(
        "teacher far behind",
        f"{left:.0%} of the teacher's weights are from before the first step (ema_momentum {momentum:g}, {steps} "
        f"steps); its distance from the student is {distance:.2f} of the student's norm",
        f"at most {FORGOTTEN:.0%}, as with an ema_momentum of at most {highest:.3g} for {steps} steps",
        "a lower ema_momentum, or a longer run; examples/configs/oner_emoji.yaml uses .99 for 384 steps",
    )


def even_choice(num_codes: int, places: int) -> float:
    """The expected number of different codes if each position drew one uniformly."""
    return num_codes * (1 - (1 - 1 / num_codes) ** places)


def codes_dead(codes: torch.Tensor, num_codes: int, cure: str = OF_TOKENIZER) -> Finding | None:
    """
    Unused codes of an image tokenizer, or of any codebook.

    Args:
        codes: Codes of all positions of a sample, any shape.
    """
    used, perplexity = code_perplexity(codes, num_codes)
    even = even_choice(num_codes, codes.numel())
    if used >= DEAD * even:
        return None
    return Finding(
        "dead codes",
        f"{used} of {num_codes} codes in {codes.numel()} positions, entropy {math.log(perplexity):.2f} nats",
        f"{DEAD * even:.0f} or more; uniform use gives {even:.0f}, entropy {math.log(num_codes):.2f}",
        cure,
    )


def codes_unused(lines: Sequence[Mapping[str, Any]], num_codes: int, batch: int) -> Finding | None:
    """
    Codes of a codebook that are not the nearest code of any feature, according to the log.

    Args:
        batch: Number of features of a modality that are assigned to codes at once.
    """
    used = recent(lines, "codes_used")
    # the log contains the share of the codes that this many features could use
    most = min(batch, num_codes)
    even = even_choice(num_codes, batch) / most
    if used is None or used >= DEAD * even:
        return None
    return Finding(
        "dead codes",
        f"{used * most:.1f} of {num_codes} codes are nearest to any of {batch} features, at the end of the log",
        f"{DEAD * even * most:.1f} or more; uniform use gives {even * most:.1f}",
        OF_CODEBOOK,
    )


def plans_even(entropy: float | None, num_codes: int, where: str) -> Finding | None:
    """Transport plans that assign every feature to all codes equally, so that they carry no information."""
    highest = math.log(num_codes)
    if entropy is None or entropy <= NEARLY_EVEN * highest:
        return None
    return Finding(
        "plans of transport tell nothing",
        f"a feature's distribution over the codes has entropy {entropy:.2f} {where}; the uniform one has "
        f"log {num_codes} = {highest:.2f}",
        f"{NEARLY_EVEN * highest:.2f} or less",
        "identical features, or identical codes, have equal costs: first check for collapsed pictures or texts, which "
        "cause this (tests/doctor); then try a smaller ipot_beta, which sharpens plans, or a smaller num_codes",
    )


def equal_captions(captions: Sequence[Sequence[str]], ids: Sequence[Hashable]) -> float:
    """
    The expected number of pairs of rows with different ids that show the same caption, each row drawing one of its
    own.
    """
    # the weight of each caption, over all rows and over those of one id, with the sum of its squares
    total: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for own, concept in zip(captions, ids, strict=True):
        weights: dict[str, float] = defaultdict(float)
        for caption in own:
            weights[" ".join(caption.lower().split())] += 1 / len(own)
        for caption, weight in weights.items():
            for key in (caption, (caption, concept)):
                total[key][0] += weight
                total[key][1] += weight * weight

    # ordered pairs of other rows, less those of one id, each counted twice
    pairs = {key: weight**2 - squares for key, (weight, squares) in total.items()}
    return sum(-value if isinstance(key, tuple) else value for key, value in pairs.items()) / 2


def equal_pictures(pictures: torch.Tensor, ids: Sequence[Hashable]) -> int:
    """Pairs of rows with different ids whose images, (n, M) values in [0, 1], are nearly equal."""
    distances = torch.cdist(pictures, pictures) / math.sqrt(pictures.shape[1])  # (n, n)
    numbers = {concept: number for number, concept in enumerate(dict.fromkeys(ids))}
    own = torch.tensor([numbers[concept] for concept in ids])  # (n,)
    strangers = (own[:, None] != own[None, :]).triu(1)  # (n, n)
    return int((strangers & (distances < NEARLY_EQUAL)).sum())


def near_duplicates(captions: float, pictures: float, rows: int, negatives: int) -> Finding | None:
    """
    Rows that count as wrong answers for each other but have the same image or caption.

    Args:
        captions, pictures: Pairs of such rows among `rows` of a sample.
        negatives: Number of negatives of a row in a contrastive loss.
    """
    # expected duplicates of a row in a step, if the sample is representative
    pairs = {"captions": captions, "pictures": pictures}
    met = {name: 2 * count / (rows * (rows - 1)) * negatives for name, count in pairs.items()}
    found = [name for name, count in pairs.items() if count >= BELIEVED and met[name] > STRANGERS]
    if not found:
        return None
    return Finding(
        "near duplicates among the negatives",
        "; ".join(f"{pairs[name]:.0f} pairs of equal {name} in {rows} rows: {met[name]:.2f} of a row's {negatives} "
                  f"negatives" for name in found),
        f"at most {STRANGERS} of a row's negatives",
        "set id_column to the column whose equal values mean the same concept, with match_ids, or with one_row_per_id "
        "if there is no queue: equal rows are then right answers, or never in one batch (tests/doctor)",
    )  # fmt: skip


def waits_for_data(lines: Sequence[Mapping[str, Any]], workers: int) -> Finding | None:
    """A loop that waits for batches instead of computing."""
    # the first line has the start of the workers in it
    waited = recent(lines[1:], "waited_per_second")
    if waited is None or waited <= WAITS:
        return None
    return Finding(
        "waits for data",
        f"{waited:.0%} of the time was spent waiting for batches, with num_workers {workers} (an accelerator may have "
        f"computed meanwhile)",
        f"at most {WAITS:.0%}",
        "first try more num_workers, while there are cores: one reads and augments about 450 small images a second "
        "(docs/performance.md), and several times fewer photographs; then smaller image files",
    )


def words_unknown(unknown: int, tokens: int) -> Finding | None:
    """Words in a sample's captions that the vocabulary maps to [UNK]."""
    if not tokens or unknown <= UNKNOWN * tokens:
        return None
    return Finding(
        "words without a token",
        f"{unknown / tokens:.1%} of {tokens} tokens are [UNK]",
        f"at most {UNKNOWN:.0%}",
        "a vocabulary from these captions: without `tokenizer` one is trained on them, which leaves no [UNK] "
        "(tests/doctor)",
    )


def overfitted(training: float, evaluation: float, rows: int) -> Finding | None:
    """
    Memorised training rows.

    Args:
        training, evaluation: Recall@1, mean of both directions, among `rows` of each.
    """
    if training < LEARNED or evaluation * TIMES_LESS > training:
        return None
    return Finding(
        "overfitting",
        f"R@1 among {rows} rows is {training:.1%} on training data and {evaluation:.1%} on evaluation data",
        f"{training / TIMES_LESS:.1%} or more on evaluation data",
        "first try more rows, then fewer epochs; then stronger augmentation: randaugment and crop_margin helped to "
        "improve the emoji from 25.5 / 35.1 to 50.2 / 58.4 in an unseen style (docs/results.md, with 50 more epochs)",
    )
