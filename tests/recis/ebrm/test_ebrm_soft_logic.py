"""SoftLogicPool: numbers of section 9, its relaxation, what it refuses, and properties of the three logics."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.ebrm import SoftLogicPool
from recis.ebrm.soft_logic import POOLS, log1mexp, relevance_loss

LOGICS = tuple(POOLS)
TYPES = ("category", "brand", "colour")
TRUTHS = torch.tensor([0.9, 0.7, 0.95, 0.2, 0.6], dtype=torch.float64)  # item X
SHAPE = (torch.arange(3), torch.tensor([0, 2, 3, 5]), torch.tensor([0, 3]))


def pool_of(logic: Any = "product", types=TYPES, **options: Any) -> SoftLogicPool:
    return SoftLogicPool(types, logic=logic, **options).double()


@pytest.mark.parametrize(
    ("logic", "g", "r"),
    [
        ("product", [0.97, 0.95, 0.68], 0.62662),
        ("goedel", [0.9, 0.95, 0.6], 0.6),
        ("lukasiewicz", [1.0, 0.95, 0.8], 0.75),
    ],
)
def test_item_x(logic, g, r):
    out = pool_of(logic)(TRUTHS.logit(), *SHAPE)
    assert out.log_g.exp().tolist() == pytest.approx(g, abs=1e-5)
    assert out.r.item() == pytest.approx(r, abs=1e-5)
    if logic == "product":
        assert out.log_r.item() == pytest.approx(-0.467415, abs=1e-6)


@pytest.mark.parametrize(("a", "r"), [(1.0, 0.62662), (0.5, 0.77406), (0.0, 0.9215)])
def test_relaxing_colour(a, r):
    pool = pool_of()
    with torch.no_grad():
        pool.relaxation[2] = a
    assert pool(TRUTHS.logit(), *SHAPE).r.item() == pytest.approx(r, abs=1e-5)


@pytest.mark.parametrize("logic", LOGICS)
def test_boolean_limit(logic):
    cases = torch.tensor(list(product([0.0, 1.0], repeat=5)), dtype=torch.float64)
    slots = torch.cat([torch.tensor([0]), torch.tensor([2, 1, 2]).repeat(32).cumsum(0)])
    out = pool_of(logic)(cases.flatten().logit(), torch.arange(3).repeat(32), slots, torch.arange(0, 97, 3))
    want = [float((c1 or c2) and b and (k1 or k2)) for c1, c2, b, k1, k2 in cases.tolist()]
    assert out.r.tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("logic", LOGICS)
def test_de_morgan(logic):
    """OR(a) = 1 - AND(1 - a): one slot of five entities against five slots of one, 2,000 vectors."""
    truths = torch.rand(2000, 5, dtype=torch.float64)
    if logic == "lukasiewicz":
        truths = truths / 2.5  # both sides of the bound
    pool = pool_of(logic, ("t",))
    one = torch.zeros(2000, dtype=torch.int64)
    ors = pool(truths.logit().flatten(), one, torch.arange(0, 10001, 5), torch.arange(2001)).r
    ands = pool((-truths.logit()).flatten(), one.repeat(5), torch.arange(10001), torch.arange(0, 10001, 5)).r
    # sigmoid(logit(x)) and exp(log(x)) round: a few units in the last place of 1
    assert (1 - ors - ands).abs().max().item() < 2e-15 * 5


@pytest.mark.parametrize(
    ("label", "loss", "gradient"),
    [
        (1.0, 0.467415, [-0.02784, -0.02165, -0.05, -0.09412, -0.28235]),
        (0.0, 0.985159, [0.04671, 0.03633, 0.08391, 0.15795, 0.47386]),
    ],
)
def test_losses_and_their_gradients(label, loss, gradient):
    pool, logits = pool_of(), TRUTHS.logit().requires_grad_()

    def loss_of(z):
        return relevance_loss(pool(z, *SHAPE).log_r, torch.tensor([label], dtype=torch.float64)).sum()

    got = loss_of(logits)
    (grad,) = torch.autograd.grad(got, logits)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert grad.tolist() == pytest.approx(gradient, abs=1e-5)
    for entity in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[entity] = 1e-5
        difference = (loss_of(logits.detach() + step) - loss_of(logits.detach() - step)) / 2e-5
        assert difference.item() == pytest.approx(grad[entity].item(), abs=1e-8)


def test_saturated_logits_keep_their_gradient():
    logits = torch.tensor([40.0, -40.0], requires_grad=True)
    pool = SoftLogicPool(("a", "b"))
    log_r = pool(logits, torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([0, 2])).log_r
    log_r.sum().backward()
    assert log_r.item() == pytest.approx(-40.0, abs=1e-5)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert pool.relaxation.grad is not None
    assert pool.relaxation.grad.isfinite().all()
    assert pool.relaxation.grad.abs().max() > 1e16  # why a needs a clip group of its own


def test_the_worst_false_positive_keeps_its_gradient():
    log_r = torch.tensor([-1e-20, -1e-3, -50.0], requires_grad=True)
    loss = relevance_loss(log_r, torch.zeros(3))
    (grad,) = torch.autograd.grad(loss.sum(), log_r)
    assert loss.tolist() == pytest.approx([46.0517, 6.908, 0.0], abs=1e-3)
    assert grad.isfinite().all()
    assert grad[0] > 1e19
    assert log1mexp(torch.tensor([0.0])).item() == pytest.approx(-69.0776, abs=1e-3)


def test_relaxation_is_projected_and_hard_types_stay():
    pool = SoftLogicPool(TYPES, hard=("brand",))
    optimizer = torch.optim.SGD(pool.parameters(), lr=10.0)
    logits = torch.tensor([2.0, 1.0, -3.0, -2.0, -2.0])
    for sign in (1, -1, -1):  # up against 1 first, then down against 0
        optimizer.zero_grad()
        (sign * pool(logits, *SHAPE).log_r.sum()).backward()
        assert pool.relaxation.grad is not None
        assert pool.relaxation.grad[1] == 0
        optimizer.step()
    pool.project_()
    assert pool.relaxation.min() >= 0
    assert pool.relaxation.max() <= 1
    assert pool.relaxation[1] == 1
    assert pool.relaxation[2] < 1 or pool.relaxation[0] < 1
    assert not SoftLogicPool(TYPES, learn_relaxation=False).relaxation.requires_grad


def test_confidence_mixes_with_none():
    pool = pool_of(types=("brand",))
    logits, none = torch.tensor([0.9], dtype=torch.float64).logit(), torch.tensor([0.1], dtype=torch.float64).logit()
    args = (torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    out = pool(logits, *args, confidence=torch.tensor([0.25]), none_logits=none)
    assert out.r.item() == pytest.approx(0.25 * 0.9 + 0.75 * 0.1, abs=1e-12)


def test_none_entities_matter():
    """An unbranded item against a brand query: 0.0660 with none at 0.1, 0.6596 with the type left out."""
    none = TRUTHS.clone()
    none[2] = 0.1
    assert pool_of()(none.logit(), *SHAPE).r.item() == pytest.approx(0.0660, abs=1e-4)
    without = pool_of()(
        TRUTHS[[0, 1, 3, 4]].logit(), torch.tensor([0, 2]), torch.tensor([0, 2, 4]), torch.tensor([0, 2])
    )
    assert without.r.item() == pytest.approx(0.6596, abs=1e-4)


def test_what_is_refused():
    pool = SoftLogicPool(TYPES)
    z, (types, slots, items) = torch.zeros(5), SHAPE
    nan = z.clone()
    nan[3] = torch.nan
    for args, message in (
        ((nan, types, slots, items), r"entity_logits\[3\] is NaN"),
        ((z, types, torch.tensor([0, 3, 2, 5]), items), "slot_offsets must ascend from 0 to 5"),
        ((z, types, slots[:-1], items), "slot_offsets must ascend from 0 to 5"),
        ((z, types, slots.int(), items), "slot_offsets must be 1-D int64"),
        ((z, types, slots, torch.tensor([0, 4])), "item_offsets must ascend from 0 to 3"),
        ((z, torch.tensor([0, 3, 1]), slots, items), r"type_ids\[1\] is 3; ids are 0 to 2"),
        ((z, types[:2], slots, items), r"type_ids must be \[3\] int64"),
        ((z, types, torch.tensor([0, 2, 2, 5]), items), "slot 1 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(*args)
    options: dict[str, Any]
    for options, message in (
        ({"types": ()}, "at least one name"),
        ({"types": TYPES, "logic": "zadeh"}, "logic must be one of"),
        ({"types": TYPES, "hard": ("size",)}, "hard types must be among"),
    ):
        with pytest.raises(ValueError, match=message):
            SoftLogicPool(**options)


@st.composite
def items(draw):
    """One item: truths per slot, at least one each."""
    return draw(st.lists(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4), min_size=1, max_size=5))


def r_of(logic: str, slots: list[list[float]]) -> float:
    z = torch.tensor([s for slot in slots for s in slot], dtype=torch.float64).logit()
    offsets = torch.tensor([0, *(len(slot) for slot in slots)]).cumsum(0)
    pool = pool_of(logic, tuple("abcdef"))
    return pool(z, torch.arange(len(slots)), offsets, torch.tensor([0, len(slots)])).r.item()


@settings(max_examples=60, deadline=None)
@given(slots=items(), more=st.floats(0.001, 0.999), where=st.integers(0, 99))
def test_properties(slots, more, where):
    for logic in LOGICS:
        r, slot = r_of(logic, slots), where % len(slots)
        raised = [list(values) for values in slots]
        raised[slot][0] = max(raised[slot][0], more)
        assert r_of(logic, raised) >= r - 1e-12  # monotone in every s
        longer = [list(values) for values in slots]
        longer[slot].append(more)
        assert r_of(logic, longer) >= r - 1e-12  # one more acceptable value
        assert r_of(logic, [*slots, [more]]) <= r + 1e-12  # one more type
        assert r_of(logic, [values[::-1] for values in slots[::-1]]) == pytest.approx(r, abs=1e-6)
        assert r <= min(r_of(logic, [values]) for values in slots) + 1e-12  # AND <= min
        assert all(r_of(logic, [values]) >= max(values) - 1e-12 for values in slots)  # OR >= max
