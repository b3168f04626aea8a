"""Any split into batches and ranks, merged in any order, saved and loaded in between, gives the bytes of one process."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.metrics import BinnedAuc, Calibration, ExactAuc, Gauc, HitRate, LogLoss, Mrr, Ndcg, Ne, Recall

METRICS = [ExactAuc(), BinnedAuc(), Gauc(), LogLoss(), Ne(), Calibration(), Recall(3), Ndcg(3), HitRate(2), Mrr()]


def make_rows(seed: int, num_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "scores": np.where(rng.random(num_rows) < 0.5, rng.random(num_rows), rng.integers(0, 5, num_rows) / 4),
        "labels": (rng.random(num_rows) < 0.4).astype(np.float64),
        "weights": rng.choice([0.0, 0.1, 1.0, 3.7], num_rows),
        "groups": rng.integers(0, 12, num_rows) - 6,
    }


def update(metric, rows, index) -> None:
    metric.update(
        rows["scores"][index],
        rows["labels"][index],
        rows["weights"][index] if metric.uses_weights else None,
        rows["groups"][index] if metric.uses_groups else None,
    )


def equal_states(first, second) -> bool:
    if first.keys() != second.keys():
        return False
    tensors = {name: value for name, value in first.items() if isinstance(value, torch.Tensor)}
    return all(
        torch.equal(second[name], first[name]) and second[name].dtype == first[name].dtype
        if name in tensors
        else second[name] == first[name]
        for name in first
    )


def is_ranking(metric) -> bool:
    return metric.uses_groups and not isinstance(metric, Gauc)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_split_order_and_round_trip_do_not_matter(metric, data):
    num_rows = data.draw(st.integers(0, 120))
    rows = make_rows(data.draw(st.integers(0, 10**6)), num_rows)
    straight = metric.fresh()
    update(straight, rows, np.arange(num_rows))

    num_ranks = data.draw(st.integers(1, 3))
    rank_of = np.random.default_rng(num_rows).integers(0, num_ranks, num_rows)
    if is_ranking(metric):  # ties keep input order, so here a group stays on one rank; the next test splits groups
        rank_of = rows["groups"] % num_ranks
    ranks = []
    for rank in range(num_ranks):
        part = metric.fresh()
        own = np.flatnonzero(rank_of == rank)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(own)), max_size=3)))
        for batch in np.split(own, cuts):
            update(part, rows, batch)
            loaded = metric.fresh()  # save and load after every batch
            loaded.load_state_dict(part.state_dict())
            assert equal_states(loaded.state_dict(), part.state_dict())
            part = loaded
        ranks.append(part)

    values = []
    for order in (ranks, ranks[::-1]):
        merged = metric.fresh()
        for part in order:
            merged.merge(part)
        values.append(merged.compute())
        if not is_ranking(metric):
            assert equal_states(merged.state_dict(), straight.state_dict())
    np.testing.assert_array_equal(values, [straight.compute()] * 2)


@pytest.mark.parametrize("metric", [Recall(2), Ndcg(2), HitRate(1), Mrr()], ids=lambda metric: metric.key)
def test_groups_split_over_ranks_merge_alike_in_any_order(metric):
    rows = make_rows(4, 90)
    ranks = [metric.fresh() for _ in range(3)]
    for rank, part in enumerate(ranks):
        update(part, rows, np.arange(rank, 90, 3))
    values, states = [], []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = metric.fresh()
        for rank in order:
            merged.merge(ranks[rank])
        values.append(merged.compute())
        states.append(merged.state_dict())
    assert values[0] == values[1] == values[2]
    assert equal_states(states[0], states[1])
    assert equal_states(states[0], states[2])


@pytest.mark.parametrize("kind", [ExactAuc, Gauc, Mrr], ids=lambda kind: kind.__name__)
def test_spilling_changes_nothing(kind):
    rows = make_rows(9, 60_000)
    results = []
    for memory_mib in (1, 256):
        metric = kind(memory_mib=memory_mib)
        for start in range(0, 60_000, 9_000):
            update(metric, rows, slice(start, start + 9_000))
        again = kind(memory_mib=256)
        again.load_state_dict(metric.state_dict())
        assert again.compute() == metric.compute()
        results.append((metric._runs.is_spilled, metric.compute(), metric.state_dict()))
    assert [spilled for spilled, _, _ in results] == [True, False]
    assert results[0][1] == results[1][1]
    assert equal_states(results[0][2], results[1][2])


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_updates_after_compute_save_and_copy_count(metric):
    rows = make_rows(2, 60)
    straight, stepwise = metric.fresh(), metric.fresh()
    update(straight, rows, np.arange(60))
    for start in range(0, 60, 20):
        update(stepwise, rows, np.arange(start, start + 20))
        stepwise.compute()
        stepwise.state_dict()
    assert stepwise.compute() == straight.compute()
    copied = copy.deepcopy(straight)
    straight.reset()
    assert np.isnan(straight.compute())
    assert copied.compute() == stepwise.compute()


def test_kept_rows_do_not_alias_the_callers():
    scores, labels, groups = torch.tensor([0.1, 0.9]).double(), torch.tensor([0.0, 1.0]), torch.tensor([3, 3])
    for metric in (ExactAuc(), Gauc(), Mrr()):
        metric.update(scores, labels, groups=groups if metric.uses_groups else None)
    kept = [ExactAuc(), Gauc(), Mrr()]
    for metric in kept:
        metric.update(scores, labels, groups=groups if metric.uses_groups else None)
    scores.copy_(torch.tensor([0.9, 0.1]))
    labels.zero_()
    groups.copy_(torch.tensor([1, 2]))
    assert [metric.compute() for metric in kept] == [1.0, 1.0, 1.0]


def test_unlike_metrics_are_refused():
    with pytest.raises(ValueError, match="cannot merge"):
        Recall(3).merge(Recall(4))
    with pytest.raises(ValueError, match="cannot merge"):
        LogLoss().merge(Ne())
    metric = Recall(3)
    with pytest.raises(ValueError, match="into itself"):
        metric.merge(metric)
    with pytest.raises(ValueError, match="does not fit Recall"):
        metric.load_state_dict(Recall(4).state_dict())
    with pytest.raises(ValueError, match="does not fit Ne"):
        Ne().load_state_dict(LogLoss().state_dict())
    Recall(3, memory_mib=1).merge(Recall(3, memory_mib=2))  # memory is no part of the value


def test_damaged_states_are_refused():
    for metric, name, wrong in (
        (BinnedAuc(), "counts", torch.zeros(4, 3, dtype=torch.int64)),
        (Calibration(), "bins", torch.zeros(3, 70, dtype=torch.int64)),
        (LogLoss(), "loss", torch.zeros(70)),
        (Gauc(), "score", torch.zeros(0)),
    ):
        with pytest.raises(ValueError, match="must"):
            metric.load_state_dict(metric.state_dict() | {name: wrong})
