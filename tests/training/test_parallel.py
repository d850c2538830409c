"""Training on many ranks over gloo: N processes against one with the whole batch, for every strategy, loss and division."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn
from toy_run import ToyLoader

from vlpfast.data import load_tokenizer, make_loader, train_tokenizer
from vlpfast.data.shards import ShardWriter
from vlpfast.ops.contrastive import sharded_clip_loss, sharded_sigmoid_loss
from vlpfast.ops.maxsim import sharded_filip_loss
from vlpfast.training import feature_cache
from vlpfast.training.config import RunConfig, load_config
from vlpfast.training.optim import is_spread
from vlpfast.training.parallel import Spread, World, blocks, joined
from vlpfast.training.precision import is_fast
from vlpfast.training.rng import seed_everything
from vlpfast.training.together import on_all
from vlpfast.training.trainer import Trainer
from vlpfast.types import Batch, DataSpec, PeerError, Progress, TextSpec, UserError

CONFIG = """\
model: {name: pair}
data: {source: shards, train: [none.tar]}
train: {steps: 20, batch_size: 24, lr: 0.003, warmup_steps: 3, tensorboard_every: 0, checkpoint_every: 0, precision: fp32,
        log_seconds: 1000, eps: 1.0e-4}
"""


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.gelu(self.linear(self.norm(x))))


class Pair(nn.Module):
    """Two towers of blocks that take a batch of tokens [B, 6] as three tokens of width 2, under one of three losses."""

    @dataclass
    class Config:
        loss: str = "clip"
        dropout: float = 0.0

    def __init__(self, config: Pair.Config) -> None:
        super().__init__()
        self.config = config
        for side in ("image", "text"):
            setattr(self, f"{side}_in", nn.Linear(2, 8))
            setattr(self, side, nn.ModuleList(Block(8, config.dropout) for _ in range(3)))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return self.contrast(self.encode(batch))

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        features = {}
        for side in ("image", "text"):
            x = getattr(self, f"{side}_in")(batch[side].unflatten(1, (3, 2)))
            for block in getattr(self, side):
                x = block(x)
            features[side] = F.normalize(x if self.config.loss == "filip" else x.mean(1), dim=-1)
        return features | {"index": batch["index"]}

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y, scale = features["image"], features["text"], self.logit_scale.exp()
        assert features["index"].shape == x.shape[:1] and features["index"].dtype == torch.int64
        if self.config.loss == "sigmoid":
            return {"loss": sharded_sigmoid_loss(x, y, scale, self.bias)}
        loss = sharded_filip_loss(x, y, scale) if self.config.loss == "filip" else sharded_clip_loss(x, y, scale)
        return {"loss": loss + 0 * self.bias}


class Share(ToyLoader):
    """A rank's share of ToyLoader's batches, as make_loader deals it."""

    def __init__(self, world: World, batch_size: int) -> None:
        super().__init__(batch_size)
        self.world = world

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield Batch(**{key: value[self.world.rank :: self.world.size] for key, value in batch.items()})


def config(folder: Path, *overrides: str, model: type[Pair] = Pair) -> RunConfig:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"pair-{os.getpid()}.yaml"  # ranks share the folder
    path.write_text(CONFIG)
    return load_config(path, [f"train.run_dir={folder / 'run'}", *overrides], lambda name: model)


def trained(folder: Path, world: World, *overrides: str, model: type[Pair] = Pair) -> tuple[Trainer, list[float]]:
    """The trainer after its steps, and each step's loss."""
    settings = config(folder, *overrides, model=model)
    seed_everything(settings.train.seed)
    losses: list[float] = []
    trainer = Trainer(settings, model(settings.model.config), lambda name, stage: Share(world, 24), world)
    keep = trainer._write_taken

    def write(leave: int) -> None:
        losses.extend(float(taken.values[0]) for taken in trainer._taken)
        keep(leave)

    trainer._write_taken = write
    assert trainer.fit()
    return trainer, losses


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


LOSSES = ("clip", "sigmoid", "filip")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes: losses, parameters, parameters before."""
    found = {}
    for loss in LOSSES:
        seed_everything(0)
        before = Pair(Pair.Config(loss=loss)).state_dict()
        trainer, losses = trained(tmp_path_factory.mktemp(loss), World(), f"model.loss={loss}")
        found[loss] = losses, trainer.model.state_dict(), before
    return found


def ranks_equal_one_process(rank: int, world: int, folder: Path, alone: dict[str, Any]) -> None:
    for loss in LOSSES:
        expected, after, before = alone[loss]
        for strategy in ("ddp", "fsdp"):
            for micro in (0, 5):
                name = f"{loss}-{strategy}-micro-batches of {micro}"
                overrides = (f"model.loss={loss}", f"train.strategy={strategy}", f"train.micro_batch={micro}")
                trainer, losses = trained(folder / name, World(rank, world), *overrides)
                assert losses == pytest.approx(expected, rel=1e-5), name
                for key, found in trainer.model.named_parameters():
                    error = (whole(found) - after[key]).norm() / after[key].norm()
                    assert error < 1e-5, f"{name}: {key} is {error:.1e} from one process's"
                    if key != "bias" or loss == "sigmoid":
                        assert (after[key] - before[key]).norm() > 1e-3, f"{key} did not move"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(world: int, tmp_path: Path, alone: dict[str, Any]) -> None:
    run(world, tmp_path, [partial(ranks_equal_one_process, folder=tmp_path, alone=alone)])


def test_a_divided_batch_replays_what_was_drawn(tmp_path: Path) -> None:
    """Against the same parts encoded one after another under one graph."""
    seed_everything(0)
    model = Pair(Pair.Config(loss="clip", dropout=0.3))
    batch = next(iter(ToyLoader(24)))
    seed_everything(5)
    parts = [model.encode(part) for part in feature_cache.divide(batch, 7)]
    assert [len(part["image"]) for part in parts] == [7, 7, 7, 3]
    loss = model.contrast({key: torch.cat([part[key] for part in parts]) for key in parts[0]})["loss"]
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    drawn = torch.rand(3)
    model.zero_grad()
    seed_everything(5)
    spread = Spread(model, config(tmp_path).train, World())
    found, losses = feature_cache.backward(spread, batch, 7, lambda losses: losses["loss"], nullcontext)
    assert found == loss.detach() and losses["loss"] == found
    assert torch.equal(torch.rand(3), drawn)  # the generator goes on where one pass would have left it
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-6 * expected[name].norm() + 1e-9, name


def test_memory_of_a_divided_batch_is_that_of_a_part(tmp_path: Path) -> None:
    """Tensors kept for the backward at any one time, counted."""
    seed_everything(0)
    model = Pair(Pair.Config())
    batch = next(iter(ToyLoader(240)))
    spread = Spread(model, config(tmp_path).train, World())
    kept: list[int] = []
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch, Progress(0, 1))
    undivided = sum(kept)
    encode = model.encode

    def counted(part: Batch) -> dict[str, Tensor]:
        nonlocal largest
        kept.clear()
        features = encode(part)
        largest = max(largest, sum(kept))
        return features

    model.encode = counted
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        feature_cache.backward(spread, batch, 24, lambda losses: losses["loss"], nullcontext)
    assert 0 < largest < undivided / 5


def test_what_cannot_be_divided_is_named(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

    with pytest.raises(UserError, match=r"train.micro_batch: Whole does not say which features its losses need"):
        Trainer(config(tmp_path, "train.micro_batch=4"), Whole(), lambda name, stage: ToyLoader(24), World())
    with pytest.raises(UserError, match=r"train.batch_size: expected a multiple of the 5 ranks, got 24"):
        Trainer(config(tmp_path), Pair(Pair.Config()), lambda name, stage: ToyLoader(24), World(0, 5))
    for key in ("train.compile=block", "train.activation_checkpointing=true"):
        with pytest.raises(UserError, match=rf"{key.removesuffix('=true')}: Whole has no repeated blocks"):
            Trainer(config(tmp_path, key), Whole(), lambda name, stage: ToyLoader(24), World())
    both = config(tmp_path, "train.compile=step", "train.micro_batch=4")
    with pytest.raises(UserError, match=r"train.compile=step compiles the forward of a whole batch"):
        Trainer(both, Pair(Pair.Config()), lambda name, stage: ToyLoader(24), World())


def test_a_divided_batch_of_frozen_towers(tmp_path: Path) -> None:
    """The temperature alone is trained; and what no loss uses has no gradient, so that no decay touches it."""
    trainer, _ = trained(tmp_path / "scale", World(), "train.steps=2", "train.micro_batch=5", "stages.s.trainable=[logit_scale]")
    seed_everything(0)
    before = Pair(Pair.Config()).state_dict()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"logit_scale"}


def test_blocks() -> None:
    model = Pair(Pair.Config())
    assert blocks(model) == [*model.image, *model.text]
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)])
    assert blocks(nn.Sequential(nested)) == [*nested]  # the outermost
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
    assert blocks(nn.Sequential(mixed, nn.ModuleList([nn.GELU(), nn.GELU()]), nn.ModuleList([nn.Linear(2, 2)]))) == []


@pytest.mark.parametrize("how", ["train.activation_checkpointing=true", "train.compile=block"])
def test_recomputed_and_compiled_blocks_train_alike(how: str, tmp_path: Path, alone: dict[str, Any]) -> None:
    expected, after, _ = alone["clip"]
    with torch._dynamo.config.patch(error_on_recompile=False):
        trainer, losses = trained(tmp_path, World(), how)
    assert list(trainer.model.state_dict()) == list(after)  # names as they were
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, value in trainer.model.state_dict().items():
        assert (value - after[key]).norm() <= 1e-5 * after[key].norm(), key


def spread_models_in_bf16_and_evaluated(rank: int, world: int, folder: Path) -> None:
    """What travels in bf16 is near float32, and a spread model gives the same features through its own methods."""
    overrides = ("train.strategy=fsdp", "train.activation_checkpointing=true")
    exact, losses = trained(folder / "exact", World(rank, world), *overrides)
    assert len(set(on_all(torch.initial_seed))) == world  # each draws its own random numbers
    with pytest.warns(UserWarning) if not is_fast(torch.bfloat16, torch.device("cpu")) else nullcontext():
        half, half_losses = trained(folder / "half", World(rank, world), *overrides, "train.precision=bf16")
    assert half_losses == pytest.approx(losses, rel=0.02) and half_losses != losses
    assert {whole(parameter).dtype for parameter in half.model.parameters()} == {torch.float32}
    batch = next(iter(ToyLoader(5)))
    unspread = Pair(Pair.Config())
    unspread.load_state_dict({name: whole(parameter) for name, parameter in exact.model.named_parameters()})
    for _ in range(2):
        with exact._spread.gathered(), torch.no_grad():
            found = exact.model.encode(batch)
        assert torch.allclose(found["image"], unspread.encode(batch)["image"], atol=1e-6)
    share = sum(p.to_local().numel() for p in exact.model.parameters() if is_spread(p))
    assert share < 0.6 * sum(p.numel() for p in exact.model.parameters())


def stages_one_after_another(rank: int, world: int, folder: Path) -> None:
    """Each stage has its own set of trained parameters, on all ranks the same; losses of both strategies agree."""
    stages = ("stages.a.steps=3", "stages.b.steps=3", "stages.b.frozen=['image*', bias]")
    found = {}
    for strategy in ("ddp", "fsdp"):
        trainer, losses = trained(folder / f"stages-{strategy}", World(rank, world), f"train.strategy={strategy}", *stages)
        found[strategy] = losses, [whole(parameter) for parameter in trainer.model.parameters()]
    assert len(found["ddp"][0]) == 6 and found["ddp"][0] == pytest.approx(found["fsdp"][0], rel=1e-5)
    for a, b in zip(found["ddp"][1], found["fsdp"][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def a_signal_to_one_stops_all(rank: int, world: int, folder: Path) -> None:
    settings = config(folder / "signal", "train.steps=100000")
    loader = Share(World(rank, world), 24)
    trainer = Trainer(settings, Pair(settings.model.config), lambda name, stage: loader, World(rank, world))
    if rank == world - 1:
        trainer.model.before_step = lambda progress: os.kill(os.getpid(), signal.SIGTERM) if progress.step == 7 else None
    assert not trainer.fit()
    assert on_all(lambda: trainer.position.step) == [trainer.position.step] * world
    assert 8 <= trainer.position.step < 12


def the_first_rank_goes_first(rank: int, world: int, folder: Path) -> None:
    me, file = World(rank, world), folder / "made"
    text = me.in_turn(lambda: file.write_text("done") and "made" if me.is_first else file.read_text())
    assert text == ("made" if me.is_first else "done")

    def fails() -> None:
        raise UserError("no data")

    with pytest.raises(UserError if me.is_first else PeerError, match="no data"):
        me.in_turn(fails)
    mean = me.mean(torch.tensor([float(rank), float("nan") if rank else 1.0]))
    assert mean[0] == (world - 1) / 2 and mean[1].isnan()


def test_two_ranks(tmp_path: Path) -> None:
    checks = [spread_models_in_bf16_and_evaluated, stages_one_after_another, a_signal_to_one_stops_all, the_first_rank_goes_first]
    run(2, tmp_path, [partial(check, folder=tmp_path) for check in checks])


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": taken.getsockname()[1],
        }.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(UserError, match=r"rank 0 of 2 cannot meet the others at 127.0.0.1:\d+: .*"),
            joined(config(tmp_path).train),
        ):
            pass
    with pytest.raises(UserError, match="CUDA devices are here"), joined(config(tmp_path, "train.device=cuda").train):
        pass


class Words(nn.Module):
    """Learns the mean of its captions' ids; writes down which samples it was given."""

    @dataclass
    class Config:
        log: str = ""

    def __init__(self, config: Words.Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(300, 4)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with open(f"{self.config.log}-{os.getpid()}", "a") as file:
            file.write(f"{batch['index'].tolist()}\n")
        return {"loss": self.embedding(batch["text"]).square().mean()}


def one_part_of_an_epoch(rank: int, world: int, folder: Path, steps: int) -> None:
    path = folder / f"words-{os.getpid()}.yaml"
    path.write_text(CONFIG.replace("pair", "words"))
    overrides = [
        f"train.run_dir={folder / 'run'}",
        f"train.steps={steps}",
        "train.batch_size=12",
        f"model.log={folder}/log",
    ]
    settings = load_config(path, overrides, lambda name: Words)
    tokenizer, spec = load_tokenizer(folder / "tokenizer.json"), DataSpec(image=None, text=TextSpec(8))

    def loader(name: str, stage: Any) -> Any:
        return make_loader([str(folder)], spec, tokenizer, 12 // world, train=True, rank=rank, world_size=world)

    assert Trainer(settings, Words(settings.model.config), loader, World(rank, world)).fit()


def test_other_numbers_of_ranks_see_each_sample_once(tmp_path: Path) -> None:
    """An epoch of 100 samples, three of them damaged, by 2 ranks, then 3, then one alone."""
    with ShardWriter(tmp_path, "train", samples_per_shard=23) as writer:
        for i in range(100):
            writer.write(f"{i:03d}", {"txt": b"\xff" if i in (7, 40, 41) else f"caption {i}".encode()})
    train_tokenizer([f"caption {i}" for i in range(100)], 300).save(str(tmp_path / "tokenizer.json"))
    run(2, tmp_path, [partial(one_part_of_an_epoch, folder=tmp_path, steps=3)])
    run(3, tmp_path, [partial(one_part_of_an_epoch, folder=tmp_path, steps=6)])
    one_part_of_an_epoch(0, 1, tmp_path, 8)
    seen = [i for log in tmp_path.glob("log*") for line in log.read_text().splitlines() for i in json.loads(line)]
    assert len(seen) == 8 * 12 == len(set(seen)) and not {7, 40, 41} & set(seen)


def test_rows_that_are_not_samples_cannot_be_divided() -> None:
    batch = {"image": torch.zeros(4, 3), "answer": torch.zeros(6, 2), "answer_of": torch.tensor([0, 0, 1, 2, 3, 3])}
    with pytest.raises(UserError, match=r"train\.micro_batch: .* answer_of is there"):
        feature_cache.divide(batch, 2)
