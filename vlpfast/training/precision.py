"""Which device a run is on and in which precision its products are made."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from vlpfast.types import UserError


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. UserError: no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device: {name!r} asked for, {torch.cuda.device_count()} CUDA devices are here")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products have instructions of their own: elsewhere they are emulated and several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether forwards run under bf16 autocast. Parameters, gradients and the optimiser stay float32 either way."""
    fast = has_fast_bfloat16(device)
    if precision == "bf16" and not fast:
        warnings.warn(f"train.precision=bf16: this {device.type} has no bf16 instructions; fp32 will be faster", stacklevel=2)
    return precision == "bf16" or (precision == "auto" and fast)
