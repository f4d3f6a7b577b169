"""The diagnoses, each a pure function of what was read: a `Finding`, or None where nothing is wrong or can be told.

A cure that names a document was measured there; one that says "first try" is reasoned, not measured.

Lines are those of log.jsonl. n rows of a sample, P width of the embeddings.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oner.training.evaluation.dvae import code_perplexity

# lines that a judgement needs, and the share of a log, its end, that is judged
ENOUGH_LINES, RECENT = 4, 0.25
# matching that ended at .96 of "always no" put candidates in a worse order than cosines (docs/evidence_simla.md)
HARDLY_MATCHES = 0.95
HARDLY_CONTRASTS = 0.97
# unit vectors in fewer directions than this have a mean cosine of about .995 or more
FEW_DIRECTIONS = 1.01
AT_A_BOUND = 0.01
# of the teacher's weights, the share that may be older than the run
FORGOTTEN = 0.1
# codes in use, of as many as an even choice would use; entropy of a plan, of the logarithm of codes
DEAD = 0.5
NEARLY_EVEN = 0.97
# equal strangers that a row may meet in a contrast, and pairs of them that a sample must hold to be believed
STRANGERS, BELIEVED = 0.1, 3
NEARLY_EQUAL = 0.02  # root mean square difference of pixels in [0, 1]
WAITS = 0.5
UNKNOWN = 0.01
# recall on training rows that is far from chance, and how many times less on others is too much less
LEARNED, TIMES_LESS = 0.5, 5

# cures of dead codes
OF_TOKENIZER = (
    "usage_weight above 0 in examples/train_image_tokenizer.py: on the emoji .01 has 376 of 512 codes in use in an "
    "unseen style (examples/checkpoints/emoji-tokenizer); of a tokenizer that learned from other pictures, first try "
    "one of your own"
)
OF_CODEBOOK = (
    "first try a num_codes near the batch of a process, as examples/configs/codis_emoji.yaml has it: even marginals "
    "spread a feature over K / B codes at least, so that more of them learn one thing; then see whether contrast "
    "knows anything, for without it features lie together"
)


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        name: What it is, in a few words.
        measured, expected: What was found, and what would have been found in a healthy run.
        cure: What was seen to help, or what to try first and why.
    """

    name: str
    measured: str
    expected: str
    cure: str


def recent(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a value over the end of a log; None where too few lines hold it."""
    values = [line[name] for line in lines if line.get(name) is not None]
    if len(values) < ENOUGH_LINES:
        return None
    end = values[-max(1, round(RECENT * len(values))) :]
    return sum(end) / len(end)


def matching_says_no(lines: Sequence[Mapping[str, Any]], uninformed: Mapping[str, float]) -> Finding | None:
    """Matching at the entropy of its labels, which a head reaches that never looks at the pair."""
    loss = recent(lines, "itm")
    if loss is None or "itm" not in uninformed or loss < HARDLY_MATCHES * uninformed["itm"]:
        return None
    return Finding(
        "matching says no to everything",
        f"itm {loss:.3f} at the end of the log; always saying no gives {uninformed['itm']:.3f}",
        f"itm below {HARDLY_MATCHES * uninformed['itm']:.3f}",
        "re-rank by nothing yet, and train on: on the emoji itm stood at .61 to .63 after 12 epochs and at .46 after "
        "32 (docs/evidence_simla.md). Contrast first did not shorten the wait (docs/training_small.md)",
    )


def contrast_knows_nothing(lines: Sequence[Mapping[str, Any]], uninformed: Mapping[str, float]) -> Finding | None:
    """Contrasts at the logarithm of the number of keys, where every key is as likely as any other."""
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
        "OneR: linear heads and temperature .07 leave chance where MoCo-v3's heads do not within 240 steps "
        "(docs/evidence.md); any family: first try another learning rate, since too small and too large both end here",
    )  # fmt: skip


def directions(embeddings: torch.Tensor) -> float:
    """
    In how many directions unit vectors (n, P) lie: the participation ratio of their second moments' eigenvalues, which
    is 1 where all are one vector, and at most n or P.
    """
    vectors = embeddings.double()
    moments = vectors.T @ vectors / len(vectors)  # (P, P), of trace 1
    return (moments.trace().square() / moments.square().sum()).item()


def side_collapsed(side: str, embeddings: torch.Tensor) -> Finding | None:
    """A side whose embeddings, unit vectors (n, P), are all but one vector."""
    found = directions(embeddings)
    if found >= FEW_DIRECTIONS:
        return None
    return Finding(
        f"{side} collapsed",
        f"the embeddings of {len(embeddings)} {side} lie in {found:.3f} directions",
        f"more than {FEW_DIRECTIONS}; 1 is one vector for all",
        f"first look at the {side} themselves: rows that are all alike end so (tests/doctor); then at the contrast: "
        f"where it is at its logarithm, nothing keeps embeddings apart",
    )


def temperature_at_bound(temperature: float, bounds: tuple[float, float]) -> Finding | None:
    """A learnable temperature that its range holds back."""
    low, high = bounds
    side = "lower" if temperature <= low * (1 + AT_A_BOUND) else "upper"
    if low * (1 + AT_A_BOUND) < temperature < high * (1 - AT_A_BOUND):
        return None
    why = {
        "lower": "it may go no lower: pairs are told apart already, by heart or for lack of negatives; first try a "
        "larger batch or queue, then a temperature_range that goes lower",
        "upper": "it may go no higher: cosines of pairs are no better than others', so the loss makes them all count "
        "less; first see whether contrast knows anything, then try a wider temperature_range",
    }
    return Finding(f"temperature at its {side} bound", f"{temperature:.4g}", f"within {low:g} and {high:g}", why[side])


def teacher_behind(momentum: float, steps: int, distance: float) -> Finding | None:
    """
    A teacher that still holds the weights with which the run began.

    Args:
        distance: Of teacher and student, as a share of the student's norm.
    """
    left = momentum**steps
    if left <= FORGOTTEN:
        return None
    highest = FORGOTTEN ** (1 / steps)
    return Finding(
        "teacher far behind",
        f"{left:.0%} of the teacher are still the weights of the first step (ema_momentum {momentum:g}, {steps} "
        f"steps); it is {distance:.2f} of the student's norm away from it",
        f"at most {FORGOTTEN:.0%}, which ema_momentum {highest:.3g} or less gives in {steps} steps",
        "a lower ema_momentum, or a longer run; examples/configs/oner_emoji.yaml has .99 for 384 steps",
    )


def even_choice(num_codes: int, places: int) -> float:
    """How many codes would differ if each of the places took any."""
    return num_codes * (1 - (1 - 1 / num_codes) ** places)


def codes_dead(codes: torch.Tensor, num_codes: int, cure: str = OF_TOKENIZER) -> Finding | None:
    """
    Codes of an image tokenizer, or of any codebook, that nothing uses.

    Args:
        codes: Of all places of a sample, any shape.
    """
    used, perplexity = code_perplexity(codes, num_codes)
    even = even_choice(num_codes, codes.numel())
    if used >= DEAD * even:
        return None
    return Finding(
        "dead codes",
        f"{used} of {num_codes} codes in {codes.numel()} places, entropy {math.log(perplexity):.2f} nats",
        f"{DEAD * even:.0f} or more; an even choice uses {even:.0f}, entropy {math.log(num_codes):.2f}",
        cure,
    )


def codes_unused(lines: Sequence[Mapping[str, Any]], num_codes: int, batch: int) -> Finding | None:
    """
    Codes of a codebook that are nobody's nearest, by the log.

    Args:
        batch: Features of a side that are sent to codes at once.
    """
    used = recent(lines, "codes_used")
    # the log has a share of the codes that so many features could use
    most = min(batch, num_codes)
    even = even_choice(num_codes, batch) / most
    if used is None or used >= DEAD * even:
        return None
    return Finding(
        "dead codes",
        f"{used * most:.1f} of {num_codes} codes are the nearest of any of {batch} features, at the end of the log",
        f"{DEAD * even * most:.1f} or more; an even choice uses {even * most:.1f}",
        OF_CODEBOOK,
    )


def plans_even(entropy: float | None, num_codes: int, where: str) -> Finding | None:
    """Plans of transport that send every feature to every code alike, so that they teach nothing."""
    highest = math.log(num_codes)
    if entropy is None or entropy <= NEARLY_EVEN * highest:
        return None
    return Finding(
        "plans of transport tell nothing",
        f"a feature's shares of the codes have entropy {entropy:.2f} {where}; even shares have "
        f"log {num_codes} = {highest:.2f}",
        f"{NEARLY_EVEN * highest:.2f} or less",
        "features that are all alike, or codes that are, cost alike: first look at collapsed pictures or texts, whose "
        "plans end so (tests/doctor); then try a smaller ipot_beta, which sharpens plans, or a smaller num_codes",
    )


def equal_captions(captions: Sequence[Sequence[str]], ids: Sequence[Hashable]) -> float:
    """The expected number of pairs of rows of two ids that show one caption, where each draws one of its own."""
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
    """Pairs of rows of other ids whose pictures, (n, M) values in [0, 1], are nearly equal."""
    distances = torch.cdist(pictures, pictures) / math.sqrt(pictures.shape[1])  # (n, n)
    numbers = {concept: number for number, concept in enumerate(dict.fromkeys(ids))}
    own = torch.tensor([numbers[concept] for concept in ids])  # (n,)
    strangers = (own[:, None] != own[None, :]).triu(1)  # (n, n)
    return int((strangers & (distances < NEARLY_EQUAL)).sum())


def near_duplicates(captions: float, pictures: float, rows: int, negatives: int) -> Finding | None:
    """
    Rows that count as wrong answers for each other and look or read the same.

    Args:
        captions, pictures: Pairs of such rows among `rows` of a sample.
        negatives: How many negatives a row has in a contrast.
    """
    # what a row meets in a step, if the sample is like the rest
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
        "name the column whose equal values mean the same thing (id_column), with match_ids, or with one_row_per_id "
        "where nothing is queued: equal rows are then right answers, or never meet (tests/doctor)",
    )  # fmt: skip


def waits_for_data(lines: Sequence[Mapping[str, Any]], workers: int) -> Finding | None:
    """A loop that waits for batches instead of computing."""
    # the first line has the start of the workers in it
    waited = recent(lines[1:], "waited_per_second")
    if waited is None or waited <= WAITS:
        return None
    return Finding(
        "waits for data",
        f"{waited:.0%} of the time went into waiting for batches, with num_workers {workers} (an accelerator may have "
        f"computed meanwhile)",
        f"at most {WAITS:.0%}",
        "first try more num_workers, while there are cores: one reads and augments about 450 small pictures a second "
        "(docs/performance.md), photographs several times fewer; then smaller files of pictures",
    )


def words_unknown(unknown: int, tokens: int) -> Finding | None:
    """Tokens of a sample's captions that the vocabulary has no token for."""
    if not tokens or unknown <= UNKNOWN * tokens:
        return None
    return Finding(
        "words without a token",
        f"{unknown / tokens:.1%} of {tokens} tokens are [UNK]",
        f"at most {UNKNOWN:.0%}",
        "a vocabulary of these captions: without `tokenizer` one is trained on them, which leaves no [UNK] "
        "(tests/doctor)",
    )


def overfitted(training: float, evaluation: float, rows: int) -> Finding | None:
    """
    Training rows known by heart.

    Args:
        training, evaluation: Recall@1, mean of both directions, among `rows` of each.
    """
    if training < LEARNED or evaluation * TIMES_LESS > training:
        return None
    return Finding(
        "overfitting",
        f"R@1 among {rows} rows is {training:.1%} of the training's and {evaluation:.1%} of the evaluation's",
        f"{training / TIMES_LESS:.1%} or more of the evaluation's",
        "first try more rows, then fewer epochs; then harder pictures: randaugment and crop_margin were part of what "
        "took the emoji from 25.5 / 35.1 to 50.2 / 58.4 in an unseen style (docs/results.md, beside 50 epochs more)",
    )
