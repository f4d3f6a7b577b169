"""Questions about a scene with their answers, hypotheses with labels, and referring expressions for its things.

They are drawn so that text alone reveals little: yes and no are equally frequent for each form of question, and what
is said of things in the scene is said equally often of absent ones.
"""

import random
from dataclasses import dataclass, replace

from scenes_captions import RELATIONS, draw_captions, say, write
from scenes_concepts import Concept, article, concept_table
from scenes_hard import KINDS, can_change, change, draw_absent
from scenes_layout import COLOURS, Group, Layout
from scenes_statements import OPPOSITE, Phrase, related, relations, stands_at

# form of question -> VQA v2's answer type; if a scene does not allow a form, another is used
QUESTIONS = {
    "is there": "yes/no",
    "is it beside": "yes/no",
    "how many": "number",
    "what is beside": "other",
    "what size": "other",
    "which side": "other",
    "what color": "other",
}
# Statements that no image can show: about one thing, about several.
UNKNOWN = (
    ("is three years old", "are three years old"),
    ("was bought yesterday", "were bought yesterday"),
    ("belongs to a girl", "belong to a girl"),
    ("is brand new", "are brand new"),
    ("will be sold tomorrow", "will be sold tomorrow"),
    ("is somebody's favorite", "are somebody's favorites"),
    ("comes from far away", "come from far away"),
    ("weighs more than it seems", "weigh more than they seem"),
)
ATTEMPTS = 50


@dataclass(frozen=True)
class Question:
    """A question, its one answer, and its form, a key of `QUESTIONS`."""

    text: str
    answer: str
    form: str


def draw_questions(rng: random.Random, layout: Layout, split: str, number: int) -> list[Question]:
    """`number` different questions, or as many as the scene allows, of as many forms as possible."""
    # Forms in turn, in random order, without duplicate questions.
    asked: list[Question] = []
    forms = list(QUESTIONS)
    rng.shuffle(forms)
    for attempt in range(ATTEMPTS):
        if len(asked) == number:
            break
        question = _ask(rng, forms[attempt % len(forms)], layout, split)
        if question is not None and question.text not in [one.text for one in asked]:
            asked.append(question)
    return asked


def _ask(rng: random.Random, form: str, layout: Layout, split: str) -> Question | None:
    group = rng.choice(layout.groups)
    thing = concept_table()[group.hexcode]
    absent = concept_table()[draw_absent(rng, layout, split)]
    if form == "is there":
        shown = rng.random() < 0.5
        noun = (thing if shown else absent).name
        return Question(f"is there {article(noun)} {noun} in the picture?", "yes" if shown else "no", form)
    if form == "is it beside":
        return _ask_beside(rng, layout)
    if form == "how many":
        # zero as often as each other number
        asked, count = (absent, 0) if rng.random() < 0.2 else (thing, group.count)
        return Question(f"how many {asked.plural} are there?", str(count), form)
    if form == "what is beside":
        return _ask_what(rng, layout)
    if form == "what size":
        return Question(f"what size {be(group)} {the(group)}?", group.size, form)
    if form == "which side":
        side = next((side for side in ("left", "right") if stands_at(group, side)), None)
        return side and Question(f"{be(group)} {the(group)} on the left or on the right?", side, form)
    return Question("what color is the background?", layout.background.colour, form)


def _ask_beside(rng: random.Random, layout: Layout) -> Question | None:
    """Yes or no with equal probability: asks about the true relation or its opposite."""
    if not relations(layout):
        return None
    first, relation, second = rng.choice(relations(layout))
    one, other = layout.groups[first], layout.groups[second]
    true = rng.random() < 0.5
    words = RELATIONS[relation if true else OPPOSITE[relation]][0]
    return Question(f"{be(one)} {the(one)} {words} {the(other)}?", "yes" if true else "no", "is it beside")


def _ask_what(rng: random.Random, layout: Layout) -> Question | None:
    """Asks what is beside a group, if that is one thing without doubt."""
    if not relations(layout):
        return None
    first, relation, second = rng.choice(relations(layout))
    one, other = layout.groups[first], layout.groups[second]
    rivals = [group for group in layout.groups if group not in (one, other)]
    if one.count > 1 or any(related(group, relation, other) is not False for group in rivals):
        return None
    name = concept_table()[one.hexcode].name
    return Question(f"what is {RELATIONS[relation][0]} {the(other)}?", name, "what is beside")


def draw_entailment(rng: random.Random, layout: Layout, split: str) -> tuple[str, str]:
    """
    A hypothesis and its label. Four equally frequent cases: something visible, true (entailment) or false
    (contradiction), and something that no image shows, about a thing in the scene (neutral) or an absent one
    (contradiction). Text alone separates only the first two cases from the last two, which gives half of the labels.
    """
    true, visible = rng.random() < 0.5, rng.random() < 0.5
    # What no image shows, about a thing in the scene or an absent one.
    if not visible:
        group = rng.choice(layout.groups)
        phrase = Phrase(group.hexcode, group.count, group.size if rng.random() < 0.5 else None)
        if not true:
            phrase = replace(phrase, hexcode=draw_absent(rng, layout, split))
        told = named(concept_table()[phrase.hexcode], phrase.count, phrase.size)
        return f"{told} {rng.choice(UNKNOWN)[phrase.count > 1]}", "neutral" if true else "contradiction"

    # What is visible: a caption that can be made false, or its false version, so that both use the same words.
    while True:
        statement = draw_captions(rng, layout, 1)[0].statement
        kind = rng.choice(KINDS)
        changed = change(rng, kind, statement, layout, split) if can_change(kind, statement) else None
        if changed is not None:
            return write(statement if true else changed), "entailment" if true else "contradiction"


def draw_expression(rng: random.Random, layout: Layout) -> tuple[int, str] | None:
    """(group, expression) for a thing that is alone in its group; None if there is none.

    As in RefCOCO+, it gives no position in the image, only the name, the size, or what the thing is beside.
    """
    alone = [number for number, group in enumerate(layout.groups) if group.count == 1]
    if not alone:
        return None
    # Name and size, then what it is beside.
    number = rng.choice(alone)
    group = layout.groups[number]
    text = named(concept_table()[group.hexcode], 1, group.size if rng.random() < 0.5 else None)
    known = [(relation, other) for one, relation, other in relations(layout) if one == number]
    if known and rng.random() < 0.4:
        relation, other = rng.choice(known)
        beside = layout.groups[other]
        text = f"{text} {rng.choice(RELATIONS[relation])} {say(Phrase(beside.hexcode, beside.count))}"
    return number, text


def answer_list() -> list[str]:
    """All possible answers to the questions."""
    names = sorted(concept.name for concept in concept_table().values())
    return ["yes", "no", *map(str, range(5)), "left", "right", "big", "small", *COLOURS, *names]


def named(thing: Concept, count: int, size: str | None = None) -> str:
    """'the small dog', 'the dogs'."""
    return " ".join(filter(None, ("the", size, thing.name if count == 1 else thing.plural)))


def the(group: Group) -> str:
    """'the dog', 'the dogs'."""
    return named(concept_table()[group.hexcode], group.count)


def be(group: Group) -> str:
    """'is' or 'are'."""
    return "is" if group.count == 1 else "are"
