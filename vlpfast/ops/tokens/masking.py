"""Random masking of tokens and the way back: masked auto-encoders, patch dropout."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import DTYPES, check_choice, check_count, check_tensor
from vlpfast.ops.tokens import reference_selection as reference
from vlpfast.ops.tokens.selection import KERNELS, check_protect, check_tokens
from vlpfast.ops.tokens.selection_autograd import GatherRows


def random_keep(
    seed: Tensor,
    batch: int,
    tokens: int,
    ratio: float,
    *,
    protect: int = 0,
    order: Literal["position", "random"] = "position",
) -> tuple[Tensor, Tensor]:
    """Which tokens a random mask leaves, before there are any: an embedding of patches then embeds these alone.

    Of N tokens protect + int((N - protect) * (1 - ratio)) stay, as in MAE, whose count this is in double precision too (196 at
    0.75: 49; 10 at 0.9: none, since 10 * (1 - 0.9) is less than 1). Every set of that size is equally likely.

    Args:
        seed: int64, 0-d or [B], on the device that the results are to be on. A token stays by its own 32 bits of Philox4x32-10
            at (seed, number of the sample, number of the token): equal seeds give equal masks, on any number of threads, on any
            backend, in a run that goes on as in one that does not stop. With a seed for every sample its number in the batch
            does not matter, so that its mask is its own wherever it stands.
        batch: B.
        tokens: N, the protected ones with them.
        ratio: 0 <= ratio < 1, the part that is masked.
        protect: so many tokens at the front (a class token) always stay.
        order: the others by "position" (patch dropout), or in "random" order (MAE's own; every order equally likely).

    Returns:
        indices [B, K] int64 of what stays, the protected tokens first, and inverse [B, N] int64: the place of every token among
        these, -1 where it is masked. So the mask is `inverse < 0`.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    He et al. 2022, "Masked autoencoders are scalable vision learners"; Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3".
    """
    check_count("batch", batch, 0)
    check_count("tokens", tokens, 0)
    check_protect(protect, tokens)
    check_choice("order", order, ("position", "random"))
    keep = _keep_count(tokens - protect, ratio)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected a tensor, got {type(seed).__name__}")
    check_tensor("seed", seed, seed.device, (torch.int64,), batch if seed.ndim else None)
    backend = backends.choose("random_keep", KERNELS, seed.device)
    if backend == "reference":
        return reference.random_keep(seed, batch, tokens, keep, protect, order == "random")
    return backends.operator("random_keep", backend)(seed, batch, tokens, keep, protect, order == "random")


def random_mask(
    x: Tensor,
    ratio: float,
    seed: Tensor | None = None,
    *,
    protect: int = 0,
    order: Literal["position", "random"] = "position",
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves a random part of every image's tokens: a masked auto-encoder's.

        kept, indices, inverse = random_mask(x, 0.75, seed)
        decoded = decoder(restore(encoder(kept), inverse, mask_token))
        loss = ((decoded - target) ** 2).mean(-1)[inverse < 0].mean()

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16, any strides.
        ratio, protect, order: as of random_keep.
        seed: as of random_keep, on x's device. None: drawn from torch's generator of the device, so that what restores the
            generator restores the masks.

    Returns:
        kept [B, K, C], the tokens that stay; indices [B, K] and inverse [B, N] as of random_keep. The gradient of x is that of
        kept in its places and 0 elsewhere. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    He et al. 2022, "Masked autoencoders are scalable vision learners".
    """
    check_tokens("x", x)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    if isinstance(seed, Tensor) and seed.device != x.device:
        raise ValueError(f"seed: expected device {x.device} as x has, got {seed.device}")
    indices, inverse = random_keep(seed, x.shape[0], x.shape[1], ratio, protect=protect, order=order)
    return _gather("indices", x, indices, None, inverse), indices, inverse


def patch_dropout(x: Tensor, ratio: float, seed: Tensor | None = None, protect: int = 0) -> Tensor:
    """[B, K, C]: what random_mask leaves, in the order of positions. For training: whoever evaluates leaves the call out.

    Li et al. 2023, "Scaling language-image pre-training via masking" (FLIP).
    """
    return random_mask(x, ratio, seed, protect=protect)[0]


def restore(kept: Tensor, inverse: Tensor, mask_token: Tensor | None = None) -> Tensor:
    """The way back from random_mask: all tokens in their places, where there is none the mask token.

    Args:
        kept: [B, K, C] float32, float64, bfloat16 or float16, any strides; what came of random_mask's, of any width C.
        inverse: [B, N] int64, random_mask's: for every place the row of kept, -1 for the mask token. No row may come twice;
            rows that do not come at all, as one that select has fused, have gradient 0.
        mask_token: [C] or [1, 1, C], any of these dtypes; it is rounded to kept's, its gradient is summed in float32 (float64).
            None: zeros.

    Returns:
        [B, N, C] in kept's dtype. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values of inverse are checked only where they are on the host (on a
        device under VLPFAST_DEBUG=1), and for rows that come twice only where gradients are enabled.
    """
    check_tokens("kept", kept)
    _check_indices("inverse", inverse, kept, least=-1)
    if mask_token is not None:
        c = kept.shape[2]
        if not isinstance(mask_token, Tensor):
            raise TypeError(f"mask_token: expected a tensor or None, got {type(mask_token).__name__}")
        if mask_token.dtype not in DTYPES:
            raise TypeError(f"mask_token: expected float32, float64, bfloat16 or float16, got {mask_token.dtype}")
        if mask_token.shape not in ((c,), (1, 1, c)):
            raise ValueError(f"mask_token: expected shape ({c},) or (1, 1, {c}), got {tuple(mask_token.shape)}")
        if mask_token.device != kept.device:
            raise ValueError(f"mask_token: expected device {kept.device} as kept has, got {mask_token.device}")
        mask_token = mask_token.reshape(c)
    return _gather("inverse", kept, inverse, mask_token, None)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """[B, K, C]: rows `indices` of every image of x, for what goes with kept tokens (pixels, positions, labels).

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16, any strides (a table of positions: position.expand(B, -1, -1)).
        indices: [B, K] int64, 0 to N - 1, no row twice: random_keep's, random_mask's or select's.

    Raises:
        TypeError, ValueError: a wrong argument, named; values of indices are checked as restore checks those of inverse.
    """
    check_tokens("x", x)
    _check_indices("indices", indices, x, least=0)
    return _gather("indices", x, indices, None, None)


def _gather(name: str, x: Tensor, indices: Tensor, fill: Tensor | None, back: Tensor | None) -> Tensor:
    """back: the inverse of `indices`, the argument of that name; the gradient of x is gathered by it."""
    if back is None and torch.is_grad_enabled():
        back = reference.invert(indices, x.shape[1])
        if debug.readable(indices) and (back >= 0).sum() < (indices >= 0).sum():
            raise ValueError(f"{name}: expected every row of an image at most once (its gradient has one place), got one twice")
    backend = backends.choose("gather_rows", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.gather_rows(x, indices, fill)
    return GatherRows.apply(backend, x, indices, fill, back)


def _keep_count(tokens: int, ratio: Any) -> int:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio: expected a float, got {type(ratio).__name__}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected 0 <= ratio < 1, got {ratio}")
    return torch.sym_int(tokens * (1 - ratio))


def _check_indices(name: str, indices: Any, x: Tensor, least: int) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {indices.dtype}")
    if indices.ndim != 2 or indices.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: expected shape [{x.shape[0]}, any], got {tuple(indices.shape)}")
    if indices.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as the tokens have, got {indices.device}")
    if not debug.readable(indices) or indices.numel() == 0:
        return
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < least or highest >= x.shape[1]:
        raise ValueError(f"{name}: expected {least} to {x.shape[1] - 1}, got {lowest} to {highest}")
