"""Composed retrieval without labels: icon `bell` and "off" retrieve `bell-off`, `user` and "plus" `user-plus`.

Queries follow from the names of icons: a name with one word more than another is that icon with a modification.
`within`: the target is from the reference's set, in its style if possible; `across`: from another set.

Choices of a query, as in `scenes_queries.py`: the target, the reference's concept in another drawing (what the image
alone finds), three other concepts with the same word ("mic off": what the text alone finds), then other modifications
of the concept ("bell plus"), and random icons. None of the others shares the target's concept.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from zlib import crc32

import pyarrow as pa
from icons_names import concept_of

KINDS = ("within", "across")
OTHERS = 9  # choices per query that are not the target
WORDS_ALONE = 3
CHANGES = 3
# Synonyms: none of them is another change.
SAME = [
    set(words.split())
    for words in (
        "add plus", "remove minus delete", "x close cancel", "off slash mute disabled", "check done", "lock locked",
        "settings setting cog gear", "edit pen pencil", "alert warning error exclamation", "clock time",
        "question help", "star favorite heart", "user person", "bolt flash", "refresh sync", "box square",
        "share export", "up upload", "down download", "forward next", "back previous", "open unlock",
    )
]  # fmt: skip
# Words that name modifications which a designer would ask for.
MODIFIERS = frozenset(
    "off on plus add minus remove delete check done x close cancel slash disabled search lock locked unlock alert "
    "warning error star heart favorite settings setting cog gear edit pen pencil clock time question help exclamation "
    "info dollar euro up down left right circle square box user person key code play pause stop record refresh sync "
    "share download upload import export bolt flash link shield open closed full empty low medium high half double "
    "multiple vertical horizontal dashed broken music video image text chart cloud arrow bar list grid home folder "
    "file mute forward back next previous in out top bottom".split()
)

# Of these, words that mean something else before a name: "top up", "chart point".
NEVER_FIRST = frozenset("up down in out top bottom chart text list grid open next back".split())


def composed_queries(
    table: pa.Table, targets: Sequence[int], pool: Sequence[int], split: str, count: int
) -> dict[str, pa.Table]:
    """`queries` and `gallery` of a split; {} if its names allow no query.

    Args:
        targets: rows of `table` that may be targets; the gallery contains all of them that are not references.
        pool: rows from which references and choices are taken.
    """
    icons = Icons(table, pool)
    found = {kind: spread(triples(icons, targets, kind), f"{split} {kind}", count // 2) for kind in KINDS}
    # Targets stay in the gallery, so they cannot be references; the gallery contains no reference.
    wanted = {target for some in found.values() for _, _, target in some}
    asked = [(kind, *triple) for kind in KINDS for triple in found[kind] if triple[0] not in wanted]
    if not asked:
        return {}
    references = {reference for _, reference, _, _ in asked}
    rng = random.Random(crc32(split.encode()))
    chosen = [choices(icons, rng, *triple, references) for _, *triple in asked]

    # The gallery: the split, and choices from outside it.
    rows = [row for row in map(int, targets) if row not in references]
    rows += sorted({row for some in chosen for _, row in some} - set(rows))
    place = {row: number for number, row in enumerate(rows)}
    kept = [(query, [(name, place[row]) for name, row in some]) for query, some in zip(asked, chosen, strict=True)]
    gallery = table.take(rows)
    gallery = gallery.append_column("concepts", gallery["concept"])  # its name in the scenes' files
    return {"queries": query_table(table, kept, split), "gallery": gallery}


class Icons:
    """Set, style, words and concept of each row, and the pool's rows by concept and by modification."""

    def __init__(self, table: pa.Table, pool: Sequence[int]) -> None:
        columns = table.select(["set", "style", "text", "concept"]).to_pydict()
        self.set, self.style, self.concept = columns["set"], columns["style"], columns["concept"]
        self.words = [text.split() for text in columns["text"]]
        self.pool = sorted(map(int, pool))
        self.rows = defaultdict(list)  # by concept
        self.modified = defaultdict(list)  # by modifying word
        self.changes = defaultdict(list)  # (row, word) by modified concept
        for row in self.pool:
            self.rows[self.concept[row]].append(row)
        for row in self.pool:
            for base, word in self.readings(row):
                self.modified[word].append(row)
                self.changes[base].append((row, word))

    def readings(self, row: int) -> list[tuple[str, str]]:
        """(concept, word) for each way to read a name as a known concept with a modifying word at its end or start."""
        words = self.words[row]
        ways = [(words[:-1], words[-1])] if len(words) > 1 else []
        ways += [(words[1:], words[0])] if ways and words[0] not in NEVER_FIRST else []
        return [(concept_of(base), word) for base, word in ways if word in MODIFIERS and concept_of(base) in self.rows]


def triples(icons: Icons, targets: Sequence[int], kind: str) -> list[tuple[int, str, int]]:
    """(reference, word, target): one reference per target, from the target's set or from another."""
    found = []
    for target in map(int, targets):
        for base, word in icons.readings(target)[:1]:
            same = [row for row in icons.rows[base] if icons.set[row] == icons.set[target]]
            alike = [row for row in same if icons.style[row] == icons.style[target]]
            other = [row for row in icons.rows[base] if icons.set[row] != icons.set[target]]
            fitting = (alike or same) if kind == "within" else other
            if fitting:
                found.append((fitting[crc32(f"{target}".encode()) % len(fitting)], word, target))
    return found


def spread(found: list[tuple[int, str, int]], salt: str, count: int) -> list[tuple[int, str, int]]:
    """At most `count` triples, taking words in turn, so that common ones do not crowd out the others."""
    by_word = defaultdict(list)
    for triple in sorted(found, key=lambda one: crc32(f"{salt} {one}".encode())):
        by_word[triple[1]].append(triple)
    taken: list[tuple[int, str, int]] = []
    turn = 0
    while len(taken) < count and turn < max(map(len, by_word.values()), default=0):
        taken += [some[turn] for _, some in sorted(by_word.items()) if turn < len(some)]
        turn += 1
    return taken[:count]


def choices(
    icons: Icons, rng: random.Random, reference: int, word: str, target: int, hidden: set[int]
) -> list[tuple[str, int]]:
    """(role, row) of each choice, the target first; the others are never in `hidden`."""
    chosen = [("target", target)]
    concepts = {icons.concept[target]}

    def take(name: str, rows: Iterable[int], limit: int) -> None:
        # Each has a new concept, and is from the target's set if possible, so that drawing style gives nothing away.
        for row in sorted(rows, key=lambda row: (icons.set[row] != icons.set[target], rng.random())):
            if limit and row not in hidden and icons.concept[row] not in concepts:
                concepts.add(icons.concept[row])
                chosen.append((name, row))
                limit -= 1

    # A synonym of the word is not another change.
    base = icons.concept[reference]
    same = {word}.union(*(words for words in SAME if word in words))
    take("reference", icons.rows[base], 1)
    concepts.add(base)
    take("words alone", icons.modified[word], WORDS_ALONE)
    take("other change", (row for row, how in icons.changes[base] if how not in same), CHANGES)
    take("other", rng.sample(icons.pool, min(len(icons.pool), 64)), OTHERS + 1 - len(chosen))
    return chosen


def query_table(table: pa.Table, kept: Sequence[tuple[tuple, list[tuple[str, int]]]], split: str) -> pa.Table:
    """The queries, with the columns of the scenes' queries; an icon's name is its caption."""
    asked = table.take([reference for (_, reference, _, _), _ in kept])
    targets = table.take([target for (_, _, _, target), _ in kept])
    columns = {
        "id": [f"{split}-{kind}-{number}" for number, ((kind, *_), _) in enumerate(kept)],
        "image": asked["image"],
        "text": [word for (_, _, word, _), _ in kept],
        "kind": [kind for (kind, *_), _ in kept],
        "reference_text": asked["text"],
        "target_text": targets["text"],
        "concepts": targets["concept"],
        "names": [[name for name, _ in some] for _, some in kept],
        "target": [some[0][1] for _, some in kept],
        "choices": [[place for _, place in some] for _, some in kept],
        "license": asked["license"],
        "attribution": asked["attribution"],
    }
    return pa.table(columns)
