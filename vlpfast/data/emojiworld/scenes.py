"""What a scene shows, drawn from its number: objects, attributes, one told relation or place, background, positions. No
pixels are made here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from vlpfast.data.emojiworld.colours import BACKGROUNDS, Colour, distance
from vlpfast.data.emojiworld.draws import Draws
from vlpfast.data.emojiworld.sprites import Sprite, Word, sprite, visible_tints
from vlpfast.data.emojiworld.world import World

SIZES = {"small": (0.29, 0.33), "medium": (0.39, 0.44), "large": (0.50, 0.56)}  # longer side over the picture's
PREDICATES = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis, sign of object - subject
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = tuple(
    f"{row} {column}".strip() or "middle" for row in ("top", "", "bottom") for column in ("left", "", "right")
)  # of a single object, row by row
BACKGROUND_KINDS = ("plain", "gradient", "stripes", "checks", "noise")
_KIND_PERCENT = (40, 25, 12, 11, 12)
_COUNT_WEIGHTS = (4, 3, 2, 1)  # of one to four objects: names are learned where there are few

_SIZE_PERCENT = {1: (20, 60, 20), 2: (20, 60, 20), 3: (35, 55, 10), 4: (65, 35, 0)}  # by number of objects
# Percent of the objects that are tinted, of the single objects whose place is told, of the scenes whose background is.
_TINTED, _PLACE_TOLD, _BACKGROUND_TOLD = 25, 75, 90
_MAX_ROTATION = 15  # degrees either way
_MAX_OVERLAP = 0.1  # of the smaller of two objects' boxes
_CONTRAST = 130  # between an object's average colour and the background's, summed over R, G, B
_PAIR_CONTRAST = 150  # between the two colours of a background
_CANDIDATES, _ROUNDS = 96, 4  # arrangements tried at once; how often


@dataclass(frozen=True)
class Group:
    """One or several objects that a caption names together."""

    word: int  # position in the vocabulary
    tint: str | None
    size: str
    count: int


@dataclass(frozen=True)
class Thing:
    """One object where it stands. Positions are shares of the picture's side, y downwards."""

    group: int
    x: float  # centre of its square
    y: float
    side: float
    rotation: int  # degrees counterclockwise


@dataclass(frozen=True)
class Background:
    kind: str
    colours: tuple[str, ...]  # one or two names
    rgb: tuple[Colour, ...]
    direction: int  # degrees: 0 runs to the right, 90 downwards
    period: float  # of stripes and checks
    phase: float
    told: bool


@dataclass(frozen=True)
class Scene:
    name: tuple[int, str, int, int]  # seed, split, number, attempt: the name of its random streams
    groups: tuple[Group, ...]
    relation: tuple[int, str, int] | None  # subject group, predicate, object group; always told
    place: str | None  # told
    background: Background
    things: tuple[Thing, ...]  # in the order of the groups
    order: tuple[int, ...]  # things from the bottom to the top

    def key(self, words: Sequence[Word]) -> str:
        """What the scene means: its objects with their attributes, and the relation or place that its caption tells. Equal
        for two scenes that a caption could not tell apart but for the background, which is left out on purpose."""
        name = [
            f"{words[g.word].code} {g.size}" + (f" {g.tint}" if g.tint else "") + (f" x{g.count}" if g.count > 1 else "")
            for g in self.groups
        ]
        parts = sorted(name)
        if self.relation is not None:
            subject, predicate, target = self.relation
            if predicate in ("right of", "below"):
                subject, predicate, target = target, CONVERSE[predicate], subject
            parts.append(f"{words[self.groups[subject].word].code} {predicate} {words[self.groups[target].word].code}")
        if self.place is not None:
            parts.append(self.place)
        return ", ".join(parts)


def draw_scene(
    world: World, words: Sequence[Word], split: str, objects: tuple[int, int], number: int, attempt: int = 0
) -> Scene | None:
    """The scene of that number; None if what was drawn does not fit into a picture: then the next attempt counts."""
    name = (world.seed, split, number, attempt)
    draws = Draws(*name, "scene")
    low, high = objects
    count = low + _weighted(draws, _COUNT_WEIGHTS[low - 1 : high])
    groups = _groups(
        draws, world, words, count, subject=_turn(world.seed, split, len(words), number) if objects == (1, 1) else None
    )
    relation = place = None
    singles = [i for i, group in enumerate(groups) if group.count == 1]
    if count == 1:
        place = draws.pick(PLACES) if draws.chance(_PLACE_TOLD) else None
    elif len(singles) > 1 and (len(groups) == 2 or draws.chance(50)):
        first = draws.pick(singles)
        relation = (first, draws.pick(tuple(PREDICATES)), draws.pick([i for i in singles if i != first]))
    sprites = [sprite(world.domain, words[group.word].code, group.tint) for group in groups]
    background = _background(draws, sprites)
    things = _arrange(draws, groups, sprites, relation, place)
    return None if things is None else Scene(name, groups, relation, place, background, things, _shuffled(draws, count))


@lru_cache(maxsize=16)
def _turns(seed: int, split: str, size: int) -> list[int]:
    return np.argsort(Draws(seed, split, "turns").reals(size), kind="stable").tolist()


def _turn(seed: int, split: str, size: int, number: int) -> int:
    """In a split of single objects they take turns, so that each class is as frequent as any other."""
    return _turns(seed, split, size)[number % size]


def _weighted(draws: Draws, weights: Sequence[int]) -> int:
    """Position of one of the weights, as often as its share of their sum."""
    return bisect_left(list(accumulate(weights)), draws.whole(1, sum(weights)))


def _shuffled(draws: Draws, count: int) -> tuple[int, ...]:
    rest = list(range(count))
    return tuple(rest.pop(draws.whole(0, len(rest) - 1)) for _ in range(count))


def _groups(draws: Draws, world: World, words: Sequence[Word], count: int, subject: int | None) -> tuple[Group, ...]:
    chosen: list[list[int]] = []  # [word, count]
    for _ in range(count):
        countable = [group for group in chosen if words[group[0]].plural is not None]
        if countable and draws.chance(15):
            draws.pick(countable)[1] += 1
            continue
        word = subject if subject is not None else draws.whole(0, len(words) - 1)
        while any(word == group[0] for group in chosen):
            word = draws.whole(0, len(words) - 1)
        chosen.append([word, 1])
    groups = []
    large = 0
    for word, number in chosen:
        tints = visible_tints(world.domain, words[word].code) if words[word].tintable else ()
        tint = draws.pick(tints) if tints and draws.chance(_TINTED) else None
        size = tuple(SIZES)[_weighted(draws, _SIZE_PERCENT[count])]
        if size == "large":
            large += number
            if large > 1 and (count > 2 or number > 1):  # there is no room for two
                size = "medium"
        groups.append(Group(word, tint, size, number))
    return tuple(groups)


def _background(draws: Draws, sprites: Sequence[Sprite]) -> Background:
    """Of colours that stand out against every object: Twemoji's pictures have no outline."""
    kind = BACKGROUND_KINDS[_weighted(draws, _KIND_PERCENT)]
    contrast = {name: min(distance(rgb, s.mean) for s in sprites) for name, rgb in BACKGROUNDS.items()}
    clear = [name for name, value in contrast.items() if value >= _CONTRAST] or [max(contrast, key=contrast.__getitem__)]
    colours = [draws.pick(clear)]
    if kind != "plain":
        first = BACKGROUNDS[colours[0]]
        others = [name for name in clear if distance(BACKGROUNDS[name], first) >= _PAIR_CONTRAST]
        if others:
            colours.append(draws.pick(others))
        else:
            kind = "plain"
    rgb = tuple(tuple(min(255, max(0, value + draws.whole(-9, 9))) for value in BACKGROUNDS[name]) for name in colours)
    period, phase = draws.real(0.16, 0.36), draws.real(0, 1)
    return Background(kind, tuple(colours), rgb, draws.pick((0, 45, 90, 135)), period, phase, draws.chance(_BACKGROUND_TOLD))


def _arrange(draws: Draws, groups, sprites, relation, place) -> tuple[Thing, ...] | None:
    """Positions without much overlap, in which the told relation or place holds with room to spare; None if none was found."""
    owners = [i for i, group in enumerate(groups) for _ in range(group.count)]
    sides = [draws.real(*SIZES[groups[i].size]) for i in owners]
    turns = [draws.whole(-_MAX_ROTATION, _MAX_ROTATION) for _ in owners]
    reach = (
        np.array([sprites[i].extents(turn) for i, turn in zip(owners, turns, strict=True)]) * np.array(sides)[:, None]
    )  # [n, 4]
    before, after = reach[:, :2], reach[:, 2:]  # [n, 2] left and up, right and down of the centre
    low, high = before, 1 - after
    if place is not None:
        column, row = PLACES.index(place) % 3, PLACES.index(place) // 3
        middle = (after - before) / 2  # of the box, from the centre of the square
        zone = np.array([[(0.0, 0.38), (0.46, 0.54), (0.62, 1.0)][i] for i in (column, row)])  # [2, 2] x and y, low and high
        low, high = np.maximum(low, zone[:, 0] - middle), np.minimum(high, zone[:, 1] - middle)
        if (low > high).any():
            return None
    first, second = np.triu_indices(len(owners), 1)
    area = (before + after).prod(axis=1)  # [n]
    smaller = np.minimum(area[first], area[second])
    for _ in range(_ROUNDS):
        centres = low + (high - low) * draws.reals(_CANDIDATES, len(owners), 2)  # [K, n, 2]
        starts, ends = centres - before, centres + after
        common = np.minimum(ends[:, first], ends[:, second]) - np.maximum(starts[:, first], starts[:, second])  # [K, pairs, 2]
        good = (np.maximum(common, 0).prod(axis=2) <= _MAX_OVERLAP * smaller).all(axis=1)
        if relation is not None:
            subject, predicate, target = owners.index(relation[0]), relation[1], owners.index(relation[2])
            axis, sign = PREDICATES[predicate]
            apart = ((starts + ends)[:, target] - (starts + ends)[:, subject]) / 2  # [K, 2]
            along = apart[:, axis] * sign
            good &= (along >= 0.22) & (
                along >= 2.5 * np.abs(apart[:, 1 - axis])
            )  # stricter than `relations`, for rounding to pixels
        if good.any():
            chosen = centres[good.argmax()]
            return tuple(Thing(o, *c, s, t) for o, c, s, t in zip(owners, chosen.tolist(), sides, turns, strict=True))
    return None


def relations(boxes: Sequence[Sequence[int]], size: int) -> list[dict[str, int | str]]:
    """Every unambiguous relation between objects, from their whole boxes (x0, y0, x1, y1) in pixels: the centres lie at least
    15 % of the picture apart along the axis and at least 1.8 times as far as across it. Each one and its converse."""
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes]
    found = []
    for subject, a in enumerate(centres):
        for target, b in enumerate(centres):
            for predicate, (axis, sign) in PREDICATES.items():
                along, across = (b[axis] - a[axis]) * sign, abs(b[1 - axis] - a[1 - axis])
                if subject != target and along >= 0.15 * size and along >= 1.8 * across:
                    found.append({"subject": subject, "predicate": predicate, "object": target})
    return found
