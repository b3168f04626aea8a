"""Spread the tables of a run over ranks: every store gets an exchange, and what belongs to a table as a whole is shared.

Where a table lies, `Places` says. Capacities, clocks and norms are decided by all owners together (`agreement`). Two limits
are dealt instead: `max_rows` of a table and `max_ids` of exact counters hold per owner in proportion to its slices, so that a
lookup need not ask the others.
"""

from collections.abc import Sequence

import torch

from recis.distributed.config import Places
from recis.distributed.exchange import TableExchange
from recis.distributed.ranks import Ranks
from recis.embedding.rows import RowStore
from recis.embedding.table_set import TableSet
from recis.errors import ConfigError, nearest
from recis_kernels.ids_partition import NUM_SLICES


def share_tables(
    table_set: TableSet,
    ranks: Ranks,
    *,
    rows_dtype: torch.dtype = torch.float32,
    places: Places | None = None,
) -> None:
    """Let the tables of a set be shared by all ranks; every rank calls it, before the first lookup.

    Args:
        table_set: empty tables.
        ranks: the job.
        rows_dtype: what rows and gradients travel as.
        places: where the tables lie, None: all are sliced; tables of other sets may be named too, see `check_places`.

    Raises:
        ConfigError: a table's setting works in one process only.
    """
    for store in table_set.stores:
        _check(store, ranks.world_size)
        exchange = TableExchange(store, ranks, rows_dtype=rows_dtype, places=places)
        store.exchange = exchange
        _deal_limits(store, exchange)
    if ranks.world_size > 1:
        table_set.clock.agree = lambda seconds: int(ranks.broadcast(seconds, "the clock"))


def _check(store: RowStore, world_size: int) -> None:
    if store.is_padded or store.device.type != "cpu":
        raise ConfigError(
            f"{store.describe()} lies on {store.device}: rows are shared by CPU processes in this release; build the "
            "tables on the CPU, or train on one GPU without torchrun"
        )
    if world_size == 1:
        return
    for config in store.configs:
        if config.train_default_row:
            raise ConfigError(
                f"table {config.name!r}: train_default_row=True needs one process, each owner would train a row of its own; "
                "set it to False, or train without torchrun"
            )


def _deal_limits(store: RowStore, exchange: TableExchange) -> None:
    bounds = [exchange.slices_of(table) for table in range(store.num_tables)]
    mine = [stop - first for first, stop in bounds]
    store.totals.deal_limits(mine, NUM_SLICES)
    if store.admission.exact is not None:
        store.admission.exact.deal_limits(mine, NUM_SLICES)


def check_places(table_sets: Sequence[TableSet], places: Places) -> None:
    """Raise ConfigError where places name a table that none of the sets has."""
    known = [table.name for table_set in table_sets for table in table_set]
    for setting in ("table_wise", "data_parallel"):
        for name in getattr(places, setting):
            if name not in known:
                raise ConfigError(f"parallel.places.{setting}: the model has no table {name!r}; {nearest(name, known)}")
