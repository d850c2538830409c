"""An average of the weights over the steps: what is evaluated and exported when train.ema_decay is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlpfast.training.optimizers import average_, local, wide


class WeightAverage:
    """Exponential moving average of the parameters that are trained when it is made; it starts as a copy of them.

        a <- d a + (1 - d) w,   d = min(decay, (1 + t) / (10 + t)) after step t = 0, 1, ...

    The warm-up of d is that of TensorFlow's ExponentialMovingAverage. Averages are float32 under half-precision parameters.
    Frozen parameters and buffers have no average: the model's own values are used.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.averages = {name: p.detach().to(wide(p.dtype), copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, found_inf: Tensor | None = None) -> None:
        """step: counted from 0, skipped ones too. found_inf (0-d float32 on the device) is 1: the averages stay as they are."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = list(self.averages.values())
        weights = [p.to(average.dtype) for p, average in zip(self.parameters.values(), averages, strict=True)]
        average_(averages, weights, share, found_inf)

    def tensors(self) -> dict[str, Tensor]:
        """The averages as a checkpoint names them: ema.NAME, NAME being the parameter's."""
        return {f"ema.{name}": average for name, average in self.averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages within the block, and after it its own weights again, bit for bit."""
        # Copies into the same memory, not other memory: what was compiled, captured or sharded keeps its addresses.
        own = local(parameter.detach() for parameter in self.parameters.values())
        before = [weight.clone() for weight in own]
        try:
            torch._foreach_copy_(own, local(self.averages.values()))
            yield
        finally:
            torch._foreach_copy_(own, before)
