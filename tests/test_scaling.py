"""The formulas of benchmarks/scaling.py against the collectives of real steps over gloo, and docs/scaling.md against both."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends
from vlpfast.ops.contrastive import sharded_clip_loss, sharded_sigmoid_loss
from vlpfast.ops.maxsim import sharded_filip_loss
from vlpfast.training import feature_cache
from vlpfast.training.config import TrainConfig
from vlpfast.training.optim import gradient_norm
from vlpfast.training.parallel import Spread, World, blocks
from vlpfast.training.timing import LastGradient, Marks

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

SCRIPT = Path(__file__).parents[1] / "benchmarks/scaling.py"
_spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
scaling = importlib.util.module_from_spec(_spec)
sys.modules["scaling"] = scaling  # dataclasses look their module up
_spec.loader.exec_module(scaling)

WIDTH, TOKENS, SAMPLES = 6, 3, 4
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}


class Traffic(TorchDispatchMode):
    """Payload in bytes by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            kind, place = KINDS[func._schema.name.removeprefix("c10d::")]  # another one is a finding
            tensors = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            self.payload[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def expected(name: str, setting: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one in scaling.TRAFFIC[name](setting):
        found[one.kind] += one.payload
    return dict(found)


def setting(world: int, item: int = 4, **more: Any) -> Any:
    return scaling.Setting(world, samples=SAMPLES, width=WIDTH, tokens=TOKENS, item=item, **more)


def features(*shape: int, dtype: torch.dtype) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype).requires_grad_()


def losses(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    for dtype in (torch.float32, torch.bfloat16):
        sizes = [SAMPLES] * world
        pair = [features(SAMPLES, WIDTH, dtype=dtype) for _ in range(2)]
        sets = features(SAMPLES, 5, WIDTH, dtype=dtype), features(SAMPLES, TOKENS, WIDTH, dtype=dtype)
        calls = {
            "sharded_clip_loss": lambda pair=pair, sizes=sizes: sharded_clip_loss(*pair, 10.0, sizes=sizes),
            "sharded_sigmoid_loss": lambda pair=pair, sizes=sizes: sharded_sigmoid_loss(*pair, 10.0, None, sizes=sizes),
            "sharded_filip_loss": lambda sets=sets, sizes=sizes: sharded_filip_loss(*sets, 10.0, sizes=sizes),
        }
        for name, call in calls.items():
            with Traffic() as traffic:
                call().backward()
            assert dict(traffic.payload) == expected(name, setting(world, dtype.itemsize)), (name, dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Towers(nn.Module):
    """Two blocks and a head for both sides. All first dimensions can be divided by 2 and by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, WIDTH)

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: nn.functional.normalize(self._tower(batch[name]), dim=-1) for name in ("image", "text")}

    def contrast(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [len(made["image"])] * dist.get_world_size()
        return {"contrastive": sharded_clip_loss(made["image"], made["text"], 10.0, sizes=sizes)}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self._tower(batch["image"]).square().mean()

    def _tower(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def towers(strategy: str, world: int, rank: int, dtype: torch.dtype | None = None) -> tuple[Towers, Spread, Any]:
    torch.manual_seed(0)
    model = Towers()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    whole = sum(p.numel() for p in model.parameters())
    spread = Spread(model, TrainConfig(strategy=strategy), World(rank, world), dtype)
    spread.begin_stage()
    about = setting(world, parameters=whole, in_blocks=sum(sizes), largest_block=max(sizes))
    return model, spread, replace(about, weight_item=(dtype or torch.float32).itemsize)


def strategies(rank: int, world: int) -> None:
    batch = {name: torch.randn(SAMPLES, 12) for name in ("image", "text")}
    for strategy, name, dtype in (
        ("ddp", "DDP", None),
        ("ddp", "DDP", torch.bfloat16),
        ("fsdp", "FSDP2", None),
        ("fsdp", "FSDP2", torch.bfloat16),
        ("fsdp", "FSDP2", torch.float16),
    ):
        model, spread, about = towers(strategy, world, rank, dtype)
        for counts in (False, False, False, True):  # DDP's first step is another, in the next two it tells of its buckets
            with Traffic() if counts else nullcontext() as traffic:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = spread("__call__", batch)
                loss.backward()
                spread.finish(averaged=True)
            model.zero_grad(set_to_none=True)
        assert dict(traffic.payload) == expected(name, about), (name, dtype)
        if strategy == "fsdp":
            here = sum(p.to_local().numel() for p in model.parameters())
            assert 4 * scaling.WIDE * here == scaling.states(about) / world


def cached(rank: int, world: int) -> None:
    batch = {name: torch.randn(SAMPLES, 12) for name in ("image", "text")}
    found = []
    for part in (1, 2):
        model, spread, about = towers("ddp", world, rank)
        for counts in (False, True):  # the first step tells which parameters have gradients
            with Traffic() if counts else nullcontext() as traffic:
                feature_cache.backward(spread, batch, part, lambda losses: losses["contrastive"], nullcontext)
                spread.finish(averaged=False)
            assert float(gradient_norm(model, 0.0)) > 0
            model.zero_grad(set_to_none=True)
        found.append(dict(traffic.payload))
    assert found == [expected("GradCache with sharded_clip_loss and DDP", about)] * 2


class Late(torch.autograd.Function):
    """Its backward takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        time.sleep(ctx.seconds)
        return grad, None


def a_rank_waits_for_the_late_one(rank: int, world: int) -> None:
    """vlpfast/training/timing.py: whose time it is."""
    model = nn.Linear(4, 4)
    spread = nn.parallel.DistributedDataParallel(model)
    last = LastGradient(model.parameters(), torch.device("cpu"))
    for _ in range(2):  # the second counts: both ranks have set up by then
        dist.barrier()
        marks = Marks(torch.device("cpu"), last)
        out = Late.apply(spread(torch.ones(2, 4)), 0.3 * rank).sum()
        marks.passed("forward")
        out.backward()
        marks.passed("backward")
    found = [None, None]
    dist.all_gather_object(found, marks.seconds())
    early, late = found
    assert early["communication"] > 0.2 and early["backward"] < 0.15, found
    assert late["communication"] < 0.15 and late["backward"] > 0.29, found


class LateBlock(Block):
    """`late`: seconds that its forward and its backward take longer."""

    late = (0.0, 0.0)

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        return self.rest(super().forward(x + context))

    @torch.compiler.disable
    def rest(self, x: Tensor) -> Tensor:
        time.sleep(self.late[0])
        return Late.apply(x, self.late[1])


class LateTower(nn.Module):
    """Parameters before, in and after two blocks; those before them get their gradients last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 1)
        self.blocks = nn.ModuleList([LateBlock(), LateBlock()])
        self.late = 0.0  # seconds that the backward of `first` takes longer

    def forward(self, x: Tensor) -> Tensor:
        x = context = Late.apply(self.first(x), self.late)
        for block in self.blocks:
            x = block(x, context=context)
        return self.last(x).sum()

    encode = forward


def fsdp_waits_for_the_late_rank(rank: int, world: int) -> None:
    """Wherever that is, the early rank's time is communication, and the late one's is its own."""
    for compiled in (False, True):
        model = LateTower()
        x = torch.ones(3, 12, requires_grad=True)
        spread = Spread(model, TrainConfig(strategy="fsdp"), World(rank, world))
        if compiled:
            for block in model.blocks:
                block.compile(backend="eager")
        waits = spread.waits()

        def step(model: LateTower = model, spread: Spread = spread, waits: Any = waits, x: Tensor = x) -> list[dict[str, float]]:
            """The parts of a step, of both ranks."""
            dist.barrier()
            marks = Marks(torch.device("cpu"), waits)
            loss = spread("__call__", x)
            marks.passed("forward")
            loss.backward()
            marks.passed("backward")
            model.zero_grad(set_to_none=True)
            found: list[Any] = [None, None]
            dist.all_gather_object(found, marks.seconds())
            assert min(*found[0].values(), *found[1].values()) > -1e-6, found
            return found

        step(), step()
        first, second = model.blocks
        places: dict[str, tuple[Any, Any]] = {
            "the first block's forward": (first, (0.3, 0.0)),  # before the second one's parameters are gathered
            "the second block's forward": (second, (0.3, 0.0)),  # before those of the first are gathered again
            "the second block's backward": (second, (0.0, 0.3)),
            "the first block's backward": (first, (0.0, 0.3)),
            "the backward before the blocks": (model, 0.3),
            "the first block's backward, the last": (first, (0.0, 0.3)),  # its last gradient comes before it hands them on
        }
        for where in list(places)[:: 3 if compiled else 1]:
            place, late = places[where]
            model.first.requires_grad_("the last" not in where)
            on_time, own = place.late, "forward" if "forward" in where else "backward"
            place.late = late if rank else on_time
            for _ in range(5):  # either rank may be late for reasons of the machine's
                early, slow = step()
                right = early["communication"] > 0.2 and early["forward"] + early["backward"] < 0.15
                if right and slow["communication"] < 0.15 and slow[own] > 0.29:
                    break
            else:
                raise AssertionError((where, early, slow))
            place.late = on_time

        for _ in range(5):
            with spread.gathered(), torch.no_grad():
                first.late = 0.3 * rank, 0.0
                model.encode(x)
                first.late = 0.0, 0.0
            assert waits._spans
            if step()[0]["communication"] < 0.15:  # what was waited for in between is of no step
                break
        else:
            raise AssertionError("an evaluation's waits are counted")
        waits.close()
        step()
        assert not waits._spans


def test_two_ranks(tmp_path: Path) -> None:
    run(2, tmp_path, [losses, strategies, cached, a_rank_waits_for_the_late_one, fsdp_waits_for_the_late_rank])


def test_three_ranks(tmp_path: Path) -> None:
    run(3, tmp_path, [losses])


def test_what_a_rank_sends() -> None:
    assert scaling.Collective("all_reduce", 80).sent(4) == 2 * 60 and scaling.Collective("all_gather", 80).sent(4) == 60
    assert scaling.Collective("all_to_all", 80).sent(1) == 0


def test_memory() -> None:
    assert scaling.MEMORY["sharded_sigmoid_loss"](setting(2)) == 8 * 8 * WIDTH
    s = replace(setting(2), parameters=100, in_blocks=60, largest_block=20, item=2, stash_bytes=100)
    assert scaling.MEMORY["DDP"](s) == 1600
    assert scaling.MEMORY["FSDP2"](s) == 800 + 2 * (40 + 40)
    assert scaling.MEMORY["FSDP2"](replace(s, weight_item=4)) == 800 + 4 * (40 + 40)
    assert scaling.MEMORY["sharded_sigmoid_loss"](s) == 8 * 8 * WIDTH
    assert scaling.MEMORY["sharded_clip_loss"](s) == 8 * 8 * WIDTH + 2 * 4 * 8
    assert scaling.MEMORY["sharded_clip_loss"](replace(s, stash_bytes=10)) == 8 * 8 * WIDTH + 10
    assert scaling.MEMORY["sharded_filip_loss"](s) == 8 * 8 * WIDTH * TOKENS + 100


def test_the_page_is_what_the_script_writes() -> None:
    page = scaling.page()
    assert (SCRIPT.parents[1] / "docs/scaling.md").read_text() == page, "run python benchmarks/scaling.py"
    assert "151,277,313 parameters" in page
