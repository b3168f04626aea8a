"""Row updates against float64 equations and torch.optim: all rules, dims, dtypes; metadata; rows that must not change."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recis_kernels import checks, grad_lists_triton
from recis_kernels.bag_factors import bag_factors
from recis_kernels.embedding_bag import embedding_bag
from recis_kernels.philox import table_key
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_grads import (
    PendingLookup,
    RowGrad,
    merge_lookups,
    reduce_grads,
    reduce_lookups,
    row_square_sums,
)
from recis_kernels.row_rounding import round_stochastic
from recis_kernels.row_rules import (
    ADAGRAD,
    ADAM,
    ADAMW,
    ADAMW_TF,
    FTRL,
    ROW_WISE_ADAGRAD,
    SGD,
    SGD_MOMENTUM,
    UpdateRule,
    fold_scalars,
    reference_update,
)
from recis_kernels.sparse_update import fused_update, fused_update_flags, update_rows

BY_ROW = UpdateRule("adam", ("m", "v"), ADAM.scalars, row_steps=True)
BY_ROW_TF = UpdateRule("adamw_tf", ("m", "v"), ADAM.scalars, row_steps=True)
# two tables per rule, with numbers of their own; a large eps shows where it stands
SCALARS = {
    SGD: [[0.1, 0.0], [0.3, 0.02]],
    SGD_MOMENTUM: [[0.1, 0.01, 0.9], [0.2, 0.0, 0.5]],
    ADAGRAD: [[0.1, 0.01, 1e-10], [0.2, 0.0, 0.05]],
    ROW_WISE_ADAGRAD: [[0.1, 0.01, 1e-8], [0.05, 0.0, 0.05]],
    ADAM: [[0.01, 0.9, 0.999, 1e-8, 0.01, 3.0], [0.02, 0.8, 0.99, 0.05, 0.0, 7.0]],
    ADAMW: [[0.01, 0.9, 0.999, 1e-8, 0.1, 3.0], [0.02, 0.8, 0.99, 0.05, 0.0, 7.0]],
    ADAMW_TF: [[0.01, 0.9, 0.999, 1e-3, 0.01, 3.0], [0.02, 0.8, 0.99, 0.05, 0.0, 7.0]],
    FTRL: [[0.1, 1.0, 0.05, 0.1], [0.2, 0.5, 0.0, 0.0]],
    BY_ROW: [[0.01, 0.9, 0.999, 1e-8, 0.0, 50.0], [0.02, 0.8, 0.99, 0.05, 0.0, 50.0]],
    BY_ROW_TF: [[0.01, 0.9, 0.999, 1e-8, 0.01, 50.0], [0.02, 0.8, 0.99, 0.05, 0.0, 50.0]],
}
NAMES = [f"{rule.name}{'_by_row' if rule.row_steps else ''}" for rule in SCALARS]
KEYS = torch.tensor([table_key(7, "item"), table_key(7, "user")])


def states_of(rule, dim):
    width = 1 if rule is ROW_WISE_ADAGRAD else dim
    return (*((name, width) for name in rule.states), *((("t", 1),) if rule.row_steps else ()))


def store_of(rule, num_rows, dim, dtype=torch.float32, *, seed=0):
    """Return blocks of 8 rows each whose rows have normal weights, positive states, id = 1000 - row, count = row."""
    generator = torch.Generator().manual_seed(seed)
    blocks = RowBlocks(RowLayout(dim, dtype, states_of(rule, dim)), shift=3)
    blocks.grow(num_rows)
    fields = {"weight": torch.randn(num_rows, dim, generator=generator).to(dtype)}
    for name, width in blocks.layout.state:
        fields[f"state.{name}"] = torch.rand(num_rows, width, generator=generator)
    if rule.row_steps:
        fields["state.t"] = torch.randint(0, 20, (num_rows, 1), generator=generator).float()
    fields["id"] = 1000 - torch.arange(num_rows)
    fields["count"] = torch.arange(num_rows, dtype=torch.int32)
    fields["last_seen"] = torch.zeros(num_rows, dtype=torch.int32)
    blocks.write(torch.arange(num_rows), fields)
    return blocks


def everything(blocks):
    return torch.stack([block.clone() for block in blocks.blocks])


def scalars_of(rule):
    return torch.tensor(SCALARS[rule], dtype=torch.float64)


def random_lookup(num_rows, dim, *, num_features=2, stride=40):
    """Return a lookup of 12 rows (one -1), pooled, with one row that no gradient reaches."""
    rows = torch.randperm(num_rows)[:12]
    rows[4] = -1
    lengths = torch.randint(0, 4, (num_features * stride,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    inverse = torch.randint(0, 11, (int(offsets[-1]),), dtype=torch.int32)
    counts = torch.bincount(inverse.long(), minlength=12).to(torch.int32)
    view = RowGrad(inverse, offsets, stride, grad=torch.randn(num_features * stride, dim))
    return PendingLookup(rows, torch.arange(12, dtype=torch.int32) % 2, counts, [view])


@pytest.mark.parametrize("dim", [1, 15, 16, 64, 100], ids="D{}".format)
@pytest.mark.parametrize("rule", SCALARS, ids=NAMES)
def test_rules_match_float64(rule, dim):
    blocks = store_of(rule, 30, dim)
    old, rows, grads = blocks.read(torch.arange(30)), torch.randperm(30)[:20], torch.randn(20, dim)
    tables = torch.arange(20, dtype=torch.int32) % 2
    bad = update_rows(blocks, rows, grads, rule, scalars_of(rule), step=3, table_of_row=tables, scale=0.5)
    assert bad.tolist() == []
    state = {name: old[f"state.{name}"][rows] for name, _ in blocks.layout.state}
    weight, state = reference_update(rule, old["weight"][rows], state, grads * 0.5, scalars_of(rule)[tables.long()])
    new = blocks.read(torch.arange(30))
    torch.testing.assert_close(new["weight"][rows].double(), weight, rtol=2e-6, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(new[f"state.{name}"][rows].double(), value, rtol=1e-6, atol=1e-6)
    for name, value in new.items():
        untouched = torch.ones(30, dtype=torch.bool).index_fill(0, rows, name in ("id", "last_seen", "count"))
        assert torch.equal(value[untouched], old[name][untouched])


@pytest.mark.parametrize("rule", SCALARS, ids=NAMES)
def test_bfloat16_rows_match_float64(rule):
    blocks = store_of(rule, 30, 21, torch.bfloat16)
    old, rows, grads = blocks.read(torch.arange(30)), torch.randperm(30)[:20], torch.randn(20, 21)
    tables = torch.arange(20, dtype=torch.int32) % 2
    update_rows(blocks, rows, grads, rule, scalars_of(rule), step=9, table_of_row=tables, keys=KEYS)
    new = blocks.read(rows)
    mirror = RowBlocks(RowLayout(21, torch.float32, states_of(rule, 21)), shift=3)
    mirror.grow(30)
    mirror.write(torch.arange(30), {**old, "weight": old["weight"].float()})
    update_rows(mirror, rows, grads, rule, scalars_of(rule), step=9, table_of_row=tables)
    exact = mirror.read(rows)
    assert torch.equal(new["weight"], round_stochastic(exact["weight"], exact["id"], KEYS[tables.long()], 9))
    for name, _ in blocks.layout.state:
        assert torch.equal(new[f"state.{name}"], exact[f"state.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", SCALARS, ids=NAMES)
def test_fused_matches_reference_and_two_passes(rule, dtype):
    dim = 19
    lookup = random_lookup(30, dim)
    fused, reference, two_pass = (store_of(rule, 30, dim, dtype) for _ in range(3))
    kind = {"step": 5, "keys": KEYS}
    merged, bad = fused_update(fused, [lookup], rule, scalars_of(rule), **kind)
    assert merged is lookup
    assert bad.tolist() == []
    fused_update(two_pass, [reduce_lookups([lookup], dim)], rule, scalars_of(rule), **kind)
    assert torch.equal(everything(fused), everything(two_pass))
    fused_update(reference, [lookup], rule, scalars_of(rule), **kind, impl="reference")
    got, want = fused.read(torch.arange(30)), reference.read(torch.arange(30))
    for name, value in want.items():
        if name == "weight" and dtype == torch.bfloat16:  # an fp32 ulp can turn one rounding the other way
            torch.testing.assert_close(got[name].float(), value.float(), rtol=2**-7, atol=1e-6)
        elif value.is_floating_point():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got[name], value), name


TRITON_CASES = [
    (16, torch.float32),
    (21, torch.bfloat16),
    (64, torch.float32),
    (64, torch.bfloat16),
    (520, torch.float32),
]


@pytest.mark.parametrize(("dim", "dtype"), TRITON_CASES, ids=str)
@pytest.mark.parametrize("rule", SCALARS, ids=NAMES)
def test_triton_gives_the_bytes_of_numba(rule, dim, dtype):
    """Every byte of every row: weights, states, metadata, padding; two lookups, factors, a scale, two tables."""
    lookups = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lookup = random_lookup(30, dim, stride=7)
        lookup.scale = 0.37
        lookup.views[0].micro_batch = seed
        lookup.views[0].factors = torch.randn(lookup.views[0].inverse.numel()) if seed == 1 else None
        lookups.append(lookup)
    stores = []
    for impl in ("numba", "triton"):
        blocks = store_of(rule, 30, dim, dtype)
        _, bad = fused_update(blocks, lookups, rule, scalars_of(rule), step=5, keys=KEYS, impl=impl)
        assert bad.tolist() == []
        stores.append(everything(blocks))
    assert torch.equal(*stores)


@pytest.mark.parametrize("rule", [ROW_WISE_ADAGRAD, ADAM, BY_ROW], ids=["row_wise_adagrad", "adam", "adam_by_row"])
def test_triton_matches_float64(rule):
    blocks = store_of(rule, 30, 33)
    old, rows, grads = blocks.read(torch.arange(30)), torch.randperm(30)[:20], torch.randn(20, 33)
    tables = torch.arange(20, dtype=torch.int32) % 2
    scale = torch.tensor(0.5)
    numbers = {"table_of_row": tables, "scale": scale, "impl": "triton"}
    assert update_rows(blocks, rows, grads, rule, scalars_of(rule), step=3, **numbers).tolist() == []
    state = {name: old[f"state.{name}"][rows] for name, _ in blocks.layout.state}
    weight, state = reference_update(rule, old["weight"][rows], state, grads * 0.5, scalars_of(rule)[tables.long()])
    new = blocks.read(rows)
    torch.testing.assert_close(new["weight"].double(), weight, rtol=2e-6, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(new[f"state.{name}"].double(), value, rtol=1e-6, atol=1e-6)


def test_corrections_by_row_count_hold_for_any_count():
    """t of a row from 0 to the largest that float32 counts: bits of numba's pow, or one float32 ulp beside."""
    counts = torch.tensor([0, 1, 2, 3, 10, 999, 12345, 2**20, 2**24 - 2]).float()[:, None]
    weights = []
    for impl in ("numba", "triton"):
        blocks = store_of(BY_ROW, 9, 5)
        blocks.write(torch.arange(9), {"state.t": counts})
        torch.manual_seed(1)
        update_rows(blocks, torch.arange(9), torch.randn(9, 5), BY_ROW, scalars_of(BY_ROW), step=1, impl=impl)
        new = blocks.read(torch.arange(9))
        assert torch.equal(new["state.t"], counts + 1)
        weights.append(new["weight"])
    torch.testing.assert_close(weights[1], weights[0], rtol=2**-22, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_long_runs_in_any_order(weighted, monkeypatch):
    """Runs are long above 64 here, pieces 16. A tree is close to the fold, and the fold is numba's."""
    monkeypatch.setattr(grad_lists_triton, "LONG_RUN", 64)
    monkeypatch.setattr(grad_lists_triton, "PIECE", 16)
    lengths = [150, 65, 64, 1]
    inverse = torch.arange(4).repeat_interleave(torch.tensor(lengths))[torch.randperm(sum(lengths))]
    view = RowGrad(inverse, torch.arange(inverse.numel() + 1), inverse.numel(), grad=torch.randn(inverse.numel(), 20))
    view.factors = torch.rand(inverse.numel()) if weighted else None
    lookup = PendingLookup(torch.arange(4), torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32), [view])
    weights = {}
    for name, numbers in {
        "numba": {"impl": "numba"},
        "numba, any order": {"impl": "numba", "deterministic": False},
        "fold": {"impl": "triton"},
        "tree": {"impl": "triton", "deterministic": False},
    }.items():
        blocks = store_of(SGD, 4, 20)
        fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=1, **numbers)
        weights[name] = blocks.read(torch.arange(4))["weight"]
    assert torch.equal(weights["fold"], weights["numba"])
    assert torch.equal(weights["numba, any order"], weights["numba"])
    assert torch.equal(weights["tree"][2:], weights["numba"][2:])  # not long: nothing is cut
    assert not torch.equal(weights["tree"][:2], weights["numba"][:2])
    torch.testing.assert_close(weights["tree"], weights["numba"], rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes masked lanes too
@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_flags_say_which_rows_were_left(impl):
    blocks = store_of(ADAM, 40, 20)
    grads = torch.randn(10, 20)
    grads[3, 19], grads[7, 0] = torch.nan, torch.inf
    view = RowGrad(torch.arange(10), torch.arange(11), 10, per_position=True, grad=grads)
    rows = torch.arange(20, 30)
    rows[5] = -1
    lookup = PendingLookup(rows, torch.zeros(10, dtype=torch.int32), torch.ones(10, dtype=torch.int32), [view])
    merged, is_bad = fused_update_flags(blocks, [lookup], ADAM, scalars_of(ADAM), step=4, impl=impl)
    assert merged is lookup
    assert is_bad.tolist() == [u in (3, 7) for u in range(10)]
    assert blocks.read(torch.arange(20, 25))["last_seen"].tolist() == [4] * 5  # metadata of a row left is recorded


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_two_to_the_31_elements(dtype, impl):
    """One block of more than 2**31 weights and states, mapped lazily; rows near its end change, nothing else does."""
    blocks = RowBlocks(RowLayout(1024, dtype, (("m", 1024),)), shift=20 if dtype == torch.float32 else 21)
    blocks.grow(1 << blocks.shift)
    assert blocks.blocks[0].numel() // dtype.itemsize > 2**31
    rows = torch.tensor([(1 << blocks.shift) - 1, 0, (1 << blocks.shift) - 2])
    grads, scalars = torch.randn(3, 1024), scalars_of(SGD_MOMENTUM)
    update_rows(blocks, rows, grads, SGD_MOMENTUM, scalars, step=1, keys=KEYS, impl=impl)
    new = blocks.read(rows)
    assert torch.equal(new["state.m"], grads)
    want = grads * -0.1
    torch.testing.assert_close(new["weight"].float(), want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert not blocks.read(torch.tensor([1, 2, (1 << blocks.shift) - 3]))["state.m"].any()


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
@pytest.mark.parametrize("per_position", [False, True])
def test_duplicates_only(impl, per_position):
    """700 positions of one row, in one huge bag or each with its own gradient: one step with the sum, 700 (1, 2)."""
    blocks, grads = store_of(SGD, 3, 2), torch.tensor([[1.0, 2.0]] * (700 if per_position else 1))
    before, offsets = blocks.read(torch.arange(3))["weight"], torch.tensor([0, 700])
    view = RowGrad(torch.zeros(700, dtype=torch.int64), offsets, 1, per_position=per_position, grad=grads)
    lookup = PendingLookup(torch.tensor([1]), torch.zeros(1).int(), torch.tensor([700]).int(), [view])
    rate = 2.0**-4
    line = torch.tensor([[{"lr": rate}.get(name, 0.0) for name in SGD.scalars]], dtype=torch.float64)
    fused_update(blocks, [lookup], SGD, line, step=2, impl=impl)
    before[1] -= rate * 700 * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(blocks.read(torch.arange(3))["weight"], before, rtol=1e-6, atol=0)
    assert blocks.read(torch.tensor([1]))["count"].tolist() == [701]


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_no_rows_in_any_version(impl):
    blocks = store_of(ADAM, 3, 2)
    before = everything(blocks)
    none = torch.empty(0, dtype=torch.int64)
    bad = update_rows(blocks, none, torch.empty(0, 2), ADAM, scalars_of(ADAM), step=1, impl=impl)
    assert bad.tolist() == []
    update_rows(blocks, torch.tensor([-1]), torch.ones(1, 2), ADAM, scalars_of(ADAM), step=1, impl=impl)
    assert torch.equal(everything(blocks), before)


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_is_known_to_torch(dtype, impl):
    """The registered op writes into the block tensors it is given, which torch.compile may have copied."""
    blocks, lookup = store_of(ADAM, 30, 6, dtype), random_lookup(30, 6, stride=5)
    view = lookup.views[0]
    args = (
        *(blocks.blocks, blocks.layout_key, blocks.shift, lookup.rows, lookup.table_of_row, lookup.counts),
        *([view.inverse], [view.offsets], [torch.rand(view.inverse.numel())], [view.grad], [5], [False], [0]),
        *(torch.ones(1), "adamw", False, scalars_of(ADAM), 3, KEYS, True, True, impl),
    )
    torch.library.opcheck(torch.ops.recis.fused_update.default, args)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_a_compiled_update_writes_the_same_bytes(impl):
    lookup = random_lookup(30, 6, stride=5)
    stores = []

    def run(blocks, grad):
        view = RowGrad(lookup.views[0].inverse, lookup.views[0].offsets, 5, grad=grad * 2)
        pending = PendingLookup(lookup.rows, lookup.table_of_row, lookup.counts, [view])
        return fused_update_flags(blocks, [pending], ADAM, scalars_of(ADAM), step=3, impl=impl)[1].sum()

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        blocks = store_of(ADAM, 30, 6)
        assert function(blocks, lookup.views[0].grad) == 0
        stores.append(everything(blocks))
    assert torch.equal(*stores)
    assert not torch.equal(stores[0], everything(store_of(ADAM, 30, 6)))


class Syncs(TorchDispatchMode):
    """Records the calls that would make a GPU's host wait: reads of a value, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in self.WAITING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_step_path_waits_for_nothing(deterministic):
    """Pooling, its factors, the norms, merging as on a GPU and the update; a boolean index would be seen as well."""
    blocks, lookup = store_of(ADAM, 30, 6), random_lookup(30, 6, stride=5)
    view, scale = lookup.views[0], torch.tensor(0.5)
    with Syncs() as syncs:
        weights = torch.ones(view.inverse.numel())
        factors = bag_factors(view.offsets, weights, True, impl="triton")
        embedding_bag(blocks, lookup.rows, view.inverse, view.offsets, factors, impl="triton")
        first = replace(lookup, views=[replace(view, factors=factors)], scale=scale)
        second = replace(lookup, views=[replace(view, micro_batch=1)], scale=scale)
        merged = merge_lookups([first, second], impl="torch")
        row_square_sums(merged, 6, impl="triton")
        numbers = {"step": 1, "deterministic": deterministic, "impl": "triton"}
        fused_update_flags(blocks, [merged], ADAM, scalars_of(ADAM), **numbers)
    assert syncs.found == []
    with Syncs() as syncs:
        fused_update(blocks, [lookup], ADAM, scalars_of(ADAM), step=1, impl="triton")
    assert syncs.found == ["aten.nonzero.default"]  # the one that fused_update names


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(num_threads):
    lookups = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lookup = random_lookup(30, 8, num_features=3, stride=6000)
        lookup.views[0].micro_batch = seed
        lookups.append(lookup)
    states = []
    before = torch.get_num_threads()
    for count in (1, num_threads):
        torch.set_num_threads(count)
        blocks = store_of(ADAM, 30, 8)
        fused_update(blocks, lookups, ADAM, scalars_of(ADAM), step=2)
        states.append(everything(blocks))
    torch.set_num_threads(before)
    assert torch.equal(*states)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_metadata_is_written_for_every_row_found(impl):
    blocks = store_of(SGD, 30, 4)
    lookup = random_lookup(30, 4)
    before = everything(blocks)
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=77, impl=impl)
    found = lookup.rows >= 0
    assert lookup.counts[11] == 0  # looked up without a position of its own: kept by the caller for padding
    after = blocks.read(lookup.rows[found])
    assert (after["last_seen"] == 77).all()
    assert torch.equal(after["count"], lookup.rows[found].int() + lookup.counts[found])
    others = torch.ones(32, dtype=torch.bool).index_fill(0, lookup.rows[found], False)
    assert torch.equal(everything(blocks).view(32, -1)[others], before.view(32, -1)[others])
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=78, record_seen=False, impl=impl)
    assert torch.equal(blocks.read(lookup.rows[found])["last_seen"], after["last_seen"])
    assert torch.equal(blocks.read(lookup.rows[found])["count"], after["count"])


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_count_saturates(impl):
    blocks = store_of(SGD, 1, 1)
    blocks.write(torch.tensor([0]), {"count": torch.tensor([2**31 - 2], dtype=torch.int32)})
    lookup = PendingLookup(torch.tensor([0]), torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32))
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=1, impl=impl)
    assert blocks.read(torch.tensor([0]))["count"].item() == 2**31 - 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes masked lanes too
@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_a_gradient_that_is_not_finite_stay(impl, value):
    blocks = store_of(ADAM, 40, 20)
    old, grads = blocks.read(torch.arange(40)), torch.randn(10, 20)
    grads[3, 19], grads[7, 0] = value, value
    rows = torch.arange(20, 30)
    bad = update_rows(blocks, rows, grads, ADAM, scalars_of(ADAM), step=1, impl=impl)
    assert bad.tolist() == [3, 7]
    new = blocks.read(rows)
    for name in ("weight", "state.m", "state.v"):
        same = (new[name] == old[name][rows]).all(1)
        assert same.tolist() == [u in (3, 7) for u in range(10)]


def test_a_sum_that_overflows_is_reported_over_all_threads():
    num_rows = 3000
    blocks = store_of(SGD, num_rows, 1)
    inverse = torch.arange(num_rows).repeat_interleave(2)
    grad = torch.ones(2 * num_rows, 1)
    wrong = torch.tensor([0, 1, 1499, 1500, 2999])
    grad[2 * wrong], grad[2 * wrong + 1] = 3e38, 3e38
    view = RowGrad(inverse, torch.arange(2 * num_rows + 1), 2 * num_rows, grad=grad)
    ones = torch.ones(num_rows, dtype=torch.int32)
    lookup = PendingLookup(torch.arange(num_rows), ones * 0, ones, [view])
    bad = fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=1)[1]
    assert torch.equal(bad, wrong)


def steps(rule, scalars, weight, gradients):
    """Return the weights after each step of one row, starting from zero state; t counts from 1."""
    blocks = RowBlocks(RowLayout(len(weight), torch.float32, states_of(rule, len(weight))), shift=0)
    blocks.grow(1)
    blocks.write(torch.tensor([0]), {"weight": torch.tensor([weight])})
    out = []
    for t, gradient in enumerate(gradients, 1):
        line = [float(t) if value == "t" else value for value in scalars]
        numbers = torch.tensor([line], dtype=torch.float64)
        update_rows(blocks, torch.tensor([0]), torch.tensor([gradient]), rule, numbers, step=t)
        out.append(blocks.read(torch.tensor([0]))["weight"][0])
    return torch.stack(out)


def reference_steps(rule, scalars, weight, gradients):
    w = torch.tensor([weight], dtype=torch.float64)
    state = {name: torch.zeros(1, width, dtype=torch.float64) for name, width in states_of(rule, len(weight))}
    out = []
    for t, gradient in enumerate(gradients, 1):
        line = torch.tensor([[float(t) if value == "t" else value for value in scalars]], dtype=torch.float64)
        w, state = reference_update(rule, w, state, torch.tensor([gradient], dtype=torch.float64), line)
        out.append(w[0])
    return torch.stack(out)


B15 = [
    (SGD, [0.1, 0.0], [[0.49, -0.23], [0.46, -0.24], [0.48, -0.28]]),
    (
        SGD_MOMENTUM,
        [0.1, 0.01, 0.9],
        [[0.489500000, -0.229750000], [0.449560500, -0.221295250], [0.433165389, -0.253464680]],
    ),
    (
        ADAGRAD,
        [0.1, 0.01, 1e-10],
        [[0.400000000, -0.150000000], [0.305479235, -0.193741719], [0.357701083, -0.280779865]],
    ),
    (
        ROW_WISE_ADAGRAD,
        [0.1, 0.0, 1e-8],
        [[0.436754451, -0.123508902], [0.327209943, -0.160023737], [0.375019087, -0.255642024]],
    ),
    (
        ADAM,
        [0.01, 0.9, 0.999, 1e-8, 0.01, "t"],
        [[0.490000001, -0.240000000], [0.480782989, -0.237196680], [0.477998008, -0.241693180]],
    ),
    (
        ADAMW,
        [0.01, 0.9, 0.999, 1e-8, 0.1, "t"],
        [[0.489500001, -0.239750000], [0.479832690, -0.236846880], [0.476773820, -0.241183351]],
    ),
    (
        ADAMW,
        [0.01, 0.9, 0.999, 1e-3, 1.0, "t"],
        [[0.485099010, -0.237549751], [0.471111062, -0.232527625], [0.463832796, -0.234758451]],
    ),
    (
        ADAMW_TF,
        [0.01, 0.9, 0.999, 1e-3, 0.01, "t"],
        [[0.487402531, -0.238865271], [0.474185079, -0.234143353], [0.467065245, -0.236079961]],
    ),
    (
        FTRL,
        [0.1, 1.0, 0.05, 0.1],
        [[0.031531532, -0.020661157], [0.008910983, -0.028767468], [0.023360119, -0.056010644]],
    ),
]


@pytest.mark.parametrize(("rule", "scalars", "want"), B15, ids=[f"{case[0].name}-{i}" for i, case in enumerate(B15)])
def test_worked_examples(rule, scalars, want):
    """B15: w = (.5, -.25), three gradients, state from 0; 1e-9 in float64, 1e-6 in fp32."""
    gradients = [[0.1, -0.2], [0.3, 0.1], [-0.2, 0.4]]
    want = torch.tensor(want, dtype=torch.float64)
    exact = reference_steps(rule, scalars, [0.5, -0.25], gradients)
    torch.testing.assert_close(exact, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(steps(rule, scalars, [0.5, -0.25], gradients).double(), want, rtol=0, atol=1e-6)


def test_single_value_cases():
    """A35, A36, A37, B16."""
    adamw = steps(ADAMW, [1e-3, 0.9, 0.999, 1e-8, 0.01, "t"], [1.0], [[1.0]] * 3)
    assert adamw.flatten().tolist() == pytest.approx([0.99899, 0.99798, 0.99697], abs=1e-7)
    assert steps(ADAMW_TF, [1e-3, 0.9, 0.999, 1e-8, 0.0, "t"], [1.0], [[1e-8]]).item() == pytest.approx(
        0.99996935, abs=1e-7
    )
    assert steps(ADAM, [1e-3, 0.9, 0.999, 1e-8, 0.0, "t"], [1.0], [[1e-8]]).item() == pytest.approx(0.9995, abs=1e-7)
    late = [1e-3, 0.9, 0.999, 1e-8, 0.0, 10.0]
    assert steps(ADAM, late, [1.0], [[1.0]]).item() == pytest.approx(0.99951555, abs=1e-7)
    assert steps(BY_ROW, late, [1.0], [[1.0]]).item() == pytest.approx(0.999, abs=1e-7)
    twice = RowGrad(torch.tensor([0, 0]), torch.arange(3), 2, grad=torch.tensor([[0.1], [0.2]]))
    summed = reduce_grads([twice], 1, 1)
    assert steps(ADAGRAD, [0.1, 0.0, 1e-10], [1.0], summed.tolist()).item() == pytest.approx(0.9, abs=1e-6)


TORCH = [
    (SGD, [0.1, 0.01], lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)),
    (SGD_MOMENTUM, [0.1, 0.01, 0.9], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    (ADAGRAD, [0.1, 0.01, 1e-10], lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.01)),
    (ADAM, [0.01, 0.9, 0.999, 1e-8, 0.1, "t"], lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    (ADAMW, [0.01, 0.9, 0.999, 1e-8, 0.1, "t"], lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
]


@pytest.mark.parametrize(("rule", "scalars", "build"), TORCH, ids=[case[0].name for case in TORCH])
def test_equal_to_torch_optim(rule, scalars, build):
    weight, gradients = torch.randn(50), torch.randn(20, 50)
    parameter = torch.nn.Parameter(weight.double().clone())
    optimizer = build([parameter])
    for gradient in gradients:
        parameter.grad = gradient.double()
        optimizer.step()
    exact = reference_steps(rule, scalars, weight.tolist(), gradients.tolist())[-1]
    torch.testing.assert_close(exact, parameter.detach(), rtol=1e-9, atol=1e-9)
    got = steps(rule, scalars, weight.tolist(), gradients.tolist())[-1]
    torch.testing.assert_close(got.double(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_adam_moves_rows_whose_gradient_is_zero_but_not_untouched_ones():
    blocks = store_of(ADAM, 2, 3)
    old = blocks.read(torch.arange(2))
    view = RowGrad(torch.tensor([0]), torch.arange(2), 1, grad=torch.zeros(1, 3))
    two = torch.ones(2, dtype=torch.int32)
    fused_update(blocks, [PendingLookup(torch.arange(2), two * 0, two, [view])], ADAM, scalars_of(ADAM), step=1)
    new = blocks.read(torch.arange(2))
    assert (new["weight"][0] != old["weight"][0]).all()
    assert torch.equal(new["weight"][1], old["weight"][1])


def test_nothing_to_update():
    blocks = store_of(SGD, 3, 2)
    before = everything(blocks)
    assert (
        update_rows(blocks, torch.empty(0, dtype=torch.int64), torch.empty(0, 2), SGD, scalars_of(SGD), step=1).tolist()
        == []
    )
    update_rows(blocks, torch.tensor([-1, -1]), torch.ones(2, 2), SGD, scalars_of(SGD), step=1)
    assert torch.equal(everything(blocks), before)


def test_wrong_arguments_are_named():
    blocks, grads = store_of(ADAM, 3, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="scalars of adam must be"):
        update_rows(blocks, torch.arange(3), grads, ADAM, torch.zeros(1, 2, dtype=torch.float64), step=1)
    with pytest.raises(ValueError, match="needs the states"):
        update_rows(blocks, torch.arange(3), grads, FTRL, scalars_of(FTRL), step=1)
    with pytest.raises(ValueError, match="needs the states"):
        update_rows(blocks, torch.arange(3), grads, BY_ROW, scalars_of(BY_ROW), step=1)
    with pytest.raises(ValueError, match="grad must be"):
        update_rows(blocks, torch.arange(3), torch.zeros(3, 3), ADAM, scalars_of(ADAM), step=1)
    with pytest.raises(ValueError, match="table_of_row must be"):
        update_rows(blocks, torch.arange(3), grads, ADAM, scalars_of(ADAM), step=1, table_of_row=torch.arange(3))
    with pytest.raises(ValueError, match="pass keys"):
        update_rows(store_of(SGD, 3, 2, torch.bfloat16), torch.arange(3), grads, SGD, scalars_of(SGD), step=1)
    with pytest.raises(ValueError, match="float64, columns"):
        fold_scalars(SGD, torch.zeros(1, 2))


def test_content_is_checked_on_request():
    blocks, grads = store_of(SGD, 3, 2), torch.zeros(2, 2)  # capacity 8
    tables = torch.tensor([0, 2], dtype=torch.int32)
    with checks():
        update_rows(blocks, torch.tensor([7, -1]), grads, SGD, scalars_of(SGD), step=1)
        with pytest.raises(ValueError, match=r"rows must lie in -1\.\.7; got 0\.\.8"):
            update_rows(blocks, torch.tensor([0, 8]), grads, SGD, scalars_of(SGD), step=1)
        with pytest.raises(ValueError, match=r"table_of_row must lie in 0\.\.1; got 0\.\.2"):
            update_rows(blocks, torch.arange(2), grads, SGD, scalars_of(SGD), step=1, table_of_row=tables)
        with pytest.raises(ValueError, match="rows must be distinct"):
            update_rows(blocks, torch.tensor([4, 4]), grads, SGD, scalars_of(SGD), step=1)


def launches() -> None:
    rows = torch.arange(4)
    for dim, dtype in ((64, torch.float32), (64, torch.bfloat16), (128, torch.float32), (1024, torch.float32)):
        for rule in SCALARS:
            blocks = store_of(rule, 4, dim, dtype)
            view = RowGrad(rows, torch.arange(5), 4, grad=torch.ones(4, dim))
            seen = PendingLookup(rows, rows.int(), rows.int(), [view])
            fused_update_flags(blocks, [seen], rule, scalars_of(rule), step=1, keys=KEYS, impl="triton")
    update_rows(store_of(SGD, 4, 5), rows, torch.ones(4, 5), SGD, scalars_of(SGD), step=1, impl="triton")
    # every number 1, which Triton makes a constant
    for rule in (ROW_WISE_ADAGRAD, BY_ROW):
        blocks = RowBlocks(RowLayout(1, state=states_of(rule, 1)), shift=0)
        blocks.grow(1)
        update_rows(blocks, rows[:1], torch.ones(1, 1), rule, scalars_of(rule), step=1, impl="triton")
