"""A table against a dict: any order of lookups, step ends, evictions, edits, saves and loads keeps both equal."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis.embedding import AfterSightings, LruCapacity, TableConfig, TableSet, TtlSteps, Uniform
from recis.optim import Adam
from recis_kernels.philox import table_key
from recis_kernels.row_init import initial_values

DIM = 3
IDS = st.lists(st.sampled_from([-(2**63), -2, -1, 0, 1, 2, 3, 5, 8, 2**40, 2**63 - 1]), max_size=6)
INITIALIZER = Uniform(-1.0, 1.0)


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


class PlainRow:
    """What a row must hold."""

    def __init__(self, row_id, step):
        key = torch.tensor([table_key(3, "item")])
        self.weight = initial_values(tensor([row_id]), DIM, key, INITIALIZER.spec())[0]
        self.m = torch.zeros(DIM)
        self.last_seen, self.count = step, 0


class TableMachine(RuleBasedStateMachine):
    def build(self):
        config = TableConfig(
            name="item",
            features=("f",),
            embedding_dim=DIM,
            initializer=INITIALIZER,
            optimizer=Adam(lr=0.1),
            admission=AfterSightings(self.needed),
            eviction=(TtlSteps(self.ttl), LruCapacity(self.most)),
        )
        other = TableConfig(
            name="other", features=("g",), embedding_dim=DIM, initializer=INITIALIZER, optimizer=Adam(lr=0.2)
        )
        return TableSet([other, config], seed=3, block_rows=2)

    @initialize(needed=st.integers(1, 3), ttl=st.integers(1, 5), most=st.integers(2, 8))
    def start(self, needed, ttl, most):
        self.needed, self.ttl, self.most = needed, ttl, most
        self.tables = self.build()
        self.tables["other"].lookup(tensor([1, 2, 3]), train=True, step=1)  # shares the store; must not notice anything
        self.tables.end_step(1)
        self.step = 2
        self.rows: dict[int, PlainRow] = {}
        self.sightings: dict[int, list[int]] = {}  # id -> [count, last_seen]
        self.outcome: dict[int, str] = {}  # of the step under way
        self.positions: dict[int, int] = {}
        names = ("found", "inserted", "rejected", "evicted", "default_reads")
        self.total: dict[str, int] = {name: 0 for name in names}  # noqa: C420  fromkeys would fix the keys' type

    @property
    def table(self):
        return self.tables["item"]

    @rule(ids=IDS)
    def look_up(self, ids):
        rows, numbers = self.table.lookup(tensor(ids), train=True, step=self.step)
        for row_id in ids:
            if row_id not in self.rows and self.sightings.get(row_id, [0])[0] + 1 >= self.needed:
                self.rows[row_id] = PlainRow(row_id, self.step)
                self.outcome.setdefault(row_id, "inserted")
            self.outcome.setdefault(row_id, "found" if row_id in self.rows else "rejected")
            self.positions[row_id] = self.positions.get(row_id, 0) + 1
        for row_id, row, number in zip(ids, rows, numbers.tolist(), strict=True):
            held = self.rows.get(row_id)
            assert (number >= 0) == (held is not None)
            assert torch.equal(row, torch.zeros(DIM) if held is None else held.weight)

    @rule(ids=IDS)
    def read(self, ids):
        rows, numbers = self.table.lookup(tensor(ids), train=False, step=self.step)
        assert (numbers >= 0).tolist() == [row_id in self.rows for row_id in ids]
        for row_id, row in zip(ids, rows, strict=True):
            assert torch.equal(row, self.rows[row_id].weight if row_id in self.rows else torch.zeros(DIM))
        self.total["default_reads"] += sum(row_id not in self.rows for row_id in ids)

    @rule()
    def end_step(self):
        self.tables.end_step(self.step)
        for row_id, outcome in self.outcome.items():
            self.total[outcome] += 1
            row = self.rows.get(row_id)
            if row is not None:
                row.last_seen, row.count = self.step, row.count + self.positions[row_id]
                self.sightings.pop(row_id, None)
            elif outcome == "rejected":
                count = self.sightings.get(row_id, [0])[0] + self.positions[row_id]
                self.sightings[row_id] = [count, self.step]
        self.outcome, self.positions = {}, {}
        self.sightings = {i: seen for i, seen in self.sightings.items() if self.step - seen[1] < self.ttl}
        self._evict([i for i, row in self.rows.items() if self.step - row.last_seen >= self.ttl])
        order = sorted(self.rows, key=lambda i: (self.rows[i].last_seen, i))
        self._evict(order[: max(0, len(order) - self.most)])
        self.step += 1

    def _evict(self, ids):
        self.total["evicted"] += len(ids)
        for row_id in ids:
            del self.rows[row_id]

    def _between_steps(self):
        if self.outcome:
            self.end_step()

    @rule(ids=IDS)
    def remove(self, ids):
        self._between_steps()
        assert self.table.remove(tensor(ids)) == len(set(ids) & set(self.rows))
        for row_id in set(ids):
            self.rows.pop(row_id, None)
            self.sightings.pop(row_id, None)

    @rule(back=st.integers(0, 4))
    def evict_old(self, back):
        self._between_steps()
        old = sorted(row_id for row_id, row in self.rows.items() if row.last_seen < self.step - back)
        assert self.table.evict_older_than(self.step - back).tolist() == old
        self._evict(old)

    @rule(ids=IDS, value=st.floats(-4, 4, width=16), with_state=st.booleans())
    def insert(self, ids, value, with_state):
        self._between_steps()
        weight = torch.full((len(ids), DIM), value)
        state = {"m": 2 * weight} if with_state else None
        self.table.insert(tensor(ids), weight, state)
        for row_id in ids:
            row = self.rows.setdefault(row_id, PlainRow(row_id, self.step))
            row.weight, row.last_seen = weight[0], self.step
            row.m = 2 * weight[0] if with_state else row.m
            self.sightings.pop(row_id, None)

    @rule(base=st.booleans())
    def save_and_load(self, base):
        self._between_steps()
        fields, state, admission = self.table.export(), self.table.state(), self.table.admission_state()
        others = self.tables["other"].export()
        self.tables = self.build()
        self.table.import_rows(fields)
        self.table.load_state(state)
        self.table.load_admission_state(admission)
        self.tables["other"].import_rows(others)
        self.tables.load_step(self.step - 1)
        if base:
            self.table.mark_base()

    @rule(ids=IDS)
    def delta(self, ids):
        self._between_steps()
        self.table.mark_base()
        before = self.table.export()
        base_step = self.step - 1
        self.look_up(ids)
        self.end_step()
        rows, gone = self.table.export(since_step=base_step), self.table.tombstones()
        copy = self.build()["item"]
        copy.import_rows(before)
        copy.apply_delta(gone, rows)
        want = self.table.export()
        got = copy.export()
        assert all(torch.equal(got[name], want[name]) for name in want)

    @invariant()
    def same_rows(self):
        if not hasattr(self, "tables"):
            return
        out = self.table.export()
        assert out["ids"].tolist() == self.table.ids().tolist() == sorted(self.rows)
        if self.rows:
            rows = [self.rows[row_id] for row_id in sorted(self.rows)]
            assert torch.equal(out["weight"], torch.stack([row.weight for row in rows]))
            assert torch.equal(out["state.m"], torch.stack([row.m for row in rows]))
            if not self.outcome:
                assert out["last_seen"].tolist() == [row.last_seen for row in rows]
                assert out["count"].tolist() == [row.count for row in rows]
        counters = self.table.counters()
        now = dict(self.total)
        for outcome in self.outcome.values():
            now[outcome] += 1
        assert {name: getattr(counters, name) for name in now} == now
        assert counters.size == len(self.rows)
        assert self.tables["other"].ids().tolist() == [1, 2, 3]


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
