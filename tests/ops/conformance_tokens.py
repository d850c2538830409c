"""The conformance table's rows for selection and masking of tokens."""

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
OPS |= {
    "select": Op(select_and_weigh, tokens.selection.KERNELS, ("x", "score"), (), SELECT_CASES),
    "random_mask": Op(random_mask_and_back, tokens.selection.KERNELS, ("x", "mask_token"), (), RANDOM_MASK_CASES),
}
