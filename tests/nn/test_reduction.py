from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn import reduction
from vlpfast.nn.reduction import MergeConfig, ReducingTransformer, SelectConfig
from vlpfast.nn.transformer import Block
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.ops.tokens import Match, merge
from vlpfast.types import UserError

SMALL = ViTConfig(width=16, layers=4, heads=2, patch_size=8)
MERGE = MergeConfig(r=3)
SELECT = SelectConfig(layers=[0, 2], keep=0.6)


def make(image_size: int = 32, **changes) -> ViT:
    torch.manual_seed(0)
    return ViT(replace(SMALL, **changes), image_size)


def exact(**changes) -> tuple[ViT, Tensor]:
    """In float64, with weights large enough for attention to be uneven; and pictures."""
    vit = make(**changes).double()
    with torch.no_grad():
        for block in vit.transformer.blocks:
            block.attn.in_proj.weight.mul_(3)
            block.attn.out_proj.weight.mul_(3)
    return vit, torch.randn(3, 3, 32, 32, dtype=torch.float64)


# --- the schedules, stated again plainly, picture by picture --------------------------------------------------------------


def attend(block: Block, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, width] -> what attention adds [T, width], weights [H, T, T], keys [H, T, Dh]."""
    q, k, v = block.attn.in_proj(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    weights = (scores if size is None else scores + size.log()).softmax(-1)
    unbiased = scores.softmax(-1)
    return block.attn.out_proj((weights @ v).permute(1, 0, 2).flatten(1)), unbiased, k


def merged(x: Tensor, size: Tensor, k: Tensor, r: int, mode: str, protect: int) -> tuple[Tensor, Tensor, list[int]]:
    """-> tokens, their sizes, and where each of the old ones is."""
    metric = k.mean(0)
    cosine = torch.nn.functional.cosine_similarity(metric[:, None], metric[None], dim=-1)
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max(b, key=lambda j, i=i: cosine[i, j].item()) for i in a if i >= protect and len(x) > 1}
    sources = sorted(best, key=lambda i: -cosine[i, best[i]].item())[: min(r, (len(x) - protect) // 2)]
    order = [i for i in a if i not in sources] + list(b)
    groups = [[i] + [source for source in sources if best[source] == i] for i in order]
    weight = size if mode == "weighted" else torch.ones_like(size)
    y = torch.stack([(weight[group, None] * x[group]).sum(0) / weight[group].sum() for group in groups])
    where = {i: place for place, group in enumerate(groups) for i in group}
    return y, torch.stack([size[group].sum() for group in groups]), [where[i] for i in range(len(x))]


def selected(x: Tensor, score: Tensor, keep: float, rest: str, protect: int) -> tuple[Tensor, list[int]]:
    count = math.ceil(keep * (len(x) - protect))
    best = sorted(range(protect, len(x)), key=lambda i: -score[i].item())
    kept, others = list(range(protect)) + sorted(best[:count]), best[count:]
    where = {i: place for place, i in enumerate(kept)} | {i: len(kept) if rest == "fuse" else -1 for i in others}
    parts = [x[kept]] + ([(score[others, None] * x[others]).sum(0, keepdim=True)] if rest == "fuse" else [])
    return torch.cat(parts), [where[i] for i in range(len(x))]


def plainly(vit: ViT, image: Tensor, config: ViTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens [B, T, width], sizes [B, T], places of the patches [B, grid^2]."""
    protect = 1 if config.pool == "class" else 0
    inputs = []
    hook = vit.transformer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    vit(image)
    hook.remove()
    found = []
    for x in inputs[0]:
        size, place = x.new_ones(len(x)), list(range(len(x)))
        for layer, block in enumerate(vit.transformer.blocks):
            added, weights, k = attend(block, x, size if config.merge.proportional else None)
            x, where = x + added, list(range(len(x)))
            r = config.merge.per_layer[layer] if config.merge.per_layer else config.merge.r
            if r:
                x, size, where = merged(x, size, k, r, config.merge.mode, protect)
            elif layer in config.select.layers:
                score = weights[:, 0].mean(0) if protect else weights.mean((0, 1))
                x, where = selected(x, score, config.select.keep, config.select.rest, protect)
                size = x.new_ones(len(x))
            place = [where[p] if p >= 0 else -1 for p in place]
            x = x + block.fc2(block.activation(block.fc1(block.norm2(x))))
        found.append((x, size, torch.tensor(place[protect:])))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


SCHEDULES = {
    "merge": {"merge": MERGE},
    "merge every other block": {"merge": MergeConfig(per_layer=[5, 0, 2, 1])},
    "merge plainly": {"merge": MergeConfig(r=3, mode="mean", proportional=False)},
    "merge all that can be": {"merge": MergeConfig(r=100)},
    "fuse": {"select": SELECT},
    "drop": {"select": replace(SELECT, rest="drop")},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
both_pools = pytest.mark.parametrize("pool", ["class", "mean"])


@both_pools
@every_schedule
def test_schedule_is_the_published_rule(schedule: str, pool: str) -> None:
    changes = {"pool": pool, **SCHEDULES[schedule]}
    vit, image = exact(**changes)
    tokens, size = vit(image, need_size=True)
    expected, sizes, places = plainly(vit, image, replace(SMALL, **changes))
    torch.testing.assert_close(tokens, expected)
    assert torch.equal(vit.merged_patches(image), places)
    assert torch.equal(vit(image), tokens)
    if "merge" in changes:
        torch.testing.assert_close(size.double(), sizes)
        assert (size.sum(1) == 16 + (pool == "class")).all()
        mean = (expected * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)
    else:
        assert size is None
        mean = expected.mean(1)
    torch.testing.assert_close(vit.pool(tokens, size), vit.norm_post(mean if pool == "mean" else expected[:, 0]))

    parameters = [p for name, p in vit.named_parameters() if not name.startswith("norm_post")]
    weights = torch.randn_like(tokens)
    gradients = torch.autograd.grad((tokens * weights).sum(), parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), parameters))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"merge": MergeConfig(r=16)}, [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
        ({"merge": MergeConfig(r=98)}, [197, 99, 50, 26, 14, 8, 5, 3, 2, 2, 2, 2, 2]),
        ({"merge": MergeConfig(per_layer=[40, 0, 0, 17] + [0] * 8)}, [197] + [157] * 3 + [140] * 9),
        ({"select": SelectConfig(layers=[3, 6, 9])}, [197] * 4 + [140] * 3 + [100] * 3 + [72] * 3),
        ({"select": SelectConfig(layers=[3, 6, 9], rest="drop")}, [197] * 4 + [139] * 3 + [98] * 3 + [69] * 3),
        ({"select": SelectConfig(layers=[0], keep=1.0)}, [197] * 13),
    ],
)
def test_lengths_of_a_vit_b_16(changes: dict, lengths: list[int]) -> None:
    vit = make(224, width=8, heads=1, layers=12, patch_size=16, **changes)
    seen = []
    for block in vit.transformer.blocks:
        block.norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    tokens = vit(torch.randn(1, 3, 224, 224))
    assert [*seen, tokens.shape[1]] == lengths


def test_merging_equal_tokens_changes_nothing() -> None:
    """That is what sizes in attention and in the mean are for."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, dtype=torch.float64).repeat_interleave(2, 1)  # [B, 16, width]
    config = replace(SMALL, pool="mean", layers=3)
    found = []
    for merging in (MergeConfig(per_layer=[8, 0, 0]), MergeConfig(per_layer=[8, 0, 0], proportional=False), MergeConfig()):
        torch.manual_seed(1)
        found.append(ReducingTransformer(config, merging, SelectConfig(), protect=0).double()(x))
    (once, size, _), (careless, _, _), (whole, _, _) = found
    assert once.shape == (2, 8, 16) and (size == 2).all()
    torch.testing.assert_close(once, whole[:, ::2])
    torch.testing.assert_close(careless, whole[:, ::2])  # all sizes are alike: no bias needed
    # three, one, one, ... of a kind: there it is
    x = torch.cat((x[:, :1], x[:, :1], x[:, :1], x[:, 4::2]), dim=1)  # [B, 9, width]
    found = []
    for merging in (MergeConfig(per_layer=[2, 0, 0]), MergeConfig(per_layer=[2, 0, 0], proportional=False), MergeConfig()):
        torch.manual_seed(1)
        found.append(ReducingTransformer(config, merging, SelectConfig(), protect=0).double()(x, trace=True))
    (once, size, place), (careless, _, _), (whole, _, _) = found
    assert size.max() == 3 and size.sum() == 18
    torch.testing.assert_close(once.gather(1, place[..., None].expand(-1, -1, 16)), whole)
    assert not torch.allclose(careless.gather(1, place[..., None].expand(-1, -1, 16)), whole, atol=1e-3)


def test_one_pass_between_the_parts_is_three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual, merging and the norm in one: outputs and gradients of the whole network are the same to rounding."""
    image = torch.randn(3, 3, 32, 32)
    used = []

    def three_calls(x: Tensor, delta: Tensor, match: Match, size: Tensor | None, *, weight: Tensor, bias: Tensor, eps: float,
                    mode: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        used.append(delta.dtype)
        y, size = merge(x + delta, match, size, mode=mode)
        return y, size, F.layer_norm(y, y.shape[-1:], weight, bias, eps)

    for merging, layers in ((MergeConfig(r=3), 4), (MergeConfig(per_layer=[5, 0, 2, 0], mode="mean"), 2)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            found, calls = [], []
            for function in (reduction.add_merge_norm, three_calls):
                used.clear()
                with monkeypatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    patch.setattr(reduction, "add_merge_norm", function)
                    vit = make(merge=merging)
                    names, parameters = zip(*vit.transformer.named_parameters(), strict=True)
                    tokens = vit(image)
                gradients = torch.autograd.grad(tokens.float().square().sum(), parameters)
                found.append([tokens, *gradients])
                calls.append(list(used))
            assert calls == [[], [dtype] * layers] and found[0][0].dtype == found[1][0].dtype
            for name, f, e in zip(("tokens", *names), *found, strict=True):
                assert (f - e).norm() <= tolerance * e.norm(), name


# --- beside it --------------------------------------------------------------------------------------------------------------


def test_without_a_schedule_nothing_changes() -> None:
    image = torch.randn(2, 3, 32, 32)
    vit = make(merge=MergeConfig(per_layer=[0] * 4))
    assert type(vit.transformer.blocks[0]) is Block
    tokens, size = vit(image, need_size=True)
    inputs = []
    vit.norm_pre.register_forward_hook(lambda _, __, out: inputs.append(out))
    assert torch.equal(vit(image), tokens) and size is None
    x = inputs[0]
    for block in vit.transformer.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.fc2(block.activation(block.fc1(block.norm2(x))))
    assert torch.equal(tokens, x)
    parameters = list(vit.transformer.parameters())
    gradients = torch.autograd.grad(tokens.square().sum(), parameters)
    assert all(map(torch.equal, gradients, torch.autograd.grad(x.square().sum(), parameters)))
    with pytest.raises(ValueError, match="merged_patches: expected a vision transformer that merges or selects, got one without"):
        vit.merged_patches(image)


@every_schedule
def test_parameters_are_those_without_a_schedule(schedule: str) -> None:
    plain, reducing = make().state_dict(), make(**SCHEDULES[schedule]).state_dict()
    assert list(plain) == list(reducing) and all(map(torch.equal, plain.values(), reducing.values()))


@both_pools
@pytest.mark.parametrize("schedule", ["merge", "fuse"])
def test_training_with_patch_dropout_and_checkpointing(schedule: str, pool: str) -> None:
    changes = {"pool": pool, "patch_dropout": 0.4, **SCHEDULES[schedule]}
    image = torch.randn(3, 3, 32, 32)
    found = []
    for checkpointing in (False, True):
        vit = make(checkpointing=checkpointing, **changes).train()
        torch.manual_seed(2)
        tokens, size = vit(image, need_size=True)
        vit.pool(tokens, size).square().sum().backward()
        found.append([tokens, *(p.grad for p in vit.parameters())])
        if schedule == "merge":
            assert (size.sum(1) == 10 + (pool == "class")).all()
    assert all(map(torch.equal, *found))
    torch.manual_seed(2)
    place = vit.merged_patches(image)
    assert place.shape == (3, 16) and ((place == -1).sum(1) == 6).all() and place.max() < found[0][0].shape[1]
    torch.manual_seed(2)
    kept = torch.rand(3, 16).topk(10).indices
    assert (place.gather(1, kept) >= 0).all()


@pytest.mark.parametrize(
    "changes",
    [{"pool": "mean", "merge": MergeConfig(r=3)}, {"pool": "class", "select": SelectConfig(layers=[0])}],
    ids=["merge", "fuse"],
)
def test_compiles_without_a_break(changes: dict) -> None:
    vit = make(layers=2, patch_dropout=0.2, **changes).train()

    def run(image: Tensor) -> Tensor:
        tokens, size = vit(image, need_size=True)
        return vit.pool(tokens, size)

    image = torch.randn(2, 3, 32, 32)
    parameters = list(vit.parameters())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = run(image)
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    torch.manual_seed(3)
    got = compiled(image)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), parameters), gradients, atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("schedule", ["merge", "fuse"])
def test_autocast(schedule: str) -> None:
    vit = make(pool="mean", **SCHEDULES[schedule])
    image = torch.randn(2, 3, 32, 32)
    expected = vit.pool(*vit(image, need_size=True))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, size = vit(image, need_size=True)
        pooled = vit.pool(tokens, size)
    assert size is None or (size.dtype == torch.float32 and (size.sum(1) == 16).all())
    assert torch.nn.functional.cosine_similarity(pooled.float(), expected).min() > 0.95
    pooled.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


def test_mean_needs_sizes() -> None:
    vit = make(pool="mean", merge=MERGE)
    with pytest.raises(ValueError, match=r"size: expected \[B, T\] as forward\(need_size=True\) gives it"):
        vit.pool(vit(torch.randn(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"merge": MERGE, "select": SELECT}, "merge and select: expected one of them, got both"),
        ({"merge": MergeConfig(r=3, per_layer=[1] * 4)}, "merge: expected r or per_layer, got both, 3 and"),
        (
            {"merge": MergeConfig(per_layer=[1] * 3)},
            r"merge\.per_layer: expected a number for each of the 4 blocks, got \[1, 1, 1\]",
        ),
        ({"merge": MergeConfig(r=-1)}, "merge: expected 0 or more tokens to merge, got -1"),
        ({"merge": MergeConfig(per_layer=[1, -2, 0, 0])}, r"merge: expected 0 or more tokens to merge, got \[1, -2, 0, 0\]"),
        ({"merge": MergeConfig(r=1, mode="max")}, r"merge\.mode: expected weighted or mean, got 'max'"),
        ({"select": SelectConfig(layers=[4])}, r"select\.layers: expected blocks from 0 to 3, each once, got \[4\]"),
        ({"select": SelectConfig(layers=[1, 1])}, r"select\.layers: expected blocks from 0 to 3, each once, got \[1, 1\]"),
        ({"select": SelectConfig(keep=0.0)}, r"select\.keep: expected a share in \(0, 1\], got 0\.0"),
        ({"select": SelectConfig(layers=[1], rest="mean")}, r"select\.rest: expected fuse or drop, got 'mean'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_named(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make(**changes)
