"""CoOp: learned words around class names, for a CLIP that stays as it is."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.hosts.dual_encoder import DualEncoder, DualEncoderConfig
from vlpfast.models.clip import CLIP
from vlpfast.nn.prompts import PromptConfig, PromptLearner
from vlpfast.nn.resnet import ResNetConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.ops.contrastive import sharded_clip_loss
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, TargetSpec, TextSpec, Tokenizer, UserError

MODES = ("prompts", "clip")


class CoOp(DualEncoder):
    """M vectors in place of the words around a class name, learned from few labelled pictures while all of CLIP is frozen.

    Zhou et al. 2022, "Learning to prompt for vision-language models", arXiv 2109.01134, equations 2 and 3. With the unit features
    f_i of picture i and g_c of the prompt t_c = [SOS][V]_1 ... [V]_M[NAME_c] . [EOS], and s = exp(logit_scale), also frozen:

        p(c | i) = softmax_c(s <f_i, g_c>),  classification = -mean_i log p(y_i | i)

    The gradient runs through the text tower to V alone, the picture tower has none, and both are in evaluation mode for good.
    conditional: CoCoOp (Zhou et al. 2022, "Conditional prompt learning for vision-language models", arXiv 2203.05557): every V of
    picture i is V + h(f_i), h a bottleneck of two linear layers, so every picture has class features of its own.

    Classes come by set_classes: before training, and others at will after it. What begins all prompts alike runs through the text
    tower once (TextTower.encode_prompts), of the rest no more than reaches to the longest name's end token. Weight decay acts on
    the vectors (matrices are decayed), as in the official recipe: SGD, 0.002, momentum 0.9, decay 5e-4, batches of 32;
    train.schedule=cosine_by_epoch with its first epoch at 1e-5; 200 epochs for 16 and 8 shots, 100 for 4 and 2, 50 for 1. Results
    are of the last step: ImageNet's validation set is its test set.

    Departures from the official code: prompts are put together from token ids, so no placeholder has to be one token, and the end
    token's place is known, not the largest id's; name and full stop have to be tokenised as the name alone (checked). Vectors are
    float32 under half-precision products (theirs are float16, which loses small updates). Pictures: no Resize before
    RandomResizedCrop, the middle square in evaluation, as theirs since October 2021. A loader of less than one batch is an error
    here, where early versions of theirs were without a step. CoCoOp's pictures of a batch run together, not in a loop.

    Mode "clip" is not the paper's, which starts from released weights: it trains the towers as CLIP on picture and caption, so
    that the embedded data has something to learn prompts for.
    """

    PAPER = "Zhou et al. 2022, arXiv 2109.01134"
    PUBLISHED_PARAMETERS = 102_007_137 + 8_192  # RN50 and 16 vectors

    @dataclass
    class Config(DualEncoderConfig):
        """The defaults are RN50 with 16 vectors: 8,192 trained numbers."""

        vision: ViTConfig | None = None
        resnet: ResNetConfig | None = field(default_factory=ResNetConfig)
        embed_dim: int = 1024
        logit_scale_init: float = math.log(100)  # the released CLIPs' is about that
        prompt: PromptConfig = field(default_factory=PromptConfig)
        conditional: bool = False  # CoCoOp; its recipe: 4 vectors from "a photo of a", batches of 1, 10 epochs
        chunk: int = 256  # of more prompts than so many, so many at a time, made once more in the backward
        context_length: int = 77  # positions of the text tower
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=ImageSpec(scale=[0.08, 1.0], mirror=0.5), text=None, targets={"label": TargetSpec()}
            )
        )

        @classmethod
        def paper(cls) -> CoOp.Config:
            return cls()

        @classmethod
        def tiny(cls) -> CoOp.Config:
            """models/clip.py's tiny CLIP under 4 vectors; captions too, for mode "clip"."""
            clip = CLIP.Config.tiny()
            assert clip.data.text is not None
            return cls(
                vision=clip.vision,
                resnet=None,
                text=clip.text,
                embed_dim=clip.embed_dim,
                logit_scale_init=clip.logit_scale_init,
                prompt=PromptConfig(tokens=4),
                context_length=clip.data.text.context_length,
                data=DataSpec(image=clip.data.image, text=clip.data.text, targets={"label": TargetSpec()}),
            )

    def __init__(self, config: Config) -> None:
        if config.data.image is None or "label" not in config.data.targets:
            raise UserError("model.data: coop needs image and the target label, got none for one")
        if config.data.text is not None and config.data.text.context_length > config.context_length:
            raise UserError(
                f"model.data.text.context_length: expected at most model.context_length={config.context_length}, got "
                f"{config.data.text.context_length}"
            )
        if config.conditional and (config.prompt.class_specific or config.prompt.position != "end"):
            raise UserError("model.conditional: expected prompt.position=end and prompt.class_specific=0 with it")
        super().__init__(config, config.data.image.size, config.context_length)
        self.config = config
        self.prompts = PromptLearner(config.prompt, config.text.width)
        self.meta: nn.Sequential | None = None
        if config.conditional:
            hidden = config.embed_dim // 16
            layers = {
                "linear1": nn.Linear(config.embed_dim, hidden),
                "relu": nn.ReLU(),
                "linear2": nn.Linear(hidden, config.text.width),
            }
            self.meta = nn.Sequential(OrderedDict(layers))
        self._cached: tuple[list[int], Tensor] | None = None
        self.mode, self._from_words = "prompts", False
        self.set_mode("prompts")

    def set_mode(self, mode: str) -> None:
        """ "prompts": the vectors (and CoCoOp's h) are trained, on image and label; "clip": all but these, on image and text."""
        if mode not in MODES:
            raise ValueError(f"expected one of {', '.join(MODES)}, got {mode!r}")
        if mode == "clip" and self.config.data.text is None:
            raise ValueError("clip needs model.data.text, the captions")
        self._from_words = (self.mode, mode) == ("clip", "prompts")  # the embeddings of the words have changed since
        self.mode = mode
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_learned(name) == (mode == "prompts"))
        self.train(self.training)

    def set_classes(self, names: Sequence[str], tokenizer: Tokenizer) -> None:
        """The classes that label counts, in their order; see PromptLearner.set_classes."""
        if tokenizer.vocab_size > self.config.text.vocab_size:
            sizes = f"{self.config.text.vocab_size} ids as model.text.vocab_size, got one with {tokenizer.vocab_size}"
            raise UserError(f"classes: expected a tokenizer of at most {sizes}")
        self.prompts.set_classes(names, tokenizer, self.config.context_length)
        self._cached = None

    def train(self, mode: bool = True) -> CoOp:
        super().train(mode)
        if self.mode == "prompts":
            self.vision.eval()
            self.text.eval()
        self._cached = None
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Mode "prompts": image, label [B] int64 -> {"classification": 0-d float32}; "clip": image, text -> {"contrastive"}."""
        if self.mode == "clip":
            image, text = self.encode_image(batch["image"]), self.encode_text(batch["text"])
            return {"contrastive": sharded_clip_loss(image, text, self.logit_scale.exp())}
        with torch.no_grad():
            image = self.logit_scale.exp() * self.encode_image(batch["image"])  # [B, D]
        if self.meta is None:
            return {"classification": linear_cross_entropy(image, self.class_features(), batch["label"])}
        logits = self._logits(image, self.class_features(F.normalize(image, dim=-1)))
        return {"classification": F.cross_entropy(logits, batch["label"])}

    def class_features(self, image: Tensor | None = None) -> Tensor:
        """-> [C, embed_dim] float32 of unit length; [B, C, embed_dim] for the pictures of features image [B, embed_dim], which
        CoCoOp needs."""
        if (image is None) != (self.meta is None):
            raise ValueError(f"image: expected {'none' if self.meta is None else 'features, as prompts depend on them'}")
        shift = None if self.meta is None else self.meta(image).float()
        prompts = self.prompts(self.text.token_embed.weight, shift)
        features = self.project_text(self.text.encode_prompts(*prompts, chunk=self.config.chunk))  # [T, C, D]
        return features[0] if image is None else features

    def classify(self, batch: Batch) -> Tensor:
        """batch: image -> logits [B, C] float32. In evaluation mode the class features are made once, until something changes."""
        image = self.encode_image(batch["image"])
        scale = self.logit_scale.exp()
        if self.meta is not None:
            return self._logits(scale * image, self.class_features(image))
        if self.training or torch.is_grad_enabled():
            return scale * image @ self.class_features().T
        state = [parameter._version for parameter in self.parameters()]  # counts what was written in place
        if self._cached is None or self._cached[0] != state or self._cached[1].device != image.device:
            self._cached = state, self.class_features()
        return scale * image @ self._cached[1].T

    def before_step(self, progress: Progress) -> None:
        if self.mode == "clip":
            super().before_step(progress)
        elif self._from_words:
            if progress.step == 0:
                with torch.no_grad():
                    self.prompts.ctx.copy_(self.prompts.start(self.text.token_embed.weight))
            self._from_words = False

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a CLIP, of official CoOp or CoCoOp checkpoints, or of both -> under this model's names.

        A CLIP under any naming that clip_convert.convert_any knows: the vectors stay, or start from its embeddings of
        prompt.words. The official checkpoints hold a prompt learner alone: CLIP stays. Their token_prefix and token_suffix are
        left out: they are embeddings of a class list, and the list may be another.
        """
        from vlpfast.models.clip_convert import convert_any

        found, clip = {}, {}
        for name, tensor in state_dict.items():
            own = name.removeprefix("prompt_learner.")
            if own.startswith("meta_net."):
                found[own.replace("meta_net.", "meta.")] = tensor
            elif own in ("ctx", "prompts.ctx"):
                found["prompts.ctx"] = tensor
            elif _learned(name):
                found[name] = tensor
            elif own not in ("token_prefix", "token_suffix"):
                clip[name] = tensor
        state = self.state_dict()
        if clip or not found:
            config = self.config
            data = DataSpec(image=config.data.image, text=TextSpec(context_length=config.context_length))
            shared = {key: getattr(config, key) for key in ("vision", "resnet", "text", "embed_dim", "logit_scale_init")}
            state |= convert_any(clip, CLIP.Config(**shared, data=data))
        if "prompts.ctx" not in found:
            found["prompts.ctx"] = self.prompts.start(state["text.token_embed.weight"])
        return state | found

    @staticmethod
    def _logits(image: Tensor, text: Tensor) -> Tensor:
        """image [B, D], text [B, C, D] -> [B, C] float32."""
        with torch.autocast(image.device.type, enabled=False):
            return (text @ image[:, :, None]).squeeze(-1)


def _learned(name: str) -> bool:
    """Whether a parameter is of the prompts, not of CLIP."""
    return name.startswith(("prompts.", "meta."))
