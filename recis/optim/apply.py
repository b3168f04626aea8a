"""One torch optimizer for all rows: what backward left in the tables becomes one update per touched row.

    optimizer = SparseOptimizer(model);  loss.backward();  optimizer.step()

Every table is a param group, under its name, so learning rates and the other numbers are read at each step and torch's
schedulers work. A step is one pass per row store: sums of duplicates, the equation, metadata (see
recis_kernels.sparse_update). t, the number of steps of a table, lives in its store and goes into the checkpoint with it.
On a GPU a step waits for nothing, so a gradient that is not finite is named a step later.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis.errors import CheckpointError, ConfigError, RecisError
from recis.optim.config import RowOptimizer, group_names
from recis.optim.stores import describe_rows, names_of, shortened, stores_of
from recis_kernels.row_grads import PendingLookup
from recis_kernels.sparse_update import fused_update, fused_update_flags


class NonFiniteGradient(RecisError):
    """A row's summed gradient is NaN or infinite; that row was left as it was."""


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the rows that the training lookups since the last step have touched.

    Args:
        source: a model with embedding collections anywhere inside, or collections or table sets.
        accumulate_steps: only every k-th `step()` acts, and `zero_grad()` does nothing in between: k backward passes
            then equal one of the big batch (divide the loss by the weight of the whole batch).
        skip_nonfinite: leave rows with a non-finite gradient as they are, count them in `num_skipped`, and go on;
            otherwise `step` raises after all other rows are updated.

    Attributes:
        num_skipped: rows left out because of `skip_nonfinite`, in all; on a GPU reading it waits for the device.

    Raises:
        ConfigError: accumulate_steps below 1, or nothing with tables was given.
    """

    def __init__(
        self, source: nn.Module | Iterable[Any], *, accumulate_steps: int = 1, skip_nonfinite: bool = False
    ) -> None:
        if accumulate_steps < 1:
            raise ConfigError(f"SparseOptimizer: accumulate_steps must be at least 1; got {accumulate_steps}")
        self._stores = stores_of(source)
        self.accumulate_steps = accumulate_steps
        self.skip_nonfinite = skip_nonfinite
        self._num_skipped = 0
        self._skipped_there: dict[torch.device, Tensor] = {}  # counted on a GPU since
        self._calls = 0
        groups = [
            # torch wants a tensor in every group; the rows are not one, so an empty parameter stands for them
            {"params": [nn.Parameter(torch.empty(0))], "name": config.name, **config.optimizer.param_group()}
            for store in self._stores
            for config in store.configs
        ]
        if groups:
            super().__init__(groups, {})
        else:  # a model without tables trains its dense part alone
            super().__init__([nn.Parameter(torch.empty(0))], {"lr": 0.0, "name": ""})
        # lr after lr, and the like, change seldom: the numbers of a group are derived again only when one of them does
        self._numbers: dict[tuple[Any, ...], tuple[float, ...]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all touched rows once, or count the call while gradients accumulate.

        Raises:
            NonFiniteGradient: naming table, id and step. Of rows on a GPU a later `end_step` of their tables raises it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._calls += 1
        if self._calls % self.accumulate_steps:
            return loss
        first = 0
        faults: list[str] = []
        for store in self._stores:
            groups = self.param_groups[first : first + len(store.configs)]
            first += len(store.configs)
            faults += self._update(store, groups)
        if faults:
            raise _not_finite(faults)
        return loss

    @property
    def num_skipped(self) -> int:
        """Rows left out because of `skip_nonfinite`, in all."""
        self._num_skipped += sum(int(count) for count in self._skipped_there.values())
        self._skipped_there.clear()
        return self._num_skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used; while they accumulate, nothing."""
        if self._calls % self.accumulate_steps == 0:
            for store in self._stores:
                store.drop_gradients()

    def _update(self, store: Any, groups: list[dict[str, Any]]) -> list[str]:
        store.t += 1
        lookups = store.pending()
        if not lookups:
            return []
        rule = store.optimizer.rule
        scalars = self._scalars(store, groups)
        for lookup in lookups:
            store.before_write(lookup.rows)
        given: dict[str, Any] = {"step": store.step, "keys": store.keys, "deterministic": store.deterministic}
        if store.is_padded:
            merged, is_bad = fused_update_flags(store.blocks, lookups, rule, scalars, **given)
            store.mark_applied()
            self._look_later(store, merged, is_bad)
            return []
        merged, bad = fused_update(store.blocks, lookups, rule, scalars, **given)
        store.mark_applied()
        if not bad.numel():
            return []
        if self.skip_nonfinite:
            self._num_skipped += bad.numel()
            return []
        return describe_rows(store, merged, bad)

    def _look_later(self, store: Any, merged: PendingLookup, is_bad: Tensor) -> None:
        """Count rows with a gradient that is not finite, or have them named a step later, without a host sync."""
        count, step = is_bad.sum(), store.step
        if self.skip_nonfinite:
            self._skipped_there[count.device] = self._skipped_there.get(count.device, 0) + count
            return
        rows = PendingLookup(merged.rows, merged.table_of_row, merged.counts)  # without the gradients

        def explain(_: int) -> Exception:
            return _not_finite(describe_rows(store, rows, is_bad.nonzero().squeeze(1), step))

        store.faults.ask(count, explain)

    def _scalars(self, store: Any, groups: list[dict[str, Any]]) -> Tensor:
        lines = []
        for config, group, t in zip(store.configs, groups, store.t.tolist(), strict=True):
            optimizer: RowOptimizer = config.optimizer
            key = (type(optimizer), t, *(group[name] for name in group_names(type(optimizer))))
            if key not in self._numbers:
                if len(self._numbers) > 4 * len(self.param_groups):
                    self._numbers.clear()
                self._numbers[key] = optimizer.scalars(group, t)
            lines.append(self._numbers[key])
        return torch.tensor(lines, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the numbers of each table's group by name, and the calls so far; rows and t are the tables' own."""
        groups = {group["name"]: {k: v for k, v in group.items() if k != "params"} for group in self.param_groups}
        return {"groups": groups, "calls": self._calls, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take up what state_dict returned.

        Raises:
            CheckpointError: it is of other tables.
        """
        saved, own = state_dict["groups"], {group["name"]: group for group in self.param_groups}
        if set(saved) != set(own):
            raise CheckpointError(f"the saved optimizer is of tables {sorted(saved)}, this one of {sorted(own)}")
        for name, group in own.items():
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved[name].items()}
            group.update(values)
        self._calls = state_dict["calls"]
        self._num_skipped = state_dict["num_skipped"]
        self._skipped_there.clear()

    @property
    def table_names(self) -> list[str]:
        """Names of the tables, in the order of the param groups."""
        return names_of(self._stores)


def _not_finite(places: Sequence[str]) -> NonFiniteGradient:
    return NonFiniteGradient(
        f"a gradient is not finite: {shortened(places)}; these rows were left as they were. "
        "Lower the learning rate, clip gradients, or set skip_nonfinite"
    )
