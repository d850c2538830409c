"""Contrastive losses, forward and backward: vlpfast beside the formulations in use, with time, memory and errors.

    python benchmarks/contrastive.py --device cpu            every loss at its full size, float32
    python benchmarks/contrastive.py --device cpu --quick    small sizes, in seconds
    python benchmarks/contrastive.py --subject clip --n 65536 --only "vlpfast, recompute"

Subjects, and the product of matrices that is their unit:
    clip       InfoNCE in both directions, N pairs of width D: [N, D] x [D, N]; "vlpfast, stash" is the default plan
               (stash_bytes = 4 GiB), "recompute" is stash_bytes = 0
    sigmoid    SigLIP's loss, likewise
How time, memory and errors are taken is told in benchmarks/_measure.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import _measure
import torch
import torch.nn.functional as F
from _measure import Formulation, Inputs, Size, Subject
from torch import Tensor

from vlpfast.ops.contrastive import clip_loss, sigmoid_loss


def half_trained(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors as a half-trained model gives them: row i of y is nearest to row i of x."""
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return x, F.normalize(x + 1.5 * F.normalize(torch.randn(n, d, generator=generator), dim=1), dim=1)


def product(x: str, y: str) -> Callable[[Inputs], None]:
    """rows @ columns.T; where the result would have more than 2^30 numbers, slice by slice."""

    def unit(inputs: Inputs) -> None:
        rows, columns = inputs[x], inputs[y]
        for part in rows.split(max(1, 2**30 // max(1, len(columns)))):
            part @ columns.T

    return unit


# --- CLIP -------------------------------------------------------------------------------------------------------------

CLIP_SCALE = 1 / 0.07


def clip_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    x, y = (t.to(device, dtype).requires_grad_() for t in half_trained(size["n"], size["d"]))
    return {"x": x, "y": y, "scale": torch.tensor(CLIP_SCALE, device=device, requires_grad=True)}


def two_matrices(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As open_clip writes it: one matrix of logits for each direction, two cross-entropies."""
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def one_matrix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device)
    logits = scale * x @ y.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_formulations(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast, stash": Formulation(clip_loss, 3),
        "vlpfast, recompute": Formulation(lambda x, y, scale: clip_loss(x, y, scale, stash_bytes=0), 4),
        "open_clip": Formulation(two_matrices, 6),
        "one matrix": Formulation(one_matrix, 3),
    }
    if device == "cuda":
        found["open_clip, compiled"] = Formulation(torch.compile(two_matrices), 6)
        if find_spec("memeff"):
            from memeff import MemoryEfficientCLIPLoss

            loss = MemoryEfficientCLIPLoss(temperature=1 / CLIP_SCALE, normalized_inputs=True, stable=False)
            found["memeff"] = Formulation(lambda x, y, scale: loss(x, y), 4)  # its scale has no gradient
        if find_spec("inf_cl"):
            from inf_cl import cal_flash_loss

            def inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
                return (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2

            found["inf-cl"] = Formulation(inf_cl, 10)
    return found


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def sigmoid_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    scale, bias = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0))
    return clip_inputs(size, dtype, device) | {"scale": scale, "bias": bias}


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As open_clip writes it on one process: labels of 1 and -1 as a matrix."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def sigmoid_formulations(device: str) -> dict[str, Formulation]:
    found = {"vlpfast": Formulation(sigmoid_loss, 3), "open_clip": Formulation(dense_sigmoid, 3)}
    if device == "cuda":
        found["open_clip, compiled"] = Formulation(torch.compile(dense_sigmoid), 3)
    return found


def square(*n: int) -> tuple[Size, ...]:
    return tuple({"n": number, "d": 512} for number in n)


SUBJECTS = {
    "clip": Subject(
        "open_clip",
        clip_inputs,
        clip_formulations,
        {"cpu": square(4096, 8192), "cuda": square(8192, 32768), "quick": square(1024), "small": square(1024)},
        product("x", "y"),
        "products",
        lambda size: 2 * size["n"] ** 2 * size["d"],
        3,
    ),
    "sigmoid": Subject(
        "open_clip",
        sigmoid_inputs,
        sigmoid_formulations,
        {"cpu": square(8192), "cuda": square(32768), "quick": square(1024), "small": square(1024)},
        product("x", "y"),
        "products",
        lambda size: 2 * size["n"] ** 2 * size["d"],
        3,
    ),
}

if __name__ == "__main__":
    _measure.main("contrastive", SUBJECTS, __doc__)
