"""Copies of rows on every rank: how they are chosen, what travels, and what happens around a step that is not the usual one."""

from typing import Any

import pytest
import torch
from saved_ranks import save_ranks
from thread_ranks import ThreadRanks, on_ranks

from recis.checkpoint import Target, load, verify
from recis.distributed.config import Places
from recis.distributed.exchange import TableExchange
from recis.distributed.ranks import RankError, Ranks
from recis.distributed.tables import check_places, share_tables
from recis.embedding import AfterSightings, Constant, EmbeddingBagCollection, LruCapacity, TableConfig, TableSet
from recis.embedding.lookups import StoreLookup
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Sgd, SparseOptimizer, clip_grad_norm
from recis_kernels.embedding_bag import row_gather


def bag(*ids: int, key: str = "t") -> KeyedJaggedTensor:
    """Return one bag of ids."""
    return KeyedJaggedTensor(keys=(key,), values=torch.tensor(ids).long(), lengths=torch.tensor([len(ids)]), stride=1)


class Rank:
    """One rank with one table of one number per row, which starts at 0.5 and is trained by Sgd with lr 1."""

    def __init__(self, ranks: Ranks, places: Places, **settings: Any) -> None:
        config = TableConfig(
            name="t", features=("t",), embedding_dim=1, initializer=Constant(0.5), optimizer=Sgd(lr=1.0), **settings
        )
        self.ranks = ranks
        self.set = TableSet([config], seed=0)
        share_tables(self.set, ranks, places=places)
        self.store = self.set.stores[0]
        self.bags = EmbeddingBagCollection(self.set)
        self.optimizer = SparseOptimizer([self.bags])
        self.number = 0

    @property
    def exchange(self) -> TableExchange:
        exchange = self.store.exchange
        assert isinstance(exchange, TableExchange)
        return exchange

    def step(self, *ids: int, grad: float | None = 1.0) -> float:
        """Train on one bag; grad None: no backward and no update. Return the sum that was looked up."""
        self.number += 1
        out = self.bags(bag(*ids))["t"]
        if grad is not None:
            (out.sum() * grad).backward()
            self.optimizer.step()
        self.set.end_step(self.number)
        return float(out.detach())

    def rows(self) -> dict[int, tuple[float, int]]:
        """Return id -> (weight, count) of the rows that lie here."""
        fields = self.set["t"].export()
        weights = fields["weight"].flatten().tolist()
        return dict(zip(fields["ids"].tolist(), zip(weights, fields["count"].tolist(), strict=True), strict=True))


def of_all(results: list[dict]) -> dict:
    """Return rows of all ranks together."""
    return {key: value for one in results for key, value in one.items()}


WHOLE = Places(data_parallel=("t",))


def test_a_step_on_copies_by_hand():
    """Ranks look up [7, 7, 8] and [7, 9]: from step 2 on all rows are copies. Sgd takes the sums of both ranks."""

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        ids = (7, 7, 8) if ranks.rank == 0 else (7, 9)
        first = rank.step(*ids)
        copies, before = rank.exchange.num_copies, len(ranks.meeting.calls[ranks.rank])
        second = rank.step(*ids)
        names = ranks.meeting.calls[ranks.rank][before:]
        return first, second, copies, rank.rows(), names

    results = on_ranks(2, work)
    assert [first for first, *_ in results] == [1.5, 1.0]
    # 7 got 2 + 1, the others 1: 7 -> -2.5, 8 and 9 -> -0.5
    assert [second for _, second, *_ in results] == [-5.5, -3.0]
    assert [copies for _, _, copies, *_ in results] == [3, 3]
    assert of_all([rows for *_, rows, _ in results]) == {7: (-5.5, 6), 8: (-1.5, 2), 9: (-1.5, 2)}
    names = results[0][-1]
    assert "gradients of copied rows of table 't'" in names
    assert "copies of rows of table 't'" in names


def test_the_ids_that_most_ranks_ask_for_are_copied():
    """Of three ranks all ask for 1, two for 2, one each for others; id 50 of rank 0 alone is seen more often than any."""
    asked = {0: (1, 2, 50, 50, 50, 50), 1: (1, 2, 51), 2: (1, 52, 53)}

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, Places(hot_ids=3, hot_every_steps=4))
        held = []
        for _ in range(5):
            rank.step(*asked[ranks.rank])
            held.append(rank.exchange.num_copies)
        copies: Any = rank.exchange._copies
        later = {0: (90,), 1: (90, 3), 2: (90, 3)}
        for _ in range(7):
            rank.step(*later[ranks.rank])
        return held, sorted(copies._set.ids.tolist()), rank.exchange.num_copies

    def first_ids(ranks: ThreadRanks):
        rank = Rank(ranks, Places(hot_ids=3, hot_every_steps=4))
        for _ in range(4):
            rank.step(*asked[ranks.rank])
        copies: Any = rank.exchange._copies
        return sorted(copies._set.ids.tolist())

    assert on_ranks(3, first_ids) == [[1, 2]] * 3  # the third place stays empty: one rank in three is too few
    for held, ids, number in on_ranks(3, work):
        assert held == [0, 0, 0, 2, 2]
        assert (ids, number) == ([3, 90], 2)


def test_copied_ids_ask_nobody():
    """What travels for ids stops once all are copied: numbers, sums and rows are left."""

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        sent = []
        for _ in range(3):
            before = ranks.sent_bytes
            rank.bags(bag(*range(100)))["t"].sum().backward()
            sent.append(ranks.sent_bytes - before)
            rank.optimizer.step()
            rank.number += 1
            rank.set.end_step(rank.number)
        return sent

    for sent in on_ranks(2, work):
        assert sent[0] > 500
        assert sent[1] == sent[2] == 16  # the number of ids, which is 0, and the generation of the copies


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_step_without_an_update_counts_sightings(zero_grad):
    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        rank.step(1, 2)
        out = rank.bags(bag(1, 1, 2))["t"]
        if zero_grad:
            out.sum().backward()
            rank.optimizer.zero_grad()
        rank.set.end_step(2)
        with pytest.raises(RuntimeError, match="step is over"):
            out.sum().backward()
        return rank.rows(), rank.set["t"].counters().found

    results = on_ranks(2, work)
    assert of_all([rows for rows, _ in results]) == {1: (-1.5, 6), 2: (-1.5, 4)}
    assert sum(found for _, found in results) == 2  # two distinct ids in the second step


def test_gradients_that_were_sent_early_wait_for_their_update():
    """Two micro-batches, each sent on its own as clip_grad_norm between them does: the update has the sums of both."""

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        rank.step(1, 2)
        for grad in (1.0, 10.0):
            (rank.bags(bag(1, 2))["t"].sum() * grad).backward()
            clip_grad_norm([], [rank.bags], 1e9)
        rank.optimizer.step()
        rank.set.end_step(2)
        return rank.rows()

    # 0.5 - 2 in step 1, then 1 + 10 from each of two ranks
    assert of_all(on_ranks(2, work)) == {1: (-23.5, 6), 2: (-23.5, 6)}


def test_rows_evicted_are_no_copies_any_more():
    """Ids 1 and 2 are used in every step, 3 and 4 once: LruCapacity(2) takes them, and a lookup makes them anew."""

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE, eviction=(LruCapacity(2),))
        rank.step(1, 2, 3, 4)
        after_first = rank.exchange.num_copies
        rank.step(1, 2, 4)
        value = rank.step(4)
        return after_first, rank.exchange.num_copies, value, rank.rows()

    results = on_ranks(2, work)
    for after_first, copies, _, _ in results:
        assert (after_first, copies) == (2, 2)
    alone = on_ranks(1, lambda ranks: one_process_lru(ranks))[0]
    assert of_all([rows for *_, rows in results]) == alone


def one_process_lru(ranks: ThreadRanks) -> dict:
    """Return the rows of one process that sees what two ranks saw."""
    rank = Rank(ranks, Places(), eviction=(LruCapacity(2),))
    for ids in ((1, 2, 3, 4) * 2, (1, 2, 4) * 2, (4, 4)):
        rank.step(*ids)
    return rank.rows()


def rows_of(found: StoreLookup) -> torch.Tensor:
    """Return what each position of a lookup reads."""
    return row_gather(found.store.blocks, found.read_rows, found.inverse)


@pytest.mark.parametrize("evicts", [False, True])
def test_what_was_asked_ahead_finds_the_copies_of_its_time(evicts):
    """Asked for before a step's end that makes copies, or takes some away: rows as a lookup made afterwards finds them."""

    def work(ranks: ThreadRanks):
        settings = {"eviction": (LruCapacity(3),)} if evicts else {}
        rank = Rank(ranks, WHOLE, **settings)
        store = rank.store
        for step, ids in enumerate(((1, 2, 3), (4, 5, 6), (1, 2, 9)), start=1):
            out = rank.bags(bag(*ids))["t"]
            out.sum().backward()
            asked = rank.exchange.ask(store.one_range(torch.tensor([1, 2, 3, 4, 5, 9, 9]), 0))
            asked.start_ids()
            rank.optimizer.step()
            rank.set.end_step(step)
            rows = [rows_of(asked.look_up(train=False, source=rank.bags))]
            now = store.one_range(torch.tensor([1, 2, 3, 4, 5, 9, 9]), 0)
            rows.append(rows_of(store.lookup(now, train=False, source=rank.bags)))
            assert torch.equal(*rows)
            assert bool((rows[0] == 0).any()) == (evicts or step < 3)
        rank.exchange.finish()

    on_ranks(2, work)


def test_rows_written_by_hand_end_the_copies():
    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        rank.step(1, 2)
        own = rank.set["t"].ids()
        rank.set["t"].insert(own, torch.full((own.numel(), 1), 10.0))
        held = rank.exchange.num_copies
        value = rank.step(1, 2)
        rank.set["t"].clear()
        return held, value, rank.exchange.num_copies, rank.step(1, 2)

    assert on_ranks(2, work) == [(0, 20.0, 0, 1.0)] * 2


def test_rows_written_by_hand_inside_a_step_are_refused():
    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        rank.step(1, 2)
        rank.bags(bag(1))
        with pytest.raises(
            ValueError, match=r"of which every rank has copies, needs the boundary of a step: call end_step"
        ):
            rank.set["t"].clear()

    on_ranks(2, work)


def test_rows_written_by_hand_on_one_rank_are_named():
    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE)
        rank.step(1, 2)
        if ranks.rank == 1:
            rank.set["t"].remove(torch.tensor([1, 2]))
        with pytest.raises(RankError, match=r"rank [01] has other copies of its rows than this one: rows were written"):
            rank.step(1, 2)

    on_ranks(2, work)


def test_unadmitted_ids_are_asked_for():
    """AfterSightings(3): two ranks see an id once each in step 1, it is admitted in step 2, and a copy from step 3 on."""

    def work(ranks: ThreadRanks):
        rank = Rank(ranks, WHOLE, admission=AfterSightings(3))
        return [(rank.step(5), rank.exchange.num_copies) for _ in range(4)]

    values = on_ranks(2, work)
    assert values[0] == values[1] == [(0.0, 0), (0.5, 1), (-1.5, 1), (-3.5, 1)]


def test_tables_that_are_not_there_are_refused():
    table_set = TableSet([TableConfig(name="shop", features=("shop",))], seed=0)
    with pytest.raises(ConfigError, match=r"places.data_parallel: the model has no table 'shp'; .*shop"):
        check_places([table_set], Places(data_parallel=("shp",)))
    with pytest.raises(ConfigError, match="'a' is both table_wise and data_parallel"):
        Places(table_wise=("a",), data_parallel=("a",))
    with pytest.raises(ConfigError, match="hot_ids must be at least 0, hot_every_steps at least 1; got -1, 1000"):
        Places(hot_ids=-1)


def test_a_table_of_one_rank_is_saved_and_loaded_anywhere(tmp_path):
    """Table-wise at W = 2 to sliced at W = 3, to table-wise at W = 4, to one process: the rows stay, and so do owners."""

    def placed(world_size: int, places: Places, path: Any = None) -> list[Rank]:
        def work(ranks: ThreadRanks) -> Rank:
            rank = Rank(ranks, places)
            if path is None:
                rank.step(*range(20 * ranks.rank, 20 * ranks.rank + 30))
            else:
                load(path, into=Target(tables=rank.set.tables), rank=ranks.rank, world_size=world_size)
            return rank

        return on_ranks(world_size, work)

    one_rank = Places(table_wise=("t",))
    ranks = placed(2, one_rank)
    want = of_all([rank.rows() for rank in ranks])
    assert len(want) == 50
    for step, (world_size, places) in enumerate(((3, Places()), (4, one_rank), (1, Places())), start=1):
        ranks = placed(world_size, places, save_ranks(tmp_path, step, [rank.set for rank in ranks]))
        assert of_all([rank.rows() for rank in ranks]) == want
        sizes = [len(rank.rows()) for rank in ranks]
        assert (sizes[0] == 50) == (world_size != 3)
    assert verify(tmp_path) == []
