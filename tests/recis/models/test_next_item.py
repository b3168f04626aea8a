"""SASRec, HSTU and the retrieval head as models: the loss in plain float64, the sampled Z, ranking, causality, settings."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from recis.embedding import Feature, TableConfig
from recis.errors import ConfigError
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models import hstu, sasrec
from recis.models.din import Interest
from recis.models.next_item import NextItem, next_item_loss, next_item_score
from recis.models.retrieval_head import FullSoftmax, SampledSoftmax
from recis.models.sampling import HardNegatives, PopularNegatives, UniformNegatives
from recis.models.synthetic_sequences import SyntheticSequences, item_ids
from recis.trainer.serialize import from_json, to_json

SOFTMAXES = [
    FullSoftmax(temperature=0.7),
    SampledSoftmax(UniformNegatives(30)),
    SampledSoftmax(PopularNegatives(30), temperature=0.7),
    SampledSoftmax(HardNegatives(5, UniformNegatives(30))),
]


def first_batch(size: int = 9):
    return next(iter(SyntheticSequences(num_samples=size, batch_size=size)))


def cut(batch, keep):
    """The batch with only the first keep(n) of the n items of each history."""
    items, times = batch.sparse["items"].to_lists(), batch.extras["times"].to_lists()
    sparse = {name: batch.sparse[name] for name in batch.sparse.keys}
    sparse["items"] = JaggedTensor.from_lists([row[: keep(len(row))] for row in items], dtype=torch.int64)
    shorter = JaggedTensor.from_lists([row[: keep(len(row))] for row in times], dtype=torch.int64)
    return replace(batch, sparse=KeyedJaggedTensor.from_jagged(sparse), extras={"times": shorter})


def built(module, softmax=None) -> NextItem:
    config = module.synthetic()
    return replace(config, softmax=softmax or config.softmax).build()


@pytest.mark.parametrize("module", [sasrec, hstu], ids=["sasrec", "hstu"])
def test_loss_is_that_of_every_next_item(module):
    model, batch = built(module, FullSoftmax(temperature=0.7)), first_batch()
    batch = replace(batch, weights=torch.rand(9))
    model(batch)  # rows for all items
    model.eval()
    states, offsets = model.states(batch)
    states = states.detach()
    words, ids = model.head.all_vectors().double(), model.head.catalogue.sorted_ids.tolist()
    rows = batch.sparse["items"].to_lists()
    want, spans = [], list(pairwise(offsets.tolist()))
    for row, (lo, hi) in zip(rows, spans, strict=True):
        assert hi - lo == len(row) + 1
        log_prob = (states[lo : hi - 1].double() @ words.T / 0.7).log_softmax(1)
        want.append(sum(float(log_prob[t, ids.index(item)]) for t, item in enumerate(row)))
    out = model(batch)
    assert out[:, 0].tolist() == pytest.approx(want, rel=1e-5)
    assert out[:, 1].tolist() == [len(row) for row in rows]
    assert float(next_item_loss(out, batch)) == pytest.approx(
        -sum(w * x for w, x in zip(batch.weights.tolist(), want, strict=True))
    )
    assert next_item_score(out)[:, 0].tolist() == pytest.approx(
        [x / max(len(r), 1) for x, r in zip(want, rows, strict=True)]
    )
    model.train()
    for drop in model.modules():
        if isinstance(drop, torch.nn.Dropout):
            drop.p = 0.0
    assert float(next_item_loss(model(batch), batch).detach()) == pytest.approx(
        float(next_item_loss(out, batch)), rel=1e-5
    )


@pytest.mark.parametrize("softmax", SOFTMAXES[1:], ids=["uniform", "popular", "hard"])
def test_sampled_loss_in_float64(softmax):
    head, states = built(hstu, softmax).head, torch.randn(7, 16, requires_grad=True)
    targets, weights = item_ids(torch.tensor([0, 1, 1, 5, 99, 3, 0])), torch.rand(7)
    again = built(hstu, softmax).head
    got = head.loss(states, targets, weights)
    assert again.frequency is not None
    assert again.sampler is not None
    again.frequency.observe(targets)
    drawn, p = again.sampler.draw(again.frequency)  # the same draw
    vectors, ids = head.all_vectors().double(), head.catalogue.sorted_ids
    total = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(targets):
        scores = vectors @ states[t].double() / softmax.temperature
        own = scores[int((ids == target).nonzero())]
        others = [scores[j] - torch.log(len(drawn) * p[j]) for j in drawn if ids[j] != target]
        if isinstance(softmax.negatives, HardNegatives):
            others = sorted(others, reverse=True)[:5]
        total = total + weights[t].double() * (torch.stack([own, *others]).logsumexp(0) - own)
    assert float(got.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    got_grad, want_grad = torch.autograd.grad(got, states)[0], torch.autograd.grad(total, states)[0]
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("negatives", [UniformNegatives(50), PopularNegatives(50)], ids=repr)
def test_the_sampled_z_is_right_in_expectation(negatives):
    """Mean over draws of the sum that stands for Z, against Z: within 4 standard errors."""
    model = built(hstu, SampledSoftmax(negatives))
    head, state = model.head, 3 * torch.randn(1, 16)
    target = item_ids(torch.tensor([4]))
    with torch.no_grad():
        scores = head.all_vectors() @ state[0]
        own = scores[head.catalogue.find(target)[0]]
        seen = head.frequency
        assert seen is not None
        seen.observe(item_ids(torch.randint(0, 100, (2000,)).square() // 100))
        draws = torch.stack([(head.loss(state, target, torch.ones(1)) + own[0]).exp() for _ in range(400)])
    assert abs(float(draws.mean() - scores.exp().sum())) < 4 * float(draws.std()) / 20


def test_unknown_targets_count_nothing():
    for softmax in SOFTMAXES:
        head, states = built(sasrec, softmax).head, torch.randn(2, 16, requires_grad=True)
        loss = head.loss(states, torch.tensor([7, 8]), torch.ones(2))
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, states)[0].any()
        assert head.log_prob(states, torch.tensor([7, 8])).tolist() == [0, 0]


def test_best_items_are_those_of_all_scores(monkeypatch):
    monkeypatch.setattr("recis.models.retrieval_head.SCORES_AT_ONCE", 250)  # two states at a time
    model, batch = built(sasrec), first_batch()
    model(batch)
    model.eval()
    states = model.user_states(batch).detach()
    scores = states.double() @ model.head.all_vectors().double().T
    ids, found = model.best(batch, 5)
    torch.testing.assert_close(found.double(), scores.topk(5).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(ids, model.head.catalogue.sorted_ids[scores.topk(5).indices])
    new, _ = model.best(batch, 60, new_only=True)
    for row, seen in zip(new.tolist(), batch.sparse["items"].to_lists(), strict=True):
        assert len(set(row)) == 60
        assert not set(row) & set(seen)
    assert model.best(first_batch(1), 3)[0].shape == (1, 3)
    with pytest.raises(ConfigError, match=r"k must lie in \[1, 100\]"):
        model.best(batch, 101)


@pytest.mark.parametrize("module", [sasrec, hstu], ids=["sasrec", "hstu"])
def test_a_later_item_changes_no_earlier_state(module):
    model, batch = built(module), first_batch()
    model(batch)
    model.eval()
    whole, offsets = model.states(batch)
    part, shorter = model.states(cut(batch, lambda n: n // 2))
    for (lo, _), (a, b) in zip(pairwise(offsets.tolist()), pairwise(shorter.tolist()), strict=True):
        torch.testing.assert_close(part[a:b], whole[lo : lo + b - a], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softmax", SOFTMAXES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("module", [sasrec, hstu], ids=["sasrec", "hstu"])
def test_empty_histories_and_batches(module, softmax):
    model = built(module, softmax)
    empty = cut(first_batch(3), lambda n: 0)
    loss = model(empty)
    loss.backward()
    assert float(loss.detach()) == 0
    model.eval()
    assert model.best(empty, 4)[0].shape == (3, 4)
    assert model(empty).tolist() == [[0, 0]] * 3
    assert torch.equal(*model.user_states(empty)[:2])  # the learned start


def test_bfloat16_autocast_stays_close():
    for module in (sasrec, hstu):
        model, batch = built(module, FullSoftmax()), first_batch()
        model(batch)
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(batch)
        torch.testing.assert_close(low, model(batch), rtol=0.05, atol=0.3)


def test_settings_round_trip_and_refusals():
    for module in (sasrec, hstu):
        config = module.synthetic()
        assert from_json(json.loads(json.dumps(to_json(config)))) == config
    base = sasrec.synthetic()
    with pytest.raises(ConfigError, match="temperature must be finite and above 0"):
        FullSoftmax(0.0)
    with pytest.raises(ConfigError, match="pair up feature by feature"):
        replace(base, history=Interest(target=("item_id",), sequence=("items", "next_items")))
    with pytest.raises(ConfigError, match="no table has the feature 'item'; did you mean"):
        replace(base, history=Interest(target=("item",), sequence=("items",))).build()
    apart = (
        TableConfig(name="a", features=(Feature("items", "none"),)),
        TableConfig(name="b", features=(Feature("item_id", "none"),)),
    )
    with pytest.raises(ConfigError, match="must share a table"):
        replace(base, tables=apart).build()
    model = built(hstu)
    batch = first_batch()
    with pytest.raises(ConfigError, match="times 'times' must be an extra"):
        model(replace(batch, extras={}))
    times = cut(batch, lambda n: n // 2).extras
    with pytest.raises(ValueError, match="one entry per item"):
        model(replace(batch, extras=times))
