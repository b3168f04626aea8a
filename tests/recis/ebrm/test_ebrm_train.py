"""Both stages of training: losses and gradients against float64 formulas, clips, schedules, determinism, best kept."""

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from ebrm_training import CONFIG, QUERIES, ROWS, SCHEMA, Bilinear, model_of, pairs_of
from torch import nn

from recis.ebrm import SoftLogicPool
from recis.ebrm.config import with_comparators
from recis.ebrm.descent import Descent, StepConfig, clip_, rate
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.pairs import QIPairs, score_pairs
from recis.ebrm.pretrain import batches, merge_rows, pretrain, qe_loss, type_priors
from recis.ebrm.train import QIConfig, qe_weight_at, query_batches, stage_b_loss, train
from recis.errors import ConfigError, DataError


def test_rows_of_one_pair_are_merged_without_changing_the_loss():
    rows = [
        QERow(query="Smeg  Fridge", entity="brand:smeg", y=1, w=1.0),
        QERow(query="lg", entity="brand:lg", y=0, w=0.5),
        QERow(query="smeg fridge", entity="brand:smeg", y=0, w=0.25),
    ]
    table = merge_rows(rows)
    assert table.pairs == (("smeg fridge", "brand:smeg"), ("lg", "brand:lg"))
    np.testing.assert_allclose(table.y, [0.8, 0.0], rtol=1e-6)
    assert table.w.tolist() == [1.25, 0.5]
    z = torch.tensor([0.7, -1.2], dtype=torch.float64)
    one_by_one = [(0.7, 1, 1.0), (-1.2, 0, 0.5), (0.7, 0, 0.25)]
    want = sum(w * math.log1p(math.exp(z if y == 0 else -z)) for z, y, w in one_by_one) / 1.75
    got = qe_loss(z, torch.from_numpy(table.y).double(), torch.from_numpy(table.w).double())
    assert float(got) == pytest.approx(want, rel=1e-7)
    with pytest.raises(DataError, match="query must not be empty"):
        merge_rows([QERow(query="  ", entity="brand:lg", y=0)])
    assert len(merge_rows([])) == 0


def test_priors_are_weighted_means_by_type():
    priors = type_priors(merge_rows(ROWS)).logits
    p = (0.5 + 1 + 0.5 + 0.5) / (1 + 2 + 1.0)  # of weight 1 + 1 + .5 + .5, of which 1 + .5 + .5 positive
    assert priors == {"brand": pytest.approx(math.log(p / (1 - p)))}


def test_stage_b_loss_and_its_gradients_match_the_formula():
    """Item X of section 9 by hand for both labels, and all gradients against products of plain probabilities."""
    s = torch.tensor([0.9, 0.7, 0.95, 0.2, 0.6], dtype=torch.float64)
    slots, ends, types = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 3]), torch.tensor([0, 1, 2])
    pool = SoftLogicPool(("category", "brand", "colour")).double()
    known = {
        1.0: (0.467415, [-0.02784, -0.02165, -0.05000, -0.09412, -0.28235]),
        0.0: (0.985159, [0.04671, 0.03633, 0.08391, 0.15795, 0.47386]),
    }
    none = torch.zeros(0, dtype=torch.float64)
    for y, (loss, gradients) in known.items():
        z = torch.logit(s).requires_grad_()
        got = stage_b_loss(pool(z, types, slots, ends).log_r, torch.tensor([y]).double(), none, none, none, 0.1)
        got.backward()
        assert got.item() == pytest.approx(loss, abs=1e-5)
        assert z.grad is not None
        np.testing.assert_allclose(z.grad.numpy(), gradients, atol=1e-5)

    qe_y, qe_w = torch.tensor([1.0, 0.3], dtype=torch.float64), torch.tensor([1.0, 0.25], dtype=torch.float64)

    def formula(z, zq, a):
        s = torch.sigmoid(z)
        g = torch.stack([1 - (1 - s[0]) * (1 - s[1]), s[2], 1 - (1 - s[3]) * (1 - s[4])])
        r = torch.prod(1 - a * (1 - g))
        p = torch.sigmoid(zq)
        bce = -(qe_y * p.log() + (1 - qe_y) * (1 - p).log())
        return -(1 - r).log() + 0.07 * (qe_w * bce).sum() / qe_w.sum()

    leaves = [torch.logit(s), torch.tensor([0.4, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.9, 0.4]).double()]
    want_in = [leaf.clone().requires_grad_() for leaf in leaves]
    want = formula(*want_in)
    want.backward()
    z, zq = (leaf.clone().requires_grad_() for leaf in leaves[:2])
    with torch.no_grad():
        pool.relaxation.copy_(leaves[2])
    pool.relaxation.grad = None
    out = pool(z, types, slots, ends)
    got = stage_b_loss(out.log_r, torch.zeros(1, dtype=torch.float64), zq, qe_y, qe_w, 0.07)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    for mine, theirs in zip((z, zq, pool.relaxation), want_in, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-12)


def test_a_huge_gradient_of_the_relaxation_leaves_the_others_alone():
    weight, relaxation = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))
    config = StepConfig(lr=0.1, small_lr=0.01, warmup_share=0.0)
    descent = Descent([weight], [[relaxation]], config, num_steps=1)
    descent.step((weight * torch.tensor([0.3, 0.0, -0.4])).sum() + 1e30 * relaxation.sum())
    assert weight.grad is not None
    assert relaxation.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([0.3, 0.0, -0.4]))  # norm 0.5: untouched
    torch.testing.assert_close(relaxation.grad.norm(), torch.tensor(1.0))
    torch.testing.assert_close(weight, torch.tensor([-0.1, 0.0, 0.1]))
    torch.testing.assert_close(relaxation, torch.full((2,), 0.99))


def test_a_step_is_seen_by_the_cache_of_scores():
    model = model_of()
    scorer = model.scorer
    assert isinstance(scorer, Bilinear)
    before, version = scorer.u.detach().clone(), model.version
    descent = Descent(scorer.parameters(), [], StepConfig(lr=0.1), num_steps=1)
    descent.step(model.qe_logits([("lg tv", "brand:lg")]).sum())
    assert not torch.equal(scorer.u, before)
    assert model.version != version


def test_clip_and_what_is_not_finite():
    parameter = nn.Parameter(torch.zeros(2))
    assert clip_([parameter], 1.0) == 0.0
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_([parameter], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    parameter.grad = torch.tensor([float("nan"), 0.0])
    with pytest.raises(ValueError, match="norm of a gradient is nan"):
        clip_([parameter], 1.0)
    with pytest.raises(ValueError, match="loss is inf"):
        Descent([parameter], [], StepConfig(), 1).step(parameter.sum() + float("inf"))


def test_rates_and_lambda():
    assert [rate(step, num_steps=6, rising=2) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    config = QIConfig()
    assert [round(qe_weight_at(step, 5, config), 4) for step in range(5)] == [0.1, 0.08, 0.06, 0.04, 0.02]
    assert qe_weight_at(0, 1, config) == 0.1


def test_pretraining_fits_the_rows_and_is_reproducible():
    rows = [
        QERow(query=f"{a} fridge", entity=f"brand:{b}", y=float(a == b), src="mention")
        for a in ("smeg", "lg", "sony")
        for b in ("smeg", "lg", "sony")
    ]
    config = StepConfig(epochs=60, lr=0.05, batch_pairs=4)
    model, again = model_of(), model_of()
    state = torch.get_rng_state()
    losses = pretrain(model, rows, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[-1] < 0.25 < losses[0]
    z = model.qe_logits([(row.query, row.entity) for row in rows])
    assert ((z > 0).float() == torch.tensor([row.y for row in rows])).all()
    assert pretrain(again, rows, config) == losses
    assert again.version == model.version != model_of().version
    assert model.fallback("lg fridge", ["brand:lg"]).tolist() != [0.0]
    with pytest.raises(DataError, match="got none"):
        pretrain(model, [], config)
    with pytest.raises(ConfigError, match="unknown entity type 'odd'"):
        pretrain(model, [QERow(query="q", entity="odd:x", y=1)], config)


def test_batches_hold_each_row_once():
    table = merge_rows(QERow(query="q" * (n % 7 + 1), entity=f"brand:{n}", y=0) for n in range(50))
    cut = list(batches(table, 8, random.Random(1)))
    assert sorted(row for rows in cut for row in rows) == list(range(50))
    assert cut == list(batches(table, 8, random.Random(1))) != list(batches(table, 8, random.Random(2)))
    pairs = pairs_of(QUERIES)
    cut = list(query_batches(pairs, 8, random.Random(1)))
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(pairs)))
    assert all(len(rows) == 8 for rows in cut[:-1])


def test_training_learns_keeps_the_best_and_is_reproducible():
    pairs = pairs_of(QUERIES)
    schema = with_comparators(SCHEMA, ("model",))
    told = []
    model = model_of(schema=schema)
    history = train(model, pairs, pairs, ROWS, CONFIG, on_measure=told.append)
    assert [measure.step for measure in history.measures] == [3, 6, 9, 12, 15, 18, 20]
    assert tuple(told) == history.measures
    assert history.best.dev_roc_auc == max(m.dev_roc_auc for m in history.measures) > 0.8
    log_r, calls = score_pairs(model, pairs)
    assert calls == 0  # cached when the calibrator was fitted
    assert roc_auc(log_r, pairs.label) == history.best.dev_roc_auc  # the best weights are those in the model
    assert model.calibrator is not None
    relaxation = model.pool.relaxation.detach()
    assert relaxation[0] == 1.0
    assert ((relaxation >= 0) & (relaxation <= 1)).all()
    assert not model.training
    again = model_of(schema=schema)
    assert train(again, pairs, pairs, ROWS, CONFIG) == history
    assert again.version == model.version
    assert torch.equal(again.pool.relaxation, model.pool.relaxation)
    other = model_of(schema=schema)
    train(other, pairs, pairs, ROWS, replace(CONFIG, seed=1))
    assert other.version != model.version


def test_a_step_encodes_each_distinct_pair_once():
    pairs = pairs_of(QUERIES[:1])
    model = model_of()
    scorer = model.scorer
    assert isinstance(scorer, Bilinear)
    train(model, pairs, pairs, [], replace(CONFIG, epochs=1, batch_pairs=6))
    step = scorer.asked[0]
    assert len(step) == len(set(step)) == 2 + 3 + 1  # categories, brands, model:none


def test_what_training_refuses():
    pairs = pairs_of(QUERIES)
    none = replace(pairs, label=np.zeros(len(pairs), np.float32))
    with pytest.raises(DataError, match="relevant and irrelevant pairs; got 0 relevant"):
        train(model_of(), pairs, none, ROWS, CONFIG)
    with pytest.raises(DataError, match="one epoch; got 36, 0"):
        train(model_of(), pairs, pairs, ROWS, replace(CONFIG, epochs=0))
    for change in ({"lr": 0.0}, {"warmup_share": 1.0}, {"batch_pairs": 0}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **change)
    for change in ({"qe_weight": -1.0}, {"eval_every_steps": 0}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **change)
    with pytest.raises(DataError, match="must all be"):
        replace(pairs, label=np.zeros(3, np.float32))
    with pytest.raises(DataError, match="item must be 0 to 5"):
        replace(pairs, item=pairs.item + 1)


def test_scores_of_pairs_keep_their_order():
    pairs = pairs_of(QUERIES)
    order = np.random.default_rng(0).permutation(len(pairs))
    model = model_of()
    log_r, _ = score_pairs(model, pairs)
    mixed = QIPairs(
        queries=pairs.queries,
        items=pairs.items,
        query=pairs.query[order],
        item=pairs.item[order],
        label=pairs.label[order],
    )
    assert score_pairs(copy.deepcopy(model), mixed)[0].tolist() == log_r[order].tolist()
    assert set(pairs.first_queries(2).query.tolist()) == {0, 1}
    assert len(mixed.first_queries(2)) == 12
