"""Losses are sums over the positions with a label."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codex_accel.loss import sum_of_losses, token_scores
from codex_accel.packing import IGNORE


@pytest.fixture
def batch():
    """Logits (2, 5, 7) and labels with some left out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 3:] = IGNORE
    return logits, labels


def by_hand(logits, labels) -> float:
    """- log softmax(logits)[label], summed in Python floats."""
    total = 0.0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target != IGNORE:
                total += math.log(sum(map(math.exp, scores))) - scores[target]
    return total


def test_sum_is_over_the_positions_with_a_label(batch):
    assert sum_of_losses(*batch).item() == pytest.approx(by_hand(*batch), rel=1e-6)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss = sum_of_losses(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.long))
    assert loss.item() == pytest.approx(6 * math.log(50))


def test_no_target_costs_nothing_and_has_no_gradient(batch):
    logits = batch[0].requires_grad_()
    loss = sum_of_losses(logits, torch.full((2, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, labels = batch
    half = logits.bfloat16()
    assert sum_of_losses(half, labels).dtype == torch.float32
    assert sum_of_losses(half, labels).item() == pytest.approx(by_hand(half.float(), labels), rel=1e-6)


def test_scores_of_tokens_add_up_to_the_sum(batch):
    nll, correct = token_scores(*batch)
    assert nll.sum().item() == pytest.approx(sum_of_losses(*batch).item(), rel=1e-6)
    assert (nll.dtype, correct.dtype, correct.shape) == (torch.float32, torch.bool, (2, 5))


def test_position_without_a_label_scores_nothing(batch):
    logits, labels = batch
    nll, correct = token_scores(logits, labels)
    assert (nll[labels == IGNORE] == 0).all()
    assert not correct[labels == IGNORE].any()


@given(targets=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_token_is_correct_if_it_has_the_largest_logit(targets, seed):
    logits = torch.randn(1, len(targets), 5, generator=torch.Generator().manual_seed(seed))
    _, correct = token_scores(logits, torch.tensor([targets]))
    expected = [max(range(5), key=row.__getitem__) == t for row, t in zip(logits[0].tolist(), targets, strict=True)]
    assert correct[0].tolist() == expected
