"""Fuzzy pooling of entity logits: against the float64 reference, forward and gradients; the numbers of the EBRM spec."""

import itertools
from typing import Any

import pytest
import torch

from recis_kernels import checks
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.soft_logic import PRODUCT, SoftLogic, goedel_pool, lukasiewicz_pool, product_pool

POOLS = [product_pool, goedel_pool, lukasiewicz_pool]
IMPLS = ["numba", "triton"]
EVERY = [*IMPLS, "reference"]
ATOL = {torch.float32: 2e-5, torch.float64: 1e-10}

# item X of the spec, section 9: category {running shoes .9, sneakers .7}, brand {nike .95}, colour {red .2, black .6}
TRUTHS = torch.tensor([0.9, 0.7, 0.95, 0.2, 0.6], dtype=torch.float64)
SLOTS, ITEMS = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 3])


def _offsets(lengths: list[int]) -> torch.Tensor:
    return lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))


def _name(pool) -> str:
    return pool.__name__


def _values_and_grads(pool, logits, slots, items, **options) -> list[torch.Tensor]:
    leaves = [logits.clone().requires_grad_()]
    for name in ("relaxation", "none_logits"):
        if options.get(name) is not None:
            options[name] = options[name].clone().requires_grad_()
            leaves.append(options[name])
    out = pool(leaves[0], slots, items, **options)
    torch.manual_seed(3)
    upstream = [torch.rand(part.shape, dtype=part.dtype) + 0.5 for part in out]
    torch.autograd.backward(list(out), upstream)
    grads = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)  # None: nothing to pool
    return [*(part.detach() for part in out), *grads]


def _assert_like_reference(pool, impl, logits, slots, items, **options) -> None:
    got = _values_and_grads(pool, logits, slots, items, impl=impl, **options)
    want = _values_and_grads(pool, logits, slots, items, impl="reference", **options)
    assert len(got) == len(want) == 3 + ("relaxation" in options) + ("none_logits" in options)
    tolerance = ATOL[logits.dtype]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == logits.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance * 5, atol=tolerance)


@pytest.mark.parametrize("mixed", [False, True], ids=["sure", "mixed"])
@pytest.mark.parametrize("relaxed", [False, True], ids=["hard", "relaxed"])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("numba", torch.float32), ("numba", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
@pytest.mark.parametrize(
    ("slot_lengths", "item_lengths"),
    [
        ([], []),
        ([], [0, 0]),
        ([1], [1]),
        ([0, 0], [0, 2]),
        ([3, 1, 2, 1, 5, 1], [3, 0, 1, 2]),
        ([37], [1]),
        ([1, 2] * 15, [30]),
    ],
    ids=["empty", "no slots", "one", "empty slots", "mixed", "huge slot", "huge item"],
)
def test_matches_reference(pool, impl, dtype, slot_lengths, item_lengths, relaxed, mixed):
    slots, items = _offsets(slot_lengths), _offsets(item_lengths)
    num_slots, num_entities = len(slot_lengths), sum(slot_lengths)
    logits = 2 * torch.randn(num_entities, dtype=dtype)
    if pool is lukasiewicz_pool:  # few truths whose sum stays below 1, so that both sides of each bound are seen
        logits -= 2
    options: dict[str, Any] = {}
    if relaxed:
        options["relaxation"] = torch.rand(num_slots, dtype=dtype)
        options["relaxation"][::3] = 1
        options["relaxation"][1::4] = 0
        if pool is lukasiewicz_pool:
            options["relaxation"] /= max(1, num_slots)
    if mixed:
        options["confidence"] = 1 - 0.9 * torch.rand(num_entities, dtype=dtype)
        options["confidence"][::3] = 1
        options["none_logits"] = torch.randn(num_slots, dtype=dtype)
    _assert_like_reference(pool, impl, logits, slots, items, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
def test_more_items_than_a_block(pool, impl):
    slot_lengths, item_lengths = torch.randint(0, 3, (600,)), torch.full((300,), 2)
    slots, items = lengths_to_offsets(slot_lengths), lengths_to_offsets(item_lengths)
    logits = torch.randn(int(slots[-1])) + (2 if pool is lukasiewicz_pool else 0)
    _assert_like_reference(pool, impl, logits, slots, items)


@pytest.mark.parametrize("impl", EVERY)
def test_numbers_of_the_spec(impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    logits = TRUTHS.logit().to(dtype)

    def truths(pool, logits=logits, **options) -> tuple[list[float], float]:
        out = pool(logits, SLOTS, ITEMS, impl=impl, **options)
        return out.log_g.exp().tolist(), out.log_r.exp().item()

    # 1. the three logics
    for pool, g, r in (
        (product_pool, [0.97, 0.95, 0.68], 0.62662),
        (goedel_pool, [0.9, 0.95, 0.6], 0.6),
        (lukasiewicz_pool, [1.0, 0.95, 0.8], 0.75),
    ):
        got_g, got_r = truths(pool)
        assert got_g == pytest.approx(g, abs=1e-5)
        assert got_r == pytest.approx(r, abs=1e-5)
    # 4. interventions: red -> 1, black -> 0, nike -> 0
    red, black, nike = (TRUTHS.clone() for _ in range(3))
    red[3], black[4], nike[2] = 1, 0, 0
    assert truths(product_pool, red.logit().to(dtype))[1] == pytest.approx(0.9215, abs=1e-5)
    for pool, r in ((product_pool, 0.1843), (goedel_pool, 0.2), (lukasiewicz_pool, 0.15)):
        assert truths(pool, black.logit().to(dtype))[1] == pytest.approx(r, abs=1e-5)
        assert truths(pool, nike.logit().to(dtype))[1] == pytest.approx(0, abs=1e-9)
    # 7. relaxing colour
    for a, r in ((1.0, 0.62662), (0.5, 0.77406), (0.0, 0.9215)):
        assert truths(product_pool, relaxation=torch.tensor([1, 1, a], dtype=dtype))[1] == pytest.approx(r, abs=1e-5)


@pytest.mark.parametrize("impl", EVERY)
def test_gradients_of_the_spec(impl):
    """Section 9, 5: the loss -log r for y = 1, -log(1 - r) for y = 0; and dr / ds of section 9, 4."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    logits = TRUTHS.logit().to(dtype).requires_grad_()
    log_r = product_pool(logits, SLOTS, ITEMS, impl=impl).log_r
    assert -log_r.item() == pytest.approx(0.467415, abs=1e-5)
    (match,) = torch.autograd.grad(-log_r.sum(), logits, retain_graph=True)
    assert match.tolist() == pytest.approx([-0.02784, -0.02165, -0.05, -0.09412, -0.28235], abs=1e-5)
    miss_loss = -torch.log1p(-log_r.exp()).sum()
    assert miss_loss.item() == pytest.approx(0.985159, abs=1e-5)
    (miss,) = torch.autograd.grad(miss_loss, logits, retain_graph=True)
    assert miss.tolist() == pytest.approx([0.04671, 0.03633, 0.08391, 0.15795, 0.47386], abs=1e-5)
    (slope,) = torch.autograd.grad(log_r.exp().sum(), logits)
    slope_of_truth = slope.double() / (TRUTHS * (1 - TRUTHS))
    assert slope_of_truth.tolist() == pytest.approx([0.1938, 0.0646, 0.6596, 0.3686, 0.7372], abs=1e-4)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
def test_boolean_limit(pool, impl):
    """All 32 assignments of the item's five entities, saturated: each logic is (c1 or c2) and b and (k1 or k2)."""
    cases = list(itertools.product([0, 1], repeat=5))
    logits = torch.tensor(cases).flatten().float() * 60 - 30
    slots, items = _offsets([2, 1, 2] * 32), _offsets([3] * 32)
    want = [float((c1 or c2) and b and (k1 or k2)) for c1, c2, b, k1, k2 in cases]
    got = pool(logits, slots, items, impl=impl).log_r.exp()
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("pool", [product_pool, goedel_pool], ids=_name)
def test_saturated_logits(pool, impl):
    """z = 40 and -40 in two slots: log r = -40, finite; the false entity keeps its whole gradient."""
    logits = torch.tensor([40.0, -40.0], requires_grad=True)
    slots, items = torch.tensor([0, 1, 2]), torch.tensor([0, 2])
    log_r, log_g = pool(logits, slots, items, impl=impl)
    assert log_r.item() == pytest.approx(-40.0, abs=1e-4)
    assert log_g.tolist() == pytest.approx([0.0, -40.0], abs=1e-4)
    log_r.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
def test_floor(pool, impl):
    """An empty slot and a truth below 1e-30 have log 1e-30 and give their entities no gradient; no item slot: r = 1."""
    logits = torch.tensor([-80.0, 80.0], requires_grad=True)
    relaxation = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    slots, items = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 3])
    log_r, log_g = pool(logits, slots, items, relaxation=relaxation, impl=impl)
    assert log_r.tolist() == pytest.approx([-69.0776, -69.0776, 0.0, 0.0], abs=1e-3)
    assert log_g.tolist() == pytest.approx([-69.0776, -69.0776, 0.0], abs=1e-3)
    (log_r.sum() + log_g.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-30)
    assert relaxation.grad is not None
    assert relaxation.grad.isfinite().all()


@pytest.mark.parametrize("impl", EVERY)
def test_confidence_by_hand(impl):
    """An entity of truth 0.8 at confidence 0.25, none at 0.4: s = 0.2 + 0.3; it neither vetoes nor rescues alone."""
    logits, none = torch.tensor([0.8]).logit().requires_grad_(), torch.tensor([0.4]).logit().requires_grad_()
    slots, items = torch.tensor([0, 1]), torch.tensor([0, 1])
    options = {"confidence": torch.tensor([0.25]), "none_logits": none, "impl": impl}
    for pool in POOLS:
        log_r = pool(logits, slots, items, **options).log_r
        assert log_r.exp().item() == pytest.approx(0.5, abs=1e-6)
        # d log r / dz = c s (1 - s) / r
        grads = torch.autograd.grad(log_r.sum(), (logits, none))
        assert [grad.item() for grad in grads] == pytest.approx([0.25 * 0.16 / 0.5, 0.75 * 0.24 / 0.5], abs=1e-6)


@pytest.mark.parametrize("impl", EVERY)
def test_small_truths_keep_their_digits_when_mixed(impl):
    logits, none = torch.tensor([-40.0, 40.0]), torch.tensor([-40.0, 40.0])
    slots, items = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    out = product_pool(logits, slots, items, confidence=torch.tensor([0.5, 0.5]), none_logits=none, impl=impl)
    assert out.log_r.tolist() == pytest.approx([-40.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_goedel_ties_go_to_the_first(impl):
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0], requires_grad=True)
    log_r = goedel_pool(logits, torch.tensor([0, 3, 4]), torch.tensor([0, 2]), impl=impl).log_r
    log_r.sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
def test_non_contiguous_inputs(pool, impl):
    logits, none = torch.randn(8, 2)[:, 1], torch.randn(4, 2)[:, 0]
    slots, items = (
        torch.tensor([[0, 2, 5, 6, 8]] * 2).T.contiguous()[:, 1],
        torch.tensor([[0, 3, 4]] * 2).T.contiguous()[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in (logits, none, slots, items))
    options = {"none_logits": none, "confidence": torch.rand(8, 2)[:, 1] * 0.8 + 0.1}
    got = _values_and_grads(pool, logits, slots, items, impl=impl, **options)
    contiguous = {name: tensor.contiguous() for name, tensor in options.items()}
    plain = (logits.contiguous(), slots.contiguous(), items.contiguous())
    torch.testing.assert_close(got, _values_and_grads(pool, *plain, impl=impl, **contiguous))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pool", POOLS, ids=_name)
def test_nan_stays_where_it_is(pool, impl):
    logits = torch.tensor([1.0, torch.nan, 0.5, 0.2])
    log_r, log_g = pool(logits, torch.tensor([0, 1, 3, 4]), torch.tensor([0, 2, 3]), impl=impl)
    assert log_r.isnan().tolist() == [True, False]
    assert log_g.isnan().tolist() == [False, True, False]


def test_threads_do_not_change_a_bit():
    slots = lengths_to_offsets(torch.randint(0, 4, (9000,)))
    items, logits = torch.arange(0, 9001, 3), torch.randn(int(slots[-1]))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([_values_and_grads(pool, logits, slots, items, impl="numba") for pool in POOLS])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_wrong_inputs_are_refused():
    logits, slots, items = torch.zeros(4), torch.tensor([0, 2, 4]), torch.tensor([0, 2])
    sure, none = torch.ones(4), torch.zeros(2)
    bad: list[tuple[tuple, dict[str, Any], str]] = [
        ((logits[None], slots, items), {}, r"entity_logits must be \[E\]"),
        ((logits.bfloat16(), slots, items), {}, r"call .float\(\)"),
        ((logits, slots.int(), items), {}, r"slot_offsets must be \[S \+ 1\] int64"),
        ((logits, slots, items[:0]), {}, r"item_offsets must be \[I \+ 1\] int64"),
        ((logits, slots, items), {"relaxation": torch.ones(3)}, r"relaxation must be \[2\]"),
        ((logits, slots, items), {"relaxation": torch.ones(2).double()}, "relaxation must be"),
        ((logits, slots, items), {"confidence": sure}, "go together"),
        ((logits, slots, items), {"none_logits": none}, "go together"),
        ((logits, slots, items), {"confidence": sure[:3], "none_logits": none}, r"confidence must be \[4\]"),
        ((logits, slots, items.to("meta")), {}, "one device"),
        (
            (logits, slots, items),
            {"confidence": sure.clone().requires_grad_(), "none_logits": none},
            "confidence gets no gradient",
        ),
        ((logits.double(), slots, items), {"impl": "triton"}, "computes in float32"),
    ]
    for args, options, message in bad:
        with pytest.raises(ValueError, match=message):
            product_pool(*args, **options)
    wrong_content: list[tuple[tuple, dict[str, Any], str]] = [
        ((logits, torch.tensor([0, 3, 2]), items), {}, "slot_offsets must ascend from 0 to 4"),
        ((logits, slots, torch.tensor([1, 2])), {}, "item_offsets must ascend from 0 to 2"),
        ((logits, slots, torch.tensor([0, 3])), {}, "item_offsets must ascend from 0 to 2"),
        ((logits.log().sqrt(), slots, items), {}, r"entity_logits\[0\] is NaN"),
        ((logits, slots, items), {"relaxation": torch.tensor([0.5, 1.5])}, r"relaxation must be in \[0, 1\]"),
        ((logits, slots, items), {"confidence": sure - 1, "none_logits": none}, r"confidence must be in \(0, 1\]"),
    ]
    for args, options, message in wrong_content:
        with checks(), pytest.raises(ValueError, match=message):
            product_pool(*args, **options)


def test_op_is_a_node_of_torch_compile():
    logits, none = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    relaxation, sure = torch.rand(3, requires_grad=True), torch.rand(5)
    args = (logits, SLOTS, ITEMS, relaxation, sure, none, PRODUCT, "numba")
    torch.library.opcheck(torch.ops.recis.soft_logic.default, args)
    u, of_r, of_g = -torch.rand(3), torch.rand(1), torch.rand(3)
    tensors = [None if tensor is None else tensor.detach() for tensor in args[:6] if not isinstance(tensor, str | int)]
    torch.library.opcheck(torch.ops.recis.soft_logic_grad.default, (*tensors, u, of_r, of_g, PRODUCT, "numba"))
    for pool in POOLS:

        def run(logits, none, relaxation, pool: Any = pool) -> torch.Tensor:
            out: SoftLogic = pool(logits, SLOTS, ITEMS, relaxation=relaxation, confidence=sure, none_logits=none)
            return out.log_r.sum() + (out.log_g * torch.arange(3)).sum()

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaves = (logits, none, relaxation)
        want = [run(*leaves), *torch.autograd.grad(run(*leaves), leaves)]
        torch.testing.assert_close([compiled(*leaves), *torch.autograd.grad(compiled(*leaves), leaves)], want)


def launches() -> None:
    """Call every Triton kernel in each of its forms (see compile_kernels.py)."""
    logits, none = torch.randn(5, requires_grad=True), torch.randn(3)
    options: dict[str, Any] = {"relaxation": torch.rand(3), "confidence": torch.rand(5), "none_logits": none}
    for pool in POOLS:
        for given in ({}, options):
            pool(logits, SLOTS, ITEMS, impl="triton", **given).log_r.sum().backward()
