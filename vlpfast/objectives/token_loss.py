"""Losses over a vocabulary with a momentum teacher's soft targets: masked language models, answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn.bert import MaskedLMHead
from vlpfast.nn.momentum import ranks
from vlpfast.ops.contrastive import pair_distill
from vlpfast.ops.contrastive.pair import STASH_BYTES
from vlpfast.ops.linear_cross_entropy import choose_rows


class Predictor(NamedTuple):
    """What has an opinion about tokens."""

    hidden: Tensor  # [..., C], what the head takes
    head: MaskedLMHead
    weight: Tensor  # [V, C] the token embedding


def token_losses(
    student: Predictor,
    labels: Tensor,
    *,
    teacher: Predictor | None = None,
    alpha: Tensor | float = 0.0,
    max_rows: int | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """Each token's cross-entropy against (1 - alpha) one-hot(label) + alpha softmax(the teacher's logits).

    Tokens under -100 pass neither the heads nor the vocabulary.

    Args:
        labels: [...] int64 in [0, V) or -100.
        teacher: constants; None: alpha is not used.
        max_rows: see linear_cross_entropy: as many tokens are computed, so that nothing waits for a GPU.
        stash_bytes: see `pair_distill`, for the computed tokens x V.

    Returns [...] float32, 0 under -100. Li et al. 2021, "Align before fuse", equation 7, with the softmax over the vocabulary.
    """
    if teacher is None:
        options = {"max_rows": max_rows, "stash_bytes": stash_bytes}
        return student.head.loss(student.hidden, labels, student.weight, reduction="none", **options)
    rows = choose_rows(labels, -100, max_rows)
    own = rows.of(labels.flatten())  # [R]
    x = student.head(rows.of(student.hidden.flatten(0, -2)))  # [R, C]
    with torch.no_grad():
        x_t = teacher.head(rows.of(teacher.hidden.flatten(0, -2)))
    if rows.kept is not None:
        own = torch.where(rows.kept, own, 0)
    found = pair_distill(
        *_with_bias(x, student.weight, student.head.bias), x_t, teacher.weight, 1.0, 1.0,
        own=own, bias_t=teacher.head.bias, stash_bytes=stash_bytes,
    )  # fmt: skip
    losses = F.softplus(found.student, threshold=40) - alpha * found.teacher.sigmoid() * found.cross
    if rows.kept is not None:
        losses = torch.where(rows.kept, losses, 0)
    return rows.valid(rows.back(losses, labels))


def mean_over_asked(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean of `token_losses` over the asked tokens; of several ranks the mean over ranks is that over all their tokens."""
    count = (labels != -100).sum().float()
    _, world = ranks()
    if world > 1:
        dist.all_reduce(count)
        count = count / world
    return losses.sum() / torch.where(count == 0, 1, count)


def asked_rows(labels: Tensor, rate: float) -> int:
    """max_rows for texts of which a share `rate` is masked, token by token: that more are is as good as impossible."""
    return min(labels.numel(), int(2 * rate * labels.numel()) + 32)


def _with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C + 8] and [V, C + 8], whose products have the bias in them: what a half type holds of it, and the remainder."""
    device = x.device.type
    half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    high = bias.to(torch.get_autocast_dtype(device) if half else weight.dtype).to(bias.dtype)
    low = (bias - high).detach()  # the gradient goes through the other part alone
    more = F.pad(torch.stack((high, low), 1), (0, 6))  # [V, 8]
    return F.pad(F.pad(x, (0, 2), value=1.0), (0, 6)), torch.cat((weight, more.to(weight.dtype)), 1)
