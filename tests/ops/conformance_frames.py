"""The conformance table's rows for frames, segments and attention over frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance import OPS, Arguments, Op
from torch import Tensor

from vlpfast.ops import temporal

# --- frames -----------------------------------------------------------------------------------------------------------


def frames(*shape: int, **more: Any) -> Arguments:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()} | more


def strided_frames(**more: Any) -> Arguments:
    """[3, 4, 5, 6, 7]: frames before clips and columns before rows in memory, every second column of a wider one, an offset."""
    x = frames(4, 4, 12, 5, 7)["x"].permute(1, 0, 3, 2, 4)[1:, :, :, ::2]
    assert not x.is_contiguous() and x.storage_offset() and x.stride(-1) == 1
    return {"x": x} | more


def transposed_frames(*shape: int, **more: Any) -> Arguments:
    """The last dimension is not dense."""
    *rest, a, b = shape
    return {"x": frames(*rest, b, a)["x"].mT} | more


def channels_last(*shape: int, **more: Any) -> Arguments:
    return {"x": frames(*shape)["x"].to(memory_format=torch.channels_last)} | more


ROLL_CASES: dict[str, Callable[[], Arguments]] = {
    "no clip": lambda: frames(0, 3, 9, 4, fold=2),
    "no frame": lambda: frames(2, 0, 9, 4, fold=2),
    "width 0": lambda: frames(2, 3, 9, 0, fold=2),
    "no token": lambda: frames(2, 3, 0, 4, fold=0, skip=0),
    "one frame": lambda: frames(2, 1, 9, 4, fold=2),
    "two frames": lambda: frames(2, 2, 9, 5, fold=2),
    "fold 0": lambda: frames(2, 3, 9, 5, fold=0),
    "every token moves": lambda: frames(2, 3, 6, 1, fold=3, skip=0),
    "all but the class token": lambda: frames(3, 5, 7, 3, fold=3),
    "one way": lambda: frames(2, 4, 9, 5, fold=4, skip=2, both_ways=False),
    "one way, all tokens": lambda: frames(2, 4, 9, 5, fold=9, skip=0, both_ways=False),
    "long rows": lambda: frames(1, 3, 37, 211, fold=4),
    "strided": lambda: {"x": strided_frames()["x"][:, :, :, 1], "fold": 2},
    "transposed": lambda: transposed_frames(2, 3, 9, 5, fold=2),
    "expanded": lambda: {"x": frames(1, 3, 9, 1)["x"].expand(2, 3, 9, 5), "fold": 2},
}
SHIFT_CASES: dict[str, Callable[[], Arguments]] = {
    "no clip": lambda: frames(0, 3, 4, 8, fold=2),
    "no frame": lambda: frames(2, 0, 4, 8, fold=2),
    "no channel": lambda: frames(2, 3, 4, 0, fold=0),
    "one frame": lambda: frames(2, 1, 4, 8, fold=2),
    "two frames": lambda: frames(2, 2, 8, fold=2),
    "fold 0": lambda: frames(2, 3, 8, fold=0),
    "every channel moves": lambda: frames(2, 5, 3, 6, fold=3),
    "tokens": lambda: frames(2, 4, 17, 37, fold=4),
    "grid": lambda: frames(2, 3, 4, 5, 67, fold=8),
    "wide": lambda: frames(1, 3, 2, 1100, fold=137),
    "images": lambda: frames(12, 9, 3, 5, fold=2, n_segment=4),
    "images, channels last": lambda: channels_last(12, 9, 3, 5, fold=2, n_segment=4),
    "images, one clip of one frame": lambda: frames(1, 9, 3, 5, fold=2, n_segment=1),
    "images, none": lambda: frames(0, 9, 3, 5, fold=2, n_segment=4),
    "images, strided": lambda: {"x": strided_frames()["x"][:, :, 0].flatten(0, 1), "fold": 2, "n_segment": 4},
    "sequence": lambda: frames(6, 7, 11, fold=3, n_segment=3),
    "vectors": lambda: frames(6, 7, fold=3, n_segment=3),
    "strided": lambda: strided_frames(fold=2),
    "transposed": lambda: transposed_frames(2, 3, 4, 9, fold=2),
    "expanded": lambda: {"x": frames(1, 3, 1, 9)["x"].expand(2, 3, 4, 9), "fold": 2},
}
POOL_CASES: dict[str, Callable[[], Arguments]] = {
    "no clip": lambda: frames(0, 2, 4, 4, 3, out=(1, 2, 2)),
    "no frame, kept": lambda: frames(2, 0, 4, 4, 3, out=(None, 2, 3)),
    "no channel": lambda: frames(2, 2, 4, 4, 0, out=(1, 2, 2)),
    "one cell": lambda: frames(1, 1, 1, 1, 5, out=(1, 1, 1)),
    "one cell to many": lambda: frames(2, 1, 1, 1, 5, out=(2, 3, 4)),
    "many to one": lambda: frames(2, 4, 5, 6, 3, out=(1, 1, 1)),
    "kept": lambda: frames(2, 2, 3, 4, 5, out=(None, None, None)),
    "halves": lambda: frames(2, 2, 6, 8, 33, out=(2, 3, 4)),
    "any ratio": lambda: frames(2, 5, 7, 9, 17, out=(3, 2, 4)),
    "more than there are": lambda: frames(1, 2, 3, 4, 5, out=(3, 5, 9)),
    "one more, one less": lambda: frames(1, 3, 4, 5, 3, out=(4, 3, 6)),
    "one clip": lambda: frames(3, 4, 5, 6, out=(2, None, 3)),
    "time alone": lambda: frames(1, 7, 1, 1, 600, out=(3, None, None)),
    "wide": lambda: frames(1, 2, 3, 2, 1100, out=(1, 2, 1)),
    "strided": lambda: strided_frames(out=(3, 2, 4)),
    "transposed": lambda: transposed_frames(2, 3, 4, 5, 6, out=(2, 2, 3)),
    "expanded": lambda: {"x": frames(1, 3, 4, 1, 5)["x"].expand(2, 3, 4, 3, 5), "out": (2, 3, 2)},
}
TIES = {"x": (frames(2, 4, 5, 6, 9)["x"] > 0).double(), "out": (3, 2, 4)}

OPS |= {
    "token_roll": Op(temporal.token_roll, temporal.shift.KERNELS, ("x",), (), ROLL_CASES),
    "channel_shift": Op(temporal.channel_shift, temporal.shift.KERNELS, ("x",), (), SHIFT_CASES),
    "pool_tokens, mean": Op(temporal.pool_tokens, temporal.pool.KERNELS, ("x",), (), POOL_CASES),
    "pool_tokens, largest": Op(
        lambda **arguments: temporal.pool_tokens(**arguments, mode="max"),
        temporal.pool.KERNELS, ("x",), (), POOL_CASES | {"ties": lambda: TIES},
    ),
}  # fmt: skip


# --- segments, attention over frames ----------------------------------------------------------------------------------


def segments(*lengths: int, width: int = 8, heads: int | None = None, **more: Any) -> Arguments:
    """With heads: scores, of which some tokens' are -inf, and all of the second segment's."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    found = {"x": 2 * torch.randn(total, width, generator=generator).double()}
    found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if heads is not None:
        score = 3 * torch.randn(total, heads, generator=generator).double()
        score[torch.rand(total, heads, generator=generator) < 0.2] = -torch.inf
        if len(lengths) > 1:
            score[lengths[0] : lengths[0] + lengths[1]] = -torch.inf
        found["score"] = score
    return found | more


def strided_segments(**more: Any) -> Arguments:
    """Every second channel of a wider matrix, from its third row on."""
    found = segments(3, 0, 9, 30, width=24, **more)
    x = torch.cat((found["x"][:2], found["x"]))[2:, ::2]
    assert x.stride(-1) == 2 and x.storage_offset()
    return found | {"x": x}


SEGMENT_CASES: dict[str, Callable[..., Arguments]] = {
    # sizes: none, one, around a sum's part (128 tokens), a block of channels (512), primes
    "no segment": lambda **m: segments(**m),
    "empty segments alone": lambda **m: segments(0, 0, **m),
    "empty ones between": lambda **m: segments(0, 3, 0, 0, 5, 0, **m),
    "one token each": lambda **m: segments(*[1] * 9, **m),
    "width 0": lambda **m: segments(3, 4, width=0, **m),
    "127, 128, 129": lambda **m: segments(127, 128, 129, **m),
    "one long one": lambda **m: segments(1000, **m),
    "width 1": lambda **m: segments(3, 2, 8, **(m | {"width": 1})) if "heads" not in m else segments(3, 2, 8, **m),
    "width 522": lambda **m: segments(3, 40, width=522, **m),
    "int32": lambda **m: segments(3, 2, 8, **m) | {"cu_seqlens": torch.tensor([0, 3, 5, 13], dtype=torch.int32)},
    "strided": strided_segments,
    "transposed": lambda **m: segments(3, 2, 8, **m) | {"x": segments(3, 5, width=13)["x"].T},
    "expanded": lambda **m: segments(3, 2, 8, **m) | {"x": segments(13, width=1)["x"].expand(13, 8)},
}


def positions(b: int, tq: int, t: int, p: int, dq: int, dv: int, heads: int, **more: Any) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (b, tq, p, heads * dq), "k": (b, t, p, heads * dq), "v": (b, t, p, heads * dv)}
    found = {name: torch.randn(*shape, generator=generator).double() for name, shape in shapes.items()}
    return found | {"heads": heads} | more


def shown(b: int, t: int) -> Tensor:
    """[B, T] bool; nothing of the first clip."""
    found = torch.rand(b, t, generator=torch.Generator().manual_seed(4)) < 0.6
    found[0] = False
    return found


def one_product(b: int, t: int, p: int, d: int, heads: int, **more: Any) -> Arguments:
    """Queries, keys and values are parts of one tensor, positions before frames in memory."""
    qkv = positions(b, p, t, t, 3 * d, 1, heads)["q"].transpose(1, 2)
    return dict(zip("qkv", qkv.chunk(3, -1), strict=True)) | {"heads": heads} | more


ATTENTION_CASES: dict[str, Callable[[], Arguments]] = {
    "no clip": lambda: positions(0, 3, 3, 4, 8, 8, 2),
    "no frame": lambda: positions(2, 0, 0, 4, 8, 8, 2),
    "no key": lambda: positions(2, 3, 0, 4, 8, 8, 2),
    "no query": lambda: positions(2, 0, 3, 4, 8, 8, 2),
    "no position": lambda: positions(2, 3, 3, 0, 8, 8, 2),
    "no value": lambda: positions(2, 3, 3, 4, 8, 0, 2),
    "one frame": lambda: positions(2, 1, 1, 5, 3, 3, 2),
    "two frames": lambda: positions(2, 2, 2, 5, 16, 16, 3),
    "4 frames, depth 17": lambda: positions(2, 4, 4, 5, 17, 17, 3),
    "7 frames, depth 15": lambda: positions(2, 7, 7, 3, 15, 15, 1),
    "8 frames, depth 64": lambda: positions(1, 8, 8, 4, 64, 64, 2),
    "31 frames": lambda: positions(1, 31, 31, 2, 6, 6, 2),
    "32 frames": lambda: positions(1, 32, 32, 2, 6, 6, 2),
    "33 frames": lambda: positions(2, 33, 33, 2, 6, 6, 2, mask=shown(2, 33)),
    "33 frames, the first ones hidden, causal": lambda: positions(2, 33, 33, 2, 6, 6, 2, mask=shown(2, 33), causal=True),
    "one frame's queries": lambda: positions(2, 1, 7, 3, 8, 8, 2),
    "more queries than keys": lambda: positions(2, 9, 5, 3, 8, 8, 2),
    "wide values": lambda: positions(2, 4, 4, 3, 5, 67, 2, scale=0.3),
    "scale 0": lambda: positions(2, 4, 4, 3, 5, 5, 2, scale=0),
    "causal": lambda: positions(2, 6, 6, 3, 8, 8, 2, causal=True),
    "mask": lambda: positions(3, 6, 6, 3, 8, 8, 2, mask=shown(3, 6)),
    "mask, causal": lambda: positions(3, 5, 5, 2, 8, 8, 2, mask=shown(3, 5), causal=True),
    "everything masked": lambda: positions(2, 6, 6, 3, 8, 8, 2, mask=torch.zeros(2, 6, dtype=torch.bool)),
    "one product": lambda: one_product(2, 5, 7, 8, 2),
    "transposed": lambda: positions(2, 4, 4, 6, 3, 3, 2) | {"k": positions(2, 4, 4, 6, 3, 3, 2)["q"].mT.contiguous().mT},
    "expanded": lambda: positions(2, 4, 4, 6, 3, 3, 2) | {"q": positions(2, 4, 4, 1, 3, 3, 2)["q"].expand(2, 4, 6, 6)},
}


def segment_pool(mode: str) -> Callable[..., Tensor]:
    return lambda **arguments: temporal.segment_pool(**arguments, mode=mode)


def with_scores(case: Callable[..., Arguments]) -> Callable[[], Arguments]:
    return lambda: case(heads=2)


OPS |= {
    f"segment_pool, {mode}": Op(segment_pool(mode), temporal.segments.KERNELS, ("x",), (), SEGMENT_CASES)
    for mode in ("mean", "max", "logsumexp")
} | {
    "segment_pool, attention": Op(
        segment_pool("attention"), temporal.segments.KERNELS, ("x",), ("score",),
        {name: with_scores(case) for name, case in SEGMENT_CASES.items()},
    ),
    "temporal_attention": Op(temporal.temporal_attention, temporal.attention.KERNELS, ("q", "k", "v"), (), ATTENTION_CASES),
}  # fmt: skip
