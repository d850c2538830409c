"""Against CLIP's ResNet as its paper and its released weights' names describe it, put together here from torch's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.models.clip import CLIP
from vlpfast.models.clip_convert import convert_any, from_open_clip, to_open_clip, to_transformers
from vlpfast.nn.resnet import ResNet, ResNetConfig
from vlpfast.nn.text import TextConfig
from vlpfast.types import DataSpec, ImageSpec, TextSpec, UserError

CONFIG = CLIP.Config(
    vision=None,
    resnet=ResNetConfig(layers=[1, 2, 1, 1], channels=8),
    text=TextConfig(vocab_size=40, eos_id=39, width=12, layers=1, heads=2),
    embed_dim=10,
    data=DataSpec(image=ImageSpec(size=64), text=TextSpec(context_length=9)),
)


class Theirs(nn.Module):
    """The vision half under the released names; batch norms in evaluation."""

    def __init__(self, depths: list[int], channels: int, grid: int, embed_dim: int) -> None:
        super().__init__()
        for i, (before, after, stride) in enumerate(
            [(3, channels // 2, 2), (channels // 2,) * 2 + (1,), (channels // 2, channels, 1)]
        ):
            self.add_module(f"conv{i + 1}", nn.Conv2d(before, after, 3, stride, 1, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(after))
        before = channels
        for number, depth in enumerate(depths):
            blocks = nn.ModuleList()
            for i in range(depth):
                inner = channels * 2**number
                block = nn.ModuleDict()
                for k, (a, b, size) in enumerate([(before, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1)], start=1):
                    block[f"conv{k}"] = nn.Conv2d(a, b, size, padding=size // 2, bias=False)
                    block[f"bn{k}"] = nn.BatchNorm2d(b)
                if i == 0:
                    block["downsample"] = nn.Sequential(nn.Conv2d(before, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner))
                blocks.append(block)
                before = 4 * inner
            self.add_module(f"layer{number + 1}", blocks)
        self.attnpool = nn.Module()
        self.attnpool.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, before))
        for which in "qkv":
            self.attnpool.add_module(f"{which}_proj", nn.Linear(before, before))
        self.attnpool.c_proj = nn.Linear(before, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        x = F.avg_pool2d(x, 2)
        for number in (1, 2, 3, 4):
            for i, block in enumerate(getattr(self, f"layer{number}")):
                shrink = (lambda y: F.avg_pool2d(y, 2)) if i == 0 and number > 1 else (lambda y: y)
                y = block["bn1"](block["conv1"](x)).relu()
                y = shrink(block["bn2"](block["conv2"](y)).relu())
                y = block["bn3"](block["conv3"](y))
                x = (y + (block["downsample"](shrink(x)) if "downsample" in block else x)).relu()
        x = x.flatten(2).permute(2, 0, 1)  # [HW, B, C]
        x = torch.cat((x.mean(0, keepdim=True), x)) + self.attnpool.positional_embedding[:, None]
        pool, width = self.attnpool, x.shape[-1]
        out, _ = F.multi_head_attention_forward(
            x[:1], x, x, width, width // 64, None, torch.cat([getattr(pool, f"{which}_proj").bias for which in "qkv"]),
            None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
            v_proj_weight=pool.v_proj.weight,
        )  # fmt: skip
        return out[0]


def their_state() -> tuple[Theirs, dict[str, Tensor]]:
    """The tower with statistics of its own, and a whole CLIP's state with it."""
    torch.manual_seed(0)
    tower = Theirs(CONFIG.resnet.layers, CONFIG.resnet.channels, 2, CONFIG.embed_dim).eval()
    for name, tensor in tower.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + (0.5 if "var" in name or "weight" in name else -0.5))
    text = {key: value for key, value in to_open_clip(CLIP(CONFIG).state_dict(), CONFIG).items() if not key.startswith("visual.")}
    return tower, text | {f"visual.{name}": tensor.clone() for name, tensor in tower.state_dict().items()}


def test_equals_the_released_network_under_its_names() -> None:
    tower, state = their_state()
    model = CLIP(CONFIG).train()  # the statistics stay in training too
    model.load_state_dict(convert_any(state, CONFIG))
    image = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = F.normalize(tower(image), dim=-1)
        torch.testing.assert_close(model.encode_image(image), expected, atol=1e-5, rtol=1e-4)
    back = to_open_clip(model.state_dict(), CONFIG)
    assert set(back) == {name for name in state if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize(
    ("layers", "embed_dim", "published"), [([3, 4, 6, 3], 1024, 102_007_137), ([3, 4, 23, 3], 512, 119_688_033)]
)
def test_parameters_of_rn50_and_rn101(layers: list[int], embed_dim: int, published: int) -> None:
    with torch.device("meta"):
        model = CLIP(CLIP.Config(vision=None, resnet=ResNetConfig(layers=layers), embed_dim=embed_dim))
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_gradients_reach_everything_and_no_statistic_moves() -> None:
    model = CLIP(CONFIG).train()
    model.load_state_dict(from_open_clip(their_state()[1], CONFIG))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.encode_image(torch.randn(4, 3, 64, 64))[:, 0].sum().backward()
    idle = [name for name, p in model.vision.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == [] and len(before) == 2 * (3 + 3 * 5 + 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


def test_position_table_is_resized_for_another_picture_size() -> None:
    _, state = their_state()
    larger = CLIP.Config(**{**vars(CONFIG), "data": DataSpec(image=ImageSpec(size=96), text=TextSpec(context_length=9))})
    table = convert_any(state, larger)["vision.position"]
    assert table.shape == (10, 256) and torch.equal(table[0], state["visual.attnpool.positional_embedding"][0])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match="resnet: expected a picture size in multiples of 32, got 72"):
        ResNet(ResNetConfig(), 72)
    with pytest.raises(UserError, match=r"resnet\.layers: expected numbers of blocks for four stages, got \[3, 4\]"):
        ResNet(ResNetConfig(layers=[3, 4]), 64)
    with pytest.raises(UserError, match=r"resnet\.channels: expected an even number, got 7"):
        ResNet(ResNetConfig(channels=7), 64)
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, 64, 64\], got \(1, 3, 32, 32\)"):
        ResNet(CONFIG.resnet, 64)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="model: expected one of vision and resnet, got both"):
        CLIP(CLIP.Config(resnet=ResNetConfig()))
    with pytest.raises(UserError, match="transformers has no counterpart of a CLIP with a ResNet"):
        to_transformers(CLIP(CONFIG).state_dict(), CONFIG)
