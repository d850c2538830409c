"""Scores of pairs of token sets by other rules than the largest product: the best k, XTR, attention, one-to-one assignment.

All pairs [M, N] are scored in pieces and the pieces made again in the backward, so that nothing of the size of all products of
tokens is held. Plain torch, in the accumulating dtype: half types are converted, not multiplied in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from vlpfast.ops._checks import check_choice, check_count, check_flag
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._parts import common_dtype
from vlpfast.ops.maxsim._checks import check_sets, check_tokens
from vlpfast.ops.maxsim.assignment import assignment
from vlpfast.ops.maxsim.maxsim import unit_tokens

CHUNK_BYTES = 1 << 26


def topk_mean_sim(
    x: Tensor,
    y: Tensor,
    k: int | float,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    normalize: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The mean over the tokens of x of the mean of the k largest products of each with the tokens of y: [M, N].

        score[m, n] = mean (or sum) over kept p of the mean of the k largest <x[m, p], y[n, t]> over kept t

    With k = 1 it is `maxsim`'s x_to_y, with all of them the mean of all products. For the other direction exchange the sides and
    transpose. The gradient goes to the k best in equal shares, on ties to the lowest indices.

    Args:
        x, y: [M, P, D] and [N, T, D]; dtypes, masks, reduction and normalize as in `maxsim`.
        k: a number of tokens (of all there are, where a set has fewer), or a float in (0, 1]: that share of the set's kept
            tokens, rounded up.
        chunk_bytes: the products of so many bytes are made at a time (at least those of one pair), and some copies of them.

    Returns:
        [M, N] float32 (float64 for float64 tokens); 0, without gradient, for pairs with a set without kept tokens.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    ConceptCLIP's local score takes the best 128 of 729 patches: Nie et al. 2025.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    _check_k("k", k)

    def weights(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        best = _best(similarity.masked_fill(~columns[:, :, None], -math.inf), columns, k)
        best = best & rows[..., None] & columns[:, :, None]
        count = best.sum(-1, keepdim=True)
        if reduction == "mean":
            count = count * rows.sum(-1)[..., None, None]
        return best / count.clamp(min=1).to(similarity.dtype)

    return _weighted(x, y, x_mask, y_mask, weights, normalize, chunk_bytes)


def xtr_sim(
    x: Tensor,
    y: Tensor,
    k: int,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """XTR's score of queries and the documents of a batch, of whose tokens only those count that a query token retrieves: [M, N].

        score[m, n] = sum over p of max over t in R[m, p] of n of <x[m, p], y[n, t]>, over the number of p that have one there

    R[m, p] are the k kept tokens of all documents together that are nearest to x[m, p], on ties those of the lowest index;
    negative products among them count as they are. The gradient goes to the winners, on ties to the lowest index.

    Args:
        x, y: [M, P, D] and [N, T, D]; dtypes, masks and normalize as in `maxsim`.
        k: of all tokens in y.
        chunk_bytes: see `topk_mean_sim`; here the least is the products of one of x with all of y.

    Returns:
        [M, N] float32 (float64 for float64 tokens); 0, without gradient, for a pair of which nothing is retrieved.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Lee et al. 2023, "Rethinking the role of token retrieval in multi-vector retrieval".
    """
    check_count("k", k, 1)

    def weights(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        m, n, p, t = similarity.shape
        kept = similarity.masked_fill(~columns[:, :, None], -math.inf)
        together = kept.transpose(1, 2).reshape(m, 1, p, n * t)  # of one x token all y tokens
        retrieved = _best(together, columns.reshape(1, 1, n * t), k).reshape(m, p, n, t).transpose(1, 2)
        retrieved = retrieved & rows[..., None] & columns[:, :, None]
        first = _best(kept.masked_fill(~retrieved, -math.inf), columns, 1) & retrieved
        return first / first.sum((2, 3), keepdim=True).clamp(min=1).to(similarity.dtype)

    return _weighted(x, y, x_mask, y_mask, weights, normalize, chunk_bytes, whole=True)


def assignment_sim(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    method: Literal["sinkhorn", "exact"] = "sinkhorn",
    eps: float = 0.05,
    iterations: int = 20,
    reduction: Literal["mean", "sum"] = "mean",
    normalize: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The mean over the tokens of y (words) of their products with tokens of x (patches) matched one-to-one: [M, N].

        score[m, n] = mean (or sum) over kept t of sum over p of plan[p, t] <x[m, p], y[n, t]>

    exact: the plan of 0 and 1 with the largest sum in which no token occurs twice; all tokens of the side with fewer are matched.
    sinkhorn: the plan with the largest sum plus eps times its entropy in which each token of the side with fewer has mass 1 and
    each of the other side at most 1, after `iterations` rounds in the logarithmic domain; 0 rounds bound one side alone, which
    for small eps is `maxsim`'s y_to_x. Plans are constants to the gradient: it is the plan itself, on ties of exact ones one of
    them.

    Args:
        x, y: [M, P, D] and [N, T, D]; dtypes, masks and normalize as in `maxsim`. Tokens of y that find no partner because x has
            fewer add 0 to the mean.
        eps: > 0, in units of the products. iterations: of both sides.
        reduction: "mean" over the kept tokens of y, or their "sum".
        chunk_bytes: see `topk_mean_sim`.

    Returns:
        [M, N] float32 (float64 for float64 tokens); 0, without gradient, for pairs with a set without kept tokens. NaN for
        pairs with a product that is not finite.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    exact solves M * N problems on the host, in C++ on as many threads as torch has, in the backward again; for tokens on a GPU
    it waits for them.

    Cuturi 2013, "Sinkhorn distances"; bounded masses: Chizat et al. 2018, "Scaling algorithms for unbalanced optimal transport
    problems"; Nie et al. 2023, "LightCLIP: learning multi-level interaction for lightweight vision-language models".
    """
    check_choice("method", method, ("sinkhorn", "exact"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_count("iterations", iterations, 0)
    _check_positive("eps", eps)

    def weights(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        exact = method == "exact"
        plan = assignment(similarity, rows, columns) if exact else _sinkhorn(similarity, rows, columns, eps, iterations)
        return plan / columns.sum(-1).clamp(min=1)[..., None, None] if reduction == "mean" else plan

    return _weighted(x, y, x_mask, y_mask, weights, normalize, chunk_bytes)


def attention_sim(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    temp1: float = 4.0,
    temp2: float | None = 5.0,
    double_softmax: bool = False,
    top_k: int | float | None = None,
    normalize: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """GLoRIA's local score: each token of x (a word) against what it attends to among the tokens of y (regions): [M, N].

        c[m, n, p] = sum over kept t of softmax_t(temp1 * <x[m, p], y[n, t]>) y[n, t]
        score[m, n] = log sum over kept p of exp(temp2 * cos(x[m, p], c[m, n, p]))

    What GLoRIA calls temp3 is the scale of the loss: score_contrastive_loss(s, s, temp3).

    Args:
        x, y: [M, P, D] and [N, T, D]; dtypes, masks and normalize (which GLoRIA's descendants do first) as in `maxsim`.
        temp1: multiplies what the attention is the softmax of; 0 gives the mean.
        temp2: multiplies the cosines; None: the score is their mean over p instead, as in SimCroP.
        double_softmax: the softmax over t is of temp1 * softmax_p(<x[m, p], y[n, t]>) over kept p, as in GLoRIA's code: tokens
            of x compete for those of y first.
        top_k: attend to the tokens with the k largest products alone, by number or by share (see `topk_mean_sim`).
        chunk_bytes: products and attended features of so many bytes are made at a time, and some copies of them.

    Returns:
        [M, N] float32 (float64 for float64 tokens); 0, without gradient, for pairs with a set without kept tokens. A zero vector
        has cosine 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Huang et al. 2021, "GLoRIA: a multimodal global-local representation learning framework".
    """
    check_flag("double_softmax", double_softmax)
    for name, value in (("temp1", temp1), ("temp2", temp2)):
        if name == "temp1" or value is not None:
            _check_positive(name, value, zero=name == "temp1")
    if top_k is not None:
        _check_k("top_k", top_k)

    def score(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, grad: Tensor | None) -> Any:
        return _attention(x, y, x_mask, y_mask, temp1, temp2, double_softmax, top_k, grad)

    return _score(x, y, x_mask, y_mask, score, normalize, chunk_bytes, attended=True)


# --- pieces -----------------------------------------------------------------------------------------------------------

# From x [m, P, D], y [n, T, D] and masks [m, P], [n, T] to scores [m, n]; with their gradient, to those of x and y.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Any]
# From products [m, n, P, T] and masks [m, 1, P], [1, n, T] to weights [m, n, P, T], constants to the gradient.
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Pieces(torch.autograd.Function):
    """Scores of all pairs, a piece at a time; the backward makes each piece again and adds up in the order of the pieces."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, score: Score, steps: tuple[int, int]) -> Tensor:
        rows = [
            torch.cat([score(x[a], y[b], x_mask[a], y_mask[b], None) for b in _slices(y.shape[0], steps[1])], 1)
            for a in _slices(x.shape[0], steps[0])
        ]
        return torch.cat(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.score, ctx.steps = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *_Gradient.apply(grad, *ctx.saved_tensors, ctx.score, ctx.steps), None, None, None, None


class _Gradient(torch.autograd.Function):
    """A step of its own in the graph: a second derivative meets an error, never one that takes the weights for constants."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(grad, x, y, x_mask, y_mask, score: Score, steps: tuple[int, int]) -> tuple[Tensor, Tensor]:
        dx: list[Tensor] = []
        dy: dict[int, Tensor] = {}
        with torch.autocast(x.device.type, enabled=False):  # a backward may be called where it is on
            for a in _slices(x.shape[0], steps[0]):
                row = None
                for b in _slices(y.shape[0], steps[1]):
                    more_x, more_y = score(x[a], y[b], x_mask[a], y_mask[b], grad[a, b])
                    row = more_x if row is None else row + more_x
                    dy[b.start] = dy[b.start] + more_y if b.start in dy else more_y
                dx.append(row)
        return torch.cat(dx), torch.cat(list(dy.values()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError("topk_mean_sim, xtr_sim, assignment_sim, attention_sim: second derivatives are not made")


def _slices(count: int, step: int) -> Iterator[slice]:
    """At least one, though it be empty."""
    return (slice(start, start + step) for start in range(0, max(1, count), step))


def _score(x, y, x_mask, y_mask, score: Score, normalize, chunk_bytes, *, attended=False, whole=False) -> Tensor:
    """attended: whether features of y are made for every token of x, beside the products; whole: y never comes in pieces."""
    check_flag("normalize", normalize)
    check_count("chunk_bytes", chunk_bytes, 1)
    check_tokens("x", x, x_mask, None, "[M, P, D]")
    check_tokens("y", y, y_mask, None, "[N, T, D]")
    check_sets(x, y, x.shape[0], y.shape[0], "all")
    if normalize:
        x, y = unit_tokens(x), unit_tokens(y)
    x, y = common_dtype(x, y)
    dtype = accumulate_dtype(x.dtype)
    p, width, (n, t) = *x.shape[1:], y.shape[:2]
    pairs = max(1, chunk_bytes // max(1, dtype.itemsize * p * (t + width * attended)))
    columns = max(1, n) if whole else min(max(1, n), pairs)
    with torch.autocast(x.device.type, enabled=False):
        x, x_mask = _prepared(x, x_mask, dtype)
        y, y_mask = _prepared(y, y_mask, dtype)
        return _Pieces.apply(x, y, x_mask, y_mask, score, (max(1, pairs // columns), columns))


def _prepared(tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Masked tokens may hold anything: they become 0, so that their products are."""
    if mask is None:
        return tokens.to(dtype), torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return tokens.to(dtype).masked_fill(~mask[..., None], 0), mask


def _weighted(x, y, x_mask, y_mask, weights: Weights, normalize, chunk_bytes, *, whole=False) -> Tensor:
    """Scores that are sums of products with weights which the gradient takes as they are."""

    def score(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, grad: Tensor | None) -> Any:
        similarity = _products(x, y)
        with torch.no_grad():
            plan = weights(similarity, x_mask[:, None], y_mask[None])
        if grad is None:
            return (plan * similarity).sum((2, 3))  # a product that is NaN makes NaN whatever its weight
        return _to_tokens(grad[..., None, None] * plan, x, y)

    return _score(x, y, x_mask, y_mask, score, normalize, chunk_bytes, whole=whole)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """[m, P, D], [n, T, D] -> [m, n, P, T]"""
    return torch.einsum("mpd,ntd->mnpt", x, y)


def _to_tokens(d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens from those of their products, [m, n, P, T]."""
    return torch.einsum("mnpt,ntd->mpd", d, y), torch.einsum("mnpt,mpd->ntd", d, x)


def _best(similarity: Tensor, columns: Tensor, k: int | float) -> Tensor:
    """Where the k largest of each row are, bool [m, n, P, T]; columns [1, n, T]: what a share is of, the others are -inf."""
    length = similarity.shape[-1]
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    if isinstance(k, int):
        taken = torch.arange(length, device=order.device) < k
    else:  # in float64: 0.1 * 30 has to be 3, rounded up
        share = (columns.sum(-1)[..., None, None].double() * k - 1e-9).ceil()
        taken = torch.arange(length, device=order.device) < share
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(-1, order, taken.expand(order.shape))


def _sinkhorn(similarity: Tensor, rows: Tensor, columns: Tensor, eps: float, iterations: int) -> Tensor:
    """The entropic plan: f and g are the logarithms of what scales its columns and rows."""
    there = rows[..., None] & columns[:, :, None]  # [m, n, P, T]
    logits = (similarity / eps).masked_fill(~there, -math.inf)
    fewer_rows = (rows.sum(-1) < columns.sum(-1))[..., None, None]  # [m, n, 1, 1] then rows have mass 1, else columns
    rows, columns = rows[..., None], columns[:, :, None]
    f, g = logits.new_zeros(()), logits.new_zeros(())
    for i in range(iterations + 1):
        whole = -(logits + g).logsumexp(2, keepdim=True)
        bounded = whole.clamp(max=0) if i else 0
        f = torch.where(columns, torch.where(fewer_rows, bounded, whole), 0)  # [m, n, 1, T]
        whole = -(logits + f).logsumexp(3, keepdim=True)
        bounded = whole.clamp(max=0) if i < iterations else g
        g = torch.where(rows, torch.where(fewer_rows, whole, bounded), 0)  # [m, n, P, 1]
    return (logits + f + g).exp().masked_fill(~there, 0)


def _attention(x, y, x_mask, y_mask, temp1, temp2, double_softmax, top_k, grad: Tensor | None) -> Any:
    rows, columns = x_mask[:, None], y_mask[None]  # [m, 1, P], [1, n, T]
    attends = columns[:, :, None]  # [1, n, 1, T]
    products = _products(x, y)  # [m, n, P, T]
    competing = products
    if double_softmax:
        # a column without any kept row is NaN; what is NaN here is masked there
        competing = products.masked_fill(~rows[..., None], -math.inf).softmax(2).masked_fill(~rows[..., None], 0)
    if top_k is not None:
        attends = attends & _best(products.masked_fill(~attends, -math.inf), columns, top_k)
    attention = (temp1 * competing).masked_fill(~attends, -math.inf).softmax(3).masked_fill(~attends, 0)
    attended = torch.einsum("mnpt,ntd->mnpd", attention, y)
    x_square, square = x.square().sum(-1)[:, None], attended.square().sum(-1)  # [m, 1, P], [m, n, P]
    x_over, over = (torch.where(s > 0, 1 / s.where(s > 0, 1), 0) for s in (x_square, square))
    lengths = (x_over * over).sqrt()
    cosine = (attention * products).sum(-1) * lengths  # [m, n, P]
    there = (rows & columns.any(-1, keepdim=True)).expand(cosine.shape)
    some = there.any(-1)  # [m, n]
    count = there.sum(-1).clamp(min=1)
    if grad is None:
        if temp2 is None:
            return torch.where(there, cosine, 0).sum(-1) / count
        return torch.where(some, (temp2 * cosine).masked_fill(~there, -math.inf).logsumexp(-1), 0)
    if temp2 is None:
        d = torch.where(there, (grad / count)[..., None], 0)  # [m, n, P] of the cosines
    else:
        d = grad[..., None] * temp2 * (temp2 * cosine).masked_fill(~there, -math.inf).softmax(-1)
        d = torch.where(there, d, 0)
    # cosine = <attention, products> / (|x| |attended|)
    d_dots = (d * lengths)[..., None]
    d_attended = -(d * cosine * over)[..., None] * attended
    d_attention = d_dots * products + torch.einsum("mnpd,ntd->mnpt", d_attended, y)
    d_products = attention * (d_attention - (attention * d_attention).sum(3, keepdim=True)) * temp1
    if double_softmax:
        d_products = competing * (d_products - (competing * d_products).sum(2, keepdim=True))
    dx, dy = _to_tokens(d_products + d_dots * attention, x, y)
    dx = dx - (d * cosine).sum(1)[..., None] * x_over[:, 0, :, None] * x
    return dx, dy + torch.einsum("mnpt,mnpd->ntd", attention, d_attended)


def _check_k(name: str, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise TypeError(f"{name}: expected an int or a float, got {type(k).__name__}")
    if (isinstance(k, int) and k < 1) or (isinstance(k, float) and not 0 < k <= 1):
        raise ValueError(f"{name}: expected an int >= 1 or a float in (0, 1], got {k}")


def _check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name}: expected a finite number {'>= 0' if zero else '> 0'}, got {value}")
