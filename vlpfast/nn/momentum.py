"""What contrast with a momentum teacher keeps between steps: slow copies of modules, queues of their features."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlpfast.types import UserError

# the new and the old name, neither in a torch that was built without torch.distributed
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Momentum(nn.Module):
    """A copy of a module that follows it: after each `update`, w_m <- m w_m + (1 - m) w.

    Its parameters need no gradient and are moved by nothing else; call it under torch.no_grad. It is in training mode where the
    model is, so that its dropout acts (TCL's only augmentation of texts). Tied weights stay tied, buffers are copied at each
    update. He et al. 2020, "Momentum contrast for unsupervised visual representation learning", equation 2.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float) -> None:
        """module: what this is a copy of; its parameters may have become FSDP2's."""
        # Looked up each time: what spreads a model over ranks puts other parameters into it.
        own, followed = _local(self.module.parameters()), _local(module.parameters())
        torch._foreach_lerp_(own, followed, 1 - momentum)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    def forward(self, *arguments: object, **named: object) -> object:
        return self.module(*arguments, **named)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of a parameter that is spread over ranks this rank's part: the copy is spread alike."""
    return [tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]


class FeatureQueue(nn.Module):
    """The newest `size` rows of several kinds of features, each in a ring buffer [size, width], all with one write pointer.

    The buffers are attributes of the names in `widths`, row-major, so that a loss reads them where they lie. They begin with
    random unit vectors, and `ids` [size], with_ids, with -100, which is nobody's id. Everything is in the state dict.
    """

    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, widths: dict[str, int], *, with_ids: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"queue_size: expected at least 1, got {size}")
        self.size, self.names, self.with_ids = size, tuple(widths), with_ids
        for name, width in widths.items():
            self.register_buffer(name, F.normalize(torch.randn(size, width), dim=1))
        if with_ids:
            self.register_buffer("ids", torch.full((size,), -100))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, ids: Tensor | None = None, **features: Tensor) -> None:
        """The whole batch's features, [N, width] for each name, in place of the oldest N rows. Waits for no device.

        features are this rank's, [n, width], and so are ids, [n] int64: they are gathered, in the order of ranks.
        UserError: N does not divide the size, so that a batch would be cut in two, or a row be written before it is read once.
        """
        if set(features) != set(self.names):
            raise ValueError(f"features: expected {', '.join(self.names)}, got {', '.join(features)}")
        if (ids is not None) != self.with_ids:
            raise ValueError(f"ids: expected {'int64 [n]' if self.with_ids else 'None'}, got {'None' if ids is None else 'some'}")
        rows = {name: gather(value.to(getattr(self, name).dtype)) for name, value in features.items()}
        count = len(rows[self.names[0]])
        if count == 0 or self.size % count:
            raise UserError(f"queue_size: expected a multiple of the {count} samples of a batch of all ranks, got {self.size}")
        place = (self.pointer + torch.arange(count, device=self.pointer.device)) % self.size
        for name, value in rows.items():
            getattr(self, name).index_copy_(0, place, value)
        if ids is not None:
            self.ids.index_copy_(0, place, gather(ids))
        self.pointer.add_(count).remainder_(self.size)


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; without a process group 0 and 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(rows: Tensor) -> Tensor:
    """[n, ...] of each rank, n the same on all -> [N, ...] in the order of ranks, without a gradient."""
    _, world = ranks()
    if world == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
    _all_gather(gathered, rows)
    return gathered
