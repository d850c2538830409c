from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlpfast.nn.vit import ViT, ViTConfig, convert_timm, resize_positions
from vlpfast.types import UserError

SMALL = ViTConfig(width=16, layers=2, heads=2, patch_size=8)


def make(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(replace(SMALL, **changes), image_size=32)


def test_patch_embedding_is_a_convolution() -> None:
    vit = make()
    image = torch.randn(3, 3, 32, 32)
    seen = []
    vit.norm_pre.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit(image)
    kernel = vit.patch_embed.weight.reshape(16, 3, 8, 8)
    patches = F.conv2d(image, kernel, stride=8).flatten(2).transpose(1, 2)  # [B, 16, width]
    expected = torch.cat((vit.class_token.expand(3, 1, -1), patches), dim=1) + vit.position
    torch.testing.assert_close(seen[0], expected)


def test_pooling() -> None:
    image = torch.randn(2, 3, 32, 32)
    vit = make()
    tokens = vit(image)
    assert tokens.shape == (2, 17, 16)
    torch.testing.assert_close(vit.pool(tokens), vit.norm_post(tokens[:, 0]))
    vit = make(pool="mean")
    tokens = vit(image)
    assert tokens.shape == (2, 16, 16) and vit.class_token is None and vit.position.shape == (16, 16)
    torch.testing.assert_close(vit.pool(tokens), vit.norm_post(tokens.mean(1)))


def test_convolutional_stem_makes_the_patches_of_its_size() -> None:
    vit = make(stem=[8, 16], pool="mean")
    image = torch.randn(3, 3, 32, 32)
    patches = vit.patch_embed(image)
    assert patches.shape == (3, 16, 16)
    kernels = [(conv.weight, conv.bias) for conv in vit.patch_embed if isinstance(conv, torch.nn.Conv2d)]
    x = image
    for i, (weight, bias) in enumerate(kernels):
        x = F.conv2d(x, weight, bias, stride=2, padding=1)
        if i < len(kernels) - 1:
            x = F.gelu(F.group_norm(x, 8))
    torch.testing.assert_close(patches, x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(vit.patch_embed(image[1:2]), patches[1:2])  # a picture does not depend on the others
    kept = torch.tensor([[3, 0], [15, 7], [1, 2]])
    torch.testing.assert_close(vit.patch_embed(image, kept), torch.stack([patches[i, row] for i, row in enumerate(kept)]))
    changed = image.clone()
    changed[:, :, 24:, 24:] += 1  # the last patch: row by row, it is number 15
    difference = (vit.patch_embed(changed) - patches).abs().amax((0, 2))
    assert difference.argmax() == 15 and (difference[:8] < difference[15] / 5).all()  # elsewhere only through the norms


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"stem": [8]}, "patch_size 8"), ({"stem": [8, 12]}, "multiples of 8"), ({"stem": [8, 0]}, "multiples of 8")],
)
def test_a_stem_that_does_not_fit_is_named(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make(**changes)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_patch_dropout_keeps_patches_with_their_positions(pool: str) -> None:
    vit = make(patch_dropout=0.75, pool=pool)
    with torch.no_grad():  # patch i of the picture is i everywhere, its position 100 i: what arrives says which is where
        vit.patch_embed.weight.fill_(1 / (3 * 8 * 8))
        patch_number = torch.arange(16.0)
        vit.position[-16:] = 100 * patch_number[:, None]
    image = patch_number.reshape(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(64, 3, 32, 32)
    seen = []
    vit.norm_pre.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -4:, 0]))
    torch.manual_seed(1)
    vit.train()(image)
    kept = (seen[0] / 101).round().sort(1).values  # [B, 4]
    torch.testing.assert_close(seen[0].sort(1).values, 101 * kept)
    assert (kept.diff(dim=1) > 0).all()  # no patch twice
    assert len({tuple(row) for row in kept.tolist()}) > 50  # each picture its own
    assert kept.unique().tolist() == list(range(16))
    torch.manual_seed(1)
    vit(image)
    assert torch.equal(seen[0], seen[1])  # drawn from torch's generator
    vit.eval()(image)
    torch.testing.assert_close(seen[2], 101 * torch.arange(12.0, 16).expand(64, 4))  # all patches in order


def test_patch_dropout_compiles_without_a_break() -> None:
    vit = make(patch_dropout=0.5)
    image = torch.randn(2, 3, 32, 32)
    tokens = torch.compile(vit, fullgraph=True, backend="aot_eager")(image)
    assert tokens.shape == (2, 9, 16)
    tokens.sum().backward()
    assert all(p.grad is not None for name, p in vit.named_parameters() if not name.startswith("norm_post"))


@pytest.mark.parametrize(("grid", "prefix"), [(7, 1), (3, 1), (6, 0)])
def test_resize_positions_is_torch_interpolation(grid: int, prefix: int) -> None:
    table = torch.randn(prefix + 25, 6)
    resized = resize_positions(table, grid, prefix)
    assert resized.shape == (prefix + grid * grid, 6)
    assert torch.equal(resized[:prefix], table[:prefix])
    picture = table[prefix:].reshape(5, 5, 6).permute(2, 0, 1)[None]  # [1, width, 5, 5]
    expected = F.interpolate(picture, size=(grid, grid), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(resized[prefix:].reshape(grid, grid, 6), expected.permute(1, 2, 0))


def test_resize_positions_same_grid_and_wrong_table() -> None:
    table = torch.randn(26, 6)
    assert resize_positions(table, 5, 1) is table
    with pytest.raises(ValueError, match=r"table: expected 1 \+ n \* n rows, got 25"):
        resize_positions(table[:25], 5, 1)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="patch_size: expected a divisor of the picture size 32, got 12"):
        make(patch_size=12)
    with pytest.raises(UserError, match=r"patch_dropout: expected a share in \[0, 1\), got 1.0"):
        make(patch_dropout=1.0)
    with pytest.raises(UserError, match="pool: expected class or mean, got 'max'"):
        make(pool="max")
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, 32, 32\], got \(2, 3, 32, 24\)"):
        make()(torch.randn(2, 3, 32, 24))


def deit(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig.deit(width=16, layers=2, heads=2, patch_size=8, **changes), image_size=32)


def test_what_deit_has_and_clip_has_not() -> None:
    clip, other = make(), deit(qkv_bias=False)
    assert clip.patch_embed.bias is None and clip.norm_pre is not None and clip.norm_post.eps == 1e-5
    assert other.patch_embed.bias is not None and other.norm_pre is None
    assert {module.eps for module in other.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}
    assert all(block.attn.in_proj.bias is None and block.attn.out_proj.bias is not None for block in other.transformer.blocks)
    image = torch.randn(2, 3, 32, 32)
    tokens = other(image)
    torch.testing.assert_close(other.norm_tokens(tokens)[:, 0], other.pool(tokens))
    with pytest.raises(UserError, match="patch_bias: the convolutions of a stem"):
        make(stem=[8, 16], patch_bias=True)


def test_parity_with_transformers_vit() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
    theirs = transformers.ViTModel(
        transformers.ViTConfig(**settings, image_size=32, layer_norm_eps=1e-6), add_pooling_layer=False
    ).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    vit = deit().eval()
    vit.load_state_dict(convert_timm(timm_names(theirs.state_dict()), grid=4))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.norm_tokens(vit(image)), theirs(image).last_hidden_state, atol=1e-4, rtol=1e-4)


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From those of transformers.ViTModel, whose queries, keys and values are apart."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("embeddings.").replace("patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("position_embeddings", "pos_embed").replace("encoder.layer.", "blocks.").replace("layers.", "blocks.")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2").replace("layernorm.", "norm.")
        name = name.replace("attention.output.dense", "attn.proj").replace("attention.o_proj", "attn.proj")
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        found[name] = tensor
    for name in list(found):
        for query in ("attention.attention.query", "attention.q_proj"):
            if query in name:
                parts = [
                    query,
                    query.replace("query", "key").replace("q_p", "k_p"),
                    query.replace("query", "value").replace("q_p", "v_p"),
                ]
                found[name.replace(query, "attn.qkv")] = torch.cat([found.pop(name.replace(query, part)) for part in parts])
    return found


def test_timm_positions_of_another_grid_are_resized() -> None:
    vit = deit()
    state = {"cls_token": torch.randn(1, 1, 16), "pos_embed": torch.randn(1, 26, 16), "head.weight": torch.randn(3, 16)}
    converted = convert_timm(state | {"what": torch.zeros(1)}, grid=4)
    assert set(converted) == {"class_token", "position", "what"}
    assert torch.equal(converted["position"], resize_positions(state["pos_embed"][0], 4, 1))
    with pytest.raises(RuntimeError, match="what"):
        vit.load_state_dict(converted)
