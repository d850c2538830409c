"""CLIP: pictures and captions in one space, by contrast."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vlpfast.hosts.dual_encoder import DualEncoder, DualEncoderConfig
from vlpfast.nn.text import TextConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.ops.contrastive import sharded_clip_loss
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, TextSpec, UserError


class CLIP(DualEncoder):
    """Two towers trained so that a picture and its caption meet and all other pairs of the batch do not.

    Radford et al. 2021, "Learning transferable visual models from natural language supervision", arXiv 2103.00020; the pseudocode
    of its figure 3. With x_i and y_i the projected features of picture and caption i, and s = exp(logit_scale):

        u_i = x_i / |x_i|,  v_j = y_j / |y_j|,  S_ij = s <u_i, v_j>
        contrastive = 1/2 [ mean_i -log softmax_j(S_ij)[i] + mean_j -log softmax_i(S_ij)[j] ]

    s starts at 1 / 0.07 and is brought back to 100 before a step if it has grown beyond. Captions are read out at their first end
    token, under a causal mask, so padding plays no part and text_mask is not needed.

    Departures from OpenAI's code: the vision tower's blocks start by the rule of their text tower (theirs start from torch's
    defaults) and all biases at 0; the end token is found by its id, not as the largest id of the row. patch_dropout,
    pool="mean", the convolutional stem, merge and select are additions, off by default. The paper's only augmentation is a random
    square crop of the resized picture; here it is a crop of 90 to 100 % of its area (data.image.scale).
    """

    PAPER = "Radford et al. 2021, arXiv 2103.00020"
    PUBLISHED_PARAMETERS = 151_277_313  # ViT-B/32, the size of OpenAI's release

    @dataclass
    class Config(DualEncoderConfig):
        """The defaults are ViT-B/32: 151,277,313 parameters. RN50, 102,007,137: vision null, resnet {}, embed_dim 1024."""

        data: DataSpec = field(default_factory=DataSpec)  # also fixes the towers' picture size and context length

        @classmethod
        def paper(cls) -> CLIP.Config:
            return cls()

        @classmethod
        def tiny(cls) -> CLIP.Config:
            """For the embedded data on a CPU: 64 x 64 pictures, 1.3 million parameters; ids of a tokenizer trained here."""
            return cls(
                vision=ViTConfig(patch_size=8, width=128, layers=3, heads=2, activation="gelu", pool="mean", stem=[32, 64]),
                text=TextConfig(vocab_size=1024, eos_id=2, width=128, layers=2, heads=4, activation="gelu"),
                embed_dim=128,
                data=DataSpec(image=ImageSpec(size=64), text=TextSpec(context_length=28)),
            )

    def __init__(self, config: Config) -> None:
        if config.data.image is None or config.data.text is None:
            raise UserError("model.data: clip needs both image and text, got null for one")
        super().__init__(config, config.data.image.size, config.data.text.context_length)
        self.config = config

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """batch: image, text -> {"contrastive": 0-d float32}."""
        return self.contrast(self.encode(batch))

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """image, text -> what `contrast` needs of them; row i depends on pair i alone."""
        return {"image": self.encode_image(batch["image"]), "text": self.encode_text(batch["text"])}

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of features that `encode` made, perhaps in several parts put together again: this rank's share of them."""
        return {"contrastive": sharded_clip_loss(features["image"], features["text"], self.logit_scale.exp())}

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under this model's, open_clip's or transformers' names -> under this model's; see clip_convert.convert_any."""
        from vlpfast.models.clip_convert import convert_any

        return convert_any(state_dict, self.config)
