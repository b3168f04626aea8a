"""Samplers: distributions, seeded and resumable draws, counts that are never too low, catalogues."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.sampling import (
    Catalogue,
    CatalogueSampler,
    HardNegatives,
    ItemFrequency,
    PopularNegatives,
    UniformNegatives,
    one_id_per_row,
    take_samples,
)
from recis.models.synthetic import SyntheticClicks

INT64 = st.integers(-(2**63), 2**63 - 1)


def catalogue() -> Catalogue:
    return Catalogue(SyntheticClicks(num_items=30).items(), "item_id")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(INT64, max_size=20), max_size=4))
def test_counts_are_at_least_the_truth(batches):
    frequency = ItemFrequency()
    truth: dict[int, int] = {}
    for batch in batches:
        frequency.observe(torch.tensor(batch, dtype=torch.int64))
        for item in batch:
            truth[item] = truth.get(item, 0) + 1
    ids = torch.tensor(list(truth), dtype=torch.int64)
    assert (frequency.count(ids) >= torch.tensor(list(truth.values()), dtype=torch.int64)).all()
    assert int(frequency.total) == sum(truth.values())


def test_counts_of_few_ids_are_exact_and_saved():
    frequency = ItemFrequency()
    frequency.observe(torch.tensor([5, 5, -7, 2**62]))
    loaded = ItemFrequency()
    loaded.load_state_dict(frequency.state_dict())
    assert loaded.count(torch.tensor([5, -7, 2**62, 1])).tolist() == [2, 1, 1, 0]
    torch.testing.assert_close(loaded.share(torch.tensor([5, 1])), torch.tensor([0.5, 0.25]))
    assert ItemFrequency().share(torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_counts_of_many_ids_are_close():
    ids = torch.arange(50_000) * 3 - 70_000
    frequency = ItemFrequency()
    frequency.observe(ids)
    over = frequency.count(ids) - 1
    assert over.float().mean() < 0.06  # two rows at load 0.19: both must collide


@pytest.mark.parametrize("negatives", [UniformNegatives(20_000), PopularNegatives(20_000, power=0.5)], ids=repr)
def test_draws_follow_their_probabilities(negatives):
    items = catalogue()
    sampler = CatalogueSampler(negatives, lambda: items, seed=3)
    frequency = ItemFrequency()
    frequency.observe(items.sorted_ids.repeat_interleave(torch.arange(30)))  # item at place j was seen j times
    places, p = sampler.draw(frequency)
    want = (
        (1 + torch.arange(30.0, dtype=torch.float64)) ** 0.5
        if isinstance(negatives, PopularNegatives)
        else torch.ones(30).double()
    )
    torch.testing.assert_close(p, want / want.sum())
    found = torch.bincount(places, minlength=30) / 20_000
    spread = (p * (1 - p) / 20_000).sqrt()
    assert ((found - p).abs() < 5 * spread).all()


def test_draws_are_seeded_and_go_on_after_loading():
    items, frequency = catalogue(), ItemFrequency()
    first = CatalogueSampler(UniformNegatives(40), lambda: items, seed=3)
    straight = [first.draw(frequency)[0] for _ in range(4)]
    assert not torch.equal(straight[0], straight[1])
    again = CatalogueSampler(UniformNegatives(40), lambda: items, seed=3)
    again.draw(frequency)
    again.draw(frequency)
    resumed = CatalogueSampler(UniformNegatives(40), lambda: items, seed=3)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed.draw(frequency)[0], straight[2])
    other = CatalogueSampler(UniformNegatives(40), lambda: items, seed=4)
    assert not torch.equal(other.draw(frequency)[0], straight[0])


def test_hard_negatives_keep_the_highest_of_the_pool():
    hard = HardNegatives(2, UniformNegatives(4))
    assert hard.num == 4
    kept = hard.keep(torch.tensor([[1.0, 4.0, 3.0, -torch.inf], [0.0, 0.0, 1.0, 2.0]]))
    assert kept.tolist() == [[4.0, 3.0], [2.0, 1.0]]
    assert hard.keep(torch.empty(0, 4)).shape == (0, 2)


def test_catalogue_is_made_at_the_first_draw_only():
    def missing() -> Catalogue:
        raise FileNotFoundError("the catalogue's file")

    sampler = CatalogueSampler(UniformNegatives(4), missing, seed=0)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(FileNotFoundError):
        sampler.draw(ItemFrequency())


def test_catalogue_finds_and_selects():
    items = catalogue()
    ids = items.sorted_ids[torch.tensor([3, 29, 3])]
    place, known = items.find(torch.cat([ids, torch.tensor([12345])]))
    assert place[:3].tolist() == [3, 29, 3]
    assert known.tolist() == [True, True, True, False]
    chosen = items.select(place[:3])
    assert chosen.num_samples == 3
    assert chosen.sparse["item_id"].flat_values.tolist() == ids.tolist()
    everything = SyntheticClicks(num_items=30).items()
    row = everything.sparse["item_id"].flat_values.tolist().index(int(ids[1]))
    assert chosen.dense[1].tolist() == everything.dense[row].tolist()
    assert chosen.sparse["category"].to_lists()[1] == everything.sparse["category"].to_lists()[row]


def test_take_samples_with_weights_empty_bags_and_repeats():
    sparse = KeyedJaggedTensor.from_lists(
        {"a": [[1, 2], [], [3]], "b": [[], [4], [5, 6]]}, weights={"a": [[0.5, 2], [], [3]]}
    )
    taken = take_samples(sparse, torch.tensor([2, 1, 2, 0]))
    assert taken["a"].to_lists() == [[3], [], [3], [1, 2]]
    assert taken["b"].to_lists() == [[5, 6], [4], [5, 6], []]
    weights = taken["a"].weights
    assert weights is not None
    assert weights.tolist() == [3, 3, 0.5, 2]
    none = take_samples(sparse, torch.empty(0, dtype=torch.int64))
    assert none.stride == 0
    assert none.keys == ("a", "b")


def test_bad_settings_and_catalogues_are_refused():
    for make in (lambda: UniformNegatives(0), lambda: PopularNegatives(-1), lambda: PopularNegatives(3, power=-0.5)):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match=r"num_kept must lie in \[1, 4\]"):
        HardNegatives(5, UniformNegatives(4))
    items = SyntheticClicks(num_items=3).items()
    double = JaggedTensor(torch.tensor([7, 8, 7]), lengths=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="item 7 is there twice"):
        Catalogue(replace(items, sparse=KeyedJaggedTensor.from_jagged({"item_id": double})), "item_id")
    with pytest.raises(ConfigError, match="at least one item"):
        Catalogue(replace(items, sparse=take_samples(items.sparse, torch.empty(0, dtype=torch.int64))), "item_id")
    sparse = KeyedJaggedTensor.from_lists({"item_id": [[1], [2, 3]]})
    with pytest.raises(ValueError, match="'item_id' must have one id in each of 2 samples; it has 3"):
        one_id_per_row(sparse, "item_id")
