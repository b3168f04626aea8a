"""Decide which ids without a row get one, for all tables of a store at once.

    Always                yes
    AfterSightings(n)     sightings in earlier steps + 1 >= n
    WithProbability(p)    u < p, u = (word >> 8) * 2**-24 of the admission stream of this step, column 0

Decisions read the counts, `after_step` moves them: two lookups of one step therefore decide alike.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis.embedding.admission import AfterSightings, CountMin, Exact, WithProbability
from recis.embedding.config import TableConfig
from recis.embedding.eviction import TtlSeconds, TtlSteps
from recis.embedding.expiry import TtlQueue
from recis.embedding.sightings import ExactSightings, SketchSightings
from recis_kernels.row_init import admission_draws

_NO_LIMIT = torch.iinfo(torch.int64).max


class AdmissionControl:
    """Admission of the tables of one store.

    Args:
        configs: of the T tables.
        keys: int64 [T], key64 of each table, on the device of the ids to decide about.

    Attributes:
        counts_sightings: whether a table counts; sightings are counted on the host, so `decide` then takes CPU tensors.
        admits_all: whether every id gets a row at once.
    """

    def __init__(self, configs: Sequence[TableConfig], keys: Tensor) -> None:
        self._keys = keys
        self._configs = tuple(configs)
        needed = [rule.n if isinstance(rule := config.admission, AfterSightings) else 1 for config in configs]
        chance = [rule.p if isinstance(rule := config.admission, WithProbability) else 1.0 for config in configs]
        self._needed = torch.tensor(needed)
        self._chance = torch.tensor(chance, dtype=torch.float64).to(keys.device)
        self._draws = any(p < 1 for p in chance)
        self.counts_sightings = max(needed, default=1) > 1
        self.admits_all = not (self._draws or self.counts_sightings)
        self.exact, self.sketch = self._counters()
        self._queues = self._ttl_queues()

    def _counters(self) -> tuple[ExactSightings | None, SketchSightings | None]:
        counters = [
            config.admission.counter
            if isinstance(config.admission, AfterSightings) and config.admission.n > 1
            else None
            for config in self._configs
        ]
        self._is_exact = torch.tensor([isinstance(counter, Exact) for counter in counters], dtype=torch.bool)
        limits = [counter.max_ids if isinstance(counter, Exact) else None for counter in counters]
        exact = sketch = None
        if any(isinstance(counter, Exact) for counter in counters):
            limit = torch.tensor([_NO_LIMIT if most is None else most for most in limits])
            exact = ExactSightings(len(counters), limit)
        if any(isinstance(counter, CountMin) for counter in counters):
            sketch = SketchSightings([counter if isinstance(counter, CountMin) else None for counter in counters])
        self._has_limits = any(most is not None for most in limits)
        return exact, sketch

    def _ttl_queues(self) -> list[tuple[TtlQueue, bool]]:
        """One queue per time to live; exact counters forget idle ids by the rule that evicts rows."""
        if self.exact is None:
            return []
        wanted: dict[tuple[int, bool], Tensor] = {}
        for number, config in enumerate(self._configs):
            for policy in config.eviction:
                if isinstance(policy, TtlSteps | TtlSeconds):
                    key = (policy.n, isinstance(policy, TtlSeconds))
                    wanted.setdefault(key, torch.zeros(len(self._configs) + 1, dtype=torch.bool))[number] = True
        return [(self.exact.ttl_queue(ttl, mask, clock=clock), clock) for (ttl, clock), mask in wanted.items()]

    def decide(self, ids: Tensor, tables: Tensor, step: int) -> Tensor | None:
        """Return which of the ids [N] of tables [N] (none has a row) get one in this step: bool [N], None = all."""
        admitted = None
        if self.counts_sightings:
            admitted = self._sightings(ids, tables) + 1 >= self._needed[tables.long()]
        if self._draws:
            draw = admission_draws(ids, self._keys.to(ids.device), step, tables=tables).double()
            lucky = draw < self._chance.to(ids.device)[tables.long()]
            admitted = lucky if admitted is None else admitted & lucky
        return admitted

    def _sightings(self, ids: Tensor, tables: Tensor) -> Tensor:
        found = torch.zeros(ids.numel(), dtype=torch.int64)
        if self.exact is not None:
            found = self.exact.counts(ids, tables)
        if self.sketch is not None:
            estimate = self.sketch.counts(ids, tables)
            found = torch.where(self._is_exact[tables.long()], found, estimate)
        return found

    def sightings(self, ids: Tensor, table: int) -> Tensor:
        """Return the sightings (or their estimate) in earlier steps of ids [N] without a row, int64 [N]."""
        if self._needed[table] <= 1:
            return torch.zeros(ids.numel(), dtype=torch.int64)
        return self._sightings(ids, torch.full((ids.numel(),), table, dtype=torch.int32))

    def add(self, ids: Tensor, tables: Tensor, counts: Tensor, *, step: int, clock_s: int) -> None:
        """Count sightings [N] of distinct (tables, ids) that ended the step without a row."""
        if not self.counts_sightings:
            return
        if self.sketch is not None:
            self.sketch.add(ids, tables, counts)
        if self.exact is not None:
            exact = self._is_exact[tables.long()].nonzero().squeeze(1)
            self.exact.add(ids[exact], tables[exact], counts[exact].long(), step, clock_s)

    def forget(self, ids: Tensor, tables: Tensor) -> None:
        """Forget sightings of (tables, ids), which got a row or were removed; sketches cannot."""
        if self.exact is not None:
            self.exact.forget(ids, tables)

    def expire(self, *, step: int, clock_s: int) -> None:
        """Forget idle ids by the tables' time to live, then those past max_ids."""
        if self.exact is None:
            return
        for queue, is_clock in self._queues:
            self.exact.expire(queue, clock_s if is_clock else step)
        if self._has_limits:
            self.exact.trim()
        self.exact.maintain()

    def clear(self, table: int) -> None:
        """Forget all sightings of one table."""
        if self.exact is not None:
            self.exact.clear(table)
        if self.sketch is not None:
            self.sketch.clear(table)

    def state(self, table: int) -> dict[str, Tensor]:
        """Return the sightings of one table as tensors by name; {} where none are counted."""
        if self.exact is not None and self._is_exact[table]:
            return self.exact.state(table)
        if self.sketch is not None and self._needed[table] > 1:
            return self.sketch.state(table)
        return {}

    def load(self, table: int, state: Mapping[str, Tensor], *, merge: bool) -> None:
        """Set, or with merge add to, what `state` returned; what this table's counter cannot use is an error.

        Raises:
            ValueError: the state is of another kind of counter, or of a sketch of another shape.
        """
        given = "sightings.ids" if "sightings.ids" in state else "sketch" if "sketch" in state else None
        wanted = next(iter(self.state(table)), None)
        if not merge:
            self.clear(table)
        if given is None:
            return
        if given != wanted:
            raise ValueError(
                f"table {self._configs[table].name!r}: the saved state holds {given!r}, its admission "
                f"{self._configs[table].admission} keeps {wanted!r}; use the same admission, or leave this state out"
            )
        if given == "sketch" and self.sketch is not None:
            self.sketch.load(table, state, merge=merge)
        elif self.exact is not None:
            self.exact.load(table, state, merge=merge)
            for queue, _ in self._queues:
                queue.reset()
