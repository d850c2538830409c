"""A tiny model and loader for the trainer's tests, and a process that trains them as a command would."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlpfast.training import checkpoint
from vlpfast.training.config import RunConfig, Stage, load_config
from vlpfast.training.parallel import World
from vlpfast.training.rng import seed_everything
from vlpfast.training.trainer import EXIT_PREEMPTED, Trainer
from vlpfast.types import Batch, Progress, UserError

CONFIG = """\
model: {name: toy}
data: {source: shards, train: [none.tar]}
train: {steps: 12, batch_size: 8, lr: 0.01, warmup_steps: 3, checkpoint_every: 4, tensorboard_every: 0, precision: fp32}
"""


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

    def before_step(self, step: int) -> None:
        self.calls[0] += 1

    def after_step(self) -> None:
        self.calls[1] += 1

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        image = self.dropout(self.image(batch["image"]))  # [B, W]
        text = self.text(batch["text"])  # [B, W]
        losses = {"fit": (image - text).square().mean() * self.logit_scale}
        return losses if self.mode == "fit" else {**losses, "size": image.square().mean()}


class ToyLoader:
    """Endless batches that are a function of the cursor; batch `poison` (from 0) holds a NaN."""

    def __init__(self, batch_size: int, poison: int = -1, seconds: float = 0.0) -> None:
        self.batch_size, self.poison, self.seconds = batch_size, poison, seconds
        self.skipped: dict[str, str] = {}
        self.cursor = 0
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.cursor)
            image = torch.randn(self.batch_size, 6, generator=generator)
            if self.cursor == self.poison:
                image[0, 0] = float("nan")
            self.cursor += 1
            time.sleep(self.seconds)
            yield Batch(image=image, text=image.roll(1, dims=1), index=torch.arange(self.batch_size), key=["k"] * self.batch_size)

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


def toy_trainer(config: RunConfig, poison: int = -1, seconds: float = 0.0, device: str = "cpu", **more: Any) -> Trainer:
    def loader(name: str, stage: Stage) -> ToyLoader:
        torch.rand(3)  # as a loader that draws while it is opened
        return ToyLoader(config.train.batch_size, poison, seconds)

    return Trainer(config, toy_model(config), loader, World(device=torch.device(device)), **more)


def start(folder: Path, *overrides: str, **how: Any) -> BaseProcess:
    """A process of its own that trains a toy in folder/run; what it says on stderr is in folder/log. how: see _train."""
    folder.mkdir(exist_ok=True)
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    context = multiprocessing.get_context("forkserver")  # torch is imported once, by the server, not by every process
    context.set_forkserver_preload(["toy_run"])
    process = context.Process(target=_train, args=(folder, overrides), kwargs=how)
    process.start()
    return process


def _train(
    folder: Path,
    overrides: tuple[str, ...],
    kill_after: int = 0,
    kill_in_save: int = 0,
    largest_file: int = 0,
    seconds: float = 0.0,
) -> None:
    """kill_after, kill_in_save: the step after which, or in whose or a later checkpoint's midst, the process gets SIGKILL.
    largest_file: bytes after which a file is too large, as on a full disk. seconds: how long each batch takes."""
    with open(folder / "log", "w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if kill_after:
        after_step = Toy.after_step

        def after_step_or_die(self: Toy) -> None:
            after_step(self)
            if int(self.calls[1]) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        Toy.after_step = after_step_or_die
    if kill_in_save:
        write = checkpoint._write_json

        def write_or_die(path: Path, value: dict[str, Any]) -> None:
            if path.name == "state.json" and value["step"] >= kill_in_save:
                path.write_text("{")
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, value)

        checkpoint._write_json = write_or_die
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        finished = toy_trainer(toy_config(folder, *overrides), seconds=seconds).fit()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if finished else EXIT_PREEMPTED)
