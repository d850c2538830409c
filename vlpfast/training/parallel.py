"""Many processes: who they are, what they tell each other, and how a model is spread over them.

Every rank trains on its share of the batch; losses are written so that their mean over ranks is the loss of the whole batch
(vlpfast/ops/contrastive/distributed.py), and gradients are averaged: N processes equal one with the whole batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import getmembers, isfunction, signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlpfast.training.config import TrainConfig
from vlpfast.training.precision import choose_device
from vlpfast.training.timing import BlockWaits, LastGradient
from vlpfast.training.together import on_first
from vlpfast.types import UserError

T = TypeVar("T")

BUCKET_MIB = 25  # of gradients that travel together: large enough for the network, small enough to overlap with the backward


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them. Without torchrun: one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Samples of a global batch that are this rank's."""
        if batch_size % self.size:
            raise UserError(f"train.batch_size: expected a multiple of the {self.size} ranks, got {batch_size}")
        return batch_size // self.size

    def mean(self, values: Tensor) -> Tensor:
        """Over ranks; where one is not finite, not finite on all."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def in_turn(self, make: Callable[[], T]) -> T:
        """make() on the first rank, then on all others: files that it leaves are there for them. Raises on all or on none."""
        made: list[T] = []
        on_first(lambda: made.append(make()))
        return made[0] if self.is_first else make()


@contextmanager
def joined(train: TrainConfig) -> Iterator[World]:
    """The world that torchrun (or a SLURM script with the same environment variables) has set up, left at the end.

    UserError: no such device for this rank, the port is in use, the others do not come.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(device=choose_device(train.device))
        return
    rank, size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = choose_device(train.device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=train.timeout_minutes)
    try:
        store = None
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's own store may still hold where the processes of the attempt before were to be found.
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"rank {rank} of {size} cannot meet the others at {where}: {str(error).splitlines()[0]}") from error
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


# --- a model on many ranks --------------------------------------------------------------------------------------------


class _Entry(nn.Module):
    """The one module through which a spread model is entered, by calls of any of its methods.

    FSDP2 and DistributedDataParallel look into what a module is given: fields of a batch that are to stay on the host would be
    sent to the GPU, and features that no loss uses would get gradients of zero. They do not look into a call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class Spread:
    """A model prepared as `train` asks for and spread over the ranks of a world.

    train.strategy "ddp" keeps everything on every rank (DistributedDataParallel), "fsdp" a part of each block's parameters,
    gradients and optimiser state (FSDP2's fully_shard). Optimisers, averages of weights and checkpoints see the model's own
    parameters, in float32 and under their own names.

    FSDP2's parameters travel and are used in the dtype of the products, those of norms, biases and embeddings too; gradients are
    summed over ranks in float32, and nothing is cast where a block is entered: torchtitan's policy. Half the bytes travel, and
    forwards, those of an evaluation too, see rounded weights; what blocks add up is of that dtype unless something else that
    enters them is float32. Parameters without dimensions (temperatures), which FSDP2 does not take, stay on every rank in
    float32, and their gradients are averaged here.

    A trained parameter may be without a gradient, as on one rank: a head or a tower that a stage does not use, a loss of weight
    0. DistributedDataParallel has to look through every step's graph for it, so it does only where the first step of a stage,
    which is taken without it, shows that it must (`unused`). What has a gradient on some ranks or in some steps alone needs
    train.find_unused, unless the first step shows it. FSDP2 wants every rank to use the same parameters.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, world: World, dtype: torch.dtype | None = None) -> None:
        """dtype: of the products, as autocast_dtype gives it; None: float32."""
        self.model, self.train, self.world, self.dtype = model, train, world, dtype
        repeated = blocks(model)
        for asked, key in (
            (train.activation_checkpointing, "activation_checkpointing"),
            (train.compile == "block", "compile=block"),
        ):
            if asked and not repeated:
                raise UserError(f"train.{key}: {type(model).__name__} has no repeated blocks (a ModuleList of two or more alike)")
        if train.compile == "step" and train.micro_batch:
            raise UserError(
                "train.compile=step compiles the forward of a whole batch, which train.micro_batch divides: use block"
            )
        if train.activation_checkpointing:
            for block in repeated:
                _recompute(block)
        if train.compile == "block":
            for block in repeated:
                block.compile()
        elif train.compile == "step":
            model.compile()
        self.unused: list[str] = []  # trained parameters that had no gradient on some rank in the first step of this stage (ddp)
        self._entry: nn.Module | None = _Entry(model)
        self._replicated: list[nn.Parameter] = []  # whose gradients are averaged here
        self._first = self._finds = False  # ddp: before the end of a stage's first step; looks for what has no gradient
        self._sharded = world.size > 1 and train.strategy == "fsdp"
        self._trained: dict[str, nn.Parameter] = {}  # of this stage, from the end of its first step on (ddp)
        if world.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                values = tensor.data.contiguous()  # gloo sends no other
                dist.broadcast(values, src=0)
                if not tensor.is_contiguous():
                    tensor.data.copy_(values)
        if self._sharded:
            self._shard(repeated)

    def begin_stage(self) -> None:
        """Once it is settled which parameters are trained."""
        if self.world.size > 1 and not self._sharded:
            self._first, self._entry, self.unused = True, None, []

    def waits(self) -> LastGradient | None:
        """What tells, for this stage, which time of a step is communication. Closed by the caller; None of one rank."""
        if self.world.size == 1:
            return None
        if not self._sharded:
            return LastGradient(self.model.parameters(), self.world.device)
        from torch.distributed.fsdp import FSDPModule

        return BlockWaits([module for module in self._entry.modules() if isinstance(module, FSDPModule)], self.world.device)

    def __call__(self, method: str, *arguments: Any) -> Any:
        """The model's method; its backward averages the gradients, or finish() does."""
        if self._first:
            return self.unaveraged(method, *arguments)
        if self._entry is None:
            self._entry = self._replicate()
        return self._entry(functools.partial(getattr(self.model, method), *arguments))

    def _replicate(self) -> nn.Module:
        parallel = nn.parallel.DistributedDataParallel
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(parallel).parameters else "broadcast_buffers"
        return parallel(
            _Entry(self.model),
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            bucket_cap_mb=BUCKET_MIB,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._finds,
            **{buffers: False},  # forward changes none; the second is the first's name in older versions
        )

    def unaveraged(self, method: str, *arguments: Any) -> Any:
        """The model's method; its backward only adds to the gradients, which a later one averages (FSDP2) or finish() does."""
        call = functools.partial(getattr(self.model, method), *arguments)
        return self._entry(call) if self._sharded else call()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, backwards do not travel."""
        if self._sharded:
            self._entry.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self._entry.set_requires_gradient_sync(True)
        else:
            yield

    def finish(self, averaged: bool) -> None:
        """After the last backward of a step. averaged: it went through __call__.

        UserError (ddp): a parameter is without a gradient that had one in the first step of the stage.
        """
        if self.world.size == 1:
            return
        if self._sharded:
            _average([parameter for parameter in self._replicated if parameter.grad is not None], self.world)
            return
        if self._first:
            self._trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        trained = self._trained
        without = {name for name, parameter in trained.items() if parameter.grad is None}
        if without and not (self._first or self._finds):
            raise UserError(
                f"{min(without)} has no gradient in this step, and had one in the first of the stage: set train.find_unused=true"
            )
        if averaged and not self._first:
            return
        if self._first or self._finds:
            ranks = _ranks_with(name not in without for name in trained)
            for parameter, count in zip(trained.values(), ranks, strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self._first:
                self.unused = [name for name, count in zip(trained, ranks, strict=True) if count < self.world.size]
                self._first, self._finds = False, self.train.find_unused or bool(self.unused)
        _average([parameter for parameter in trained.values() if parameter.grad is not None], self.world)

    def about_unused(self) -> str:
        names = ", ".join(self.unused[:3]) + (", ..." if len(self.unused) > 3 else "")
        return f"no gradient for {len(self.unused)} trained parameters ({names}); listed under `frozen`, they cost no search"

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, methods of the model itself may be called, by all ranks equally often, without gradients. Where its parameters
        are those of FSDP2 in half precision they run under autocast, as in training; what calls them does not."""
        if not self._sharded:
            yield
            return
        with torch.no_grad():
            self._entry(lambda: None)  # FSDP2 learns at the first entry which module is the outermost
        self._entry.unshard()
        own, names = vars(self.model), [name for name, _ in getmembers(type(self.model), isfunction)]
        names = [name for name in names if self.dtype is not None and (name == "forward" or not hasattr(nn.Module, name))]
        before = {name: own[name] for name in names if name in own}
        own.update({name: self._cast(getattr(self.model, name)) for name in names})
        try:
            yield
        finally:
            for name in names:
                del own[name]
            own.update(before)
            self._entry.reshard()

    def _cast(self, method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def casting(*arguments: Any, **named: Any) -> T:
            with torch.autocast(self.world.device.type, dtype=self.dtype):
                return method(*arguments, **named)

        return casting

    def _shard(self, repeated: list[nn.Module]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._replicated = [parameter for parameter in self.model.parameters() if parameter.ndim == 0]
        half = self.dtype is not None
        if half and self.world.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, nn.LayerNorm) and module.weight is not None:
                    _take_float32(module)
        how: dict[str, Any] = {
            "mesh": init_device_mesh(self.world.device.type, (self.world.size,)),
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32 if half else None, cast_forward_inputs=False),
            "ignored_params": set(self._replicated),
        }
        for block in repeated:
            fully_shard(block, **how)
        self._entry = fully_shard(_Entry(self.model), **how)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What a network is a stack of: the members of every ModuleList of two or more modules of one class that have parameters."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(member) for member in module}) == 1:
            found += [member for member in module if any(True for _ in member.parameters())]
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    return [block for block in found if id(block) not in inner]


def _recompute(block: nn.Module) -> None:
    """The block's activations are made again in the backward. Names of parameters stay as they are."""
    forward = block.forward

    @functools.wraps(forward)
    def recomputing(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    block.forward = recomputing


def _take_float32(norm: nn.LayerNorm) -> None:
    """Where its input is float32 the norm is made in it, as autocast does on a GPU. A CPU's kernel refuses narrower weights."""
    forward = norm.forward

    @functools.wraps(forward)
    def widening(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return forward(x)
        weight, bias = (None if parameter is None else parameter.float() for parameter in (norm.weight, norm.bias))
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    norm.forward = widening


def _average(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Gradients to their mean over ranks, in buckets that are on their way together. All ranks give the same parameters."""
    on_way: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = []

    def send(bucket: list[nn.Parameter]) -> None:
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
        on_way.append((dist.all_reduce(flat, async_op=True), flat, bucket))

    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or _mib(bucket) >= BUCKET_MIB):
            send(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        send(bucket)
    for work, flat, sent in on_way:
        work.wait()
        flat /= world.size
        for parameter, part in zip(sent, flat.split([parameter.numel() for parameter in sent]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def _ranks_with(here: Iterable[bool]) -> list[int]:
    """For each flag the number of ranks on which it is set; through host memory, so that no GPU is waited for."""
    flags = torch.tensor(list(here), dtype=torch.int32)
    dist.all_reduce(flags)
    return flags.tolist()


def _mib(parameters: list[nn.Parameter]) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20
