"""RowGradBuffer as a state machine against sums by hand; reductions over ranks (A34)."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from recis.optim import RowGradBuffer, mean_over_contributors, sum_over_ranks

DIM = 3


class BufferMachine(RuleBasedStateMachine):
    """The model keeps one fp32 left fold per row."""

    def __init__(self):
        super().__init__()
        self.buffer = RowGradBuffer()
        self.sums: dict[int, torch.Tensor] = {}
        self.used = False

    @rule(rows=st.lists(st.integers(-1, 5), max_size=6), seed=st.integers(0, 99))
    def add(self, rows, seed):
        grads = torch.randn(len(rows), DIM, generator=torch.Generator().manual_seed(seed))
        self.buffer.add(torch.tensor(rows, dtype=torch.int64), grads)
        for row, grad in zip(rows, grads.clone(), strict=True):
            if row >= 0:
                self.sums[row] = self.sums[row] + grad if row in self.sums else grad
        grads.fill_(float("nan"))  # what was added is the buffer's own
        self.used = True

    @rule(scale=st.sampled_from([1.0, 0.5, 3.0]))
    def drain(self, scale):
        if not self.used:
            with pytest.raises(ValueError, match="nothing was added"):
                self.buffer.drain(scale)
            return
        rows, sums = self.buffer.drain(scale)
        assert rows.tolist() == sorted(self.sums)
        assert sums.shape == (len(self.sums), DIM)
        for row, total in zip(rows.tolist(), sums, strict=True):
            assert torch.equal(total, self.sums[row] * scale)
        self.sums, self.used = {}, False

    @invariant()
    def width_is_kept(self):
        if self.used:
            with pytest.raises(ValueError, match="as before"):
                self.buffer.add(torch.tensor([0]), torch.zeros(1, DIM + 1))


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize(
    ("rows", "grads"),
    [(torch.zeros(2), torch.zeros(2, 3)), (torch.tensor([1]), torch.zeros(2, 3)), (torch.tensor([1]), torch.zeros(1))],
)
def test_wrong_shapes_are_named(rows, grads):
    with pytest.raises(ValueError, match="rows must be int64"):
        RowGradBuffer().add(rows, grads)


def test_reduction_over_ranks():
    """A34: W = 3 ranks; row 4 on two of them, row 9 on one."""
    parts = [
        (torch.tensor([4, 9]), torch.tensor([[3.0], [6.0]])),
        (torch.tensor([4]), torch.tensor([[9.0]])),
        (torch.empty(0, dtype=torch.int64), torch.empty(0, 1)),
    ]
    rows, sums = sum_over_ranks(parts)
    assert rows.tolist() == [4, 9]
    assert sums.tolist() == [[4.0], [2.0]]
    rows, means = mean_over_contributors(parts)
    assert rows.tolist() == [4, 9]
    assert means.tolist() == [[6.0], [6.0]]
