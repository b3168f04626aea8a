"""The jobs that kernels are measured on: inputs, the call, what it must give, and the least bytes it must move.

    work = pooled(Point(dim=64, dtype=torch.bfloat16), device, impl="auto");  work.check();  work.run(0)

A job has several inputs, used in turn, so that no call finds the rows of the one before in cache. Least bytes follow
section 1 of the project's performance page: 8 per id, each row read once per position of a gather, each distinct row read
and written once by an update with its own states, each output written once. Where ids repeat, rows come from cache, and
the share of the copy bandwidth can pass one. Nothing here imports more than torch, numpy and the kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recis.bench.inputs import (
    Distribution,
    draw_rows,
    even_offsets,
    filled_blocks,
    filled_index,
    random_ids,
    varied_offsets,
    weights,
)
from recis_kernels.dispatch import Impl
from recis_kernels.embedding_bag import embedding_bag, row_gather
from recis_kernels.hash_index import HashIndex, find
from recis_kernels.row_allocator import RowAllocator, find_or_insert_rows
from recis_kernels.row_blocks import RowLayout
from recis_kernels.row_rules import ADAM, ROW_WISE_ADAGRAD, SGD, UpdateRule, reference_update
from recis_kernels.sparse_update import PendingLookup, RowGrad, fused_update, fused_update_flags
from recis_kernels.unique_ids import unique_ids

LR, EPS = 0.01, 1e-8
CHECKED = 512  # outputs or rows that are compared where all would take too much memory
RULES: Mapping[str, tuple[UpdateRule, tuple[float, ...], tuple[str, ...]]] = {
    "sgd": (SGD, (LR, 0.0), ()),
    "row-wise adagrad": (ROW_WISE_ADAGRAD, (LR, 0.0, EPS), ("h",)),
    "adam": (ADAM, (LR, 0.9, 0.999, EPS, 0.0, 5.0), ("m", "v")),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # sums in another order; bf16 rounds once, at 2**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the grid that ops are measured on."""

    dim: int = 64
    dtype: torch.dtype = torch.float32
    distribution: Distribution = "uniform"
    bag_length: int = 20
    """Ids per bag, or, of `varied` bags, the longest."""
    varied: bool = False
    num_bags: int = 8192
    num_rows: int = 2_000_000
    num_inputs: int = 8
    load: float = 0.5
    """Of the hash index."""

    @property
    def words(self) -> str:
        """All of it but the index's load, for tables."""
        head, bags = self.label.rsplit(", ", 1)
        return f"{head}, {self.num_bags} {bags}, {self.num_rows:,} rows"

    @property
    def label(self) -> str:
        """What differs inside a grid, for charts."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.dtype, str(self.dtype))
        bags = f"1-{self.bag_length}" if self.varied else str(self.bag_length)
        return f"D={self.dim} {dtype}, {self.distribution}, bags of {bags}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A job: run(n) does it on input n modulo num_inputs.

    Attributes:
        check: raises AssertionError when what run gives is wrong; called once, before anything is timed.
        op: name of the op, by which `peers` finds other libraries.
        bytes_moved: least bytes of one run, the mean over the inputs; None for what arithmetic bounds.
        items: ids, keys, rows, values or tokens of one run.
        once: an input cannot be used a second time (insertion); no more than num_inputs runs are timed.
        peers: name -> the same job by another library.
    """

    case: str
    run: Callable[[int], object]
    check: Callable[[], None]
    num_inputs: int
    bytes_moved: int | None
    items: int
    op: str = ""
    once: bool = False
    peers: Mapping[str, Callable[[int], object]] = field(default_factory=dict)


def inputs_of(point: Point, device: torch.device) -> list[Tensor]:
    """Return the row numbers of each input, int64 [L]."""
    num_ids = offsets_of(point, device)[1]
    return [draw_rows(point.distribution, point.num_rows, num_ids, seed, device) for seed in range(point.num_inputs)]


def offsets_of(point: Point, device: torch.device) -> tuple[Tensor, int]:
    """Return the offsets of the bags, int64 [N + 1], and L."""
    if not point.varied:
        return even_offsets(point.num_bags, point.bag_length, device), point.num_bags * point.bag_length
    offsets = varied_offsets(point.num_bags, point.bag_length, 3, device)
    return offsets, int(offsets[-1])


def _layout(point: Point, states: tuple[str, ...]) -> RowLayout:
    return RowLayout(point.dim, dtype=point.dtype, state=tuple((s, 1 if s == "h" else point.dim) for s in states))


def find_hits(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Find ids that are there; one key is a sector of 32 B, its id and its row 8 each."""
    index, ids = filled_index(point.num_rows, device, load=point.load)
    num_ids = point.num_bags * point.bag_length
    rows = [draw_rows(point.distribution, ids.numel(), num_ids, seed, device) for seed in range(point.num_inputs)]
    batches = [ids[picked] for picked in rows]

    def check() -> None:
        assert find(index, batches[0], impl=impl).equal(rows[0])

    return Work(
        op="find",
        case=f"find {num_ids:,} {point.distribution} hits, load {point.load}, {int(index.table[0, 2]):,} slots",
        run=lambda n: find(index, batches[n % len(batches)], impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_ids * (32 + 16),
        items=num_ids,
    )


def insert_new(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Give rows to ids none of which is there; a key's sector is read and written, its id read, its row written."""
    num_ids = point.num_bags * point.bag_length
    generator = torch.Generator(device).manual_seed(4)
    total = num_ids * point.num_inputs
    ids = random_ids(total + total // 8, generator).unique()
    ids = ids[torch.randperm(ids.numel(), generator=generator, device=device)[:total]]
    batches = list(ids.split(num_ids))
    index, allocator = HashIndex(device), RowAllocator(total, device=device)
    index.add_segment()
    index.reserve(0, total)

    def run(n: int) -> object:
        ids = batches[n % len(batches)]
        return find_or_insert_rows(index, ids, 0, allocator, deterministic=False, impl=impl)

    def check() -> None:
        own, few = HashIndex(device), batches[-1][:CHECKED]
        own.add_segment()
        room = RowAllocator(few.numel(), device=device)
        rows, is_new = find_or_insert_rows(own, few, 0, room, deterministic=False, impl=impl)
        assert bool(is_new.all())
        assert find(own, few, impl=impl).equal(rows)
        assert rows.sort().values.equal(torch.arange(few.numel(), device=device))

    return Work(
        op="find_or_insert",
        case=f"find_or_insert {num_ids:,} new ids, up to load {total / int(index.table[0, 2]):.2f}",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_ids * (64 + 16),
        items=num_ids,
        once=True,
    )


def gather(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Read one row per id: 8 B of id, the row, and the float32 vector that comes out."""
    blocks, batches = filled_blocks(_layout(point, ()), point.num_rows, device), inputs_of(point, device)
    table = weights(point.num_rows, point.dim, device).to(point.dtype)

    def check() -> None:
        assert row_gather(blocks, batches[0], impl=impl).equal(table[batches[0]].float())

    num_ids, row_bytes = batches[0].numel(), point.dim * point.dtype.itemsize
    return Work(
        op="gather",
        case=f"gather {point.words}",
        run=lambda n: row_gather(blocks, batches[n % len(batches)], impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_ids * (8 + row_bytes + 4 * point.dim),
        items=num_ids,
        peers={"torch index_select": lambda n: table.index_select(0, batches[n % len(batches)])},
    )


def pooled(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Sum the rows of each bag: 8 B and the row per id, one float32 vector per bag."""
    blocks, batches = filled_blocks(_layout(point, ()), point.num_rows, device), inputs_of(point, device)
    offsets, num_ids = offsets_of(point, device)
    table = weights(point.num_rows, point.dim, device).to(point.dtype)

    def torch_bag(n: int) -> Tensor:
        batch = batches[n % len(batches)]
        return torch.nn.functional.embedding_bag(batch, table, offsets, mode="sum", include_last_offset=True)

    def check() -> None:
        few = min(CHECKED, point.num_bags)
        ids = batches[0][: int(offsets[few])]
        bag = torch.repeat_interleave(torch.arange(few, device=device), offsets[: few + 1].diff())
        want = torch.zeros(few, point.dim, dtype=torch.float64, device=device)
        want.index_add_(0, bag, table[ids].double())
        got = embedding_bag(blocks, batches[0], None, offsets, impl=impl)[:few]
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)

    return Work(
        op="pooled",
        case=f"pooled {point.words}",
        run=lambda n: embedding_bag(blocks, batches[n % len(batches)], None, offsets, impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_ids * (8 + point.dim * point.dtype.itemsize) + point.num_bags * 4 * point.dim,
        items=num_ids,
        peers={"torch embedding_bag": torch_bag},
    )


def update(
    point: Point,
    device: torch.device,
    impl: Impl = "auto",
    *,
    rule: str = "row-wise adagrad",
    deterministic: bool = False,
) -> Work:
    """Fused backward and update of pooled bags, distinct rows given: weight and states in and out, 8 B a position."""
    apply = fused_update if device.type == "cpu" else fused_update_flags  # the first waits for a GPU
    equation, numbers, states = RULES[rule]
    blocks = filled_blocks(_layout(point, states), point.num_rows, device)
    scalars = torch.tensor([numbers], dtype=torch.float64)
    keys = torch.tensor([11], dtype=torch.int64, device=device) if point.dtype == torch.bfloat16 else None
    offsets, num_ids = offsets_of(point, device)
    upstream = weights(point.num_bags, point.dim, device)
    distinct = [unique_ids(batch, impl=impl) for batch in inputs_of(point, device)]

    def lookup(n: int) -> PendingLookup:
        unique = distinct[n % len(distinct)]
        view = RowGrad(unique.inverse, offsets, point.num_bags, grad=upstream)
        return PendingLookup(unique.ids, unique.segments, unique.counts, [view])

    def run(n: int) -> object:
        more: dict[str, Any] = {"step": n + 1, "keys": keys, "deterministic": deterministic, "impl": impl}
        return apply(blocks, [lookup(n)], equation, scalars, **more)

    def check() -> None:
        unique = distinct[0]
        few = unique.ids[:CHECKED]
        bag = torch.repeat_interleave(torch.arange(point.num_bags, device=device), offsets.diff())
        used = unique.inverse.long() < few.numel()
        grads = torch.zeros(few.numel(), point.dim, dtype=torch.float64, device=device)
        grads.index_add_(0, unique.inverse[used].long(), upstream[bag[used]].double())
        old = blocks.read(few)
        state = {name: old[f"state.{name}"].cpu() for name in states}
        rows = old["weight"].float().cpu()
        want, _ = reference_update(equation, rows, state, grads.cpu(), scalars.expand(few.numel(), -1))
        run(0)
        tolerance = TOLERANCE[point.dtype]
        got = blocks.read(few, ("weight",))["weight"].cpu().double()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 0.1)

    num_distinct = sum(unique.ids.numel() for unique in distinct) // len(distinct)
    state_bytes = 4 * sum(1 if name == "h" else point.dim for name in states)
    row_bytes = 2 * (point.dim * point.dtype.itemsize + state_bytes)
    return Work(
        op=f"update {rule}",
        case=f"update {rule}{', deterministic' if deterministic else ''}, {point.words}",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_distinct * row_bytes + num_ids * 8 + point.num_bags * 4 * point.dim,
        items=num_distinct,
    )


def static_step(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """One step of a table whose row numbers are given: de-duplicate, pool, backward, row-wise Adagrad.

    Least bytes: those of the pooled forward, and weight and state of each distinct row in and out.
    """
    equation, numbers, states = RULES["row-wise adagrad"]
    blocks = filled_blocks(_layout(point, states), point.num_rows, device)
    scalars = torch.tensor([numbers], dtype=torch.float64)
    offsets, num_ids = offsets_of(point, device)
    upstream = weights(point.num_bags, point.dim, device)
    batches = inputs_of(point, device)
    apply = fused_update if device.type == "cpu" else fused_update_flags

    def run(n: int) -> Tensor:
        found = unique_ids(batches[n % len(batches)], impl=impl)
        out = embedding_bag(blocks, found.ids, found.inverse, offsets, impl=impl)
        view = RowGrad(found.inverse, offsets, point.num_bags, grad=upstream)
        lookup = PendingLookup(found.ids, found.segments, found.counts, [view])
        apply(blocks, [lookup], equation, scalars, step=n + 1, impl=impl)
        return out

    def check() -> None:
        table = weights(point.num_rows, point.dim, device)
        want = torch.nn.functional.embedding_bag(batches[0], table, offsets, mode="sum", include_last_offset=True)
        torch.testing.assert_close(run(0), want, rtol=1e-4, atol=1e-5)
        row = batches[0][:1]
        assert not blocks.read(row, ("weight",))["weight"].equal(table[row])

    num_distinct = sum(batch.unique().numel() for batch in batches) // len(batches)
    forward = num_ids * (8 + 4 * point.dim) + point.num_bags * 4 * point.dim
    return Work(
        op="step",
        case=f"step row-wise adagrad, {point.words}",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=forward + num_distinct * (8 * point.dim + 8) + point.num_bags * 4 * point.dim,
        items=num_ids,
    )


def unique(point: Point, device: torch.device, impl: Impl = "auto") -> Work:
    """Distinct ids of a batch: an id in, a number out for each position; the distinct ids and their counts out."""
    batches = [batch * 7919 for batch in inputs_of(point, device)]

    def check() -> None:
        got, want = unique_ids(batches[0], impl=impl), torch.unique(batches[0])
        assert got.ids.sort().values.equal(want)
        assert got.ids[got.inverse.long()].equal(batches[0])

    num_ids, num_distinct = batches[0].numel(), torch.unique(batches[0]).numel()
    return Work(
        op="unique_ids",
        case=f"unique_ids of {num_ids:,}, {point.distribution}",
        run=lambda n: unique_ids(batches[n % len(batches)], impl=impl),
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=num_ids * 12 + num_distinct * 12,
        items=num_ids,
        peers={"torch.unique": lambda n: torch.unique(batches[n % len(batches)], return_inverse=True)},
    )
