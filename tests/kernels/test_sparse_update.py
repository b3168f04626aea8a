"""Row updates against float64 equations and torch.optim: all rules, dims, dtypes; metadata; rows that must not change."""

import pytest
import torch

from recis_kernels import checks
from recis_kernels.philox import table_key
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_grads import PendingLookup, RowGrad, reduce_grads, reduce_lookups
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
from recis_kernels.sparse_update import fused_update, update_rows

BY_ROW = UpdateRule("adam", ("m", "v"), ADAM.scalars, row_steps=True)
BY_ROW_TF = UpdateRule("adamw_tf", ("m", "v"), ADAM.scalars, row_steps=True)
# two tables per rule, with numbers of their own
SCALARS = {
    SGD: [[0.1, 0.0], [0.3, 0.02]],
    SGD_MOMENTUM: [[0.1, 0.01, 0.9], [0.2, 0.0, 0.5]],
    ADAGRAD: [[0.1, 0.01, 1e-10], [0.2, 0.0, 1e-8]],
    ROW_WISE_ADAGRAD: [[0.1, 0.01, 1e-8], [0.05, 0.0, 1e-8]],
    ADAM: [[0.01, 0.9, 0.999, 1e-8, 0.01, 3.0], [0.02, 0.8, 0.99, 1e-6, 0.0, 7.0]],
    ADAMW: [[0.01, 0.9, 0.999, 1e-8, 0.1, 3.0], [0.02, 0.8, 0.99, 1e-6, 0.0, 7.0]],
    ADAMW_TF: [[0.01, 0.9, 0.999, 1e-3, 0.01, 3.0], [0.02, 0.8, 0.99, 1e-6, 0.0, 7.0]],
    FTRL: [[0.1, 1.0, 0.05, 0.1], [0.2, 0.5, 0.0, 0.0]],
    BY_ROW: [[0.01, 0.9, 0.999, 1e-8, 0.0, 50.0], [0.02, 0.8, 0.99, 1e-6, 0.0, 50.0]],
    BY_ROW_TF: [[0.01, 0.9, 0.999, 1e-8, 0.01, 50.0], [0.02, 0.8, 0.99, 1e-6, 0.0, 50.0]],
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


def test_metadata_is_written_for_every_row_found():
    blocks = store_of(SGD, 30, 4)
    lookup = random_lookup(30, 4)
    before = everything(blocks)
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=77)
    found = lookup.rows >= 0
    assert lookup.counts[11] == 0  # looked up without a position of its own: kept by the caller for padding
    after = blocks.read(lookup.rows[found])
    assert (after["last_seen"] == 77).all()
    assert torch.equal(after["count"], lookup.rows[found].int() + lookup.counts[found])
    others = torch.ones(32, dtype=torch.bool).index_fill(0, lookup.rows[found], False)
    assert torch.equal(everything(blocks).view(32, -1)[others], before.view(32, -1)[others])
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=78, record_seen=False)
    assert torch.equal(blocks.read(lookup.rows[found])["last_seen"], after["last_seen"])
    assert torch.equal(blocks.read(lookup.rows[found])["count"], after["count"])


def test_count_saturates():
    blocks = store_of(SGD, 1, 1)
    blocks.write(torch.tensor([0]), {"count": torch.tensor([2**31 - 2], dtype=torch.int32)})
    lookup = PendingLookup(torch.tensor([0]), torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32))
    fused_update(blocks, [lookup], SGD, scalars_of(SGD), step=1)
    assert blocks.read(torch.tensor([0]))["count"].item() == 2**31 - 1


@pytest.mark.parametrize("impl", ["numba", "reference"])
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
