"""First values of rows: worked bit patterns, the loops against the tensor form, and what a fresh row holds."""

import math

import pytest
import torch

from recis_kernels import row_init as module
from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.philox import table_key
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_init import InitKind, InitSpec, admission_draws, init_rows, initial_values
from recis_kernels.row_init_triton import _sin_cos

KEYS = torch.tensor([table_key(7, "item"), table_key(7, "user")])
UNIFORM = InitSpec(InitKind.UNIFORM, -0.05, 0.05)
NORMAL = InitSpec(InitKind.NORMAL, 0.0, 1.0)
SPECS = [
    UNIFORM,
    InitSpec(InitKind.UNIFORM, 0.1, 0.7),
    InitSpec(InitKind.CONSTANT, 0.3),
    InitSpec(InitKind.NORMAL, 0.1, 0.3),
    InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, 0.5, 0.4),
]
IMPLS = pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
EXTREMES = torch.tensor([-(2**63), -2, -1, 0, 1, 42, 2**62, 2**63 - 1])


def ulp_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest distance in float32 steps of want, or of 2**-40 where those are larger."""
    step = torch.nextafter(want.abs(), torch.tensor(math.inf)) - want.abs()
    return float(((got.double() - want.double()).abs() / step.double().clamp(min=2.0**-40)).max())


@IMPLS
def test_uniform_bits(impl):
    ids, tables = torch.tensor([42, -1, 42]), torch.tensor([0, 0, 1])
    got = initial_values(ids, 4, KEYS, UNIFORM, tables=tables, impl=impl)
    want = [
        ["3d412550", "bcab9a83", "399a8000", "bd20887a"],
        ["3c93f5ea", "3d334bdf", "3cf82d47", "bd3153e7"],
        ["bba433e7", "bd114c73", "3d19d8c8", "3aabc19a"],
    ]
    assert [[f"{bits & 0xFFFFFFFF:08x}" for bits in row] for row in got.view(torch.int32).tolist()] == want
    decimals = torch.tensor([0.04715472, -0.02094770, 0.00029469, -0.03919265])
    torch.testing.assert_close(got[0], decimals, rtol=0, atol=5e-9)


@IMPLS
def test_normal_values(impl):
    got = initial_values(torch.tensor([42, -1]), 4, KEYS, NORMAL, impl=impl)
    want = torch.tensor(
        [[-0.06051764, 0.23252581, 0.91233587, 0.73633182], [0.81094044, -0.33449900, 0.60455024, 0.27100533]]
    )
    torch.testing.assert_close(got, want, rtol=0, atol=6e-9)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind.name}{spec.a}")
@pytest.mark.parametrize("dim", [1, 2, 7, 32, 65])
@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_loop_matches_tensor_form(impl, spec, dim):
    more = 90 if impl == "numba" else 7  # the interpreter is slow
    ids = torch.cat((EXTREMES, torch.randint(-(2**63), 2**63 - 1, (more,))))
    tables = torch.arange(ids.numel()) % 2
    got = initial_values(ids, dim, KEYS, spec, tables=tables, impl=impl)
    want = initial_values(ids, dim, KEYS, spec, tables=tables, impl="torch")
    if spec.kind in (InitKind.CONSTANT, InitKind.UNIFORM):
        assert got.equal(want)
    else:
        assert ulp_error(got, want) <= 1


def test_distributions():
    ids = torch.arange(20_000)
    uniform = initial_values(ids, 4, KEYS, InitSpec(InitKind.UNIFORM, 1.0, 3.0)).double()
    assert uniform.min() >= 1
    assert uniform.max() < 3
    assert abs(uniform.mean() - 2) < 0.01
    normal = initial_values(ids, 4, KEYS, InitSpec(InitKind.NORMAL, 0.5, 2.0)).double()
    assert abs(normal.mean() - 0.5) < 0.03
    assert abs(normal.std() - 2) < 0.03
    cut = initial_values(ids, 4, KEYS, InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, 1.0, 2.0)).double()
    assert cut.abs().max() <= 2
    assert abs(cut.std() - 0.8796) < 0.01  # of a standard normal cut at 2
    inside = normal.sub(0.5).div(2).abs() <= 2  # the first draw stays where it lies within the bound
    assert cut[inside].sub(normal.sub(0.5).div(2)[inside]).abs().max() < 1e-6


def test_a_tight_bound_clamps_the_eighth_attempt():
    got = initial_values(torch.arange(500), 4, KEYS, InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, 1.0, 0.1))
    assert got.abs().max() <= torch.tensor(0.1)
    clamped = (got.abs() == torch.tensor(0.1)).double().mean()
    assert abs(clamped - 0.9203**8) < 0.05  # P(|z| > 0.1) = 0.9203, eight times


LAYOUTS = {
    "f32": RowLayout(5, torch.float32, (("h", 1),)),
    "bf16-clock": RowLayout(33, torch.bfloat16, (("m", 33), ("v", 2)), clock=True),
    "bf16": RowLayout(4, torch.bfloat16),
}


@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda spec: f"{spec.kind.name}{spec.a}")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fresh_rows_match_reference_and_overwrite_old_ones(layout, spec):
    rows = torch.randperm(70)[:40]
    rows[7] = rows[31] = -1  # ids without a row: nothing is written for them
    ids, tables = torch.arange(40) - 20, torch.arange(40) % 2
    state_values = tuple(0.25 + k for k in range(len(layout.state)))
    stores = {}
    for impl in ("numba", "triton", "reference"):
        blocks = RowBlocks(layout, shift=4)
        blocks.grow(70)
        used = {name: torch.full_like(values, 77) for name, values in blocks.read(torch.arange(70)).items()}
        blocks.write(torch.arange(70), used)
        init_rows(
            blocks, rows, ids, KEYS, spec, tables=tables, state_values=state_values, step=9, clock_s=123, impl=impl
        )
        stores[impl] = blocks
    want = stores["reference"].read(torch.arange(80))
    for impl in ("numba", "triton"):
        got = stores[impl].read(torch.arange(80))
        for name, values in want.items():
            assert got[name].equal(values), (impl, name)
    taken = rows >= 0
    fresh = stores["numba"].read(rows[taken])
    weights = initial_values(ids, layout.dim, KEYS, spec, tables=tables).to(layout.dtype)
    assert fresh["weight"].equal(weights[taken])
    assert fresh["id"].equal(ids[taken])
    assert fresh["last_seen"].unique().tolist() == [9]
    assert fresh["count"].unique().tolist() == [0]
    for (name, _), value in zip(layout.state, state_values, strict=True):
        assert fresh[f"state.{name}"].unique().tolist() == [value]
    if layout.clock:
        assert fresh["last_seen_s"].unique().tolist() == [123]


@pytest.mark.parametrize("step", [2**31 + 5, -1, 2**40 + 3])
def test_steps_and_clocks_keep_their_low_32_bits(step):
    got = {}
    for impl in ("numba", "triton"):
        blocks = RowBlocks(LAYOUTS["bf16-clock"], shift=2)
        blocks.grow(4)
        init_rows(blocks, torch.tensor([3]), torch.tensor([8]), KEYS, UNIFORM, step=step, clock_s=step, impl=impl)
        got[impl] = blocks.read(torch.tensor([3]))
        assert got[impl]["last_seen"].tolist() == [(step + 2**31) % 2**32 - 2**31]
        assert got[impl]["last_seen_s"].tolist() == [(step + 2**31) % 2**32 - 2**31]


def test_normal_angles_where_sine_or_cosine_vanish():
    """u = 0, 1/4, 1/2, 3/4 and their neighbours: the float64 forms agree far below a float32 ulp."""
    words = torch.tensor([(quarter << 22) + near & 0xFFFFFF for quarter in range(4) for near in (-1, 0, 1)])
    got = torch.empty(2, 12, dtype=torch.float64)
    launch(_angle_kernel, (1,), words, got[0], got[1], 12, BLOCK=16)
    angle = words.double() * 2.0**-24 * (2.0 * math.pi)
    torch.testing.assert_close(got, torch.stack((angle.sin(), angle.cos())), rtol=1e-9, atol=0)


def launches() -> None:
    """Launch every kernel once or more, for compile_kernels.py."""
    ids, tables = torch.arange(5), torch.zeros(5, dtype=torch.int32)
    for spec in SPECS[1:]:
        for layout in (LAYOUTS["f32"], LAYOUTS["bf16-clock"], RowLayout(64)):
            initial_values(ids, layout.dim, KEYS, spec, tables=tables, impl="triton")
            blocks = RowBlocks(layout, shift=3)
            blocks.grow(8)
            init_rows(blocks, ids, ids, KEYS, spec, tables=tables, step=9, clock_s=7, impl="triton")
    admission_draws(ids, KEYS, 3, tables=tables, impl="triton")


def test_values_ignore_order_batch_and_threads():
    ids = torch.cat((EXTREMES, torch.randint(-(2**63), 2**63 - 1, (3000,))))
    whole = initial_values(ids, 16, KEYS, NORMAL)
    order = torch.randperm(ids.numel())
    assert initial_values(ids[order], 16, KEYS, NORMAL).equal(whole[order])
    assert torch.cat([initial_values(part, 16, KEYS, NORMAL) for part in ids.split(7)]).equal(whole)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert initial_values(ids, 16, KEYS, NORMAL).equal(whole)
    torch.set_num_threads(before)
    assert initial_values(ids, 3, KEYS, NORMAL).equal(whole[:, :3])  # a column ignores the width too


def test_state_defaults_to_zero_and_no_rows_is_fine():
    blocks = RowBlocks(RowLayout(2, state=(("m", 2), ("h", 1))), shift=2)
    blocks.grow(4)
    blocks.write(torch.tensor([3]), {"state.m": torch.ones(1, 2), "state.h": torch.ones(1, 1)})
    none = torch.tensor([], dtype=torch.int64)
    init_rows(blocks, none, none, KEYS, UNIFORM)
    assert blocks.read(torch.tensor([3]))["state.m"].tolist() == [[1, 1]]
    init_rows(blocks, torch.tensor([3]), torch.tensor([8]), KEYS, UNIFORM)
    got = blocks.read(torch.tensor([3]))
    assert got["state.m"].tolist() == [[0, 0]]
    assert got["state.h"].tolist() == [[0]]
    assert initial_values(none, 4, KEYS, UNIFORM).shape == (0, 4)


@jit
def _angle_kernel(words_ptr, sine_ptr, cosine_ptr, num_words, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + place, mask=place < num_words, other=0)
    sine, cosine = _sin_cos(words.to(tl.float64) * 5.960464477539063e-08 * 6.283185307179586)
    tl.store(sine_ptr + place, sine, mask=place < num_words)
    tl.store(cosine_ptr + place, cosine, mask=place < num_words)


def test_versions_draw_the_same_bits():
    ids, tables = torch.cat((EXTREMES, torch.randint(-(2**63), 2**63 - 1, (300,)))), torch.arange(308) % 2
    want = admission_draws(ids, KEYS, 2**30 + 9, tables=tables, impl="torch")
    for impl in ("numba", "triton"):
        assert admission_draws(ids, KEYS, 2**30 + 9, tables=tables, impl=impl).equal(want)


def test_ops_are_nodes_of_torch_compile():
    ids, rows = torch.arange(6), torch.tensor([3, 1, -1, 0, 7, 2])
    tables = torch.zeros(1, dtype=torch.int32)
    check = torch.library.opcheck
    check(module._initial_values_op, (ids, 5, KEYS, tables, 1, [-1.0, 1.0, math.inf], "numba"))
    check(module._draws_op, (ids, KEYS, tables, 5, "torch"))
    layout = RowLayout(5, torch.bfloat16, (("h", 2),))
    blocks = [torch.zeros(4, layout.row_bytes, dtype=torch.uint8) for _ in range(2)]
    op_args = (rows, ids, KEYS, tables, layout.key, 2, 1, [-1.0, 1.0, math.inf], [0.5], 3, 0, "numba")
    check(module._init_rows_op, (blocks, *op_args))

    stores = [RowBlocks(layout, shift=2) for _ in range(2)]
    for blocks in stores:
        blocks.grow(8)

    def run(blocks, ids, rows):
        init_rows(blocks, rows, ids, KEYS, UNIFORM, state_values=(0.5,), step=3)
        return initial_values(ids, 5, KEYS, UNIFORM) + admission_draws(ids, KEYS, 2)[:, None]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(stores[0], ids, rows).equal(run(stores[1], ids, rows))
    got, want = (blocks.read(torch.arange(8)) for blocks in stores)
    for name, values in want.items():
        assert got[name].equal(values), name
    assert got["weight"].any()


@IMPLS
def test_admission_draws(impl):
    first = admission_draws(torch.tensor([42, 43, 44, 45, -1]), KEYS, 1, impl=impl)
    want = torch.tensor([0.4825765, 0.7505842, 0.1079583, 0.6348057, 0.3257963], dtype=torch.float64)
    torch.testing.assert_close(first.double(), want, rtol=0, atol=5e-8)  # seven decimals are given
    second = admission_draws(torch.tensor([43, 45]), KEYS, 2, impl=impl)
    want = torch.tensor([0.4963373, 0.6676794], dtype=torch.float64)  # word aaed0941 >> 8, times 2**-24
    torch.testing.assert_close(second.double(), want, rtol=0, atol=5e-8)
    other = admission_draws(torch.tensor([42, 42]), KEYS, 1, tables=torch.tensor([0, 1]), impl=impl)
    assert other[0] == first[0]
    assert other[1] != first[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InitSpec(InitKind.UNIFORM, 1.0, 0.0), "low <= high"),
        (lambda: InitSpec(InitKind.NORMAL, 0.0, -1.0), "standard deviation is not negative"),
        (lambda: InitSpec(InitKind.CONSTANT, math.nan), "must be finite"),
        (lambda: InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, 1.0, 0.0), "bound must be positive"),
        (lambda: initial_values(torch.tensor([1.0]), 2, KEYS, UNIFORM), "ids must be int64"),
        (lambda: initial_values(torch.tensor([1]), 2, KEYS[:0], UNIFORM), "keys must be int64"),
        (lambda: initial_values(torch.tensor([1]), 2, KEYS, UNIFORM, tables=torch.tensor([0, 1])), "tables must be"),
    ],
)
def test_wrong_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_rows_and_states_are_named():
    blocks = RowBlocks(RowLayout(2, state=(("m", 2),)), shift=2)
    blocks.grow(4)
    ids = torch.tensor([1])
    with pytest.raises(ValueError, match="rows must be int64"):
        init_rows(blocks, torch.tensor([0, 1]), ids, KEYS, UNIFORM)
    with pytest.raises(ValueError, match=r"one value for each of \['m'\]; got \(1.0, 2.0\)"):
        init_rows(blocks, torch.tensor([0]), ids, KEYS, UNIFORM, state_values=(1.0, 2.0))
