"""The random number generators of a process: seeded, written down, put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from vlpfast.training.together import has_peers


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's, torch's and the GPUs' generators as plain JSON values: of one among several processes its own
    GPU's, which the others see too and do not use."""
    python = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    cuda: list[torch.Tensor] = []
    if torch.cuda.is_available():
        cuda = [torch.cuda.get_rng_state()] if has_peers() else torch.cuda.get_rng_state_all()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in cuda],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if has_peers():
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(_from_hex(state["cuda"][0]))
        return
    # A run that moved to another number of GPUs starts the others from their seeds.
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(cuda), index)


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(bytearray.fromhex(text), dtype=torch.uint8)
