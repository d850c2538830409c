"""What can be asked about a scene, with the true answers: questions, instructions, statements that follow or do not.

English alone: in other worlds the lists are empty. Every list is in a random order, so that its first element, which evaluation
takes, is of any kind. Answers are short, lower case unless they are names, and of the closed set that `answers` gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vlpfast.data.emojiworld.captions import _NUMBERS, _article, _where
from vlpfast.data.emojiworld.colours import BACKGROUNDS, TINTS
from vlpfast.data.emojiworld.draws import Draws
from vlpfast.data.emojiworld.scenes import CONVERSE, PLACES
from vlpfast.data.emojiworld.sprites import Word
from vlpfast.data.emojiworld.world import World

NUMBERS = {0: "zero", 1: "one", **_NUMBERS}
ENTAILMENT = ("entailment", "neutral", "contradiction")
HELDOUT_KIND = "place"  # of instructions: never among "instructions"

# kind -> ways to ask; {0} and {1} as the kind needs. The first is the question of "qa", the last of "heldout_instructions" alone.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": (
        "what is in the picture?",
        "name the object in this image.",
        "which object does the picture show? answer shortly.",
        "question: what is shown? short answer:",
        "tell me what you see in one or two words.",
    ),
    "present": (
        "is there {0} in the picture?",
        "does the image contain {0}? answer yes or no.",
        "question: can you see {0}? answer:",
        "say yes if the picture shows {0}, and no otherwise.",
        "yes or no: {0} is in this image.",
    ),
    "count": (
        "how many objects are there?",
        "count the objects in the image.",
        "question: what is the number of objects? short answer:",
        "say how many things the picture shows.",
        "give the total number of things as a word.",
    ),
    "ground": (
        "what colour is the background?",
        "name the colour behind the objects.",
        "question: which colour does the background have? short answer:",
        "say the background's colour in one word.",
        "answer with one word: the picture is painted on which colour?",
    ),
    "tint": (
        "what colour is the {0}?",
        "name the colour of the {0}.",
        "question: which colour has the {0}? short answer:",
        "say in one word how the {0} is coloured.",
        "answer with one word: the {0} was painted in which colour?",
    ),
    "relation": (
        "what is {0} the {1}?",
        "name the object {0} the {1}.",
        "question: which object is {0} the {1}? short answer:",
        "look {0} the {1} and say what is there.",
        "tell me which thing you find {0} the {1}.",
    ),
    "category": (
        "what kind of thing is the {0}?",
        "name the category of the {0}.",
        "question: to which group does the {0} belong? short answer:",
        "say in one word what sort of thing the {0} is.",
        "answer with one word: the {0} counts among which things?",
    ),
    "place": (
        "where is the {0}?",
        "name the part of the picture that holds the {0}.",
        "question: at which place is the {0}? short answer:",
        "say where in the image the {0} stands.",
        "tell me the position of the {0}.",
    ),
    "caption": (
        "describe the picture.",
        "write a short description for the image.",
        "a caption for this picture:",
        "briefly say what the image shows.",
        "give one sentence about the picture.",
    ),
}
_TOLD = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_UNTOLD = (  # what no picture shows, so that it neither follows nor is excluded
    "the {0} is very old",
    "the {0} was a present",
    "somebody has lost the {0}",
    "a child has drawn the {0}",
    "the {0} will be gone tomorrow",
    "the {0} belongs to a friend",
)


def asked(truth: dict[str, Any], draws: Draws, world: World, words: Sequence[Word]) -> dict[str, list[dict[str, Any]]]:
    """The lists "qa", "instructions", "heldout_instructions" and "entailment" of a scene's JSON (truth.py)."""
    if world.language != "en":
        return {"qa": [], "instructions": [], "heldout_instructions": [], "entailment": []}
    facts = list(_facts(truth, draws, words))
    qa = [{"question": TEMPLATES[kind][0].format(*slots), "answer": answer, "kind": kind} for kind, slots, answer in facts]
    facts.append(("caption", (), truth["caption"]))
    instructions, heldout = [], []
    for kind, slots, answer in facts:
        *seen, unseen = TEMPLATES[kind]
        if kind != HELDOUT_KIND:
            number = draws.whole(0, len(seen) - 1)
            instructions.append(_instruction(seen[number], slots, answer, kind, number))
        heldout.append(_instruction(unseen, slots, answer, kind, len(seen)))
    lists = {"qa": qa, "instructions": instructions, "heldout_instructions": heldout}
    return {name: _mixed(draws, found) for name, found in {**lists, "entailment": _entailment(truth, draws, words)}.items()}


def answers(world: World, words: Sequence[Word]) -> list[str]:
    """Every answer that a "qa" of this world can have, each once, in a fixed order."""
    categories = sorted({word.category for word in words if word.category})
    closed = ["yes", "no", *NUMBERS.values(), *BACKGROUNDS, *TINTS, *(_where(place) for place in PLACES), *categories]
    return list(dict.fromkeys([*closed, *(word.name for word in words)]))


def compared(truths: Sequence[dict[str, Any]], draws: Draws, words: Sequence[Word]) -> list[dict[str, Any]]:
    """Statements about two pictures, the left one first, each true or false with equal chances: [{statement, label}]."""
    left, right = truths
    names = [sorted(truth["counts"]) for truth in truths]
    absent = [word.name for word in words if word.name not in left["counts"] and word.name not in right["counts"]]
    found = []

    def state(true: str, false: str) -> None:
        right_one = draws.chance(50)
        found.append({"statement": true if right_one else false, "label": str(right_one).lower()})

    for side, own, other in (("left", names[0], names[1]), ("right", names[1], names[0])):
        shown, wrong = draws.pick(own), [name for name in other if name not in own] or absent
        state(f"the {side} picture shows {_a(shown)}", f"the {side} picture shows {_a(draws.pick(wrong))}")
    one, two = draws.pick(names[0]), draws.pick(names[1])
    state(
        f"one picture shows {_a(one)} and the other {_a(two)}",
        f"one picture shows {_a(draws.pick(absent))} and the other {_a(two)}",
    )
    counts = [len(truth["objects"]) for truth in truths]
    more = "the left picture has more objects than the right one"
    fewer = "the left picture has fewer objects than the right one"
    as_many = "both pictures have as many objects"
    true = as_many if counts[0] == counts[1] else more if counts[0] > counts[1] else fewer
    state(true, draws.pick([claim for claim in (more, fewer, as_many) if claim != true]))
    total = sum(counts)
    state(f"there are {total} objects in all", f"there are {total + draws.pick((-1, 1))} objects in all")
    return _mixed(draws, found)


def _instruction(template: str, slots: Sequence[str], answer: str, kind: str, number: int) -> dict[str, Any]:
    return {"instruction": template.format(*slots), "answer": answer, "kind": kind, "template": number}


def _mixed(draws: Draws, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rest = list(found)
    return [rest.pop(draws.whole(0, len(rest) - 1)) for _ in range(len(rest))]


def _a(name: str) -> str:
    return name if name[0].isupper() else f"{_article(name)} {name}"


def _facts(truth: dict[str, Any], draws: Draws, words: Sequence[Word]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """kind, what its templates are filled with, answer."""
    objects, counts = truth["objects"], truth["counts"]
    alone = [thing for thing in objects if counts[thing["name"]] == 1]  # "the dog" means one of them
    if len(objects) == 1:
        yield "name", (), objects[0]["name"]
    if draws.chance(50):
        yield "present", (_a(draws.pick(sorted(counts))),), "yes"
    else:
        yield "present", (_a(draws.pick([word.name for word in words if word.name not in counts])),), "no"
    yield "count", (), NUMBERS[len(objects)]
    if truth["background"]["kind"] == "plain":
        yield "ground", (), truth["background"]["colours"][0]
    for thing in alone:
        if thing["tint"] is not None:
            yield "tint", (thing["name"],), thing["tint"]
    if alone and (thing := draws.pick(alone))["category"]:
        yield "category", (thing["name"],), thing["category"]
    if truth["place"] is not None:
        yield "place", (objects[0]["name"],), _where(truth["place"])
    # "What is left of the cat" has one answer only where one object is.
    told: dict[tuple[str, int], list[int]] = {}
    for relation in truth["relations"]:
        told.setdefault((relation["predicate"], relation["object"]), []).append(relation["subject"])
    sure = [(predicate, target, found[0]) for (predicate, target), found in told.items() if len(found) == 1]
    single = {thing["id"] for thing in alone}
    sure = [(predicate, target, subject) for predicate, target, subject in sure if target in single]
    if sure:
        predicate, target, subject = draws.pick(sure)
        yield "relation", (_TOLD[predicate], objects[target]["name"]), objects[subject]["name"]


def _entailment(truth: dict[str, Any], draws: Draws, words: Sequence[Word]) -> list[dict[str, Any]]:
    """One statement of each label: [{statement, label}]."""
    objects, counts = truth["objects"], truth["counts"]
    shown = draws.pick(sorted(counts))
    other = draws.pick([word.name for word in words if word.name not in counts])
    wrong = (len(objects) % max(NUMBERS)) + 1
    follows = [f"there is {_a(shown)}", f"the picture has {NUMBERS[len(objects)]} {_things(len(objects))}"]
    excluded = [f"there is {_a(other)}", f"the picture has {NUMBERS[wrong]} {_things(wrong)}"]
    alone = {thing["id"] for thing in objects if counts[thing["name"]] == 1}
    told = [relation for relation in truth["relations"] if {relation["subject"], relation["object"]} <= alone]
    if told:
        relation = draws.pick(told)
        subject, target = (objects[relation[role]]["name"] for role in ("subject", "object"))
        follows.append(f"the {subject} is {_TOLD[relation['predicate']]} the {target}")
        excluded.append(f"the {subject} is {_TOLD[CONVERSE[relation['predicate']]]} the {target}")
    statements = (draws.pick(follows), draws.pick(_UNTOLD).format(shown), draws.pick(excluded))
    return [{"statement": statement, "label": label} for statement, label in zip(statements, ENTAILMENT, strict=True)]


def _things(count: int) -> str:
    return "object" if count == 1 else "objects"
