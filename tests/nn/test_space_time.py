from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlpfast.nn.space_time import (
    DividedBlock,
    FactorisedViT,
    FrameMixer,
    FrameTransformer,
    SpaceTimeConfig,
    SpaceTimeTransformer,
    SpaceTimeViT,
    resize_times,
)
from vlpfast.nn.transformer import Block, Transformer, TransformerConfig
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.types import UserError

SMALL = TransformerConfig(width=16, layers=3, heads=2)
TINY = SpaceTimeConfig(width=16, layers=2, heads=2, patch_size=8, frames=4)
KINDS = ("clip", "frame", "none")


def block(class_token: str = "clip") -> DividedBlock:
    """Not as it starts: with attention over frames."""
    torch.manual_seed(0)
    made = DividedBlock(SMALL, Block(SMALL), class_token)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def fresh(class_token: str = "clip", **options: Any) -> SpaceTimeViT:
    torch.manual_seed(0)
    pool = "mean" if class_token == "none" else "class"
    return SpaceTimeViT(replace(TINY, class_token=class_token, pool=pool, **options), 16)


def moving(encoder: SpaceTimeViT) -> SpaceTimeViT:
    """With attention over frames and embeddings of time."""
    for made in encoder.transformer.blocks:
        nn.init.normal_(made.temporal_fc.weight, std=0.3)
    nn.init.normal_(encoder.time)
    return encoder


# --- the block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", KINDS)
def test_it_starts_as_the_block_of_each_frame(class_token: str) -> None:
    torch.manual_seed(0)
    spatial = Block(SMALL)
    divided = DividedBlock(SMALL, spatial, class_token)
    x = torch.randn(2, 4, 5, 16)
    expected = spatial(x.flatten(0, 1)).unflatten(0, (2, 4))
    if class_token == "clip":  # one class token: the frames' updates are averaged
        attended = x + spatial.attn(spatial.norm1(x.flatten(0, 1))).unflatten(0, (2, 4))
        attended[:, :, 0] = x[:, :, 0] + (attended - x)[:, :, 0].mean(1, keepdim=True)
        torch.testing.assert_close(divided(x)[:, :, 1:], expected[:, :, 1:], rtol=0, atol=0)
        again = attended + spatial.fc2(spatial.activation(spatial.fc1(spatial.norm2(attended))))
        torch.testing.assert_close(divided(x), again)
        single = x[:, :1]
        assert torch.equal(divided(single), spatial(single.flatten(0, 1)).unflatten(0, (2, 1)))
    else:
        assert torch.equal(divided(x), expected)


def by_hand(b: DividedBlock, x: Tensor) -> Tensor:
    """One clip [T, N, width], patch by patch, with torch's own attention."""

    def attend(layer: nn.Module, x: Tensor) -> Tensor:  # [L, width]
        own = nn.MultiheadAttention(16, 2, batch_first=True)
        own.load_state_dict({"in_proj_weight": layer.in_proj.weight, "in_proj_bias": layer.in_proj.bias,
                             "out_proj.weight": layer.out_proj.weight, "out_proj.bias": layer.out_proj.bias})  # fmt: skip
        return own(x[None], x[None], x[None], need_weights=False)[0][0]

    first = 0 if b.class_token == "none" else 1
    x = x.clone()
    for n in range(first, x.shape[1]):
        x[:, n] = x[:, n] + b.temporal_fc(attend(b.temporal_attn, b.temporal_norm(x[:, n])))
    update = torch.stack([attend(b.spatial.attn, b.spatial.norm1(frame)) for frame in x])
    if b.class_token == "clip":
        update[:, 0] = update[:, 0].mean(0)
    x = x + update
    return x + b.spatial.fc2(b.spatial.activation(b.spatial.fc1(b.spatial.norm2(x))))


@pytest.mark.parametrize("class_token", KINDS)
def test_the_definition_patch_by_patch(class_token: str) -> None:
    b, x = block(class_token), torch.randn(2, 3, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(b(x), torch.stack([by_hand(b, clip) for clip in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frame", [0, 2, 3, -1])
@pytest.mark.parametrize("class_token", ["frame", "none"])
def test_one_frame_alone_is_that_frame_of_all(class_token: str, frame: int) -> None:
    b, x = block(class_token), torch.randn(2, 4, 5, 16)
    torch.testing.assert_close(b(x, frame)[:, 0], b(x)[:, frame], rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    stack = SpaceTimeTransformer(SMALL, class_token)
    for layer in stack.blocks:
        nn.init.normal_(layer.temporal_fc.weight, std=0.3)
    torch.testing.assert_close(stack(x, frame)[:, 0], stack(x)[:, frame], rtol=1e-5, atol=1e-5)


def test_the_class_tokens_of_a_clip_stay_one() -> None:
    b, x = block("clip"), torch.randn(2, 4, 5, 16)
    x[:, :, 0] = x[:, :1, 0]
    out = b(x)
    torch.testing.assert_close(out[:, :, 0], out[:, :1, 0].expand(2, 4, 16))


def test_temporal_weights_start_from_the_spatial_ones() -> None:
    stack = SpaceTimeTransformer(SMALL)
    for layer in stack.blocks:
        nn.init.normal_(layer.spatial.attn.in_proj.weight)
        nn.init.normal_(layer.spatial.norm1.bias)
    stack.start_from_spatial()
    for layer in stack.blocks:
        assert torch.equal(layer.temporal_attn.in_proj.weight, layer.spatial.attn.in_proj.weight)
        assert torch.equal(layer.temporal_norm.bias, layer.spatial.norm1.bias)
        assert layer.temporal_attn.in_proj.weight is not layer.spatial.attn.in_proj.weight
        assert not layer.temporal_fc.weight.any()


def test_checkpointing_changes_memory_alone() -> None:
    torch.manual_seed(0)
    plain = SpaceTimeTransformer(SMALL)
    frugal = SpaceTimeTransformer(replace(SMALL, checkpointing=True))
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 16)
    kept = []
    for stack in (plain, frugal):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = stack(x).square().sum()
        loss.backward()
        kept.append(sum(sizes))
    for expected, got in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


def test_a_stack_of_given_blocks_keeps_their_weights() -> None:
    spatial = Transformer(SMALL)
    stack = SpaceTimeTransformer(SMALL, "frame", spatial)
    x = torch.randn(2, 3, 4, 16)
    assert torch.equal(stack(x), spatial(x.flatten(0, 1)).unflatten(0, (2, 3)))


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", KINDS)
def test_a_still_clip_gives_the_picture(class_token: str) -> None:
    """ALPRO's and SurgCLIP's invariants, with zero embeddings of time and attention over frames at its start."""
    encoder = fresh(class_token)
    frame = torch.randn(2, 1, 3, 16, 16)
    single, still = encoder(frame), encoder(frame.expand(2, 4, 3, 16, 16))
    torch.testing.assert_close(still, single.expand_as(still))
    torch.testing.assert_close(encoder.clip_tokens(still), encoder.clip_tokens(single))
    torch.testing.assert_close(encoder.frame_features(still)[:, 2], encoder.frame_features(single)[:, 0])


def test_weights_of_a_vit_give_its_tokens() -> None:
    vit = ViT(ViTConfig(width=16, layers=2, heads=2, patch_size=8), 16)
    encoder = fresh("frame")
    renamed = {
        re.sub(r"^transformer\.blocks\.(\d+)\.", r"transformer.blocks.\1.spatial.", name): t
        for name, t in vit.state_dict().items()
    }
    missing, unexpected = encoder.load_state_dict(renamed, strict=False)
    assert not unexpected and all("temporal" in name or name == "time" for name in missing)
    encoder.transformer.start_from_spatial()
    video = torch.randn(2, 4, 3, 16, 16)
    assert torch.equal(encoder(video), vit(video.flatten(0, 1)).unflatten(0, (2, 4)))


@pytest.mark.parametrize("class_token", KINDS)
def test_order_of_frames(class_token: str) -> None:
    encoder, order = fresh(class_token), torch.tensor([2, 0, 3, 1])
    video = torch.randn(2, 4, 3, 16, 16)
    torch.testing.assert_close(encoder(video[:, order]), encoder(video)[:, order])  # zero embeddings of time
    moving(encoder)
    assert not torch.allclose(encoder(video[:, order]), encoder(video)[:, order], atol=1e-2)


def test_a_frame_reaches_others_only_over_time() -> None:
    encoder = fresh("frame")
    video = torch.randn(1, 4, 3, 16, 16)
    changed = video.clone()
    changed[:, 1] += 1
    for apart in (True, False):
        same = [torch.equal(*(encoder.frame_features(encoder(v))[:, t] for v in (video, changed))) for t in range(4)]
        assert same == ([True, False, True, True] if apart else [False] * 4)
        moving(encoder)


@pytest.mark.parametrize("class_token", KINDS)
def test_readouts(class_token: str) -> None:
    encoder = moving(fresh(class_token))
    tokens = encoder(torch.randn(2, 3, 3, 16, 16))  # 3 frames of 4 embeddings
    first = 0 if class_token == "none" else 1
    normed = encoder.norm_post(tokens)
    assert tokens.shape == (2, 3, 4 + first, 16)
    torch.testing.assert_close(encoder.clip_tokens(tokens), normed.sum(1) / 3)
    torch.testing.assert_close(encoder.frame_features(tokens), encoder.norm_post(tokens[:, :, first:].sum(2) / 4))
    everything = encoder.all_tokens(tokens)
    assert everything.shape == (2, first + 12, 16)
    torch.testing.assert_close(everything[:, first:].unflatten(1, (3, 4)), normed[:, :, first:])
    if first:
        torch.testing.assert_close(everything[:, 0], normed[:, :, 0].mean(1))


def test_a_single_frame_has_no_time() -> None:
    encoder, frame = moving(fresh("clip")), torch.randn(2, 1, 3, 16, 16)
    single = encoder(frame)
    nn.init.zeros_(encoder.time)
    assert torch.equal(encoder(frame), single)


def test_every_weight_learns_after_the_first_step() -> None:
    encoder = fresh("clip")
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        encoder.clip_tokens(encoder(torch.randn(2, 4, 3, 16, 16))).pow(3).sum().backward()
        optimiser.step()
    still = [name for name, p in encoder.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_compiled_without_a_break() -> None:
    encoder, video = moving(fresh("clip", layers=1)), torch.randn(2, 4, 3, 16, 16)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video), encoder(video))


def test_resize_times() -> None:
    table = torch.arange(4.0)[:, None].expand(4, 3)
    assert resize_times(table, 4) is table
    assert resize_times(table, 8)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resize_times(table, 2)[:, 0].tolist() == [0, 2]
    assert resize_times(table, 8, "linear")[:, 1].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


# --- time after space, and frames mixed -------------------------------------------------------------------------------


def test_factorised() -> None:
    torch.manual_seed(0)
    encoder = FactorisedViT(ViTConfig(width=16, layers=2, heads=2, patch_size=8), SMALL, 16, 4)
    video = torch.randn(2, 4, 3, 16, 16)
    found = encoder(video)
    vectors = torch.stack([encoder.spatial.pool(encoder.spatial(video[:, t])) for t in range(4)], 1)
    torch.testing.assert_close(found, encoder.temporal.norm(encoder.temporal.transformer(vectors)))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(encoder(video[:, order]), found[:, order])
    nn.init.normal_(encoder.temporal.time)
    assert not torch.allclose(encoder(video[:, order]), encoder(video)[:, order], atol=1e-2)


def test_frames_that_are_not_there_do_not_count() -> None:
    torch.manual_seed(0)
    stack = FrameTransformer(SMALL, 5)
    nn.init.normal_(stack.time)
    x, mask = torch.randn(2, 5, 16), torch.arange(5) < torch.tensor([[5], [3]])
    changed = x.masked_fill(~mask[..., None], 9.0)
    assert torch.equal(stack(x, mask)[mask], stack(changed, mask)[mask])
    assert not torch.equal(stack(x)[mask], stack(changed)[mask])


def test_frame_mixer() -> None:
    torch.manual_seed(0)
    mixer, x = FrameMixer(24, 8, 4), torch.randn(2, 3, 5, 24)
    assert torch.equal(mixer(x), x)
    nn.init.constant_(mixer.alpha, 0.3)
    torch.testing.assert_close(mixer(x[:, :1]), 1.3 * x[:, :1])  # a single frame
    q, k = mixer.qk_proj(x).unflatten(-1, (2, 4, 2)).unbind(3)  # [B, T, N, heads, 2]
    weights = (torch.einsum("binhd,bjnhd->bnhij", q, k) * 8**-0.5).softmax(-1)
    mixed = torch.einsum("bnhij,bjnhd->binhd", weights, x.unflatten(-1, (4, 6))).flatten(3)
    torch.testing.assert_close(mixer(x), x + 0.3 * mixed)


# --- wrong settings and arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("class_token: expected clip, frame or none, got 'mean'", lambda: DividedBlock(SMALL, Block(SMALL), "mean")),
        ("class_token: expected none with pool mean", lambda: SpaceTimeViT(replace(TINY, class_token="none"), 16)),
        ("class_token: expected none with pool mean", lambda: SpaceTimeViT(replace(TINY, pool="mean"), 16)),
        ("patch_dropout: expected 0", lambda: fresh(patch_dropout=0.5)),
        ("temporal.width: expected the width 768", lambda: FactorisedViT(ViTConfig(layers=1), SMALL, 32, 4)),
        ("heads: expected a divisor of width 20", lambda: FrameMixer(20, 8, 8)),
        ("heads: expected a divisor of inner 9", lambda: FrameMixer(24, 9, 8)),
    ],
)
def test_wrong_settings(message: str, make: Any) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="frame: expected None with class_token='clip'"):
        block("clip")(torch.randn(1, 2, 3, 16), 0)
    for video in (torch.randn(2, 3, 16, 16), torch.randn(2, 4, 3, 24, 24)):
        with pytest.raises(ValueError, match=r"video: expected \[B, T, 3, 16, 16\], got"):
            fresh()(video)
    with pytest.raises(ValueError, match=r"video: expected \[B, T, 3, S, S\], got \(2, 3, 16, 16\)"):
        FactorisedViT(ViTConfig(width=16, layers=1, heads=2, patch_size=8), SMALL, 16, 4)(torch.randn(2, 3, 16, 16))
