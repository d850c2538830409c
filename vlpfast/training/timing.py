"""Where the time of a step goes, in the device's own time, and the memory it took.

The parts: `data`, the loop waited for the loader; `transfer`, what the loader left on the host went to the device (its own copies
run beside the computation); `forward`, `backward` (with a feature cache they alternate and are one part, `forward and backward`);
`communication`; `optimizer`.

Communication is, with replicated parameters (DDP), the time from the moment when the last gradient is there to the end of the
backward, and what averages gradients and losses after it: what the step waits for, late ranks included. What travels beside the
backward costs nothing and is not in it. What a sharded loss or FSDP2 sends lies within forward and backward, where no clock that
costs nothing can tell it apart: `vlpfast-train --profile` does.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn


class Marks:
    """The moments of one step. Reading a GPU's clock never waits for it; `seconds` does, for the last mark."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passed: list[tuple[str, Any]] = [("", moment(device))]

    def passed(self, part: str) -> None:
        """The part that began at the last mark is over."""
        self._passed.append((part, moment(self._device)))

    def waited(self, last: LastGradient | None) -> None:
        """What has passed since the last gradient (None: not known) of the part that has just ended was communication."""
        if last is not None and last.moment is not None:
            part, end = self._passed.pop()
            self._passed += [(part, last.moment), ("communication", end)]

    def seconds(self) -> dict[str, float]:
        """By part, once the device is past the last mark."""
        if self._device.type == "cuda":
            self._passed[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._passed, self._passed[1:], strict=False):
            took = before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
            found[part] = found.get(part, 0.0) + took
        return found


def moment(device: torch.device) -> Any:
    """Seconds on a CPU, an event on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class LastGradient:
    """The moment at which the last of a model's trained parameters got its gradient. For replicated parameters alone."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.moment: Any | None = None
        self._device = device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._handles = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in trained]

    def _arrived(self, parameter: nn.Parameter) -> None:
        self.moment = moment(self._device)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors have taken on a GPU, the largest resident set of this process on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
