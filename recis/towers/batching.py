"""Put texts of like length into one batch, so that little of it is padding.

    waste of a batch = 1 - (sum of its lengths) / (rows * longest)

Texts are sorted by length and cut greedily: a batch ends where one more text would pass `max_tokens` cells or `max_waste`.
"""

from collections.abc import Sequence

from recis.errors import ConfigError


def length_batches(lengths: Sequence[int], *, max_tokens: int, max_waste: float = 0.05) -> list[list[int]]:
    """Return the numbers 0..N - 1 in batches, shortest texts first, equal lengths in input order.

    A text of more than max_tokens tokens is a batch of its own. The waste of every batch is at most max_waste.

    Raises:
        ConfigError: max_tokens is below 1, or max_waste is not in [0, 1).
    """
    if max_tokens < 1 or not 0 <= max_waste < 1:
        raise ConfigError(f"max_tokens must be at least 1 and max_waste in [0, 1); got {max_tokens}, {max_waste}")
    batches: list[list[int]] = []
    batch: list[int] = []
    total = 0
    for number in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = lengths[number]
        cells = (len(batch) + 1) * length
        if batch and (cells > max_tokens or total + length < (1 - max_waste) * cells):
            batches.append(batch)
            batch, total = [], 0
        batch.append(number)
        total += length
    return [*batches, batch] if batch else batches


def padding_waste(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in all cells of some batches; 0 where there are none."""
    cells = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    return 1 - sum(lengths[number] for batch in batches for number in batch) / cells if cells else 0.0
