"""What ALBEF and its descendants share: a ViT, a BERT whose upper half sees the picture, momentum copies, queues, matching.

Li et al. 2021, "Align before fuse: vision and language representation learning with momentum distillation", arXiv 2107.07651.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.bert import Bert, BertConfig, MaskedLMHead
from vlpfast.nn.heads import Projection
from vlpfast.nn.momentum import FeatureQueue, Momentum, gather, ranks
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.objectives.matching import hard_negatives, matching_loss
from vlpfast.objectives.queue_contrast import queue_contrastive_loss
from vlpfast.objectives.token_loss import Predictor, asked_rows, mean_over_asked, token_losses
from vlpfast.types import Batch, DataSpec, Progress, UserError, Vocabulary


@dataclass
class AlbefConfig:
    """The defaults are ALBEF's: DeiT's ViT-B/16, and a BERT-base whose layers from 6 on have a cross-attention."""

    vision: ViTConfig = field(default_factory=ViTConfig.deit)
    text: BertConfig = field(default_factory=lambda: BertConfig(cross_attention=list(range(6, 12))))
    momentum: float = 0.995  # of the copies: w_m <- m w_m + (1 - m) w before each step
    alpha: float = 0.4  # share of the momentum copy's soft targets, to which it grows over the first epoch
    data: DataSpec = field(default_factory=DataSpec)

    def vocabularies(self) -> dict[str, Vocabulary]:
        asks = any(spec is not None and spec.mask is not None for spec in (self.data.text, *self.data.texts.values()))
        return {"": Vocabulary(self.text.vocab_size, pad_id=self.text.pad_id, mask=asks)}

    @property
    def image_size(self) -> int:
        if self.data.image is None:
            raise UserError("model.data.image: expected a section, got null")
        return self.data.image.size


@dataclass
class AlignedConfig(AlbefConfig):
    """Of models that compare features: pre-training and retrieval."""

    embed_dim: int = 256
    temperature_init: float = 0.07
    queue_size: int = 65536  # momentum features of each side; a multiple of the batch of all ranks


class Encoders(nn.Module):
    """Pictures to tokens, texts to states, both together to states of the text that has seen the picture."""

    def __init__(self, config: AlbefConfig, *, embed_dim: int = 0, masked_lm: bool = False) -> None:
        """embed_dim: of projections to where features are compared; 0: none. masked_lm: a head over the vocabulary."""
        super().__init__()
        if not config.text.cross_attention:
            raise UserError("model.text.cross_attention: expected the layers that see the picture, got none")
        if config.text.context_width != config.vision.width:
            raise UserError(
                f"model.text.context_width: expected {config.vision.width}, as wide as the picture's tokens, "
                f"got {config.text.context_width}"
            )
        self.vision = ViT(config.vision, config.image_size)
        self.text = Bert(config.text)
        self.fusion = range(min(config.text.cross_attention), config.text.layers)
        if embed_dim:
            self.image_projection = Projection(config.vision.width, embed_dim)
            self.text_projection = Projection(config.text.width, embed_dim)
        if masked_lm:
            self.mlm_head = MaskedLMHead(config.text)

    def image_tokens(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> [B, T, C], normalised, the class token first."""
        return self.vision.norm_tokens(self.vision(image))

    def text_states(self, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """text [B, L], text_mask [B, L] bool -> [B, L, C], by the layers that see no picture."""
        return self.text(text, text_mask, layers=range(self.fusion.start))

    def fuse(self, states: Tensor, text_mask: Tensor, tokens: Tensor) -> Tensor:
        """states [N, L, C] of `text_states`, text_mask [N, L], tokens [B, T, C], of which each row serves N / B consecutive rows
        of states -> [N, L, C]."""
        return self.text.run(states, text_mask, context=tokens, layers=self.fusion)

    def predictor(self, hidden: Tensor) -> Predictor:
        return Predictor(hidden, self.mlm_head, self.text.token_embed.weight)


class Distilled(nn.Module):
    """A network, `online`, and a momentum copy of it, whose soft targets have a share `alpha` that grows over the first epoch."""

    alpha: Tensor

    def __init__(self, config: AlbefConfig, online: nn.Module) -> None:
        super().__init__()
        if not 0 <= config.momentum <= 1:
            raise UserError(f"model.momentum: expected a number in [0, 1], got {config.momentum}")
        if not 0 <= config.alpha <= 1:
            raise UserError(f"model.alpha: expected a number in [0, 1], got {config.alpha}")
        self.config = config
        self.online = online
        self.momentum = Momentum(online)
        # A tensor, so that a ramp is no new compilation; made anew from the progress before every step, so not saved.
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def before_step(self, progress: Progress) -> None:
        self.momentum.update(self.online, self.config.momentum)
        self.alpha.fill_(self.config.alpha * min(1.0, progress.epoch))


class Encoded(NamedTuple):
    """A batch's tokens, states and features [B, D], and the momentum copy's of another view."""

    text_mask: Tensor  # [B, L]
    tokens: Tensor  # [B, T, C]
    states: Tensor  # [B, L, C]
    image: Tensor  # [B, D] unit length
    text: Tensor
    tokens_m: Tensor
    states_m: Tensor
    image_m: Tensor
    text_m: Tensor
    masked: Tensor | None = None  # [B, L, C] states of the masked text
    masked_m: Tensor | None = None


class Aligned(Distilled):
    """Contrast against momentum features and queues, matching with hard negatives, masked words with the picture's help.

    Of several ranks each compares its own rows with the momentum features of all, and the mean over ranks of these losses is that
    of the whole batch; hard negatives are found among the rank's own pairs, as in ALBEF.
    """

    def __init__(self, config: AlignedConfig, *, masked_lm: bool, with_ids: bool) -> None:
        super().__init__(config, Encoders(config, embed_dim=config.embed_dim, masked_lm=masked_lm))
        self.queue = FeatureQueue(config.queue_size, dict.fromkeys(("image", "text"), config.embed_dim), with_ids=with_ids)
        self.itm_head = nn.Linear(config.text.width, 2)  # of the fused class token: does not fit, fits
        self.temperature = nn.Parameter(torch.tensor(config.temperature_init))
        self._made: dict[str, Tensor] = {}  # features of the newest batch, for the queue

    def encode_views(self, batch: Batch) -> Encoded:
        """image [B, 2, 3, S, S], the second view the momentum copy's, or [B, 3, S, S] for both; text; text_masked if any."""
        views = batch["image"] if batch["image"].ndim == 5 else batch["image"][:, None]
        mask = batch["text_mask"]
        # Both versions of the text in one pass.
        texts = [batch["text"], batch["text_masked"]] if "text_masked" in batch else [batch["text"]]
        text, masks = torch.cat(texts), mask.repeat(len(texts), 1)
        tokens = self.online.image_tokens(views[:, 0])
        states = self.online.text_states(text, masks).chunk(len(texts))
        with torch.no_grad():
            copy = self.momentum.module
            tokens_m = copy.image_tokens(views[:, -1])
            states_m = copy.text_states(text, masks).chunk(len(texts))
            image_m = copy.image_projection(tokens_m[:, 0])
            text_m = copy.text_projection(states_m[0][:, 0])
        masked, masked_m = (states[1], states_m[1]) if len(texts) > 1 else (None, None)
        image = self.online.image_projection(tokens[:, 0])
        text = self.online.text_projection(states[0][:, 0])
        return Encoded(mask, tokens, states[0], image, text, tokens_m, states_m[0], image_m, text_m, masked, masked_m)

    def contrast(self, x: Tensor, kind: str, key: Tensor, *, teacher: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Of online features x [B, D] against momentum ones: key [B, D], those of the same samples, on all ranks, and the queue
        of their kind ("image" or "text"). See queue_contrastive_loss; ids [B] as it wants them of the rows."""
        queue: Tensor = getattr(self.queue, kind)
        all_ids = None if ids is None else (ids, gather(ids), self.queue.ids)
        own = ranks()[0] * x.shape[0]
        return queue_contrastive_loss(
            x, gather(key), queue, 1 / self.temperature, own=own, teacher=teacher, alpha=self.alpha, ids=all_ids
        )

    def match(self, encoded: Encoded, ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The matching loss, and the masked text's states [B, L, C] after they have seen the picture, where there is one.

        Each picture's own text, its hard negative and the masked text pass in one go, in which the picture's keys and values are
        made once; only the negatives of texts, other pictures, are copies and a second one.
        """
        e, scale = encoded, 1 / self.temperature.detach()
        picture = hard_negatives(e.text, e.image_m, scale, ids, drawn=self.training)  # for each text
        other = hard_negatives(e.image, e.text_m, scale, ids, drawn=self.training)  # for each picture a text
        chosen = other.clamp(min=0)
        states = [e.states, e.states[chosen]] + ([] if e.masked is None else [e.masked])
        masks = [e.text_mask, e.text_mask[chosen]] + ([] if e.masked is None else [e.text_mask])
        fused = self.online.fuse(torch.stack(states, 1).flatten(0, 1), torch.stack(masks, 1).flatten(0, 1), e.tokens)
        fused = fused.unflatten(0, (-1, len(states)))  # [B, 2 or 3, L, C]
        wrong = self.online.fuse(e.states, e.text_mask, e.tokens[picture.clamp(min=0)])
        negative = self.itm_head(torch.cat((fused[:, 1, 0], wrong[:, 0])))
        loss = matching_loss(self.itm_head(fused[:, 0, 0]), negative, torch.cat((other, picture)) >= 0)
        return loss, None if e.masked is None else fused[:, 2]

    def masked_lm(self, encoded: Encoded, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, L, C] of `match`, labels [B, L]. The momentum copy has read the same masked text beside the other view."""
        with torch.no_grad():
            copy = self.momentum.module
            hidden_m = copy.fuse(encoded.masked_m, encoded.text_mask, encoded.tokens_m)
        rate = self.config.data.text.mask.rate
        losses = token_losses(
            self.online.predictor(hidden),
            labels,
            teacher=copy.predictor(hidden_m),
            alpha=self.alpha,
            max_rows=asked_rows(labels, rate),
        )
        return mean_over_asked(losses, labels)

    def keep(self, encoded: Encoded, ids: Tensor | None = None) -> None:
        """Hands the batch's features over to after_step."""
        self._made = {"image": encoded.image_m, "text": encoded.text_m} | ({} if ids is None else {"ids": ids})

    def after_step(self) -> None:
        self.queue.enqueue(**self._made)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> [B, embed_dim] float32 of unit length."""
        return self.online.image_projection(self.online.image_tokens(image)[:, 0])

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L] int64, text_mask [B, L], what is not padding unless given -> [B, embed_dim] float32 of unit length."""
        mask = text != self.config.text.pad_id if text_mask is None else text_mask
        return self.online.text_projection(self.online.text_states(text, mask)[:, 0])

    def image_states(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> [B, T, C]"""
        return self.online.image_tokens(image)

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """text [B, L], text_mask [B, L] bool -> [B, L, C]"""
        return self.online.text_states(text, text_mask)

    def score_pairs(self, image_states: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """[P, T, C], [P, L, C], [P, L] bool -> [P] float32: the logit of "fits"."""
        return self.itm_head(self.online.fuse(text_states, text_mask, image_states)[:, 0])[:, 1].float()


def distilled_classes(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: Tensor) -> Tensor:
    """The mean cross-entropy of logits [B, K] against (1 - alpha) one-hot(labels [B]) + alpha softmax(logits_m [B, K])."""
    logits = logits.float()
    soft = F.cross_entropy(logits, logits_m.float().softmax(1))
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft


def text_of(data: DataSpec) -> None:
    """UserError: a model of this family without text or picture."""
    if data.image is None or data.text is None:
        raise UserError("model.data: expected both image and text, got null for one")
