"""The conformance table's rows for tokens: selection, masking, merging between a residual and a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance import OPS, Arguments, Op, mask
from torch import Tensor

from vlpfast.ops import tokens

# --- tokens: selection and masking ------------------------------------------------------------------------------------


def images(b: int, n: int, c: int, **more: Any) -> Arguments:
    """Tokens, and scores from 0.1 to 2.1 for each."""
    generator = torch.Generator().manual_seed(4)
    x, score = torch.randn(b, n, c, generator=generator), 0.1 + 2 * torch.rand(b, n, generator=generator)
    return {"x": x.double(), "score": score.double()} | more


def strided_images(b: int, n: int, c: int, **more: Any) -> Arguments:
    """Channels far apart, from the second image and the third token on; scores of another layout."""
    both = images(n + 2, b + 1, c)
    score = images(n, 3 * b, 1)["score"].T[::3]
    x = both["x"].permute(1, 2, 0).contiguous().permute(0, 2, 1)[1:, 2:]
    assert not x.is_contiguous() and x.storage_offset() and x.stride(2) > 1
    return {"x": x, "score": score} | more


def select_and_weigh(x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What is kept, the fused token so small that its rounding to the tokens' dtype is below the tolerance of float32."""
    kept, indices = tokens.select(x, **arguments)
    weights = torch.ones(kept.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    weights[indices.shape[1] :] = 1e-3
    return kept * weights[:, None], indices


SELECT_CASES: dict[str, Callable[[], Arguments]] = {
    "no image": lambda: images(0, 5, 4, k=2, rest="fuse"),
    "no token": lambda: images(3, 0, 4, k=0, rest="fuse"),
    "no channel": lambda: images(3, 5, 0, k=2, rest="fuse"),
    "one token, kept": lambda: images(3, 1, 4, k=1, rest="fuse"),
    "one token, fused": lambda: images(3, 1, 4, k=0, rest="fuse") | {"score": torch.ones(3, 1)},
    "drop": lambda: images(3, 41, 7, k=13),
    "drop, by score": lambda: images(3, 41, 7, k=13, order="score", protect=2),
    "fuse": lambda: images(5, 197, 67, k=98, rest="fuse", protect=1),
    "fuse, by score": lambda: images(3, 41, 19, k=13, rest="fuse", order="score"),
    "fuse, normalised": lambda: images(3, 41, 33, k=13, rest="fuse", normalize=True, protect=1),
    "fuse, masks": lambda: images(6, 41, 16, k=13, rest="fuse", mask=mask(6, 41)),
    "fuse, masks, normalised": lambda: images(6, 41, 15, k=13, rest="fuse", mask=mask(6, 41), normalize=True, protect=3),
    "protected alone": lambda: images(3, 41, 7, k=0, rest="fuse", protect=20),
    "all": lambda: images(3, 41, 7, k=38, rest="fuse", protect=3),
    "all protected": lambda: images(3, 41, 7, k=0, rest="fuse", protect=41),
    "strided": lambda: strided_images(4, 37, 6, k=11, rest="fuse", protect=1),
    "strided, normalised, masks": lambda: strided_images(
        4, 37, 21, k=11, rest="fuse", normalize=True, order="score", mask=mask(37, 4).T
    ),
    "expanded": lambda: images(1, 37, 20, k=11, rest="fuse") | {"x": images(1, 37, 20)["x"].expand(3, 37, 20),
                                                                "score": images(3, 37, 0)["score"]},
}  # fmt: skip


def random_mask_and_back(x: Tensor, mask_token: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    kept, indices, inverse = tokens.random_mask(x, seed=torch.tensor(7, device=x.device), **arguments)
    return kept, indices, tokens.restore(kept, inverse, mask_token)


def masked_images(b: int, n: int, c: int, **more: Any) -> Arguments:
    both = images(b, n, c)
    return {"x": both["x"], "mask_token": images(1, 1, c)["x"][0, 0], "ratio": 0.75} | more


RANDOM_MASK_CASES: dict[str, Callable[[], Arguments]] = {
    "no image": lambda: masked_images(0, 5, 4),
    "no token": lambda: masked_images(3, 0, 4),
    "no channel": lambda: masked_images(3, 5, 0),
    "one token": lambda: masked_images(3, 1, 4),
    "one token, protected": lambda: masked_images(3, 1, 4, protect=1),
    "197": lambda: masked_images(3, 197, 31, protect=1),
    "in random order": lambda: masked_images(5, 65, 16, order="random", protect=2),
    "nothing masked": lambda: masked_images(3, 64, 5, ratio=0.0, order="random"),
    "everything masked": lambda: masked_images(3, 63, 5, ratio=0.999),
    "many images": lambda: masked_images(35, 9, 33, ratio=0.4),
    "strided": lambda: masked_images(1, 1, 6, x=strided_images(4, 37, 6)["x"]),
    "expanded": lambda: masked_images(1, 1, 7, x=images(1, 30, 7)["x"].expand(4, 30, 7), mask_token=torch.ones(1).expand(7)),
}


# --- tokens: a residual, merging, a norm ------------------------------------------------------------------------------


def residuals(b: int, n: int, c: int, match: tokens.Match | None = None, **more: Any) -> Arguments:
    """Two sets of tokens with the weight and bias of a norm; a third of them merges, by twos and more."""
    generator = torch.Generator().manual_seed(6)
    x, delta = (torch.randn(b, n, c, generator=generator).double() for _ in range(2))
    weight, bias = 0.5 + torch.rand(c, generator=generator).double(), torch.randn(c, generator=generator).double()
    if match is None:
        match = tokens.bipartite_match(torch.randn(b, n, 5, generator=generator), n // 3, protect=min(1, n))
    return {"x": x, "delta": delta, "weight": weight, "bias": bias} | dict(zip(tokens.Match._fields, match, strict=True)) | more


def sizes(b: int, n: int) -> Tensor:
    """Some are 0."""
    size = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) * 3
    return size.masked_fill(size < 0.6, 0).double()


def add_merge_norm(index: Tensor, kept: Tensor, source: Tensor, target: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return tokens.add_merge_norm(match=tokens.Match(index, kept, source, target), **arguments)


def many_to_one(b: int, n: int, every: int) -> tokens.Match:
    return tokens.kth_match(torch.randn(b, n, 4, generator=torch.Generator().manual_seed(2)), every)


ADD_MERGE_NORM_CASES: dict[str, Callable[[], Arguments]] = {
    "no image": lambda: residuals(0, 5, 4),
    "no token": lambda: residuals(3, 0, 4),
    "no channel": lambda: residuals(3, 6, 0),
    "one channel": lambda: residuals(3, 6, 1) | {"weight": None},  # its gradient is rounding alone
    "one token": lambda: residuals(3, 1, 4),
    "nothing merges": lambda: residuals(3, 17, 15, tokens.bipartite_match(torch.randn(3, 17, 4), 0)),
    "15": lambda: residuals(3, 31, 15),
    "16, sizes": lambda: residuals(3, 32, 16, size=sizes(3, 32), mode="weighted"),
    "17, many to one": lambda: residuals(2, 33, 17, many_to_one(2, 33, 7), size=sizes(2, 33), mode="weighted"),
    "all to one, plain mean, sizes": lambda: residuals(2, 13, 33, many_to_one(2, 13, 13), size=sizes(2, 13)),
    "197": lambda: residuals(3, 197, 70, size=sizes(3, 197) + 0.5, mode="weighted", eps=1e-3),
    "no weight, no bias": lambda: residuals(3, 31, 20) | {"weight": None, "bias": None},
    "eps 0": lambda: residuals(3, 31, 20, eps=0.0),
    "strided": lambda: residuals(4, 37, 6, size=sizes(37, 4).T + 0.5, mode="weighted", weight=sizes(6, 2)[:, 1])
    | {"x": strided_images(4, 37, 6)["x"], "delta": images(4, 74, 9)["x"][:, 1::2, 3:]},
    "expanded": lambda: residuals(1, 37, 20) | {"x": images(1, 1, 20)["x"].expand(3, 37, 20),
                                                "delta": images(1, 37, 20)["x"].expand(3, 37, 20),
                                                **dict(zip(tokens.Match._fields, many_to_one(3, 37, 3), strict=True))},
}  # fmt: skip
OPS |= {
    "add_merge_norm": Op(add_merge_norm, tokens.merging.KERNELS, ("x", "delta"), ("weight", "bias"), ADD_MERGE_NORM_CASES),
    "select": Op(select_and_weigh, tokens.selection.KERNELS, ("x", "score"), (), SELECT_CASES),
    "random_mask": Op(random_mask_and_back, tokens.selection.KERNELS, ("x", "mask_token"), (), RANDOM_MASK_CASES),
}
