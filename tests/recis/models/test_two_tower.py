"""Two towers: the corrected softmax in plain float64, no false negatives, resumable draws, learning, settings."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.metrics import HitRate
from recis.models.losses import softmax_loss
from recis.models.sampling import HardNegatives, PopularNegatives, UniformNegatives, take_samples
from recis.models.synthetic import SyntheticClicks
from recis.models.two_tower import TwoTower, TwoTowerConfig, positive_score, synthetic, synthetic_catalogue
from recis.optim import SparseOptimizer
from recis.trainer.serialize import from_json, to_json

NEGATIVES = [None, UniformNegatives(7), PopularNegatives(7), HardNegatives(3, UniformNegatives(7))]


def config_with(negatives) -> TwoTowerConfig:
    return replace(synthetic(), negatives=negatives, catalogue=None if negatives is None else synthetic_catalogue)


def first_batch(size: int) -> Batch:
    return next(iter(SyntheticClicks(num_samples=max(size, 1), batch_size=max(size, 1))))


def reference(model: TwoTower, batch: Batch, places: Tensor | None, p: Tensor | None) -> list[list[float]]:
    """The candidates' corrected logits of each sample, the own item first; -inf left out."""
    tau = model.config.temperature
    users, items = model.user_vectors(batch).detach().double(), model.item_vectors(batch).detach().double()
    ids = batch.sparse["item_id"].flat_values.tolist()
    seen = {item: ids.count(item) / len(ids) for item in ids}  # after one step the stream is this batch
    known: list[int] = []
    candidates = [(item, items[j]) for j, item in enumerate(ids)]
    if places is not None:
        assert model.sampler is not None
        catalogue = model.sampler.catalogue
        known = catalogue.sorted_ids.tolist()
        drawn = model.item_vectors(catalogue.select(places)).detach().double()
        candidates += [(known[place], drawn[j]) for j, place in enumerate(places.tolist())]

    def expected(item: int) -> float:
        total = len(ids) * seen.get(item, 1 / len(ids))
        if p is not None and places is not None and item in known:
            total += len(places) * float(p[known.index(item)])
        return total

    rows = []
    for b, item in enumerate(ids):
        row = [float(users[b] @ items[b]) / tau - math.log(expected(item))]
        row += [float(users[b] @ v) / tau - math.log(expected(other)) for other, v in candidates if other != item]
        rows.append(row)
    return rows


@pytest.mark.parametrize("negatives", NEGATIVES, ids=repr)
def test_training_output_is_the_corrected_softmax(negatives):
    model = config_with(negatives).build()
    batch = first_batch(21)
    got = model(batch)
    draws: list[tuple[Tensor, Tensor]] = []
    if model.sampler is not None:
        again = config_with(negatives).build()
        assert again.sampler is not None
        draws.append(again.sampler.draw(model.frequency))  # the counts of the first step, the same draw
    model.eval()
    places, p = draws[0] if draws else (None, None)
    rows = reference(model, batch, places, p)
    ids = batch.sparse["item_id"].flat_values
    for b, row in enumerate(rows):
        mine = got[b][torch.isfinite(got[b])].tolist()
        assert mine[0] == pytest.approx(row[0], rel=1e-4, abs=1e-4)
        if isinstance(negatives, HardNegatives):
            in_batch = int((ids != ids[b]).sum())
            row = row[: 1 + in_batch] + sorted(row[1 + in_batch :], reverse=True)[:3]
        assert mine == pytest.approx(row, rel=1e-4, abs=1e-4)
    assert got.shape == (21, 1 + 21 + (0 if negatives is None else 3 if isinstance(negatives, HardNegatives) else 7))
    loss = softmax_loss(got, replace(batch, labels=torch.ones(21, 1)))
    want = sum(math.log(sum(math.exp(x - row[0]) for x in row)) for row in rows)
    if not isinstance(negatives, HardNegatives):
        assert float(loss.detach()) == pytest.approx(want, rel=1e-4)


def test_evaluation_gives_plain_cosines():
    model = synthetic().build().eval()
    batch = first_batch(9)
    users, items = model.user_vectors(batch), model.item_vectors(batch)
    torch.testing.assert_close(users.norm(dim=1), torch.ones(9))
    want = F.cosine_similarity(users, items)[:, None] / 0.2
    torch.testing.assert_close(model(batch), want)
    torch.testing.assert_close(positive_score(model(batch)), want.sigmoid())
    assert int(model.frequency.total) == 0
    assert model.sampler is not None
    assert int(model.sampler.num_draws) == 0
    plain = replace(synthetic(), normalize=False).build()
    assert not torch.allclose(plain.user_vectors(batch).norm(dim=1), torch.ones(9))


def test_bfloat16_autocast_keeps_products_in_float32():
    batch = first_batch(30)
    plain = config_with(None).build()
    plain(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        users, items = plain.user_vectors(batch), plain.item_vectors(batch)
        out = plain(batch)
    assert users.dtype == out.dtype == torch.float32
    want = (users @ items.T / 0.2)[0]
    correction = (30 * plain.frequency.share(batch.sparse["item_id"].flat_values)).log()
    finite = torch.isfinite(out[0, 1:])
    torch.testing.assert_close(out[0, 1:][finite], (want - correction)[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negatives", NEGATIVES, ids=repr)
@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(negatives, size):

    model = config_with(negatives).build()
    batch = first_batch(3)
    batch = replace(
        batch,
        sparse=take_samples(batch.sparse, torch.arange(size)),
        dense=batch.dense[:size],
        labels=torch.ones(size, 1),
        weights=torch.ones(size),
        num_samples=size,
    )
    out = model(batch)
    loss = softmax_loss(out, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if negatives is None:
        assert float(loss.detach()) == 0  # no other candidate
    assert model.eval()(batch).shape == (size, 1)


def train(model: TwoTower, source: SyntheticClicks) -> list[float]:
    dense = torch.optim.Adam(model.parameters(), lr=0.01)
    sparse = SparseOptimizer(model)
    losses = []
    for step, batch in enumerate(source, start=1):
        dense.zero_grad()
        loss = softmax_loss(model(batch), batch) / batch.labels.sum()
        loss.backward()
        dense.step()
        sparse.step()
        model.item_inputs.embeddings.end_step(step)
        losses.append(float(loss.detach()))
    return losses


def hit_rate(model: TwoTower) -> float:
    """Share of test clicks whose item is among the ten that the towers rank highest of 100."""
    model.eval()
    catalogue = synthetic_catalogue()
    metric = HitRate(10)
    with torch.no_grad():
        items = model.item_vectors(catalogue.select(torch.arange(len(catalogue))))
        batch = next(iter(SyntheticClicks(num_samples=2000, batch_size=2000, seed=1)))
        clicked = batch.labels[:, 0] > 0
        scores = (model.user_vectors(batch) @ items.T)[clicked]
        own = batch.sparse["item_id"].flat_values[clicked]
        labels = (own[:, None] == catalogue.sorted_ids).float()
        groups = torch.arange(len(own)).repeat_interleave(len(catalogue))
        metric.update(scores.flatten(), labels.flatten(), groups=groups)
    model.train()
    return metric.compute()


@pytest.mark.parametrize("negatives", [None, PopularNegatives(50)], ids=repr)
def test_learns_to_retrieve(negatives):
    torch.manual_seed(0)
    model = config_with(negatives).build()
    before = hit_rate(model)
    train(model, SyntheticClicks(num_samples=16_384))
    assert before < 0.15  # chance is .1
    assert hit_rate(model) > 0.2


def test_resumed_training_draws_and_counts_on():
    """Sampler and frequencies are in state_dict: the next step after loading equals the straight run's."""
    batches = list(SyntheticClicks(num_samples=60, batch_size=20))
    straight = config_with(PopularNegatives(7)).build()
    straight(batches[0])
    straight(batches[1])
    resumed = config_with(PopularNegatives(7)).build()
    resumed.load_state_dict(straight.state_dict())
    assert resumed.sampler is not None
    assert straight.sampler is not None
    want, got = straight.sampler.draw(straight.frequency), resumed.sampler.draw(resumed.frequency)
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])
    assert all(isinstance(value, Tensor) for value in straight.state_dict().values())


def test_config_round_trips_and_refuses():
    for negatives in NEGATIVES:
        config = config_with(negatives)
        assert from_json(json.loads(json.dumps(to_json(config)))) == config
    base = synthetic()
    for change, match in (
        ({"temperature": 0.0}, "temperature"),
        ({"catalogue": None}, "give both, or neither"),
        ({"item_key": "user_id"}, "must be a feature of the item tower"),
        ({"user": replace(base.user, features=("user_id", "item_id"))}, "cannot be in both towers"),
    ):
        with pytest.raises(ConfigError, match=match):
            replace(base, **change)
