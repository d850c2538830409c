from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn import attention as room
from vlpfast.nn.attention import Attention, attention, choose_backend
from vlpfast.types import UserError

CUDA = torch.device("cuda")
LENGTHS = [5, 1, 7, 3]


def qkv(batch=2, heads=3, queries=6, keys=6, head_dim=8, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, heads, length, head_dim) for length in (queries, keys, keys)]
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "cross"])
def test_masks(kind: str, need_weights: bool) -> None:
    q, k, v = qkv(keys=9 if kind == "cross" else 6)
    triangle = torch.ones(6, 6).tril().bool()
    holes = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])[:, None, None]  # [B, 1, 1, Lk]
    seen = {"none": None, "cross": None, "causal": triangle, "bool": holes, "float": triangle}[kind]
    mask = {"causal": "causal", "bool": holes, "float": torch.zeros(6, 6).masked_fill(~triangle, -torch.inf)}.get(kind)
    out = attention(q, k, v, mask=mask, need_weights=need_weights)
    if need_weights:
        out, weights = out
        assert weights.shape == (2, 3, 6, k.shape[2])
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6))
        if seen is not None:
            assert (weights * ~seen == 0).all()
        torch.testing.assert_close(weights @ v, out)
    torch.testing.assert_close(out, plain(q, k, v, seen))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_packed_sequences_equal_each_alone(mask: str | None, need_weights: bool) -> None:
    total = sum(LENGTHS)
    packed = [t.requires_grad_() for t in qkv(batch=1, queries=total, keys=total)]
    out = attention(*packed, mask=mask, cu_seqlens=cumulative(LENGTHS), need_weights=need_weights)
    out = out[0] if need_weights else out
    gradients = torch.autograd.grad(out.square().sum(), packed)

    alone = [t.detach().clone().requires_grad_() for t in packed]
    parts = [attention(*part, mask=mask) for part in zip(*(t.split(LENGTHS, dim=2) for t in alone), strict=True)]
    expected = torch.cat(parts, dim=2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), alone))


def test_weights_have_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    out, weights = attention(q, k, v, need_weights=True)
    gradient = torch.autograd.grad(out[0, 0, 0, 0], weights)[0]
    torch.testing.assert_close(gradient[0, 0, 0], v[0, 0, :, 0])


def test_half_precision_weights_are_normalised_in_float32() -> None:
    q, k, v = qkv(keys=600, dtype=torch.bfloat16)
    out, weights = attention(q, k, v, need_weights=True)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(q.float(), k.float(), v.float()), atol=2e-2, rtol=2e-2)


def test_wrong_arguments_are_named() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"q, k, v: expected .* got \(2, 3, 6, 8\), \(2, 3, 6, 8\), \(2, 3, 5, 8\)"):
        attention(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="mask: expected None, 'causal' or a tensor, got 'casual'"):
        attention(q, k, v, mask="casual")
    with pytest.raises(ValueError, match="mask: 'causal' expects as many queries as keys, got 4 and 6"):
        attention(q[:, :, :4], k, v, mask="causal")
    with pytest.raises(TypeError, match=r"mask: expected a bool or float tensor, got torch\.int64"):
        attention(q, k, v, mask=torch.ones(6, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected int32 \[S \+ 1\], got torch\.int64"):
        attention(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected q and k \[1, H, L, Dh\], got \(2, 3, 6, 8\)"):
        attention(q, k, v, cu_seqlens=cumulative([6]))
    with pytest.raises(ValueError, match="mask: expected None or 'causal' beside cu_seqlens"):
        attention(q[:1], k[:1], v[:1], cu_seqlens=cumulative([6]), mask=torch.ones(6, 6).bool())
    with pytest.raises(ValueError, match="backend: expected one of auto, sdpa, flash_attn, xformers, got 'flash'"):
        attention(q, k, v, backend="flash")


# --- which backend ----------------------------------------------------------------------------------------------------


@pytest.fixture
def both_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "INSTALLED", {"flash_attn": True, "xformers": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("device", "dtype", "packed", "chosen"),
    [
        ("cuda", torch.bfloat16, True, "flash_attn"),
        ("cuda", torch.float16, True, "flash_attn"),
        ("cuda", torch.float32, True, "sdpa"),
        ("cuda", torch.bfloat16, False, "sdpa"),
        ("cpu", torch.bfloat16, True, "sdpa"),
    ],
)
def test_auto(both_installed: None, device: str, dtype: torch.dtype, packed: bool, chosen: str) -> None:
    assert choose_backend(torch.device(device), dtype, 64, None, packed, "auto") == chosen


def test_auto_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "INSTALLED", {"flash_attn": False, "xformers": False})
    assert choose_backend(CUDA, torch.bfloat16, 64, None, True, "auto") == "sdpa"
    for backend in ("flash_attn", "xformers"):
        with pytest.raises(UserError, match=f"'{backend}' is forced, but the package {backend} is not installed"):
            choose_backend(CUDA, torch.bfloat16, 64, None, False, backend)
        with pytest.raises(
            UserError, match=f"attention_backend: '{backend}' is forced, but the package {backend} is not installed"
        ):
            Attention(8, 2, backend=backend)


def test_auto_on_an_old_gpu(both_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend(CUDA, torch.float16, 64, None, True, "auto") == "sdpa"
    with pytest.raises(UserError, match=r"compute capability 8\.0"):
        choose_backend(CUDA, torch.float16, 64, None, True, "flash_attn")


def test_forced_and_fitting(both_installed: None) -> None:
    assert choose_backend(CUDA, torch.bfloat16, 64, "causal", False, "flash_attn") == "flash_attn"
    assert choose_backend(CUDA, torch.float32, 64, "causal", False, "xformers") == "xformers"
    assert choose_backend(CUDA, torch.bfloat16, 64, None, True, "sdpa") == "sdpa"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "mask", "packed", "reason"),
    [
        ("flash_attn", "cpu", torch.bfloat16, 64, None, False, "CUDA tensors alone, and these are on cpu"),
        ("flash_attn", "cuda", torch.float32, 64, None, False, "these are torch.float32"),
        ("flash_attn", "cuda", torch.bfloat16, 264, None, False, "these have 264"),
        ("flash_attn", "cuda", torch.bfloat16, 36, None, False, "these have 36"),
        ("flash_attn", "cuda", torch.bfloat16, 64, torch.ones(1), False, "no mask tensor"),
        ("xformers", "cpu", torch.float32, 64, None, False, "these are on cpu"),
        ("xformers", "cuda", torch.float32, 64, torch.ones(1), False, "no mask tensor"),
        ("xformers", "cuda", torch.float32, 64, None, True, "lengths on the host"),
    ],
)
def test_forced_and_not_fitting(both_installed: None, backend, device, dtype, head_dim, mask, packed, reason) -> None:
    with pytest.raises(UserError, match=f"attention_backend: '{backend}' is forced, but .*{reason}"):
        choose_backend(torch.device(device), dtype, head_dim, mask, packed, backend)


def heads_after_positions(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The packages' layout: [B, L, H, Dh] in and out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_is_called_as_documented(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert q.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(LENGTHS)
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(t[None].split(lengths, dim=1) for t in (q, k, v)), strict=True)
        return torch.cat([heads_after_positions(*part, causal) for part in parts], dim=1)[0]

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return heads_after_positions(q, k, v, causal)

    fake = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(room, "choose_backend", lambda *_: "flash_attn")
    mask = "causal" if causal else None
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, mask=mask), plain(q, k, v, torch.ones(6, 6).tril().bool() if causal else None))
    total = sum(LENGTHS)
    q, k, v = qkv(batch=1, queries=total, keys=total)
    packed = attention(q, k, v, mask=mask, cu_seqlens=cumulative(LENGTHS), max_seqlen=max(LENGTHS))
    torch.testing.assert_close(packed, attention(q, k, v, mask=mask, cu_seqlens=cumulative(LENGTHS), need_weights=True)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_is_called_as_documented(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
        return heads_after_positions(query, key, value, attn_bias is not None)

    fake = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, LowerTriangularMask=LowerTriangularMask)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=fake))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(room, "choose_backend", lambda *_: "xformers")
    q, k, v = qkv()
    out = attention(q, k, v, mask="causal" if causal else None)
    torch.testing.assert_close(out, plain(q, k, v, torch.ones(6, 6).tril().bool() if causal else None))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_on_a_gpu(mask: str | None, packed: bool) -> None:
    pytest.importorskip("flash_attn", reason="waits for the package flash-attn")
    total = sum(LENGTHS)
    q, k, v = (t.cuda() for t in qkv(batch=1, queries=total, keys=total, head_dim=64, dtype=torch.bfloat16))
    cu_seqlens = cumulative(LENGTHS).cuda() if packed else None
    out = attention(q, k, v, mask=mask, cu_seqlens=cu_seqlens, backend="flash_attn")
    expected = attention(q.float(), k.float(), v.float(), mask=mask, cu_seqlens=cu_seqlens, backend="sdpa")
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, "causal"])
def test_xformers_on_a_gpu(mask: str | None) -> None:
    pytest.importorskip("xformers", reason="waits for the package xformers")
    q, k, v = (t.cuda() for t in qkv(head_dim=64, dtype=torch.bfloat16))
    out = attention(q, k, v, mask=mask, backend="xformers")
    torch.testing.assert_close(out.float(), attention(q.float(), k.float(), v.float(), mask=mask), atol=2e-2, rtol=2e-2)


# --- the module ---------------------------------------------------------------------------------------------------------


def test_self_attention_is_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    ours = Attention(12, 3)
    ours.load_state_dict(
        {
            "in_proj.weight": theirs.in_proj_weight,
            "in_proj.bias": theirs.in_proj_bias.data.normal_(),
            "out_proj.weight": theirs.out_proj.weight,
            "out_proj.bias": theirs.out_proj.bias.data.normal_(),
        }
    )
    x = torch.randn(2, 5, 12)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x), expected)
    out, weights = ours(x, need_weights=True)
    torch.testing.assert_close((out, weights), (expected, expected_weights))


def test_cross_attention_is_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(12, 3, kdim=20, vdim=20, batch_first=True)
    ours = Attention(12, 3, context_width=20)
    bias = theirs.in_proj_bias.data.normal_()
    ours.load_state_dict(
        {
            "q_proj.weight": theirs.q_proj_weight,
            "q_proj.bias": bias[:12],
            "kv_proj.weight": torch.cat((theirs.k_proj_weight, theirs.v_proj_weight)),
            "kv_proj.bias": bias[12:],
            "out_proj.weight": theirs.out_proj.weight,
            "out_proj.bias": theirs.out_proj.bias,
        }
    )
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 20)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    expected = theirs(x, context, context, key_padding_mask=padding)[0]
    torch.testing.assert_close(ours(x, context, mask=~padding[:, None, None]), expected)
    with pytest.raises(ValueError, match="context: expected one, got None"):
        ours(x)
    with pytest.raises(ValueError, match="context: this layer attends to x alone"):
        Attention(12, 3)(x, context)


def test_module_checks_heads_and_backend() -> None:
    with pytest.raises(UserError, match="heads: expected a divisor of the width 12, got 5"):
        Attention(12, 5)
    with pytest.raises(UserError, match="attention_backend: expected one of"):
        Attention(12, 3, backend="flash")


def test_packed_module_compiles_without_a_break() -> None:
    ours = Attention(12, 3)
    x = torch.randn(1, sum(LENGTHS), 12)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    cu_seqlens = cumulative(LENGTHS)
    torch.testing.assert_close(
        compiled(x, mask="causal", cu_seqlens=cu_seqlens), ours(x, mask="causal", cu_seqlens=cu_seqlens), rtol=0, atol=0
    )


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dropout_of_weights(need_weights: bool, with_bias: bool) -> None:
    """Each weight is 0 with that probability and larger by as much otherwise: with v one-hot the output is the weights."""
    torch.manual_seed(0)
    keys = 64
    q, k = torch.randn(4, 2, 50, keys), torch.randn(4, 2, keys, keys)
    v = torch.eye(keys).expand(4, 2, keys, keys)
    bias = torch.randn(4, keys) if with_bias else None
    _, weights = attention(q, k, v, key_bias=bias, need_weights=True)
    found = attention(q, k, v, key_bias=bias, dropout=0.3, need_weights=need_weights)
    if need_weights:
        torch.testing.assert_close(found[1], weights)  # those before dropout
        found = found[0]
    assert (found == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    kept = found != 0
    torch.testing.assert_close(found[kept], weights[kept] / 0.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_dropout_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    seen = []

    def kernel(q, *_, dropout_p=0.0, p=0.0, **options):
        seen.append(dropout_p + p)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=kernel, flash_attn_varlen_func=kernel))
    ops = types.SimpleNamespace(memory_efficient_attention=kernel, LowerTriangularMask=object)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(room, "choose_backend", lambda *_: backend)
    q, k, v = qkv()
    attention(q, k, v, dropout=0.25, backend=backend)
    attention(q, k, v, dropout=0.25, key_bias=torch.zeros(k.shape[0], k.shape[2]), backend=backend)
    if backend == "flash_attn":
        q, k, v = qkv(batch=1, queries=sum(LENGTHS), keys=sum(LENGTHS))
        attention(q, k, v, dropout=0.25, cu_seqlens=cumulative(LENGTHS))
    assert seen == [0.25] * len(seen) and len(seen) == (3 if backend == "flash_attn" else 2)
