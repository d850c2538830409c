from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn

from vlpfast.hosts.qformer import AlignedQueries, Encoded, VisualQueries, convert_lavis
from vlpfast.nn.bert import BertCache
from vlpfast.nn.qformer import QFormer, QFormerConfig
from vlpfast.training.config import TrainConfig
from vlpfast.training.parallel import Spread, World
from vlpfast.types import UserError

SMALL = QFormerConfig(
    vocab_size=31,
    width=32,
    layers=2,
    heads=4,
    hidden=48,
    max_positions=12,
    dropout=0.0,
    cross_attention=[0],
    context_width=24,
    queries=3,
)
DEC, PAD, B, L = 30, 0, 5, 7


class Tower(nn.Module):
    """Patches of 4 x 4 pixels, with a dropout that would show."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, 4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.dropout(self.patch_embed(image)).flatten(2).transpose(1, 2)


def make(**changes: object) -> AlignedQueries:
    torch.manual_seed(0)
    host = AlignedQueries(Tower(), replace(SMALL, **changes), dec_id=DEC, embed_dim=16)
    for parameter in host.qformer.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)  # attention far from uniform
    return host


def inputs(batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """image [B, 3, 8, 8], text [B, L], text_mask"""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor([7, 4, 3, 6, 5])[:batch, None]
    text = torch.randint(4, 30, (batch, L), generator=generator)
    text[:, 0] = 1
    return torch.randn(batch, 3, 8, 8, generator=generator), text * mask, mask


def encoded(host: AlignedQueries, **options: object) -> tuple[Tensor, Encoded]:
    image, text, mask = inputs()
    tokens = host.image_tokens(image)
    return tokens, host.encode(tokens, text, mask, **options)


# --- the tower --------------------------------------------------------------------------------------------------------


def test_the_tower_is_frozen_for_good() -> None:
    host, (image, _, _) = make(dropout=0.1), inputs()
    host.train()
    assert not any(p.requires_grad for p in host.vision.parameters())
    assert host.qformer.training and not host.vision.training and not host.vision.dropout.training
    assert torch.equal(host.image_tokens(image), host.image_tokens(image))
    nn.Sequential(host).train()
    assert not host.vision.training
    tokens = host.image_tokens(image)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        host.image_tokens(image)
    assert not any(t.shape == image.shape for t in saved)  # no graph in the tower
    host.vision.requires_grad_(True)  # whatever a stage's patterns say
    tokens = host.image_tokens(image.requires_grad_(True))
    tokens.square().sum().backward()
    assert image.grad is None
    assert host.norm.weight.grad.any() and host.norm.bias.grad.any()
    assert all(p.grad is None for p in host.vision.parameters())


def test_frames_folded_are_frames_in_turn() -> None:
    torch.manual_seed(0)
    host = VisualQueries(Tower(), replace(SMALL, text="input"), out_width=20)
    _, text, mask = inputs()
    video = torch.randn(B, 3, 3, 8, 8)
    for more in ((), (text, mask)):
        together = host(video, *more)
        assert together.shape == (B, 9, 20)
        in_turn = torch.cat([host(video[:, i], *more) for i in range(3)], dim=1)
        torch.testing.assert_close(together, in_turn)
    assert not torch.allclose(host(video), host(video, text, mask))


def test_to_the_language_models_width() -> None:
    torch.manual_seed(0)
    host = VisualQueries(Tower(), replace(SMALL, text="none"), out_width=20)
    image, _, _ = inputs()
    tokens = F.layer_norm(host.vision(image), (24,))
    torch.testing.assert_close(host(image), host.projection(host.qformer.encode_queries(tokens)))
    host.projection = None
    assert host(image).shape == (B, 3, 32)


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [False, True])
def test_contrast_is_that_of_the_best_query(same: bool) -> None:
    host = make()
    tokens, e = encoded(host)
    _, text, mask = inputs()
    states = host.qformer.encode_queries(tokens), host.qformer.encode_text(text, mask)[:, 0]
    heads = host.image_projection, host.text_projection
    image, words = (F.normalize(F.linear(x, head.weight, head.bias), dim=-1) for x, head in zip(states, heads, strict=True))
    scores = torch.einsum("mqd,nd->mqn", image, words).amax(1) / host.temperature
    assert host.temperature.item() == pytest.approx(0.07)
    if not same:
        expected = F.cross_entropy(scores, torch.arange(B), label_smoothing=0.1)
        expected = (expected + F.cross_entropy(scores.T, torch.arange(B), label_smoothing=0.1)) / 2
        loss = host.contrast(e)
    else:
        ids = torch.tensor([4, 7, 4, 5, 7])
        alike = (ids[:, None] == ids).float()
        targets = 0.9 * alike / alike.sum(1, keepdim=True) + 0.1 / B
        expected = (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2
        loss = host.contrast(e, ids=ids)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(t, [host.temperature, host.norm.weight], retain_graph=True) for t in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_smoothing_by_pair() -> None:
    host = make()
    _, e = encoded(host)
    constant = host.contrast(e, label_smoothing=0.3)
    torch.testing.assert_close(host.contrast(e, label_smoothing=torch.full((B,), 0.3)), constant)
    assert host.contrast(e, label_smoothing=torch.tensor([0.3, 0.0, 0.0, 0.0, 0.0])) != constant


@pytest.mark.parametrize("by_picture", [False, True])
def test_matching_is_that_of_pairs_one_by_one(by_picture: bool) -> None:
    """With queries that depend on the picture (GeoX), those of the picture that is attended to."""
    host = make().eval()
    queries = host.qformer.query_tokens + torch.randn(B, 1, 32) if by_picture else None
    tokens, e = encoded(host, queries=queries)
    _, text, mask = inputs()
    scores = torch.einsum("mqd,nd->mqn", e.image_features, e.text_features).amax(1)
    scores.fill_diagonal_(-torch.inf)
    other, picture = scores.argmax(1), scores.argmax(0)  # in evaluation the hardest, drawn in training
    logits, labels = [], []
    for i in range(B):
        for of_image, of_text, label in ((i, i, 1), (i, int(other[i]), 0), (int(picture[i]), i, 0)):
            own = None if queries is None else queries[of_image : of_image + 1]
            one_text, one_mask = text[of_text : of_text + 1], mask[of_text : of_text + 1]
            states, _ = host.qformer.encode_pairs(one_text, one_mask, tokens[of_image : of_image + 1], queries=own)
            logits.append(host.itm_head(states[0]).mean(0))
            labels.append(label)
    expected = F.cross_entropy(torch.stack(logits), torch.tensor(labels))
    torch.testing.assert_close(host.match(e), expected, rtol=1e-4, atol=1e-5)
    if not by_picture:
        torch.testing.assert_close(host.score_pairs(tokens, text, mask), torch.stack(logits)[::3, 1])


def test_pairs_without_a_negative_count_alone() -> None:
    host = make().eval()
    tokens, e = encoded(host)
    _, text, mask = inputs()
    logits = host.itm_head(host.qformer.encode_pairs(text, mask, tokens)[0]).mean(1)
    expected = F.cross_entropy(logits, torch.ones(B, dtype=torch.int64))
    torch.testing.assert_close(host.match(e, ids=torch.zeros(B, dtype=torch.int64)), expected)


def test_negatives_are_drawn_by_the_best_query() -> None:
    host = make()
    with torch.no_grad():
        host.temperature.fill_(0.5)
    _, e = encoded(host)
    ids = torch.tensor([4, 7, 4, 5, 7])
    scores = torch.einsum("mqd,nd->mqn", e.image_features, e.text_features).amax(1) / 0.5
    torch.manual_seed(0)
    counts = torch.zeros(2, B, B)
    draws = 400
    for _ in range(draws):
        picture, other = host._hard_negatives(e, ids)
        counts[0, torch.arange(B), other] += 1
        counts[1, torch.arange(B), picture] += 1
    alike = ids[:, None] == ids
    for count, logits in ((counts[0], scores), (counts[1], scores.T)):
        assert not count[alike].any()
        expected = logits.masked_fill(alike, -torch.inf).softmax(1)
        assert (count / draws - expected).abs().max() < 0.11  # 4 standard errors at most
    assert (host._hard_negatives(e, torch.zeros(B, dtype=torch.int64))[0] == -1).all()


def test_captions_are_predicted_token_by_token() -> None:
    host = make()
    tokens, e = encoded(host)
    _, text, mask = inputs()
    start = text.clone()
    start[:, 0] = DEC
    states = host.qformer(tokens, start, mask, mode="generation")[1]
    logits = host.lm_head.logits(states, host.qformer.token_embed.weight)
    for labels in (None, text.masked_fill(~mask, -100).index_fill(1, torch.tensor([1, 2]), -100)):
        target = text.masked_fill(~mask, -100) if labels is None else labels
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.1)
        for max_rows in (None, B * L):
            torch.testing.assert_close(host.caption(e, labels=labels, max_rows=max_rows), expected)
    torch.testing.assert_close(host.caption(e), host.caption(e))  # what `encode` keeps stays as it is
    assert torch.equal(text, inputs()[1])


def test_three_losses_read_the_picture_once() -> None:
    host = make()
    calls: list[int] = []
    host.qformer.layers[0].cross.kv_proj.register_forward_hook(lambda *_: calls.append(1))
    _, e = encoded(host)
    loss = host.contrast(e) + host.match(e) + host.caption(e)
    assert len(calls) == 1
    loss.backward()
    for name, parameter in host.named_parameters():
        assert (parameter.grad is None) == name.startswith("vision.") and (parameter.grad is None or parameter.grad.any()), name


def test_padding_and_a_batch_of_one() -> None:
    host, (image, text, mask) = make().eval(), inputs()
    results = []
    for ids, seen in ((text, mask), (F.pad(torch.where(mask, text, 9), (0, 3), value=8), F.pad(mask, (0, 3)))):
        e = host.encode(host.image_tokens(image), ids, seen)
        results.append(torch.stack((host.contrast(e), host.match(e), host.caption(e))))
    torch.testing.assert_close(results[0], results[1])
    image, text, mask = inputs(1)
    e = host.encode(host.image_tokens(image), text, mask)
    loss = torch.stack((host.contrast(e, label_smoothing=0.0), host.match(e), host.caption(e)))
    assert loss.isfinite().all() and loss[0] == 0
    loss.sum().backward()


def test_compiles_whole() -> None:
    host, (image, text, mask) = make(layers=1), inputs()
    host.eval()

    @torch.no_grad()
    def losses() -> Tensor:
        e = host.encode(host.image_tokens(image), text, mask)
        return torch.stack((host.contrast(e), host.match(e), host.caption(e)))

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(losses, fullgraph=True, backend="eager")(), losses())


def test_learns_a_batch_by_heart() -> None:
    """Every picture finds its text, the head tells pairs that fit, and captions come out of the queries word by word."""
    host, (image, text, mask) = make(), inputs()
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(90):
        e = host.encode(host.image_tokens(image), text, mask)
        loss = host.contrast(e) + host.match(e) + host.caption(e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    host.eval()
    with torch.no_grad():
        tokens = host.image_tokens(image)
        e = host.encode(tokens, text, mask)
        scores = torch.einsum("mqd,nd->mqn", e.image_features, e.text_features).amax(1)
        assert torch.equal(scores.argmax(1), torch.arange(B)) and torch.equal(scores.argmax(0), torch.arange(B))
        every = [host.score_pairs(tokens, text.roll(i, 0), mask.roll(i, 0)) for i in range(B)]
        assert torch.stack(every).argmax(0).eq(0).all()
        cache = BertCache()
        host.qformer.encode_queries(tokens, cache=cache)
        word, written = torch.full((B, 1), DEC), []
        for _ in range(L - 1):
            states = host.qformer.encode_text(word, cache=cache)
            word = host.lm_head.logits(states, host.qformer.token_embed.weight).argmax(-1)
            written.append(word)
        assert torch.equal(torch.cat(written, dim=1)[mask[:, 1:]], text[:, 1:][mask[:, 1:]])


# --- several processes ------------------------------------------------------------------------------------------------


class Summed(nn.Module):
    """What of the losses is that of the whole batch on any number of ranks: all but which negatives are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.host = make()

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor, fits: Tensor) -> Tensor:
        tokens = self.host.image_tokens(image)
        e = self.host.encode(tokens, text, text_mask)
        logits = self.host.score_pairs(tokens, text, text_mask)
        return self.host.contrast(e) + self.host.caption(e) + F.binary_cross_entropy_with_logits(logits, fits)


def by_ranks(rank: int, world: int) -> None:
    image, text, mask = (t[:4] for t in inputs())
    fits = torch.tensor([1.0, 0.0, 0.0, 1.0])
    alone = Summed()
    with_all = [t for t in (image, text, mask, fits)]
    loss = _alone(alone, with_all)
    loss.backward()
    part = [t[rank * 2 : rank * 2 + 2] for t in with_all]
    for strategy, recompute in (("ddp", False), ("fsdp", False), ("fsdp", True)):
        model = Summed()
        spread = Spread(model, TrainConfig(strategy=strategy, activation_checkpointing=recompute), World(rank, world))
        spread.begin_stage()
        mine = spread("forward", *part)
        mine.backward()
        spread.finish(averaged=True)
        torch.testing.assert_close(spread.world.mean(mine.detach()), loss.detach())
        for (name, expected), (_, found) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
            if expected.grad is None:
                assert found.grad is None, name
                continue
            grad = found.grad.full_tensor() if hasattr(found.grad, "full_tensor") else found.grad
            torch.testing.assert_close(grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def _alone(model: Summed, batch: list[Tensor]) -> Tensor:
    """The loss of one process, though there is a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.is_initialized", lambda: False)
        return model(*batch)


def test_two_processes_are_one(tmp_path: Path) -> None:
    run(2, tmp_path, [by_ranks])


# --- names, mistakes --------------------------------------------------------------------------------------------------


def test_names_of_lavis() -> None:
    host = make()
    own = host.state_dict()
    theirs = {"query_tokens": own["qformer.query_tokens"][None], "temp": own["temperature"]}
    theirs |= {f"visual_encoder.{n}": t for n, t in host.vision.state_dict().items()}
    for mine, their in {
        "norm": "ln_vision",
        "image_projection": "vision_proj",
        "text_projection": "text_proj",
        "itm_head": "itm_head",
        "lm_head.dense": "Qformer.cls.predictions.transform.dense",
        "lm_head.norm": "Qformer.cls.predictions.transform.LayerNorm",
        "qformer.norm": "Qformer.bert.embeddings.LayerNorm",
        "qformer.token_embed": "Qformer.bert.embeddings.word_embeddings",
        "qformer.position_embed": "Qformer.bert.embeddings.position_embeddings",
    }.items():
        theirs |= {f"{their}.{kind}": own[f"{mine}.{kind}"] for kind in ("weight", "bias") if f"{mine}.{kind}" in own}
    theirs["Qformer.cls.predictions.bias"] = theirs["Qformer.cls.predictions.decoder.bias"] = own["lm_head.bias"]
    theirs["Qformer.cls.predictions.decoder.weight"] = own["qformer.token_embed.weight"]
    for i in range(2):
        for mine, their in {
            "attn.out_proj": "attention.output.dense",
            "attn.norm": "attention.output.LayerNorm",
            "cross.q_proj": "crossattention.self.query",
            "cross.out_proj": "crossattention.output.dense",
            "cross.norm": "crossattention.output.LayerNorm",
            "feed_forward.fc1": "intermediate.dense",
            "feed_forward.fc2": "output.dense",
            "feed_forward.norm": "output.LayerNorm",
            "query_feed_forward.fc1": "intermediate_query.dense",
            "query_feed_forward.fc2": "output_query.dense",
            "query_feed_forward.norm": "output_query.LayerNorm",
        }.items():
            for kind in ("weight", "bias"):
                if f"qformer.layers.{i}.{mine}.{kind}" in own:
                    theirs[f"Qformer.bert.encoder.layer.{i}.{their}.{kind}"] = own[f"qformer.layers.{i}.{mine}.{kind}"]
        for joined, their, names in (
            ("attn.in_proj", "attention", ("query", "key", "value")),
            ("cross.kv_proj", "crossattention", ("key", "value")),
        ):
            for kind in ("weight", "bias"):
                whole = own.get(f"qformer.layers.{i}.{joined}.{kind}")
                for name, part in zip(names, () if whole is None else whole.split(32), strict=whole is not None):
                    theirs[f"Qformer.bert.encoder.layer.{i}.{their}.self.{name}.{kind}"] = part
    converted = convert_lavis(theirs, SMALL)
    assert set(converted) == {name for name in own if not name.startswith("vision.")}
    for name, tensor in converted.items():
        assert torch.equal(tensor, own[name]), name
    # InstructBLIP's: the projection to the language model, no heads
    of_first = "Qformer.cls", "vision_proj", "text_proj", "itm_head", "temp"
    second = {name: t for name, t in theirs.items() if not name.startswith(of_first)}
    second |= {"llm_proj.weight": torch.randn(20, 32), "llm_proj.bias": torch.randn(20)}
    config = replace(SMALL, text="input")
    found = convert_lavis(second, config)
    other = VisualQueries(Tower(), config, out_width=20)
    left = other.load_state_dict(found, strict=False)
    assert not left.unexpected_keys and all(name.startswith("vision.") for name in left.missing_keys)
    assert torch.equal(other.projection.weight, second["llm_proj.weight"])


def test_wrong_configs_are_named() -> None:
    with pytest.raises(UserError, match=r"qformer\.text: expected full, got 'input'"):
        make(text="input")
    with pytest.raises(UserError, match="dec_id: expected an id below vocab_size 31, got 31"):
        AlignedQueries(Tower(), SMALL, dec_id=31)
    assert isinstance(make().qformer, QFormer)
