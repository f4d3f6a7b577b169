"""Composed retrieval that nobody labelled: icon `bell` and "off" ask for `bell-off`, `user` and "plus" `user-plus`.

The names of icons say it: a name with a word more than another's is that icon with something done to it. `within`: the
target is drawn by the reference's set, in its style if there is one; `across`: by another set.

Choices of a query, as in `scenes_queries.py`: the target, the reference's thing in another drawing (what the picture
alone finds), three other things with the same word ("mic off": what the words alone find), then other changes of the
thing ("bell plus"), and what is left by chance. None of them shares the target's concept.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from zlib import crc32

import pyarrow as pa
from icons_names import concept_of

KINDS = ("within", "across")
OTHERS = 9  # pictures that are not the target, of each query
WORDS_ALONE = 3
CHANGES = 3
# Words that ask for the same: none of them is another change.
SAME = [
    set(words.split())
    for words in (
        "add plus", "remove minus delete", "x close cancel", "off slash mute disabled", "check done", "lock locked",
        "settings setting cog gear", "edit pen pencil", "alert warning error exclamation", "clock time",
        "question help", "star favorite heart", "user person", "bolt flash", "refresh sync", "box square",
        "share export", "up upload", "down download", "forward next", "back previous", "open unlock",
    )
]  # fmt: skip
# Words that do to a picture what a designer would ask for.
MODIFIERS = frozenset(
    "off on plus add minus remove delete check done x close cancel slash disabled search lock locked unlock alert "
    "warning error star heart favorite settings setting cog gear edit pen pencil clock time question help exclamation "
    "info dollar euro up down left right circle square box user person key code play pause stop record refresh sync "
    "share download upload import export bolt flash link shield open closed full empty low medium high half double "
    "multiple vertical horizontal dashed broken music video image text chart cloud arrow bar list grid home folder "
    "file mute forward back next previous in out top bottom".split()
)

# Of these, what means another thing before a name: "top up", "chart point".
NEVER_FIRST = frozenset("up down in out top bottom chart text list grid open next back".split())


def composed_queries(
    table: pa.Table, targets: Sequence[int], pool: Sequence[int], split: str, count: int
) -> dict[str, pa.Table]:
    """`queries` and `gallery` of a split; {} if its names make none.

    Args:
        targets: rows of `table` that may be asked for; all of them that are no reference make the gallery.
        pool: rows that references and choices are taken from.
    """
    icons = Icons(table, pool)
    found = {kind: spread(triples(icons, targets, kind), f"{split} {kind}", count // 2) for kind in KINDS}
    # What is asked for stays in the gallery, so it is no reference; no reference stands in it.
    wanted = {target for some in found.values() for _, _, target in some}
    asked = [(kind, *triple) for kind in KINDS for triple in found[kind] if triple[0] not in wanted]
    if not asked:
        return {}
    references = {reference for _, reference, _, _ in asked}
    rng = random.Random(crc32(split.encode()))
    chosen = [choices(icons, rng, *triple, references) for _, *triple in asked]

    # The gallery: the split, and what was chosen beside it.
    rows = [row for row in map(int, targets) if row not in references]
    rows += sorted({row for some in chosen for _, row in some} - set(rows))
    place = {row: number for number, row in enumerate(rows)}
    kept = [(query, [(name, place[row]) for name, row in some]) for query, some in zip(asked, chosen, strict=True)]
    gallery = table.take(rows)
    gallery = gallery.append_column("concepts", gallery["concept"])  # the scenes' name for it
    return {"queries": query_table(table, kept, split), "gallery": gallery}


class Icons:
    """Rows of a pool by what they are: their number, set, style, words and concept."""

    def __init__(self, table: pa.Table, pool: Sequence[int]) -> None:
        columns = table.select(["set", "style", "text", "concept"]).to_pydict()
        self.set, self.style, self.concept = columns["set"], columns["style"], columns["concept"]
        self.words = [text.split() for text in columns["text"]]
        self.pool = sorted(map(int, pool))
        self.rows = defaultdict(list)  # by concept
        self.modified = defaultdict(list)  # by the word that modifies
        self.changes = defaultdict(list)  # (row, word) by the concept that is modified
        for row in self.pool:
            self.rows[self.concept[row]].append(row)
        for row in self.pool:
            for base, word in self.readings(row):
                self.modified[word].append(row)
                self.changes[base].append((row, word))

    def readings(self, row: int) -> list[tuple[str, str]]:
        """(concept, word) for each way to read a name as a thing that is there and a word at its end or beginning."""
        words = self.words[row]
        ways = [(words[:-1], words[-1])] if len(words) > 1 else []
        ways += [(words[1:], words[0])] if ways and words[0] not in NEVER_FIRST else []
        return [(concept_of(base), word) for base, word in ways if word in MODIFIERS and concept_of(base) in self.rows]


def triples(icons: Icons, targets: Sequence[int], kind: str) -> list[tuple[int, str, int]]:
    """(reference, word, target): one reference a target and kind, drawn by the target's set or by another."""
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
    """At most `count` of them, words in turn, so that common ones do not crowd out the others; a concept once."""
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
    """(what it is, row) of each picture to choose from, the target first; none of them hidden."""
    chosen = [("target", target)]
    concepts = {icons.concept[target]}

    def take(name: str, rows: Iterable[int], limit: int) -> None:
        # Another concept each time; in the target's set where it has them, so that its hand gives nothing away.
        for row in sorted(rows, key=lambda row: (icons.set[row] != icons.set[target], rng.random())):
            if limit and row not in hidden and icons.concept[row] not in concepts:
                concepts.add(icons.concept[row])
                chosen.append((name, row))
                limit -= 1

    # No synonym of the word makes another change of the thing.
    base = icons.concept[reference]
    same = {word}.union(*(words for words in SAME if word in words))
    take("reference", icons.rows[base], 1)
    concepts.add(base)
    take("words alone", icons.modified[word], WORDS_ALONE)
    take("other change", (row for row, how in icons.changes[base] if how not in same), CHANGES)
    take("other", rng.sample(icons.pool, min(len(icons.pool), 64)), OTHERS + 1 - len(chosen))
    return chosen


def query_table(table: pa.Table, kept: Sequence[tuple[tuple, list[tuple[str, int]]]], split: str) -> pa.Table:
    """The queries, with the columns of the scenes' ones: what a picture shows is its name."""
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
