"""TCL fine-tuned: questions, statements about two pictures, entailment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.hosts.albef import AlbefConfig, Distilled, check_pairs
from vlpfast.hosts.albef_tasks import Entailer, Judge, PairEncoders, QuestionAnswering, classified
from vlpfast.models.tcl import finetuning_image, tiny_towers
from vlpfast.models.tcl_convert import Naming, convert, doubled, into_decoder
from vlpfast.nn.bert import BertConfig
from vlpfast.objectives.token_loss import Predictor, token_losses
from vlpfast.ops.linear_cross_entropy import token_logprob
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, TargetSpec, TextSpec, UserError

PRETRAINED = ("online.image_projection.", "online.text_projection.", "itm_head.", "temperature", "queue.")  # left out here
RANKED_ROWS = 4096  # answers that are scored at once


class TCLVQA(Distilled):
    """Questions about pictures, answered by a decoder and, at evaluation, by ranking given answers (Answers).

        answer = (1 / B) sum over answers a of w_a sum_t [(1 - a) -log p(a_t | a_<t, question, picture) + a against the copy's p]

    The question's encoder is TCL's whole BERT; the decoder, six layers with cross-attention to the question's states, begins as
    its fusion half. Ranking: of K candidates those `ranked` whose first token is likeliest, then these by their log-likelihood.

    Departures from the official code: its decoder's soft targets were softmaxes over the wrong axis, and had no share at all
    (alpha was not handed on); both are as ALBEF mended them. One end token behind an answer, not two.
    """

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = None

    writes_with = ""

    @dataclass
    class Config(AlbefConfig):
        decoder_layers: int = 6
        ranked: int = 128  # k_test
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=finetuning_image(),
                text=None,
                texts={
                    "question": TextSpec(context_length=50, templates=["{question}"], clean="albef", max_words=50),
                    "answer": TextSpec(context_length=16, templates=["{answers.answer}"], every=True),
                },
            )
        )

        @classmethod
        def paper(cls) -> TCLVQA.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCLVQA.Config:
            """emojiworld's questions, one of a picture's drawn each epoch, with the answer to it."""
            texts = {
                "question": TextSpec(context_length=28, templates=["{qa.question}"], clean="albef"),
                "answer": TextSpec(context_length=10, templates=["{qa.answer}"]),
            }
            data = DataSpec(image=ImageSpec(size=64), text=None, texts=texts)
            return cls(**tiny_towers(), decoder_layers=2, ranked=16, data=data)

    naming = Naming(into_decoder, drop=PRETRAINED)

    def __init__(self, config: Config) -> None:
        for name in ("question", "answer"):
            if name not in config.data.texts:
                raise UserError(f"model.data.texts: expected {name!r}, got {', '.join(config.data.texts) or 'none'}")
        if config.ranked < 1:
            raise UserError(f"model.ranked: expected at least 1, got {config.ranked}")
        super().__init__(config, QuestionAnswering(config, config.decoder_layers))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image, question, answer (answer_of, answer_weight where there are several) -> {"answer": 0-d float32}."""
        answer, mask = batch["answer"], batch["answer_mask"]
        # The next token's id; the mask, not the ids, says what is padding.
        labels = F.pad(answer.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)

        def predicted(network: QuestionAnswering) -> Predictor:
            states = network.question_states(batch["image"], batch["question"], batch["question_mask"])
            question_mask = batch["question_mask"]
            if "answer_of" in batch:
                states, question_mask = states[batch["answer_of"]], question_mask[batch["answer_of"]]
            return network.answered(answer, states, question_mask)

        with torch.no_grad():
            teacher = predicted(self.momentum.module)
        losses = token_losses(predicted(self.online), labels, teacher=teacher, alpha=self.alpha, max_rows=labels.numel()).sum(
            1
        )  # [A]
        if "answer_weight" in batch:
            losses = losses * batch["answer_weight"]
        return {"answer": losses.sum() / batch["image"].shape[0]}

    @torch.no_grad()
    def rank_answers(self, batch: Batch, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        """image, question; candidates [K, L], candidate_mask [K, L] -> [B, K] float32 log-likelihoods, -inf of those that the
        first token rules out."""
        network: QuestionAnswering = self.online
        states = network.question_states(batch["image"], batch["question"], batch["question_mask"])
        first = network.answered(candidates[:1, :1].expand(len(states), 1), states, batch["question_mask"])
        logits = network.mlm_head.logits(first.hidden[:, 0], first.weight).float().log_softmax(1)  # [B, V]
        count = min(self.config.ranked, len(candidates))
        chosen = logits[:, candidates[:, 1]].topk(count, dim=1).indices  # [B, k]
        labels = F.pad(candidates.masked_fill(~candidate_mask, -100)[:, 1:], (0, 1), value=-100)
        scores = states.new_full((len(states), len(candidates)), -torch.inf, dtype=torch.float32)
        step = max(1, RANKED_ROWS // count)
        for begin in range(0, len(states), step):
            part = slice(begin, begin + step)
            rows = chosen[part].flatten()  # a question's answers stand together and share its states
            found = network.answered(candidates[rows], states[part], batch["question_mask"][part])
            likelihood = token_logprob(network.mlm_head(found.hidden), found.weight, labels[rows], bias=network.mlm_head.bias)
            scores[part] = scores[part].scatter(1, chosen[part], likelihood.sum(1).view(-1, count))
        return scores

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a pre-trained TCL, official or own, or of this model; see tcl_convert.convert."""
        return convert(self, state_dict)


def pair_towers() -> dict[str, Any]:
    """tiny_towers with each of the two fusion layers twice."""
    return tiny_towers(layers=6, cross_attention=[2, 3, 4, 5])


def pair_text() -> BertConfig:
    """BERT-base with its six fusion layers twice."""
    return BertConfig(layers=18, cross_attention=list(range(6, 18)))


class TCLNLVR2(Distilled):
    """Whether a statement about two pictures is true (NLVR2): cross-entropy of the fused class token's two classes, with the
    momentum copy's soft targets.

    18 layers of BERT: each of TCL's fusion layers twice, one for either picture, keys and values made by the same weights. Starts
    from a TCL or, as in the paper, from a TCLAssignment of one epoch that has started from it. FSDP spreads no weights that two
    blocks share: train.strategy=ddp.
    """

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = None

    @dataclass
    class Config(AlbefConfig):
        text: BertConfig = field(default_factory=pair_text)
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=finetuning_image(pictures=2),
                text=TextSpec(context_length=40, templates=["{sentence}"], clean="albef", max_words=40),
                targets={"label": TargetSpec("label", classes=["False", "True"])},
            )
        )

        @classmethod
        def paper(cls) -> TCLNLVR2.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCLNLVR2.Config:
            data = DataSpec(
                image=ImageSpec(size=64, pictures=2),
                text=TextSpec(context_length=36, templates=["{statements.statement}"], clean="albef"),
                targets={"label": TargetSpec("statements.label", classes=["false", "true"])},
            )
            return cls(**pair_towers(), data=data)

    naming = Naming(doubled, (*PRETRAINED, "online.mlm_head.", "online.assign_head."), ("online.head.",))

    def __init__(self, config: Config) -> None:
        check_pairs(config.data)
        super().__init__(config, Judge(config))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image [B, 2, 3, S, S], text, label [B] -> {"label": 0-d float32}."""
        return {"label": classified(self, batch)}

    def classify(self, batch: Batch) -> Tensor:
        """image, text -> logits [B, 2]: false, true"""
        return self.online(batch)

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a TCL, official or own, a TCLAssignment or this model; see tcl_convert.convert."""
        return convert(self, state_dict)


class TCLAssignment(nn.Module):
    """Text assignment, the step between TCL and TCLNLVR2: of two pictures, which one is the text's, or is it neither's?

    Ordinary pairs. Of each text, with probability 1/3 each, its own picture is the left one, the right one, or none of the two;
    the others are those of other pairs of the batch. Cross-entropy of three classes, 0 for a batch of less than three pairs. In
    evaluation, where nothing is drawn, every text is asked for all three. No momentum copy, as in ALBEF's code.
    """

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = None

    @dataclass
    class Config(AlbefConfig):
        text: BertConfig = field(default_factory=pair_text)
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=finetuning_image(size=256), text=TextSpec(context_length=30, clean="albef", max_words=30)
            )
        )

        @classmethod
        def paper(cls) -> TCLAssignment.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCLAssignment.Config:
            return cls(**pair_towers(), data=DataSpec(image=ImageSpec(size=64), text=TextSpec(context_length=28, clean="albef")))

    naming = Naming(doubled, (*PRETRAINED, "online.mlm_head."), ("online.assign_head.",))

    def __init__(self, config: Config) -> None:
        check_pairs(config.data)
        super().__init__()
        self.config = config
        self.online = PairEncoders(config)
        self.online.assign_head = nn.Linear(config.text.width, 3)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image [B, 3, S, S], text -> {"assign": 0-d float32}."""
        network, mask = self.online, batch["text_mask"]
        tokens = network.image_tokens(batch["image"])  # [B, T, C]
        states = network.text_states(batch["text"], mask)
        count = len(tokens)
        if count < 3:
            return {"assign": 0.0 * (tokens.sum() + states.sum()).float()}
        own = torch.arange(count, device=tokens.device)
        if self.training:
            kinds = torch.randint(3, (count,), device=own.device)
            first = torch.randint(1, count, (count,), device=own.device)
            second = torch.randint(1, count - 1, (count,), device=own.device)
            one, other = (own + first) % count, (own + second + (second >= first)) % count
            rows = own
        else:
            # Neighbours in an order that the pictures have of themselves, so that the batch's order does not matter.
            order = tokens[:, 0, 0].argsort()
            place = order.argsort()
            one, other = (order[(place + step) % count].repeat(3) for step in (1, 2))
            kinds, rows = own.new_tensor([0, 1, 2]).repeat_interleave(count), own.repeat(3)
        left = torch.where(kinds == 0, rows, one)
        right = torch.where(kinds == 0, one, torch.where(kinds == 1, rows, other))
        fused = network.fuse_pair(states[rows], mask[rows], tokens[left], tokens[right])
        return {"assign": F.cross_entropy(network.assign_head(fused).float(), kinds)}

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a pre-trained TCL, official or own, or of this model; see tcl_convert.convert."""
        return convert(self, state_dict)


class TCLEntailment(Distilled):
    """Whether a picture contradicts a text, leaves it open, or entails it (SNLI-VE): cross-entropy of the fused class token's
    three classes, with the momentum copy's soft targets. Starts from a TCL."""

    PAPER = "Yang et al. 2022, arXiv 2202.10401"
    PUBLISHED_PARAMETERS = None

    @dataclass
    class Config(AlbefConfig):
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=finetuning_image(),
                text=TextSpec(context_length=40, templates=["{sentence}"], clean="albef", max_words=40),
                targets={"label": TargetSpec("label", classes=["contradiction", "neutral", "entailment"])},
            )
        )

        @classmethod
        def paper(cls) -> TCLEntailment.Config:
            return cls()

        @classmethod
        def tiny(cls) -> TCLEntailment.Config:
            data = DataSpec(
                image=ImageSpec(size=64),
                text=TextSpec(context_length=28, templates=["{entailment.statement}"], clean="albef"),
                targets={"label": TargetSpec("entailment.label", classes=["contradiction", "neutral", "entailment"])},
            )
            return cls(**tiny_towers(), data=data)

    naming = Naming(drop=(*PRETRAINED, "online.mlm_head."), fresh=("online.head.",))

    def __init__(self, config: Config) -> None:
        check_pairs(config.data)
        target = config.data.targets.get("label")
        if target is None or not target.classes:
            raise UserError("model.data.targets: expected 'label' with its classes")
        super().__init__(config, Entailer(config, len(target.classes)))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """image, text, label [B] -> {"label": 0-d float32}."""
        return {"label": classified(self, batch)}

    def classify(self, batch: Batch) -> Tensor:
        """image, text -> logits [B, classes]"""
        return self.online(batch)

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a pre-trained TCL, official or own, or of this model; see tcl_convert.convert."""
        return convert(self, state_dict)
