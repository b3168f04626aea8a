"""Training data of a fixed number of batches that a function makes, with the position that a checkpoint keeps."""

from collections.abc import Callable, Iterator
from typing import Any

from recis.io.batch import Batch


class BatchSource:
    """Batches make(0) .. make(count - 1)."""

    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self.make, self.count, self.next = make, count, 0

    def __iter__(self) -> Iterator[Batch]:
        while self.next < self.count:
            self.next += 1
            yield self.make(self.next - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]
