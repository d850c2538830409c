"""Contrast with momentum features: of the whole batch, and of a queue that is read where it lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.contrastive import pair_distill, pair_logsumexp

_SPARE = 256  # rows that take what has no place, so that not all of it is added up in one


def queue_contrastive_loss(
    x: Tensor,
    keys: Tensor,
    queue: Tensor,
    scale: Tensor,
    *,
    own: int = 0,
    teacher: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    ids: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The mean over rows i of the cross-entropy of S_i = scale * <x_i, [keys; queue]> against

        (1 - alpha) p_i + alpha softmax(scale * <teacher_i, [keys; queue]>)

    where p_i is one at the row's own key, i + own, or with ids the same share for each of the keys and queue rows that have the
    row's id. On one rank, without ids, this is one direction of vlpfast.ops.contrastive.distilled_contrastive_loss; with the keys
    of all ranks the mean over ranks is the loss of the whole batch. Nothing of the size rows x queue is made, the queue is not
    copied, and with alpha = 0 and single positives a loss near zero keeps its digits.

    Args:
        x: [n, D] float32, this rank's online features.
        keys: [N, D] momentum features of all ranks, constants like queue [K, D] and teacher [n, D].
        scale: 0-d > 0, one over the temperature; its gradient is made (the teacher's is a constant).
        own: this rank's first row in keys.
        teacher: None: no soft targets, alpha is not used.
        ids: int64 of the rows [n], of the keys [N], of the queue [K]; keys[own + i] has the id of row i.

    Returns 0-d float32 (float64 for float64 features).

    Li et al. 2021, "Align before fuse", equation 6; Yang et al. 2022, "Vision-language pre-training with triple contrastive
    learning", equations 1 to 3; several positives as in both papers' code for retrieval.
    """
    mine = keys[own : own + x.shape[0]]  # [n, D]
    # Of a loss near zero the rounding of the own logits would be all of the error: in double.
    own_logit = scale * (x.double() * mine.double()).sum(1)  # [n]
    if teacher is None:
        near = pair_logsumexp(x, keys, scale, own=own, directions="rows", stash_bytes=0)
        far = pair_logsumexp(x, queue, scale, own=None, directions="rows", stash_bytes=0)
        student = torch.logaddexp(near, far - own_logit)
        loss = F.softplus(student, threshold=40)
    else:
        scale_t = scale.detach()
        near = pair_distill(x, keys, teacher, keys, scale, scale_t, own=own)
        far = pair_distill(x, queue, teacher, queue, scale, scale_t, own=None)
        student = torch.logaddexp(near.student, far.student - own_logit)
        beside = far.teacher - scale_t * (teacher.double() * mine.double()).sum(1)
        whole = torch.logaddexp(near.teacher, beside)
        # The teacher's mean of S - S_own, over the keys and over the queue, each by its share of the teacher's sum.
        cross = (near.teacher - whole).exp() * near.cross + (beside - whole).exp() * (far.cross - own_logit)
        loss = F.softplus(student, threshold=40) - alpha * whole.sigmoid() * cross
    if ids is not None:
        # Targets enter linearly: the own key's logit is replaced by the positives' mean.
        gap = scale * (x * (mine - mean_of_equal_id(ids[0], (ids[1], keys), (ids[2], queue)))).sum(1)
        loss = loss + (gap if teacher is None else (1 - alpha) * gap)
    return loss.mean().to(scale.dtype)


def mean_of_equal_id(ids: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """For each of ids [n] the mean [n, D] of the rows of all parts (ids [N] int64, values [N, D]) that have it; 0: there is none.

    Reads each part once and copies none; no shape depends on ids, so a GPU is not waited for.
    """
    if not ids.shape[0]:
        return parts[0][1].new_zeros(0, parts[0][1].shape[1])
    ordered = ids.sort().values
    width, dtype = parts[0][1].shape[1], parts[0][1].dtype
    sums = torch.zeros(len(ids) + _SPARE, width, dtype=dtype, device=ids.device)
    counts = torch.zeros(len(ids) + _SPARE, dtype=dtype, device=ids.device)
    for part_ids, values in parts:
        place = torch.searchsorted(ordered, part_ids.contiguous()).clamp(max=len(ids) - 1)
        spare = len(ids) + torch.arange(len(part_ids), device=ids.device) % _SPARE
        row = torch.where(ordered[place] == part_ids, place, spare)
        sums = sums.index_add(0, row, values)
        counts = counts.index_add(0, row, torch.ones_like(part_ids, dtype=dtype))
    place = torch.searchsorted(ordered, ids.contiguous())
    return sums[place] / counts[place].clamp(min=1)[:, None]
