"""The definition of selection and random masking in plain torch: any device, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive.reference import philox

# Streams of random bits of one seed; vlpfast/ops/contrastive/reference.py has 0 and 1.
MASK_STREAM, GROUP_STREAM = 2, 3


def select(
    x: Tensor,  # [B, N, C]
    score: Tensor,  # [B, N]
    k: int,
    *,
    protect: int = 0,
    mask: Tensor | None = None,  # [B, N] bool, True: keep
    by_score: bool = False,
    fuse: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """kept [B, protect + k (+ 1), C] and indices [B, protect + k] as the public function of this name defines them."""
    key = score.detach()[:, protect:]
    last = key.isnan().long()  # 0: by score, 1: after all scores, 2: after these too
    if mask is not None:
        last = torch.where(mask[:, protect:], last, 2)
    key = torch.where(last > 0, -torch.inf, torch.where(key == 0, 0, key))  # one zero: no sort may tell -0 from it
    ranked = key.sort(dim=1, descending=True, stable=True).indices
    ranked = ranked.gather(1, last.gather(1, ranked).sort(dim=1, stable=True).indices)
    chosen = ranked[:, :k] if by_score else ranked[:, :k].sort(dim=1).values
    first = torch.arange(protect, device=x.device).expand(x.shape[0], -1)
    indices = torch.cat([first, chosen + protect], 1)
    kept = gather_rows(x, indices)
    if not fuse:
        return kept, indices
    rest = torch.ones_like(score, dtype=torch.bool).scatter(1, indices, False)
    if mask is not None:
        rest = rest & mask
    dtype = accumulate_dtype(x.dtype)
    weights = torch.where(rest, score, 0).to(dtype)
    # what is not fused may hold anything: a product of NaN and 0 would reach the sum
    fused = (weights[..., None] * torch.where(rest[..., None], x, 0).to(dtype)).sum(1, keepdim=True)
    if normalize:
        total = weights.sum(1)[:, None, None]
        fused = torch.where(total == 0, 0, fused / torch.where(total == 0, 1, total))
    return torch.cat([kept, fused.to(x.dtype)], 1), indices


def gather_rows(x: Tensor, indices: Tensor, fill: Tensor | None = None) -> Tensor:
    """[B, K, C]: rows indices [B, K] of x [B, N, C], `fill` [C] or zeros where the index is -1."""
    there = (indices >= 0)[..., None]
    padded = F.pad(x, (0, 0, 0, 1))  # there may be no row at all
    place = torch.where(indices >= 0, indices, x.shape[1])[..., None].expand(-1, -1, x.shape[2])
    return torch.where(there, padded.gather(1, place), 0 if fill is None else fill.to(x.dtype))


def random_keep(seed: Tensor, batch: int, tokens: int, keep: int, protect: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    """indices [B, protect + keep], inverse [B, tokens]: the smallest random bits stay, of equal ones the first."""
    bits = random_bits(seed, batch, tokens, MASK_STREAM)[:, protect:]
    chosen = bits.sort(dim=1, stable=True).indices[:, :keep] + protect
    if not shuffled:
        chosen = chosen.sort(dim=1).values
    indices = torch.cat([torch.arange(protect, device=seed.device).expand(batch, -1), chosen], 1)
    return indices, invert(indices, tokens)


def invert(indices: Tensor, tokens: int) -> Tensor:
    """[B, tokens]: the place in indices [B, K] of every number below `tokens`, -1 for none; indices of -1 do not count."""
    place = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    nowhere = torch.full((indices.shape[0], tokens + 1), -1, device=indices.device)
    return nowhere.scatter(1, torch.where(indices < 0, tokens, indices), place)[:, :tokens]


def random_bits(seed: Tensor, batch: int, count: int, stream: int) -> Tensor:
    """[B, count] int64 in [0, 2^32). Number j of sample b is word j % 4 of Philox4x32-10 at the counter (j // 4, b, stream, 0).

    The key is the seed's two halves, the lower one first. Where every sample has a seed of its own, [B], b is 0 for all: nothing
    but a sample's seed matters then.
    """
    quads = torch.arange((count + 3) // 4, device=seed.device).expand(batch, -1)
    rows = torch.zeros_like(quads) if seed.ndim else torch.arange(batch, device=seed.device)[:, None].expand_as(quads)
    seed = seed[:, None] if seed.ndim else seed
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = philox(quads, rows, torch.full_like(rows, stream), torch.zeros_like(rows), key)
    return torch.stack(words, 2).flatten(1)[:, :count]
