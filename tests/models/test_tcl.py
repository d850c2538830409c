"""What TCL's paper and its code say, of TCL and of its fine-tuned models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from contract import build, make_batch, optimizer_for, snapshot, train
from torch import Tensor

from vlpfast.models.tcl import TCL, TCLRetrieval, local_global
from vlpfast.models.tcl_finetune import TCLNLVR2, TCLVQA, TCLAssignment
from vlpfast.types import Batch, Progress, UserError

NOW = Progress(0, 10)


def setup_tcl(name: str = "tcl", size: int = 6) -> tuple[TCL, Batch]:
    """The tiny model whose copy is another network, in evaluation mode; a batch."""
    model = build(name).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.momentum.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.alpha.fill_(0.4)
    return model, make_batch(model.config.data, size)


def dense_contrast(x: Tensor, keys: Tensor, queue: Tensor, s: Tensor, targets: Tensor) -> Tensor:
    logits = x @ torch.cat((keys, queue)).T / s
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def dense_local_global(x: Tensor, y: Tensor, s: Tensor, mask: Tensor) -> Tensor:
    """The log-softmax over one local and all locals of the others, as the code has it; y [B, L, D], mask [B, L]."""
    logits = torch.einsum("id,jld->ijl", x, y) / s  # [B, B, L]
    other = ~torch.eye(len(x), dtype=torch.bool)[:, :, None] & mask[None]
    negatives = logits.masked_fill(~other, -torch.inf).flatten(1)  # [B, B L]
    losses = []
    for i in range(len(x)):
        own = logits[i, i][mask[i]]  # [l]
        rows = torch.cat((own[:, None], negatives[i].expand(len(own), -1)), 1)
        losses.append(-rows.log_softmax(1)[:, 0].mean())
    return torch.stack(losses).mean()


def test_losses_are_the_papers() -> None:
    model, batch = setup_tcl()
    e = model.encode_views(batch)
    losses = model(batch, NOW)
    s, queue = model.temperature, model.queue
    eye = F.one_hot(torch.arange(6), 6 + queue.size).float()
    cma = imc = 0
    for x, x_t, k, kind in ((e.image, e.image_m, e.text_m, "text"), (e.text, e.text_m, e.image_m, "image")):
        other = getattr(queue, kind)
        soft = (x_t @ torch.cat((k, other)).T / s).softmax(1).detach()
        targets = 0.6 * eye + 0.4 * soft
        torch.testing.assert_close(targets.sum(1), torch.ones(6))  # target rows sum to 1
        cma = cma + dense_contrast(x, k, other, s, targets)
    for x, x_t, kind in ((e.image, e.image_m, "image"), (e.text, e.text_m, "text")):
        imc = imc + dense_contrast(x, x_t, getattr(queue, kind), s, eye)  # hard targets
    torch.testing.assert_close(losses["cma"], cma / 6)
    torch.testing.assert_close(losses["imc"], imc / 6)


def test_lmi_equals_the_dense_log_softmax() -> None:
    config = TCL.Config.tiny()
    config.vision.patch_size, config.vision.stem = 8, [32, 64]
    model = TCL(config).eval()  # a grid of 8 x 8: windows of 2 x 2
    batch = make_batch(config.data, 5)
    e = model.encode_views(batch)
    copy = model.momentum.module
    patches = F.normalize(copy.image_projection.double()(e.tokens_m[:, 1:].double()), dim=-1).float()  # normalised, then pooled
    maps = patches.transpose(1, 2).unflatten(2, (8, 8))
    pooled = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)  # [B, 16, D]
    assert (pooled.norm(dim=-1) < 0.9999).all()  # and left shorter than 1
    copy.float()
    words = copy.text_projection(e.states_m[:, 1:])
    expected = dense_local_global(e.image, pooled, model.temperature, torch.ones(5, 16, dtype=torch.bool))
    expected = expected + dense_local_global(e.text, words, model.temperature, batch["text_mask"][:, 1:])
    torch.testing.assert_close(local_global(model, e), expected, atol=1e-5, rtol=1e-5)


def test_locals_get_no_gradient() -> None:
    model, batch = setup_tcl()
    losses = model(batch, NOW)
    losses["lmi"].backward()
    assert all(parameter.grad is None for parameter in model.momentum.parameters())
    assert model.temperature.grad != 0 and model.online.vision.position.grad.abs().sum() > 0


def test_padded_tokens_do_not_change_lmi() -> None:
    model, batch = setup_tcl()
    changed: Batch = {**batch, "text": batch["text"].masked_fill(~batch["text_mask"], 9)}
    torch.testing.assert_close(model(changed, NOW)["lmi"], model(batch, NOW)["lmi"])
    single = {**batch, "text_mask": batch["text_mask"].clone()}
    single["text_mask"][0, 1:] = False  # a caption without a token behind the first
    assert all(loss.isfinite() for loss in model(single, NOW).values())


def test_without_soft_targets_cma_is_a_third_of_albefs_itc() -> None:
    model, batch = setup_tcl()
    model.alpha.zero_()
    e = model.encode_views(batch)
    labels = torch.arange(6)
    itc = [
        F.cross_entropy(x @ torch.cat((k, queue)).T / model.temperature, labels)
        for x, k, queue in ((e.image, e.text_m, model.queue.text), (e.text, e.image_m, model.queue.image))
    ]
    torch.testing.assert_close(model(batch, NOW)["cma"], (itc[0] + itc[1]) / 2 / 3)


def test_words_are_predicted_beside_the_other_view() -> None:
    """Of the copy's soft targets: they have seen the second view; the online network the first."""
    model, batch = setup_tcl()
    losses = model(batch, NOW)
    e = model.encode_views(batch)
    hidden = model.online.text(batch["text_masked"], batch["text_mask"], context=e.tokens)
    logits = model.online.mlm_head.logits(hidden, model.online.text.token_embed.weight)
    copy = model.momentum.module
    soft = copy.mlm_head.logits(
        copy.text(batch["text_masked"], batch["text_mask"], context=e.tokens_m), copy.text.token_embed.weight
    ).softmax(-1)
    labels = batch["text_labels"]
    hard = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    kl = -(soft * logits.log_softmax(-1)).sum(-1)[labels != -100]
    torch.testing.assert_close(losses["mlm"], (0.6 * hard + 0.4 * kl).mean())
    assert not torch.allclose(e.tokens, copy.image_tokens(batch["image"][:, 0]))
    torch.testing.assert_close(e.tokens_m, copy.image_tokens(batch["image"][:, 1]))


def test_matching_is_of_b_pairs_and_two_b_hard_negatives() -> None:
    model, batch = setup_tcl()
    e = model.encode_views(batch)
    loss, masked = model.match(e)
    picture = (e.text @ e.image_m.T).fill_diagonal_(-2).argmax(1)
    text = (e.image @ e.text_m.T).fill_diagonal_(-2).argmax(1)
    states = torch.cat((e.states, e.states, e.states[text]))
    masks = torch.cat((e.text_mask, e.text_mask, e.text_mask[text]))
    tokens = torch.cat((e.tokens, e.tokens[picture], e.tokens))
    logits = model.itm_head(model.online.fuse(states, masks, tokens)[:, 0])
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1] * 6 + [0] * 12)))
    torch.testing.assert_close(masked, model.online.fuse(e.masked, e.text_mask, e.tokens))


def test_the_copy_follows_before_a_step_and_the_queue_after_it() -> None:
    model = build("tcl").train()
    batch = make_batch(model.config.data, 6)
    optimizer = optimizer_for(model)
    before = snapshot(model)
    train(model, optimizer, [batch])
    name = "text_projection.weight"
    assert torch.equal(model.momentum.module.get_parameter(name), before[f"online.{name}"])  # first followed, then stepped
    assert int(model.queue.pointer) == 6
    with torch.no_grad():
        assert not torch.equal(model.queue.image[:6], before["queue.image"][:6])
        assert torch.equal(model.queue.image[6:], before["queue.image"][6:])
    online = model.online.get_parameter(name).detach().clone()
    model.before_step(NOW)
    assert torch.equal(model.momentum.module.get_parameter(name), torch.lerp(before[f"online.{name}"], online, 1 - 0.995))


def test_the_current_batch_is_contrasted_once() -> None:
    """As keys, not in the queue: the queue is filled after the step."""
    model, batch = setup_tcl()
    model.train()
    model(batch, NOW)
    made = model._made["image"]
    assert not any((model.queue.image == row).all(1).any() for row in made)
    model.after_step()
    assert torch.equal(model.queue.image[:6], made)


def test_temperature_is_clamped_in_pretraining_alone() -> None:
    for name, expected in (("tcl", 0.5), ("tcl_retrieval", 0.9)):
        model = build(name)
        with torch.no_grad():
            model.temperature.fill_(0.9)
        model.before_step(NOW)
        assert float(model.temperature.detach()) == pytest.approx(expected)
    model = build("tcl")
    with torch.no_grad():
        model.temperature.fill_(0.0)
    model.before_step(NOW)
    assert float(model.temperature.detach()) == pytest.approx(0.001)


@pytest.mark.parametrize(("epoch", "expected"), [(0.0, 0.0), (0.25, 0.1), (1.0, 0.4), (7.5, 0.4)])
def test_alpha_grows_over_the_first_epoch(epoch: float, expected: float) -> None:
    model = build("tcl_entailment")
    model.before_step(Progress(3, 10, epoch))
    assert float(model.alpha) == pytest.approx(expected)


def test_retrieval_spreads_targets_over_equal_ids_in_batch_and_queue() -> None:
    model, batch = setup_tcl("tcl_retrieval")
    batch["index"] = torch.tensor([4, 2, 4, 7, 2, 9])
    with torch.no_grad():
        model.queue.ids[:4] = torch.tensor([9, 4, 4, 1])
    e = model.encode_views(batch)
    losses = model(batch, NOW)
    equal = (batch["index"][:, None] == torch.cat((batch["index"], model.queue.ids))).float()
    hard = equal / equal.sum(1, keepdim=True)
    cma = imc = 0
    for x, x_t, k, kind in ((e.image, e.image_m, e.text_m, "text"), (e.text, e.text_m, e.image_m, "image")):
        other = getattr(model.queue, kind)
        soft = (x_t @ torch.cat((k, other)).T / model.temperature).softmax(1).detach()
        cma = cma + dense_contrast(x, k, other, model.temperature, 0.6 * hard + 0.4 * soft)
    for x, x_t, kind in ((e.image, e.image_m, "image"), (e.text, e.text_m, "text")):
        imc = imc + dense_contrast(x, x_t, getattr(model.queue, kind), model.temperature, hard)  # several positives here too
    torch.testing.assert_close(losses["cma"], cma / 6)
    torch.testing.assert_close(losses["imc"], imc / 6)
    model.train()
    model(batch, NOW)
    model.after_step()
    assert model.queue.ids[:6].tolist() == batch["index"].tolist()
    given = {**batch, "image_id": torch.tensor([1.0, 1, 1, 1, 1, 1])}  # a target says which pictures are alike: no negative
    assert all(loss.isfinite() for loss in model(given, NOW).values())


def test_answers_are_weighed_and_summed_over_their_tokens() -> None:
    config = TCLVQA.Config.tiny()
    config.data.texts["answer"].every = True
    torch.manual_seed(0)
    model = TCLVQA(config).eval()
    batch = make_batch(config.data, 4)
    loss = model(batch, NOW)["answer"]
    states = model.online.question_states(batch["image"], batch["question"], batch["question_mask"])
    expected = 0
    for row, of in enumerate(batch["answer_of"].tolist()):
        length = int(batch["answer_mask"][row].sum())
        answer = batch["answer"][row : row + 1, :length]
        found = model.online.answered(answer[:, :-1], states[of : of + 1], batch["question_mask"][of : of + 1])
        logits = model.online.mlm_head.logits(found.hidden[0], found.weight)
        expected = expected + batch["answer_weight"][row] * F.cross_entropy(logits, answer[0, 1:], reduction="sum")
    torch.testing.assert_close(loss, expected / 4)


def test_answers_are_ranked_by_first_token_then_by_likelihood() -> None:
    torch.manual_seed(0)
    config = TCLVQA.Config.tiny()
    config.ranked = 5
    model = TCLVQA(config).eval()
    batch = make_batch(config.data, 3)
    answers = make_batch(TCLVQA.Config.tiny().data, 12, seed=7)
    candidates, mask = answers["answer"], answers["answer_mask"]
    scores = model.rank_answers(batch, candidates, mask)
    assert scores.shape == (3, 12) and (scores.isfinite().sum(1) == 5).all()
    states = model.online.question_states(batch["image"], batch["question"], batch["question_mask"])
    for i in range(3):
        expected, first = [], []
        for row in range(12):
            answer = candidates[row : row + 1, : int(mask[row].sum())]
            found = model.online.answered(answer[:, :-1], states[i : i + 1], batch["question_mask"][i : i + 1])
            logits = model.online.mlm_head.logits(found.hidden[0], found.weight)
            expected.append(-F.cross_entropy(logits, answer[0, 1:], reduction="sum"))
            first.append(logits[0].log_softmax(0)[answer[0, 1]])
        kept = torch.stack(first).topk(5).indices
        assert set(kept.tolist()) == set(scores[i].isfinite().nonzero().flatten().tolist())
        torch.testing.assert_close(scores[i, kept], torch.stack(expected)[kept], atol=1e-4, rtol=1e-4)
    alone = torch.cat([model.rank_answers({k: v[i : i + 1] for k, v in batch.items()}, candidates, mask) for i in range(3)])
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)


def test_two_pictures_are_seen_by_turns_through_shared_keys_and_values() -> None:
    model, batch = setup_tcl("tcl_nlvr2", 3)
    layers = model.online.text.layers
    for network in (model.online, model.momentum.module):
        assert network.text.layers[3].cross.kv_proj is network.text.layers[2].cross.kv_proj
        assert network.text.layers[4].cross.kv_proj is not network.text.layers[2].cross.kv_proj
    left, right = (model.online.image_tokens(batch["image"][:, i]) for i in (0, 1))
    x = model.online.text_states(batch["text"], batch["text_mask"])
    for i, seen in ((2, left), (3, right), (4, left), (5, right)):
        x = layers[i](x, batch["text_mask"][:, None, None], seen, None, None, False)[0]
    torch.testing.assert_close(model.classify(batch), model.online.head(x[:, 0]))
    swapped = {**batch, "image": batch["image"].flip(1)}
    assert not torch.allclose(model.classify(swapped), model.classify(batch))


def test_assignment_asks_for_left_right_and_neither() -> None:
    torch.manual_seed(0)
    model = build("tcl_assignment").train()
    batch = make_batch(model.config.data, 12)
    own = torch.arange(12)
    seen: list[tuple[Tensor, ...]] = []
    tokens = model.online.image_tokens(batch["image"])
    inner = model.online.fuse_pair

    def spy(states: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
        which = [(side[:, None] - tokens[None]).abs().flatten(2).amax(2).argmin(1) for side in (left, right)]
        seen.append(tuple(which))
        return inner(states, mask, left, right)

    model.online.fuse_pair = spy
    kinds: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        real = F.cross_entropy
        patch.setattr(F, "cross_entropy", lambda logits, labels: kinds.append(labels) or real(logits, labels))
        for _ in range(20):
            model(batch, NOW)
        model.eval()
        model(batch, NOW)
    for (left, right), kind in zip(seen[:-1], kinds[:-1], strict=True):
        assert torch.equal(left == own, kind == 0) and torch.equal(right == own, kind == 1)
        assert (left != right).all()
    drawn = torch.cat(kinds[:-1]).bincount(minlength=3) / 240
    assert ((drawn - 1 / 3).abs() < 0.1).all()
    assert kinds[-1].tolist() == [0] * 12 + [1] * 12 + [2] * 12


def test_momentum_networks_have_their_dropout() -> None:
    model = build("tcl").train()
    assert all(module.training for module in model.momentum.modules())
    batch = make_batch(model.config.data, 4)
    mask = batch["text_mask"]
    copy = model.momentum.module
    assert not torch.equal(copy.text_states(batch["text"], mask), copy.text_states(batch["text"], mask))


def test_wrong_settings_are_named() -> None:
    def tiny(kind: type, **changes: object) -> object:
        return kind(dataclasses.replace(kind.Config.tiny(), **changes))

    with pytest.raises(UserError, match=r"model\.momentum: expected a number in \[0, 1\], got 1.5"):
        tiny(TCL, momentum=1.5)
    with pytest.raises(UserError, match=r"model\.alpha: expected a number in \[0, 1\], got -1"):
        tiny(TCLRetrieval, alpha=-1.0)
    text = dataclasses.replace(TCL.Config.tiny().text, context_width=64)
    with pytest.raises(UserError, match=r"model\.text\.context_width: expected 128"):
        tiny(TCL, text=text)
    with pytest.raises(UserError, match=r"model\.text\.cross_attention: expected the layers"):
        tiny(TCL, text=dataclasses.replace(TCL.Config.tiny().text, cross_attention=[]))
    with pytest.raises(UserError, match=r"model\.text\.cross_attention: expected an even number"):
        tiny(TCLNLVR2, text=dataclasses.replace(TCLNLVR2.Config.tiny().text, cross_attention=[3, 4, 5]))
    data = dataclasses.replace(TCL.Config.tiny().data, text=TCLRetrieval.Config.tiny().data.text)
    with pytest.raises(UserError, match=r"model\.data\.text\.mask: expected a section"):
        tiny(TCL, data=data)
    with pytest.raises(UserError, match=r"model\.data\.texts: expected 'answer', got question"):
        data = dataclasses.replace(TCLVQA.Config.tiny().data, texts={"question": TCLVQA.Config.tiny().data.texts["question"]})
        tiny(TCLVQA, data=data)
    with pytest.raises(UserError, match=r"model\.data: expected both image and text"):
        tiny(TCLAssignment, data=dataclasses.replace(TCLAssignment.Config.tiny().data, text=None))
    assert math.isclose(TCL.Config().temperature_init, 0.07) and TCL.Config().queue_size == 65536
