"""When checkpoints are written: at once, or by a thread while the training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from vlpfast.training import checkpoint
from vlpfast.training.together import has_peers

_log = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of a run into `folder`, the newest `keep` of which stay.

    asynchronous: save() returns when the tensors are copied to host memory, and a thread writes them. Memory on the host: one
    copy of this process's part of the model and the optimiser (AdamW: 12 bytes for each trained fp32 parameter), page-locked
    where it comes from a GPU, kept for the next checkpoint. One checkpoint at a time: the next save() waits for it.

    An error of the thread is raised by the next save() or wait(). It is the same in all processes, but they see `failed` at
    different moments: they have to agree on a step before they call wait().
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep = folder, keep
        # Its own group, of gloo: the thread must not mix its messages with those of the training, nor wait for the GPU.
        self._group = dist.new_group(backend="gloo") if has_peers() else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlpfast-checkpoint") if asynchronous else None
        self._saving: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether wait() would raise at once."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See checkpoint.save. Once it returns, what is written no longer depends on model, optimizer and state."""
        self.wait()
        if self._pool is None:
            checkpoint.save(self.folder, step, model, optimizer, state, self.keep, self._group, more)
            return
        tensors, text = checkpoint.collect(model, optimizer, more), checkpoint.encode(step, state)
        self._copies = _copied(tensors, self._copies)
        arguments = (self.folder, step, tensors, text, self.keep, self._group, _FromCopies(self._copies))
        self._saving = self._pool.submit(checkpoint.write, *arguments)

    def wait(self) -> None:
        """Until the checkpoint in flight is on the disk. UserError: it could not be saved; names its step."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits for the checkpoint in flight; for the way out after another error, which a second one must not hide."""
        try:
            self.wait()
        except Exception as error:
            _log.error("%s", error)
        if self._pool is not None:
            self._pool.shutdown()
        self._copies = {}


class _FromCopies(dcp.DefaultSavePlanner):
    """Plans by the live tensors, whose shapes and shards stay as they are, and takes the bytes from copies of the local parts."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


def _copied(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors, or of the parts that this process has of DTensors, on the host; in `buffers` where they fit."""
    copies = {}
    devices = set()
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype or buffer.stride() != local.stride():
            buffer = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda, requires_grad=False)
        copies[name] = buffer.copy_(local.detach(), non_blocking=True)
        if local.is_cuda:
            devices.add(local.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies
