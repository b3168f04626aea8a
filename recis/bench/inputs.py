"""Ids, rows and indexes that benchmarks of the kernels work on, on any device, as functions of a seed.

uniform     every row equally likely: at 160 k ids of 2 M rows nearly no repeats
zipf        P(k-th most popular) ~ k ** -1.2, popular rows scattered: the first one is 19 % of all positions
power       ~ k ** -1.05, the distribution of DynamicEmb's published figures
"""

from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels.hash_index import HashIndex
from recis_kernels.row_blocks import RowBlocks, RowLayout

Distribution = Literal["uniform", "zipf", "power"]
EXPONENTS = {"zipf": 1.2, "power": 1.05}
_CHUNK_ROWS = 1 << 18  # written at once


def draw_rows(distribution: Distribution, num_rows: int, num_ids: int, seed: int, device: torch.device) -> Tensor:
    """Return row numbers int64 [num_ids] in [0, num_rows)."""
    rng = np.random.default_rng(seed)
    if distribution == "uniform":
        return torch.from_numpy(rng.integers(0, num_rows, num_ids)).to(device)
    total, places = _power_law(EXPONENTS[distribution], num_rows)
    return torch.from_numpy(places[np.searchsorted(total, rng.random(num_ids) * total[-1])]).to(device)


@cache
def _power_law(exponent: float, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the running sums of the weights, most popular first, and where each popular row lies."""
    total = np.cumsum(np.arange(1, num_rows + 1, dtype=np.float64) ** -exponent)
    return total, np.random.default_rng(0).permutation(num_rows)


def even_offsets(num_bags: int, bag_length: int, device: torch.device) -> Tensor:
    """Return the offsets int64 [num_bags + 1] of bags of equal length."""
    return torch.arange(num_bags + 1, device=device) * bag_length


def varied_offsets(num_bags: int, longest: int, seed: int, device: torch.device) -> Tensor:
    """Return offsets int64 [num_bags + 1] of bags of 1 to `longest` ids, each length equally likely."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, num_bags)
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).to(device)


def weights(num_rows: int, dim: int, device: torch.device) -> Tensor:
    """Return float32 [num_rows, dim], small normal numbers."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(num_rows, dim, generator=generator, device=device) * 0.01


def filled_blocks(layout: RowLayout, num_rows: int, device: torch.device) -> RowBlocks:
    """Return a store of num_rows rows with `weights`, zero states and the row number as id."""
    blocks = RowBlocks(layout, device=device)
    blocks.grow(num_rows)
    values = weights(num_rows, layout.dim, device).to(layout.dtype)
    rows = torch.arange(num_rows, device=device)
    for part, part_values in zip(rows.split(_CHUNK_ROWS), values.split(_CHUNK_ROWS), strict=True):
        blocks.write(part, {"weight": part_values, "id": part})
    return blocks


def random_ids(count: int, generator: torch.Generator) -> Tensor:
    """Return ids int64 [count] over the whole range, on the generator's device."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=generator.device)


def filled_index(num_ids: int, device: torch.device, *, load: float) -> tuple[HashIndex, Tensor]:
    """Return an index of one segment, filled to about `load`, and its ids in ascending order; row k is the k-th id.

    The number of slots is a power of two: num_ids is cut to load times the slots that num_ids needs.
    """
    generator = torch.Generator(device).manual_seed(2)
    slots = 1 << max(4, (round(num_ids / load) - 1).bit_length())
    ids = random_ids(round(slots * load), generator).unique()
    index = HashIndex(device)
    segment = index.add_segment()
    index.reserve(segment, ids.numel())
    order = torch.randperm(ids.numel(), generator=generator, device=device)
    for part in order.split(1 << 20):
        index.insert(ids[part], segment, part)
    return index, ids
