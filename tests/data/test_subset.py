"""Some of the samples as a source: few shots, base and new classes; positions in them; weights by the square root."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlpfast.cli import assemble
from vlpfast.cli.evaluate import label_of
from vlpfast.data import ShardSet, ShardWriter, make_loader
from vlpfast.data.few_shot import few_shot_indices
from vlpfast.data.position import merge_positions
from vlpfast.data.subset import Subset
from vlpfast.training.config import Stage
from vlpfast.training.parallel import World
from vlpfast.types import DataSpec, TargetSpec, TextSpec, UserError

CLIP = str(Path(__file__).parents[2] / "configs" / "clip.yaml")
NAMES = ["ant", "bee", "cow", "dog", "emu"]
SPEC = DataSpec(None, TextSpec(4), targets={"label": TargetSpec()})


class Lengths:
    vocab_size, pad_id, bos_id, eos_id = 1000, 0, 1, 2

    def encode(self, texts, context_length):
        ids = torch.tensor([[len(text)] + [0] * (context_length - 1) for text in texts])
        return ids, ids > 0


def write(folder, count=60, by_name=True, bad=(), prefix="s"):
    with ShardWriter(folder, prefix, samples_per_shard=7) as writer:
        for i in range(count):
            label = {} if i in bad else {"label": NAMES[i % 5] if by_name else i % 5}
            writer.write(f"k{i:03d}", {"txt": b"x", "json": json.dumps({"number": i, **label}).encode()})
    return str(folder)


def test_a_subset_is_a_set(tmp_path):
    whole = ShardSet(write(tmp_path))
    chosen = [0, 6, 7, 30, 59]
    subset = Subset(whole, chosen)
    assert len(subset) == 5 and subset.shard_sizes.tolist() == [2, 1, 0, 0, 1, 0, 0, 0, 1]
    assert [subset.key(i) for i in range(5)] == [f"k{i:03d}" for i in chosen] and subset.name(3) == whole.name(30)
    assert subset.extensions(0) == ("txt", "json") and subset.problem(0) == "" and "txt" in subset.extension_names
    records = [json.loads(content.tobytes())["number"] for content in subset.read([4, 0, 2], ("json",))]
    assert records == [59, 0, 7]
    assert len({Subset(whole, of).fingerprint() for of in (chosen, chosen[:4], [0, 6, 7, 30, 58])} | {whole.fingerprint()}) == 4
    assert Subset(whole, chosen).fingerprint() == subset.fingerprint()
    for wrong in ([3, 2], [1, 1], [-1, 2], [0, 60]):
        with pytest.raises(ValueError, match="indices: expected ascending positions of 60 samples"):
            Subset(whole, wrong)
    with pytest.raises(UserError, match="none of the 60 samples is chosen"):
        Subset(whole, [])
    with pytest.raises(IndexError):
        subset.key(5)


@pytest.mark.parametrize("sources", [False, True])
def test_positions_in_a_subset_are_exact(tmp_path, sources):
    """A pass has each chosen sample once; going on, by as many ranks or by others, misses and repeats none."""
    a = write(tmp_path / "a", bad={12, 13})
    patterns = {"a": a, "b": write(tmp_path / "b", prefix="t")} if sources else a
    chosen = sorted({*range(3, 50, 2), 12, *(range(61, 110, 3) if sources else ())})
    spec = replace(SPEC, targets={"label": TargetSpec(classes=NAMES)})
    options = {"seed": 3, "window": 2, "subset": chosen}

    def loaders(world):
        return [
            make_loader(patterns, spec, Lengths(), 6 // world, train=True, rank=r, world_size=world, **options)
            for r in range(world)
        ]

    keys = [ShardSet([a]).key(i) if i < 60 else f"k{i - 60:03d}" for i in chosen if i not in (12, 13)]
    whole = list(islice(loaders(1)[0], 12))
    per_epoch = len(keys) // 6
    first = torch.cat([batch["index"] for batch in whole[:per_epoch]]).tolist()
    assert len(set(first)) == len(first) == per_epoch * 6 and {key for batch in whole for key in batch["key"]} <= set(keys)
    for at in (1, 4, 7):
        (one,) = loaders(1)
        for _ in islice(one, at):
            pass
        one.close()
        state = json.loads(json.dumps(one.state_dict()))
        (again,) = loaders(1)
        again.load_state_dict(state)
        for batch, other in zip(whole[at:], again, strict=False):
            assert batch["key"] == other["key"] and torch.equal(batch["label"], other["label"])
        two = loaders(2)
        for rank in two:
            rank.load_state_dict([state])
        left = [next(iter(rank)) for rank in two]
        assert sorted(key for batch in left for key in batch["key"]) == sorted(whole[at]["key"]) or at + 1 > per_epoch
        merged = merge_positions([json.loads(json.dumps(rank.state_dict())) for rank in two])
        (back,) = loaders(1)
        back.load_state_dict(merged)
        assert next(iter(back))["key"] == whole[at + 1]["key"] or at + 1 >= per_epoch
    (other,) = [make_loader(patterns, spec, Lengths(), 6, train=True, seed=3, window=2, subset=chosen[1:])]
    with pytest.raises(UserError, match="the data position was saved with fingerprint"):
        other.load_state_dict(state)
    evaluated = make_loader(patterns, spec, Lengths(), 6, train=False, subset=chosen)
    assert [key for batch in evaluated for key in batch["key"]] == keys
    with pytest.raises(UserError, match="fewer than one global batch of 60"):
        make_loader(patterns, spec, Lengths(), 60, train=True, **options)


def test_a_source_without_chosen_samples_is_refused(tmp_path):
    patterns = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b", prefix="t")}
    with pytest.raises(UserError, match="source b has none of the chosen samples"):
        make_loader(patterns, SPEC, Lengths(), 2, train=True, subset=[1, 2, 3])


def config_of(folder, *overrides, targets=SPEC.targets):
    names = folder + "/names.txt"
    Path(names).write_text("\n".join(NAMES))
    data = ["data.source=shards", f"data.train=['{folder}']", f"data.heldout=['{folder}']", f"evaluation.class_names={names}"]
    config = assemble.load_config(CLIP, [*data, "train.batch_size=2", *overrides])
    model = SimpleNamespace(data=replace(SPEC, targets=targets), vocabularies=dict)
    return replace(config, model=replace(config.model, config=model))


def opened(config, stage=None):
    sources = assemble.prepare_data(config)
    loader = assemble.open_loader(config, sources, Lengths(), World(), "one", stage or Stage())
    batches = list(islice(loader, len(loader)))
    loader.close()
    return sources, {key: int(label) for batch in batches for key, label in zip(batch["key"], batch["label"], strict=True)}


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("targets", [SPEC.targets, {"label": TargetSpec(classes=NAMES)}], ids=["run's names", "own names"])
def test_few_shots_of_base_and_new_classes(tmp_path, by_name, targets):
    folder = write(tmp_path, by_name=by_name, bad={0, 33})
    labels = np.array([-1 if i in (0, 33) else i % 5 for i in range(60)])
    good = np.flatnonzero(labels >= 0)
    for part, low, high in (("all", 0, 5), ("base", 0, 3), ("new", 3, 5)):
        config = config_of(folder, "data.shots=2", f"data.classes={part}", "train.seed=4", targets=targets)
        sources, seen = opened(config)
        of = good[(labels[good] >= low) & (labels[good] < high)]
        expected = of[few_shot_indices(labels[of], 2, 4)]
        assert sorted(seen) == [f"k{i:03d}" for i in expected] and len(seen) == 2 * (high - low)
        assert all(label == int(key[1:]) % 5 - low for key, label in seen.items())
        assert sources.classes.names == NAMES[low:high]
        subset = sources.classes.subset
        assert subset is None if part == "all" else subset.tolist() == of.tolist()
        record = {"label": NAMES[low + 1] if by_name else low + 1}
        assert label_of(record, sources.classes, "k") == 1
    _, seen = opened(config_of(folder, "data.classes=base", targets=targets))
    assert len(seen) == 34 or len(seen) == 35  # all of them, but for an incomplete batch
    other = opened(config_of(folder, "data.shots=2", "train.seed=5", targets=targets))[1]
    assert other.keys() != opened(config_of(folder, "data.shots=2", "train.seed=4", targets=targets))[1].keys()


def test_a_stage_has_its_own_shots(tmp_path):
    config = config_of(write(tmp_path), "stages.one.data.shots=4", "data.shots=1")
    assert len(opened(config, config.stages["one"])[1]) == 20
    assert len(opened(config)[1]) == 4  # of 5, in batches of 2


def test_classes_that_nothing_is_of(tmp_path):
    with ShardWriter(tmp_path, "s") as writer:
        for i in range(6):
            writer.write(f"k{i}", {"txt": b"x", "json": b'{"label": "ant"}'})
    with pytest.raises(UserError, match=r'data.classes=new: no sample has one of these classes under "label" in its JSON'):
        opened(config_of(str(tmp_path), "data.classes=new"))


def test_weights_by_the_square_root(tmp_path):
    patterns = {"a": write(tmp_path / "a", 64), "b": write(tmp_path / "b", 4, prefix="t")}
    loader = make_loader(patterns, SPEC, Lengths(), 10, train=True, weights="sqrt", subset=None)
    assert loader.state_dict()["weights"] == [8.0, 2.0]
    spec = replace(SPEC, targets={"label": TargetSpec(classes=NAMES)})
    loader = make_loader(patterns, spec, Lengths(), 17, train=True, weights="sqrt")
    counts = torch.cat([batch["source"] for batch in islice(loader, 4)]).bincount()
    assert counts.tolist() == [54, 14]  # of 68: 54.4 and 13.6
    with pytest.raises(ValueError, match=r"weights: expected a number for each source or .*, got 'cube'"):
        make_loader(patterns, SPEC, Lengths(), 10, train=True, weights="cube")
    sizes = [f"data.mixture.{name}.shards=['{folder}']" for name, folder in patterns.items()]
    config = assemble.load_config(CLIP, ["data.source=shards", *sizes, "data.weights=sqrt", "train.batch_size=17"])
    config = replace(config, model=replace(config.model, config=SimpleNamespace(data=DataSpec(None, TextSpec(4)))))
    loader = assemble.open_loader(config, assemble.prepare_data(config), Lengths(), World(), "one", Stage())
    assert torch.cat([batch["source"] for batch in islice(loader, 4)]).bincount().tolist() == [54, 14]
