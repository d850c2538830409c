"""What ALBEF and its descendants are fine-tuned to: answers, statements about two pictures, entailment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.hosts.albef import AlbefConfig, Distilled, Encoders
from vlpfast.nn.bert import Bert, BertConfig, MaskedLMHead
from vlpfast.nn.heads import MLPHead
from vlpfast.objectives.token_loss import Predictor
from vlpfast.types import Batch, UserError


class QuestionAnswering(Encoders):
    """Pictures and questions to states, by all layers of the text's BERT; and a decoder of answers that attends to these."""

    def __init__(self, config: AlbefConfig, layers: int) -> None:
        """layers: of the decoder."""
        super().__init__(config)
        sizes = {
            **vars(config.text),
            "layers": layers,
            "cross_attention": list(range(layers)),
            "context_width": config.text.width,
        }
        self.decoder = Bert(BertConfig(**sizes))
        self.mlm_head = MaskedLMHead(config.text)  # of answers, left to right

    def question_states(self, image: Tensor, question: Tensor, question_mask: Tensor) -> Tensor:
        """image [B, 3, S, S], question [B, L] -> [B, L, C]"""
        return self.text(question, question_mask, context=self.image_tokens(image))

    def answered(self, answer: Tensor, states: Tensor, mask: Tensor) -> Predictor:
        """answer [A, L], states [B, L', C] of which each row serves A / B consecutive answers, mask [B, L'] -> [A, L, C]"""
        hidden = self.decoder(answer, mask="causal", context=states, context_mask=mask)
        return Predictor(hidden, self.mlm_head, self.decoder.token_embed.weight)


class PairEncoders(Encoders):
    """Texts about two pictures: of each two layers of the fusion half the first sees the left one, the second the right one, by
    the same keys and values."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        cross = config.text.cross_attention
        if cross != list(self.fusion) or len(cross) % 2:
            raise UserError(
                f"model.text.cross_attention: expected an even number of layers, each of the last ones, got {cross} of "
                f"{config.text.layers}"
            )
        for layer in self.fusion[::2]:
            self.text.layers[layer + 1].cross.kv_proj = self.text.layers[layer].cross.kv_proj

    def fuse_pair(self, states: Tensor, text_mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """states [B, L, C], left and right [B, T, C] -> [B, C], the class token."""
        for layer in self.fusion:
            seen = (left, right)[(layer - self.fusion.start) % 2]
            states = self.text.run(states, text_mask, context=seen, layers=range(layer, layer + 1))
        return states[:, 0]


class Judge(PairEncoders):
    """Whether a text says the truth about two pictures."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        self.head = MLPHead(config.text.width, 2)

    def forward(self, batch: Batch) -> Tensor:
        """-> logits [B, 2]"""
        left, right = self.image_tokens(batch["image"].flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        states = self.text_states(batch["text"], batch["text_mask"])
        return self.head(self.fuse_pair(states, batch["text_mask"], left, right))


class Entailer(Encoders):
    """What a picture says of a text."""

    def __init__(self, config: AlbefConfig, classes: int) -> None:
        super().__init__(config)
        self.head = MLPHead(config.text.width, classes)

    def forward(self, batch: Batch) -> Tensor:
        """-> logits [B, classes]"""
        mask = batch["text_mask"]
        states = self.fuse(self.text_states(batch["text"], mask), mask, self.image_tokens(batch["image"]))
        return self.head(states[:, 0])


def classified(model: Distilled, batch: Batch) -> Tensor:
    """The distilled cross-entropy with Batch["label"]."""
    with torch.no_grad():
        logits_m = model.momentum(batch)
    return distilled_classes(model.online(batch), batch["label"], logits_m, model.alpha)


def distilled_classes(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: Tensor) -> Tensor:
    """The mean cross-entropy of logits [B, K] against (1 - alpha) one-hot(labels [B]) + alpha softmax(logits_m [B, K])."""
    logits = logits.float()
    soft = F.cross_entropy(logits, logits_m.float().softmax(1))
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft
