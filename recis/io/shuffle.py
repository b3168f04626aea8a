"""The rows of one lane in the order they are delivered: chunks of its units, shuffled in blocks.

The shuffle buffer of a lane is filled with `block_rows` rows, delivered in a random order, and filled again. Block b of a
lane in an epoch is permuted by Philox(seed, epoch) at (lane, b) alone, so where a lane stands is told by how many rows it
has delivered: no buffer has to be saved. After a restart the block that was being delivered is read once more, and nothing
before it. Rows mix within a block, blocks of all lanes mix in a batch, and the order of the units changes each epoch.
"""

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import pyarrow as pa

from recis.errors import DataError
from recis.io.lanes import permutation
from recis.io.source import Source


def lane_chunks(source: Source, units: Sequence[int], *, first_row: int, batch_rows: int) -> Generator[pa.RecordBatch]:
    """Yield the rows of units one after the other, from row `first_row` of the lane on."""
    for unit in units:
        rows = source.units[unit].rows
        if rows is not None and first_row >= rows:
            first_row -= rows
            continue
        yield from source.chunks(unit, first_row=first_row, batch_rows=batch_rows)
        first_row = 0


def shuffled(
    chunks: Iterator[pa.RecordBatch],
    *,
    block_rows: int,
    first_block: int,
    chunk_rows: int,
    seed: int,
    epoch: int,
    lane: int,
) -> Generator[pa.RecordBatch]:
    """Yield the rows in blocks of `block_rows` (the last may be smaller), each permuted.

    Args:
        chunks: the rows of the lane from row first_block * block_rows on.
        block_rows: size of the lane's shuffle buffer.
        first_block: number of the first block in the epoch.
        chunk_rows: small blocks are yielded together, up to about so many rows.
        seed: from the config.
        epoch: from 0.
        lane: from 0.
    """
    rows_at_once = block_rows * max(1, chunk_rows // block_rows)
    block, held, num_held = first_block, [], 0

    def permuted(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
        whole = join(parts, parts[0].schema)
        orders = []
        for number, start in enumerate(range(0, whole.num_rows, block_rows), start=block):
            num_rows = min(block_rows, whole.num_rows - start)
            orders.append(start + permutation(num_rows, seed=seed, epoch=epoch, stream=1 + lane, block=number))
        return whole.take(pa.array(np.concatenate(orders)))

    for chunk in chunks:
        rest = chunk
        while num_held + rest.num_rows >= rows_at_once:
            part = rows_at_once - num_held
            yield permuted([*held, rest.slice(0, part)])
            block, held, num_held, rest = block + rows_at_once // block_rows, [], 0, rest.slice(part)
        if rest.num_rows:
            held.append(rest)
            num_held += rest.num_rows
    if held:
        yield permuted(held)


def join(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows of all batches as one batch; no copy where there is only one.

    Raises:
        DataError: a column of strings or lists has more than 2**31 - 1 bytes or entries in it.
    """
    if len(batches) == 1:
        return batches[0]
    joined = pa.Table.from_batches(batches, schema).combine_chunks().to_batches()
    if len(joined) > 1:
        option = "use a smaller batch_size or shuffle_rows"
        raise DataError("more than 2**31 - 1 entries of one column in a step or shuffle block", option=option)
    return joined[0] if joined else pa.RecordBatch.from_pylist([], schema)
