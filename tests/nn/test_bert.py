from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.bert import Bert, BertCache, BertConfig, MaskedLMHead
from vlpfast.nn.bert_convert import convert_bert, convert_blip, convert_lm_head
from vlpfast.types import UserError

SMALL = BertConfig(
    vocab_size=50,
    width=32,
    layers=4,
    heads=4,
    hidden=48,
    max_positions=16,
    dropout=0.0,
    cross_attention=[2, 3],
    context_width=24,
)
B, L, T = 6, 7, 5


def make(**changes: object) -> Bert:
    """Weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    bert = Bert(replace(SMALL, **changes))
    for parameter in bert.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return bert


def inputs(lengths: tuple[int, ...] = (7, 3, 1, 5, 7, 4)) -> tuple[Tensor, Tensor, Tensor]:
    """text [B, L] with pad 0, text_mask, context [B / 2, T, 24]"""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    text = torch.randint(1, 50, (B, L), generator=generator) * mask
    return text, mask, torch.randn(B // 2, T, 24, generator=generator)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


# --- parity with transformers -----------------------------------------------------------------------------------------


def official(kind: str, **options: object):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.3,  # attention far from uniform, or its mistakes would not show
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    theirs = getattr(transformers, kind)(config).eval()
    for name, parameter in theirs.named_parameters():  # norms and biases start at 1 and 0, which would hide a mix-up
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return theirs


def test_encoder_is_that_of_transformers() -> None:
    theirs = official("BertModel")
    ours = Bert(replace(SMALL, layers=3, cross_attention=[])).eval()
    ours.load_state_dict(convert_bert(theirs.state_dict()))
    text, mask, _ = inputs()
    expected = theirs(input_ids=text, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(text, mask)[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_masked_language_model_is_that_of_transformers() -> None:
    theirs = official("BertForMaskedLM")
    ours, head = Bert(replace(SMALL, layers=3, cross_attention=[])).eval(), MaskedLMHead(SMALL).eval()
    ours.load_state_dict(convert_bert({n: t for n, t in theirs.state_dict().items() if n.startswith("bert.")}, "bert."))
    head.load_state_dict(convert_lm_head(theirs.state_dict()))
    text, mask, _ = inputs()
    labels = text.masked_fill(~mask | (text % 3 == 0), -100)
    expected = theirs(input_ids=text, attention_mask=mask.long(), labels=labels)
    weight = ours.token_embed.weight
    torch.testing.assert_close(head.logits(ours(text, mask), weight)[mask], expected.logits[mask], rtol=1e-4, atol=1e-4)
    loss = head.loss(ours(text, mask), labels, weight)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)
    # The embedding learns as input and as decoder.
    expected.loss.backward()
    loss.backward()
    torch.testing.assert_close(weight.grad, theirs.bert.embeddings.word_embeddings.weight.grad, rtol=1e-3, atol=1e-5)


def test_decoder_with_a_context_is_that_of_transformers() -> None:
    theirs = official("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    ours = Bert(replace(SMALL, layers=3, cross_attention=[0, 1, 2], context_width=32)).eval()
    ours.load_state_dict(convert_bert({n: t for n, t in theirs.state_dict().items() if n.startswith("bert.")}, "bert."))
    head = MaskedLMHead(SMALL).eval()
    head.load_state_dict(convert_lm_head(theirs.state_dict()))
    text, mask, _ = inputs()
    context, context_mask = torch.randn(B, T, 32), torch.arange(T) < torch.tensor([5, 1, 2, 3, 4, 5])[:, None]
    expected = theirs(
        input_ids=text,
        attention_mask=mask.long(),
        encoder_hidden_states=context,
        encoder_attention_mask=context_mask.long(),
    ).logits
    got = head.logits(ours(text, mask, mask="causal", context=context, context_mask=context_mask), ours.token_embed.weight)
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)


# --- names ------------------------------------------------------------------------------------------------------------


def albef_names(bert: Bert, prefix: str) -> dict[str, Tensor]:
    """ALBEF's and BLIP's names, written out: xbert.py and med.py name alike."""
    own, theirs = bert.state_dict(), {}
    width = bert.config.width
    theirs[prefix + "embeddings.word_embeddings.weight"] = own["token_embed.weight"]
    theirs[prefix + "embeddings.position_embeddings.weight"] = own["position_embed.weight"]
    if bert.type_embed is not None:
        theirs[prefix + "embeddings.token_type_embeddings.weight"] = own["type_embed.weight"]
    theirs[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    theirs[prefix + "pooler.dense.weight"] = torch.zeros(width, width)
    for kind in ("weight", "bias"):
        theirs[f"{prefix}embeddings.LayerNorm.{kind}"] = own[f"norm.{kind}"]
        for i, layer in enumerate(bert.layers):
            mine, their = f"layers.{i}.", f"{prefix}encoder.layer.{i}."
            for name, part in zip(("query", "key", "value"), own[f"{mine}attn.in_proj.{kind}"].split(width), strict=True):
                theirs[f"{their}attention.self.{name}.{kind}"] = part
            theirs[f"{their}attention.output.dense.{kind}"] = own[f"{mine}attn.out_proj.{kind}"]
            theirs[f"{their}attention.output.LayerNorm.{kind}"] = own[f"{mine}attn.norm.{kind}"]
            if layer.cross is not None:
                theirs[f"{their}crossattention.self.query.{kind}"] = own[f"{mine}cross.q_proj.{kind}"]
                for name, part in zip(("key", "value"), own[f"{mine}cross.kv_proj.{kind}"].split(width), strict=True):
                    theirs[f"{their}crossattention.self.{name}.{kind}"] = part
                theirs[f"{their}crossattention.output.dense.{kind}"] = own[f"{mine}cross.out_proj.{kind}"]
                theirs[f"{their}crossattention.output.LayerNorm.{kind}"] = own[f"{mine}cross.norm.{kind}"]
            theirs[f"{their}intermediate.dense.{kind}"] = own[f"{mine}feed_forward.fc1.{kind}"]
            theirs[f"{their}output.dense.{kind}"] = own[f"{mine}feed_forward.fc2.{kind}"]
            theirs[f"{their}output.LayerNorm.{kind}"] = own[f"{mine}feed_forward.norm.{kind}"]
    return theirs


@pytest.mark.parametrize("type_vocab", [0, 2])
def test_names_of_albef_and_blip(type_vocab: int) -> None:
    bert = make(type_vocab=type_vocab)
    theirs = albef_names(bert, "text_encoder.bert.")
    converted = convert_bert({**theirs, "visual_encoder.cls_token": torch.zeros(1)}, "text_encoder.bert.")
    other = Bert(bert.config)
    other.load_state_dict(converted)
    for name, tensor in bert.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_blips_decoder_shares_all_but_self_attention() -> None:
    """One network under the names of BLIP's two equals the two."""
    options = {"cross_attention": [0, 1, 2, 3], "type_vocab": 0}
    encoder = make(**options)
    torch.manual_seed(1)
    decoder = Bert(encoder.config)
    for name, parameter in encoder.named_parameters():
        if ".attn." not in name:
            decoder.get_parameter(name).data.copy_(parameter)
    one = make(causal_attention=True, **options)
    names = albef_names(encoder, "text_encoder.") | albef_names(decoder, "text_decoder.bert.")
    one.load_state_dict(convert_blip(names))
    text, mask, context = inputs()
    torch.testing.assert_close(one(text, mask), encoder(text, mask))
    torch.testing.assert_close(one(text, mask, context=context), encoder(text, mask, context=context))
    expected = decoder(text, mask="causal", context=context)
    assert not torch.allclose(expected, encoder(text, mask="causal", context=context))
    torch.testing.assert_close(one(text, mask="causal", context=context), expected)
    cache = BertCache()
    parts = [one(text[:, i : i + 1], mask="causal", context=context, cache=cache) for i in range(L)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in encoder.parameters()) + sum(
        p.numel() for name, p in decoder.named_parameters() if ".attn." in name
    )


def test_old_names_of_norms() -> None:
    head = MaskedLMHead(SMALL)
    prefix = "cls.predictions."
    theirs = {
        prefix + "bias": torch.randn(50),
        prefix + "transform.dense.weight": torch.randn(32, 32),
        prefix + "transform.dense.bias": torch.randn(32),
        prefix + "transform.LayerNorm.gamma": torch.randn(32),
        prefix + "transform.LayerNorm.beta": torch.randn(32),
        prefix + "decoder.weight": torch.randn(50, 32),
    }
    head.load_state_dict(convert_lm_head(theirs))
    assert torch.equal(head.norm.weight, theirs[prefix + "transform.LayerNorm.gamma"])
    assert torch.equal(head.norm.bias, theirs[prefix + "transform.LayerNorm.beta"])
    assert torch.equal(head.bias, theirs[prefix + "bias"])


def test_weights_that_do_not_fit_are_named() -> None:
    theirs = albef_names(make(), "bert.")
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.1\.surprise\.weight has no place"):
        convert_bert({**theirs, "bert.encoder.layer.1.surprise.weight": torch.zeros(1)}, "bert.")
    del theirs["bert.encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(UserError, match=r"layers\.1\.attn\.in_proj\.bias is made of 3 tensors .* got 2"):
        convert_bert(theirs, "bert.")
    with pytest.raises(UserError, match=r"begin with 'text_encoder\.', got bert"):
        convert_bert(theirs, "text_encoder.")
    with pytest.raises(UserError, match=r"expected cls\.predictions\.bias"):
        convert_lm_head(theirs)


# --- layers, masks, contexts ------------------------------------------------------------------------------------------


def test_halves_by_layers_are_the_whole() -> None:
    bert, (text, mask, context) = make(), inputs()
    whole = bert(text, mask, context=context)
    half = bert(text, mask, layers=range(2))
    torch.testing.assert_close(bert.run(half, mask, context=context, layers=range(2, 4)), whole)
    assert not torch.allclose(half, whole)


def test_without_a_context_its_layers_are_left_out() -> None:
    bert, (text, mask, _) = make(), inputs()
    plain = make(cross_attention=[])
    plain.load_state_dict({name: tensor for name, tensor in bert.state_dict().items() if ".cross." not in name})
    torch.testing.assert_close(bert(text, mask), plain(text, mask))


@pytest.mark.parametrize("context_mask", [None, torch.bool, torch.float32])
def test_a_shared_context_is_a_copied_one(context_mask: torch.dtype | None) -> None:
    bert, (text, mask, context) = make().double(), inputs()
    context = context.double()
    seen = None if context_mask is None else (torch.rand(B // 2, T) > 0.4).index_fill(1, torch.tensor([0]), True).to(context_mask)
    results = []
    for copies in (1, 2):
        context.requires_grad_(True).grad = None
        rows = context.repeat_interleave(copies, dim=0)
        rows_seen = None if seen is None else seen.repeat_interleave(copies, dim=0)
        states = bert(text, mask, context=rows, context_mask=rows_seen)
        found = gradients(bert, (states * torch.arange(B)[:, None, None]).pow(3).sum())
        results.append((states, found, context.grad.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)
    assert len(results[0][1]) == len(list(bert.parameters()))


def test_hidden_parts_of_a_context_change_nothing() -> None:
    bert, (text, mask, context) = make(), inputs()
    seen = torch.arange(T) < torch.tensor([5, 2, 1])[:, None]
    other = torch.where(seen[..., None], context, torch.randn_like(context))
    expected = bert(text, mask, context=context, context_mask=seen)
    torch.testing.assert_close(bert(text, mask, context=other, context_mask=seen), expected)
    torch.testing.assert_close(bert(text, mask, context=other, context_mask=seen.float().log()), expected)
    assert not torch.allclose(bert(text, mask, context=other), expected)


def masked_reference(bert: Bert, text: Tensor, seen: Tensor, context: Tensor) -> Tensor:
    """The network once more, row by row and in plain products; seen [B, L, L]."""
    rows = []
    for row, (ids, visible) in enumerate(zip(text, seen, strict=True)):
        x = bert.norm(bert.token_embed(ids) + bert.position_embed.weight[: len(ids)] + bert.type_embed.weight[0])
        for layer in bert.layers:
            q, k, v = layer.attn.in_proj(x).chunk(3, dim=-1)
            x = layer.attn.norm(x + layer.attn.out_proj(heads(q, k, v, visible)))
            if layer.cross is not None:
                image = context[row * len(context) // len(text)]
                q, (k, v) = layer.cross.q_proj(x), layer.cross.kv_proj(image).chunk(2, dim=-1)
                x = layer.cross.norm(x + layer.cross.out_proj(heads(q, k, v, torch.ones(len(q), len(k)).bool())))
            part = layer.feed_forward
            x = part.norm(x + part.fc2(F.gelu(part.fc1(x))))
        rows.append(x)
    return torch.stack(rows)


def heads(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    outs = []
    for i in range(4):
        a, b, c = (t[:, i * 8 : i * 8 + 8] for t in (q, k, v))
        outs.append((a @ b.T / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ c)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("kind", ["joint", "causal", "two dimensions", "three dimensions"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks(kind: str, padded: bool) -> None:
    bert, (text, mask, context) = make(), inputs() if padded else inputs((L,) * B)
    itself, causal = torch.eye(L, dtype=torch.bool), torch.ones(L, L).tril().bool()
    anything = (torch.rand(B, L, L) > 0.5) | itself
    argument = {"joint": "joint", "causal": "causal", "two dimensions": anything[0], "three dimensions": anything}[kind]
    seen = {"joint": torch.ones(B, L, L).bool(), "causal": causal, "two dimensions": anything[0]}.get(kind, anything)
    expected = masked_reference(bert, text, (seen & mask[:, None]) | itself, context)
    got = bert(text, mask if padded else None, mask=argument, context=context)
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert got.isfinite().all()


@pytest.mark.parametrize("mask", ["joint", "causal"])
def test_padding_changes_nothing(mask: str) -> None:
    bert, (text, text_mask, context) = make(), inputs()
    longer = F.pad(text, (0, 4), value=9)
    longer[:, :L] = torch.where(text_mask, text, 17)
    got = bert(longer, F.pad(text_mask, (0, 4)), mask=mask, context=context)[:, :L]
    torch.testing.assert_close(got[text_mask], bert(text, text_mask, mask=mask, context=context)[text_mask])
    if mask == "causal":
        torch.testing.assert_close(bert(longer, mask=mask, context=context)[:, :L][text_mask], got[text_mask])


def test_a_batch_of_one_and_one_by_one() -> None:
    bert, (text, mask, context) = make(), inputs()
    together = bert(text, mask, context=context)
    for i in range(B):
        alone = bert(text[i : i + 1], mask[i : i + 1], context=context[i // 2 : i // 2 + 1])
        torch.testing.assert_close(alone[0][mask[i]], together[i][mask[i]], rtol=1e-4, atol=1e-5)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_padded", [False, True])
@pytest.mark.parametrize("prompt", [1, 3])
def test_cached_decoding_is_uncached(prompt: int, left_padded: bool) -> None:
    bert, (text, _, context) = make(), inputs((L,) * B)
    seen = torch.rand(B // 2, T) > 0.3
    seen[:, 0] = True
    mask = (torch.arange(L) >= torch.tensor([0, 1, 2, 0, 1, 0])[:, None]) if left_padded else None
    expected = bert(text, mask, mask="causal", context=context, context_mask=seen)
    cache, states = BertCache(), []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, L - 2)), (L - 2, L)]:
        part = None if mask is None else mask[:, :stop]
        first = {"context": context, "context_mask": seen} if not start else {}
        states.append(bert(text[:, start:stop], part, mask="causal", cache=cache, **first))
        assert cache.length() == cache.length(3) == stop
    rows = torch.ones(B, L, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(torch.cat(states, dim=1)[rows], expected[rows], rtol=1e-4, atol=1e-5)


def test_halves_share_a_cache() -> None:
    bert, (text, _, context) = make(), inputs((L,) * B)
    expected = bert(text, mask="causal", context=context)
    cache, states = BertCache(), []
    for start, stop in ((0, 3), (3, 5), (5, 7)):
        half = bert(text[:, start:stop], mask="causal", layers=range(2), cache=cache)
        states.append(bert.run(half, mask="causal", context=context, layers=range(2, 4), cache=cache))
    torch.testing.assert_close(torch.cat(states, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_the_context_is_read_once() -> None:
    bert, (text, _, context) = make(), inputs((L,) * B)
    calls = []
    for layer in bert.layers[2:]:
        layer.cross.kv_proj.register_forward_hook(lambda module, *_: calls.append(module))
    cache = BertCache()
    for i in range(3):
        bert(text[:, i : i + 1], mask="causal", context=context, cache=cache)
    assert len(calls) == 2


def test_beams_reordered_go_on_as_what_they_were() -> None:
    bert, (text, _, context) = make(), inputs((L,) * B)
    text, pictures = text[:3], context
    cache = BertCache()
    bert(text[:, :2], mask="causal", context=pictures, cache=cache)
    cache.reorder(torch.arange(3).repeat_interleave(2))  # two beams each
    beams = torch.randint(1, 50, (6, 3))
    bert(beams[:, :2], mask="causal", cache=cache)
    rows = torch.tensor([1, 1, 2, 3, 5, 4])
    cache.reorder(rows)
    whole = torch.cat((text[:, :2].repeat_interleave(2, 0), beams[:, :2]), dim=1)[rows]
    whole = torch.cat((whole, beams[:, 2:]), dim=1)
    expected = bert(whole, mask="causal", context=pictures)[:, -1:]
    kept = copy.copy(cache)
    kept.layers = dict(cache.layers)
    torch.testing.assert_close(bert(beams[:, 2:], mask="causal", cache=cache), expected, rtol=1e-4, atol=1e-5)
    # the picture in the middle is done
    left = torch.tensor([0, 1, 4, 5])
    kept.reorder(left, torch.tensor([0, 2]))
    got = bert(beams[left, 2:], mask="causal", cache=kept)
    torch.testing.assert_close(got, expected[left], rtol=1e-4, atol=1e-5)


def test_a_context_for_another_pass() -> None:
    bert, (text, mask, context) = make(), inputs()
    cache = BertCache()
    context.requires_grad_(True)
    bert(text[:3], mask[:3], context=context, cache=cache)
    rows = torch.tensor([2, 2, 0, 1, 1, 0])
    again = bert(text, mask, cache=cache.of_context(rows))
    expected = bert(text, mask, context=context[rows])
    torch.testing.assert_close(again, expected)
    (a,), (b,) = (torch.autograd.grad(states.pow(3).sum(), context) for states in (again, expected))
    torch.testing.assert_close(a, b)
    assert cache.of_context().length() == 0


# --- gradients, weights, dropout --------------------------------------------------------------------------------------


def test_gradients_reach_what_was_passed_through() -> None:
    bert, (text, mask, context) = make(), inputs()
    found = gradients(bert, bert(text, mask, layers=range(2)).pow(3).sum())
    assert not [name for name in found if name.startswith(("layers.2", "layers.3"))]
    found = gradients(bert, bert(text, mask, context=context)[:, 0].pow(3).sum())
    assert set(found) == {name for name, _ in bert.named_parameters()}
    assert not found["token_embed.weight"][0].any() and found["token_embed.weight"][1:].any()
    dead = [name for name, gradient in found.items() if not gradient.any()]
    assert not dead


def test_weights_on_the_context() -> None:
    bert, (text, mask, context) = make(), inputs()
    states, weights = bert(text, mask, context=context, need_weights=2)
    torch.testing.assert_close(states, bert(text, mask, context=context))
    assert weights.shape == (B // 2, 4, 2 * L, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B // 2, 4, 2 * L))
    _, copied = bert(text, mask, context=context.repeat_interleave(2, 0), need_weights=2)
    torch.testing.assert_close(weights, copied.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3))
    # frozen weights, and no graph below the layer
    bert.requires_grad_(False)
    with torch.no_grad():
        below = bert(text, mask, layers=range(2))
    states, weights = bert.run(below.requires_grad_(True), mask, context=context, layers=range(2, 4), need_weights=2)
    (gradient,) = torch.autograd.grad(states[:, 0, 0].sum(), weights)
    step = torch.zeros_like(weights)
    step[1, 1, L, 2] = 1e-2  # row 3, its first token
    moved = []
    for sign in (1, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "vlpfast.nn.bert.attention",
                lambda q, k, v, sign=sign, need_weights=False, **kw: nudged(q, k, v, sign * step, need_weights, kw),
            )
            moved.append(bert.run(below, mask, context=context, layers=range(2, 4), need_weights=2)[0][:, 0, 0].sum())
    torch.testing.assert_close(gradient[1, 1, L, 2], (moved[0] - moved[1]) / 2e-2, rtol=1e-2, atol=0)
    assert below.grad is None


def nudged(q: Tensor, k: Tensor, v: Tensor, step: Tensor, need_weights: bool, options: dict):
    from vlpfast.nn.attention import attention

    out = attention(q, k, v, need_weights=need_weights, **options)
    if not need_weights:
        return out
    return out[0] + step @ v, out[1]


def test_dropout_in_training_alone() -> None:
    bert, (text, mask, context) = make(dropout=0.5), inputs()
    torch.manual_seed(0)
    first = bert(text, mask, context=context)
    assert not torch.allclose(bert(text, mask, context=context), first)
    torch.manual_seed(0)
    assert torch.equal(bert(text, mask, context=context), first)
    bert.eval()
    assert torch.equal(bert(text, mask, context=context), bert(text, mask, context=context))
    torch.testing.assert_close(bert(text, mask, context=context), make().eval()(text, mask, context=context))


def test_dropout_of_each_kind() -> None:
    """Embeddings, attention weights and what each part adds: each is dropped with the probability of the config."""
    config = replace(SMALL, dropout=0.3, width=256, heads=2, hidden=64, context_width=256)
    torch.manual_seed(0)
    bert = Bert(config)
    seen: list[float] = []
    layer = bert.layers[2]
    real = F.dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, p=0.5, training=True: seen.append(p * training) or real(x, p, training))
        sdpa = F.scaled_dot_product_attention
        patch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda *a, dropout_p=0.0, **kw: seen.append(dropout_p) or sdpa(*a, dropout_p=dropout_p, **kw),
        )
        x = bert.embed(inputs()[0])
        assert seen == [0.3] and (x == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
        layer(x, None, False, torch.randn(B, T, 256), None, None, False)
        assert seen[1:] == [0.3] * 5  # two attentions, three parts
        bert.eval()
        layer(x, None, False, torch.randn(B, T, 256), None, None, False)
        assert set(seen[6:]) == {0.0}


def test_half_precision_under_autocast() -> None:
    """Products in bfloat16, the residual stream and the head's loss in float32; a cache too."""
    bert, (text, mask, context) = make(), inputs()
    head = MaskedLMHead(SMALL)
    exact = bert(text, mask, context=context)
    with torch.autocast("cpu", torch.bfloat16):
        states = bert(text, mask, context=context)
        loss = head.loss(states, text.masked_fill(~mask, -100), bert.token_embed.weight)
        cache = BertCache()
        decoded = [bert(text[:, i : i + 1], mask="causal", context=context, cache=cache) for i in range(L)]
        causal = bert(text, mask="causal", context=context)
        biased = bert(text, mask, context=context, context_mask=torch.zeros(B // 2, T))
    torch.testing.assert_close(biased, states, rtol=0.05, atol=0.05)
    assert states.dtype == loss.dtype == torch.float32 and cache.layers[0].tokens[0].dtype == torch.bfloat16
    assert not torch.equal(states, exact)
    torch.testing.assert_close(states[mask], exact[mask], rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.cat(decoded, dim=1), causal, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in bert.parameters())


def test_checkpointing_changes_memory_alone() -> None:
    text, mask, context = inputs()
    results = []
    for checkpointing in (False, True):
        bert = make(dropout=0.2, checkpointing=checkpointing)
        kept: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = bert(text, mask, context=context).pow(3).sum()
        results.append((gradients(bert, loss), sum(kept)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert results[1][1] < results[0][1] / 3


def test_compiles_whole() -> None:
    bert, (text, mask, context) = make(layers=2, cross_attention=[1], checkpointing=True), inputs()
    head = MaskedLMHead(SMALL)
    labels = text.masked_fill(text % 2 == 0, -100)

    def run() -> Tensor:
        half = bert(text, mask, layers=range(1))
        states = bert.run(half, mask, mask="causal", context=context, layers=range(1, 2))
        return head.loss(states, labels, bert.token_embed.weight, max_rows=40)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, run())
    expected = gradients(bert, run())
    torch.testing.assert_close(gradients(bert, compiled), expected)


def test_starts_as_bert_does() -> None:
    torch.manual_seed(0)
    bert, head = Bert(replace(SMALL, width=256, hidden=512, vocab_size=500, dropout=0.1)), MaskedLMHead(SMALL)
    for name, parameter in (*bert.named_parameters(), *head.named_parameters()):
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert (bert.token_embed.weight[0] == 0).all()


def test_size_of_the_paper() -> None:
    with torch.device("meta"):
        plain, fused = Bert(BertConfig()), Bert(BertConfig(cross_attention=list(range(6, 12))))
    assert sum(p.numel() for p in plain.parameters()) == 109_482_240 - 590_592  # bert-base-uncased less its pooler
    cross = 4 * (768 * 768 + 768) + 2 * 768
    assert sum(p.numel() for p in fused.parameters()) - sum(p.numel() for p in plain.parameters()) == 6 * cross


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [None, 30])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head_computes_the_asked_rows_alone(max_rows: int | None, reduction: str) -> None:
    bert, (text, mask, _) = make(), inputs()
    head, weight = MaskedLMHead(SMALL), bert.token_embed.weight
    nn.init.normal_(head.bias)
    rows: list[int] = []
    head.dense.register_forward_hook(lambda _, args, out: rows.append(args[0].numel() // 32))
    labels = text.masked_fill(~mask | (text % 3 > 0), -100)
    x = bert(text, mask).detach().requires_grad_(True)
    loss = head.loss(x, labels, weight, max_rows=max_rows, reduction=reduction, label_smoothing=0.1)
    asked = int((labels >= 0).sum())
    assert 2 < asked < 20 and rows == [max_rows or asked]
    expected = F.cross_entropy(head.logits(x, weight).flatten(0, 1), labels.flatten(), reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.view_as(loss))
    (got,), (wanted,) = (torch.autograd.grad(value.sum(), x) for value in (loss, expected))
    torch.testing.assert_close(got, wanted)
    assert not got[labels < 0].any()


def test_head_without_a_question() -> None:
    bert, (text, _, _) = make(), inputs()
    head = MaskedLMHead(SMALL)
    x = bert(text)
    loss = head.loss(x, torch.full_like(text, -100), bert.token_embed.weight)
    assert loss == 0
    loss.backward()
    with pytest.raises(ValueError, match="max_rows: expected at least"):
        head.loss(x, text, bert.token_embed.weight, max_rows=3)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    bert, (text, mask, context) = make(), inputs()
    cache = BertCache()
    for message, call in {
        r"text: expected \[B, L\] with L at most 16, got \(1, 17\)": lambda: bert(torch.ones(1, 17, dtype=torch.int64)),
        r"text_mask: expected bool \[6, 7\].*got torch.bool \[6, 6\]": lambda: bert(text, mask[:, 1:]),
        "text_mask: expected bool.*got torch.int64": lambda: bert(text, mask.long()),
        r"mask: expected bool \[\(6,\) 7, 7\], got torch.bool \[7, 6\]": lambda: bert(text, mask=torch.ones(7, 6).bool()),
        "mask: expected 'joint', 'causal' or a tensor, got 'all'": lambda: bert(text, mask="all"),
        "context: expected rows of which each serves as many of the 6 rows of x, got 4": lambda: bert(
            text, context=torch.randn(4, T, 24)
        ),
        r"context_mask: expected \[3, 5\], got \[6, 5\]": lambda: bert(
            text, context=context, context_mask=torch.ones(6, 5).bool()
        ),
        "context_mask: expected None without a context": lambda: bert(text, context_mask=torch.ones(3, T).bool()),
        r"context: expected None, because no layer of range\(0, 2\)": lambda: bert(text, context=context, layers=range(2)),
        r"need_weights: expected a layer with a cross-attention in range\(0, 4\), got 1": lambda: bert(
            text, context=context, need_weights=1
        ),
        "text: expected at most 16 tokens with those in the cache, got 14 and 7": lambda: [
            bert(text, mask="causal", cache=cache) for _ in range(3)
        ],
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads: expected a divisor of the width 32, got 5"),
        ({"cross_attention": [1, 4]}, "cross_attention: expected layers below 4, got 4"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"activation": "relu"}, "activation: expected one of quick_gelu, gelu, got 'relu'"),
        ({"pad_id": 50}, "pad_id: expected an id below vocab_size 50, got 50"),
    ],
)
def test_wrong_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)
