"""What is asked about scenes, checked against their truth by other ways than it is made."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import emojiworld
from vlpfast.data.emojiworld import Split, World, questions
from vlpfast.data.shards import ShardSet
from vlpfast.types import UserError

SCENES = 400


def truths(folder: Path, world: World, scenes: int = SCENES) -> list[dict[str, Any]]:
    shards = ShardSet([emojiworld.build(folder, world, {"train": Split(scenes)}, workers=1)["train"]])
    return [json.loads(content.tobytes()) for content in shards.read(list(range(len(shards))), ("json",))]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return truths(tmp_path_factory.mktemp("questions") / "world", World())


def centre(box: list[int]) -> np.ndarray:
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def beyond(place: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether a lies on that side of b, by the middles of what is seen of both."""
    x, y = centre(a["full_box"]) - centre(b["full_box"])
    return {"to the left of": x < 0, "to the right of": x > 0, "above": y < 0, "below": y > 0}[place]


def test_every_answer_is_true(scenes: list[dict[str, Any]]) -> None:
    seen = Counter()
    for truth in scenes:
        objects = {thing["name"]: thing for thing in truth["objects"]}
        for qa in truth["qa"]:
            question, answer, kind = qa["question"], qa["answer"], qa["kind"]
            seen[kind, answer if kind == "present" else ""] += 1
            named = [name for name in objects if name in question]
            if kind == "count":
                assert answer == ["zero", "one", "two", "three", "four"][len(truth["objects"])]
            elif kind == "present":
                assert (answer == "yes") == any(
                    question == f"is there {article}{name} in the picture?" for name in objects for article in ("a ", "an ", "")
                )
            elif kind == "name":
                assert [answer] == list(objects)
            elif kind == "ground":
                assert truth["background"]["colours"] == [answer]
            elif kind == "tint":
                assert objects[max(named, key=len)]["tint"] == answer
            elif kind == "category":
                assert objects[max(named, key=len)]["category"] == answer
            elif kind == "relation":
                place = (
                    question.removeprefix("what is ").split(" the ")[0] if "above" in question or "below" in question else None
                )
                place = place or ("to the left of" if "to the left of" in question else "to the right of")
                target = question.removesuffix("?").split(f"{place} the ")[1]
                assert any(beyond(place, thing, objects[target]) for thing in truth["objects"] if thing["name"] == answer)
            else:
                assert kind == "place"
                x, y = centre(truth["objects"][0]["box"]) / truth["width"]
                assert ("left" in answer) == (x < 0.42) and ("right" in answer) == (x > 0.58), (answer, x)
                assert ("top" in answer) == (y < 0.42) and ("bottom" in answer) == (y > 0.58), (answer, y)
    assert {kind for kind, _ in seen} == set(questions.TEMPLATES) - {"caption"}
    assert 0.4 < seen["present", "yes"] / SCENES < 0.6


def test_answers_are_a_closed_list(scenes: list[dict[str, Any]]) -> None:
    known = emojiworld.answer_names(World())
    assert len(set(known)) == len(known)
    assert {qa["answer"] for truth in scenes for qa in truth["qa"]} <= set(known)


def test_heldout_instructions_are_never_seen(scenes: list[dict[str, Any]]) -> None:
    seen = [found for truth in scenes for found in truth["instructions"]]
    unseen = [found for truth in scenes for found in truth["heldout_instructions"]]
    assert questions.HELDOUT_KIND not in {found["kind"] for found in seen}
    assert questions.HELDOUT_KIND in {found["kind"] for found in unseen}
    kinds = {(found["kind"], found["template"]) for found in seen}
    assert len({kind for kind, _ in kinds}) == len(questions.TEMPLATES) - 1
    assert not kinds & {(found["kind"], found["template"]) for found in unseen}
    assert {found["instruction"] for found in seen}.isdisjoint(found["instruction"] for found in unseen)
    for truth in scenes:
        answers = {qa["kind"]: qa["answer"] for qa in truth["qa"] if qa["kind"] != "tint"} | {"caption": truth["caption"]}
        for found in truth["instructions"] + truth["heldout_instructions"]:
            assert found["kind"] == "tint" or answers[found["kind"]] == found["answer"]


def test_the_first_of_a_list_is_of_any_kind(scenes: list[dict[str, Any]]) -> None:
    assert {truth["qa"][0]["kind"] for truth in scenes} == set(questions.TEMPLATES) - {"caption"}
    first = Counter(truth["entailment"][0]["label"] for truth in scenes)
    assert set(first) == set(questions.ENTAILMENT) and min(first.values()) > SCENES / 5


def test_entailment(scenes: list[dict[str, Any]]) -> None:
    for truth in scenes:
        names = set(truth["counts"])
        found = {one["label"]: one["statement"] for one in truth["entailment"]}
        assert set(found) == set(questions.ENTAILMENT)
        for label, statement in found.items():
            if statement.startswith("there is "):
                said = statement.removeprefix("there is ")
                shown = any(said in (name, f"a {name}", f"an {name}") for name in names)
                assert shown == (label == "entailment"), statement
            elif statement.startswith("the picture has "):
                number = ["zero", "one", "two", "three", "four"].index(statement.split()[3])
                assert (number == len(truth["objects"])) == (label == "entailment")
                assert ("objects" in statement) == (number != 1)
            elif label != "neutral":
                objects = {thing["name"]: thing for thing in truth["objects"]}
                place = next(p for p in ("to the left of", "to the right of", "above", "below") if f" is {p} the " in statement)
                subject, target = statement.removeprefix("the ").split(f" is {place} the ")
                assert beyond(place, objects[subject], objects[target]) == (label == "entailment")


def test_two_pictures(tmp_path: Path) -> None:
    world = World(pictures=2)
    shards = ShardSet([emojiworld.build(tmp_path / "pairs", world, {"train": Split(240)}, workers=1)["train"]])
    single = truths(tmp_path / "single", World(), 240)
    assert len(shards) == 120
    labels: Counter[str] = Counter()
    for number, content in enumerate(shards.read(list(range(120)), ("json",))):
        truth = json.loads(content.tobytes())
        left, right = truth["pictures"]
        assert truth["pictures"] == single[2 * number : 2 * number + 2]
        assert len(truth["statements"]) == 5
        for one in truth["statements"]:
            statement, label = one["statement"], one["label"]
            labels[label] += 1
            counts = [len(side["objects"]) for side in (left, right)]
            if "in all" in statement:
                assert (int(statement.split()[2]) == sum(counts)) == (label == "true")
            elif "more" in statement or "fewer" in statement or "as many" in statement:
                claim = counts[0] > counts[1] if "more" in statement else counts[0] < counts[1]
                claim = counts[0] == counts[1] if "as many" in statement else claim
                assert claim == (label == "true"), statement
            elif statement.startswith("one picture"):
                one_name, two_name = statement.removeprefix("one picture shows ").split(" and the other ")
                assert (shows(left, one_name) and shows(right, two_name)) == (label == "true")
            else:
                side = left if statement.startswith("the left") else right
                assert shows(side, statement.split(" shows ")[1]) == (label == "true")
    assert 0.4 < labels["true"] / sum(labels.values()) < 0.6
    members = shards.read([5], ("0.jpg",))[0], shards.read([5], ("1.jpg",))[0]
    assert [Image.open(io.BytesIO(member.tobytes())).size for member in members] == [(96, 96)] * 2
    assert not np.array_equal(*(np.frombuffer(member.tobytes(), np.uint8)[:400] for member in members)) or len(members[0]) != len(
        members[1]
    )


def shows(truth: dict[str, Any], said: str) -> bool:
    return any(said in (name, f"a {name}", f"an {name}") for name in truth["counts"])


def test_pairs_need_an_even_number_of_scenes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_scenes of the split train must be even"):
        emojiworld.build(tmp_path / "w", World(pictures=2), {"train": Split(5)}, workers=1)
    with pytest.raises(UserError, match="pictures must be a whole number from 1 to 2"):
        World(pictures=3)


def test_other_languages_are_not_asked(tmp_path: Path) -> None:
    for truth in truths(tmp_path / "de", World(language="de"), 3):
        assert truth["qa"] == truth["instructions"] == truth["heldout_instructions"] == truth["entailment"] == []
