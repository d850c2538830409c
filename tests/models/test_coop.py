"""CoOp and CoCoOp against plain CLIP: the exact tests of what the papers say, conversion, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import BOS, EOS, WordTokenizer
from torch import Tensor

from vlpfast.models.clip import CLIP
from vlpfast.models.clip_convert import to_open_clip
from vlpfast.models.coop import CoOp
from vlpfast.nn.prompts import PromptConfig
from vlpfast.nn.resnet import ResNetConfig
from vlpfast.nn.text import TextConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.training.config import Stage, TrainConfig
from vlpfast.training.optim import build_optimizer
from vlpfast.types import DataSpec, ImageSpec, Progress, TargetSpec, TextSpec, UserError

NAMES = ["ant", "brown_bear", "cat", "dog with a long tail"]
SMALL = CoOp.Config(
    vision=ViTConfig(patch_size=8, width=32, layers=2, heads=2),
    resnet=None,
    text=TextConfig(vocab_size=60, eos_id=EOS, width=24, layers=3, heads=3),
    embed_dim=32,
    prompt=PromptConfig(tokens=4),
    context_length=16,
    data=DataSpec(image=ImageSpec(size=24), text=TextSpec(context_length=16), targets={"label": TargetSpec()}),
)
CLIP_SMALL = CLIP.Config(
    SMALL.vision, None, SMALL.text, 32, data=DataSpec(image=ImageSpec(size=24), text=TextSpec(context_length=16))
)
PROGRESS = Progress(0, 10)


def make(config: CoOp.Config = SMALL, names: list[str] | None = None, **prompt) -> CoOp:
    """Weights far from where they start: norms and biases at 1 and 0 would hide a mix-up."""
    torch.manual_seed(0)
    model = CoOp(replace(config, prompt=replace(config.prompt, **prompt)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("prompts.ctx", "logit_scale"):
                parameter += 0.05 * torch.randn(parameter.shape)
    model.set_classes(names or NAMES, WordTokenizer())
    return model


def batch_of(size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, 24, 24, generator=generator)
    return {"image": image, "label": torch.randint(len(NAMES), (size,), generator=generator)}


def plain_prompts(model: CoOp, ctx: Tensor) -> Tensor:
    """ctx [M, W] -> [C, embed_dim]: every prompt whole, one after another, at all positions and through all of the tower."""
    features = []
    for name in NAMES:
        ids = WordTokenizer().encode([name.replace("_", " ") + "."], 16)[0][0]
        embedded = model.text.token_embed(ids)
        x = torch.cat((embedded[:1], ctx, embedded[1 : 16 - len(ctx)]))  # [16, W]
        end = int((ids == EOS).nonzero()[0]) + len(ctx)
        features.append(model.text.norm(model.text.run(x[None])[0, end]))
    return model.project_text(torch.stack(features))


def test_words_for_vectors_give_zero_shot_logits() -> None:
    model = make(words="a photo of a").eval()
    batch = batch_of()
    with torch.no_grad():
        model.prompts.ctx.copy_(model.prompts.start(model.text.token_embed.weight))
        text, _ = WordTokenizer().encode([f"a photo of a {name.replace('_', ' ')}." for name in NAMES], 16)
        zero_shot = model.logit_scale.exp() * model.encode_image(batch["image"]) @ model.encode_text(text).T
        torch.testing.assert_close(model.classify(batch), zero_shot, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [256, 3])
def test_trimmed_with_a_shared_prefix_is_naive_features_and_gradients(chunk: int) -> None:
    model = make(replace(SMALL, chunk=chunk)).double()
    ctx = model.prompts.ctx
    towards = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got, expected = model.class_features().double(), plain_prompts(model, ctx).double()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # features are float32
    gradients = [torch.autograd.grad((features * towards).sum(), ctx)[0] for features in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-6)
    assert gradients[0].norm() > 1


def test_loss_is_the_papers_and_only_vectors_have_a_gradient() -> None:
    model, batch = make(), batch_of()
    losses = model(batch, PROGRESS)
    logits = model.logit_scale.exp() * model.encode_image(batch["image"]) @ plain_prompts(model, model.prompts.ctx).T
    expected = F.cross_entropy(logits, batch["label"])
    torch.testing.assert_close(losses, {"classification": expected})
    gradient = torch.autograd.grad(expected, model.prompts.ctx)[0]
    losses["classification"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["prompts.ctx"]
    torch.testing.assert_close(model.prompts.ctx.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_class_specific_with_equal_rows_is_unified(position: str) -> None:
    unified, own = make(position=position), make(position=position, class_specific=len(NAMES))
    own.load_state_dict({**unified.state_dict(), "prompts.ctx": unified.prompts.ctx.detach().expand(len(NAMES), -1, -1)})
    torch.testing.assert_close(own.class_features(), unified.class_features())
    losses = [model(batch_of(), PROGRESS)["classification"] for model in (own, unified)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(own.prompts.ctx.grad.sum(0), unified.prompts.ctx.grad, atol=1e-4, rtol=1e-4)


def test_permuting_classes_permutes_logits() -> None:
    batch, order = batch_of(), [2, 0, 3, 1]
    model = make().eval()
    logits = model.classify(batch)
    model.set_classes([NAMES[i] for i in order], WordTokenizer())
    torch.testing.assert_close(model.classify(batch), logits[:, order])


def test_weight_decay_acts_on_the_vectors() -> None:
    model = make()
    train = TrainConfig(optimizer="sgd", lr=0.002, momentum=0.9, weight_decay=5e-4)
    (group,) = build_optimizer(model, train, "s", Stage()).param_groups
    assert group["weight_decay"] == 5e-4 and len(group["params"]) == 1 and group["params"][0] is model.prompts.ctx


def test_towers_stay_in_evaluation_mode() -> None:
    model = make(replace(SMALL, vision=replace(SMALL.vision, patch_dropout=0.5)))
    model.train()
    assert (
        model.training
        and model.prompts.training
        and not any(m.training for m in [*model.vision.modules(), *model.text.modules()])
    )
    first, second = (model(batch_of(), PROGRESS)["classification"] for _ in range(2))
    assert torch.equal(first, second)
    model.set_mode("clip")
    assert model.vision.training and model.eval() and not model.vision.training


def test_classify_makes_class_features_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make().eval(), batch_of()
    made = []
    plain = model.class_features
    monkeypatch.setattr(model, "class_features", lambda *image: made.append(1) or plain(*image))
    with torch.no_grad():
        before = [model.classify(batch) for _ in range(3)]
        assert len(made) == 1 and all(torch.equal(logits, before[0]) for logits in before)
        model.prompts.ctx.mul_(2)
        after = model.classify(batch)
        assert len(made) == 2 and not torch.allclose(after, before[0])
        model.prompts.ctx.data = model.prompts.ctx.data / 2  # as averaged weights are put in, in evaluation mode
        model.eval()
        torch.testing.assert_close(model.classify(batch), before[0])
        model.set_classes(NAMES[:2], WordTokenizer())
        assert model.classify(batch).shape == (6, 2) and len(made) == 4
    model.classify(batch)  # with gradients none is kept
    assert len(made) == 5


# --- CoCoOp ------------------------------------------------------------------------------------------------------------------


def test_conditional_is_one_picture_at_a_time() -> None:
    model, batch = make(replace(SMALL, conditional=True, chunk=7)), batch_of()
    image = model.encode_image(batch["image"]).detach()
    rows = []
    for feature in image:
        meta = model.meta
        shift = meta.linear2.weight @ F.relu(meta.linear1.weight @ feature + meta.linear1.bias) + meta.linear2.bias
        rows.append(model.logit_scale.exp() * plain_prompts(model, model.prompts.ctx + shift) @ feature)
    expected = torch.stack(rows)
    torch.testing.assert_close(model.eval().classify(batch), expected, atol=5e-5, rtol=1e-5)
    loss = model(batch, PROGRESS)["classification"]
    torch.testing.assert_close(loss, F.cross_entropy(expected, batch["label"]))
    loss.backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert learned == ["prompts.ctx", "meta.linear1.weight", "meta.linear1.bias", "meta.linear2.weight", "meta.linear2.bias"]
    assert model.meta.linear1.weight.shape == (2, 32)  # embed_dim / 16


# --- mode "clip" ---------------------------------------------------------------------------------------------------------------


def test_mode_clip_is_clip() -> None:
    model = make()
    model.set_mode("clip")
    clip = CLIP(CLIP_SMALL)
    clip.load_state_dict({name: t for name, t in model.state_dict().items() if name != "prompts.ctx"})
    text = torch.full((6, 16), 0)
    text[:, 0], text[:, 5] = BOS, EOS
    text[:, 1:5] = torch.arange(24).reshape(6, 4) + 4
    batch = {**batch_of(), "text": text}
    losses = model(batch, PROGRESS)
    torch.testing.assert_close(losses, clip(batch, PROGRESS))
    losses["contrastive"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"prompts.ctx"}
    model.logit_scale.data.fill_(7.0)
    model.before_step(PROGRESS)
    assert model.logit_scale.exp().item() == pytest.approx(100)
    model.set_mode("prompts")
    model.logit_scale.data.fill_(7.0)
    model.before_step(PROGRESS)
    assert model.logit_scale == 7.0  # frozen is frozen


def test_vectors_start_from_words_where_clip_has_learned_them() -> None:
    model = make(words="a photo of a")
    drawn = model.prompts.ctx.clone()
    model.before_step(PROGRESS)
    assert torch.equal(model.prompts.ctx, drawn)
    model.set_mode("clip")
    model.text.token_embed.weight.data += 1
    model.set_mode("prompts")
    model.before_step(Progress(3, 10))  # a run that goes on in the middle of the stage keeps its own
    model.before_step(Progress(0, 10))
    assert torch.equal(model.prompts.ctx, drawn)
    model.set_mode("clip")
    model.set_mode("prompts")
    model.before_step(Progress(0, 10))
    assert torch.equal(model.prompts.ctx, model.text.token_embed.weight[model.prompts.word_ids])


# --- weights ------------------------------------------------------------------------------------------------------------------


def test_converts_a_clip_under_any_naming() -> None:
    torch.manual_seed(5)
    clip = CLIP(CLIP_SMALL)
    model = make()
    for state in (clip.state_dict(), to_open_clip(clip.state_dict(), CLIP_SMALL)):
        converted = model.convert(state)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, converted[name]) for name, tensor in clip.state_dict().items())
        assert torch.equal(converted["prompts.ctx"], model.prompts.ctx)  # as they were drawn
    words = make(words="a photo of a")
    expected = clip.text.token_embed.weight[words.prompts.word_ids]
    assert torch.equal(words.convert(clip.state_dict())["prompts.ctx"], expected)
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.convert(own).items())
    with pytest.raises(UserError, match="weights: expected a CLIP's"):
        model.convert({"encoder.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"weights: expected a CLIP's, .* got nothing"):
        model.convert({})


@pytest.mark.parametrize("prefix", ["", "prompt_learner."])
def test_official_prompts_without_their_class_list(prefix: str) -> None:
    """Their embeddings are of another number of classes."""
    model = make(replace(SMALL, conditional=True))
    ctx = torch.randn(4, 24)
    meta = {f"meta_net.{name}": torch.randn(p.shape) for name, p in model.meta.named_parameters()}
    state = {"ctx": ctx, "token_prefix": torch.zeros(1000, 1, 24), "token_suffix": torch.zeros(1000, 11, 24), **meta}
    converted = model.convert({prefix + name: tensor for name, tensor in state.items()})
    model_before = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(converted)
    assert torch.equal(model.prompts.ctx, ctx) and torch.equal(model.meta.linear2.bias, meta["meta_net.linear2.bias"])
    assert all(torch.equal(t, model_before[name]) for name, t in converted.items() if not name.startswith(("prompts.", "meta.")))
    both = {**to_open_clip(CLIP(CLIP_SMALL).state_dict(), CLIP_SMALL), "ctx": ctx}
    assert torch.equal(make().convert(both)["prompts.ctx"], ctx)


def test_converts_an_rn50_like_clip() -> None:
    config = replace(SMALL, vision=None, resnet=ResNetConfig(layers=[1, 1, 1, 1], channels=8))
    config.data = replace(config.data, image=ImageSpec(size=32))
    clip_config = replace(CLIP_SMALL, vision=None, resnet=config.resnet, data=replace(CLIP_SMALL.data, image=ImageSpec(size=32)))
    clip = CLIP(clip_config)
    model = make(config)
    model.load_state_dict(model.convert(to_open_clip(clip.state_dict(), clip_config)))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.train().encode_image(image), clip.eval().encode_image(image))


# --- the paper's size, and settings ---------------------------------------------------------------------------------------------


def test_paper_scale() -> None:
    with torch.device("meta"):
        model = CoOp(CoOp.Config.paper())
        csc = CoOp(CoOp.Config(prompt=PromptConfig(class_specific=1000)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8_192
    assert sum(p.numel() for p in model.parameters()) == 102_007_137 + 8_192
    assert csc.prompts.ctx.shape == (1000, 16, 512)
    data = CoOp.Config().data
    assert data.text is None and data.image.scale == [0.08, 1.0] and data.image.mirror == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMALL, data=DataSpec()), r"model\.data: coop needs image and the target label"),
        (
            replace(SMALL, context_length=8),
            r"model\.data\.text\.context_length: expected at most model\.context_length=8, got 16",
        ),
        (
            replace(SMALL, conditional=True, prompt=PromptConfig(position="front")),
            r"model\.conditional: expected prompt\.position=end",
        ),
    ],
)
def test_settings_that_make_no_sense(config: CoOp.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CoOp(config)


def test_modes_and_tokenizers_that_do_not_fit() -> None:
    model = make()
    with pytest.raises(ValueError, match="expected one of prompts, clip, got 'clpi'"):
        model.set_mode("clpi")
    with pytest.raises(ValueError, match=r"clip needs model\.data\.text, the captions"):
        CoOp(replace(SMALL, data=replace(SMALL.data, text=None))).set_mode("clip")
    small = CoOp(replace(SMALL, text=replace(SMALL.text, vocab_size=59)))
    with pytest.raises(UserError, match=r"at most 59 ids as model\.text\.vocab_size, got one with 60"):
        small.set_classes(NAMES, WordTokenizer())
    with pytest.raises(UserError, match="classes: none are set"):
        CoOp(SMALL)(batch_of(), PROGRESS)
    with pytest.raises(ValueError, match="image: expected none"):
        model.class_features(torch.zeros(1, 32))


MEMORY = r"""
import re, torch
from pathlib import Path
from contract import WordTokenizer
from vlpfast.models.coop import CoOp
from vlpfast.nn.prompts import PromptConfig
from vlpfast.nn.text import TextConfig
from vlpfast.types import Progress
def memory(field):
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
torch.manual_seed(0)
tiny = CoOp.Config.tiny()
tiny.text = TextConfig(vocab_size=60, eos_id=2, width=64, layers=8, heads=2)
tiny.prompt, tiny.context_length = PromptConfig(tokens=16), 77
model = CoOp(tiny)
model.set_classes([f"number {i}" for i in range(1000)], WordTokenizer())
batch = {"image": torch.randn(8, 3, 64, 64), "label": torch.arange(8)}
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model(batch, Progress(0, 1))["classification"].backward()
assert model.prompts.ctx.grad.any()
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="waits for a Linux process's memory figures")
def test_a_thousand_classes_train_in_little_memory() -> None:
    """At 8 layers of width 64, where all positions of all prompts at once would keep 77,000 tokens of each layer, above 3 GiB."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 28, done.stdout
