"""Several sources, and positions that pass over to another number of ranks or another batch size."""

import io
import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.cli import assemble, tokenizers
from vlpfast.data import ShardWriter, make_loader, train_tokenizer
from vlpfast.data import position as positions
from vlpfast.data.mixture import Mixture
from vlpfast.data.order import Remainder, epoch_order, gaps
from vlpfast.data.position import merge_positions
from vlpfast.training.config import Stage
from vlpfast.training.parallel import World
from vlpfast.types import DataSpec, ImageSpec, TextSpec, UserError

TEXT = DataSpec(None, TextSpec(4))


class Lengths:
    """A tokenizer of one id: how long the caption is."""

    vocab_size, pad_id, bos_id, eos_id = 1000, 0, 1, 2

    def encode(self, texts, context_length):
        ids = torch.tensor([[len(text)] + [0] * (context_length - 1) for text in texts])
        return ids, ids > 0


def write(folder, count, per_shard, bad=(), prefix="s", key="k"):
    with ShardWriter(folder, prefix, samples_per_shard=per_shard) as writer:
        for i in range(count):
            writer.write(f"{key}{i:04d}", {"txt": b"\xff" if i in bad else b"caption"})
    return f"{folder}/{prefix}-*.tar"


def ranks(patterns, world_size, batch_size, *, train=True, **options):
    make = [
        make_loader(patterns, TEXT, Lengths(), batch_size, train=train, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return make


def saved(loaders):
    return json.loads(json.dumps([loader.state_dict() for loader in loaders]))


def steps(loaders, count):
    """The batches of each step of all ranks, and the epoch that each batch is of."""
    iterators = [iter(loader) for loader in loaders]
    return [
        [(next(iterator), loader.state_dict()["epoch"]) for iterator, loader in zip(iterators, loaders, strict=True)]
        for _ in range(count)
    ]


# --- sources ---------------------------------------------------------------------------------------------------------


def mixture(sizes, weights=None):
    return Mixture([f"s{i}" for i in range(len(sizes))], [np.array(of) for of in sizes], weights)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 4.0], [0.1, 0.1, 0.8], [5.0, 1.0, 0.3]])
def test_an_epoch_has_the_shares_to_the_sample(weights):
    sources = mixture([[7, 5], [3], [20, 20, 5]], weights)
    for total in (60, 17, 100):
        quotas = sources.quotas(total)
        exact = np.array(weights or sources.sizes) * total / np.sum(weights or sources.sizes)
        assert sum(quotas) == total and np.abs(quotas - exact).max() < 1
        kept = np.argsort(np.floor(exact) - exact, kind="stable")[: total - int(np.floor(exact).sum())]
        assert quotas == [int(share) + (s in kept) for s, share in enumerate(np.floor(exact))]
    for epoch in range(4):
        order = sources.epoch_order(3, epoch, 2)
        assert len(order) == len(set(order.tolist())) == 60
        assert np.bincount(sources.source_of(order % 60), minlength=3).tolist() == sources.quotas(60)
    if weights is None:
        assert sorted(order.tolist()) == list(range(60))


@pytest.mark.parametrize("weights", [[1.0, 2.0, 4.0], [5.0, 1.0, 0.3]])
def test_every_sample_of_a_source_comes_before_one_comes_again(weights):
    sources = mixture([[7, 5], [3], [20, 20, 5]], weights)
    epochs = [sources.epoch_order(3, epoch, 2) for epoch in range(9)]
    for source, size in enumerate(sources.sizes):
        stream = np.concatenate([order[sources.source_of(order % 60) == source] for order in epochs])
        starts = np.cumsum([0, *sources.sizes])[source]
        passes = [(stream[at : at + size] % 60).tolist() for at in range(0, len(stream), size)]
        for one in passes[:-1]:
            assert sorted(one) == list(range(starts, starts + size))
        assert len(passes) < 3 or size < 4 or len({tuple(one) for one in passes[:-1]}) == len(passes) - 1
        repeats = [order[sources.source_of(order % 60) == source] // 60 for order in epochs]
        assert all(of[0] == 0 and (np.diff(of) >= 0).all() for of in repeats)  # passes, counted from the epoch's first


def test_sources_of_one_shape_are_not_permuted_alike_and_are_spread_over_the_epoch():
    sources = mixture([[50], [50]])
    order = sources.epoch_order(0, 0, 4)
    first, second = (order[sources.source_of(order) == source] for source in (0, 1))
    assert not np.array_equal(first, second - 50)
    counts = [(sources.source_of(order[at : at + 25]) == 0).sum() for at in range(0, 100, 25)]
    assert all(4 <= count <= 21 for count in counts)
    for other in (sources.epoch_order(1, 0, 4), sources.epoch_order(0, 1, 4)):
        assert not np.array_equal(order, other)
    assert np.array_equal(order, mixture([[50], [50]]).epoch_order(0, 0, 4))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {
        "big": write(folder / "big", 60, 20, key="b"),
        "small": write(folder / "small", 9, 5, key="s"),
        "other": write(folder / "other", 15, 4, key="o"),
    }


def test_batches_say_their_source(sources):
    options = {"weights": {"big": 1, "small": 2, "other": 1}, "seed": 4}
    (loader,) = ranks(sources, 1, 7, **options)
    assert loader.sources == ["big", "small", "other"] and len(loader) == 12
    batches = [batch for step in steps([loader], 24) for batch, _ in step]
    for epoch in (batches[:12], batches[12:]):
        for batch in epoch:
            assert batch["source"].dtype == torch.int64 and batch["source"].device.type == "cpu"
            assert [key[0] for key in batch["key"]] == ["bso"[source] for source in batch["source"]]
        assert torch.cat([batch["source"] for batch in epoch]).bincount().tolist() == [21, 42, 21]
    assert "source" not in next(iter(ranks(sources["big"], 1, 7)[0]))
    in_order = list(ranks(sources, 1, 50, train=False)[0])
    assert torch.cat([batch["index"] for batch in in_order]).tolist() == list(range(84))
    assert torch.cat([batch["source"] for batch in in_order]).tolist() == [0] * 60 + [1] * 9 + [2] * 15


def test_a_sample_that_repeats_within_an_epoch_is_drawn_anew(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (60, 60)).save(picture, "PNG")
    for name, count in (("a", 3), ("b", 12)):
        with ShardWriter(tmp_path, name) as writer:
            for i in range(count):
                writer.write(f"{name}{i}", {"png": picture.getvalue(), "txt": b"\xff" if (name, i) == ("a", 1) else b"x"})
    spec = DataSpec(ImageSpec(size=8, scale=[0.2, 1.0]), TextSpec(4))
    patterns = {name: f"{tmp_path}/{name}-*.tar" for name in "ab"}
    loader = make_loader(patterns, spec, Lengths(), 10, train=True, backend="plain", weights={"a": 4, "b": 1})
    batch = next(iter(loader))
    crops = Counter((key, tuple(crop.tolist())) for key, crop in zip(batch["key"], batch["crop"], strict=True))
    assert Counter(batch["key"])["a0"] >= 3 and max(crops.values()) == 1
    assert list(loader.skipped) == ["a-000000.tar:a1"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_pure_batches_are_of_one_source_over_all_ranks(sources, world_size):
    loaders = ranks(sources, world_size, 6 // world_size, pure_batches=True, seed=2)
    assert {len(loader) for loader in loaders} == {14}
    seen = steps(loaders, 28)
    scheduled = [{int(source) for batch, _ in step for source in batch["source"]} for step in seen]
    assert all(len(of) == 1 for of in scheduled)
    for epoch in (0, 1):
        assert {number for step in seen[14 * epoch : 14 * epoch + 14] for _, number in step} == {epoch}
        assert np.bincount([min(of) for of in scheduled[14 * epoch : 14 * epoch + 14]]).tolist() == [10, 2, 2]
    assert scheduled[:14] != scheduled[14:]
    taken = [key for step in seen for batch, _ in step for key in batch["key"] if key[0] == "b"]
    assert sorted(taken) == sorted([f"b{i:04d}" for i in range(60)] * 2)  # two passes, nothing dropped


def test_pure_batches_replace_damage_from_the_same_source(tmp_path):
    patterns = {"a": write(tmp_path / "a", 40, 9, {1, 5, *range(20, 30)}), "b": write(tmp_path / "b", 20, 20, {3})}
    loaders = ranks(patterns, 2, 3, pure_batches=True, window=1)
    seen = steps(loaders, 60)
    for step in seen:
        assert len({int(source) for batch, _ in step for source in batch["source"]}) == 1
        assert len({epoch for _, epoch in step}) == 1
    counts = Counter(int(index) for step in seen for batch, _ in step for index in batch["index"])
    assert set(range(60)) - counts.keys() == {1, 5, *range(20, 30), 43}
    with pytest.raises(UserError, match=r"too few samples can be used: \d+ of this rank's \d+ are damaged.*not UTF-8"):
        patterns = {"a": write(tmp_path / "c", 9, 9, range(9)), "b": patterns["b"]}
        steps(ranks(patterns, 1, 3, pure_batches=True), 10)


def test_wrong_mixtures_are_refused(sources, tmp_path):
    def refused(message, patterns=sources, kind=UserError, **options):
        with pytest.raises(kind, match=message):
            ranks(patterns, 1, 4, **options)

    refused("weight of an unknown source 'smal'; did you mean 'small'", weights={"big": 1, "smal": 1, "other": 1})
    refused("unknown source 'x'; the sources are big, small, other", weights={"x": 1})
    refused("source other has no weight", weights={"big": 1, "small": 1})
    for weight in (0, -1.0, float("nan"), float("inf")):
        refused("source small: expected a weight above 0", weights={"big": 1, "small": weight, "other": 1})
    refused("source small gets none of the 84 samples", weights={"big": 1, "small": 1e-6, "other": 1})
    refused("source small gets none of the 21 pure batches", weights={"big": 1, "small": 1e-2, "other": 1}, pure_batches=True)
    refused("source none: no shards: .*nowhere.tar matches no file", {**sources, "none": "nowhere.tar"})
    refused("in two sources, big and again", {**sources, "again": sources["big"]})
    refused("the mixture is empty", {})
    refused("need sources", sources["big"], ValueError, pure_batches=True)
    refused("need sources", sources["big"], ValueError, weights={"big": 1})
    refused("for training", train=False, kind=ValueError, weights={"big": 1})
    with ShardWriter(tmp_path, "pictures") as writer:
        for i in range(20):
            writer.write(str(i), {"png": b"", "cls": b"3"})
    pictures = {**sources, "pictures": str(tmp_path)}
    refused(
        r"source pictures: its first 8 samples have nothing to make 'text' from \(a member txt, json\).* has cls, png", pictures
    )
    with pytest.raises(
        UserError, match=r"source big: its first 8 samples have nothing to make 'image' from \(a member jpg, .* has txt"
    ):
        make_loader(pictures, replace(TEXT, image=ImageSpec(size=8)), Lengths(), 4, train=True, backend="plain")
    (tmp_path / "empty").mkdir()
    with ShardWriter(tmp_path / "empty", "x") as writer:
        writer.write("k", {"txt": b""})
    hollow = tmp_path / "empty" / "x-000000.tar"
    hollow.write_bytes(bytes(10240))
    refused("x-000000.tar holds no samples", {**sources, "hollow": str(hollow)})


def test_there_may_be_fewer_shards_than_ranks(tmp_path):
    loaders = ranks(write(tmp_path, 20, 20), 5, 2)
    taken = [int(index) for step in steps(loaders, 2) for batch, _ in step for index in batch["index"]]
    assert sorted(taken) == list(range(20))


# --- positions -------------------------------------------------------------------------------------------------------

SEEDS = range(max(3, int(os.environ.get("VLPFAST_FUZZ", 0)) // 100))
PATTERNS = ("none", "few", "one shard", "many")


def damage(chance, pattern, count):
    return {
        "none": set(),
        "few": set(chance.sample(range(count), count // 12)),
        "one shard": set(range(count // 3, count // 3 + count // 5)),  # makes some ranks much faster than others
        "many": set(chance.sample(range(count), count // 3)),
    }[pattern]


@pytest.mark.parametrize("weights", [None, {"a": 3, "b": 1}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_sample_comes_once_whatever_the_number_of_ranks(tmp_path, pattern, weights):
    """Runs whose number of ranks and batch size change again and again, often several times in an epoch."""
    finished, spread = zip(*(one_run(tmp_path / str(seed), seed, pattern, weights) for seed in SEEDS), strict=True)
    assert sum(finished) >= len(finished)
    assert max(spread) > 0 or pattern != "many"  # ranks in different epochs were among them


def one_run(tmp_path, seed, pattern, weights):
    """-> epochs finished, and how many epochs ranks were apart at most."""
    chance = random.Random(f"{seed} {pattern} {weights}")
    bad = damage(chance, pattern, 90)
    patterns = write(tmp_path / "a", 90, 11, bad, key="a")
    if weights:
        patterns = {"a": patterns, "b": write(tmp_path / "b", 37, 11, {3, 20}, key="b")}
        bad |= {93, 110}
    window = 1 if pattern == "one shard" else 4
    handed_out: dict[int, Counter] = {}
    states, checked, spread = None, 0, 0
    world_size = largest = 0
    for _ in range(14):
        before, world_size = world_size, chance.randint(1, 7)
        batch_size = chance.randint(1, min(6, 18 // world_size))  # so few that the damage of a share never takes a whole epoch
        # As many ranks as before keep to what some of them left out of an epoch's last batch when batches were larger.
        largest = max(largest, batch_size) if world_size == before else batch_size
        loaders = ranks(patterns, world_size, batch_size, seed=seed, window=window, weights=weights)
        if states is not None:
            for loader in loaders:
                loader.load_state_dict(states)
        for step in steps(loaders, chance.choice([0, 1, 2, 3, 90 // (world_size * batch_size)])):
            for batch, epoch in step:
                handed_out.setdefault(epoch, Counter()).update(batch["index"].tolist())
        states = saved(loaders)
        epochs = [state["epoch"] for state in states]
        spread = max(spread, max(epochs) - min(epochs))
        for epoch in range(checked, min(epochs)):
            expected = epoch_indices(seed, epoch, window, weights)
            expected = Counter({index: count for index, count in expected.items() if index not in bad})
            assert not handed_out[epoch] - expected  # none twice, no damaged one
            assert (expected - handed_out[epoch]).total() < world_size * largest
        checked = min(epochs)
    assert all("not UTF-8" in reason for reason in loaders[0].skipped.values())
    return checked, spread


def epoch_indices(seed, epoch, window, weights):
    if weights is None:
        return Counter(range(90))
    sources = mixture([[11] * 8 + [2], [11] * 3 + [4]], [weights["a"], weights["b"]])
    return Counter((sources.epoch_order(seed, epoch, window) % 127).tolist())


@pytest.mark.parametrize("seed", range(len(SEEDS) + 1))
def test_pure_batches_lose_and_repeat_nothing_whatever_the_number_of_ranks(tmp_path, seed):
    chance = random.Random(seed)
    bad = damage(chance, PATTERNS[seed % 4], 70)
    patterns = {"a": write(tmp_path / "a", 70, 11, bad), "b": write(tmp_path / "b", 41, 7, {3})}
    bad.add(73)
    sources = mixture([[11] * 6 + [4], [7] * 5 + [6]])
    handed_out, states = Counter(), None
    for _ in range(12):
        world_size, batch_size = chance.randint(1, 7), chance.randint(1, 4)
        loaders = ranks(patterns, world_size, batch_size, seed=seed, window=2, pure_batches=True)
        for loader in loaders:
            if states is not None:
                loader.load_state_dict(states)
        for step in steps(loaders, chance.choice([0, 1, 5, 9])):
            assert len({int(source) for batch, _ in step for source in batch["source"]}) == 1
            for batch, _ in step:
                handed_out.update(batch["index"].tolist())
        states = saved(loaders)
    # Up to the gaps that damage leaves between the ranks, every source is handed out from its beginning, pass after pass.
    expected = Counter()
    for source, start, deals in merge_positions(states)["remainders"]:
        entries, start = gaps(Remainder(start, deals))
        behind = np.setdiff1d(np.arange(start), entries)
        expected.update((sources.tickets(source, behind, seed, 2) % 111).tolist())
    assert handed_out == Counter({index: count for index, count in expected.items() if index not in bad})
    assert seed > 3 or min(handed_out.values()) >= 2  # passes


@pytest.mark.parametrize("seed", range(len(SEEDS) + 1))
def test_an_evaluation_pass_goes_on_with_other_ranks(tmp_path, seed):
    chance = random.Random(seed)
    bad = damage(chance, PATTERNS[seed % 4], 61)
    patterns, seen, states = write(tmp_path, 61, 9, bad), Counter(), None
    for turn in range(5):
        world_size, batch_size = chance.randint(1, 7), chance.randint(1, 4)
        loaders = ranks(patterns, world_size, batch_size, train=False)
        for rank, loader in enumerate(loaders):
            if states is not None:
                loader.load_state_dict(states)
            count = 10**6 if turn == 4 else chance.choice([0, 1, 2])
            assert loader.state_dict()["rank"] == rank
            for _, batch in zip(range(count), loader, strict=False):
                seen.update(batch["index"].tolist())
        states = saved(loaders)
    assert seen == Counter(set(range(61)) - bad)
    again = [index for loader in loaders for batch in loader for index in batch["index"].tolist()]
    assert sorted(again) == sorted(seen)  # the next pass is a whole one


def test_what_a_rank_left_out_of_its_last_batch_comes_back_if_others_have_not_finished(tmp_path):
    sizes = np.array([10, 10])
    order = epoch_order(sizes, 0, 0, 16).tolist()
    bad = {order[0::2][place] for place in (1, 3, 5, 9)}  # of rank 0, which has one batch in this epoch and rank 1 two
    patterns = write(tmp_path, 20, 10, bad)
    loaders = ranks(patterns, 2, 4)
    seen = steps(loaders, 2)
    assert [[epoch for _, epoch in step] for step in seen] == [[0, 0], [1, 0]]
    handed_out = {int(index) for step in seen for batch, epoch in step if epoch == 0 for index in batch["index"]}
    (one,) = ranks(patterns, 1, 4)
    one.load_state_dict(saved(loaders))
    (((batch, epoch),),) = steps([one], 1)
    assert epoch == 0 and batch["index"].tolist() == [index for index in order if index not in handed_out | bad]
    others = [int(index) for step in steps([one], 2) for batch, _ in step for index in batch["index"]]
    of_rank_0 = seen[1][0][0]["index"].tolist()  # of epoch 1, whose rest comes now
    assert others == [i for i in epoch_order(sizes, 0, 1, 16).tolist() if i not in {*of_rank_0, *bad}][:8]
    assert saved([one])[0]["remainders"] != []
    steps([one], 2)
    state = one.state_dict()
    assert (state["epoch"], state["remainders"]) == (2, [])  # what is behind is forgotten


def test_with_as_many_ranks_each_goes_on_where_it_stood(tmp_path):
    """A list of states and one's own give the same, batch for batch and state for state, as going on without a break."""
    patterns = write(tmp_path, 80, 9, {1, 2, 3, 4, 5, 40})
    whole = ranks(patterns, 3, 4, seed=1, window=1)
    expected = [[batch["key"] for batch, _ in step] for step in steps(whole, 15)]
    first = ranks(patterns, 3, 4, seed=1, window=1)
    assert [[batch["key"] for batch, _ in step] for step in steps(first, 7)] == expected[:7]
    states = saved(first)
    for of in (lambda rank: states, lambda rank: states[rank]):
        again = ranks(patterns, 3, 4, seed=1, window=1)
        for rank, loader in enumerate(again):
            loader.load_state_dict(of(rank))
        assert saved(again) == states
        assert [[batch["key"] for batch, _ in step] for step in steps(again, 8)] == expected[7:]
        assert saved(again) == saved(whole)


def test_the_merged_state_is_the_same_for_every_number_of_ranks_and_plain(tmp_path):
    patterns = write(tmp_path, 80, 9, set(range(9, 27)))
    loaders = ranks(patterns, 4, 3, window=1)
    steps(loaders, 11)
    merged = merge_positions(saved(loaders))
    assert merged == json.loads(json.dumps(merged))
    assert merged["world_size"] is None and len(merged["skipped"]) == len(
        {name for state in saved(loaders) for name in state["skipped"]}
    )
    (one,) = ranks(patterns, 1, 3, window=1)
    one.load_state_dict(merged)
    (other,) = ranks(patterns, 1, 3, window=1)
    other.load_state_dict(saved(loaders))
    assert saved([one]) == saved([other])
    for a, b in zip(steps([one], 30), steps([other], 30), strict=True):
        assert a[0][0]["key"] == b[0][0]["key"]


def test_states_that_do_not_belong_together_are_refused(tmp_path, sources):
    patterns = write(tmp_path, 80, 9)
    states = saved(ranks(patterns, 3, 4))
    (one,) = ranks(patterns, 1, 4)
    with pytest.raises(ValueError, match=r"ranks 0 .. 1 in their order, got that of rank 0 of 3 at place 0"):
        one.load_state_dict(states[:2])
    with pytest.raises(ValueError, match=r"got that of rank 1 of 3 at place 0"):
        one.load_state_dict([states[1], states[0], states[2]])
    with pytest.raises(ValueError, match="rank 2 has seed 7, rank 0 has 0"):
        one.load_state_dict([*states[:2], {**states[2], "seed": 7}])
    with pytest.raises(UserError, match="world_size 3, this run has 1"):
        one.load_state_dict(states[0])
    with pytest.raises(UserError, match="rank 1, this run has 0"):
        ranks(patterns, 3, 4)[0].load_state_dict(states[1])
    pure = ranks(sources, 2, 2, pure_batches=True)
    next(iter(pure[0]))
    with pytest.raises(UserError, match="not of the same step"):
        ranks(sources, 1, 2, pure_batches=True)[0].load_state_dict(saved(pure))
    weights = {"big": 1, "small": 2, "other": 3}
    state = saved(ranks(sources, 1, 2))
    with pytest.raises(UserError, match=r"weights None, this run has \[1.0, 2.0, 3.0\]"):
        ranks(sources, 1, 2, weights=weights)[0].load_state_dict(state)
    with pytest.raises(UserError, match="pure_batches False"):
        ranks(sources, 1, 2, pure_batches=True)[0].load_state_dict(state)
    renamed = {name.upper(): patterns for name, patterns in sources.items()}
    with pytest.raises(UserError, match=r"sources .*'small'.*'SMALL'"):
        ranks(renamed, 1, 2)[0].load_state_dict(state)


def test_ranks_that_are_very_far_apart(tmp_path, monkeypatch):
    """What no position remembers any more counts as handed out: nothing comes twice, and the rest is not lost."""
    monkeypatch.setattr(positions, "_KEPT_ENDS", 1)
    bad = set(range(30, 54))
    patterns = write(tmp_path, 60, 6, bad)
    loaders, handed_out = ranks(patterns, 5, 2, window=1), {}
    for step in steps(loaders, 60):
        for batch, epoch in step:
            handed_out.setdefault(epoch, Counter()).update(batch["index"].tolist())
    epochs = [loader.state_dict()["epoch"] for loader in loaders]
    assert max(epochs) - min(epochs) > 1
    (one,) = ranks(patterns, 1, 2, window=1)
    one.load_state_dict(saved(loaders))
    for ((batch, epoch),) in steps([one], 200):
        handed_out.setdefault(epoch, Counter()).update(batch["index"].tolist())
    for epoch in range(min(epochs), max(epochs) + 1):
        assert max(handed_out[epoch].values()) == 1
        assert handed_out[epoch].total() >= 36 - 5 * 1 - 1


# --- the configuration -------------------------------------------------------------------------------------------------


CLIP = str(Path(__file__).parents[2] / "configs" / "clip.yaml")


def config_of(sources, *overrides):
    mixed = [f"data.mixture.{name}.shards=['{pattern}']" for name, pattern in sources.items()]
    return assemble.load_config(CLIP, ["data.source=shards", *mixed, *overrides])


def test_a_mixture_is_opened_as_configured(sources):
    weights = [f"data.mixture.{name}.weight={weight}" for name, weight in {"big": 1, "small": 2, "other": 1}.items()]
    config = config_of(sources, *weights, "train.batch_size=21", "stages.two.data.pure_batches=true")
    config = replace(config, model=replace(config.model, config=replace(config.model.config, data=TEXT)))
    found = assemble.prepare_data(config)
    assert found.train == {name: [pattern] for name, pattern in sources.items()}
    byte_level = train_tokenizer([], 259)
    assert list(tokenizers.texts_said(config, "", byte_level, found.train)) == ["caption"] * 84
    for world_size, name, pure in ((1, "one", False), (3, "one", False), (3, "two", True)):
        stage = config.stages.get(name, Stage())
        worlds = [World(rank, world_size) for rank in range(world_size)]
        loaders = [assemble.open_loader(config, found, Lengths(), world, name, stage) for world in worlds]
        seen = steps(loaders, 4)
        assert {len(batch["key"]) for step in seen for batch, _ in step} == {21 // world_size}
        shares = [torch.cat([batch["source"] for batch, _ in step]).bincount(minlength=3) for step in seen]
        assert sum(shares).tolist() == [21, 42, 21]
        assert all((of > 0).sum() == 1 for of in shares) == pure
    with pytest.raises(UserError, match=r"train.batch_size: expected a multiple of the 2 ranks, got 21"):
        assemble.open_loader(config, found, Lengths(), World(0, 2), "one", Stage())


def test_configurations_that_make_no_sense_are_refused(sources):
    def refused(message, *overrides, of=sources):
        with pytest.raises(UserError, match=message):
            assemble.prepare_data(config_of(of, *overrides))

    refused(r"data.mixture.small.weight: expected a number above 0, got 0", "data.mixture.small.weight=0")
    refused(r"data.mixture.small.weight: expected a number above 0, got -1", "data.mixture.small.weight=-1")
    refused(r"data.mixture.big.weight: expected a weight for every source or for none", "data.mixture.small.weight=1")
    refused(r"data.mixture.smal.shards: expected .* got none; did you mean 'small'", "data.mixture.smal.weight=2")
    refused(r"data.mixture.x.shards: expected patterns of tar files, got none$", "stages.two.data.mixture.x.weight=2")
    refused("data.train and data.mixture: expected one of them, got both", "data.train=[x.tar]")
    refused("data.pure_batches: .* needs? data.mixture", "data.train=[x.tar]", "data.pure_batches=true", of={})
    refused("set data.source=shards", "data.source=emojiworld")
    refused("unknown key .*wieght", "data.mixture.small.wieght=2")
    refused("source none: no shards: nowhere.tar matches no file", of={**sources, "none": "nowhere.tar"})
