"""Where the time of a step goes, in the device's own time, and the memory it took.

The parts: `data`, the loop waited for the loader; `transfer`, what the loader left on the host went to the device (its own copies
run beside the computation); `forward`, `backward` (with a feature cache they alternate and are one part, `forward and backward`);
`communication`; `optimizer`.

Communication is what the step waits for, late ranks included: what travels beside the computation costs nothing and is not in it.
With replicated parameters (DDP) it is the time from the moment when the last gradient is there to the end of the backward; with
FSDP2 also the time in which a block's parameters are needed and not yet there, in forward and backward, and in which its
gradients are handed on (see BlockWaits); with both, what averages gradients and losses after the backward. What a sharded loss
sends lies within forward and backward, where no clock that costs nothing can tell it apart: `vlpfast-train --profile` does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

Span = tuple[Any, Any]  # two moments


class Marks:
    """The moments of one step. Reading a GPU's clock never waits for it; `seconds` does, for the last mark."""

    def __init__(self, device: torch.device, waits: LastGradient | None = None) -> None:
        """waits: what tells which time within a part was communication."""
        self._device, self._waits = device, waits
        self._passed: list[tuple[str, Any, list[Span]]] = []
        self.passed("")  # what was waited for before, in an evaluation, is of no step

    def passed(self, part: str) -> None:
        """The part that began at the last mark is over."""
        end = moment(self._device)
        self._passed.append((part, end, [] if self._waits is None else self._waits.until(end)))

    def seconds(self) -> dict[str, float]:
        """By part, once the device is past the last mark."""
        if self._device.type == "cuda":
            self._passed[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before, _), (part, after, spans) in zip(self._passed, self._passed[1:], strict=False):
            waited = sum(self._between(*span) for span in spans)
            found[part] = found.get(part, 0.0) + self._between(before, after) - waited
            if spans:
                found["communication"] = found.get("communication", 0.0) + waited
        return found

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before


def moment(device: torch.device) -> Any:
    """Seconds on a CPU, an event on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class LastGradient:
    """The moment at which the last of some parameters got its gradient: what comes after it is communication."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """Those that are trained."""
        self.moment: Any | None = None
        self._device = device
        self._handles: list[Any] = []
        self._listen(parameters)

    def _listen(self, parameters: Iterable[nn.Parameter]) -> None:
        self._handles += [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters if p.requires_grad]

    def _arrived(self, parameter: nn.Parameter) -> None:
        self.moment = moment(self._device)

    def until(self, end: Any) -> list[Span]:
        """The spans of communication since the last call."""
        begin, self.moment = self.moment, None
        return [] if begin is None else [(begin, end)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class BlockWaits(LastGradient):
    """LastGradient for FSDP2, with the spans that its own hooks take wherever they may wait for other ranks.

    Those before a block's forward and backward: until its parameters are there, with what packs and unpacks them. The one after
    its backward: while its gradients are packed and handed on, and until those of the block before it are on their way. After the
    last gradient: until all have been summed. On a CPU, where collectives block, this is the time within them. On a GPU the
    moments are events of the computing stream, between which it does nothing else; of the streams on which parameters and
    gradients travel, which FSDP2 keeps to itself, nothing is seen but that they are waited for.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """blocks: the modules that fully_shard was applied to. This stage's trained parameters are those that are now."""
        super().__init__((), device)
        self._spans: list[Span] = []
        self._before_last = 0  # spans before the last gradient
        self._begun: Any = None
        self._given: list[Tensor] = []  # what a block was entered with
        self._met: set[nn.Module] = set()
        for block in blocks:
            # FSDP2's hooks are there already: ours are the first and the last.
            self._handles += [
                block.register_forward_pre_hook(self._entering, prepend=True, with_kwargs=True),
                block.register_forward_pre_hook(self._entered, with_kwargs=True),
                block.register_forward_hook(self._leaving, prepend=True),
                block.register_forward_hook(self._left),
            ]

    def until(self, end: Any) -> list[Span]:
        spans, tail = self._spans, super().until(end)
        self._spans = []
        return spans[: self._before_last] + tail if tail else spans

    def _arrived(self, parameter: nn.Parameter) -> None:
        super()._arrived(parameter)
        self._before_last = len(self._spans)

    def _begin(self, *_: Any) -> None:
        self._begun = moment(self._device)

    def _end(self, *_: Any) -> None:
        self._spans.append((self._begun, moment(self._device)))

    @torch.compiler.disable
    def _entering(self, block: nn.Module, arguments: Any, named: Any) -> None:
        self._given = _with_gradient((arguments, named))
        self._begin()

    @torch.compiler.disable
    def _entered(self, block: nn.Module, arguments: Any, named: Any) -> None:
        self._end()
        if block not in self._met:  # its parameters are whole now, those of blocks within it are not
            self._met.add(block)
            self._listen(p for p in block.parameters() if not isinstance(p, DTensor))
        for before, after in zip(self._given, _with_gradient((arguments, named)), strict=False):
            if after is not before:  # all went through one node, whose backward hands the block's gradients on
                after.grad_fn.register_prehook(self._begin)
                after.grad_fn.register_hook(self._end)
                break
        self._given = []

    @torch.compiler.disable
    def _leaving(self, block: nn.Module, arguments: Any, made: Any) -> None:
        for tensor in _with_gradient(made):
            tensor.register_hook(self._begin)

    @torch.compiler.disable
    def _left(self, block: nn.Module, arguments: Any, made: Any) -> None:
        for tensor in _with_gradient(made):
            tensor.register_hook(self._end)


def _with_gradient(tree: Any) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors have taken on a GPU, the largest resident set of this process on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
