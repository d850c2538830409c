from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from torch import Tensor, nn

from vlpfast.nn.bert import BertConfig, MaskedLMHead
from vlpfast.objectives.token_loss import Predictor, asked_rows, mean_over_asked, token_losses

V, C = 37, 8


def predictor(seed: int, shape: tuple[int, int] = (4, 7), vocabulary: int = V, width: int = C) -> Predictor:
    torch.manual_seed(seed)
    head = MaskedLMHead(BertConfig(vocab_size=vocabulary, width=width, heads=2))
    nn.init.normal_(head.bias)
    return Predictor(torch.randn(*shape, width, requires_grad=True), head, torch.randn(vocabulary, width, requires_grad=True))


def leaves(p: Predictor) -> list[Tensor]:
    return [p.hidden, p.weight, *p.head.parameters()]


def labels_of(shape: tuple[int, int] = (4, 7), vocabulary: int = V) -> Tensor:
    torch.manual_seed(5)
    return torch.randint(vocabulary, shape).masked_fill(torch.rand(shape) > 0.4, -100)


def dense(student: Predictor, labels: Tensor, teacher: Predictor, alpha: float) -> Tensor:
    logits = student.head.logits(student.hidden, student.weight)
    soft = teacher.head.logits(teacher.hidden, teacher.weight).softmax(-1).detach()  # over the vocabulary, not the tokens
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view_as(labels)
    losses = (1 - alpha) * hard - alpha * (soft * logits.log_softmax(-1)).sum(-1)
    return torch.where(labels == -100, 0, losses)


@pytest.mark.parametrize("max_rows", [None, 20, 28])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_distilled_losses_are_softmaxes_over_the_vocabulary(alpha: float, max_rows: int | None) -> None:
    student, teacher, labels = predictor(0), predictor(1), labels_of()
    found = token_losses(student, labels, teacher=teacher, alpha=torch.tensor(alpha), max_rows=max_rows)
    expected = dense(student, labels, teacher, alpha)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.rand(labels.shape)
    gradients = torch.autograd.grad((weights * found).sum(), leaves(student), retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad((weights * expected).sum(), leaves(student)), atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="not have been used"):  # the teacher is a constant
        torch.autograd.grad(found.sum(), leaves(teacher))


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    student, labels = predictor(0), labels_of()
    expected = dense(student, labels, student, 0.0)
    for options in ({}, {"max_rows": 20}):
        torch.testing.assert_close(token_losses(student, labels, **options), expected)
    torch.testing.assert_close(mean_over_asked(expected, labels), expected[labels != -100].mean())
    nothing = torch.full_like(labels, -100)
    assert mean_over_asked(token_losses(student, nothing, teacher=student, max_rows=20), nothing) == 0


def test_the_bias_keeps_its_digits_in_half_precision() -> None:
    student, labels = predictor(0), labels_of()
    with torch.no_grad():
        student.head.bias.add_(20)  # of a bfloat16 the steps here are 1/8
        student = student._replace(weight=(0.01 * student.weight).requires_grad_())
    teacher = copy.deepcopy(student)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_losses(student, labels, teacher=teacher, alpha=0.5)
    torch.testing.assert_close(found, dense(student, labels, teacher, 0.5), atol=0.01, rtol=0)


def test_more_asked_tokens_than_rows_are_an_error() -> None:
    student, labels = predictor(0), labels_of()
    with pytest.raises(ValueError, match="max_rows: expected at least"):
        token_losses(student, labels, teacher=student, max_rows=3)
    assert asked_rows(torch.zeros(64, 25), 0.15) == 512 and asked_rows(torch.zeros(1, 25), 0.15) == 25


def test_no_tensor_of_unmasked_rows_times_vocabulary() -> None:
    shape, vocabulary = (64, 25), 3000
    student, teacher = (predictor(seed, shape, vocabulary) for seed in (0, 1))
    labels = torch.full(shape, -100)
    labels[:, 3:6] = 7  # 192 of 1600 tokens
    with Largest() as largest:
        token_losses(
            student, labels, teacher=teacher, alpha=0.4, max_rows=asked_rows(labels, 0.15), stash_bytes=0
        ).sum().backward()
    assert largest.elements < 192 * vocabulary / 4  # nor of the masked ones, without a stash
    with Largest() as largest:
        token_losses(student, labels, teacher=teacher, alpha=0.4, max_rows=asked_rows(labels, 0.15)).sum().backward()
    assert largest.elements <= 2 * asked_rows(labels, 0.15) * vocabulary < 1600 * vocabulary
