"""Which tokens are merged into which: ToMe's bipartite rule, and the sets of tokens that it is used on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_choice, check_count, check_mask
from vlpfast.ops.tokens import reference
from vlpfast.ops.tokens._checks import check_tokens
from vlpfast.ops.tokens.autograd import dense

KERNELS = {"cpp": "cpu"}  # beside `reference`: backend -> device type


class Match(NamedTuple):
    """N tokens that become N - r: what `merge`, `unmerge` and `track` are told. All int64, of fixed shapes."""

    kept: Tensor  # [B, N - r] the tokens that stay, in the order of the output
    source: Tensor  # [B, r] the tokens that are merged into one of these, the most similar first
    index: Tensor  # [B, N] the place of every token in the output


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: int = 1,
    mask: Tensor | None = None,
    order: Literal["position", "score"] = "position",
) -> Match:
    """ToMe's rule: every other token looks for the most similar one among the rest, and the r most similar pairs merge.

    Set A are the tokens at even places, set B those at odd ones. Each of A finds the token of B with the largest cosine (of equal
    ones the first), and the r of A with the largest cosines are merged into what they found (of equal ones the first again).
    Nothing waits for the device, and no gradient goes through the choice.

    Args:
        metric: [B, N, C] float32, float64, bfloat16 or float16; ToMe's are the keys, averaged over heads. Cosines are made in
            float32 (float64); those of zero vectors are 0. Where metric is not finite, cosines count as lower than all others
            (under VLPFAST_DEBUG=1 it is an error).
        r: >= 0; at most (N - protect) // 2 tokens are merged, however large it is. 0: all tokens stay where they are.
        protect: the first so many tokens neither merge nor are merged into: 1 for a class token, 2 for a distillation token
            behind it, which the published code guards so too.
        mask: [B, N] bool, False for padding. Padding is merged only where there are not r pairs of real tokens: first with
            padding, then with whatever is left. Give `merge` a size of 0 for it, and a real token never changes by that.
        order: the output has what remains of A, then B. A is in its own order, or by falling similarity ("score", as published
            for networks without a class token; protect must be 0).

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Bolya et al. 2023, "Token merging: your ViT but faster".
    """
    check_tokens("metric", metric)
    check_count("r", r, 0)
    check_count("protect", protect, 0)
    check_choice("order", order, ("position", "score"))
    if order == "score" and protect:
        raise ValueError(f"order: expected 'position' with protected tokens, whose place would change, got 'score' and {protect}")
    if mask is not None:
        check_mask("mask", mask, metric)
    n = metric.shape[1]
    places = torch.arange(n, device=metric.device)
    r = min(r, max(0, n - protect) // 2)
    return _match(metric, places[::2], places[1::2], r, protect, mask, order == "score")


def kth_match(metric: Tensor, k: int) -> Match:
    """Every k-th token is a destination (places k - 1, 2k - 1, ...), and all others merge into the most similar of them.

    metric: [B, N, C], see `bipartite_match`; 2 <= k <= N. N // k tokens remain. (ToMe's code leaves out the N % k last tokens;
    here they are merged as well.) Bolya et al. 2023; for networks that generate, where merging is undone by `unmerge`.
    """
    check_tokens("metric", metric)
    check_count("k", k, 2)
    n = metric.shape[1]
    if k > n:
        raise ValueError(f"k: expected at most the {n} tokens, got {k}")
    places = torch.arange(n, device=metric.device)
    b = places[k - 1 :: k]
    a = places[: n // k * k].unflatten(0, (-1, k))[:, :-1].flatten()
    return _match(metric, torch.cat((a, places[n // k * k :])), b, n - len(b), 0, None, False)


def random_match_2d(
    metric: Tensor,
    r: int,
    grid: tuple[int, int],
    *,
    cell: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
) -> Match:
    """One random token in each cell of a picture's grid is a destination; of all others the r most similar merge into one.

    Args:
        metric: [B, h * w, C], row by row; see `bipartite_match`.
        r: >= 0; at most the tokens that are no destination. Stable Diffusion's common choice is half of all tokens.
        grid: (h, w). cell: (rows, columns), at most h and w; tokens beyond the last whole cell are no destinations.
        generator: of metric's device; None: torch's own. The choice is the same for all B, and for equal seeds on one device.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Bolya and Hoffman 2023, "Token merging for fast Stable Diffusion".
    """
    check_tokens("metric", metric)
    check_count("r", r, 0)
    for name, pair in (("grid", grid), ("cell", cell)):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"{name}: expected two numbers, got {pair!r}")
        for axis, number in enumerate(pair):
            check_count(f"{name}[{axis}]", number, 1)
    (h, w), (rows, columns) = grid, cell
    n = metric.shape[1]
    if h * w != n:
        raise ValueError(f"grid: expected h * w = {n} tokens, got {h} * {w}")
    if rows > h or columns > w:
        raise ValueError(f"cell: expected at most the grid ({h}, {w}), got ({rows}, {columns})")
    down, across = h // rows, w // columns
    chosen = torch.randint(rows * columns, (down, across), device=metric.device, generator=generator)
    row = torch.arange(down, device=metric.device)[:, None] * rows + chosen // columns
    column = torch.arange(across, device=metric.device) * columns + chosen % columns
    b = (row * w + column).flatten().sort().values
    is_b = torch.zeros(n, dtype=torch.int64, device=metric.device).scatter(0, b, 1)
    a = is_b.argsort(stable=True)[: n - len(b)]
    return _match(metric, a, b, min(r, len(a)), 0, None, False)


@torch.no_grad()
def _match(metric: Tensor, a: Tensor, b: Tensor, r: int, protect: int, mask: Tensor | None, by_score: bool) -> Match:
    batch, n = metric.shape[:2]
    if r == 0:
        places = torch.arange(n, device=metric.device).expand(batch, n)
        return Match(places, places[:, :0], places)
    device = metric.device
    backend = backends.choose("bipartite_match", KERNELS, device, metric.dtype)
    with torch.autocast(device.type, enabled=False):
        if backend == "reference":
            return Match(*reference.match(metric, a, b, r, protect, mask, by_score))
        return Match(*torch.ops.vlpfast.match_tokens(dense(metric), a, b, r, protect, mask, by_score))
