"""One row per table that ids without a row read, for tables that ask for it.

Default rows lie in the store like others, so that gathering, updating and saving them needs no code of its own; they are
not in the index and belong to no table's size, export or eviction. A default row starts as id 0 of a table named
"<table>/default" would, which is a pure function of seed and name as for any row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recis.embedding.config import TableConfig
from recis.embedding.lookups import StoreLookup


class DefaultRows:
    """Default rows of the T tables of a store.

    Attributes:
        tables: int64 [K], the tables that have one.
        rows: int64 [T], its row number, -1 = none; set by the store once it has taken the rows.
    """

    def __init__(self, configs: Sequence[TableConfig], device: torch.device) -> None:
        with_default = [number for number, config in enumerate(configs) if config.unadmitted == "default_row"]
        self.tables = torch.tensor(with_default, dtype=torch.int64).to(device)
        self.rows = torch.full((len(configs),), -1, device=device)
        self._trained = torch.tensor([config.train_default_row for config in configs]).to(device)

    def redirect(self, found: StoreLookup, missing: Tensor, *, train: bool) -> Tensor:
        """Point reads of found.ids[missing] at their tables' default rows; return the rows [U] an update may change.

        Rows of an update are distinct, so all ids that read one trained default row are made to share one index of the
        lookup: the smallest of theirs speaks for them.
        """
        tables = found.tables[missing].long()
        found.read_rows = found.row_numbers.clone()
        found.read_rows[missing] = self.rows[tables]
        if not train:
            return found.row_numbers
        trained = self._trained[tables]
        sharing, tables = missing[trained], tables[trained]
        if sharing.numel() == 0:
            return found.row_numbers
        num_ids = found.ids.numel()
        speaker = torch.full((self.rows.numel(),), num_ids).scatter_reduce(0, tables, sharing, "amin")
        stands_for = torch.arange(num_ids, dtype=found.inverse.dtype)
        stands_for[sharing] = speaker[tables].to(found.inverse.dtype)
        found.inverse = stands_for[found.inverse]
        update = found.row_numbers.clone()
        update[speaker[tables]] = self.rows[tables]
        return update

    def redirect_padded(self, found: StoreLookup, missing: Tensor, *, train: bool) -> Tensor:
        """Do `redirect` with missing a mask, bool [L], and without a host sync."""
        tables, rows = found.tables.long(), found.row_numbers
        found.read_rows = torch.where(missing, self.rows[tables], rows)
        if not train:
            return rows
        nobody, places = self.rows.numel(), torch.arange(rows.numel(), device=rows.device)
        sharing = missing & self._trained[tables]
        group = torch.where(sharing, tables, nobody)
        speaker = torch.full((nobody + 1,), rows.numel(), device=rows.device).scatter_reduce(0, group, places, "amin")
        stands_for = torch.where(sharing, speaker[group], places)
        found.inverse = stands_for.to(found.inverse.dtype)[found.inverse.long()]
        return torch.where(sharing & (stands_for == places), self.rows[tables], rows)
