"""Captions of scenes in nine languages besides English, each with the content of its English caption.

Names of things are those of Unicode CLDR, from the npm package `emojibase-data` (MIT; the data are under the Unicode
licence). `scenes_names.csv` contains those that the scenes need; this command, which needs npm, rebuilds it:

    python examples/data/scenes_languages.py

Names are used as they are, so the templates need no gender, case or plural: left and right things are named in turn,
sizes are expressed without agreement, and several things by a number and a sign.
"""

import csv
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scenes_concepts import concept_table
from scenes_statements import OPPOSITE, Phrase, Statement

TABLE = Path(__file__).resolve().parent / "scenes_names.csv"
PACKAGE = "emojibase-data@17.0.0"
PLACES = ("top left", "top right", "bottom left", "bottom right", "left", "right", "top", "bottom", "middle")
COLOURS = ("white", "gray", "yellow", "orange", "pink", "green", "blue", "purple")


@dataclass(frozen=True)
class Language:
    """Templates; `{}` is filled with a thing, a colour or a text.

    Attributes:
        sides: position of something: left, right, above, below.
        sizes: of a thing, small and big.
        several: of a number and a thing.
        places: in the order of `PLACES`.
        ground: the background, with a colour of `colours` (in the order of `COLOURS`); patterns are not mentioned.
        picture: of a caption in the style "picture".
        both: between the last two of several things; comma: between others and between parts.
    """

    sides: tuple[str, str, str, str]
    sizes: tuple[str, str]
    several: str
    places: str
    ground: str
    colours: str
    picture: str
    both: str
    comma: str = ", "


LANGUAGES = {
    "de": Language(
        ("links {}", "rechts {}", "oben {}", "unten {}"),
        ("{} in kleiner Größe", "{} in großer Größe"),
        "{number} × {thing}",
        "oben links {}|oben rechts {}|unten links {}|unten rechts {}"
        "|links {}|rechts {}|oben {}|unten {}|in der Mitte {}",
        "auf {} Hintergrund",
        "weißem|grauem|gelbem|orangefarbenem|rosafarbenem|grünem|blauem|violettem",
        "Bild: {}",
        " und ",
    ),
    "fr": Language(
        ("à gauche {}", "à droite {}", "en haut {}", "en bas {}"),
        ("{} de petite taille", "{} de grande taille"),
        "{number} × {thing}",
        "en haut à gauche {}|en haut à droite {}|en bas à gauche {}|en bas à droite {}"
        "|à gauche {}|à droite {}|en haut {}|en bas {}|au milieu {}",
        "sur fond {}",
        "blanc|gris|jaune|orange|rose|vert|bleu|violet",
        "image : {}",
        " et ",
    ),
    "es": Language(
        ("a la izquierda {}", "a la derecha {}", "arriba {}", "abajo {}"),
        ("{} de tamaño pequeño", "{} de tamaño grande"),
        "{number} × {thing}",
        "arriba a la izquierda {}|arriba a la derecha {}|abajo a la izquierda {}|abajo a la derecha {}"
        "|a la izquierda {}|a la derecha {}|arriba {}|abajo {}|en el centro {}",
        "sobre fondo {}",
        "blanco|gris|amarillo|naranja|rosa|verde|azul|morado",
        "imagen: {}",
        " y ",
    ),
    "ja": Language(
        ("左に{}", "右に{}", "上に{}", "下に{}"),
        ("小さい{}", "大きい{}"),
        "{thing}×{number}",
        "左上に{}|右上に{}|左下に{}|右下に{}|左に{}|右に{}|上に{}|下に{}|真ん中に{}",
        "背景は{}",
        "白|灰色|黄色|オレンジ色|ピンク色|緑色|青色|紫色",
        "{}の絵",
        "と",
        "、",
    ),
    "zh": Language(
        ("左边是{}", "右边是{}", "上面是{}", "下面是{}"),
        ("小的{}", "大的{}"),
        "{thing}×{number}",
        "左上角是{}|右上角是{}|左下角是{}|右下角是{}|左边是{}|右边是{}|上面是{}|下面是{}|中间是{}",
        "{}背景",
        "白色|灰色|黄色|橙色|粉色|绿色|蓝色|紫色",
        "图片：{}",
        "和",
        "，",
    ),
    "ko": Language(
        ("왼쪽에 {}", "오른쪽에 {}", "위에 {}", "아래에 {}"),
        ("작은 {}", "큰 {}"),
        "{thing} {number}개",
        "왼쪽 위에 {}|오른쪽 위에 {}|왼쪽 아래에 {}|오른쪽 아래에 {}"
        "|왼쪽에 {}|오른쪽에 {}|위에 {}|아래에 {}|가운데에 {}",
        "{} 배경",
        "흰색|회색|노란색|주황색|분홍색|초록색|파란색|보라색",
        "그림: {}",
        " 및 ",
    ),
    "hi": Language(
        ("बाईं ओर {}", "दाईं ओर {}", "ऊपर {}", "नीचे {}"),
        ("{} (छोटा आकार)", "{} (बड़ा आकार)"),
        "{number} × {thing}",
        "ऊपर बाईं ओर {}|ऊपर दाईं ओर {}|नीचे बाईं ओर {}|नीचे दाईं ओर {}|बाईं ओर {}|दाईं ओर {}|ऊपर {}|नीचे {}|बीच में {}",
        "{} पृष्ठभूमि पर",
        "सफ़ेद|धूसर|पीली|नारंगी|गुलाबी|हरी|नीली|बैंगनी",
        "चित्र: {}",
        " और ",
    ),
    "th": Language(
        ("ทางซ้ายมี{}", "ทางขวามี{}", "ด้านบนมี{}", "ด้านล่างมี{}"),
        ("{}ขนาดเล็ก", "{}ขนาดใหญ่"),
        "{thing} {number} ชิ้น",
        "มุมซ้ายบนมี{}|มุมขวาบนมี{}|มุมซ้ายล่างมี{}|มุมขวาล่างมี{}|ทางซ้ายมี{}|ทางขวามี{}|ด้านบนมี{}|ด้านล่างมี{}|ตรงกลางมี{}",
        "บนพื้นหลังสี{}",
        "ขาว|เทา|เหลือง|ส้ม|ชมพู|เขียว|ฟ้า|ม่วง",
        "ภาพ {}",
        "และ",
        " ",
    ),
    "ru": Language(
        ("слева {}", "справа {}", "сверху {}", "снизу {}"),
        ("{} маленького размера", "{} большого размера"),
        "{number} × {thing}",
        "слева сверху {}|справа сверху {}|слева снизу {}|справа снизу {}|слева {}|справа {}|сверху {}|снизу {}"
        "|посередине {}",
        "на {} фоне",
        "белом|сером|жёлтом|оранжевом|розовом|зелёном|голубом|фиолетовом",
        "картинка: {}",
        " и ",
    ),
}


def translate(statement: Statement, language: str) -> str:
    """The statement in a language of `LANGUAGES`.

    Raises:
        ValueError: no such language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of en, {', '.join(LANGUAGES)}, got {language!r}")
    # Things with a place, then those without; or one side, then the other.
    grammar = LANGUAGES[language]
    parts = []
    if statement.relation is None:
        placed = [phrase for phrase in statement.subjects + statement.others if phrase.place]
        free = [phrase for phrase in statement.subjects + statement.others if not phrase.place]
        parts += [say(phrase, language) for phrase in placed]
        parts += [_together(free, language)] if free else []
    else:
        order = ("left", "right", "above", "below")
        for relation, phrases in (
            (statement.relation, statement.subjects),
            (OPPOSITE[statement.relation], statement.objects),
        ):
            parts.append(grammar.sides[order.index(relation)].format(_together(phrases, language)))
        parts += [say(phrase, language) for phrase in statement.others]
    # Opening and background.
    text = grammar.comma.join(parts)
    if statement.style == "picture":
        text = grammar.picture.format(text)
    if statement.colour:
        colour = grammar.colours.split("|")[COLOURS.index(statement.colour)]
        text = grammar.comma.join((text, grammar.ground.format(colour)))
    return text


def say(phrase: Phrase, language: str) -> str:
    """A phrase: name, size, number and place."""
    grammar = LANGUAGES[language]
    text = names(language)[phrase.hexcode]
    if phrase.size:
        text = grammar.sizes[phrase.size == "big"].format(text)
    if phrase.count > 1:
        text = grammar.several.format(number=phrase.count, thing=text)
    return grammar.places.split("|")[PLACES.index(phrase.place)].format(text) if phrase.place else text


def _together(phrases: tuple[Phrase, ...] | list[Phrase], language: str) -> str:
    grammar = LANGUAGES[language]
    said = [say(phrase, language) for phrase in phrases]
    first = grammar.comma.join(said[:-1])
    return f"{first}{grammar.both}{said[-1]}" if first else said[-1]


@cache
def names(language: str) -> dict[str, str]:
    """The name of each concept (hexcode) in a language."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["hexcode"]: row[language] for row in csv.DictReader(file)}


def fetch_names() -> dict[str, dict[str, str]]:
    """language -> hexcode -> name, from the package, which npm fetches into a temporary folder."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            for language in LANGUAGES:
                entries = json.load(archive.extractfile(f"package/{language}/compact.json"))
                found[language] = {plain(entry["hexcode"]): entry["label"] for entry in entries}
    return found


def plain(hexcode: str) -> str:
    """The hexcode without the variation selector for coloured drawings, which our files omit."""
    return hexcode.replace("-FE0F", "")


def main() -> None:
    """Writes the table of names."""
    fetched = fetch_names()
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["hexcode", *LANGUAGES])
        for hexcode in concept_table():
            # some Hindi names are lists of synonyms
            writer.writerow([hexcode, *(fetched[language][hexcode].split(", ")[0] for language in LANGUAGES)])
    print(f"{TABLE}: {len(concept_table())} names in {len(LANGUAGES)} languages")


if __name__ == "__main__":
    main()
