"""Loads the compiled kernels, vlpfast/_C.so. Without it the package works on `reference`, and says so once."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

PATH = Path(__file__).parents[1] / "_C.so"


def load(path: Path) -> str:
    """Registers the kernels of the library at `path` with torch; returns "" or the reason why there are none."""
    if not path.exists():
        return f"{path} was not built (python setup.py build_ext --inplace)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return ""


MISSING = load(PATH)  # "" = the compiled kernels are there

if MISSING and os.environ.get("VLPFAST_BACKEND") != "reference":
    warnings.warn(f"vlpfast runs its operators on the slow `reference` backend: {MISSING}", stacklevel=2)
