"""Contrastive losses, forward and backward: vlpfast beside the formulations in use, with time, memory and errors.

    python benchmarks/contrastive.py --device cpu            every loss at its full size, float32
    python benchmarks/contrastive.py --device cpu --quick    small sizes, in seconds
    python benchmarks/contrastive.py --subject clip --n 65536 --only "vlpfast, recompute"

Subjects, and the product of matrices that is their unit:
    clip       InfoNCE in both directions, N pairs of width D: [N, D] x [D, N]; "vlpfast, stash" is the default plan
               (stash_bytes = 4 GiB), "recompute" is stash_bytes = 0
    sigmoid    SigLIP's loss, likewise
    queue      ALBEF's loss with momentum features, a queue and soft targets: [N, D] x [D, QUEUE], both directions
    tokens     cross-entropy of a language model's head: [N, D] x [D, VOCABULARY]
How time, memory and errors are taken is told in benchmarks/_measure.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import _measure
import torch
import torch.nn.functional as F
from _measure import Formulation, Inputs, Size, Subject
from torch import Tensor

from vlpfast.ops.contrastive import clip_loss, distilled_contrastive_loss, sigmoid_loss
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


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


# --- queue and soft targets -------------------------------------------------------------------------------------------

ALPHA = 0.4


def queue_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    """Features of a batch, of its momentum copies, and two queues: row-major for vlpfast, [D, QUEUE] as ALBEF keeps them."""
    n, d = size["n"], size["d"]
    x, y = half_trained(n, d)
    x_t, y_t = (F.normalize(t + 0.3 * F.normalize(torch.randn_like(t), dim=1), dim=1) for t in (x, y))
    found = {"x": x, "y": y, "x_t": x_t, "y_t": y_t}
    found["x_queue"], found["y_queue"] = half_trained(size["queue"], d, seed=1)
    found |= {f"{name}_columns": found[name].T.contiguous() for name in ("x_queue", "y_queue")}
    found = {name: t.to(device, dtype) for name, t in found.items()}
    found["x"].requires_grad_()
    found["y"].requires_grad_()
    return found | {"scale": torch.tensor(CLIP_SCALE, device=device, requires_grad=True)}


def fused_queue(x, y, x_t, y_t, x_queue, y_queue, scale, **other: Any) -> Tensor:
    return distilled_contrastive_loss(x, y, x_t, y_t, scale, ALPHA, row_negatives=y_queue, col_negatives=x_queue)


def albef(x, y, x_t, y_t, x_queue_columns, y_queue_columns, scale, **other: Any) -> Tensor:
    """As ALBEF writes it: copies of the queues, batch and queue together, four matrices of logits over the temperature."""
    temperature = 1 / scale
    x_all = torch.cat([x_t.T, x_queue_columns.clone().detach()], 1)  # [D, N + QUEUE]
    y_all = torch.cat([y_t.T, y_queue_columns.clone().detach()], 1)
    with torch.no_grad():
        x_logits, y_logits = x_t @ y_all / temperature, y_t @ x_all / temperature
        hard = torch.zeros_like(x_logits).fill_diagonal_(1)
        x_targets = ALPHA * F.softmax(x_logits, dim=1) + (1 - ALPHA) * hard
        y_targets = ALPHA * F.softmax(y_logits, dim=1) + (1 - ALPHA) * hard
    x_loss = -torch.sum(F.log_softmax(x @ y_all / temperature, dim=1) * x_targets, dim=1).mean()
    y_loss = -torch.sum(F.log_softmax(y @ x_all / temperature, dim=1) * y_targets, dim=1).mean()
    return (x_loss + y_loss) / 2


def fewer_passes(x, y, x_t, y_t, x_queue_columns, y_queue_columns, scale, **other: Any) -> Tensor:
    """The same with less to move: no copy of the queues by itself, features scaled instead of logits."""

    def side(x: Tensor, x_t: Tensor, y_t: Tensor, queue: Tensor) -> Tensor:
        every = torch.cat([y_t.T, queue], 1)  # [D, N + QUEUE]
        with torch.no_grad():
            targets = F.softmax(scale * x_t @ every, 1).mul_(ALPHA)
            targets.diagonal().add_(1 - ALPHA)
        return -(F.log_softmax(scale * x @ every, 1) * targets).sum(1).mean()

    return (side(x, x_t, y_t, y_queue_columns) + side(y, y_t, x_t, x_queue_columns)) / 2


def queue_formulations(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast": Formulation(fused_queue, 6),
        "albef": Formulation(albef, 6),
        "eager, fewer passes": Formulation(fewer_passes, 6),
    }
    if device == "cuda":
        found["albef, compiled"] = Formulation(torch.compile(albef), 6)
    return found


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(size["n"], size["d"], generator=generator)
    weight = torch.randn(size["vocabulary"], size["d"], generator=generator) / size["d"] ** 0.5
    labels = torch.randint(size["vocabulary"], (size["n"],), generator=generator)
    return {
        "h": h.to(device, dtype).requires_grad_(),
        "weight": weight.to(device, dtype).requires_grad_(),
        "labels": labels.to(device),
    }


def logits_and_loss(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight), labels)


def token_formulations(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast, stash": Formulation(linear_cross_entropy, 3),
        "vlpfast, recompute": Formulation(lambda h, weight, labels: linear_cross_entropy(h, weight, labels, stash_bytes=0), 4),
        "logits": Formulation(logits_and_loss, 3),
    }
    if device == "cuda":
        found["logits, compiled"] = Formulation(torch.compile(logits_and_loss), 3)
        if find_spec("cut_cross_entropy"):
            from cut_cross_entropy import linear_cross_entropy as cut

            found["cut-cross-entropy"] = Formulation(lambda h, weight, labels: cut(h, weight, labels, filter_eps=None), 4)
        if find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            found["liger-kernel"] = Formulation(lambda h, weight, labels: liger(weight, h, labels), 3)
    return found


def square(*n: int) -> tuple[Size, ...]:
    return tuple({"n": number, "d": 512} for number in n)


def queue(n: int, length: int, d: int) -> tuple[Size, ...]:
    return ({"n": n, "queue": length, "d": d},)


def tokens(n: int, vocabulary: int, d: int) -> tuple[Size, ...]:
    return ({"n": n, "vocabulary": vocabulary, "d": d},)


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
    "queue": Subject(
        "albef",
        queue_inputs,
        queue_formulations,
        {
            "cpu": queue(64, 65536, 256),
            "cuda": queue(64, 65536, 256),
            "quick": queue(64, 4096, 256),
            "small": queue(33, 1021, 256),
        },
        product("x", "y_queue"),
        "products",
        lambda size: 2 * size["n"] * size["queue"] * size["d"],
        6,
    ),
    "tokens": Subject(
        "logits",
        token_inputs,
        token_formulations,
        {
            "cpu": tokens(2048, 32000, 768),
            "cuda": tokens(8192, 32000, 4096),
            "quick": tokens(256, 4000, 256),
            "small": tokens(100, 1000, 256),
        },
        product("h", "weight"),
        "products",
        lambda size: 2 * size["n"] * size["vocabulary"] * size["d"],
        3,
    ),
}

if __name__ == "__main__":
    _measure.main("contrastive", SUBJECTS, __doc__)
