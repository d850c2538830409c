"""Losses of a vocabulary, with a momentum teacher's soft targets: masked language models, answers."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn.momentum import ranks
from vlpfast.ops import debug
from vlpfast.ops.contrastive import pair_distill
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


class VocabularyHead(Protocol):
    """Hidden states to logits: transform(x) @ weight.T + bias."""

    weight: Tensor  # [V, C]
    bias: Tensor  # [V]

    def transform(self, x: Tensor) -> Tensor: ...


def token_losses(
    head: VocabularyHead,
    hidden: Tensor,
    labels: Tensor,
    *,
    teacher: tuple[VocabularyHead, Tensor] | None = None,
    alpha: Tensor | float = 0.0,
    max_rows: int | None = None,
    stash_bytes: int = 2**32,
) -> Tensor:
    """Each token's cross-entropy against (1 - alpha) one-hot(label) + alpha softmax(the teacher's logits).

    Tokens under -100 pass neither the head nor the vocabulary, and no logits are held (but see stash_bytes).

    Args:
        hidden: [..., C], what the head takes.
        labels: [...] int64 in [0, V) or -100.
        teacher: its head and its hidden states [..., C], constants; None: alpha is not used.
        max_rows: as many rows are computed, whatever the labels, so that nothing waits for a GPU: at least as many as labels has
            tokens to keep, or all losses are NaN (on the host: ValueError). None: all of them.
        stash_bytes: see `pair_distill`.

    Returns [...] float32, 0 under -100. Li et al. 2021, "Align before fuse", equation 7.
    """
    asked = labels.flatten() != -100
    rows = labels.numel() if max_rows is None else min(max_rows, labels.numel())
    if debug.readable(labels) and int(asked.sum()) > rows:
        raise ValueError(f"max_rows: expected at least {int(asked.sum())}, as many as labels has tokens to keep, got {rows}")
    index = (~asked).byte().argsort(stable=True)[:rows]  # [R] the asked ones first
    kept = asked[index]
    own = torch.where(kept, labels.flatten()[index], 0)
    h = head.transform(hidden.flatten(0, -2)[index])  # [R, C]
    if teacher is None:
        losses = linear_cross_entropy(
            h, head.weight, own, bias=head.bias, reduction="none", max_rows=None, stash_bytes=stash_bytes
        )
    else:
        with torch.no_grad():
            head_t, hidden_t = teacher
            h_t = head_t.transform(hidden_t.flatten(0, -2)[index])
        x, y = _with_bias(h, head.weight, head.bias)
        found = pair_distill(
            x, y, h_t, head_t.weight, 1.0, 1.0, own=own, bias_t=head_t.bias, stash_bytes=stash_bytes
        )
        losses = F.softplus(found.student, threshold=40) - alpha * found.teacher.sigmoid() * found.cross
    losses = torch.where(kept, losses, 0) * torch.where(asked.sum() > rows, torch.nan, 1.0)
    return torch.zeros(labels.numel(), dtype=losses.dtype, device=losses.device).index_copy(0, index, losses).view_as(labels)


def masked_lm_loss(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean of `token_losses` over the asked tokens; of several ranks the mean over ranks is that over all their tokens."""
    count = (labels != -100).sum().float()
    _, world = ranks()
    if world > 1:
        dist.all_reduce(count)
        count = count / world
    return losses.sum() / torch.where(count == 0, 1, count)


def _with_bias(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C + 8] and [V, C + 8], whose products have the bias in them: as what a half type holds of it, and the remainder."""
    device = h.device.type
    half = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    dtype = torch.get_autocast_dtype(device) if half else weight.dtype
    high = bias.to(dtype).to(bias.dtype)
    low = (bias - high).detach()  # the gradient goes through the other part alone
    more = F.pad(torch.stack((high, low), 1), (0, 6))  # [V, 8]
    return F.pad(F.pad(h, (0, 2), value=1.0), (0, 6)), torch.cat((weight, more.to(weight.dtype)), 1)
