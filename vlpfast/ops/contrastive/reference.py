"""The definition of the contrastive operators in plain torch: dense, any device, gradients of any order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype


def pair_logsumexp(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias: Tensor | None = None,  # [] or [N]
) -> tuple[Tensor, Tensor]:
    """rows [M] and cols [N] as the public function of this name defines them; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    if bias is not None:
        logits = logits + bias.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: stays out of the sums
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    if own is None:
        kept = logits.masked_fill(out, -torch.inf)
        return kept.logsumexp(1), kept.logsumexp(0)
    row = torch.arange(x.shape[0], device=x.device)
    column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
    out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
    kept = logits.masked_fill(out, -torch.inf)
    own_logits = logits[row, column]  # [M]
    own_of_column = torch.zeros_like(logits[:1].sum(0)).index_put((column,), own_logits)  # [N] 0 where a column is no row's own
    return kept.logsumexp(1) - own_logits, kept.logsumexp(0) - own_of_column


def pair_softplus(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias: Tensor | None = None,  # [] or [N]
    negative_weight: float = 1.0,
) -> Tensor:
    """The 0-d sum that the public function of this name defines; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    if bias is not None:
        logits = logits + bias.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: no negative
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    own_loss = logits.new_zeros(())
    if own is not None:
        row = torch.arange(x.shape[0], device=x.device)
        column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
        out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
        own_loss = -F.logsigmoid(logits[row, column]).sum()
    return own_loss - negative_weight * F.logsigmoid(-logits).masked_fill(out, 0).sum()


def sample_hard_negatives(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    count: int,
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    uniform: float = 0.0,
    seed: Tensor,  # [] int64
) -> Tensor:
    """The columns [M, count] that the public function of this name draws; keys in float64 whatever the features' dtype.

    Gumbel-top-k: the `count` largest of log(p_j) + gumbel_j are draws from p without replacement, in their order. A sum of two
    probabilities needs no sum: of two keys with Gumbels of their own the larger is a key of the sum. So the part that is uniform
    has keys apart from the softmax's, and a kernel needs the softmax's normaliser only after it has seen all columns.
    """
    m, n = x.shape[0], y.shape[0]
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    logits = torch.where(logits.isnan(), torch.inf, logits).double()
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: not drawn
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    if own is not None:
        row = torch.arange(m, device=x.device)
        column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
        out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
    keys = logits + gumbel(random_bits(m, n, 0, seed))
    if uniform:  # the softmax is over all columns, own ones and those left out too
        normaliser = logits.logsumexp(1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)  # finite where all are -inf
        keys = torch.where(logits == torch.inf, logits, keys - normaliser)
        keys = keys.maximum(math.log(uniform) + gumbel(random_bits(m, n, 1, seed)))
    keys, columns = keys.masked_fill(out, -torch.inf).sort(dim=1, descending=True, stable=True)  # of equal keys the lowest column
    return F.pad(torch.where(keys > -torch.inf, columns, -1)[:, :count], (0, max(0, count - n)), value=-1)


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel variables of 32 random bits each (int64 in [0, 2^32)), float64.

    -log(-log(1 - v)) with v = (bits + 1/2) / 2^32: from -3.13 to 22.87, never infinite. v is fine where it is small, and small v
    make the large keys, which alone matter: the largest of N keys has a v near 1 / N, known to N / 2^33 of itself.
    """
    return -torch.log(-torch.log1p(-(bits.double() + 0.5) * 2.0**-32))


def random_bits(m: int, n: int, stream: int, seed: Tensor) -> Tensor:
    """[M, N] int64 in [0, 2^32). That of row i and column j is word j % 4 of Philox4x32-10 at the counter (j // 4, i, stream, 0).

    The key is the seed's two halves, the lower one first. Nothing but i, j, stream and seed matters: neither M nor N, nor tiles.
    """
    rows = torch.arange(m, device=seed.device)[:, None].expand(m, (n + 3) // 4)
    columns = torch.arange((n + 3) // 4, device=seed.device).expand_as(rows)
    words = philox(columns, rows, torch.full_like(rows, stream), torch.zeros_like(rows), (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(words, 2).flatten(1)[:, :n]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counters to four random words, all of them 32-bit numbers in int64.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    k0, k1 = key
    for _ in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: all 64 bits are right, the sign is one of them
        c0, c1, c2, c3 = ((q >> 32) & _LOW) ^ c1 ^ k0, q & _LOW, ((p >> 32) & _LOW) ^ c3 ^ k1, p & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


_LOW = 0xFFFFFFFF  # of 64 bits the lower 32


def pair_distill(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    x_t: Tensor,  # [M, E]
    y_t: Tensor,  # [N, E]
    scale: Tensor,  # []
    scale_t: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias_t: Tensor | None = None,  # [] or [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """student, teacher, cross [M] as the public function of this name defines them; float64 in float64, else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    with torch.no_grad():
        logits_t = scale_t.to(dtype) * (x_t.to(dtype) @ y_t.to(dtype).T)
        if bias_t is not None:
            logits_t = logits_t + bias_t.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: stays out of the sums
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    if own is not None:
        row = torch.arange(x.shape[0], device=x.device)
        column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
        out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
        logits, logits_t = (s - s[row, column][:, None] for s in (logits, logits_t))
    kept, kept_t = (s.masked_fill(out, -torch.inf) for s in (logits, logits_t))
    student, teacher = kept.logsumexp(1), kept_t.logsumexp(1)
    lowest = torch.where(teacher == -torch.inf, 0, teacher)[:, None]  # a row with no sum has the softmax 0
    return student, teacher, ((kept_t - lowest).exp() * logits.masked_fill(out, 0)).sum(1)
