"""Score many pairs once each: distinct pairs, longest first, in batches, within a time, around pairs that fail.

A batch that fails is cut in halves until the failing pair stands alone; the others of the batch get their logits. What is
not started when the time is over is LATE. A batch that is under way is finished, and its logits count.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from recis.ebrm.scorer import Pair, QEScorer

DONE, FAILED, LATE = 0, 1, 2
TIMED_BATCH_PAIRS = 32  # with a time limit batches are small, so that little is begun that ends late
_LOG = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Logits [P] float32 (0 where not DONE), state [P] int8, and how many pairs the scorer really scored."""

    logits: np.ndarray
    state: np.ndarray
    calls: int


@torch.inference_mode()
def encode(
    scorer: QEScorer,
    pairs: Sequence[Pair],
    *,
    batch_pairs: int,
    timeout_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Encoded:
    """Score distinct pairs in evaluation mode; the scorer's mode is as before afterwards."""
    logits, state = np.zeros(len(pairs), np.float32), np.full(len(pairs), LATE, np.int8)
    deadline = None if timeout_s is None else clock() + timeout_s
    step = batch_pairs if deadline is None else min(batch_pairs, TIMED_BATCH_PAIRS)
    order, calls = scorer.longest_first(pairs), 0
    was_training = scorer.training
    scorer.eval()
    try:
        for first in range(0, len(order), step):
            if deadline is not None and clock() >= deadline:
                break
            calls += _score(scorer, pairs, order[first : first + step], logits, state)
    finally:
        scorer.train(was_training)
    return Encoded(logits, state, calls)


def _score(scorer: QEScorer, pairs: Sequence[Pair], places: list[int], logits: np.ndarray, state: np.ndarray) -> int:
    """Score the pairs at some places; return how many got a logit."""
    try:
        scored = scorer([pairs[place] for place in places])
    except RuntimeError as error:  # out of memory, a length the encoder refuses: this batch's fault, not the caller's
        if len(places) > 1:
            middle = len(places) // 2
            halves = (places[:middle], places[middle:])
            return sum(_score(scorer, pairs, half, logits, state) for half in halves)
        state[places[0]] = FAILED
        _LOG.warning("the encoder failed on query %r, entity %r: %s", *pairs[places[0]], error)
        return 0
    logits[places] = scored.cpu().numpy()
    state[places] = DONE
    return len(places)
