"""The JSON of a scene: everything that is true about its picture.

format       see FORMAT
key, split, number      which scene it is
width, height           pixels
domain, language
background   {kind, colours: one or two names, direction: degrees (0 to the right, 90 down),
             told: whether the caption names it}
objects      [{id, code, name, category (null outside the written vocabulary), tint (null: its own colours),
             size: small | medium | large, rotation: degrees counterclockwise, z: 0 at the bottom,
             box: x0 y0 x1 y1 of what is visible in pixels (x1, y1 exclusive), full_box: of the whole object,
             mask: what is visible, COCO run lengths (see rle.py), visibility: visible share of its pixels,
             names: language -> name (only with World.translations)}]
             A pixel is an object's where its alpha is at least one half and no object above it covers it that much.
relations    [{subject, predicate: left of | right of | above | below, object}] by ids: every unambiguous one, see
             scenes.relations
counts       {name: number of such objects}
place        top left | top | ... | middle | ... | bottom right of a single object, null if the caption does not tell
label, group name and category of the scene's first object (of a single object: its own), for classes and groups
scene        the canonical meaning that no other split shares, see Scene.key
caption, phrases: [{start, end, objects: ids}]   caption[start:end] names these objects
variants     [{caption, phrases}] other ways to say the same
qa           [{question, answer, kind}], see questions.py
instructions, heldout_instructions   [{instruction, answer, kind, template}]: the same asked in several ways, and what it says;
             the held-out ones in a way, and of a kind, that the others never have
entailment   [{statement, label: entailment | neutral | contradiction}], one of each

A sample of two pictures (World.pictures) has them as 0.jpg and 1.jpg, and in its JSON
format, key, split, number, domain, language
pictures     [truth of the left one, truth of the right one]
statements   [{statement, label: true | false}] about both
caption      the captions of both
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlpfast.data.emojiworld import rle
from vlpfast.data.emojiworld.captions import captions
from vlpfast.data.emojiworld.draws import Draws
from vlpfast.data.emojiworld.questions import asked, compared
from vlpfast.data.emojiworld.render import Outline, render
from vlpfast.data.emojiworld.scenes import Scene, relations
from vlpfast.data.emojiworld.sprites import Word
from vlpfast.data.emojiworld.world import World

FORMAT = 4  # counts up with every change of what the same options give


def sample_key(split: str, number: int) -> str:
    return f"{split}-{number:08d}"


def picture_and_truth(scene: Scene, world: World, words: Sequence[Word]) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture [H, W, 3] uint8 and its JSON."""
    picture, outlines = render(scene, world, words)
    _, split, number, _ = scene.name
    objects = [_object(i, scene, world, words, outline) for i, outline in enumerate(outlines)]
    first, *others = captions(scene, world, words)
    subject = words[scene.groups[0].word]
    background = scene.background
    truth = {
        "format": FORMAT,
        "key": sample_key(split, number),
        "split": split,
        "number": number,
        "width": world.size,
        "height": world.size,
        "domain": world.domain,
        "language": world.language,
        "background": {
            "kind": background.kind,
            "colours": list(background.colours),
            "direction": background.direction,
            "told": background.told and world.language == "en",
        },
        "objects": objects,
        "relations": relations([outline.full_box for outline in outlines], world.size),
        "counts": dict(Counter(thing["name"] for thing in objects)),
        "place": scene.place,
        "label": subject.name,
        "group": subject.category,
        "scene": scene.key(words),
        **first.json(),
        "variants": [other.json() for other in others],
    }
    return picture, truth | asked(truth, Draws(*scene.name, "questions"), world, words)


def joint_truth(truths: Sequence[dict[str, Any]], number: int, world: World, words: Sequence[Word]) -> dict[str, Any]:
    """The JSON of a sample of two pictures, number `number` of its split."""
    split = truths[0]["split"]
    return {
        "format": FORMAT,
        "key": sample_key(split, number),
        "split": split,
        "number": number,
        "domain": world.domain,
        "language": world.language,
        "pictures": list(truths),
        "statements": compared(truths, Draws(world.seed, split, number, "statements"), words) if world.language == "en" else [],
        "caption": "; ".join(truth["caption"] for truth in truths),
    }


def _object(i: int, scene: Scene, world: World, words: Sequence[Word], outline: Outline) -> dict[str, Any]:
    thing = scene.things[i]
    group = scene.groups[thing.group]
    word = words[group.word]
    truth = {
        "id": i,
        "code": word.code,
        "name": word.name,
        "category": word.category,
        "tint": group.tint,
        "size": group.size,
        "rotation": thing.rotation,
        "z": scene.order.index(i),
        "box": list(outline.box),
        "full_box": list(outline.full_box),
        "mask": rle.encode(outline.visible),
        "visibility": round(outline.visibility, 4),
    }
    if world.translations:
        truth["names"] = word.names
    return truth
