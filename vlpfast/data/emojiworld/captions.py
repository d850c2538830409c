"""What is said about a scene, with the characters that name each object.

English captions are sentences that tell every fact of the scene's key, and in most scenes the background. In the other
languages, whose grammar bends words by gender and case, a caption is the list of the objects' names, one for each object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlpfast.data.emojiworld.draws import Draws
from vlpfast.data.emojiworld.scenes import CONVERSE, Background, Group, Scene
from vlpfast.data.emojiworld.sprites import Word
from vlpfast.data.emojiworld.world import World

VARIANTS = 3

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("", "", "a picture of ", "an image of ")
_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_WHERE = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
}
_BACKGROUNDS = {
    "plain": ("on {a} {0} background", "on a plain {0} background"),
    "gradient": ("on a background fading from {0} to {1}", "on {a} {0} to {1} gradient"),
    "stripes": ("on {0} and {1} stripes", "on {a} {0} and {1} striped background"),
    "checks": ("on {0} and {1} checks", "on {a} {0} and {1} checked background"),
    "noise": ("on a mottled {0} and {1} background", "on {0} and {1} noise"),
}
_COMMAS = {"ja": "、", "zh": "、", "ar": "، ", "fa": "، "}
_NO_AN = ("uni", "uk", "eu", "one", "ufo")  # words that begin with a vowel letter and not with a vowel

Piece = tuple[str, tuple[int, ...]]  # text, things that it names


@dataclass(frozen=True)
class Caption:
    text: str
    phrases: tuple[tuple[int, int, tuple[int, ...]], ...]  # start, end, the things that text[start:end] names

    def json(self) -> dict[str, object]:
        return {
            "caption": self.text,
            "phrases": [{"start": start, "end": end, "objects": list(things)} for start, end, things in self.phrases],
        }


def captions(scene: Scene, world: World, words: Sequence[Word]) -> Iterator[Caption]:
    """The scene's caption, then up to VARIANTS others that say the same."""
    draws = Draws(*scene.name, "caption")
    write = _english if world.language == "en" else _listed
    found: set[str] = set()
    for _ in range(3 * VARIANTS):
        caption = _joined(write(scene, world, words, draws))
        if caption.text not in found:
            found.add(caption.text)
            yield caption
        if len(found) > VARIANTS:
            return


def templates(language: str = "en") -> list[str]:
    """Prompts for zero-shot classification in the captions' style, {} for the class name."""
    if language != "en":
        return ["{}"]
    return [
        "one {}",
        "a picture of one {}",
        "an image of one {}",
        "one {} in the middle",
        "a picture of one large {}",
        "one small {}",
    ]


def _joined(pieces: Sequence[Piece]) -> Caption:
    text, phrases = "", []
    for piece, things in pieces:
        if things:
            phrases.append((len(text), len(text) + len(piece), things))
        text += piece
    return Caption(text, tuple(phrases))


def _members(scene: Scene, group: int) -> tuple[int, ...]:
    return tuple(i for i, thing in enumerate(scene.things) if thing.group == group)


def _listed(scene: Scene, world: World, words: Sequence[Word], draws: Draws) -> list[Piece]:
    rest = list(range(len(scene.things)))
    pieces: list[Piece] = []
    while rest:
        thing = rest.pop(draws.whole(0, len(rest) - 1))
        if pieces:
            pieces.append((_COMMAS.get(world.language, ", "), ()))
        pieces.append((words[scene.groups[scene.things[thing].group].word].name, (thing,)))
    return pieces


def _english(scene: Scene, world: World, words: Sequence[Word], draws: Draws) -> list[Piece]:
    named: list[Piece] = [(_noun(group, words[group.word], draws), _members(scene, i)) for i, group in enumerate(scene.groups)]
    opening, ground = draws.pick(_OPENINGS), _ground(scene.background, draws)
    if scene.place is not None:
        where = _where(scene.place)
        return [(opening, ()), named[0], (f" {where}{ground}" if draws.chance(60) or not ground else f"{ground}, {where}", ())]
    if scene.relation is None:
        order = list(range(len(named)))
        mixed = [order.pop(draws.whole(0, len(order) - 1)) for _ in range(len(named))]
        return [(opening, ()), *_series([named[i] for i in mixed]), (ground, ())]
    subject, predicate, target = scene.relation
    if draws.chance(50):
        subject, predicate, target = target, CONVERSE[predicate], subject
    told = draws.pick(_PHRASES[predicate])
    rest = [piece for i, piece in enumerate(named) if i not in (subject, target)]
    form = draws.whole(0, 3)
    if form == 0 and not rest:
        return [(f"{told} ", ()), named[target], (" is ", ()), named[subject], (ground, ())]
    if form == 1:
        a, b = (f"the {words[scene.groups[i].word].name}" for i in (subject, target))
        things = _series([named[subject], named[target], *rest])
        relation = [(", ", ()), (a, named[subject][1]), (f" {told} ", ()), (b, named[target][1])]
        return [(opening, ()), *things, (ground, ()), *relation]
    if form == 2 and not rest:
        return [named[subject], (f" is {told} ", ()), named[target], (ground, ())]
    tail = [(" with ", ()), *_series(rest)] if rest else []
    return [(opening, ()), named[subject], (f" {told} ", ()), named[target], *tail, (ground, ())]


def _series(pieces: Sequence[Piece]) -> list[Piece]:
    out = [pieces[0]]
    for i, piece in enumerate(pieces[1:], 2):
        out += [(" and " if i == len(pieces) else ", ", ()), piece]
    return out


def _noun(group: Group, word: Word, draws: Draws) -> str:
    adjectives = [group.size] if group.size != "medium" else []
    if group.tint is not None:
        adjectives.append(group.tint)
    if group.count > 1:
        return " ".join([_NUMBERS[group.count], *adjectives, str(word.plural)])
    phrase = " ".join([*adjectives, word.english])
    if draws.chance(25):
        return f"one {phrase}"
    if phrase[0].isupper():  # "Japan" names a flag
        return phrase
    return f"{_article(phrase)} {phrase}"


def _article(phrase: str) -> str:
    return "an" if phrase[0].lower() in "aeiou" and not phrase.lower().startswith(_NO_AN) else "a"


def _where(place: str) -> str:
    return _WHERE.get(place) or f"in the {place} corner"


def _ground(background: Background, draws: Draws) -> str:
    form = draws.pick(_BACKGROUNDS[background.kind])
    return " " + form.format(*background.colours, a=_article(background.colours[0])) if background.told else ""
