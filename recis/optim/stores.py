"""Find the row stores behind a model: what the optimizer updates and the clipping norm counts."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from recis.errors import ConfigError
from recis_kernels.row_grads import PendingLookup


def stores_of(source: nn.Module | Iterable[Any]) -> list[Any]:
    """Return the row stores of a module's collections, or of collections or table sets given one by one, each once.

    Raises:
        ConfigError: something given has no tables.
    """
    sets: list[Any]
    if isinstance(source, nn.Module):
        sets = [module.table_set for module in source.modules() if hasattr(module, "table_set")]
    else:
        sets = [_set_of(item) for item in source]
    stores = {id(store): store for table_set in sets for store in table_set.stores}
    return list(stores.values())


def _set_of(item: Any) -> Any:
    found = getattr(item, "table_set", item)
    if not hasattr(found, "stores"):
        raise ConfigError(f"expected an embedding collection or a TableSet; got {type(item).__name__}")
    return found


def names_of(stores: Sequence[Any]) -> list[str]:
    """Return the names of all tables of the stores, in order."""
    return [config.name for store in stores for config in store.configs]


def describe_rows(store: Any, lookup: PendingLookup, indices: Tensor, step: int | None = None) -> list[str]:
    """Return "table 'item', id 42, step 7" for rows of a lookup, given by index [M]; step None: the one under way."""
    ids = store.blocks.read(lookup.rows[indices], ("id",))["id"].tolist()
    tables = lookup.table_of_row[indices].tolist()
    return [
        f"table {store.configs[table].name!r}, id {number}, step {store.step if step is None else step}"
        for table, number in zip(tables, ids, strict=True)
    ]


def shortened(places: Sequence[str], limit: int = 3) -> str:
    """Return the first `limit` of the places and how many more there are."""
    more = f"; and {len(places) - limit} more rows" if len(places) > limit else ""
    return "; ".join(places[:limit]) + more
