"""Tables shared by ranks against the same table in one process: rows, sums, counters, admission, eviction; any W."""

import functools
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks
from torch import Tensor

from recis.distributed.config import Places
from recis.distributed.exchange import TableExchange
from recis.distributed.owners import Owners
from recis.distributed.ranks import Ranks
from recis.distributed.tables import share_tables
from recis.embedding import (
    AfterSightings,
    ByScore,
    EmbeddingBagCollection,
    EmbeddingCollection,
    Feature,
    LfuCapacity,
    LruCapacity,
    TableConfig,
    TableSet,
    Tile,
)
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam, SparseOptimizer, clip_grad_norm
from recis_kernels.embedding_bag import row_gather
from recis_kernels.ids_partition import ids_partition, slice_bounds, slice_of_id

PARTS = 4


def worst(meta) -> Tensor:
    """Return a score by count and norm: a function of the row alone."""
    return meta.count.double() + meta.norm


def tables(**settings) -> list[TableConfig]:
    """Return two tables of one store and one of another."""
    return [
        TableConfig(name="user", features=("user", Feature("seen", "none")), embedding_dim=3, **settings),
        TableConfig(
            name="item", features=(Feature("items", "mean"), Feature("top", Tile(2))), embedding_dim=3, **settings
        ),
        TableConfig(name="shop", features=("shop",), embedding_dim=5),
    ]


def batch(step: int, part: int) -> KeyedJaggedTensor:
    """Return part `part` of step `step`: bags of few ids, many of which other parts have too; the last part is often empty."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    stride = 0 if part == 3 and step % 2 else 5
    lengths = torch.randint(0, 4, (5 * stride,), generator=generator)
    values = torch.randint(-6, 6, (int(lengths.sum()),), generator=generator) * 2**40
    return KeyedJaggedTensor(
        keys=("user", "items", "seen", "top", "shop"), values=values, lengths=lengths, stride=stride
    )


def train(
    ranks: Ranks,
    *,
    num_steps: int = 6,
    clip: float | None = None,
    share: bool = True,
    places: Places | None = None,
    rows_dtype: torch.dtype = torch.float32,
    **settings,
) -> dict:
    """Train tables alone with a made-up loss, and return their rows, counters and what was looked up."""
    table_set = TableSet(tables(**settings), seed=3)
    if share:
        share_tables(table_set, ranks, places=places, rows_dtype=rows_dtype)
    pooled, single = EmbeddingBagCollection(table_set), EmbeddingCollection(table_set)
    optimizer = SparseOptimizer([pooled])
    seen: dict[tuple[int, int], list[Tensor]] = {}
    norms, copies = [], []
    for step in range(1, num_steps + 1):
        for part in range(ranks.rank, PARTS, ranks.world_size):
            ids = batch(step, part)
            vectors = {**pooled(ids), "seen": single(ids)["seen"].values}
            seen[step, part] = [value.detach().clone() for value in vectors.values()]
            terms = [(value * value + (number + 1) * value).sum() for number, value in enumerate(vectors.values())]
            torch.stack(terms).sum().backward()
        if clip is not None:
            norms.append(float(clip_grad_norm([], [pooled], clip)))
        optimizer.step()
        table_set.end_step(step)
        exchanges = [store.exchange for store in table_set.stores]
        copies.append([one.num_copies if isinstance(one, TableExchange) else 0 for one in exchanges])
    pooled.eval()
    read = pooled(batch(99, ranks.rank))
    return {
        "copies": copies,
        "rows": {table.name: table.export() for table in table_set},
        "counters": {table.name: table.counters().to_dict() for table in table_set},
        "admission": {table.name: table.admission_state() for table in table_set},
        "seen": seen,
        "norms": norms,
        "read": read,
    }


def joined(results: list[dict]) -> dict:
    """Return the results of all ranks as those of one process: rows by ascending id, counters summed."""
    rows = {}
    for name in results[0]["rows"]:
        fields = {key: torch.cat([r["rows"][name][key] for r in results]) for key in results[0]["rows"][name]}
        order = fields["ids"].argsort()
        rows[name] = {key: value[order] for key, value in fields.items()}
    keys = ("found", "inserted", "rejected", "evicted", "size")
    counters = {
        name: {key: sum(r["counters"][name][key] for r in results) for key in keys} for name in results[0]["counters"]
    }
    seen = {place: value for result in results for place, value in result["seen"].items()}
    return {"rows": rows, "counters": counters, "seen": seen, "norms": results[0]["norms"]}


def assert_equal(one: dict, other: dict) -> None:
    """Assert equality bit for bit."""
    assert one["counters"] == other["counters"]
    assert one["norms"] == other["norms"]
    assert one["seen"].keys() == other["seen"].keys()
    for place, vectors in one["seen"].items():
        for ours, theirs in zip(vectors, other["seen"][place], strict=True):
            assert torch.equal(ours, theirs), place
    for name, fields in one["rows"].items():
        for key, value in fields.items():
            assert torch.equal(value, other["rows"][name][key]), (name, key)


POLICIES = {
    "plain": {},
    "adam": {"optimizer": Adam(lr=0.1)},
    "admission": {"admission": AfterSightings(3)},
    "lru": {"eviction": (LruCapacity(4),)},
    "lfu": {"eviction": (LfuCapacity(3),)},
    "score": {"eviction": (ByScore(worst, 4),)},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_any_number_of_ranks_gives_the_same_bits(policy):
    alone = trained_alone(policy, 6)
    for world_size in (2, 4):
        together = joined(on_ranks(world_size, lambda ranks: train(ranks, **settings_of(policy))))
        assert_equal(alone, together)
    if policy not in ("plain", "adam"):
        counted = alone["counters"]["user"]
        assert counted["evicted"] + counted["rejected"] > 0, "the policy did nothing in this test"


PLACES = {
    "hot": Places(hot_ids=4, hot_every_steps=3),
    "data_parallel": Places(data_parallel=("item", "shop")),
    "table_wise": Places(table_wise=("item", "user")),
    "all": Places(table_wise=("user",), data_parallel=("shop",), hot_ids=5, hot_every_steps=2),
}


@functools.cache
def trained_alone(policy: str, num_steps: int) -> dict:
    """Return what one process gets."""
    return joined(on_ranks(1, lambda ranks: train(ranks, num_steps=num_steps, **settings_of(policy))))


def settings_of(policy: str) -> dict[str, Any]:
    """Return the tables' settings, and where gradients are clipped."""
    return {"clip": 2.0 if policy in ("plain", "adam") else None, **POLICIES[policy]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_places_change_no_bit(policy, place):
    """Copies and whole tables against slices: rows, states, counters, admission, eviction, norms, what lookups gave."""
    settings: dict[str, Any] = settings_of(policy) | {"num_steps": 8}
    alone = trained_alone(policy, 8)
    for world_size in (2, 4) if policy == "lru" else (2,):
        results = on_ranks(world_size, lambda ranks: train(ranks, places=PLACES[place], **settings))
        assert_equal(alone, joined(results))
        copies = [result["copies"] for result in results]
        assert all(one == copies[0] for one in copies)
        assert (sum(map(sum, copies[0])) > 0) == (place != "table_wise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_places_change_no_bit_of_narrow_rows(dtype):
    sliced = joined(on_ranks(2, lambda ranks: train(ranks, rows_dtype=dtype, num_steps=9)))
    for places in PLACES.values():
        placed = on_ranks(2, lambda ranks, p=places: train(ranks, rows_dtype=dtype, num_steps=9, places=p))
        assert_equal(sliced, joined(placed))


def test_equals_tables_that_are_not_shared():
    """Counters and ids are equal, values to rounding: one process adds positions, ranks add sums of parts."""
    plain = joined([train(Ranks(), share=False)])
    shared = joined(on_ranks(4, train))
    assert plain["counters"] == shared["counters"]
    for name, fields in plain["rows"].items():
        assert torch.equal(fields["ids"], shared["rows"][name]["ids"])
        assert torch.equal(fields["count"], shared["rows"][name]["count"])
        torch.testing.assert_close(shared["rows"][name]["weight"], fields["weight"], rtol=1e-5, atol=1e-7)


def test_every_id_lies_with_its_owner():
    results = on_ranks(4, train)
    bounds = slice_bounds(4)
    for rank, result in enumerate(results):
        for fields in result["rows"].values():
            slices = slice_of_id(fields["ids"])
            assert bool(((slices >= bounds[rank]) & (slices < bounds[rank + 1])).all())


def test_sums_by_hand():
    """Id 7 gets 1 from part 0, 10 and 100 from part 1, 1000 from part 3: Sgd with lr 1 subtracts 1111 from it."""
    from recis.embedding import Constant
    from recis.optim import Sgd

    grads = {0: [1.0], 1: [10.0, 100.0], 2: [], 3: [1000.0]}

    def work(ranks: Ranks) -> list[float]:
        config = TableConfig(
            name="t", features=("f",), embedding_dim=1, initializer=Constant(0.5), optimizer=Sgd(lr=1.0)
        )
        table_set = TableSet([config], seed=0)
        share_tables(table_set, ranks)
        bags = EmbeddingBagCollection(table_set)
        for part in range(ranks.rank, PARTS, ranks.world_size):
            upstream = torch.tensor(grads[part])
            count = upstream.numel()
            ids = torch.full((count,), 7)
            given = KeyedJaggedTensor(keys=("f",), values=ids, lengths=torch.ones(count).long(), stride=count)
            (bags(given)["f"][:, 0] * upstream).sum().backward()
        SparseOptimizer([bags]).step()
        table_set.end_step(1)
        return table_set["t"].export()["weight"].flatten().tolist()

    for world_size in (1, 2, 4):
        assert list(chain(*on_ranks(world_size, work))) == [0.5 - 1111.0]


def test_rows_that_no_gradient_reached_stay_as_they_are():
    """Tile(1) cuts the second id of the bag: its row is looked up everywhere and updated nowhere."""

    def work(ranks: Ranks) -> Any:
        config = TableConfig(name="t", features=(Feature("f", Tile(1)),), embedding_dim=2, optimizer=Adam(lr=0.1))
        table_set = TableSet([config], seed=0)
        share_tables(table_set, ranks)
        bags = EmbeddingBagCollection(table_set)
        before = None
        for step in (1, 2):
            ids = KeyedJaggedTensor(keys=("f",), values=torch.tensor([5, 6]), lengths=torch.tensor([2]), stride=1)
            bags(ids)["f"].sum().backward()
            before = table_set["t"].export() if step == 1 else before
            SparseOptimizer([bags]).step()
            table_set.end_step(step)
        return {"before": before, "after": table_set["t"].export()}

    results = on_ranks(2, work)
    for number, moved in ((5, True), (6, False)):
        (owner,) = [r for r in results if number in r["after"]["ids"].tolist()]
        at = owner["after"]["ids"].tolist().index(number)
        changed = not torch.equal(owner["before"]["weight"][at], owner["after"]["weight"][at])
        assert changed == moved
        assert int(owner["after"]["count"][at]) == 4  # two ranks, two steps


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.6), (torch.float16, 0.6)], ids=str)
def test_narrow_rows_travel_at_half_the_bytes(dtype, share):
    def work(ranks, rows_dtype):
        table_set = TableSet([TableConfig(name="t", features=("f",), embedding_dim=64)], seed=0)
        share_tables(table_set, ranks, rows_dtype=rows_dtype)
        bags = EmbeddingBagCollection(table_set)
        ids = torch.arange(40) + 20 * ranks.rank
        given = KeyedJaggedTensor(keys=("f",), values=ids, lengths=torch.ones(40).long(), stride=40)
        out = bags(given)["f"]
        out.square().sum().backward()
        SparseOptimizer([bags]).step()
        table_set.end_step(1)
        return out.detach(), ranks.sent_bytes

    wide, narrow = (on_ranks(2, lambda ranks, d=d: work(ranks, d)) for d in (torch.float32, dtype))
    assert narrow[0][1] < share * wide[0][1]
    for (ours, _), (theirs, _) in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=1e-6)


def test_a_store_on_a_gpu_or_with_trained_default_rows_is_refused():
    table_set = TableSet(
        [TableConfig(name="t", features=("f",), unadmitted="default_row", train_default_row=True)], seed=0
    )
    with pytest.raises(ConfigError, match="'t': train_default_row=True needs one process"):
        share_tables(table_set, Ranks(0, 2))
    share_tables(table_set, Ranks())  # one process may


def test_max_rows_is_a_promise_over_all_ranks():
    def work(ranks: Ranks) -> tuple[int, int]:
        table_set = TableSet([TableConfig(name="t", features=("f",), max_rows=10)], seed=0)
        share_tables(table_set, ranks)
        bags = EmbeddingBagCollection(table_set)
        ids = torch.arange(100) + 100 * ranks.rank
        bags(KeyedJaggedTensor(keys=("f",), values=ids, lengths=torch.ones(100).long(), stride=100))
        table_set.end_step(1)
        counters = table_set["t"].counters()
        return counters.size, counters.full

    with pytest.warns(RuntimeWarning, match="'t' is full"):
        sizes, full = zip(*on_ranks(4, work), strict=True)
    assert sum(sizes) <= 10
    assert sum(sizes) + sum(full) == 400


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60, unique=True),
    world_size=st.sampled_from([1, 2, 3, 5, 8]),
    seed=st.integers(0, 99),
)
def test_deal_agrees_with_ids_partition(ids, world_size, seed):
    """ids_partition says how many ids of one table each rank owns; dealing pairs of many tables must say the same."""
    values = torch.tensor(ids, dtype=torch.int64)
    tables = torch.randint(0, 3, (len(ids),), generator=torch.Generator().manual_seed(seed)).int()
    sightings = torch.arange(len(ids)).int()
    own = seed % (world_size + 1) - 1
    owners = Owners(world_size, 3, own=own if own >= 0 else None)
    dealt = owners.deal(values, tables, sightings)
    for table in range(3):
        part = ids_partition(values[tables == table], world_size)
        assert dealt.counts[:, table].tolist() == part.counts.tolist()
    place = dealt.place.long()
    assert torch.equal(dealt.ids[place], values)
    assert torch.equal(dealt.tables[place], tables)
    assert torch.equal(dealt.sightings[place], sightings)
    inverse = torch.tensor([*range(len(ids))[::-2], -1]).int()
    assert torch.equal(
        dealt.places_of(inverse), torch.where(inverse < 0, -1, torch.cat([place, place.new_zeros(1)])[inverse])
    )
    owner = owners.of(dealt.ids).long()
    cells = torch.where(owner == own, world_size, owner) * 3 + dealt.tables  # this rank's own come last
    assert bool((cells.diff() >= 0).all())


def test_lookup_after_its_update_is_refused():
    def work(ranks: Ranks) -> None:
        table_set = TableSet([TableConfig(name="t", features=("f",))], seed=0)
        share_tables(table_set, ranks)
        bags = EmbeddingBagCollection(table_set)
        out = bags(KeyedJaggedTensor(keys=("f",), values=torch.tensor([1]), lengths=torch.tensor([1])))["f"]
        out.sum().backward(retain_graph=True)
        SparseOptimizer([bags]).step()
        with pytest.raises(RuntimeError, match="backward through a lookup whose step is over"):
            out.sum().backward()
        out = bags(KeyedJaggedTensor(keys=("f",), values=torch.tensor([1]), lengths=torch.tensor([1])))["f"]
        out.sum().backward()
        with pytest.raises(ValueError, match="ends with gradients that no update has applied"):
            table_set.end_step(1)

    on_ranks(1, work)


def test_exchange_holds_at_most_three_times_its_unique_rows():
    """Beside the table: the rows of a lookup and the sums of their gradients, each once and once more for other ranks'."""

    def work(ranks: Ranks) -> list[int]:
        table_set = TableSet([TableConfig(name="t", features=("f",), embedding_dim=64)], seed=0)
        share_tables(table_set, ranks)
        exchange = table_set.stores[0].exchange
        assert isinstance(exchange, TableExchange)
        bags = EmbeddingBagCollection(table_set)
        optimizer = SparseOptimizer([bags])
        ids, held = torch.arange(4000) + 4000 * ranks.rank, []
        for step in range(1, 4):
            out = bags(KeyedJaggedTensor(keys=("f",), values=ids, lengths=torch.ones(4000).long(), stride=4000))["f"]
            out.sum().backward()
            optimizer.step()
            table_set.end_step(step)
            memories = [*(one.memory for one in exchange._received), *exchange._sums.memories, exchange._outbox]
            held.append(sum(one._rows.shape[0] for one in memories))
        return held

    for held in on_ranks(2, work):
        assert held[0] == held[2], "room is used again by every step"
        assert held[0] <= 3 * 1.25 * 4000 * 1.05  # a quarter more than asked for; halves of the ids are even to 5 %


@pytest.mark.parametrize("train", [True, False])
def test_lookups_asked_for_ahead_find_what_the_update_left(train):
    """Two lookups under way at once, asked for before an update: the rows of lookups made after it."""

    def work(ranks: Ranks) -> None:
        table_set = TableSet([TableConfig(name="t", features=("f",), embedding_dim=3)], seed=0)
        share_tables(table_set, ranks)
        store = table_set.stores[0]
        exchange = store.exchange
        assert isinstance(exchange, TableExchange)
        bags = EmbeddingBagCollection(table_set)
        first, second = torch.arange(20) + 7 * ranks.rank, torch.arange(30) - 5 * ranks.rank
        batch = KeyedJaggedTensor(keys=("f",), values=first, lengths=torch.ones(20).long(), stride=20)
        bags(batch)["f"].sum().backward()
        asked = [exchange.ask(store.one_range(ids, 0)) for ids in (first, second)]
        asked[0].start_ids()
        SparseOptimizer([bags]).step()
        table_set.end_step(1)
        answers = [exchange.answer(one, train=train, source=bags) for one in asked]
        found = [answer.take() for answer in answers]
        rows = [row_gather(one.store.blocks, one.read_rows, one.inverse) for one in found]
        for ids, got in zip((first, second), rows, strict=True):
            want = store.lookup(store.one_range(ids, 0), train=False, source=bags)
            assert torch.equal(got, row_gather(want.store.blocks, want.read_rows, want.inverse))

    on_ranks(3, work)
