"""TCL: pictures and captions in one space, aligned between and within the two, and in parts; and its retrieval model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlpfast.hosts.albef import Aligned, AlignedConfig, Encoded, check_pairs
from vlpfast.models.tcl_convert import Naming, convert
from vlpfast.nn.bert import BertConfig
from vlpfast.nn.momentum import gather, ranks
from vlpfast.nn.vit import ViTConfig
from vlpfast.ops.contrastive import local_global_loss
from vlpfast.ops.temporal import pool_tokens
from vlpfast.types import (
    AugmentSpec,
    Batch,
    ColorJitterSpec,
    DataSpec,
    ImageSpec,
    MaskSpec,
    Progress,
    RandAugmentSpec,
    TextSpec,
    UserError,
    ViewSpec,
)

LOCALS = 4  # the grid that patches are pooled to: 4 x 4 locals of a picture


def pretraining_data() -> DataSpec:
    """Two views, each with all augmentations, and a caption of which 15 % of the tokens are masked."""
    augment = AugmentSpec(color_jitter=ColorJitterSpec(), grayscale=0.2, blur=0.5, rand_augment=RandAugmentSpec(2, 7, "albef"))
    view = ViewSpec(count=2, scale=[0.2, 1.0], mirror=0.5, augment=augment)
    text = TextSpec(context_length=25, clean="albef", max_words=30, mask=MaskSpec())
    return DataSpec(image=ImageSpec(size=256, resize="squash", views=[view]), text=text)


def finetuning_image(size: int = 384, *, views: int = 1, pictures: int = 1) -> ImageSpec:
    augment = AugmentSpec(rand_augment=RandAugmentSpec(2, 7, "albef"))
    view = ViewSpec(count=views, scale=[0.5, 1.0], mirror=0.5, augment=augment)
    if views > 1:
        return ImageSpec(size=size, resize="squash", views=[view])
    return ImageSpec(size=size, pictures=pictures, scale=view.scale, mirror=view.mirror, augment=augment, resize="squash")


def tiny_towers(**text: Any) -> dict[str, Any]:
    """For 64 x 64 pictures and a tokenizer trained here: 1.6 million parameters beside their momentum copies."""
    vision = ViTConfig.deit(patch_size=16, width=128, layers=3, heads=2, stem=[32, 64, 64], patch_bias=False, norm_eps=1e-5)
    sizes = {
        "vocab_size": 1024,
        "width": 128,
        "layers": 4,
        "heads": 2,
        "hidden": 512,
        "max_positions": 64,
        "context_width": 128,
        "init_std": 0.05,
    }
    return {"vision": vision, "text": BertConfig(**{**sizes, "cross_attention": [2, 3], **text})}


class TCL(Aligned):
    """Three contrasts, each with momentum features: across modalities, within each, and of the whole with its parts.

    Yang et al. 2022, "Vision-language pre-training with triple contrastive learning", arXiv 2202.10401, on ALBEF's network. With
    v, t the class tokens' features of unit length (online), v~, t~ the momentum copy's of the other view and of the same text
    (dropout tells it apart), queues Q_v, Q_t of earlier v~, t~, temperature s, and NCE(x, k | Q) the mean over i of
    -log softmax(<x_i, [k; Q]> / s)_i:

        cma = [NCE(v, t~ | Q_t) + NCE(t, v~ | Q_v)] / 6     with soft targets (1 - a) onehot + a softmax of the copy's own logits
        imc = [NCE(v, v~ | Q_v) + NCE(t, t~ | Q_t)] / 6     with hard targets                               (equations 1 to 3)
        lmi = [LMI(v, v~'s patches) + LMI(t, t~'s tokens)] / 6                                              (equations 4 to 7)
        itm   matching: B pairs that fit, 2 B hard negatives
        mlm   masked words, (1 - a) cross-entropy + a against the copy's prediction, which has seen the other view

    all with weight 1. Locals of a picture are the patches' features, brought to unit length, then averaged over a grid of 4 x 4
    (shorter than 1, and left so); of a text those of every token behind the first. They are the momentum copy's and get no
    gradient. LMI contrasts each with those of all other samples of the batch, not with the queue: local_global_loss. The copy
    follows with m = 0.995 before every step and stays in training mode; a grows to 0.4 over the first epoch; s is clamped to
    [0.001, 0.5] before a step. The weights of the three parts follow the official code.

    Departures from it (uta-smile/TCL): the soft targets of words are softmaxes over the vocabulary (until August 2022 it took
    them over the token axis); one pass of both texts, one of positives, negative texts and masked texts (`Aligned.match`); the
    momentum features of all ranks are keys in the step that makes them, not in the next, so that N processes are one with the
    whole batch, hard negatives apart; pooling for any grid, whereas its kernel is right only for 16 x 16; LMI of a batch of one,
    which breaks there, is 0; where all weights of a hard negative are 0, the likeliest is drawn, not a uniform one; outside
    training it is always the likeliest. Its optimiser decays the class token and the 0-d temperature too, ours decays matrices
    alone.
    """

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = 209_500_000  # ALBEF's, whose network it is: 85.8 million of vision, 123.7 million of BERT and its head

    @dataclass
    class Config(AlignedConfig):
        """The defaults are the paper's: 85.8 million parameters of vision, 123.7 million of BERT with its head, 0.4 million of
        projections, and the momentum copy of all, which is not trained."""

        data: DataSpec = field(default_factory=pretraining_data)

        @classmethod
        def paper(cls) -> TCL.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCL.Config:
            """See tiny_towers. emojiworld's captions tell left from right and name colours: no flips, little else."""
            augment = AugmentSpec(color_jitter=ColorJitterSpec(0.2, 0.2, 0.1, 0.0), blur=0.2, blur_sigma=[0.1, 1.0])
            view = ViewSpec(count=2, scale=[0.6, 1.0], augment=augment)
            data = DataSpec(
                image=ImageSpec(size=64, views=[view]),
                text=TextSpec(context_length=28, clean="albef", mask=MaskSpec()),
            )
            return cls(**tiny_towers(), embed_dim=64, queue_size=576, data=data)

    naming = Naming(drop=("queue.ids", "online.decoder.", "online.head."))

    def __init__(self, config: Config) -> None:
        check_pairs(config.data)
        if config.data.text.mask is None:
            raise UserError("model.data.text.mask: expected a section, because tcl asks for masked words, got null")
        super().__init__(config, masked_lm=True, with_ids=False)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image [B, 2, 3, S, S], text, text_masked, text_labels -> {"cma", "imc", "lmi", "itm", "mlm"}, each 0-d float32."""
        e = self.encode_views(batch)
        itm, hidden = self.match(e)
        losses = {**contrasts(self, e), "itm": itm, "mlm": self.masked_lm(e, hidden, batch["text_labels"])}
        if self.training:
            self.keep(e)
        return losses

    def before_step(self, progress: Progress) -> None:
        super().before_step(progress)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names of TCL's or ALBEF's code or of a model of this family; see tcl_convert.convert."""
        return convert(self, state_dict)


class TCLRetrieval(Aligned):
    """TCL fine-tuned for retrieval: cma, imc and lmi as in TCL, and itm, without masked words.

    A picture may have come before with another caption: the hard targets of cma and imc are spread evenly over all keys and queue
    entries of equal ids, and pairs of equal ids are no hard negatives. A sample's id is its place in its source (Batch["index"]);
    where a picture has several samples, a target `image_id` of kind "number" says which (data.targets). As in the official code
    the temperature is not clamped; where a picture's ids leave no negative it has none, and imc's targets are not softened by the
    momentum copy. See TCL for all else. Two views of a picture; of one alone (the tiny preset's) both networks see it.

    Retrieval in two stages (ScoresPairs): 256 candidates by features on COCO, 128 on Flickr30k, then by the logit of "fits".
    """

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = 209_500_000  # as TCL

    @dataclass
    class Config(AlignedConfig):
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=finetuning_image(views=2), text=TextSpec(context_length=30, clean="albef", max_words=30)
            )
        )

        @classmethod
        def paper(cls) -> TCLRetrieval.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCLRetrieval.Config:
            data = DataSpec(image=ImageSpec(size=64), text=TextSpec(context_length=28, clean="albef"))
            return cls(**tiny_towers(), embed_dim=64, queue_size=576, data=data)

    naming = Naming(drop=("online.mlm_head.", "online.decoder.", "online.head."))

    def __init__(self, config: Config) -> None:
        check_pairs(config.data)
        super().__init__(config, masked_lm=False, with_ids=True)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image [B, 3, S, S], text, index or image_id -> {"cma", "imc", "lmi", "itm"}, each 0-d float32."""
        e = self.encode_views(batch)
        ids = picture_ids(batch, e.image.device)
        itm, _ = self.match(e, ids)
        losses = {**contrasts(self, e, ids), "itm": itm}
        if self.training:
            self.keep(e, ids)
        return losses

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """See tcl_convert.convert; of a pre-trained TCL the words' head is left out, and the queue begins anew."""
        return convert(self, state_dict)


def contrasts(model: Aligned, e: Encoded, ids: Tensor | None = None) -> dict[str, Tensor]:
    """cma, imc and lmi. ids [B] int64: of the pictures, equal ones being positives of each other."""
    cma = model.contrast(e.image, "text", e.text_m, teacher=e.image_m, ids=ids)
    cma = cma + model.contrast(e.text, "image", e.image_m, teacher=e.text_m, ids=ids)
    imc = model.contrast(e.image, "image", e.image_m, ids=ids) + model.contrast(e.text, "text", e.text_m, ids=ids)
    return {"cma": cma / 6, "imc": imc / 6, "lmi": local_global(model, e) / 6}


def local_global(model: Aligned, encoded: Encoded) -> Tensor:
    """LMI of pictures and of texts, summed: 0-d float32. The locals of all ranks are negatives, like their features."""
    copy, scale = model.momentum.module, 1 / model.temperature
    with torch.no_grad():
        patches = copy.image_projection(encoded.tokens_m[:, 1:])  # [B, grid^2, D]
        grid = math.isqrt(patches.shape[1])
        pooled = pool_tokens(patches.unflatten(1, (1, grid, grid)), (1, min(grid, LOCALS), min(grid, LOCALS))).flatten(1, 3)
        words = copy.text_projection(encoded.states_m[:, 1:])  # [B, L - 1, D]
    own = ranks()[0] * len(encoded.image)
    image = local_global_loss(encoded.image, gather(pooled), scale, own=own)
    return image + local_global_loss(encoded.text, gather(words), scale, gather(encoded.text_mask[:, 1:]), own=own)


def picture_ids(batch: Batch, device: torch.device) -> Tensor:
    """[B] int64: equal ids, equal pictures; of several sources each has its own."""
    if "image_id" in batch:
        return batch["image_id"].long()
    index = batch["index"] if "source" not in batch else batch["index"] + (batch["source"] << 40)
    return index.to(device, non_blocking=True)
