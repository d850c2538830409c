"""Optimisers that skip a step by a flag on the device: Lion, LAMB, SGD; Adafactor, which has to wait for it.

Set `optimizer.found_inf` to a 0-d float32 tensor: where it is 1, the step leaves parameters and state as they are, bit for bit,
as torch's fused AdamW does. torch's fused SGD kernel reads such a flag, and x <- x - lr (u + decay x) is all that is ever done to
a parameter here and, with other names, to a moment: so every write goes through that kernel, one launch for a list of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def descend_(tensors: Sequence[Tensor], updates: Sequence[Tensor], lr: float, decay: float, found_inf: Tensor | None) -> None:
    """x <- x - lr (u + decay x) in place for every pair, unless found_inf (0-d float32 on their device) is 1.

    tensors and updates have the same shapes, one dtype and one device; of DTensors each process writes its own part.
    """
    _sgd_(tensors, updates, (), lr, decay, found_inf)


def average_(averages: Sequence[Tensor], values: Sequence[Tensor], share: float, found_inf: Tensor | None) -> None:
    """a <- a + share (v - a) in place for every pair, unless found_inf is 1. As descend_ otherwise."""
    # Not the kernel's `maximize`: whether that turns the sign of the decay too depends on device and version.
    _sgd_(averages, values, (), -share, -1.0, found_inf)


def _sgd_(
    tensors: Sequence[Tensor],
    updates: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float,
    decay: float,
    found_inf: Tensor | None,
    momentum: float = 0.0,
) -> None:
    torch._fused_sgd_(
        local(tensors), local(updates), local(buffers), weight_decay=decay, momentum=momentum, lr=lr, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False, grad_scale=None, found_inf=found_inf,
    )  # fmt: skip


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each DTensor; other tensors as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are accumulated: float32 for the half precisions, else the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Guarded(torch.optim.Optimizer):
    """What Lion, LAMB and SGD share: moments of float32 (float64 under float64 parameters), half-precision parameters updated in
    float32 and rounded once, parameters without a gradient left out. `update` is called once for each group."""

    found_inf: Tensor | None = None
    moments: tuple[str, ...] = ()  # names of the state tensors that have the parameter's shape

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(self.first_state(parameter))
            weights = [parameter.to(wide(parameter.dtype)) for parameter in parameters]
            grads = [parameter.grad.to(weight.dtype) for parameter, weight in zip(parameters, weights, strict=True)]
            self.update(group, weights, grads, [self.state[parameter] for parameter in parameters])
            rounded = [(p, w) for p, w in zip(parameters, weights, strict=True) if w is not p]
            if rounded:
                torch._foreach_copy_(local(p for p, _ in rounded), local(w for _, w in rounded))

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {key: torch.zeros_like(parameter, dtype=wide(parameter.dtype)) for key in self.moments}

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        raise NotImplementedError


class Lion(Guarded):
    """The sign of an interpolated momentum: Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv 2302.06675,
    algorithm 2. With gradient g, momentum m, parameter x and decay wd:

        x <- x - lr (sign(beta1 m + (1 - beta1) g) + wd x);   m <- beta2 m + (1 - beta2) g

    State: exp_avg. A rate three to ten times smaller than AdamW's, and a decay so much larger, is what the paper advises.
    """

    moments = ("exp_avg",)

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        momentum = [state["exp_avg"] for state in states]
        direction = torch._foreach_lerp(local(momentum), local(grads), 1 - beta1)
        torch._foreach_sign_(direction)
        descend_(weights, direction, group["lr"], group["weight_decay"], self.found_inf)
        average_(momentum, grads, 1 - beta2, self.found_inf)


class LAMB(Guarded):
    """Adam's direction, scaled to each parameter's length: You et al. 2020, "Large batch optimization for deep learning: training
    BERT in 76 minutes", arXiv 1904.00962, algorithm 2 with phi the identity. With c_k = 1 - beta_k^t:

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2;   r = (m / c_1) / (sqrt(v / c_2) + eps) + wd x
        x <- x - lr (|x| / |r|) r, the quotient being 1 where |x| or |r| is 0

    Every parameter has its quotient, biases and norms too, as in the paper (its official code leaves those two out, NVIDIA's
    leaves out what is not decayed). State: exp_avg, exp_avg_sq, step (0-d float32, counting the steps that were not skipped).
    Of DTensors the norms are those of the whole tensors: all of a group must be spread alike, as FSDP2 spreads them. Parameters
    that it leaves out, such as scalars, may be among them.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {**super().first_state(parameter), "step": torch.zeros((), device=parameter.device)}

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        first, second = ([state[key] for state in states] for key in self.moments)
        grads = local(grads)
        average_(first, grads, 1 - beta1, self.found_inf)
        average_(second, torch._foreach_mul(grads, grads), 1 - beta2, self.found_inf)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0 if self.found_inf is None else 1 - self.found_inf)

        root = torch._foreach_div(local(second), _correction(beta2, steps, grads[0].dtype))
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        direction = torch._foreach_div(local(first), _correction(beta1, steps, grads[0].dtype))
        torch._foreach_div_(direction, root)
        torch._foreach_add_(direction, local(weights), alpha=group["weight_decay"])
        length, size = _norms(weights, weights), _norms(direction, weights)
        quotient = torch.where((length > 0) & (size > 0), length / size, 1.0)
        torch._foreach_mul_(direction, list(quotient.to(direction[0].dtype).unbind()))
        descend_(weights, direction, group["lr"], 0.0, self.found_inf)


def _correction(beta: float, steps: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """1 - beta^t for each step count; rounded from float64, where 1 - 0.999 has all its digits."""
    powers = torch._foreach_pow(beta, [step.double() for step in steps])
    return [(1 - power).to(dtype) for power in powers]


def _norms(tensors: list[Tensor], like: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, [len(tensors)]; where `like` is a DTensor, of the whole whose part the tensor is."""
    norms = torch.stack(torch._foreach_norm(local(tensors)))
    spread = [(t.device_mesh, [placement.is_shard() for placement in t.placements]) for t in like if isinstance(t, DTensor)]
    if not spread:
        return norms
    if any(other != spread[0] for other in spread):
        raise ValueError("LAMB: expected all DTensors of a group to be sharded over the same mesh dimensions")
    mesh, sharded = spread[0]
    placements = [Partial() if split else Replicate() for split in sharded]
    whole = DTensor.from_local(norms.square(), mesh, placements).full_tensor().sqrt()  # one collective for all of them
    return torch.stack([a if isinstance(t, DTensor) else b for a, b, t in zip(whole, norms, like, strict=True)])


class SGD(Guarded):
    """Momentum without dampening; the decay is part of the gradient, as in torch: m <- momentum m + g + wd x;  x <- x - lr m.

    torch's own fused SGD leaves uninitialised memory as the momentum if the very first step is skipped, and takes no DTensors.
    State: momentum_buffer; none where momentum is 0.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.moments = ("momentum_buffer",) if momentum else ()  # the kernel takes no buffers without one

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        buffers = [state[key] for state in states for key in self.moments]
        _sgd_(weights, grads, buffers, group["lr"], group["weight_decay"], self.found_inf, group["momentum"])


class Adafactor(torch.optim.Adafactor):
    """torch's (Shazeer and Stern 2018, "Adafactor", arXiv 1804.04235), whose step reads numbers from the device anyway: it waits
    for found_inf too. The step is min(lr, 1 / sqrt(t)) times the parameter's root mean square, and the decay is decoupled.
    """

    found_inf: Tensor | None = None

    def step(self, closure: None = None) -> None:
        found_inf, self.found_inf = self.found_inf, None  # torch's refuses to see one
        if found_inf is None or not found_inf:
            super().step()
