from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.bert import Bert, BertCache, LayerCache
from vlpfast.nn.bert_convert import convert_bert
from vlpfast.nn.qformer import QFormer, QFormerConfig, convert_qformer
from vlpfast.types import UserError

SMALL = QFormerConfig(
    vocab_size=50,
    width=32,
    layers=4,
    heads=4,
    hidden=48,
    max_positions=16,
    dropout=0.0,
    cross_attention=[0, 2],
    context_width=24,
    queries=3,
)
B, L, T, Q = 4, 6, 5, 3


def make(**changes: object) -> QFormer:
    """Weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    qformer = QFormer(replace(SMALL, **changes))
    for parameter in qformer.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return qformer


def inputs(lengths: tuple[int, ...] = (6, 3, 1, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """context [B, T, 24], text [B, L] with pad 0, text_mask"""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    text = torch.randint(1, 50, (B, L), generator=generator) * mask
    return torch.randn(B, T, 24, generator=generator), text, mask


def gradients(qformer: QFormer, loss: Tensor) -> dict[str, Tensor]:
    qformer.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in qformer.named_parameters() if parameter.grad is not None}


# --- parity with transformers -----------------------------------------------------------------------------------------


def official(name: str, **options: object):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}QFormerConfig")(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.3,
        encoder_hidden_size=24,
        **options,
    )
    if name == "Blip2":
        theirs = transformers.models.blip_2.modeling_blip_2.Blip2QFormerModel(config).eval()
    else:
        theirs = transformers.InstructBlipQFormerModel(config).eval()
    for key, parameter in theirs.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if key.endswith("weight") else 0.0, std=0.3)
    return theirs


def whole(theirs: nn.Module, queries: Tensor) -> dict[str, Tensor]:
    """As a part of the state dict of a whole model."""
    others = {"query_tokens": queries[None], "vision_model.embeddings.class_embedding": torch.zeros(1)}
    return others | {f"qformer.{name}": tensor for name, tensor in theirs.state_dict().items()}


def test_instructed_queries_are_those_of_transformers() -> None:
    theirs = official("InstructBlip")
    queries = torch.randn(Q, 32)
    context, text, mask = inputs()
    attention_mask = F.pad(mask, (Q, 0), value=True).long()
    expected = theirs(
        input_ids=text,
        attention_mask=attention_mask,
        query_embeds=queries.expand(B, -1, -1),
        encoder_hidden_states=context,
    ).last_hidden_state
    for kind in ("full", "input"):
        config = replace(SMALL, text=kind)
        ours = QFormer(config).eval()
        ours.load_state_dict(convert_qformer(whole(theirs, queries), config))
        states, of_text = ours(context, text, mask)
        torch.testing.assert_close(states, expected[:, :Q], rtol=1e-4, atol=1e-4)
        if kind == "full":
            torch.testing.assert_close(of_text[mask], expected[:, Q:][mask], rtol=1e-4, atol=1e-4)
        else:
            assert of_text is None


def test_queries_alone_are_those_of_transformers() -> None:
    theirs = official("Blip2")
    queries = torch.randn(Q, 32)
    context, _, _ = inputs()
    config = replace(SMALL, text="none")
    ours = QFormer(config).eval()
    ours.load_state_dict(convert_qformer(whole(theirs, queries), config))
    seen = torch.arange(T) < torch.tensor([5, 1, 3, 4])[:, None]
    for context_mask in (None, seen):
        expected = theirs(
            query_embeds=queries.expand(B, -1, -1),
            encoder_hidden_states=context,
            encoder_attention_mask=None if context_mask is None else context_mask.long(),
        ).last_hidden_state
        got = ours.encode_queries(context, context_mask=context_mask)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + queries.numel()


def test_text_beside_queries_is_that_of_transformers() -> None:
    """BLIP-2 with text: the embeddings stand beside the Q-Former, and text alone passes through the text's parts."""
    modeling = pytest.importorskip("transformers.models.blip_2.modeling_blip_2")
    theirs = official("Blip2", use_qformer_text_input=True)
    embeddings = modeling.Blip2TextEmbeddings(theirs.config)
    queries = torch.randn(Q, 32)
    weights = whole(theirs, queries) | {f"embeddings.{name}": t for name, t in embeddings.state_dict().items()}
    ours = QFormer(SMALL).eval()
    ours.load_state_dict(convert_qformer(weights, SMALL))
    context, text, mask = inputs()
    expected = theirs(embeddings(text), query_length=0, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours.encode_text(text, mask)[mask], expected[mask], rtol=1e-4, atol=1e-4)
    expected = theirs(
        embeddings(text, query_embeds=queries.expand(B, -1, -1)),
        query_length=Q,
        attention_mask=F.pad(mask, (Q, 0), value=True).long(),
        encoder_hidden_states=context,
    ).last_hidden_state
    states, of_text = ours.encode_pairs(text, mask, context)
    torch.testing.assert_close(states, expected[:, :Q], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_text[mask], expected[:, Q:][mask], rtol=1e-4, atol=1e-4)


# --- names ------------------------------------------------------------------------------------------------------------


def lavis_names(qformer: QFormer) -> dict[str, Tensor]:
    own, width = qformer.state_dict(), qformer.config.width
    theirs = {
        "query_tokens": own["query_tokens"][None],
        "Qformer.bert.embeddings.word_embeddings.weight": own["token_embed.weight"],
        "Qformer.bert.embeddings.position_embeddings.weight": own["position_embed.weight"],
        "Qformer.bert.embeddings.position_ids": torch.arange(16)[None],
        "Qformer.cls.predictions.bias": torch.zeros(50),
        "ln_vision.weight": torch.zeros(24),
    }
    for kind in ("weight", "bias"):
        theirs[f"Qformer.bert.embeddings.LayerNorm.{kind}"] = own[f"norm.{kind}"]
        for i in range(qformer.config.layers):
            mine, their = f"layers.{i}.", f"Qformer.bert.encoder.layer.{i}."
            for name, part in zip(("query", "key", "value"), own[f"{mine}attn.in_proj.{kind}"].split(width), strict=True):
                theirs[f"{their}attention.self.{name}.{kind}"] = part
            theirs[f"{their}attention.output.dense.{kind}"] = own[f"{mine}attn.out_proj.{kind}"]
            theirs[f"{their}attention.output.LayerNorm.{kind}"] = own[f"{mine}attn.norm.{kind}"]
            if i in qformer.config.cross_attention:
                theirs[f"{their}crossattention.self.query.{kind}"] = own[f"{mine}cross.q_proj.{kind}"]
                for name, part in zip(("key", "value"), own[f"{mine}cross.kv_proj.{kind}"].split(width), strict=True):
                    theirs[f"{their}crossattention.self.{name}.{kind}"] = part
                theirs[f"{their}crossattention.output.dense.{kind}"] = own[f"{mine}cross.out_proj.{kind}"]
                theirs[f"{their}crossattention.output.LayerNorm.{kind}"] = own[f"{mine}cross.norm.{kind}"]
            for suffix, part in (("", "feed_forward"), ("_query", "query_feed_forward")):
                theirs[f"{their}intermediate{suffix}.dense.{kind}"] = own[f"{mine}{part}.fc1.{kind}"]
                theirs[f"{their}output{suffix}.dense.{kind}"] = own[f"{mine}{part}.fc2.{kind}"]
                theirs[f"{their}output{suffix}.LayerNorm.{kind}"] = own[f"{mine}{part}.norm.{kind}"]
    return theirs


@pytest.mark.parametrize("kind", ["full", "input", "none"])
def test_names_of_lavis(kind: str) -> None:
    qformer = make()
    config = replace(SMALL, text=kind)
    converted = convert_qformer(lavis_names(qformer), config)
    other = QFormer(config)
    other.load_state_dict(converted)
    for name, tensor in other.state_dict().items():
        assert torch.equal(qformer.state_dict()[name], tensor), name
    left_out = {"full": 0, "input": 6, "none": 2 + 4 * 6}[kind]
    assert len(qformer.state_dict()) - len(converted) == left_out


def test_weights_that_do_not_fit_are_named() -> None:
    theirs = lavis_names(make())
    second_stage = {name: t for name, t in theirs.items() if not re.search(r"\d\.(intermediate|output)\.dense", name)}
    with pytest.raises(UserError, match=r"do not fit this Q-Former: layers\.0\.feed_forward\.fc1\.weight is missing"):
        convert_qformer(second_stage, SMALL)
    without_text = {name: t for name, t in second_stage.items() if not re.search(r"\d\.output\.Layer|ings\.[wp]", name)}
    convert_qformer(without_text, replace(SMALL, text="none"))
    with pytest.raises(UserError, match=r"layers\.3\.cross\.q_proj\.weight has no place"):
        extra = {"Qformer.bert.encoder.layer.3.crossattention.self.query.weight": torch.zeros(32, 32)}
        convert_qformer(theirs | extra, SMALL)
    del theirs["query_tokens"]
    with pytest.raises(UserError, match="expected query_tokens"):
        convert_qformer(theirs, SMALL)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def joint_reference(qformer: QFormer, context: Tensor, text: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one row under a mask [B, Q + L, Q + L], each part's rows cut out and put back, in plain products."""
    length = text.shape[1]
    words = qformer.token_embed(text) + qformer.position_embed.weight[:length]
    x = qformer.norm(torch.cat((qformer.query_tokens.expand(len(text), -1, -1), words), dim=1))
    for layer in qformer.layers:
        q, k, v = layer.attn.in_proj(x).chunk(3, dim=-1)
        x = layer.attn.norm(x + layer.attn.out_proj(heads(q, k, v, seen)))
        queries, words = x[:, :Q], x[:, Q:]
        if layer.cross is not None:
            k, v = layer.cross.kv_proj(context).chunk(2, dim=-1)
            out = heads(layer.cross.q_proj(queries), k, v, torch.ones(1, Q, context.shape[1]).bool())
            queries = layer.cross.norm(queries + layer.cross.out_proj(out))
        parts = []
        for part, rows in ((layer.query_feed_forward, queries), (layer.feed_forward, words)):
            parts.append(part.norm(rows + part.fc2(F.gelu(part.fc1(rows)))))
        x = torch.cat(parts, dim=1)
    return x[:, :Q], x[:, Q:]


def heads(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def visible(mode: str, mask: Tensor) -> Tensor:
    """[B, Q + L, Q + L] as the paper draws it."""
    seen = torch.zeros(B, Q + L, Q + L, dtype=torch.bool)
    seen[:, :Q, :Q] = True
    if mode == "matching":
        seen[:] = True
    elif mode == "contrast":
        seen[:, Q:, Q:] = True
    else:
        seen[:, Q:, :Q] = True
        seen[:, Q:, Q:] = torch.ones(L, L).tril().bool()
    seen &= F.pad(mask, (Q, 0), value=True)[:, None]
    return seen | torch.eye(Q + L, dtype=torch.bool)


@pytest.mark.parametrize("mode", ["contrast", "matching", "generation"])
def test_modes_are_masks(mode: str) -> None:
    qformer, (context, text, mask) = make(), inputs()
    states, of_text = qformer(context, text, mask, mode=mode)
    expected, expected_text = joint_reference(qformer, context, text, visible(mode, mask))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_text[mask], expected_text[mask], rtol=1e-4, atol=1e-4)
    loss, wanted = ((a.pow(3).mean() + b[mask].pow(3).mean()) for a, b in ((states, of_text), (expected, expected_text)))
    found = gradients(qformer, loss)
    torch.testing.assert_close(found, gradients(qformer, wanted), rtol=1e-3, atol=1e-5)
    assert all(gradient.any() for gradient in found.values())
    assert set(found) == {name for name, _ in qformer.named_parameters()}


def test_words_change_the_queries_in_matching_alone() -> None:
    qformer, (context, text, mask) = make(), inputs()
    other = torch.where(mask, text % 49 + 1, text)
    for mode in ("contrast", "matching", "generation"):
        states, changed = (qformer(context, ids, mask, mode=mode)[0] for ids in (text, other))
        assert torch.equal(states, changed) == (mode != "matching")


def test_the_picture_changes_the_text_but_in_contrast() -> None:
    qformer, (context, text, mask) = make(), inputs()
    for mode in ("contrast", "matching", "generation"):
        states, changed = (qformer(image, text, mask, mode=mode)[1] for image in (context, context.flip(0)))
        assert torch.equal(states, changed) == (mode == "contrast")


def test_query_rows_unchanged_if_text_is_fully_masked() -> None:
    """Against text input off with equal weights (InstructBLIP)."""
    qformer, (context, text, mask) = make(), inputs()
    off = make(text="none")
    off.load_state_dict({name: t for name, t in qformer.state_dict().items() if name in off.state_dict()})
    states, _ = qformer(context, text, torch.zeros_like(mask))
    torch.testing.assert_close(states, off(context)[0])
    assert not torch.allclose(states, qformer(context, text, mask)[0])


def test_grouped_feed_forward_is_slice_and_cat() -> None:
    """One layer's two parts on rows that stand apart, against the whole row cut and joined: the same bits, gradients too."""
    layer = make().layers[1]
    results = []
    for apart in (True, False):
        torch.manual_seed(4)
        queries, text = torch.randn(B, Q, 32, requires_grad=True), torch.randn(B, L, 32, requires_grad=True)
        if apart:
            a, b, _ = layer(queries, text, None, None, None, cache=LayerCache(), need_text=True)
        else:
            x, _ = layer.attn(torch.cat((queries, text), dim=1), None)
            x = torch.cat((layer.query_feed_forward(x[:, :Q]), layer.feed_forward(x[:, Q:])), dim=1)
            a, b = x[:, :Q], x[:, Q:]
        results.append((a, b, *torch.autograd.grad(a.pow(3).sum() + b.pow(3).sum(), (queries, text))))
    torch.testing.assert_close(results[0], results[1])


def test_text_alone_is_bert_without_a_picture() -> None:
    qformer, (_, text, mask) = make(), inputs()
    bert = Bert(replace(SMALL, cross_attention=[]))
    own = {name: t for name, t in qformer.state_dict().items() if ".cross." not in name and "query" not in name}
    bert.load_state_dict(own)
    torch.testing.assert_close(qformer.encode_text(text, mask), bert(text, mask))


# --- passes that share work -------------------------------------------------------------------------------------------


def test_text_behind_cached_queries_word_by_word() -> None:
    qformer, (context, text, _) = make(), inputs((L,) * B)
    expected = qformer(context, text, mode="generation")[1]
    cache = BertCache()
    qformer.encode_queries(context, cache=cache)
    parts = [qformer.encode_text(text[:, :2], cache=cache)]
    parts += [qformer.encode_text(text[:, i : i + 1], cache=cache) for i in range(2, L)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    # two beams each, the second one's first word another
    cache = BertCache()
    qformer.encode_queries(context, cache=cache)
    cache.reorder(torch.arange(B).repeat_interleave(2))
    beams = text.repeat_interleave(2, 0)
    beams[1::2, 0] = 7
    expected = qformer(context.repeat_interleave(2, 0), beams, mode="generation")[1]
    torch.testing.assert_close(qformer.encode_text(beams, cache=cache), expected, rtol=1e-4, atol=1e-5)


def test_a_picture_is_read_once_for_all_passes() -> None:
    qformer, (context, text, mask) = make(), inputs()
    calls: list[int] = []
    for layer in (qformer.layers[0], qformer.layers[2]):
        layer.cross.kv_proj.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    context.requires_grad_(True)
    rows = torch.tensor([3, 3, 0, 1])
    cache = BertCache()
    first = qformer.encode_queries(context, cache=cache)
    again, _ = qformer.encode_pairs(text, mask, cache.of_context(rows), need_text=False)
    assert calls == [B, B]
    expected, _ = qformer.encode_pairs(text, mask, context[rows])
    torch.testing.assert_close(again, expected)
    (a,) = torch.autograd.grad(first.pow(3).sum() + again.pow(3).sum(), context)
    (b,) = torch.autograd.grad(qformer.encode_queries(context).pow(3).sum() + expected.pow(3).sum(), context)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_shared_picture_is_a_copied_one() -> None:
    qformer, (context, text, mask) = make(), inputs()
    shared = qformer.encode_pairs(text, mask, context[:2])
    copied = qformer.encode_pairs(text, mask, context[:2].repeat_interleave(2, 0))
    torch.testing.assert_close(shared, copied)


def test_what_only_the_text_needs_is_left_out() -> None:
    qformer, (context, text, mask) = make(), inputs()
    calls: list[int] = []
    qformer.layers[-1].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    whole_states, of_text = qformer.encode_pairs(text, mask, context)
    states, nothing = qformer.encode_pairs(text, mask, context, need_text=False)
    assert torch.equal(states, whole_states) and of_text is not None and nothing is None and calls == [1]


def test_a_bias_over_patches_by_layer() -> None:
    """GeoX's sampler: a later layer sees fewer patches, the first all of them; queries moved by a vector of the picture."""
    qformer, (context, text, mask) = make(), inputs()
    closed = torch.tensor([[True, True, False, False, True]]).expand(B, T)
    bias = (~closed).float() * -10000.0
    given = qformer.query_tokens.expand(B, -1, -1)
    torch.testing.assert_close(qformer.encode_queries(context, queries=given), qformer.encode_queries(context))
    moved = given + torch.randn(B, 1, 32)
    states = qformer.encode_queries(context, queries=moved, context_mask={2: bias})
    torch.testing.assert_close(states, qformer.encode_queries(context, queries=moved, context_mask={2: closed}))
    assert not torch.allclose(states, qformer.encode_queries(context, queries=moved, context_mask=closed))
    assert not torch.allclose(states, qformer.encode_queries(context, queries=moved))
    assert not torch.allclose(states, qformer.encode_queries(context, context_mask={2: bias}))
    with torch.no_grad():
        masks = []
        for i in (0, 2):
            qformer.layers[i].cross.register_forward_pre_hook(lambda _, args: masks.append(args[1].mask))
        qformer.encode_queries(context, context_mask={2: bias})
        assert masks[0] is None and torch.equal(masks[1], bias)
    # and what is kept of the picture keeps it
    cache = BertCache()
    qformer.encode_queries(context, queries=moved, context_mask={2: bias}, cache=cache)
    again, _ = qformer.encode_pairs(text, mask, cache.of_context(), queries=moved)
    expected, _ = qformer.encode_pairs(text, mask, context, queries=moved, context_mask={2: bias})
    torch.testing.assert_close(again, expected)
    gates = torch.zeros(B, T, requires_grad=True)
    (gradient,) = torch.autograd.grad(qformer.encode_queries(context, context_mask={2: gates}).pow(3).sum(), gates)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("mode", ["contrast", "matching", "generation"])
def test_padding_order_and_a_batch_of_one(mode: str) -> None:
    qformer, (context, text, mask) = make(), inputs()
    states, of_text = qformer(context, text, mask, mode=mode)
    longer = F.pad(torch.where(mask, text, 11), (0, 3), value=9)
    padded, padded_text = qformer(context, longer, F.pad(mask, (0, 3)), mode=mode)
    torch.testing.assert_close(padded, states)
    torch.testing.assert_close(padded_text[:, :L][mask], of_text[mask])
    for i in range(B):
        alone, alone_text = qformer(context[i : i + 1], text[i : i + 1], mask[i : i + 1], mode=mode)
        torch.testing.assert_close(alone[0], states[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone_text[0][mask[i]], of_text[i][mask[i]], rtol=1e-4, atol=1e-5)


# --- size, start, compilation -----------------------------------------------------------------------------------------


def test_size_of_the_paper() -> None:
    with torch.device("meta"):
        count = {
            kind: sum(p.numel() for p in QFormer(QFormerConfig(text=kind)).parameters()) for kind in ("full", "input", "none")
        }
    layer, part = 4 * (768**2 + 768) + 2 * 768, 2 * 768 * 3072 + 3072 + 3 * 768
    cross = 2 * (768**2 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
    none = 32 * 768 + 2 * 768 + 12 * (layer + part) + 6 * cross
    assert count["none"] == none
    assert count["full"] == none + (30523 + 512) * 768 + 12 * part
    assert count["input"] == count["full"] - part
    assert abs(count["full"] / 186e6 - 1) < 0.01  # BLIP-2, section 3.1: 188 M with what stands around it


def test_start_from_bert() -> None:
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    theirs = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
                                  max_position_embeddings=16, type_vocab_size=1))  # fmt: skip
    weights = {name: t for name, t in theirs.state_dict().items() if "token_type" not in name}
    qformer = make()
    left = qformer.load_state_dict(convert_bert(weights), strict=False)
    assert not left.unexpected_keys and all("quer" in name or ".cross." in name for name in left.missing_keys)
    qformer.copy_text_parts()
    for i, layer in enumerate(qformer.layers):
        assert torch.equal(layer.query_feed_forward.fc1.weight, weights[f"encoder.layer.{i}.intermediate.dense.weight"])
        assert layer.query_feed_forward.fc1.weight.data_ptr() != layer.feed_forward.fc1.weight.data_ptr()


def test_compiles_whole() -> None:
    qformer, (context, text, mask) = make(layers=2, cross_attention=[0], checkpointing=True), inputs()

    def run() -> Tensor:
        cache = BertCache()
        states = qformer.encode_queries(context, cache=cache)
        of_text = qformer.encode_text(text, cache=cache)
        pairs, _ = qformer.encode_pairs(text, mask, cache.of_context(torch.tensor([1, 0, 3, 2])), need_text=False)
        return states.pow(3).mean() + of_text.pow(3).mean() + pairs.pow(3).mean()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, run())
    found = gradients(qformer, compiled)
    torch.testing.assert_close(found, gradients(qformer, run()))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "both"}, "text: expected full, input or none, got 'both'"),
        ({"type_vocab": 2}, "type_vocab: expected 0"),
        ({"causal_attention": True}, "causal_attention: expected false"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        ({"heads": 3}, "heads: expected a divisor of the width 32, got 3"),
        ({"cross_attention": [0, 4]}, "cross_attention: expected layers below 4, got 4"),
    ],
)
def test_wrong_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def filled(qformer: QFormer, context: Tensor) -> BertCache:
    cache = BertCache()
    qformer.encode_queries(context, cache=cache)
    return cache


def too_long(qformer: QFormer, context: Tensor, text: Tensor) -> None:
    cache = filled(qformer, context)
    for _ in range(3):
        qformer.encode_text(text, cache=cache)


def test_wrong_arguments_are_named() -> None:
    qformer, (context, text, mask) = make(), inputs()
    for message, call in {
        "mode: expected contrast, matching or generation, got 'itm'": lambda: qformer(context, text, mask, mode="itm"),
        "cache: expected one that encode_queries has filled": lambda: qformer.encode_text(text, cache=BertCache()),
        r"text: expected none, this Q-Former was made without": lambda: make(text="none")(context, text, mask),
        r"text: expected a Q-Former whose last layer": lambda: make(text="input").encode_text(text, mask),
        r"text_mask: expected bool \[4, 9\]": lambda: qformer(context, text, mask[:, 1:]),
        "context_mask: expected None beside a context that was read": lambda: qformer.encode_pairs(
            text, mask, filled(qformer, context).of_context(), context_mask=torch.ones(B, T).bool()
        ),
        "text: expected at most 16 tokens with those in the cache, got 12 and 6": lambda: too_long(qformer, context, text),
        "context: expected rows of which each serves as many of the 4 rows": lambda: qformer(context[:3], text, mask),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
