"""Speed of first values: whole rows into row blocks, and values alone, for each initializer.

    make bench, or: pytest benchmarks/test_kernel_row_init.py --benchmark-json=out.json

Peers fill a dense float32 matrix of the same size in place with torch's sequential generator: it draws from a state, not
from the id, so it could not give an id the same row on every rank and device; it is the least work for such numbers.
"""

from functools import partial

import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.philox import table_key
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_init import InitKind, InitSpec, admission_draws, init_rows, initial_values

NUM_ROWS = 65_536
KEYS = torch.tensor([table_key(7, "item")])
SPECS = {
    "constant": InitSpec(InitKind.CONSTANT, 0.3),
    "uniform": InitSpec(InitKind.UNIFORM, -0.05, 0.05),
    "normal": InitSpec(InitKind.NORMAL, 0.0, 0.02),
    "truncated normal": InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, 0.02, 0.04),
}
FILLS = {
    "constant": lambda out: out.fill_(0.3),
    "uniform": lambda out: out.uniform_(-0.05, 0.05),
    "normal": lambda out: out.normal_(0.0, 0.02),
    "truncated normal": lambda out: torch.nn.init.trunc_normal_(out, 0.0, 0.02, -0.04, 0.04),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("kind", SPECS)
def test_init_rows(benchmark, kind, dim, dtype):
    """Weights, Adam's two state vectors and the metadata of new rows, in random order."""
    spec, layout = SPECS[kind], RowLayout(dim, dtype, (("m", dim), ("v", dim)))
    blocks = RowBlocks(layout)
    blocks.grow(NUM_ROWS)
    rows, ids = torch.randperm(NUM_ROWS), torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,))
    dense = torch.empty(NUM_ROWS, dim)

    def ours() -> None:
        init_rows(blocks, rows, ids, KEYS, spec, step=3)

    ours()
    got = blocks.read(rows[:500])
    assert got["weight"].equal(initial_values(ids[:500], dim, KEYS, spec).to(dtype))
    assert got["id"].equal(ids[:500])
    compare(
        benchmark,
        case=f"init {NUM_ROWS} rows D={dim} {dtype} {kind}, Adam state",
        ours="numba",
        impls={"numba": ours, "numba, 1 thread": at_threads(1, ours), "torch fill": partial(FILLS[kind], dense)},
        bytes_moved=NUM_ROWS * (layout.weight_bytes + 4 * layout.state_width + 16 + 16),  # row and id are read
        items=NUM_ROWS,
    )


@pytest.mark.parametrize("kind", SPECS)
def test_initial_values(benchmark, kind):
    dim, spec = 64, SPECS[kind]
    ids, dense = torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,)), torch.empty(NUM_ROWS, 64)
    got, want = (initial_values(ids[:500], dim, KEYS, spec, impl=impl) for impl in ("numba", "torch"))
    torch.testing.assert_close(got, want, rtol=2**-22, atol=1e-12)
    compare(
        benchmark,
        case=f"initial_values {NUM_ROWS} x {dim} {kind}",
        ours="numba",
        impls={
            "numba": lambda: initial_values(ids, dim, KEYS, spec),
            "numba, 1 thread": at_threads(1, lambda: initial_values(ids, dim, KEYS, spec)),
            "torch fill": partial(FILLS[kind], dense),
        },
        bytes_moved=NUM_ROWS * (8 + 4 * dim),
        items=NUM_ROWS,
    )


def test_admission_draws(benchmark):
    ids = torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,))
    draws = admission_draws(ids, KEYS, 3)
    assert draws.equal(admission_draws(ids, KEYS, 3, impl="torch"))
    assert abs(float(draws.double().mean()) - 0.5) < 0.01
    compare(
        benchmark,
        case=f"admission_draws {NUM_ROWS}",
        ours="numba",
        impls={"numba": lambda: admission_draws(ids, KEYS, 3), "torch.rand": lambda: torch.rand(NUM_ROWS)},
        bytes_moved=NUM_ROWS * 12,
        items=NUM_ROWS,
    )
