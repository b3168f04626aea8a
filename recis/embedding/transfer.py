"""Move rows and the rest of a table's state out of and into a store: checkpoints, deltas, imports, edits by hand.

All of it works between steps, by whole tables, and does not depend on where rows lie: what goes out is ordered by id.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recis.embedding.snapshot import exported_fields

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore

_META = ("last_seen", "count", "last_seen_s")


def changed_rows(
    store: "RowStore", table: int, since_step: int | None, *, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (ids, rows) of a table; with since_step those touched later or written by hand since the base.

    ordered: by ascending id; False: in no order.

    Raises:
        ValueError: since_step is given, and no base was marked that hand-made changes could be told from.
    """
    ids, rows = store.index.export(table, ordered=ordered)
    if since_step is None:
        return ids, rows
    _require_base(store, table)
    recent = store.blocks.read(rows, ("last_seen",))["last_seen"] > since_step
    recent |= torch.isin(ids, store.logs[table].hand_written().to(ids.device))
    return ids[recent], rows[recent]


def tombstones(store: "RowStore", table: int) -> Tensor:
    """Return the ids removed since the base, ascending. Raises ValueError where no base was marked."""
    _require_base(store, table)
    return store.logs[table].tombstones()


def _require_base(store: "RowStore", table: int) -> None:
    if not store.logs[table].started:
        name = store.configs[table].name
        raise ValueError(
            f"table {name!r} has no base to be a delta to: call mark_base() when the base is saved or loaded"
        )


def export(store: "RowStore", table: int, since_step: int | None) -> dict[str, Tensor]:
    """Return the rows of a table by name, see HashTable.export."""
    ids, rows = changed_rows(store, table, since_step)
    return exported_fields(ids, store.blocks.read(rows))


def import_rows(store: "RowStore", table: int, fields: Mapping[str, Tensor]) -> None:
    """Write rows as `export` returns them, see HashTable.import_rows."""
    fields = _checked_fields(store, table, fields)
    store.changed_by_hand()
    ids = fields["ids"]
    if not bool((ids[1:] > ids[:-1]).all()):  # a checkpoint's ids ascend: nothing to sort
        ordered = ids.sort().values
        twice = ordered[1:][ordered.diff() == 0]
        if twice.numel():
            raise ValueError(f"table {_name(store, table)}: ids to import must be distinct; {int(twice[0])} repeats")
    rows = _rows_for(store, table, ids, fresh=True)
    values = {name: values for name, values in fields.items() if name not in ("ids", "last_seen_s")}
    store.blocks.write(
        rows, values
    )  # what is left out stays as a fresh row has it: seen in the step under way, count 0
    if store.has_clock:
        store.write_clock(rows, fields.get("last_seen_s", torch.full_like(ids, store.clock.now())))
    _written(store, table, ids)


def insert(store: "RowStore", table: int, ids: Tensor, weights: Tensor, state: Mapping[str, Tensor] | None) -> None:
    """Give ids rows by force, see HashTable.insert."""
    fields = {"ids": ids, "weight": weights, **{f"state.{name}": values for name, values in (state or {}).items()}}
    fields = _checked_fields(store, table, fields)
    store.changed_by_hand()
    last = {row_id: place for place, row_id in enumerate(fields["ids"].tolist())}
    kept = torch.tensor(sorted(last.values()), dtype=torch.int64).to(store.device)
    fields = {name: values[kept] for name, values in fields.items()}
    ids = fields.pop("ids")
    rows = _rows_for(store, table, ids, fresh=False)
    store.blocks.write(rows, {**fields, "last_seen": torch.full((ids.numel(),), store.step, dtype=torch.int32)})
    if store.has_clock:
        store.write_clock(rows, torch.full_like(ids, store.clock.now()))
    _forget_sightings(store, table, ids)
    _written(store, table, ids)


def _rows_for(store: "RowStore", table: int, ids: Tensor, *, fresh: bool) -> Tensor:
    """Return rows of distinct ids, giving one to those that have none; fresh: all of them initialised anew."""
    rows = store.index.find(ids, table)
    new = (rows < 0).nonzero().squeeze(1)
    limit = int(store.totals.limits[table])
    if int(store.sizes[table]) + new.numel() > limit:
        raise ValueError(
            f"table {_name(store, table)}: {new.numel()} new rows beside {store.sizes[table]} would pass max_rows="
            f"{limit}; raise max_rows or bring fewer rows"
        )
    tables = torch.full((ids.numel(),), table, dtype=torch.int32, device=ids.device)
    if new.numel() == ids.numel():  # a table being loaded
        return store.place(ids, tables)
    if new.numel():
        rows[new] = store.place(ids[new], tables[new])
    held = rows.clone()
    held[new] = -1
    store.before_write(held)
    if fresh and new.numel() < ids.numel():
        old = (held >= 0).nonzero().squeeze(1)
        store.initialise(rows[old], ids[old], tables[old])
    return rows


def _forget_sightings(store: "RowStore", table: int, ids: Tensor) -> None:
    store.admission.forget(ids.cpu(), torch.full((ids.numel(),), table, dtype=torch.int32))


def _written(store: "RowStore", table: int, ids: Tensor) -> None:
    store.logs[table].written(ids)
    store.eviction.reset()
    store.index.maintain()


def _name(store: "RowStore", table: int) -> str:
    return repr(store.configs[table].name)


def _checked_fields(store: "RowStore", table: int, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fields with the dtypes rows have, or raise ValueError naming table, field and both shapes."""
    name, layout = _name(store, table), store.layout.fields()
    for needed in ("ids", "weight"):
        if needed not in fields:
            raise ValueError(f"table {name}: rows to write need {needed!r}; got {sorted(fields)}")
    ids = fields["ids"]
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"table {name}: ids must be int64 [n]; got {ids.dtype} {tuple(ids.shape)}")
    out = {"ids": ids.to(store.device)}
    for field, values in fields.items():
        if field == "ids" or (field == "last_seen_s" and not store.has_clock):
            continue  # a clock reading is dropped where no policy asks for it
        if field not in layout or field == "id":
            have = [known for known in layout if known != "id"]
            raise ValueError(f"table {name}: rows have no field {field!r}, they have {have}; leave it out")
        _, width, dtype = layout[field]
        shape = (ids.numel(), width) if width else (ids.numel(),)
        if tuple(values.shape) != shape:
            raise ValueError(f"table {name}: {field} must be {shape}; got {tuple(values.shape)}")
        out[field] = values.to(store.device, torch.int64 if field == "last_seen_s" else dtype)
    return out


def remove(store: "RowStore", table: int, ids: Tensor) -> int:
    """Take rows away by hand, see HashTable.remove."""
    ids, _, _ = store.one_range(ids, table)
    store.changed_by_hand()
    ids = ids.unique()
    _forget_sightings(store, table, ids)
    rows = store.index.find(ids, table)
    rows = rows[rows >= 0]
    store.free(rows)
    store.index.maintain()
    return rows.numel()


def evict_older_than(store: "RowStore", table: int, step: int) -> Tensor:
    """Evict rows last seen before `step`, see HashTable.evict_older_than. Lookups not yet booked count as seen."""
    store.changed_by_hand()
    store.book_last_seen()
    _, rows = store.index.export(table)
    old = store.blocks.read(rows, ("last_seen",))["last_seen"] < step
    ids = store.evict(rows[old])
    store.index.maintain()
    return ids


def clear(store: "RowStore", table: int) -> None:
    """Make a table as new, see HashTable.clear."""
    store.changed_by_hand()
    wanted = torch.zeros(
        store.reserved + 1, dtype=torch.bool, device=store.device
    )  # the last: default rows, which stay
    wanted[table] = True
    store.free(store.owners.rows_of(wanted))
    store.index.clear(table)
    store.admission.clear(table)
    store.lookups.pull_totals()
    store.totals.clear(table)
    store.forget_lookups(table)
    store.t[table] = 0
    if int(store.defaults.rows[table]) >= 0:
        store.initialise_default_rows(torch.tensor([table]).to(store.device))


def reserve(store: "RowStore", table: int, num_rows: int) -> None:
    """Make room for num_rows rows of a table in all."""
    store.index.reserve(table, num_rows)
    more = max(0, num_rows - int(store.sizes[table]))
    store.blocks.grow(store.owners.num_used + more)


def table_state(store: "RowStore", table: int) -> dict[str, Any]:
    """Return what a table knows beside rows and sightings, JSON-able."""
    store.lookups.pull_totals()
    return {"t": int(store.t[table]), "counters": store.totals.state(table)}


def load_table_state(store: "RowStore", table: int, state: Mapping[str, Any]) -> None:
    """Set what table_state returned; what the table was loaded from is the base of its next delta."""
    store.lookups.pull_totals()
    store.totals.load(table, state["counters"])
    store.t[table] = int(state["t"])
    store.logs[table].start()


def tensor_state(store: "RowStore", table: int) -> dict[str, Tensor]:
    """Return what a table knows beside its rows as tensors: sightings, default row, change log. See HashTable."""
    state = store.admission.state(table)
    row = store.defaults.rows[table : table + 1]
    if int(row) >= 0:
        fields = exported_fields(row, store.blocks.read(row))
        state |= {f"default.{name}": values for name, values in fields.items() if name not in ("ids", *_META)}
    log = store.logs[table]
    if log.started:
        state |= {"log.removed": log.tombstones(), "log.written": log.hand_written()}
    return {name: values for name, values in state.items() if values.numel()}


def load_tensor_state(store: "RowStore", table: int, state: Mapping[str, Tensor], *, merge: bool) -> None:
    """Set (or merge) what tensor_state returned."""
    store.admission.load(table, state, merge=merge)
    default = {name.removeprefix("default."): values for name, values in state.items() if name.startswith("default.")}
    row = store.defaults.rows[table : table + 1]
    if default and int(row) >= 0:
        store.before_write(row)
        store.blocks.write(row, default)
    log = store.logs[table]
    if log.started:
        none = torch.empty(0, dtype=torch.int64, device=store.device)
        removed, written = state.get("log.removed", none), state.get("log.written", none)
        if merge:
            removed, written = torch.cat([log.tombstones(), removed]), torch.cat([log.hand_written(), written])
        log.load(removed, written)
