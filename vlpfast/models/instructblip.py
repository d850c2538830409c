"""InstructBLIP: a Q-Former that reads a picture as an instruction asks, before a language model that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlpfast.hosts.prefix_lm import Examples, PrefixLM, PrefixLMConfig
from vlpfast.hosts.qformer import AlignedQueries, VisualQueries
from vlpfast.nn.lm import LMConfig, Reading, vocabulary_of
from vlpfast.nn.qformer import QFormerConfig
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, TextSpec, UserError, Vocabulary

MODES = ("instruct", "pretrain", "language")
PROMPT, ANSWER = "{instructions.instruction}", "{instructions.answer}"


def eva_giant() -> ViTConfig:
    """EVA-CLIP's ViT-g/14 without its last block, as BLIP-2 takes it: 39 blocks, feed-forward parts of 6144."""
    return ViTConfig.deit(patch_size=14, width=1408, layers=39, heads=16, mlp_ratio=4.3637)


class InstructBLIP(nn.Module):
    """A frozen picture tower, a Q-Former whose queries see the instruction beside the picture, and a frozen language model.

    Dai et al. 2023, "InstructBLIP: towards general-purpose vision-language models with instruction tuning", arXiv 2305.06500,
    section 2. Z = Q-Former(queries; instruction; norm(ViT(picture))), of which the queries' states alone go on, by one linear
    layer, to where the language model reads: [Z | instruction | answer]. One loss, "answer": the mean over all answer tokens of
    the batch, end tokens with them, of -log p(token | Z, instruction, tokens before). Trained are the Q-Former with its queries,
    the norm behind the tower and the linear layer: 188 million numbers, of which 4.7 million (the last layer's feed-forward part
    for text, whose output nothing reads) get no gradient in the official code either and are frozen here. The Q-Former's text
    never sees the picture; it changes the queries by their common self-attention, so its feed-forward parts are needed, and
    checkpoints of BLIP-2's second stage, which have none, are refused.

    Modes: "instruct" is that. "pretrain" is BLIP-2's first stage (Li et al. 2023, arXiv 2301.12597, section 3.1), where the
    Q-Former comes from: "contrast", "matching" and "caption" on picture and caption; needs stage1 and data.texts.caption. Label
    smoothing is of these alone. "language" is ours, where no pre-trained language model is at hand: it learns the texts without
    the pictures, or, if data.texts.reading says something before the prompt, to answer by what it has read: what a prefix is to
    make use of. After that it stays as it is.

    A language model of either kind: FlanT5, whose encoder reads what is before the answer, or a causal one such as Vicuna (see
    PrefixLM). Vicuna for released weights: language.architecture=vicuna-7b, language.settings={vocab_size: 32001, pad_token_id:
    32000} for the added [PAD]; their tokenizer has "</s>" for begin and end alike, and whether it begins texts with that or with
    "<s>" is up to the tokenizer's files (tokenizer_config.json). Weights of v1.1: of another version the output is empty or
    noise. FlanT5 has plain GELUs, as theirs is switched to. FlanT5 is made for bfloat16, Vicuna for float16 (language.dtype).

    Departures from the official code: the language model is in evaluation mode in training too (theirs leaves T5's dropout on).
    Ranking adds up log-probabilities over each candidate's own tokens (rank_by=sum, or mean); theirs divides by the padded length
    for Vicuna, so that scores of candidates that were padded apart cannot be compared. Rows are packed by indexing, frames of a
    video are pictures of one batch, candidates share what has been read. Examples (few_shot) are other samples of the batch;
    theirs come with the sample, from data that was not published.

    The sheet's unknowns: pictures are cut and mirrored as LAVIS' processor does by default; lengths are 128 tokens of instruction
    (its beginning is cut), 256 of answer (its end is cut). Batches are of one data set, drawn in proportion to the square root of
    its size: data.pure_batches=true and data.weights=sqrt over data.mixture. Generation: 5 beams, repetition penalty 1.5; length
    penalty 1 for descriptions, -1 for short answers.
    """

    PAPER = "Dai et al. 2023, arXiv 2305.06500"
    # With FlanT5-XL, as transformers counts its InstructBLIP, whose output layer is tied, and untied as released
    PUBLISHED_PARAMETERS = 4_022_969_088

    writes_with = "lm"

    @dataclass
    class Config(PrefixLMConfig):
        """The defaults are InstructBLIP with FlanT5-XL: 4,022,969,088 parameters."""

        language: LMConfig = field(default_factory=lambda: LMConfig("flan-t5-xl", {"dense_act_fn": "gelu"}, dtype="bfloat16"))
        vision: ViTConfig = field(default_factory=eva_giant)
        qformer: QFormerConfig = field(default_factory=QFormerConfig)
        init_std: float = 0.02  # of the Q-Former's first weights, BERT's at width 768; a narrow one needs more to attend at all
        instructed: bool = True  # the Q-Former reads the instruction; False: as BLIP-2's, the queries alone
        few_shot: int = 0  # with an encoder: up to so many samples of the batch stand before each one's own tokens, ...
        few_shot_prob: float = 0.0  # ... any at all with this probability, their number even then; in training alone
        stage1: bool = False  # the heads that mode "pretrain" needs
        embed_dim: int = 256  # pretrain: where pictures and captions are compared
        dec_id: int = 30522  # pretrain: the id of [DEC], which captions begin with
        train_vision: bool = False  # pretrain: the tower too; ours, for one that is not pre-trained
        data: DataSpec = field(
            default_factory=lambda: DataSpec(
                image=ImageSpec(scale=[0.5, 1.0], mirror=0.5, resize="squash"),
                text=TextSpec(context_length=384, templates=[PROMPT], answer=[ANSWER], tokenizer="lm"),
                texts={"instruction": TextSpec(context_length=128, templates=[PROMPT], tokenizer="qformer", drop="start")},
            )
        )

        def vocabularies(self) -> dict[str, Vocabulary]:
            qformer = Vocabulary(self.qformer.vocab_size, pad_id=self.qformer.pad_id, extra=["[DEC]"])
            return {"lm": vocabulary_of(self.language), "qformer": qformer}

        @classmethod
        def paper(cls) -> InstructBLIP.Config:
            return cls()

        @classmethod
        def tiny(cls) -> InstructBLIP.Config:
            """For the embedded data on a CPU: 48 x 48 pictures, 2 queries, 1.6 million parameters; ids of tokenizers trained
            here."""
            qformer = QFormerConfig(
                vocab_size=1024,
                width=128,
                layers=2,
                heads=4,
                hidden=256,
                max_positions=40,
                dropout=0.0,
                cross_attention=[0, 1],
                context_width=128,
                queries=2,
            )
            about = {"answer": [ANSWER], "tokenizer": "lm"}
            told = [f"{{caption}}. {PROMPT}", f"{ANSWER}. {PROMPT}"]  # what a picture shows; what it is to be asked for
            return cls(
                vision=ViTConfig.deit(patch_size=8, width=128, layers=3, heads=4, stem=[32, 64], patch_bias=False),
                qformer=qformer,
                init_std=0.09,  # 1 / sqrt(width)
                language=LMConfig("tiny-llama", {"vocab_size": 1024}),
                answer_length=24,
                stage1=True,
                embed_dim=64,
                dec_id=3,
                train_vision=True,
                data=DataSpec(
                    image=ImageSpec(size=48),
                    text=TextSpec(context_length=48, templates=[PROMPT], **about),
                    texts={
                        "reading": TextSpec(context_length=72, templates=told, **about),
                        "instruction": TextSpec(context_length=32, templates=[PROMPT], tokenizer="qformer", drop="start"),
                        "caption": TextSpec(context_length=32, tokenizer="qformer"),
                    },
                ),
            )

    def __init__(self, config: Config) -> None:
        super().__init__()
        data = config.data
        if (data.image is None) == (data.video is None):
            raise UserError("model.data: instructblip needs either image or video")
        if config.qformer.context_width != config.vision.width:
            raise UserError(
                f"model.qformer.context_width: expected {config.vision.width}, the width of model.vision, got "
                f"{config.qformer.context_width}"
            )
        if config.few_shot < 0 or not 0 <= config.few_shot_prob <= 1:
            raise UserError(
                f"model.few_shot: expected a number of examples and a probability, got {config.few_shot}, {config.few_shot_prob}"
            )
        self.config = config
        vision = ViT(config.vision, (data.image or data.video).size)
        vision.norm_post = nn.Identity()  # the norm behind the tower is trained, and not of it
        if config.stage1:
            self.reader: VisualQueries = AlignedQueries(vision, config.qformer, dec_id=config.dec_id, embed_dim=config.embed_dim)
        else:
            self.reader = VisualQueries(vision, config.qformer)
        with torch.no_grad():
            for module in self.reader.qformer.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight.mul_(config.init_std / 0.02)
        self.language = PrefixLM(config, config.qformer.width)
        if config.few_shot and not self.language.lm.is_encoder_decoder:
            raise UserError("model.few_shot: expected 0 for a language model without an encoder")
        try:
            self.set_mode("instruct")
        except ValueError as error:
            raise UserError(f"model.data: {error}") from error

    def set_mode(self, mode: str) -> None:
        """See the class. What a mode does not train is frozen."""
        if mode not in MODES:
            raise ValueError(f"expected one of {', '.join(MODES)}, got {mode!r}")
        config, data = self.config, self.config.data
        if mode != "pretrain" and (data.text is None or not data.text.answer):
            raise ValueError(f"{mode} needs data.text with an answer")
        if mode == "instruct" and config.instructed and ("instruction" not in data.texts or config.qformer.text == "none"):
            raise ValueError("instruct needs data.texts.instruction and a Q-Former with text, or model.instructed=false")
        if mode == "pretrain" and (not config.stage1 or "caption" not in data.texts or data.image is None):
            raise ValueError("pretrain needs model.stage1=true, data.image and data.texts.caption")
        self.mode = mode
        self.language.lm.freeze(config.language.frozen and mode != "language")
        for name, parameter in self.named_parameters():
            if not name.startswith("language.lm."):
                parameter.requires_grad_(self._is_trained(name))
            elif mode == "pretrain":
                parameter.requires_grad_(False)
        self.train(self.training)

    def _is_trained(self, name: str) -> bool:
        """A parameter outside the language model, in the present mode."""
        part, _, rest = name.removeprefix("reader.").partition(".")
        if self.mode == "pretrain":
            return (part == "vision" and self.config.train_vision) or part not in ("vision", "language")
        if self.mode == "language" or part == "vision":
            return False
        if part == "qformer":
            unread = f"layers.{len(self.reader.qformer.layers) - 1}.feed_forward."
            text = ".feed_forward." in rest or rest.startswith(("token_embed.", "position_embed."))
            return not rest.startswith(unread) and (self.config.instructed or not text)
        return part in ("norm", "language")  # of the latter the projector

    def train(self, mode: bool = True) -> InstructBLIP:
        """The picture tower is in evaluation mode but where it is trained."""
        super().train(mode)
        self.reader.vision.train(mode and self.mode == "pretrain" and self.config.train_vision)
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Mode "instruct": image [B, 3, S, S] or video [B, T, 3, S, S], instruction, text and its labels -> {"answer"};
        "pretrain": image, caption -> {"contrast", "matching", "caption"}; "language": text, or reading, and its labels ->
        {"language"}; 0-d float32."""
        if self.mode == "pretrain":
            return self._pretrain(batch)
        text, mask, labels = batch["text"], batch["text_mask"], batch["text_labels"]
        if self.mode == "language":
            if "reading" not in batch:
                return {"language": self.language.text_loss(text, mask, labels)}
            parts = (batch[f"reading{part}"] for part in ("", "_mask", "_labels"))
            return {"language": self.language.answer_loss(*parts)}
        visual = self.visual_tokens(batch)
        return {"answer": self.language(visual, text, mask, labels, before=self._examples(visual, text, mask))}

    def _pretrain(self, batch: Batch) -> dict[str, Tensor]:
        reader = self.reader
        trains = torch.is_grad_enabled() and self.config.train_vision
        tokens = reader.norm(reader.vision(batch["image"])) if trains else reader.image_tokens(batch["image"])
        encoded = reader.encode(tokens, batch["caption"], batch["caption_mask"])
        rows = batch["caption"].numel() if batch["caption"].device.type == "cuda" else None  # as many as need no counting
        return {
            "contrast": reader.contrast(encoded),
            "matching": reader.match(encoded),
            "caption": reader.caption(encoded, max_rows=rows),
        }

    def visual_tokens(self, batch: Batch) -> Tensor:
        """The queries' states behind picture and instruction, [B, Q, C]; of a video [B, T * Q, C], in the order of time."""
        pictures = batch["image"] if "image" in batch else batch["video"]
        if not self.config.instructed:
            return self.reader(pictures)
        return self.reader(pictures, batch["instruction"], batch["instruction_mask"])

    def _examples(self, visual: Tensor, text: Tensor, mask: Tensor) -> Examples | None:
        """The next samples of the batch with their answers: k of each row's few_shot, k = 0 with probability 1 - few_shot_prob,
        else even in 1 .. few_shot."""
        count, prob = self.config.few_shot, self.config.few_shot_prob
        if not (self.training and count and prob):
            return None
        size = len(text)
        draws = torch.rand(2, size, 1, device=text.device)
        shown = torch.where(draws[0] < prob, 1 + (draws[1] * count).long(), 0)  # [B, 1]
        shown = shown.clamp(max=size - 1)  # nobody is an example of itself
        number = torch.arange(count, device=text.device)
        which = (torch.arange(size, device=text.device)[:, None] + 1 + number) % size  # [B, K]
        embeds = torch.cat((self.language.projector(visual), self.language.lm.embed(text[:, 1:])), dim=1)  # [B, E, C]
        there = torch.cat((mask.new_ones(visual.shape[:2]), mask[:, 1:]), dim=1)
        there = there[which] & (number < shown)[..., None]  # [B, K, E]
        return Examples(embeds[which].flatten(1, 2), there.flatten(1, 2))

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int = 30,
        beams: int = 5,
        length_penalty: float = 1.0,
        min_new_tokens: int = 1,
        repetition_penalty: float = 1.5,
    ) -> Tensor:
        """-> ids [B, L] of the tokenizer "lm", each row up to its end token, then padding. The paper's: 5 beams, repetition
        penalty 1.5, length penalty 1 for descriptions and -1 for short answers."""
        return self.language.generate(
            self._read(batch),
            beams=beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
        )

    @torch.no_grad()
    def rank_answers(self, batch: Batch, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        """candidates [K, L] (or [B, K, L], each sample's own), of the tokenizer "lm" -> log-likelihoods [B, K] float32, by
        config.rank_by. Picture and prompt are read once."""
        return self.language.rank(self._read(batch), candidates, candidate_mask)

    def _read(self, batch: Batch) -> Reading:
        return self.language.read(self.visual_tokens(batch), batch["text"], batch["text_mask"], batch.get("text_labels"))

    def convert(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names of LAVIS (both stages of BLIP-2, InstructBLIP) or of transformers -> under this model's; see
        instructblip_convert.convert_any."""
        from vlpfast.models.instructblip_convert import convert_any

        return convert_any(state_dict, self)
