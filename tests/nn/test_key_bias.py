from __future__ import annotations

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn import attention as room
from vlpfast.nn.attention import Attention, _fold, attention

TRIANGLE = torch.ones(6, 6).tril().bool()


def qkv(batch=2, heads=3, length=6, head_dim=8, dtype=torch.float32) -> tuple[Tensor, ...]:
    """Strided as a module's product leaves them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(dtype).transpose(1, 3).unbind(2)


def sizes(batch=2, length=6, largest=9) -> Tensor:
    """Logs of how many tokens a merged one stands for."""
    return torch.randint(1, largest + 1, (batch, length), generator=torch.Generator().manual_seed(1)).double().log()


def explicit(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, seen: Tensor | None = None) -> Tensor:
    """In float64, by the definition."""
    q, k, v, key_bias = (t.double() for t in (q, k, v, key_bias))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]) + key_bias[:, None, None]
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def folded(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
    """What kernels without a mask are given, run by torch's here; in float32, so that q, k, v alone are rounded."""
    q2, k2, v2 = (t.float() for t in _fold(q, k, v, key_bias))
    return F.scaled_dot_product_attention(q2, k2, v2, scale=q.shape[-1] ** -0.5)[..., : q.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "need_weights", "packed"])
def test_it_is_added_to_the_scores(kind: str, dtype: torch.dtype) -> None:
    batch = 1 if kind == "packed" else 2
    q, k, v = qkv(batch, dtype=dtype)
    bias = sizes(batch)
    holes = torch.tensor([[True] * 6, [True, False] * 3])[:, None, None]
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool() & TRIANGLE
    seen = {"causal": TRIANGLE, "bool": holes, "float": TRIANGLE, "packed": blocks}.get(kind)
    mask = {"causal": "causal", "packed": "causal", "bool": holes, "float": torch.zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf)}
    options = {"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32)} if kind == "packed" else {}
    out = attention(q, k, v, mask=mask.get(kind), key_bias=bias.to(dtype), need_weights=kind == "need_weights", **options)
    if kind == "need_weights":
        out, weights = out
        torch.testing.assert_close(weights @ v, out)
    assert out.dtype == dtype
    tight = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(out.double(), explicit(q, k, v, bias, seen), **tight)


def test_packed_weights() -> None:
    q, k, v = qkv(1, dtype=torch.float64)
    bias, cu_seqlens = sizes(1), torch.tensor([0, 4, 6], dtype=torch.int32)
    out, weights = attention(q, k, v, key_bias=bias, cu_seqlens=cu_seqlens, need_weights=True)
    seen = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool()
    assert (weights * ~seen == 0).all()
    torch.testing.assert_close(out, explicit(q, k, v, bias, seen))


def test_a_merged_token_counts_as_often_as_it_stands_for_tokens() -> None:
    q, k, v = qkv(dtype=torch.float64)
    times = torch.tensor([1, 3, 1, 2, 1, 1])
    repeated = attention(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
    torch.testing.assert_close(attention(q, k, v, key_bias=times.double().log().expand(2, -1)), repeated)


@pytest.mark.parametrize("path", ["mask", "need_weights", "folded"])
def test_gradients(path: str) -> None:
    leaves = [t.clone().requires_grad_() for t in (*qkv(dtype=torch.float64), sizes())]
    expected = torch.autograd.grad(explicit(*leaves).square().sum(), leaves)
    if path == "folded":
        q2, k2, v2 = _fold(*leaves)
        out = F.scaled_dot_product_attention(q2, k2, v2, scale=8**-0.5)[..., :8]
    elif path == "need_weights":
        out, _ = attention(*leaves[:3], key_bias=leaves[3], need_weights=True)
    else:
        out = attention(*leaves[:3], key_bias=leaves[3])
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", ["mask", "folded"])
def test_minus_infinity_hides_a_key(path: str) -> None:
    leaves = [t.clone().requires_grad_() for t in qkv()]
    seen = torch.tensor([[True, True, False, True, False, True], [True] * 5 + [False]])
    bias = torch.zeros(2, 6).masked_fill(~seen, -torch.inf)
    out = folded(*leaves, bias) if path == "folded" else attention(*leaves, key_bias=bias)
    expected = attention(*leaves, mask=seen[:, None, None])
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), leaves))


@pytest.mark.parametrize("head_dim", [1, 6, 7, 40, 64, 80])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_channels_hold_the_bias_to_twice_the_bits(head_dim: int, dtype: torch.dtype, unit: float) -> None:
    q, k, v = qkv(2, 3, 1000, head_dim, dtype)
    bias = torch.linspace(math.log(2), math.log(1000), 2000).reshape(2, 1000)
    q2, k2, v2 = _fold(q, k, v, bias)
    assert q2.dtype == k2.dtype == v2.dtype == dtype
    assert q2.shape == k2.shape == v2.shape and q2.shape[-1] % 8 == 0 and head_dim + 2 <= q2.shape[-1] < head_dim + 10
    assert torch.equal(q2[..., :head_dim], q) and torch.equal(k2[..., :head_dim], k) and torch.equal(v2[..., :head_dim], v)
    held = (q2[..., head_dim:].double() * k2[..., head_dim:].double()).sum(-1) / head_dim**0.5  # [B, H, L]
    wanted = bias.double()[:, None].expand_as(held)
    error = ((held - wanted).abs() / wanted).max().item()
    assert error <= unit**2 + 2**-23  # the latter from float32, in which the product with sqrt(Dh) is formed
    assert dtype == torch.float32 or error > unit**2 / 4  # the bound is a close one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_exact_than_without(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 3, 150, 64, dtype)
    bias = sizes(2, 150, 1000)
    expected = explicit(q, k, v, bias)
    unbiased = (attention(q, k, v).double() - explicit(q, k, v, torch.zeros_like(bias))).norm() / expected.norm()
    for out in (attention(q, k, v, key_bias=bias), attention(q, k, v, key_bias=bias.float())):
        assert out.dtype == dtype
        assert (out.double() - expected).norm() / expected.norm() <= 1.5 * unbiased
    error = (folded(q, k, v, bias.float()).double() - expected).norm() / expected.norm()
    assert error <= {torch.bfloat16: 1e-4, torch.float16: 3e-6}[dtype]  # rounded to bfloat16 in one part: 4e-3


def test_autocast_does_not_round_it() -> None:
    q, k, v = qkv(2, 3, 150, 64)
    bias = sizes(2, 150, 1000).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, key_bias=bias)
        explicitly, _ = attention(q, k, v, key_bias=bias, need_weights=True)
    assert out.dtype == explicitly.dtype == torch.bfloat16
    rounded = [t.bfloat16() for t in (q, k, v)]
    assert torch.equal(out, attention(*rounded, key_bias=bias))
    torch.testing.assert_close(explicitly.double(), explicit(*rounded, bias), atol=2e-2, rtol=2e-2)


def test_nan_reaches_the_output() -> None:
    q, k, v = qkv()
    bias = torch.zeros(2, 6)
    bias[1, 3] = torch.nan
    for out in (attention(q, k, v, key_bias=bias), folded(q, k, v, bias)):
        assert out[1].isnan().all() and out[0].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_packages_get_channels(monkeypatch: pytest.MonkeyPatch, backend: str, causal: bool) -> None:
    def run(q, k, v, scale, causal):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16 and scale == 8**-0.5
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)

    flash_attn = types.SimpleNamespace(
        flash_attn_func=lambda q, k, v, dropout_p=0.0, softmax_scale=None, causal=False: run(q, k, v, softmax_scale, causal)
    )
    ops = types.SimpleNamespace(
        LowerTriangularMask=object,
        memory_efficient_attention=lambda query, key, value, attn_bias=None, p=0.0, scale=None: run(
            query, key, value, scale, attn_bias is not None
        ),
    )
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(room, "choose_backend", lambda *_: backend)
    q, k, v = qkv()
    out = attention(q, k, v, mask="causal" if causal else None, key_bias=sizes(), backend=backend)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), explicit(q, k, v, sizes(), TRIANGLE if causal else None), atol=2e-6, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [150, 197])
def test_on_a_gpu(dtype: torch.dtype, length: int) -> None:
    q, k, v = qkv(2, 3, length, 64, dtype)
    bias = sizes(2, length, 1000).float()
    leaves = [t.cuda().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, key_bias=bias.cuda())
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = explicit(*exact, bias)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (out.cpu().double() - expected).norm() / expected.norm() <= bound
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    for got, wanted in zip(found, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (got.cpu().double() - wanted).norm() / wanted.norm() <= 2 * bound


def test_on_the_meta_device() -> None:
    q, k, v = (t.to("meta") for t in qkv())
    assert attention(q, k, v, key_bias=torch.zeros(2, 6, device="meta")).shape == (2, 3, 6, 8)


def test_wrong_arguments_are_named() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"key_bias: expected a float tensor, got torch\.int64"):
        attention(q, k, v, key_bias=torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="key_bias: expected a float tensor, got list"):
        attention(q, k, v, key_bias=[[0.0] * 6] * 2)
    with pytest.raises(ValueError, match=r"key_bias: expected \[B, Lk\] = \(2, 6\), got \(2, 1, 6\)"):
        attention(q, k, v, key_bias=torch.zeros(2, 1, 6))
    with pytest.raises(ValueError, match="key_bias: expected device cpu as k has, got meta"):
        attention(q, k, v, key_bias=torch.zeros(2, 6, device="meta"))


@pytest.mark.parametrize("autocast", [False, True])
def test_module_gives_out_queries_and_keys_and_compiles(autocast: bool) -> None:
    torch.manual_seed(0)
    ours = Attention(12, 3)
    x, bias = torch.randn(2, 6, 12), sizes().float()

    def run(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(x, key_bias=bias, need_qk=True)

    out, q, k = run(x, bias)
    assert q.shape == k.shape == (2, 3, 6, 4)
    if not autocast:
        expected = ours.in_proj(x)[..., :24].unflatten(-1, (2, 3, 4)).permute(2, 0, 3, 1, 4)
        assert torch.equal(torch.stack((q, k)), expected)
        assert torch.equal(ours(x, need_qk=True)[0], ours(x))
        both = ours(x, key_bias=bias, need_weights=True, need_qk=True)
        torch.testing.assert_close((both[0], both[2], both[3]), (out, q, k))
        assert both[1].shape == (2, 3, 6, 6)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, bias)
    torch.testing.assert_close(compiled, (out, q, k), rtol=0, atol=0)
