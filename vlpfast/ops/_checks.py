"""Argument checks that several families of operators share: before dispatch, on real and fake tensors alike.

Values on a device, and of whole matrices, are looked at under VLPFAST_DEBUG=1 alone (vlpfast/ops/debug.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlpfast.ops import debug

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def check_tensor(name: str, value: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], length: int | None) -> None:
    """`length`: of a vector; None: a 0-d tensor is expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {value.dtype}")
    if value.ndim != (0 if length is None else 1) or (length is not None and value.shape[0] != length):
        expected = "a 0-d tensor" if length is None else f"a vector of length {length}"
        raise ValueError(f"{name}: expected {expected}, got {value.ndim} dimensions and {value.numel()} elements")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} as x has, got {value.device}")


def check_count(name: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name}: expected >= {least}, got {count}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_stash_bytes(stash_bytes: Any) -> None:
    if isinstance(stash_bytes, bool) or not isinstance(stash_bytes, int):
        raise TypeError(f"stash_bytes: expected an int, got {type(stash_bytes).__name__}")
    if stash_bytes < 0:
        raise ValueError(f"stash_bytes: expected >= 0, got {stash_bytes}")


def check_mask(name: str, mask: Any, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}")
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"{name}: expected device {tokens.device} as the tokens have, got {mask.device}")


def check_cu_seqlens(name: str, cu_seqlens: Any, tokens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: expected a vector of one number more than there are sets, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"{name}: expected device {tokens.device} as the tokens have, got {cu_seqlens.device}")
    if not debug.readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens.shape[0]:
        raise ValueError(f"{name}: expected numbers from 0 to {tokens.shape[0]} tokens, got {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{name}: expected numbers that never fall, got {int(cu_seqlens.diff().min())} as a length")
