"""Adam for dense parameters against float64 and torch.optim: forms, dtypes, many tensors, equal bits of the versions."""

from typing import Any

import pytest
import torch

from recis_kernels.dense_adamw import dense_adamw
from recis_kernels.row_rules import ADAM, ADAMW, ADAMW_TF, SGD

RULES = [ADAM, ADAMW, ADAMW_TF]
LINE = [0.01, 0.9, 0.999, 1e-8, 0.1, 3.0]
IMPLS = ["triton", "numba", "reference"]
SHAPES = [(3,), (), (0, 4), (7, 300), (1,), (1024,), (5, 1025)]


def scalars_of(*lines):
    return torch.tensor(lines, dtype=torch.float64)


def model(dtype=torch.float32, grad_dtype=torch.float32, seed=0):
    """Return (params, grads, means, squares) of SHAPES; equal seeds give equal values."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(dtype):
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

    return drawn(dtype), drawn(grad_dtype), drawn(torch.float32), [v.square() for v in drawn(torch.float32)]


def updated(rule, scalars, *, impl, scale: Any = 1.0, **kind: Any):
    params, grads, means, squares = model(**kind)
    dense_adamw(params, grads, means, squares, rule, scalars, scale=scale, impl=impl)
    return [*params, *means, *squares]


@pytest.mark.parametrize("impl", ["triton", "numba"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_matches_float64(rule, impl):
    scale = torch.tensor([0.3])
    got = updated(rule, scalars_of(LINE), impl=impl, scale=scale)
    want = updated(rule, scalars_of(LINE), impl="reference", scale=scale)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_bfloat16_parameters_match_float64(impl):
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "grad_dtype": torch.bfloat16}
    got = updated(ADAMW, scalars_of(LINE), impl=impl, **kind)
    want = updated(ADAMW, scalars_of(LINE), impl="reference", **kind)
    for ours, exact in zip(got, want, strict=True):
        # fp32 arithmetic can put a weight on the other side of a rounding tie
        tolerance = 2**-7 if ours.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=1e-6)
    unequal = sum(
        int((ours != exact).sum()) for ours, exact in zip(got, want, strict=True) if ours.dtype == torch.bfloat16
    )
    assert unequal <= 3


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_triton_gives_the_bits_of_numba(rule, dtypes):
    """A line of scalars per tensor, weight decay of some."""
    lines = scalars_of(*([0.01 * (i + 1), 0.9, 0.99, 1e-6, 0.1 * (i % 2), 1.0 + i] for i in range(len(SHAPES))))
    kind = {"dtype": dtypes[0], "grad_dtype": dtypes[1], "scale": 0.7}
    got, want = (updated(rule, lines, impl=impl, **kind) for impl in ("triton", "numba"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_dtypes_may_differ_between_tensors():
    results = []
    for impl in ("triton", "numba"):
        params = [torch.ones(5), torch.ones(6, dtype=torch.bfloat16), torch.ones(7)]
        grads = [torch.full((5,), 0.5), torch.full((6,), 0.25), torch.full((7,), 2.0, dtype=torch.bfloat16)]
        means, squares = ([torch.zeros(size) for size in (5, 6, 7)] for _ in range(2))
        dense_adamw(params, grads, means, squares, ADAMW, scalars_of([0.1, 0.9, 0.999, 1e-8, 0.0, 1.0]), impl=impl)
        for param in params:
            torch.testing.assert_close(param.float(), torch.full(param.shape, 0.9), rtol=2**-8, atol=0)
        results.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl):
    """w = 1, g = .5, first step: m / (1 - b1) = g and v / (1 - b2) = g^2, so w = (1 - lr wd) - lr; TF: (1 - wd) - lr."""
    for rule, want in ((ADAMW, 1 - 0.1 * 0.2 - 0.1), (ADAMW_TF, 1 - 0.2 - 0.1)):
        w, g, m, v = torch.ones(1), torch.full((1,), 0.5), torch.zeros(1), torch.zeros(1)
        dense_adamw([w], [g], [m], [v], rule, scalars_of([0.1, 0.9, 0.999, 1e-12, 0.2, 1.0]), impl=impl)
        assert w.item() == pytest.approx(want, abs=1e-6)
        assert m.item() == pytest.approx(0.05, abs=1e-7)
        assert v.item() == pytest.approx(0.00025, abs=1e-9)


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_ties_of_bfloat16_weights_go_to_even(impl):
    """With beta = eps = 0 a gradient of -1 adds lr = 2**-8: 1 and 1 + 2**-7 move to the middle of two bf16 numbers."""
    w, g = torch.tensor([1.0, 1 + 2**-7], dtype=torch.bfloat16), -torch.ones(2, dtype=torch.bfloat16)
    m, v = torch.zeros(2), torch.zeros(2)
    dense_adamw([w], [g], [m], [v], ADAMW, scalars_of([2**-8, 0.0, 0.0, 0.0, 0.0, 1.0]), impl=impl)
    assert w.tolist() == [1.0, 1 + 2 * 2**-7]


def test_eps_stands_inside_or_outside_the_correction():
    """g = eps = 1e-8, first step, A36: AdamW halves its step, TensorFlow's form takes 1 / (1 + 1 / sqrt(.001)) of it."""
    for rule, want in ((ADAMW, 0.9995), (ADAMW_TF, 0.99996935)):
        w, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
        dense_adamw([w], [torch.full((1,), 1e-8)], [m], [v], rule, scalars_of([1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0]))
        assert w.item() == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("impl", ["triton", "numba"])
@pytest.mark.parametrize("rule", [ADAM, ADAMW], ids=["adam", "adamw"])
def test_five_steps_as_torch(rule, impl):
    params, _, means, squares = model()
    for state in (*means, *squares):
        state.zero_()
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    build = {ADAM: torch.optim.Adam, ADAMW: torch.optim.AdamW}[rule]
    optimizer = build(theirs, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    for t in range(1, 6):
        grads = model(seed=t)[1]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        line = scalars_of([0.01, 0.9, 0.99, 1e-6, 0.1, float(t)])
        dense_adamw(params, grads, means, squares, rule, line, impl=impl)
    for ours, param in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, param.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's: infinity over infinity
@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_nan_and_infinity_stay(impl):
    grad = torch.tensor([torch.nan, torch.inf, 1.0])
    w, m, v = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(3)
    dense_adamw([w], [grad], [m], [v], ADAMW, scalars_of(LINE), impl=impl)
    assert w.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_strided_gradients_and_odd_addresses(impl):
    storage = torch.ones(40)
    w, m, v = storage[1:8], torch.zeros(9)[2:], torch.zeros(8)[1:]
    grad = torch.linspace(-1, 1, 14)[::2]
    want = [torch.ones(7), torch.zeros(7), torch.zeros(7)]
    dense_adamw([want[0]], [grad.clone()], [want[1]], [want[2]], ADAMW, scalars_of(LINE), impl="numba")
    dense_adamw([w], [grad], [m], [v], ADAMW, scalars_of(LINE), impl=impl)
    assert torch.equal(w, want[0])
    assert torch.equal(storage[8:], torch.ones(32))


def test_threads_change_nothing():
    results = []
    before = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        torch.manual_seed(1)
        w, g, m, v = (torch.rand(200_000) for _ in range(4))
        dense_adamw([w], [g], [m], [v], ADAMW, scalars_of(LINE))
        results.append(w)
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_autograd_sees_the_change():
    w = torch.ones(2, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        dense_adamw([w], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], ADAMW, scalars_of(LINE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_op_is_known_to_torch(impl):
    params, grads, means, squares = model()
    args = (params, grads, means, squares, "adamw", scalars_of(LINE), torch.ones(1), impl)
    torch.library.opcheck(torch.ops.recis.dense_adamw.default, args)

    def run(params, grads, means, squares):
        dense_adamw(params, [grad * 2 for grad in grads], means, squares, ADAMW, scalars, impl=impl)

    scalars, results = scalars_of(LINE), []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        given = model()
        function(*given)
        results.append([*given[0], *given[2], *given[3]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_wrong_arguments_are_named():
    good: dict[str, Any] = {name: [torch.ones(2)] for name in ("params", "grads", "means", "squares")}
    line = scalars_of(LINE)

    def call(rule=ADAMW, scalars=line, **change: Any):
        dense_adamw(**(good | change), rule=rule, scalars=scalars)

    with pytest.raises(ValueError, match="takes the rules"):
        call(rule=SGD)
    with pytest.raises(ValueError, match=r"equally many; got \[1, 0, 1, 1\]"):
        call(grads=[])
    with pytest.raises(ValueError, match="1 or 1 lines"):
        call(scalars=line.expand(2, -1))
    with pytest.raises(ValueError, match=r"grads\[0\] must be \(2,\)"):
        call(grads=[torch.ones(3)])
    with pytest.raises(ValueError, match=r"means\[0\] must be \(2,\) torch.float32 on cpu; got \(2,\) torch.bfloat16"):
        call(means=[torch.ones(2, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match=r"squares\[0\] must be contiguous; got strides \(2,\)"):
        call(squares=[torch.ones(4)[::2]])
    with pytest.raises(ValueError, match="float64, columns"):
        call(scalars=line.float())
    dense_adamw([], [], [], [], ADAMW, line)


def launches() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for grad_dtype in (torch.float32, torch.bfloat16):
            updated(ADAMW, scalars_of(LINE), impl="triton", dtype=dtype, grad_dtype=grad_dtype)
    w, g, m, v = (torch.ones(1) for _ in range(4))
    dense_adamw([w], [g], [m], [v], ADAMW, scalars_of(LINE), impl="triton")
