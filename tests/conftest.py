import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run here, slowly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        waits = pytest.mark.skip(reason="waits for a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(waits)
