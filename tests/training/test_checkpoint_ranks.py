"""Checkpoints that several processes write and read together, of parameters that FSDP2 has divided among them."""

from __future__ import annotations

import errno
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from toy_run import toy_config

from vlpfast.training import checkpoint, run_folder
from vlpfast.training.saver import Saver
from vlpfast.training.together import on_all, on_first
from vlpfast.types import PeerError, UserError


class Net(nn.Module):
    """Sizes that two and three processes cannot share evenly, a temperature that FSDP2 leaves whole, a queue, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("queue", torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(self.frozen(x)) * self.logit_scale).square().mean()


def built(world: int, seed: int) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net()
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.layers[0])
        fully_shard(model, ignored_params={model.logit_scale})
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)


def trained(world: int, seed: int = 0) -> tuple[Net, torch.optim.AdamW]:
    model, optimizer = built(world, seed)
    for _ in range(3):  # all on the same numbers, so that the temperature stays equal
        model(torch.randn(4, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(torch.randn(4, 6))  # FSDP2 leaves whole parameters behind, as after an evaluation
    return model, optimizer


def whole(model: Net, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in checkpoint.collect(model, optimizer).items()
    }


def save(folder: Path, rank: int, world: int) -> None:
    model, optimizer = trained(world)
    expected = whole(model, optimizer)
    assert world == 1 or isinstance(model.layers[0].weight, DTensor)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
        checkpoint.export(model, folder / "model.safetensors")
    elif world > 1:
        checkpoint.export(model, folder / "nowhere" / "model.safetensors")  # process 0 writes
    state = {"position": {"step": 3}, "processes": on_all(lambda: rank)}
    for name, asynchronous in (("sync", False), ("async", True)):
        saver = Saver(folder / name, keep=2, asynchronous=asynchronous)
        saver.save(3, model, optimizer, state)
        if asynchronous:  # what happens from here on must not reach the file
            state["position"]["step"] = 4
            with torch.no_grad():
                for tensor in checkpoint.collect(model, optimizer).values():
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(7)
        saver.close()
    assert not saver.failed


def read(folder: Path, name: str, rank: int, world: int) -> None:
    model, optimizer = built(world, seed=5)
    path, notes = checkpoint.find_newest(folder / name)
    assert path == folder / name / "step-00000003" and not notes
    checkpoint.load(path, model, optimizer)
    found, expected = whole(model, optimizer), torch.load(folder / "expected.pt", weights_only=True)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(found[key].dtype == expected[key].dtype for key in expected)
    if world > 1:
        assert isinstance(optimizer.state[model.layers[2].weight]["exp_avg"], DTensor)
    model(torch.randn(4, 6)).backward()
    optimizer.step()  # what was loaded can be trained on


def read_weights(folder: Path, rank: int, world: int) -> None:
    model, _ = built(world, seed=5)
    checkpoint.load_weights(folder / "model.safetensors", model)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, expected[f"model.{key}"])


def folder_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_any_number_reads_what_any_other_wrote(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path, "one"), folder_of(tmp_path, "two")
    save(one, 0, 1)
    run(2, folder_of(tmp_path, "reports-2"), [partial(save, two), *readers(one)])
    run(3, folder_of(tmp_path, "reports-3"), readers(two))
    for folder, writers in ((one, 1), (two, 2)):
        for name in ("sync", "async"):
            read(folder, name, 0, 1)
            step = folder / name / "step-00000003"
            parts = sorted(path.name for path in step.glob("*.distcp"))
            assert parts == [f"__{rank}_0.distcp" for rank in range(writers)]
            assert all((step / part).read_bytes() == (folder / "sync" / step.name / part).read_bytes() for part in parts)
            state = json.loads((step / "state.json").read_text())
            assert state["position"] == {"step": 3} and state["processes"] == list(range(writers))
        expected = torch.load(folder / "expected.pt", weights_only=True)
        exported = load_file(folder / "model.safetensors")
        assert set(exported) == {key.removeprefix("model.") for key in expected if key.startswith("model.")}
        assert all(torch.equal(tensor, expected[f"model.{key}"]) for key, tensor in exported.items())
    assert not list(tmp_path.rglob("*.tmp"))


def readers(folder: Path) -> list[Callable[[int, int], None]]:
    return [partial(read, folder, "sync"), partial(read, folder, "async"), partial(read_weights, folder)]


# --- one of them fails --------------------------------------------------------------------------------------------------


@contextmanager
def small_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_at(name: str) -> Iterator[None]:
    """The disk is full when `name` is written."""
    write = checkpoint._write_text

    def refuse(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    checkpoint._write_text = refuse
    try:
        yield
    finally:
        checkpoint._write_text = write


def fails(folder: Path, breaks: Callable[[], Any], where: int, why: str, asynchronous: bool, rank: int, world: int) -> None:
    """Every process learns of it, one says it, nothing is left behind and the next save works."""
    model, optimizer = trained(world)
    saver = Saver(folder / f"{why}-{asynchronous}", keep=9, asynchronous=asynchronous)
    saver.save(1, model, optimizer, {})
    saver.wait()
    expected = f"step-00000002 could not be saved: (process {where}: )?{why}; the earlier checkpoints are untouched"
    with pytest.raises(UserError, match=expected) as caught:
        if rank == where:
            with breaks():
                saver.save(2, model, optimizer, {})
                saver.wait()
        else:
            saver.save(2, model, optimizer, {})
            if asynchronous:
                while not saver.failed:
                    time.sleep(0.001)
            saver.wait()
    assert isinstance(caught.value, PeerError) == (rank != where)
    dist.barrier()
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]
    dist.barrier()
    saver.save(2, model, optimizer, {})
    saver.close()
    found, notes = checkpoint.find_newest(saver.folder)
    assert found.name == "step-00000002" and not notes


def not_shared(folder: Path, rank: int, world: int) -> None:
    model, optimizer = trained(world)
    own = folder / f"disk-of-{rank}"
    with pytest.raises(UserError, match=r"does not find __1_0.distcp of process 1 .* that all machines share"):
        checkpoint.save(own, 1, model, optimizer, {}, keep=2)
    assert not list(own.iterdir())


def bug_in_one(rank: int, world: int) -> None:
    """A mistake of our own is not hidden where it happened, and the others do not wait."""

    def divide() -> float:
        return 1 / (1 - rank)

    with pytest.raises(ZeroDivisionError if rank == 1 else PeerError, match="division by zero"):
        on_all(divide)
    with pytest.raises(ZeroDivisionError if rank == 0 else PeerError, match="division by zero"):
        on_first(lambda: 1 / rank)
    assert on_all(lambda: rank) == list(range(world)) and on_first(lambda: rank) == 0


def one_run_folder(folder: Path, rank: int, world: int) -> None:
    """Process 0 holds it for all; what it finds wrong is told to the others."""
    config = toy_config(folder_of(folder, f"config-{rank}"), f"train.run_dir={folder / 'run'}")
    with run_folder.opened(config) as run_dir:
        assert run_dir == folder / "run" and (run_dir / "config.yaml").exists()
        dist.barrier()
    (folder / "file").touch()
    config.train.run_dir = str(folder / "file")
    with pytest.raises(PeerError if rank else UserError, match="file cannot be used as a folder") as caught:  # noqa: SIM117
        with run_folder.opened(config):
            raise AssertionError("it was opened")
    assert isinstance(caught.value, PeerError) == (rank != 0)


def test_a_failure_of_one_is_told_to_all(tmp_path: Path) -> None:
    cases = [(small_disk, 1, "File too large"), (partial(full_at, "manifest.json"), 0, "No space left on device")]
    checks = [partial(fails, tmp_path, *case, asynchronous) for case in cases for asynchronous in (False, True)]
    checks += [partial(not_shared, tmp_path), bug_in_one, partial(one_run_folder, tmp_path)]
    run(2, folder_of(tmp_path, "reports"), checks)
