"""TCL on two processes over gloo: as one with the joint batch; FSDP2, a momentum copy and compiled blocks together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from contract import build, make_batch
from ranks import run
from torch import Tensor, nn

from vlpfast import models
from vlpfast.training.config import TrainConfig
from vlpfast.training.parallel import Spread, World, blocks
from vlpfast.types import Batch, Progress

STEPS = 2
CONTRASTS = {"tcl": ("cma", "imc", "lmi", "mlm"), "tcl_retrieval": ("cma", "imc", "lmi")}  # itm draws among a rank's own pairs


def setup_model(name: str) -> nn.Module:
    config = models.get(name).Config.tiny()
    vision = replace(config.vision, layers=2)
    model = build(name, vision=vision, text=replace(config.text, layers=2, cross_attention=[1])).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    for network in (model.online, model.momentum.module):
        network.text.config.dropout = 0.0
    return model


def batch_of(model: nn.Module, step: int) -> Batch:
    batch = make_batch(model.config.data, 8, seed=step)
    batch["index"] = torch.tensor([0, 1, 2, 0, 1, 5, 6, 7]) + step
    return batch


def steps(name: str, entry: object, model: nn.Module, rank: int, world: int, after: object = None) -> list[Tensor]:
    """The losses of STEPS steps of SGD on this rank's share of the batch."""
    found = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        share = 8 // world
        batch = {key: value[rank * share : (rank + 1) * share] for key, value in batch_of(model, step).items()}
        progress = Progress(step, STEPS, epoch=0.5)
        model.before_step(progress)
        losses = entry(batch, progress)
        found.append(torch.stack([losses[key] for key in CONTRASTS[name]]).detach())
        total = sum(losses[key] for key in CONTRASTS[name])
        (total + 0 * losses["itm"]).backward()  # DistributedDataParallel wants every parameter used
        if after is not None:
            after()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    return found


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def check_equal(folder: Path, name: str, strategy: str, rank: int, world: int) -> None:
    expected = torch.load(folder / f"{name}.pt", weights_only=True)
    model = setup_model(name)
    if strategy == "fsdp":  # as train.compile=block, with a backend that needs no compiler
        for block in blocks(model):
            block.compile(backend="aot_eager")
    spread = Spread(model, TrainConfig(strategy=strategy), World(rank, world))
    spread.begin_stage()
    found = steps(name, lambda *a: spread("__call__", *a), model, rank, world, lambda: spread.finish(averaged=True))
    found = torch.stack(found)
    dist.all_reduce(found)
    torch.testing.assert_close(found / world, torch.stack(expected["losses"]), atol=1e-4, rtol=1e-4)
    state = {key: whole(tensor) for key, tensor in model.state_dict().items()}
    torch.testing.assert_close(state, expected["state"], atol=2e-4, rtol=1e-3)


def reference(folder: Path, name: str) -> None:
    model = setup_model(name)
    losses = steps(name, model, model, 0, 1)
    assert not torch.equal(losses[0], losses[-1])
    torch.save({"losses": losses, "state": model.state_dict()}, folder / f"{name}.pt")


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    for name in CONTRASTS:
        reference(tmp_path, name)
    run(2, tmp_path, [partial(check_equal, tmp_path, name, "ddp") for name in CONTRASTS])


def test_two_processes_with_parts_of_the_parameters_and_compiled_blocks_are_one(tmp_path: Path) -> None:
    reference(tmp_path, "tcl")
    run(2, tmp_path, [partial(check_equal, tmp_path, "tcl", "fsdp")])
