"""The rise of resident memory during a call: what it holds at once, and not what is freed before or was there already."""

import numpy as np

from recis.bench.peak_memory import peak_bytes

MIB = 2**20


def touch(mib: int) -> np.ndarray:
    return np.ones(mib * MIB, dtype=np.uint8)


def test_a_call_counts_what_it_holds_at_once():
    held = touch(64)  # there before: not counted
    once = peak_bytes(lambda: touch(96))
    one_after_the_other = peak_bytes(lambda: [touch(96).sum() for _ in range(3)])
    together = peak_bytes(lambda: (touch(96), touch(96)))
    assert 90 * MIB < once < 130 * MIB
    assert 90 * MIB < one_after_the_other < 150 * MIB
    assert 180 * MIB < together < 240 * MIB
    assert peak_bytes(lambda: held.sum()) < 16 * MIB
