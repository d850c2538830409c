from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract import losses_of, make_batch, optimizer_for, pick, train
from ranks import run
from torch import Tensor

from vlpfast.data import load_tokenizer
from vlpfast.models.instructblip import InstructBLIP
from vlpfast.nn.lm import LanguageModel, LMConfig
from vlpfast.nn.lora import LoRAConfig
from vlpfast.nn.splice import cut_answers
from vlpfast.nn.vit import ViTConfig
from vlpfast.training.config import TrainConfig
from vlpfast.training.parallel import Spread, World
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, UserError, VideoSpec

TINY = InstructBLIP.Config.tiny()
SMALL = replace(
    TINY,
    vision=ViTConfig.deit(patch_size=8, width=128, layers=1, heads=2),
    data=replace(TINY.data, image=ImageSpec(size=16)),
)
T5 = replace(SMALL, language=LMConfig("tiny-t5"))


def make(config: InstructBLIP.Config = SMALL, mode: str = "instruct") -> InstructBLIP:
    torch.manual_seed(0)
    model = InstructBLIP(config).eval()
    with torch.no_grad():  # a random language model hardly notices what it reads
        for parameter in model.language.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_mode(mode)
    return model


def batch_of(config: InstructBLIP.Config = SMALL, size: int = 4) -> Batch:
    return make_batch(config.data, size)


# --- the sheet's exact tests; those of the labels' mask, padding and vocabulary are in tests/hosts/test_prefix_lm.py, that of the
# --- grouped feed-forward parts in tests/nn/test_qformer.py, that of p_d in tests/data/test_mixture.py


def candidates() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[1, 7, 2, 0, 0], [1, 8, 9, 10, 2], [1, 7, 9, 2, 0]])
    return ids, ids != 0


@pytest.mark.parametrize("config", [SMALL, T5], ids=["vicuna", "t5"])
def test_ranking_with_shared_prefix_is_naive_ranking(config: InstructBLIP.Config) -> None:
    """Naive: the loss of each candidate as the answer, in a pass of its own."""
    model, batch = make(config), batch_of(config)
    ids, seen = candidates()
    got = model.rank_answers(batch, ids, seen)
    for row in range(4):
        one = pick(batch, torch.tensor([row]))
        prompt = one["text"][:, : int((one["text_labels"] != -100).int().argmax())]
        for number in range(3):
            answer = ids[number][seen[number]][None, 1:]
            text = torch.cat((prompt, answer), dim=1)
            labels = torch.cat((torch.full_like(prompt, -100), answer), dim=1)
            alone = one | {"text": text, "text_mask": torch.ones_like(text, dtype=torch.bool), "text_labels": labels}
            expected = -losses_of(model, alone)["answer"] * answer.shape[1]
            torch.testing.assert_close(got[row, number], expected, atol=1e-4, rtol=1e-4)


def test_query_rows_unchanged_if_text_is_fully_masked() -> None:
    """Against the text input switched off, with equal weights."""
    model, batch = make(), batch_of()
    plain = make(replace(SMALL, instructed=False))
    plain.load_state_dict(model.state_dict())
    masked = batch | {"instruction_mask": torch.zeros_like(batch["instruction_mask"])}
    torch.testing.assert_close(model.visual_tokens(masked), plain.visual_tokens(batch))
    assert not torch.allclose(model.visual_tokens(batch), plain.visual_tokens(batch), atol=1e-3)


def test_frozen_parameters_have_no_gradient_while_the_projection_has() -> None:
    """And the norm behind the frozen tower is trained, and in the checkpoint."""
    model, batch = make().train(), batch_of()
    assert not model.reader.vision.training and not model.language.lm.network.training and model.reader.qformer.training
    losses_of(model, batch)["answer"].backward()
    last = f"reader.qformer.layers.{len(model.reader.qformer.layers) - 1}.feed_forward."
    heads = ("image_projection", "text_projection", "itm_head", "lm_head", "temperature")
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        frozen = part in (*heads, "vision", "lm") or name.startswith(last)
        assert (parameter.grad is None) == frozen == (not parameter.requires_grad), name
    assert model.language.projector.weight.grad.abs().max() > 0
    assert "reader.norm.weight" in model.state_dict() and model.reader.norm.weight.grad.abs().max() > 0


def test_folded_frames_are_looped_frames() -> None:
    """Frame by frame, and joined in the order of time."""
    video = VideoSpec(frames=3, size=16)
    model = make(replace(SMALL, data=replace(SMALL.data, image=None, video=video), stage1=False))
    batch = make_batch(model.config.data, 2)
    looped = []
    for frame in range(3):
        one = batch["video"][:, frame]
        looped.append(model.reader(one, batch["instruction"], batch["instruction_mask"]))
    got = model.visual_tokens(batch)
    assert got.shape == (2, 3 * 2, 128)
    torch.testing.assert_close(got, torch.cat(looped, dim=1))
    assert losses_of(model, batch)["answer"].isfinite() and model.generate(batch, max_new_tokens=3).shape[0] == 2


# --- what is easy to get wrong


def test_words_change_the_visual_tokens_though_they_see_no_picture() -> None:
    model, batch = make(), batch_of()
    other = batch | {"instruction": batch["instruction"].flip(0), "instruction_mask": batch["instruction_mask"].flip(0)}
    assert not torch.allclose(model.visual_tokens(batch), model.visual_tokens(other), atol=1e-3)
    cross = model.reader.qformer.layers[0].cross
    seen = []
    cross.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model.visual_tokens(batch)
    assert seen == [SMALL.qformer.queries]  # rows of the queries alone


def test_answers_have_no_label_smoothing() -> None:
    model, batch = make(), batch_of()
    lm = model.language.lm
    embeds = torch.cat((model.language.projector(model.visual_tokens(batch)), lm.embed(batch["text"])), dim=1)
    logits = torch.nn.functional.linear(lm(embeds), *lm.head)[:, SMALL.qformer.queries - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["text_labels"])
    torch.testing.assert_close(losses_of(model, batch)["answer"], expected)


def test_scores_of_padded_candidates_are_comparable() -> None:
    """Ranked together or apart, padded to whatever length: the same."""
    model, batch = make(), batch_of()
    ids, seen = candidates()
    together = model.rank_answers(batch, ids, seen)
    apart = [
        model.rank_answers(batch, ids[k : k + 1, : int(seen[k].sum())], seen[k : k + 1, : int(seen[k].sum())]) for k in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)


def test_released_language_models_are_settings() -> None:
    """Vicuna's added [PAD], whose id 0 ends a text; T5's plain gelu; half types."""
    config = InstructBLIP.Config()
    with torch.device("meta"):
        assert LanguageModel(config.language).network.config.dense_act_fn == "gelu" and config.language.dtype == "bfloat16"
    assert config.vocabularies()["lm"].eos_id == 1 and config.vocabularies()["qformer"].extra == ["[DEC]"]
    vicuna = replace(config, language=LMConfig("vicuna-7b", {"vocab_size": 32001, "pad_token_id": 32000}, dtype="float16"))
    asked = vicuna.vocabularies()["lm"]
    assert (asked.size, asked.eos_id, asked.pad_id, asked.bos_id) == (32001, 2, 32000, None)


def test_tokenizer_files_of_t5_are_read(tmp_path: Path) -> None:
    """They name no begin token; PrefixLM drops the one that the loader puts there."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "where": 3, "here": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    asked = InstructBLIP.Config().vocabularies()["lm"]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (asked.eos_id, asked.pad_id) == (1, 0)
    ids, mask = tokenizer.encode(["where"], 5)
    assert ids.tolist() == [[0, 3, 1, 0, 0]] and mask.tolist() == [[True, True, True, False, False]]


# --- sizes


def test_paper_scale() -> None:
    """Published: 188 million trained parameters, of which those of the last layer's feed-forward part for text get no gradient;
    in all, those of the released checkpoints' networks (Vicuna-7B: 7,913,210,624)."""
    language = LMConfig("vicuna-7b", {"vocab_size": 32001, "pad_token_id": 32000})
    with torch.device("meta"):
        model = InstructBLIP(replace(InstructBLIP.Config(), language=language))
    assert sum(p.numel() for p in model.parameters()) == 7_913_210_624
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unread = sum(p.numel() for p in model.reader.qformer.layers[-1].feed_forward.parameters())
    assert abs((trained + unread) / 188e6 - 1) < 0.005
    assert sum(p.numel() for p in model.reader.vision.parameters()) == 985_949_440
    assert InstructBLIP.Config.paper() == InstructBLIP.Config()


def test_first_weights_of_the_queries_reader() -> None:
    for std in (0.02, 0.09):
        qformer = InstructBLIP(replace(SMALL, init_std=std)).reader.qformer
        assert qformer.layers[0].attn.in_proj.weight.std().item() == pytest.approx(std, rel=0.05)
        assert qformer.token_embed.weight[1:].std().item() == pytest.approx(std, rel=0.05)


# --- modes


@pytest.mark.parametrize("mode", ["pretrain", "language"])
def test_other_modes_train_what_they_use(mode: str) -> None:
    model, batch = make(mode=mode).train(), batch_of(size=6)
    losses = losses_of(model, batch)
    assert set(losses) == ({"language"} if mode == "language" else {"contrast", "matching", "caption"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer_for(model), [batch] * 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        inside = name.startswith("language.lm.") if mode == "language" else name.startswith("reader.")
        assert parameter.requires_grad == inside, name
    assert model.reader.vision.training == (mode == "pretrain")


def test_the_tower_is_frozen_in_stage_one_as_in_the_paper() -> None:
    model, batch = make(replace(SMALL, train_vision=False), "pretrain").train(), batch_of()
    sum(losses_of(model, batch).values()).backward()
    assert all(p.grad is None for p in model.reader.vision.parameters()) and not model.reader.vision.training
    assert model.reader.norm.weight.grad is not None


def test_modes_that_the_data_do_not_serve_are_refused() -> None:
    model = make(replace(SMALL, stage1=False))
    with pytest.raises(ValueError, match=r"pretrain needs model\.stage1=true"):
        model.set_mode("pretrain")
    with pytest.raises(ValueError, match="expected one of instruct, pretrain, language"):
        model.set_mode("instrct")
    with pytest.raises(UserError, match=r"instruct needs data\.texts\.instruction"):
        make(replace(SMALL, data=replace(SMALL.data, texts={})))
    assert make(replace(SMALL, instructed=False, data=replace(SMALL.data, texts={}))).mode == "instruct"
    with pytest.raises(UserError, match=r"needs data\.text with an answer"):
        make(replace(SMALL, data=replace(SMALL.data, text=None)))
    for wrong, message in (
        (replace(SMALL, data=DataSpec(image=None, text=TINY.data.text)), "either image or video"),
        (replace(SMALL, qformer=replace(SMALL.qformer, context_width=64)), r"qformer\.context_width: expected 128"),
        (replace(SMALL, few_shot=-1), "few_shot: expected a number"),
        (replace(SMALL, few_shot=2), "expected 0 for a language model without an encoder"),
    ):
        with pytest.raises(UserError, match=message):
            make(wrong)


def test_language_model_is_asked_for_what_it_has_read() -> None:
    """Mode "language": the answers of `reading` alone, as if it were the text of a model that sees no picture."""
    model, batch = make(SMALL, "language").eval(), batch_of()
    found = losses_of(model, batch)["language"]
    read = {part: batch[f"reading{part}"] for part in ("", "_mask", "_labels")}
    lm = model.language.lm
    labels = cut_answers(read["_labels"], SMALL.answer_length)
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(found, lm.answer_loss(lm(lm.embed(read[""])), labels))
    without = {key: value for key, value in batch.items() if not key.startswith("reading")}
    assert losses_of(model, without)["language"] != found


def test_learns_one_batch_by_heart_once_its_language_model_speaks() -> None:
    """All are asked the same. The language model learns that one of four answers follows, is frozen, and is told by two visual
    tokens which one."""
    torch.manual_seed(0)
    model, batch = InstructBLIP(SMALL).train(), batch_of()
    batch = {key: value for key, value in batch.items() if not key.startswith("reading")}
    batch["text"] = torch.tensor([[1, 5, 6, 7, answer, 2] for answer in (20, 21, 22, 23)])
    batch["text_mask"] = torch.ones(4, 6, dtype=torch.bool)
    batch["text_labels"] = batch["text"].masked_fill(torch.arange(6) < 4, -100)
    model.set_mode("language")
    train(model, optimizer_for(model, 3e-3), [batch] * 60)
    model.set_mode("instruct")
    sums = train(model, optimizer_for(model, 3e-3), [batch] * 60)
    chance = math.log(4) / 2  # of two tokens, the second of which is known
    assert sums[0] > 0.8 * chance and sums[-1] < 0.2 * chance, (sums[0], sums[-1])
    assert model.generate(batch, max_new_tokens=3)[:, 0].tolist() == [20, 21, 22, 23]
    ids = torch.tensor([[1, answer, 2] for answer in (23, 22, 21, 20)])
    assert model.rank_answers(batch, ids, ids > 0).argmax(1).tolist() == [3, 2, 1, 0]


# --- examples before the sample (T5)


def test_examples_stand_before_in_training_alone() -> None:
    batch = batch_of(T5)
    plain = losses_of(make(T5), batch)["answer"]
    model = make(replace(T5, few_shot=2, few_shot_prob=1.0))
    torch.testing.assert_close(losses_of(model, batch)["answer"], plain)
    model.train()
    examples = model._examples(model.visual_tokens(batch), batch["text"], batch["text_mask"])
    each = T5.qformer.queries + batch["text"].shape[1] - 1
    assert examples.embeds.shape[:2] == (4, 2 * each)
    own = model.language.lm.embed(batch["text"][:, 1:])
    for row in range(4):  # the next rows, with their answers
        torch.testing.assert_close(examples.embeds[row, T5.qformer.queries : each], own[(row + 1) % 4])
        assert torch.equal(examples.mask[row, T5.qformer.queries : each], batch["text_mask"][(row + 1) % 4, 1:])
    assert not torch.allclose(losses_of(model, batch)["answer"], plain, atol=1e-4)
    never = make(replace(T5, few_shot=2, few_shot_prob=0.0)).train()
    assert torch.equal(losses_of(never, batch)["answer"], losses_of(make(T5).train(), batch)["answer"])


def test_number_of_examples() -> None:
    """None with probability 1 - p, else even in 1 .. K; nobody is an example of itself."""
    model = make(replace(T5, few_shot=3, few_shot_prob=0.6)).train()
    size = 4000
    visual, text = torch.zeros(size, 2, 128), torch.ones(size, 3, dtype=torch.int64)
    with torch.no_grad():
        mask = model._examples(visual, text, torch.ones_like(text, dtype=torch.bool)).mask
    counts = mask.unflatten(1, (3, -1)).all(2).sum(1).bincount(minlength=4) / size
    error = 4 * math.sqrt(0.25 / size)
    assert (counts - torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < error
    two = model._examples(visual[:2], text[:2], torch.ones(2, 3, dtype=torch.bool)).mask.unflatten(1, (3, -1))
    assert not two[:, 1:].any()


# --- ranks


RANKED = {
    "vicuna": (SMALL, "instruct", {"answer"}),
    "t5": (T5, "instruct", {"answer"}),
    "language": (SMALL, "language", {"language"}),
    "pretrain": (SMALL, "pretrain", {"contrast", "caption"}),  # negatives of "matching" are among the rank's own pairs
}


def losses_and_gradients(name: str, rows: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    config, mode, names = RANKED[name]
    model = make(config, mode)
    losses = losses_of(model, pick(make_batch(config.data, 6), rows))
    kept = {key: losses[key] for key in names}
    sum(kept.values()).backward()
    found = {key: loss.detach() for key, loss in kept.items()}
    return found, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def halves(rank: int, world: int, folder: Path) -> None:
    for name in RANKED:
        losses, gradients = losses_and_gradients(name, torch.arange(rank, 6, world))
        for tensor in (*losses.values(), *gradients):
            dist.all_reduce(tensor)
            tensor /= world
        expected = torch.load(folder / f"{name}.pt")
        torch.testing.assert_close((losses, gradients), expected, atol=1e-5, rtol=1e-3)


def sharded(rank: int, world: int, folder: Path) -> None:
    """FSDP2 over frozen towers, queries and adapters."""
    config = replace(SMALL, lora=LoRAConfig(rank=2))
    model = make(config)
    spread = Spread(model, TrainConfig(strategy="fsdp"), World(rank, world))
    spread.begin_stage()
    batch = pick(make_batch(config.data, 6), torch.arange(rank, 6, world))
    spread("__call__", batch, Progress(0, 1))["answer"].backward()
    spread.finish(averaged=True)
    expected = torch.load(folder / "sharded.pt")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in expected), name
        if name in expected:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], atol=1e-5, rtol=1e-3)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Each has every other row, with answers of other lengths: losses and gradients are those of one process with all."""
    for name in RANKED:
        torch.save(losses_and_gradients(name, torch.arange(6)), tmp_path / f"{name}.pt")
    whole = make(replace(SMALL, lora=LoRAConfig(rank=2)))
    losses_of(whole, batch_of(size=6))["answer"].backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    torch.save(gradients, tmp_path / "sharded.pt")
    run(2, tmp_path, [partial(halves, folder=tmp_path), partial(sharded, folder=tmp_path)])


def test_lora_is_trained_beside_the_queries() -> None:
    model = make(replace(SMALL, lora=LoRAConfig(rank=2)))
    losses_of(model, batch_of())["answer"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum("lora_b" in name for name in trained) == 4
    assert all("lora" in name or not name.startswith("language.lm.") for name in trained)
