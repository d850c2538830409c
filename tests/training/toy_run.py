"""A tiny model and loader for the trainer's tests, and processes that train them as a command would."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlpfast.cli._run import run
from vlpfast.training import checkpoint
from vlpfast.training.config import RunConfig, Stage, load_config
from vlpfast.training.parallel import World, joined
from vlpfast.training.rng import seed_everything
from vlpfast.training.trainer import EXIT_PREEMPTED, Trainer
from vlpfast.types import Batch, Progress

CONFIG = """\
model: {name: toy}
data: {source: shards, train: [none.tar]}
train: {steps: 12, batch_size: 8, lr: 0.01, warmup_steps: 3, checkpoint_every: 4, tensorboard_every: 0, precision: fp32}
"""
CLOCK = ("samples_per_s", "data_wait", "seconds", "mfu", "memory_bytes")


@dataclass
class Head:
    width: int = 16
    dropout: float = 0.2


class Toy(nn.Module):
    """Two towers under a squared loss, with dropout (random numbers) and a running mean (a buffer that after_step fills)."""

    @dataclass
    class Config:
        inputs: int = 6
        head: Head = field(default_factory=Head)

        @classmethod
        def small(cls) -> Toy.Config:
            return cls(head=Head(width=4))

    def __init__(self, config: Toy.Config) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(config.inputs, config.head.width), nn.LayerNorm(config.head.width))
        self.text = nn.Linear(config.inputs, config.head.width)
        self.dropout = nn.Dropout(config.head.dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.momentum = nn.Linear(2, 2).requires_grad_(False)  # as a momentum copy: never offered for training
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))  # of before_step, after_step
        self.mode = "both"

    def set_mode(self, mode: str) -> None:
        if mode not in ("both", "fit"):
            raise ValueError(f"mode: expected both or fit, got {mode!r}")
        self.mode = mode

    def before_step(self, progress: Progress) -> None:
        self.calls[0] += 1

    def after_step(self) -> None:
        self.calls[1] += 1

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        image = self.dropout(self.image(batch["image"]))  # [B, W]
        text = self.text(batch["text"])  # [B, W]
        losses = {"fit": (image - text).square().mean() * self.logit_scale}
        return losses if self.mode == "fit" else {**losses, "size": image.square().mean()}


class ToyLoader:
    """Endless batches that are a function of the cursor; batch `poison` (from 0) holds a NaN. Ranks share the rows of a batch."""

    def __init__(self, batch_size: int, poison: int = -1, seconds: float = 0.0, world: World | None = None) -> None:
        self._world = world or World()
        self.batch_size, self.poison, self.seconds = self._world.share(batch_size), poison, seconds
        self.skipped: dict[str, str] = {}
        self.cursor = 0
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.cursor)
            image = torch.randn(self.batch_size * self._world.size, 6, generator=generator)
            if self.cursor == self.poison:
                image[0, 0] = float("nan")
            self.cursor += 1
            time.sleep(self.seconds)
            own = image[self._world.rank :: self._world.size]  # [batch_size, 6]
            yield Batch(image=own, text=own.roll(1, dims=1), index=torch.arange(self.batch_size), key=["k"] * self.batch_size)

    def __len__(self) -> int:
        return 5

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]

    def close(self) -> None:
        self.closed = True


def toy_config(folder: Path, *overrides: str, text: str = CONFIG) -> RunConfig:
    path = folder / "toy.yaml"
    path.write_text(text)
    return load_config(path, [f"train.run_dir={folder / 'run'}", *overrides], lambda name: Toy)


def toy_model(config: RunConfig) -> Toy:
    seed_everything(config.train.seed)
    return Toy(config.model.config)


def toy_trainer(
    config: RunConfig, poison: int = -1, seconds: float = 0.0, device: str = "cpu", world: World | None = None, **more: Any
) -> Trainer:
    world = world or World(device=torch.device(device))

    def loader(name: str, stage: Stage) -> ToyLoader:
        torch.rand(3)  # as a loader that draws while it is opened
        return ToyLoader(config.train.batch_size, poison, seconds, world)

    return Trainer(config, toy_model(config), loader, world, **more)


def process(function: Callable[..., None], *arguments: Any, **named: Any) -> BaseProcess:
    """A process of its own that runs a function of a module in this folder."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    context = multiprocessing.get_context("forkserver")  # torch is imported once, by the server, not by every process
    context.set_forkserver_preload(["toy_run", "torch._dynamo"])  # the latter by the first step of any optimiser
    made = context.Process(target=function, args=arguments, kwargs=named)
    made.start()
    return made


def start(folder: Path, *overrides: str, **how: Any) -> BaseProcess:
    """A process that trains a toy in folder/run; what it says on stderr is in folder/log. how: see _train."""
    folder.mkdir(exist_ok=True)
    toy_config(folder)
    return process(_train, folder, overrides, **how)


def start_ranks(folder: Path, ranks: int, *overrides: str, last: dict[str, Any] | None = None, **how: Any) -> list[BaseProcess]:
    """As start, of processes as torchrun starts them, which speak in folder/log-RANK. last: what is different for the last."""
    folder.mkdir(exist_ok=True)
    toy_config(folder)  # they would write its file all at once
    port = free_port()
    return [
        process(_train, folder, overrides, ranks=(rank, ranks, port), **{**how, **((last or {}) if rank == ranks - 1 else {})})
        for rank in range(ranks)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank: int, ranks: int, port: int) -> None:
    """Sets what torchrun sets."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Every line of the metrics of folder/run without what a clock measured."""
    path = folder / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def _train(
    folder: Path,
    overrides: tuple[str, ...],
    kill_after: int = 0,
    kill_in_save: int = 0,
    largest_file: int = 0,
    seconds: float = 0.0,
    save_seconds: float = 0.0,
    ranks: tuple[int, int, int] | None = None,
) -> None:
    """kill_after, kill_in_save: the step after which, or in whose or a later checkpoint's midst, the process gets SIGKILL.
    largest_file: bytes after which a file is too large, as on a full disk. seconds, save_seconds: how long each batch takes, and
    the last file of a checkpoint. ranks: this one, how many, the port where they meet."""
    with open(folder / ("log" if ranks is None else f"log-{ranks[0]}"), "w") as log:
        os.dup2(log.fileno(), 2)
    faulthandler.enable()  # on SIGABRT it says where it was
    torch.set_num_threads(1)
    if ranks is not None and "RANK" not in os.environ:
        as_rank(*ranks)
    if kill_after:
        after_step = Toy.after_step

        def after_step_or_die(self: Toy) -> None:
            after_step(self)
            if int(self.calls[1]) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        Toy.after_step = after_step_or_die
    if kill_in_save or save_seconds:
        write = checkpoint._write_text

        def write_late_or_die(path: Path, text: str) -> None:
            if kill_in_save and path.name == "state.json" and json.loads(text)["step"] >= kill_in_save:
                path.write_text("{")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(save_seconds if path.name == "manifest.json" else 0)
            write(path, text)

        checkpoint._write_text = write_late_or_die
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run(lambda _: _fit(folder, overrides, seconds))


def _fit(folder: Path, overrides: tuple[str, ...], seconds: float) -> int:
    config = load_config(folder / "toy.yaml", [f"train.run_dir={folder / 'run'}", *overrides], lambda name: Toy)
    with joined(config.train) as world:
        return 0 if toy_trainer(config, seconds=seconds, world=world).fit() else EXIT_PREEMPTED


if __name__ == "__main__":  # under torchrun: FOLDER SECONDS key=value ..., as storm.py starts it
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    _train(folder, tuple(sys.argv[3:]), seconds=float(sys.argv[2]), ranks=(rank, int(os.environ["WORLD_SIZE"]), 0))
