"""Read rows from row blocks, one by one or pooled per bag. (Being written; signatures are final.)

Absence: inverse -1 gives zeros (padding); a distinct row -1 (unadmitted) gives zeros, or the default row of its table:
`default` is [T, D] float32 with `table_of_row` [U] int32.
"""

from torch import Tensor

from recis_kernels.row_blocks import RowBlocks


def row_gather(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None = None,
    *,
    default: Tensor | None = None,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Return the weights of rows[inverse] (inverse None: of rows) as float32 [L, D]."""
    raise NotImplementedError


def embedding_bag(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    factors: Tensor | None = None,
    *,
    default: Tensor | None = None,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Return float32 [N, D]: out[n] = sum over positions p of bag n of factors[p] * row(rows[inverse[p]])."""
    raise NotImplementedError


def bag_factors(offsets: Tensor, weights: Tensor | None, mean: Tensor | bool) -> Tensor | None:
    """Return what each position is multiplied with, [L] float32, or None for all ones; differentiable in weights.

    mean: bool, or bool [F] with F dividing the number of bags (key-major): which features take the mean. Sum: w (or 1).
    Mean: w / sum of the bag's w; 0 where that sum is 0.
    """
    raise NotImplementedError


def factor_grads(
    blocks: RowBlocks,
    rows: Tensor,
    inverse: Tensor | None,
    offsets: Tensor,
    grad: Tensor,
    *,
    default: Tensor | None = None,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Return d loss / d factors, [L] float32: the dot product of each position's row with grad [N, D] of its bag."""
    raise NotImplementedError


def default_row_grads(view, rows: Tensor, table_of_row: Tensor, num_tables: int, dim: int) -> Tensor:
    """Return the gradient of the default rows [T, D]: what reached positions whose row is -1."""
    raise NotImplementedError


def tile_positions(offsets: Tensor, num_kept: int) -> Tensor:
    """Return [N * num_kept] int64: the first num_kept positions of each bag, -1 where the bag is shorter."""
    raise NotImplementedError
