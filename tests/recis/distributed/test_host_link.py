"""The exchange through shared memory against the exchange it replaces."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks

from recis.distributed import host_link
from recis.distributed.host_link import HostLink, connect

DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.uint8)


@settings(max_examples=20, deadline=None)
@given(world_size=st.integers(2, 4), seed=st.integers(0, 10_000))
def test_many_exchanges_in_a_row(world_size, seed):
    """Sizes that grow and shrink, empty parts, any type: every rank gets what the others had for it."""
    generator = torch.Generator().manual_seed(seed)
    rounds = 6
    sizes = torch.randint(0, 40, (rounds, world_size, world_size), generator=generator)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.3] = 0
    sizes[rounds - 2] *= 2000  # grows the outboxes; the last round is small again
    widths = torch.randint(1, 9, (rounds,), generator=generator).tolist()

    def work(ranks):
        link = HostLink(ranks, [os.getpid()] * world_size)
        for number in range(rounds):
            send, receive = sizes[number, ranks.rank].tolist(), sizes[number, :, ranks.rank].tolist()
            dtype = DTYPES[(number + seed) % len(DTYPES)]
            made = torch.Generator().manual_seed(seed + 100 * number + ranks.rank)
            rows = torch.randint(0, 100, (sum(send), widths[number]), generator=made).to(dtype)
            rows = rows[:, 0].contiguous() if widths[number] == 1 else rows
            got = link.all_to_all(rows, send, receive, f"round {number}")
            want = ranks.all_to_all(rows, send, receive, f"round {number}")
            assert got.dtype == want.dtype
            assert torch.equal(got, want), number

    on_ranks(world_size, work)


def test_ranks_that_cannot_see_each_other_use_sockets(monkeypatch):
    assert all(isinstance(link, HostLink) for link in on_ranks(2, connect))
    monkeypatch.setattr(host_link, "_reads", lambda pid, descriptor: False)
    assert on_ranks(2, connect) == [None, None]


def test_a_probe_of_another_process_is_not_taken_for_ours():
    descriptor = host_link._probe()
    try:
        assert host_link._reads(os.getpid(), descriptor)
        assert not host_link._reads(os.getppid(), descriptor)
        assert not host_link._reads(os.getpid(), -1)
    finally:
        os.close(descriptor)


def test_nothing_is_left_behind():
    before = len(list(Path("/proc/self/fd").iterdir()))

    def work(ranks):
        link = HostLink(ranks, [os.getpid()] * 2)
        for number in range(5):  # each round needs twice the memory of the one before: four boxes are replaced
            rows = torch.zeros(2 ** (18 + number), 4, dtype=torch.uint8)
            link.all_to_all(rows, [rows.shape[0] // 2] * 2, [rows.shape[0] // 2] * 2, "rows")
        return [box.descriptor for box in link._boxes]

    for descriptor in sum(on_ranks(2, work), []):  # noqa: RUF017  four numbers
        os.close(descriptor)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("world_size", [2, 3])
def test_by_hand(world_size):
    """Rank r sends 10 r + d to rank d."""

    def work(ranks):
        link = HostLink(ranks, [os.getpid()] * world_size)
        rows = torch.tensor([[10 * ranks.rank + other] for other in range(world_size)])
        return link.all_to_all(rows, [1] * world_size, [1] * world_size, "rows").flatten().tolist()

    assert on_ranks(world_size, work) == [[10 * source + d for source in range(world_size)] for d in range(world_size)]


def test_parts_of_one_value_or_none():
    """Such a tensor may have any stride, which `Tensor.view(dtype)` refuses; numpy makes some."""

    def work(ranks):
        link = HostLink(ranks, [os.getpid()] * 2)
        none = torch.from_numpy(np.zeros((0,), np.int64)).as_strided((0,), (0,))
        one = torch.ones(1).long().as_strided((1,), (0,))
        return [
            link.all_to_all(none, [0, 0], [0, 0], "none").tolist(),
            link.all_to_all(one, [0, 1], [ranks.rank, ranks.rank], "one").tolist(),
        ]

    assert on_ranks(2, work) == [[[], []], [[], [1, 1]]]
