"""What is freed in a step is there for the next."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from vlpfast.training.memory import keep_freed_memory

def step():
    parts = [torch.ones(3_000_000 + 100_000 * i) for i in range(8)]  # 12 MB and more each
    return sum(part.sum() for part in parts)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for glibc")
def test_steps_ask_the_system_for_nothing() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "as it is")
    }
    assert faults["keep"] * 10 < faults["as it is"], faults
