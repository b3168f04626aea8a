"""Sums of dense gradients over parts: the order is stated, so the bits are too."""

import torch
from thread_ranks import on_ranks
from torch import nn

from recis.distributed.dense import OrderedGradients, share_parameters
from recis.distributed.ranks import Ranks

# added from first to last: (1e8 + 1) - 1e8 is 0 in float32, then + 3; other orders give 1 or 4
GRADS = [1e8, 1.0, -1e8, 3.0]


def summed(ranks: Ranks, grads: list[float]) -> list[float | None]:
    """Return the gradients of three parameters after a step of len(grads) parts; the third is never reached."""
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2))]
    gradients = OrderedGradients(parameters, ranks)
    for part in range(ranks.rank, len(grads), ranks.world_size):
        parameters[0].grad = torch.tensor([grads[part], 1.0, float(part)])
        if part == 1:
            parameters[1].grad = torch.tensor(7.0)
        gradients.take()
        assert parameters[0].grad is None
    gradients.sum_up(ranks.largest(gradients.reached.double(), "reached") > 0)
    assert parameters[2].grad is None
    assert parameters[0].grad is not None
    assert parameters[1].grad is not None
    return [*parameters[0].grad.tolist(), float(parameters[1].grad)]


def test_parts_are_added_in_ascending_order_at_any_world_size():
    want = [3.0, 4.0, 6.0, 7.0]
    for world_size in (1, 2, 4):
        assert on_ranks(world_size, lambda ranks: summed(ranks, GRADS)) == [want] * world_size


def test_a_second_step_starts_from_nothing():
    parameter = nn.Parameter(torch.zeros(2))
    gradients = OrderedGradients([parameter], Ranks())
    for value in (1.0, 2.0):
        parameter.grad = torch.full((2,), value)
        gradients.take()
        gradients.sum_up(gradients.reached)
        assert parameter.grad.tolist() == [value, value]
        assert not bool(gradients.reached.any())


def test_all_ranks_start_from_the_weights_of_rank_0():
    def work(ranks):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(ranks.rank + 1)
        share_parameters(model, ranks)
        return [float(tensor.sum()) for tensor in (*model.parameters(), *model.buffers())]

    first, second = on_ranks(2, work)
    assert first == second
    assert first[0] == 4.0
