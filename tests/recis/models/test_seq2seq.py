"""Seq2seq: its loss in plain float64, writing item by item against the whole forward pass, beams against all continuations."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from recis.errors import ConfigError
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.retrieval_head import IGNORED
from recis.models.sampling import Catalogue
from recis.models.seq2seq import Seq2Seq, synthetic
from recis.models.synthetic_sequences import SyntheticSequences, item_ids, sequence_catalogue
from recis.trainer.serialize import from_json, to_json


def first_batch(size: int = 9):
    return next(iter(SyntheticSequences(num_samples=size, batch_size=size)))


def four_items() -> Catalogue:
    whole = sequence_catalogue()
    return Catalogue(whole.select(torch.arange(4)), "item_id")


def built(**changes) -> Seq2Seq:
    torch.manual_seed(0)
    model = replace(synthetic(), **changes).build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model(first_batch())  # rows for all items
    return model.eval()


def with_next(batch, rows):
    sparse = {name: batch.sparse[name] for name in batch.sparse.keys}
    sparse["next_items"] = JaggedTensor.from_lists(rows, dtype=torch.int64)
    return replace(batch, sparse=KeyedJaggedTensor.from_jagged(sparse))


def test_writing_item_by_item_equals_the_whole_pass():
    """Two continuations per sample, of three rows each; log p of every class after every prefix."""
    model, batch = built(num_layers=2), first_batch(5)
    prefixes = item_ids(torch.randint(0, 100, (2, 5, 3)))
    whole = [model(with_next(batch, rows.tolist()))[:, 0] for rows in prefixes]
    log_prob, written = model.begin(batch)
    first = log_prob
    written = written._replace(
        past=tuple(memory.select(torch.arange(5).repeat_interleave(2)) for memory in written.past)
    )
    log_prob = log_prob.repeat_interleave(2, dim=0)
    total = torch.zeros(10)
    for step in range(3):
        places, known = model.head.catalogue.find(prefixes[:, :, step].T.flatten())
        assert known.all()
        total = total + log_prob.gather(1, places[:, None]).squeeze(1)
        log_prob, written = model.extend(written.words[places], written)
    total = total + log_prob[:, -1]  # the end
    torch.testing.assert_close(total.view(5, 2), torch.stack(whole, 1), rtol=1e-5, atol=1e-4)
    assert first.exp().sum(1).tolist() == pytest.approx([1.0] * 5, rel=1e-5)


def test_loss_is_that_of_each_sample_alone():
    model, batch = built(num_layers=2), first_batch(12)
    together = model(batch)
    items, following = batch.sparse["items"].to_lists(), batch.sparse["next_items"].to_lists()
    assert [] in items
    assert [] in following
    for b, (history, row) in enumerate(zip(items, following, strict=True)):
        alone = with_next(first_batch(1), [row])
        sparse = {
            "items": JaggedTensor.from_lists([history], dtype=torch.int64),
            "next_items": alone.sparse["next_items"],
        }
        alone = replace(alone, sparse=KeyedJaggedTensor.from_jagged(sparse))
        torch.testing.assert_close(model(alone)[0], together[b], rtol=1e-5, atol=1e-4)
        assert together[b, 1] == len(row) + 1
    batch = replace(batch, weights=torch.rand(12))
    assert float(model.train()(batch).detach()) == pytest.approx(
        float(-(together[:, 0] * batch.weights).sum()), rel=1e-5
    )


def test_later_items_change_no_earlier_probability():
    model, batch = built(), first_batch(4)
    rows = item_ids(torch.randint(0, 100, (4, 4))).tolist()
    states = {}
    model.norm.register_forward_hook(lambda _, __, out: states.update(out=out))
    model(with_next(batch, rows))
    whole = states["out"].view(4, 5, -1)
    model(with_next(batch, [row[:2] for row in rows]))
    torch.testing.assert_close(states["out"].view(4, 3, -1), whole[:, :3], rtol=1e-5, atol=1e-5)


def test_gradients_reach_everything():
    model, batch = built().train(), first_batch(6)
    model(batch).backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


@pytest.mark.parametrize("distinct", [False, True])
def test_beams_hold_the_best_continuations(distinct):
    """4 items and the end, 3 steps: as many beams as there are continuations find all, in order."""
    model, batch = built(catalogue=four_items), first_batch(3)
    ids = model.head.catalogue.sorted_ids.tolist()
    log_probs = {}
    for length in range(4):
        for row in itertools.product(range(4), repeat=length):
            if distinct and len(set(row)) < length:
                continue
            log_prob, written = model.begin(batch)
            total = torch.zeros(3)
            for word in row:
                total = total + log_prob[:, word]
                log_prob, written = model.extend(written.words[word].expand(3, -1), written)
            log_probs[tuple(ids[word] for word in row)] = total + (log_prob[:, 4] if length < 3 else 0)
    found = model.write(batch, max_items=3, num_beams=85, distinct=distinct)
    for b in range(3):
        best = sorted(((float(total[b]), row) for row, total in log_probs.items()), reverse=True)
        kept = [k for k in range(85) if found.log_prob[b, k] > -1e30]
        assert len(kept) == len(best)
        rows = [tuple(found.ids[b, k, : int(found.lengths[b, k])].tolist()) for k in kept]
        assert set(rows) == {row for _, row in best}
        assert found.log_prob[b, kept].tolist() == pytest.approx([value for value, _ in best], rel=1e-4, abs=1e-4)
        assert [float(log_probs[row][b]) for row in rows] == pytest.approx([v for v, _ in best], rel=1e-4, abs=1e-4)


def test_one_beam_takes_the_best_word_each_time():
    model, batch = built(), first_batch(6)
    found = model.write(batch, max_items=4)
    log_prob, _ = model.begin(batch)
    for b in range(6):
        assert found.lengths[b, 0] == 0 or found.ids[b, 0, 0] == model.head.catalogue.sorted_ids[log_prob[b].argmax()]
    assert found.ids.shape == (6, 1, 4)


def test_empty_batches_and_histories():
    model, batch = built(), first_batch(3)
    sparse = {name: JaggedTensor.from_lists([[], [], []], dtype=torch.int64) for name in ("items", "next_items")}
    empty = replace(batch, sparse=KeyedJaggedTensor.from_jagged(sparse))
    assert model(empty)[:, 1].tolist() == [1, 1, 1]
    assert model.write(empty, max_items=2, num_beams=3).ids.shape == (3, 3, 2)
    model.train()(empty).backward()


def test_items_outside_the_catalogue_count_nothing():
    model = built()
    batch = with_next(first_batch(2), [[5], item_ids(torch.tensor([3])).tolist()])
    places, known = model.targets(batch)
    assert places.tolist() == [IGNORED, 100, int(model.head.catalogue.find(item_ids(torch.tensor([3])))[0]), 100]
    assert known.tolist() == [False, True, True, True]
    assert model(batch)[:, 1].tolist() == [1, 2]


def test_settings():
    config = synthetic()
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(ConfigError, match="same catalogue features"):
        replace(config, following=replace(config.following, target=("items",)))
    with pytest.raises(ConfigError, match="at least 1"):
        built().write(first_batch(2), max_items=0)
