"""Count pairs of a positive and a negative row that are ranked right: the loops under ExactAuc and Gauc.

    wins = sum over pairs (+, -) of w+ w- (1 if score+ > score-, 1/2 if equal);   AUC = wins / (W+ W-)

Rows come sorted by (group, score, signed weight), where the sign of the weight is the label, so one pass with the running
negative weight counts all pairs. The pass adds in row order, in float64: cutting it anywhere and going on later gives the
same bits.

Sorting dominates. Unweighted rows whose scores are float32 numbers - all a model gives - fit one word, `group 31 bits |
score 32 | label 1`, and numpy's vectorised sort of words is some ten times faster than sorting three columns; each thread takes
a share of the groups.
"""

from itertools import pairwise

import numpy as np

from recis_kernels.dispatch import njit
from recis_kernels.threads import num_threads, run_parts, split

_MIN_SPLIT_ROWS = 65536

NUM_CARRY = (
    6  # open tie's score, its positive weight, its negative weight, negative weight below, positive weight, wins
)


def new_carry() -> np.ndarray:
    """Return the state of a pass before its first row."""
    carry = np.zeros(NUM_CARRY)
    carry[0] = np.nan  # equal to no score
    return carry


@njit
def fold_rows(scores, signed, first, last, carry):
    """Continue a pass over one group's rows first..last - 1, sorted by (score, signed weight)."""
    tie, positive, negative, below, total, wins = carry[0], carry[1], carry[2], carry[3], carry[4], carry[5]
    for i in range(first, last):
        if scores[i] != tie:
            wins += positive * (below + 0.5 * negative)
            below += negative
            total += positive
            positive, negative, tie = 0.0, 0.0, scores[i]
        if signed[i] > 0:
            positive += signed[i]
        else:
            negative -= signed[i]
    carry[0], carry[1], carry[2], carry[3], carry[4], carry[5] = tie, positive, negative, below, total, wins


@njit
def fold_groups(groups, scores, signed, carry, open_group, out_groups, out):
    """Continue a pass over many groups; write (positive, negative, wins) of each group that ends into `out` [G, 3].

    open_group [2] holds (the group the last row belonged to, whether there is one). Returns the number of groups ended.
    """
    ended = 0
    first = 0
    num_rows = groups.size
    while first < num_rows:
        last = first + 1
        while last < num_rows and groups[last] == groups[first]:
            last += 1
        if open_group[1] and open_group[0] != groups[first]:
            _close(carry, out, ended)
            out_groups[ended] = open_group[0]
            ended += 1
        open_group[0], open_group[1] = groups[first], 1
        fold_rows(scores, signed, first, last, carry)
        first = last
    return ended


@njit
def _close(carry, out, row):
    """Write (positive weight, negative weight, wins) of a finished pass and reset it."""
    out[row, 0] = carry[4] + carry[1]
    out[row, 1] = carry[3] + carry[2]
    out[row, 2] = carry[5] + carry[1] * (carry[3] + 0.5 * carry[2])
    carry[0] = np.nan
    carry[1:] = 0.0


def close_pass(carry: np.ndarray) -> np.ndarray:
    """Return (positive weight, negative weight, wins), float64 [3], of a finished pass and reset it."""
    out = np.empty((1, 3))
    _close(carry, out, 0)
    return out[0]


def auc_of(counts: np.ndarray) -> np.ndarray:
    """Return AUC [G] of counts [G, 3]; NaN where a group has one class only."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[:, 2] / (counts[:, 0] * counts[:, 1])


def packed_counts(
    groups: np.ndarray | None, scores: np.ndarray, signed: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (groups [G], counts [G, 3]) by sorting words, or None when the rows do not fit words.

    Args:
        groups: [N] int64; None = all rows are one group, 0.
        scores: [N] float64, no NaN, no -0.0.
        signed: [N] float64, the sign is the label.
    """
    if groups is None:
        index, ids = np.zeros(scores.size, np.int32), np.zeros(1, np.int64)
    else:
        index, ids = dense_groups(groups)
    counts = np.zeros((len(ids), 3))
    num_parts = num_threads() if scores.size >= _MIN_SPLIT_ROWS else 1
    bounds = [len(ids) * part // num_parts for part in range(num_parts + 1)]
    misfits: list[int] = []

    def count(first: int, last: int) -> None:
        words = np.empty(scores.size, np.uint64)
        used = _pack(index, scores, signed, first, last, words)
        if used < 0:
            misfits.append(first)
            return
        words = words[:used]
        words.sort()
        _fold_words(words, counts)

    run_parts(count, list(pairwise(bounds)))
    return None if misfits else (ids, counts)


def dense_groups(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (index [N] int32 of each row's group, ids [G] int64, each once, in some order) of groups [N]."""
    index = np.empty(groups.size, np.int32)
    parts = split(groups.size, min_items=_MIN_SPLIT_ROWS)
    found: list[np.ndarray] = [np.empty(0, np.int64)] * len(parts)

    def number_part(first: int, last: int) -> None:
        found[parts.index((first, last))] = _number_groups(groups[first:last], index[first:last])

    run_parts(number_part, parts)
    ids = found[0]
    for (first, last), more in zip(parts[1:], found[1:], strict=True):  # later parts get the numbers of the joined list
        number = np.empty(ids.size + more.size, np.int32)
        ids = _number_groups(np.concatenate([ids, more]), number)
        index[first:last] = number[number.size - more.size :][index[first:last]]
    return index, ids


def _number_groups(groups: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Write each row's group number, in order of first sight, and return the groups."""
    bits = min(17, max(4, groups.size.bit_length()))  # most data has few groups: start in the cache, grow on demand
    ids = np.empty(groups.size, np.int64)
    row = count = 0
    while row < groups.size:
        keys, numbers = _fill_slots(ids, count, bits)
        row, count = _number_rows(groups, row, index, ids, count, keys, numbers, bits)
        bits += 2
    return ids[:count].copy()


@njit
def _number_rows(groups, row, index, ids, count, keys, numbers, bits):
    """Number rows from `row` on until all are done or the table is half full; return (next row, groups)."""
    mask = numbers.size - 1
    limit = numbers.size // 2
    for i in range(row, groups.size):
        group = groups[i]
        slot = _home(group, bits)
        while True:
            number = numbers[slot]
            if number < 0:
                if count == limit:
                    return i, count
                number = np.int32(count)
                keys[slot], numbers[slot], ids[count] = group, number, group
                count += 1
                break
            if keys[slot] == group:
                break
            slot = (slot + 1) & mask
        index[i] = number
    return groups.size, count


@njit
def _fill_slots(ids, count, bits):
    """Return the table of the first `count` groups: open addressing by linear probing, number -1 = free."""
    size = np.int64(1) << bits
    keys, numbers = np.empty(size, np.int64), np.full(size, np.int32(-1), np.int32)
    for number in range(count):
        slot = _home(ids[number], bits)
        while numbers[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        keys[slot], numbers[slot] = ids[number], number
    return keys, numbers


@njit
def _home(group, bits):
    return np.int64((np.uint64(group) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))


@njit
def _pack(index, scores, signed, first, last, words):
    """Write the words of rows in groups first..last - 1; return how many, or -1 when some row does not fit a word."""
    used = 0
    misfit = False
    for i in range(scores.size):
        narrow = np.float32(scores[i])
        weight = signed[i]
        misfit |= (np.float64(narrow) != scores[i]) | (abs(weight) != 1.0)  # an early return would cost half the speed
        group = np.int64(index[i])
        bits = narrow.view(np.int32)
        # as unsigned numbers these order like the floats: flip all bits of negatives, only the sign of the others
        order = np.uint64(np.uint32(bits ^ ((bits >> 31) | np.int32(-0x80000000))))
        words[used] = (np.uint64(group) << np.uint64(33)) | (order << np.uint64(1)) | np.uint64(weight > 0)
        used += np.int64(first <= group) & np.int64(group < last)  # no branch to guess wrong
    return -1 if misfit else used


@njit
def _fold_words(words, counts):
    """Write each group's (positive, negative, wins) into its row of counts; words are sorted.

    Tied negatives sort before tied positives, so at a positive row all of them are counted: 2 per negative so far, less
    1 per tied one, is twice its wins. Whole numbers throughout.
    """
    one = np.uint64(1)
    first = 0
    while first < words.size:
        group = words[first] >> np.uint64(33)
        last = first + 1
        while last < words.size and words[last] >> np.uint64(33) == group:
            last += 1
        tie = ~words[first] >> one
        negative, tied_negative, twice_wins = np.int64(0), np.int64(0), np.int64(0)
        for i in range(first, last):
            positive = np.int64(words[i] & one)
            if words[i] >> one != tie:
                tie = words[i] >> one
                tied_negative = 0
            twice_wins += positive * (2 * negative - tied_negative)
            tied_negative += 1 - positive
            negative += 1 - positive
        counts[group, 0], counts[group, 1], counts[group, 2] = last - first - negative, negative, 0.5 * twice_wins
        first = last
