"""Non-contiguous input of every tensor argument, for ops whose own files do not have it: equal to contiguous input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recis_kernels.dispatch import Impl
from recis_kernels.hash_index import HashIndex, erase, find, insert
from recis_kernels.hstu_attention import hstu_attention
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import bag_of_value, lengths_to_offsets, merge_offsets, offsets_to_lengths
from recis_kernels.jagged_runs import concat_bags, permute_bags, scatter_runs, split_bags
from recis_kernels.philox import table_key
from recis_kernels.ragged_truncate import take_runs
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_grads import PendingLookup, RowGrad, reduce_grads, row_square_sums
from recis_kernels.row_init import InitKind, InitSpec, admission_draws, init_rows, initial_values
from recis_kernels.row_rounding import round_stochastic
from recis_kernels.row_rules import ADAM
from recis_kernels.sparse_update import fused_update
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids, unique_ids_padded
from recis_kernels.vocab_lookup import lookup_strings, string_vocab

Place = Callable[[Tensor], Tensor]


def apart(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose neighbours in memory are other numbers."""
    spread = torch.stack((tensor, tensor.flip(0)), dim=-1)[..., 0]
    assert tensor.numel() < 2 or not spread.is_contiguous()
    return spread


def _hash_index(place: Place, impl: Impl) -> list[Tensor]:
    index = HashIndex()
    index.add_segment()
    index.add_segment()
    ids, segments = torch.arange(50) * 977 - 9000, torch.arange(50).to(torch.int32) % 2
    insert(index, place(ids), place(segments), place(torch.arange(50) + 7), impl=impl)
    freed = erase(index, place(ids[:20]), place(segments[:20]), impl=impl)
    return [freed, find(index, place(ids), place(segments), impl=impl), *index.export(0), *index.export(1)]


def _row_allocator(place: Place, impl: Impl) -> list[Tensor]:
    index, allocator = HashIndex(), RowAllocator(40)
    index.add_segment()
    index.add_segment()
    ids, segments = torch.arange(60) * 977 % 31, torch.arange(60).to(torch.int32) % 2
    rows, is_new = find_or_insert_rows(index, place(ids), place(segments), allocator, impl=impl)
    allocator.release(place(erase(index, ids[:9], segments[:9], impl=impl)))
    return [rows, is_new, allocator.state, allocator.free[:5]]


def _unique_ids(place: Place, impl: Impl) -> list[Tensor]:
    ids, segments = torch.arange(60) * 977 % 31, torch.arange(60) % 2
    found, padded = unique_ids(place(ids), place(segments), impl=impl), unique_ids_padded(place(ids), impl=impl)
    by_feature = unique_ids(place(ids), place(torch.tensor([1, 0])), place(torch.tensor([0, 40, 60])), impl=impl)
    out = [value for one in (found, padded, by_feature) for value in (one.ids, one.segments, one.inverse, one.counts)]
    if impl == "numba":
        out.append(order_by_segment_and_id(place(ids), place(segments.int()), 2, impl=impl))
    return out


def _row_init(place: Place, impl: Impl) -> list[Tensor]:
    blocks = RowBlocks(RowLayout(5, state=(("m", 5),)), shift=3)
    blocks.grow(30)
    keys, tables = torch.tensor([table_key(1, name) for name in "abc"]), torch.arange(12) % 3
    ids, rows = torch.arange(12) * 977 - 3, torch.arange(12) * 2 - 1
    spec = InitSpec(InitKind.UNIFORM, -1.0, 2.0)
    init_rows(blocks, place(rows), place(ids), place(keys), spec, tables=place(tables), step=4, impl=impl)
    values = initial_values(place(ids), 7, place(keys), spec, tables=place(tables), impl=impl)
    draws = admission_draws(place(ids), place(keys), 3, tables=place(tables.int()), impl=impl)
    return [*blocks.read(torch.arange(32)).values(), values, draws]


def _rounding(place: Place, impl: Impl) -> list[Tensor]:
    keys = torch.tensor([table_key(seed, "a") for seed in range(6)])
    values = torch.linspace(-3, 3, 54).view(6, 9)
    own: Impl = "torch" if impl == "numba" else impl
    return [round_stochastic(place(values), place(torch.arange(6) - 2), place(keys), 5, impl=own)]


def _lookup(place: Place, dim: int) -> PendingLookup:
    offsets = lengths_to_offsets(torch.tensor([3, 0, 5, 1, 4, 2]))
    inverse = torch.arange(15) * 7 % 6 - 1
    grad, factors = torch.linspace(-1, 1, 6 * dim).view(6, dim), torch.linspace(0.5, 2, 15)
    view = RowGrad(place(inverse), place(offsets), 3, factors=place(factors), grad=place(grad))
    rows, counts = torch.tensor([9, 2, -1, 0, 5]), torch.arange(5).to(torch.int32)
    return PendingLookup(place(rows), place(counts % 2), place(counts), [view])


def _row_grads(place: Place, impl: Impl) -> list[Tensor]:
    lookup = _lookup(place, 5)
    return [reduce_grads(lookup.views, 5, 5, impl=impl), row_square_sums(lookup, 5, impl=impl)]


def _sparse_update(place: Place, impl: Impl) -> list[Tensor]:
    blocks = RowBlocks(RowLayout(5, torch.bfloat16, (("m", 5), ("v", 5))), shift=2)
    blocks.grow(12)
    blocks.write(torch.arange(12), {"weight": torch.linspace(-1, 1, 60).view(12, 5).bfloat16()})
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "step": 3.0}
    line = torch.tensor([[numbers.get(name, 0.5) for name in ADAM.scalars]] * 2, dtype=torch.float64)
    line[1] *= 0.5
    keys = torch.tensor([table_key(1, "a"), table_key(1, "b")])
    _, bad = fused_update(blocks, [_lookup(place, 5)], ADAM, place(line), step=6, keys=place(keys), impl=impl)
    return [*blocks.read(torch.arange(12)).values(), bad]


def _jagged(place: Place, impl: Impl) -> list[Tensor]:
    lengths, other = torch.tensor([3, 0, 4]), torch.tensor([1, 2, 0])
    offsets, more_offsets = lengths_to_offsets(place(lengths)), lengths_to_offsets(place(other.int()))
    values, more = torch.arange(14.0).view(7, 2), -torch.arange(6.0).view(3, 2)
    joined, ends = concat_bags(place(values), place(offsets), place(more), place(more_offsets), impl=impl)
    return [
        *(offsets, more_offsets, joined, ends, offsets_to_lengths(place(offsets))),
        merge_offsets([place(offsets), place(offsets)]),
        bag_of_value(place(offsets), 7, impl=impl),
        *split_bags(place(joined), place(offsets), place(more_offsets), 7, impl=impl),
        *permute_bags(place(values), place(offsets), place(torch.tensor([2, 0, 1])), impl=impl),
        scatter_runs(place(values), place(torch.tensor([1, 5, 6])), place(offsets), 12, impl=impl),
        take_runs(place(values), place(torch.tensor([1, 4])), place(torch.tensor([2, 1])), 3, impl=impl),
    ]


def _strings(place: Place, impl: Impl) -> list[Tensor]:
    data, offsets = torch.tensor(list(b"abcdbcxa"), dtype=torch.uint8), torch.tensor([0, 1, 4, 6, 8])
    vocab = string_vocab(place(data[:6]), place(offsets[:4]))
    found = lookup_strings(place(data), place(offsets), (0, 4), [vocab], impl=impl)
    return [found, id_mod(place(torch.arange(9) - 4), (0, 4, 9), [7, 2**40], impl=impl)]


def _hstu(place: Place, impl: Impl) -> list[Tensor]:
    torch.manual_seed(4)
    rows = [place(torch.randn(9, 2, 4)).requires_grad_() for _ in range(3)]
    position, targets = place(torch.randn(2, 5)).requires_grad_(), place(torch.tensor([1, 0, 2]))
    offsets = place(lengths_to_offsets(torch.tensor([4, 0, 5])))
    query, key, value = rows
    out = hstu_attention(query, key, value, offsets, num_targets=targets, position_bias=position, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (*rows, position), place(torch.randn(out.shape)))]


CASES = {
    "hash_index": _hash_index,
    "row_allocator": _row_allocator,
    "unique_ids": _unique_ids,
    "row_init": _row_init,
    "row_rounding": _rounding,
    "row_grads": _row_grads,
    "sparse_update": _sparse_update,
    "jagged": _jagged,
    "strings and id_mod": _strings,
    "hstu_attention": _hstu,
}


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_strided_input_gives_what_contiguous_input_gives(name, impl):
    want, got = CASES[name](torch.Tensor.contiguous, impl), CASES[name](apart, impl)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if name == "hstu_attention" else 0)
