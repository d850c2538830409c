"""Training on many ranks over gloo: N processes against one with the whole batch, for every strategy, loss and division."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
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

from vlpfast.ops.contrastive import sharded_clip_loss, sharded_sigmoid_loss
from vlpfast.ops.maxsim import sharded_filip_loss
from vlpfast.training.config import RunConfig, load_config
from vlpfast.training.parallel import Spread, World, blocks, joined
from vlpfast.training.rng import seed_everything
from vlpfast.training.trainer import Trainer
from vlpfast.types import Batch, Progress, UserError

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


def config(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "pair.yaml"
    path.write_text(CONFIG)
    return load_config(path, [f"train.run_dir={folder / 'run'}", *overrides], lambda name: Pair)


def trained(folder: Path, world: World, *overrides: str) -> tuple[Trainer, list[float]]:
    """The trainer after its steps, and each step's loss."""
    settings = config(folder, *overrides)
    seed_everything(settings.train.seed)
    losses: list[float] = []
    trainer = Trainer(settings, Pair(settings.model.config), lambda name, stage: Share(world, 24), world)
    keep = trainer._write_taken

    def write(leave: int) -> None:
        losses.extend(float(taken.values[0]) for taken in trainer._taken)
        keep(leave)

    trainer._write_taken = write
    trainer._save = lambda loader: trainer._write_taken(0)  # XXX
    import vlpfast.training.checkpoint as c
    c.export = lambda *a: None
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
