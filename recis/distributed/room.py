"""Memory that an exchange of rows keeps from step to step, and what a row is rounded to on its way."""

import torch
from torch import Tensor

from recis.embedding.lookups import StoreLookup
from recis_kernels.host_memory import zeroed_bytes
from recis_kernels.row_blocks import RowBlocks


class Memory:
    """Room for float32 rows [N, D] that is kept from step to step: new pages cost more than what is written to them."""

    def __init__(self, dim: int) -> None:
        self._rows = torch.empty(0, dim)
        self.user: StoreLookup | None = None

    def rows(self, num_rows: int) -> Tensor:
        """Return room for num_rows rows; what was in it may be gone."""
        if num_rows > self._rows.shape[0]:
            dim = self._rows.shape[1]
            self._rows = zeroed_bytes(4 * dim * (num_rows + num_rows // 4)).view(torch.float32).view(-1, dim)
        return self._rows[:num_rows]


class Rooms:
    """Memories of rows [N, D] that are lent until an update has consumed what is in them."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self.memories: list[Memory] = []

    def rows(self, num_rows: int, user: StoreLookup) -> Tensor:
        """Return room for num_rows rows that nobody else gets before the gradients of `user` are applied or dropped."""
        if not num_rows:
            return torch.empty(0, self._dim)
        free = next((one for one in self.memories if one.user is None or one.user.applied), None)
        if free is None:
            free = Memory(self._dim)
            self.memories.append(free)
        free.user = user
        return free.rows(num_rows)


class Received:
    """Rows that a lookup brought from their owners: what pooling and backward see in place of the store."""

    def __init__(self, dim: int) -> None:
        self.memory = Memory(dim)
        self.blocks = RowBlocks.of_tensor(self.memory.rows(0))
        self.number = 0

    def micro_batch(self, source: object) -> int:
        """Return the number of this lookup among those of its collection since the last update."""
        return self.number


def round_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round rows in place to what they would be after a journey as `dtype`."""
    if dtype != torch.float32:
        rows.copy_(rows.to(dtype))
    return rows
