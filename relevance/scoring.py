"""Label probabilities from the first completion position, and the tier that they give.

    P(c | x) = exp(z_c) / sum over the four label tokens exp(z_j)        prefill only, temperature 1

    CumPT: walk the labels from best to worst, stop at the first cumulative sum >= b
        P4 >= b or P4 + P3 >= b -> Good         P4 + P3 + P2 >= b -> Mid         else Bad

Source: TaoSR1 arXiv:2508.12365 as told by others; b is not published: the search of `fit_cumpt` and the tolerance are ours.
Tensors of labels put label 1 first: column c - 1 belongs to label c.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.errors import DataError
from relevance.evaluate import confusion, macro_f1
from relevance.labels import Label

TIERS = ("Bad", "Mid", "Good")
"""Tier names by number; larger is better."""
TOLERANCE = 1e-9
"""0.7 + 0.1 + 0.1 >= 0.9 is false in floats."""
NUM_LABELS = 4


def label_ids(encode: Callable[[str], Sequence[int]], prompt: str) -> tuple[int, int, int, int]:
    """Return the token ids of the labels 1 to 4 as they stand behind a prompt.

    Args:
        encode: text -> token ids, without added special tokens.
        prompt: a full prompt; it ends in a newline.

    Raises:
        DataError: with some digit the text is not the prompt's tokens and one more, or two digits share an id.
    """
    start = list(encode(prompt))
    ids = []
    for digit in map(str, map(int, Label)):
        whole = list(encode(prompt + digit))
        if whole[:-1] != start:
            raise DataError(
                f"the tokenizer does not keep the label {digit} as one token of its own behind the prompt",
                value=whole[len(start) - 1 :],
                option="use a tokenizer that splits digits, and a prompt that ends in a newline",
            )
        ids.append(whole[-1])
    if len(set(ids)) < NUM_LABELS:
        raise DataError(
            "the labels need four distinct tokens", value=ids, option="use a tokenizer with a token per digit"
        )
    return ids[0], ids[1], ids[2], ids[3]


def label_logits(
    hidden: Tensor, unembedding: Tensor, ids: Sequence[int], *, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Return the logits [B, 4] of the label tokens, fp32, from four rows of the unembedding: never [B, V].

    Args:
        hidden: [B, H], final hidden state of the last prompt token.
        unembedding: [V, H].
        ids: from `label_ids`.
        softcap: soft limit of the model's logits, cap * tanh(z / cap), or None.
        scale: factor of the model's logits.
    """
    rows = unembedding[torch.as_tensor(ids, device=unembedding.device)]
    logits = (hidden.float() @ rows.float().T) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def label_probs(logits: Tensor) -> Tensor:
    """Return P of the labels from their logits [.., 4]; a common shift changes nothing."""
    return torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def cumpt(probs: Tensor, b: float) -> Tensor:
    """Return the tier [B] (2 Good, 1 Mid, 0 Bad) of label probabilities [B, 4], label 1 first.

    Raises:
        ValueError: b outside [0, 1], or probs not [B, 4].
    """
    if not 0 <= b <= 1:
        raise ValueError(f"b must lie in [0, 1]; got {b}")
    if probs.ndim != 2 or probs.shape[1] != NUM_LABELS:
        raise ValueError(f"probs must be [B, 4]; got {tuple(probs.shape)}")
    walked = probs.to(torch.float64).flip(1).cumsum(1)  # P4, P4 + P3, P4 + P3 + P2, 1
    return (walked[:, 1] >= b - TOLERANCE).long() + (walked[:, 2] >= b - TOLERANCE).long()


def cumulative_label(probs: Tensor, b: float) -> Tensor:
    """Return the label [B] at which the walk from 4 down first reaches b; b = .5 gives the median label."""
    walked = probs.to(torch.float64).flip(1).cumsum(1)
    reached = walked >= b - TOLERANCE
    reached[:, -1] = True
    return NUM_LABELS - reached.to(torch.int64).argmax(1)


def tier_of_label(labels: Tensor) -> Tensor:
    """Return the tier of labels: 4 and 3 Good, 2 Mid, 1 Bad."""
    return (labels >= Label.RELATED).long() + (labels >= Label.MISMATCH).long()


@dataclass(frozen=True, slots=True, kw_only=True)
class CumptFit:
    """The fitted threshold and the curve it comes from."""

    b: float
    macro_f1: float
    grid: tuple[float, ...]
    curve: tuple[float, ...]
    """Three-tier macro-F1 per b of the grid."""


def fit_cumpt(probs: Tensor, labels: Tensor, *, low: float = 0.05, high: float = 0.95, step: float = 0.01) -> CumptFit:
    """Return the b that maximises three-tier macro-F1 on dev data: the median of the maximisers (the lower middle one).

    Args:
        probs: [N, 4], label 1 first.
        labels: [N] gold labels.

    Raises:
        DataError: no rows.
    """
    if not len(labels):
        raise DataError("fit_cumpt needs labelled pairs; got none")
    grid = [round(low + number * step, 10) for number in range(int((high - low) / step + 1e-6) + 1)]
    gold = tier_of_label(labels).numpy(force=True)
    curve = [macro_f1(confusion(gold, cumpt(probs, b).numpy(force=True), len(TIERS))).value for b in grid]
    best = np.flatnonzero(np.asarray(curve) >= max(curve) - 1e-12)
    chosen = int(best[(len(best) - 1) // 2])
    return CumptFit(b=grid[chosen], macro_f1=curve[chosen], grid=tuple(grid), curve=tuple(curve))
