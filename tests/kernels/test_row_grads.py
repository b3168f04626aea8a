"""Sums of duplicate gradients: the fold order bit for bit, views of every kind, merging of lookups."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis_kernels import checks
from recis_kernels.grad_lists import list_grads
from recis_kernels.row_grads import (
    PendingLookup,
    RowGrad,
    merge_lookups,
    reduce_grads,
    reduce_lookups,
    row_square_sums,
)


def offsets_of(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def random_view(num_features, stride, num_rows, dim, *, per_position=False, factors=False, longest=5, micro_batch=0):
    offsets = offsets_of(torch.randint(0, longest + 1, (num_features * stride,)).tolist())
    num_positions = int(offsets[-1])
    return RowGrad(
        inverse=torch.randint(-1, num_rows, (num_positions,), dtype=torch.int32),
        offsets=offsets,
        stride=stride,
        factors=torch.rand(num_positions) if factors else None,
        per_position=per_position,
        micro_batch=micro_batch,
        grad=torch.randn(num_positions if per_position else num_features * stride, dim),
    )


def folded(views, num_rows, dim):
    """Left fold in ascending (micro-batch, sample, feature, position), one contribution at a time in fp32."""
    contributions = []
    for number, view in enumerate(views):
        for bag in range(view.offsets.numel() - 1):
            for p in range(int(view.offsets[bag]), int(view.offsets[bag + 1])):
                if view.inverse[p] >= 0:
                    factor = torch.tensor(1.0) if view.factors is None else view.factors[p]
                    key = (view.micro_batch, bag % view.stride, number, bag // view.stride, p)
                    contributions.append(
                        (key, int(view.inverse[p]), factor * view.grad[p if view.per_position else bag])
                    )
    sums: dict[int, torch.Tensor] = {}
    for _, u, term in sorted(contributions, key=lambda item: item[0]):
        sums[u] = sums[u] + term if u in sums else term
    return torch.stack([sums.get(u, torch.zeros(dim)) for u in range(num_rows)])


@pytest.mark.parametrize("per_position", [False, True], ids=["pooled", "per_position"])
@pytest.mark.parametrize("factors", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dim", [1, 7, 16, 33])
@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_sums_have_the_stated_order(impl, dim, factors, per_position):
    view = random_view(3, 11, 9, dim, per_position=per_position, factors=factors)
    got = reduce_grads([view], 9, dim, impl=impl)
    assert torch.equal(got, folded([view], 9, dim))
    torch.testing.assert_close(got, reduce_grads([view], 9, dim, impl="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(num_threads):
    view = random_view(2, 4000, 50, 8, longest=12)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = reduce_grads([view], 50, 8)
    torch.set_num_threads(num_threads)
    got = reduce_grads([view], 50, 8)
    torch.set_num_threads(before)
    assert torch.equal(got, want)


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dim", [3, 64, 513], ids="D{}".format)
def test_triton_gives_the_bits_of_numba(dim, wide):
    """Views of two micro-batches, several of equal stride, pooled and not, one weighted, one unused, one from position 5 on."""
    views = [
        random_view(2, 5, 9, dim, factors=True, micro_batch=1),
        random_view(1, 5, 9, dim, per_position=True, micro_batch=1, longest=12),
        random_view(2, 3, 9, dim, micro_batch=0),
        random_view(1, 5, 9, dim, micro_batch=1),
        replace(random_view(1, 5, 9, dim), grad=None),
    ]
    skipped = random_view(2, 5, 9, dim, micro_batch=2, longest=9)
    views.append(replace(skipped, offsets=(skipped.offsets - 3).clamp(min=2)))
    views = [replace(view, inverse=view.inverse.to(wide)) for view in views]
    want = reduce_grads(views, 11, dim, impl="numba")
    assert torch.equal(reduce_grads(views, 11, dim, impl="triton"), want)
    lookup = PendingLookup(
        torch.arange(11) - 1, torch.zeros(11, dtype=torch.int32), torch.ones(11, dtype=torch.int32), views
    )
    squares = row_square_sums(lookup, dim, impl="numba")
    assert squares[0] == 0
    assert torch.equal(row_square_sums(lookup, dim, impl="triton"), squares)
    reduced = [reduce_lookups([lookup], dim, impl=impl).views[0] for impl in ("numba", "triton")]
    assert torch.equal(reduced[0].inverse, reduced[1].inverse)
    assert reduced[0].grad is not None
    assert reduced[1].grad is not None
    assert torch.equal(reduced[0].grad, reduced[1].grad)


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_views_of_one_micro_batch_are_interleaved_by_sample(impl):
    """Sample 0: features a, b; sample 1: features a, b. A view per feature gives the order of one view of both."""
    grad = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    both = RowGrad(torch.zeros(4, dtype=torch.int64), torch.arange(5), 2, grad=grad)
    assert reduce_grads([both], 1, 1, impl=impl).item() == 2.0  # 1e8 - 1e8 + 1 + 1; feature after feature would give 1
    first = replace(both, inverse=both.inverse[:2], offsets=torch.arange(3), grad=grad[:2])
    second = replace(both, inverse=both.inverse[2:], offsets=torch.arange(3), grad=grad[2:])
    assert reduce_grads([first, second], 1, 1, impl=impl).item() == 2.0
    later = replace(second, micro_batch=1)
    assert reduce_grads([first, later], 1, 1, impl=impl).item() == 1.0  # 1e8 + 1 = 1e8 in fp32


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_splitting_a_batch_changes_no_bit(data):
    """B19: one batch of B samples against the same samples in micro-batches, for several features and any cut."""
    stride = data.draw(st.integers(1, 6))
    num_features = data.draw(st.integers(1, 3))
    lengths = data.draw(
        st.lists(st.integers(0, 3), min_size=stride * num_features, max_size=stride * num_features), label="lengths"
    )
    dim, num_rows = 3, 4
    offsets = offsets_of(lengths)
    inverse = torch.tensor(
        data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=sum(lengths), max_size=sum(lengths))),
        dtype=torch.int64,
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    grad = torch.randn(num_features * stride, dim, generator=generator)
    whole = RowGrad(inverse, offsets, stride, grad=grad)
    cut = data.draw(st.integers(0, stride))
    parts = []
    for micro_batch, (low, high) in enumerate([(0, cut), (cut, stride)]):
        bags = [f * stride + b for f in range(num_features) for b in range(low, high)]
        positions = [p for bag in bags for p in range(int(offsets[bag]), int(offsets[bag + 1]))]
        if bags:
            part = RowGrad(inverse[positions], offsets_of([lengths[bag] for bag in bags]), high - low, grad=grad[bags])
            parts.append(replace(part, micro_batch=micro_batch))
    assert torch.equal(reduce_grads(parts, num_rows, dim), reduce_grads([whole], num_rows, dim))


def test_accumulation_by_hand():
    """B19: mean loss over 4 samples; 1 sample with gradient 6 and 3 with 2 each, all divided by 4: 3, not 4."""
    first = RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1, grad=torch.tensor([[6.0 / 4]]))
    second = RowGrad(torch.zeros(3, dtype=torch.int64), torch.arange(4), 3, grad=torch.full((3, 1), 0.5), micro_batch=1)
    assert reduce_grads([first, second], 1, 1).item() == 3.0


def test_backward_twice_adds():
    view = RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1)
    upstream = torch.ones(1, 2, requires_grad=True)
    view.add_grad(upstream)
    view.add_grad(torch.ones(1, 2))
    assert view.grad is not None
    assert view.grad.tolist() == [[2.0, 2.0]]
    assert not view.grad.requires_grad


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_expanded_and_strided_gradients(impl):
    view = random_view(2, 6, 5, 4)
    for grad in (
        torch.ones(1, 1).expand(12, 4),
        torch.ones(1, 4).expand(12, 4),
        torch.randn(4, 12).t(),
        torch.randn(12, 9)[:, 3:7],
    ):
        strided = replace(view, grad=grad)
        assert torch.equal(reduce_grads([strided], 5, 4, impl=impl), folded([strided], 5, 4))


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_nothing_to_sum(impl):
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(reduce_grads([], 3, 2, impl=impl), torch.zeros(3, 2))
    no_bags = RowGrad(none, torch.zeros(1, dtype=torch.int64), 0, grad=torch.empty(0, 2))
    empty_bags = RowGrad(none, torch.zeros(4, dtype=torch.int64), 3, grad=torch.ones(3, 2))
    untouched = RowGrad(torch.zeros(2, dtype=torch.int64), torch.arange(3), 2)
    assert torch.equal(reduce_grads([no_bags, empty_bags, untouched], 3, 2, impl=impl), torch.zeros(3, 2))
    assert reduce_grads([no_bags], 0, 2, impl=impl).shape == (0, 2)


def test_work_is_shared_by_contributions():
    """A hot row with half of the contributions gets a thread of its own."""
    inverse = torch.cat([torch.zeros(8000, dtype=torch.int64), torch.arange(1, 1001)])
    view = RowGrad(inverse, torch.arange(9001), 9000, grad=torch.ones(9000, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    parts = list_grads([view], 1001, 1).parts(1)
    torch.set_num_threads(before)
    assert parts == [(0, 1), (1, 1001)]


def lookup_of(rows, view, **kind):
    counts = torch.bincount(view.inverse[view.inverse >= 0].long(), minlength=len(rows)).to(torch.int32)
    return PendingLookup(torch.tensor(rows), torch.tensor(rows, dtype=torch.int32) % 3, counts, [view], **kind)


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_lookups_are_merged_by_row(impl):
    first = lookup_of([5, -1, 9], random_view(1, 6, 3, 4))
    second = lookup_of([9, 7, 5, -1], random_view(1, 6, 4, 4, micro_batch=1))
    assert merge_lookups([first]) is first
    merged = merge_lookups([first, second], impl=impl)
    padding = [-1] * (3 if impl == "torch" else 0)
    assert sorted(merged.rows.tolist()) == [*padding, -1, 5, 7, 9]
    num_rows = merged.rows.numel()
    found = merged.rows.tolist()[:4]  # the sorted union is padded at its end
    sums = dict(zip(found, reduce_grads(merged.views, num_rows, 4), strict=False))
    at = {row: u for u, row in enumerate(found)}
    for row, one, two in ((5, 0, 2), (9, 2, 0), (-1, 1, 3)):
        own = [
            replace(view, inverse=torch.where(view.inverse == u, 0, -1))
            for view, u in ((first.views[0], one), (second.views[0], two))
        ]
        assert torch.equal(sums[row], folded(own, 1, 4)[0])
        assert merged.counts[at[row]] == first.counts[one] + second.counts[two]
    assert merged.table_of_row[at[7]] == 1
    with pytest.raises(ValueError, match="at least one"):
        merge_lookups([])


def test_unequal_scales_travel_in_the_factors():
    first = lookup_of(
        [0],
        RowGrad(torch.zeros(2, dtype=torch.int64), torch.arange(3), 2, grad=torch.tensor([[1.0], [2.0]])),
        scale=0.5,
    )
    second = lookup_of(
        [0], RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1, grad=torch.tensor([[8.0]]), micro_batch=1)
    )
    merged = merge_lookups([first, second])
    assert merged.scale == 1.0
    assert reduce_grads(merged.views, 1, 1).item() == 9.5
    assert merge_lookups([first, replace_scale(second, 0.5)]).scale == 0.5


def replace_scale(lookup, scale):
    return PendingLookup(lookup.rows, lookup.table_of_row, lookup.counts, lookup.views, scale)


def test_scales_on_the_device():
    """A clip factor as a tensor scales sums and norms; merged lookups that share it keep it, others take it as factors."""
    view = RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1, grad=torch.tensor([[4.0]]))
    factor = torch.tensor(0.5)
    first, second = lookup_of([0], view, scale=factor), lookup_of([0], replace(view, micro_batch=1), scale=factor)
    assert merge_lookups([first, second]).scale is factor
    assert row_square_sums(first, 1).tolist() == [4.0]
    merged = merge_lookups([first, replace_scale(second, 0.25)])
    assert merged.scale == 1.0
    assert reduce_grads(merged.views, 1, 1).item() == 3.0


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_op_is_known_to_torch(impl):
    view = random_view(2, 6, 3, 4, factors=True)
    parts = ([view.inverse], [view.offsets], [view.factors], [view.grad], [6], [False], [0])
    torch.library.opcheck(torch.ops.recis.reduce_grads.default, (*parts, 3, 4, impl))

    def run(grad):
        return reduce_grads([replace(view, grad=grad * 2)], 3, 4, impl=impl)

    def traced(grad):
        return reduce_grads(
            [RowGrad(view.inverse, view.offsets, 6, factors=view.factors, grad=grad * 2)], 3, 4, impl=impl
        )

    assert torch.equal(torch.compile(traced, fullgraph=True, backend="aot_eager")(view.grad), run(view.grad))


def test_counts_saturate():
    view = RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1, grad=torch.ones(1, 1))
    full = PendingLookup(
        torch.tensor([4]), torch.zeros(1, dtype=torch.int32), torch.tensor([2**31 - 1], dtype=torch.int32), [view]
    )
    assert merge_lookups([full, full]).counts.tolist() == [2**31 - 1]


def test_reduced_lookup_has_each_row_once():
    lookup = lookup_of([5, -1, 9, 2], random_view(2, 6, 3, 4), scale=0.25)
    reduced = reduce_lookups([lookup], 4)
    assert reduced.scale == 0.25
    assert reduced.views[0].grad is not None
    assert torch.equal(reduced.views[0].grad[:3], folded(lookup.views, 3, 4))
    assert reduced.views[0].inverse.tolist() == [0, 1, 2, -1]  # row 2 was looked up, but no gradient reached it
    assert torch.equal(reduce_grads(reduced.views, 4, 4)[:3], folded(lookup.views, 3, 4))


@pytest.mark.parametrize("impl", ["triton", "numba", "reference"])
@pytest.mark.parametrize("dim", [1, 16, 21])
def test_square_sums_leave_out_absent_rows(dim, impl):
    lookup = lookup_of([5, -1, 9, 2], random_view(2, 6, 3, dim, factors=True), scale=0.5)
    sums = reduce_grads(lookup.views, 4, dim).double() * 0.5
    want = sums.square().sum(1)
    want[1] = 0
    torch.testing.assert_close(row_square_sums(lookup, dim, impl=impl), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["triton", "numba", "reference"])
def test_square_sums_of_duplicates_only_and_of_nothing(impl):
    """700 contributions of one row: 700 times (1, 2), whose square is 700^2 (1 + 4); rows without any are 0."""
    view = RowGrad(torch.ones(700, dtype=torch.int64), torch.arange(701), 700, grad=torch.tensor([[1.0, 2.0]] * 700))
    lookup = PendingLookup(torch.tensor([4, 2, 8]), torch.zeros(3).int(), torch.ones(3).int(), [view])
    assert row_square_sums(lookup, 2, impl=impl).tolist() == [0.0, 700.0**2 * 5, 0.0]
    assert row_square_sums(replace(lookup, views=[]), 2, impl=impl).tolist() == [0.0, 0.0, 0.0]
    none = torch.empty(0, dtype=torch.int64)
    assert row_square_sums(PendingLookup(none, none.int(), none.int(), []), 2, impl=impl).shape == (0,)


@pytest.mark.parametrize("impl", ["triton", "numba", "reference"])
def test_square_sums_are_known_to_torch(impl):
    view, rows = random_view(2, 6, 3, 4, factors=True), torch.tensor([5, -1, 9])
    parts = ([view.inverse], [view.offsets], [view.factors], [view.grad], [6], [False], [0])
    torch.library.opcheck(torch.ops.recis.row_square_sums.default, (rows, *parts, 4, impl))

    def run(rows, grad, scale):
        own = RowGrad(view.inverse, view.offsets, 6, factors=view.factors, grad=grad * 2)
        lookup = PendingLookup(rows, torch.zeros(3).int(), torch.ones(3).int(), [own], scale)
        return row_square_sums(lookup, 4, impl=impl)

    args = rows, view.grad, torch.tensor(0.5)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*args), run(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inverse": torch.zeros(2)}, "inverse must be"),
        ({"offsets": torch.zeros(3)}, "offsets must be"),
        ({"stride": 3}, "stride must divide"),
        ({"grad": torch.zeros(2, 5)}, "grad must be"),
        ({"grad": torch.zeros(2, 4, dtype=torch.float64)}, "grad must be"),
        ({"factors": torch.zeros(2, dtype=torch.float64)}, "factors must be"),
    ],
    ids=["inverse", "offsets", "stride", "grad width", "grad dtype", "factors"],
)
def test_wrong_views_are_named(change, message):
    good = RowGrad(torch.zeros(2, dtype=torch.int64), torch.arange(3), 2, grad=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=message):
        reduce_grads([replace(good, **change)], 1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"inverse": torch.tensor([0, 7])}, "inverse must lie in"), ({"offsets": torch.tensor([0, 2, 1])}, "must ascend")],
    ids=["inverse", "offsets"],
)
def test_content_is_checked_on_request(change, message):
    good = RowGrad(torch.zeros(2, dtype=torch.int64), torch.arange(3), 2, grad=torch.zeros(2, 4))
    with checks():
        assert torch.equal(reduce_grads([good], 1, 4), torch.zeros(1, 4))
        with pytest.raises(ValueError, match=message):
            reduce_grads([replace(good, **change)], 1, 4)


def launches() -> None:
    for dim in (1, 5, 64, 1024):
        pooled = random_view(1, 3, 4, dim, factors=dim == 64)
        by_position = random_view(1, 3, 4, dim, per_position=True)
        for view in (pooled, by_position, replace(pooled, inverse=pooled.inverse.long())):
            lookup = PendingLookup(torch.arange(4), torch.zeros(4).int(), torch.ones(4).int(), [view])
            reduce_grads([view], 4, dim, impl="triton")
            row_square_sums(lookup, dim, impl="triton")
    one = RowGrad(torch.zeros(1, dtype=torch.int64), torch.arange(2), 1, grad=torch.ones(1, 1))
    reduce_grads([one], 1, 1, impl="triton")


def test_sums_go_where_they_are_told_and_rows_without_a_gradient_get_zeros():
    view = random_view(2, 7, 9, 5)
    view.inverse[view.inverse == 4] = -1
    lookup = PendingLookup(torch.arange(9), torch.zeros(9, dtype=torch.int32), torch.ones(9, dtype=torch.int32), [view])
    memory = torch.full((11, 5), float("nan"))
    reduced = reduce_lookups([lookup], 5, out=memory[1:10]).views[0]
    assert reduced.grad is not None
    assert reduced.grad.data_ptr() == memory[1:].data_ptr()
    assert torch.equal(memory[1:10], folded([view], 9, 5))
    assert memory[5].eq(0).all()  # row 4, which nothing reached
    assert memory[[0, 10]].isnan().all()
    with pytest.raises(ValueError, match=r"out must be \(9, 5\) float32"):
        reduce_lookups([lookup], 5, out=memory)
