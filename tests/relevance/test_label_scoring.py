"""Label probabilities, tiers and the fit of b."""

import math

import pytest
import torch

from recis.errors import DataError
from relevance.evaluate import confusion, macro_f1
from relevance.scoring import (
    TIERS,
    TOLERANCE,
    cumpt,
    cumulative_label,
    fit_cumpt,
    label_ids,
    label_logits,
    label_probs,
    tier_of_label,
)

GOOD, MID, BAD = 2, 1, 0


def probs_of(*best_first):
    return torch.tensor([best_first[::-1]], dtype=torch.float64)


def test_softmax_over_four_tokens():
    """Invariant 10."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    torch.testing.assert_close(label_probs(logits), torch.tensor([[0.6095, 0.2242, 0.1360, 0.0303]]), atol=5e-4, rtol=0)
    torch.testing.assert_close(label_probs(logits + 50), label_probs(logits))


def test_logits_of_four_rows_equal_the_full_head():
    hidden, head = torch.randn(5, 8), torch.randn(30, 8)
    ids = (3, 7, 11, 29)
    full = hidden @ head.T
    torch.testing.assert_close(label_logits(hidden, head, ids), full[:, list(ids)])
    changed = head.clone()
    changed[[0, 1, 2, 4]] += 100.0  # no other token's logit matters
    assert torch.equal(label_logits(hidden, changed, ids), label_logits(hidden, head, ids))
    capped = label_logits(hidden, head, ids, softcap=2.0, scale=0.5)
    torch.testing.assert_close(capped, 2.0 * torch.tanh(full[:, list(ids)] * 0.5 / 2.0))


def test_the_prefill_score_is_the_first_token_restricted_to_the_labels():
    """Invariant 11."""
    logits = torch.randn(4, 30)
    first = logits.softmax(1)[:, [3, 7, 11, 29]]
    torch.testing.assert_close(label_probs(logits[:, [3, 7, 11, 29]]), first / first.sum(1, keepdim=True))


def test_label_ids():
    assert label_ids(lambda text: [ord(char) for char in text], "label:\n") == (49, 50, 51, 52)
    with pytest.raises(DataError, match="does not keep the label 1 as one token"):
        label_ids(lambda text: [hash(text[:-1]), ord(text[-1])], "label:\n")
    with pytest.raises(DataError, match="does not keep the label 1 as one token"):
        label_ids(
            lambda text: [len(part) for part in text.split("\n")], "label:\n"
        )  # joins the digit with nothing before it: no new token
    with pytest.raises(DataError, match="four distinct tokens"):
        label_ids(lambda text: [ord(char) if not char.isdigit() else 0 for char in text], "label:\n")


@pytest.mark.parametrize(
    ("best_first", "tiers"),
    [
        ((0.55, 0.20, 0.20, 0.05), {0.4: GOOD, 0.75: GOOD, 0.76: MID, 0.95: MID, 0.96: BAD}),
        ((0.30, 0.15, 0.45, 0.10), {0.4: GOOD, 0.5: MID, 0.95: BAD}),
        ((0.05, 0.10, 0.25, 0.60), {0.4: MID, 0.5: BAD}),
        ((0.7, 0.1, 0.1, 0.1), {0.9: MID}),
        ((0.40, 0.08, 0.05, 0.47), {0.5: MID}),
    ],
)
def test_tiers_by_hand(best_first, tiers):
    """Invariant 14."""
    for b, tier in tiers.items():
        assert cumpt(probs_of(*best_first), b).tolist() == [tier], b


def test_argmax_and_median_label_differ():
    probs = probs_of(0.40, 0.08, 0.05, 0.47)
    assert int(probs.argmax()) + 1 == 1
    assert cumulative_label(probs, 0.5).tolist() == [2]
    assert cumulative_label(probs, 1.0).tolist() == [1]
    assert cumulative_label(probs, 0.0).tolist() == [4]


def test_tier_properties():
    """Invariant 14: on 5,000 random P and 100 b, and 20,000 random pairs."""
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(5000, 4, generator=generator, dtype=torch.float64) ** 3
    probs /= probs.sum(1, keepdim=True)
    tiers = torch.stack([cumpt(probs, number / 99) for number in range(100)])
    assert bool((tiers.diff(dim=0) <= 0).all())  # never rises with b
    assert bool((tiers[0] == GOOD).all())
    assert bool((cumpt(probs, 1.0) == BAD)[probs[:, 0] > TOLERANCE].all())  # unless P1 = 0, as sums of floats can tell
    assert cumpt(probs_of(0.5, 0.3, 0.2, 0.0), 1.0).tolist() == [MID]
    first, second = (torch.rand(20000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = first / first.sum(1, keepdim=True), second / second.sum(1, keepdim=True)
    dominates = (first.flip(1).cumsum(1) >= second.flip(1).cumsum(1) - 1e-12).all(1)
    assert int(dominates.sum()) > 100
    for b in (0.3, 0.5, 0.9):
        assert bool((cumpt(first, b) >= cumpt(second, b))[dominates].all())
        enough = first[:, 3] >= b
        assert bool((cumpt(first, b)[enough] == GOOD).all())


def test_bad_arguments():
    with pytest.raises(ValueError, match="b must lie in"):
        cumpt(probs_of(1, 0, 0, 0), 1.5)
    with pytest.raises(ValueError, match=r"probs must be \[B, 4\]"):
        cumpt(torch.ones(4), 0.5)
    with pytest.raises(DataError, match="needs labelled pairs"):
        fit_cumpt(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def test_fit_takes_the_median_maximiser():
    # Good has P4 + P3 = .8, Mid has .5, Bad has P4 + P3 = .3 and P2 = .2: all right for .5 < b <= .8
    probs = torch.cat([probs_of(0.5, 0.3, 0.1, 0.1), probs_of(0.3, 0.2, 0.4, 0.1), probs_of(0.2, 0.1, 0.2, 0.5)])
    labels = torch.tensor([4, 2, 1])
    fit = fit_cumpt(probs, labels)
    assert fit.macro_f1 == 1.0
    best = [b for b, value in zip(fit.grid, fit.curve, strict=True) if value == 1.0]
    assert best == [round(0.51 + 0.01 * number, 2) for number in range(30)]
    assert fit.b == best[14] == 0.65
    assert len(fit.grid) == 91
    assert fit.grid[0] == 0.05
    assert fit.grid[-1] == 0.95
    for b, value in list(zip(fit.grid, fit.curve, strict=True))[::10]:
        counts = confusion(tier_of_label(labels).numpy(), cumpt(probs, b).numpy(), len(TIERS))
        assert math.isclose(value, macro_f1(counts).value)
