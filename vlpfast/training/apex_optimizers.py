"""NVIDIA apex's fused Adam and LAMB under the conventions of this package: a found_inf flag, step counts kept in the state."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

CLASSES = {"adamw": "FusedAdam", "lamb": "FusedLAMB"}


def find_apex(optimizer: str) -> type[torch.optim.Optimizer] | None:
    """apex's class for the optimiser of that name, known by its modules: the package called apex on PyPI is another one."""
    if optimizer not in CLASSES:
        return None
    try:
        found = getattr(importlib.import_module("apex.optimizers"), CLASSES[optimizer], None)
        # Without its CUDA extension the classes are there and cannot be made.
        applier = getattr(importlib.import_module("apex.multi_tensor_apply"), "multi_tensor_applier", None)
    except ImportError:
        return None
    return found if getattr(applier, "available", False) else None


def build_apex(
    optimizer: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """optimizer: adamw or lamb, and find_apex has found it. Each group carries its weight_decay."""
    base = find_apex(optimizer)
    if optimizer == "adamw":
        return type("ApexAdam", (_Adam, base), {})(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, capturable=True)
    # Clipping has been done by then; every parameter has its quotient, as in the paper and in our LAMB.
    return type("ApexLAMB", (_LAMB, base), {})(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=float("inf"), use_nvlamb=True)


class _Apex:
    """apex counts steps in its groups, which a checkpoint does not keep: they are also written into the state, as torch does."""

    found_inf: Tensor | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    def stored_step(self, group: dict[str, Any]) -> Tensor:
        found = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {})]
        return found[0] if found else torch.zeros(())

    def store_step(self, group: dict[str, Any], step: Tensor) -> None:
        for parameter in group["params"]:
            if self.state.get(parameter):
                self.state[parameter]["step"] = step


class _Adam(_Apex):
    """Capturable: rate, step and flag are read on the device, and nothing waits."""

    def step(self, closure: None = None) -> None:
        device = self.param_groups[0]["params"][0].device
        flag = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        for group in self.param_groups:
            group["lr"] = torch.full((), float(group["lr"]), device=device)
            if "step" not in group:
                group["step"] = self.stored_step(group).reshape(1).to(device, torch.int32)
        self._dummy_overflow_buf.copy_(flag)  # apex counts the step by the flag of the step before otherwise
        super().step(grad_scaler=_Flag(flag))
        for group in self.param_groups:
            self.store_step(group, group["step"].reshape(()).float())


class _Flag:
    """What FusedAdam asks of a GradScaler: the flag by device, and a scale, which is 1 because gradients come unscaled."""

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.flag.device: self.flag}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.flag)


class _LAMB(_Apex):
    """Its kernels read no flag and take the step count from the host: a step waits for the flag."""

    def step(self, closure: None = None) -> None:
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            if "step" not in group:
                group["step"] = int(self.stored_step(group))
        super().step()
        for group in self.param_groups:
            self.store_step(group, torch.tensor(float(group["step"])))
