"""Jobs over values that no table holds: sums and padding of bags, and feature ops over many columns in one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from recis.bench.inputs import random_ids, weights
from recis.bench.op_cases import CHECKED, TOLERANCE, Point, Work, offsets_of
from recis_kernels.bucketize import Boundaries, bucketize
from recis_kernels.dispatch import Impl
from recis_kernels.id_hash import HashKind, hash_ids
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import jagged_to_padded
from recis_kernels.segment import segment_sum

FEATURE_OPS = ("bucketize", "id_mod", "hash_ids")


def sum_bags(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Sum the rows of each bag of a jagged tensor: every value in, every sum out."""
    offsets, num_values = offsets_of(point, device)
    parts = [weights(num_values, point.dim, device).to(point.dtype) * (n + 1) for n in range(point.num_inputs)]

    def check() -> None:
        got, want = (segment_sum(parts[0], offsets, impl=way).float() for way in (impl, "torch"))
        torch.testing.assert_close(got, want, rtol=TOLERANCE[point.dtype], atol=TOLERANCE[point.dtype])

    return Work(
        op="segment_sum",
        case=f"segment_sum {point.words}",
        run=lambda n: segment_sum(parts[n % len(parts)], offsets, impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=(num_values + point.num_bags) * point.dim * point.dtype.itemsize,
        items=num_values,
        peers={"torch.segment_reduce": lambda n: torch.segment_reduce(parts[n % len(parts)], "sum", offsets=offsets)},
    )


def padded(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Jagged to padded rows: every value in and out, and the padding out."""
    offsets, num_values = offsets_of(point, device)
    longest = int(offsets.diff().max())
    parts = [weights(num_values, point.dim, device).to(point.dtype) * (n + 1) for n in range(point.num_inputs)]

    def check() -> None:
        got, want = (jagged_to_padded(parts[0], offsets, longest, impl=way) for way in (impl, "torch"))
        assert got.equal(want)

    return Work(
        op="padded",
        case=f"jagged_to_padded {point.words}",
        run=lambda n: jagged_to_padded(parts[n % len(parts)], offsets, longest, impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=(num_values + point.num_bags * longest) * point.dim * point.dtype.itemsize,
        items=num_values,
    )


def features(
    point: Point, device: torch.device, impl: Impl = "auto", *, op: str = "hash_ids", num_columns: int = 100
) -> Work:
    """One feature op over many columns in one call: 8 B in (bucketize 4), 8 B out per value."""
    num_values = point.num_bags * point.bag_length
    column_offsets = [num_values * c // num_columns for c in range(num_columns + 1)]
    generator = torch.Generator(device).manual_seed(5)
    farm: list[HashKind] = ["farm"] * num_columns
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "bucketize": lambda x: bucketize(x, column_offsets, [grid] * num_columns, impl=impl),
        "id_mod": lambda x: id_mod(x, column_offsets, [1000 + c for c in range(num_columns)], impl=impl),
        "hash_ids": lambda x: hash_ids(x, column_offsets, farm, [10_007] * num_columns, impl=impl),
    }
    grid = Boundaries([k / 100 for k in range(-100, 100, 2)])
    if op == "bucketize":
        values = [torch.randn(num_values, generator=generator, device=device) for _ in range(point.num_inputs)]
    else:
        values = [random_ids(num_values, generator) for _ in range(point.num_inputs)]

    def check() -> None:
        few = values[0][: column_offsets[1]][:CHECKED].cpu()
        got = runs[op](values[0])[: few.numel()].cpu()
        one = [0, few.numel()]
        want = {
            "bucketize": lambda: bucketize(few, one, [grid], impl="reference"),
            "id_mod": lambda: id_mod(few, one, [1000], impl="reference"),
            "hash_ids": lambda: hash_ids(few, one, farm[:1], [10_007], impl="reference"),
        }[op]()
        assert got.equal(want)

    return Work(
        op=op,
        case=f"{op}, {num_columns} columns, {num_values:,} values",
        run=lambda n: runs[op](values[n % len(values)]),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_values * (values[0].element_size() + 8),
        items=num_values,
    )
