"""Store table rows in blocks that never move: weight, optimizer state and metadata of an id side by side.

    row     = [dim weights | state vectors, float32 | id i64 | last_seen i32 | count i32 (| last_seen_s i32) | pad]
    address = pointers[row >> shift] + (row & (2**shift - 1)) * row_bytes

States start at a multiple of 4 bytes, the id at one of 8, a row at one of 32 (a sector), a block at one of 64 (a cache
line). Growth adds a block, so an address stays valid for the life of the store, and one update reads and writes one
contiguous piece of memory. Blocks are mapped lazily: spare rows cost no memory until they are written.
A bare row is weights alone: `RowBlocks.of_tensor` reads a contiguous [N, D] tensor as blocks, without a copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import uint16_at
from recis_kernels.columns import to_device
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.host_memory import zeroed_bytes
from recis_kernels.prefetch import prefetch, prefetch_write
from recis_kernels.row_blocks_triton import copy_field
from recis_kernels.threads import run_parts, split

ROW_ALIGNMENT = 32
BLOCK_BYTES = 32 << 20  # aim of the default block size; a block holds a power-of-two count of rows
_ONE_BLOCK = 31  # the largest shift: every row number below 2**31 lies in the first block
_AHEAD = 12  # rows ahead for which cache lines are asked for
_ITEM_BYTES = {torch.float32: 4, torch.bfloat16: 2}


def _round_up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the parts of one row lie, in bytes from its start.

    Args:
        dim: number of weights, at least 1.
        dtype: of the weights, torch.float32 or torch.bfloat16; optimizer state is always float32.
        state: (name, width) of each optimizer state vector, in order, such as (("m", 64), ("v", 64)).
        clock: keep `last_seen_s`, a clock reading in seconds, beside `last_seen` (time-based eviction needs it).
        bare: weights alone, row behind row as in a contiguous [N, dim] tensor: for reading, see RowBlocks.of_tensor.
    """

    dim: int
    dtype: torch.dtype = torch.float32
    state: tuple[tuple[str, int], ...] = ()
    clock: bool = False
    bare: bool = False

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1; got {self.dim}")
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"rows are torch.float32 or torch.bfloat16; got {self.dtype}; convert the weights first")
        names = [name for name, _ in self.state]
        if len(set(names)) != len(names):
            raise ValueError(f"state names must differ; got {names}")
        for name, width in self.state:
            if width < 1:
                raise ValueError(f"state {name!r} must be at least 1 wide; got {width}")
        if self.bare and (self.state or self.clock):
            raise ValueError(f"a bare row has weights alone; got state {names}, clock={self.clock}: leave bare=False")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, without padding."""
        return self.dim * _ITEM_BYTES[self.dtype]

    @property
    def state_start(self) -> int:
        """Offset of the first state vector; the vectors follow one another without gaps."""
        return _round_up(self.weight_bytes, 4)

    @property
    def state_width(self) -> int:
        """Floats of all state vectors together."""
        return sum(width for _, width in self.state)

    def state_offset(self, name: str) -> int:
        """Return the byte offset of one state vector; ValueError names the vectors there are."""
        offset = self.state_start
        for have, width in self.state:
            if have == name:
                return offset
            offset += 4 * width
        raise ValueError(f"no state {name!r} in this layout; it has {[have for have, _ in self.state]}")

    @property
    def id_offset(self) -> int:
        return _round_up(self.state_start + 4 * self.state_width, 8)

    @property
    def last_seen_offset(self) -> int:
        return self.id_offset + 8

    @property
    def count_offset(self) -> int:
        return self.id_offset + 12

    @property
    def clock_offset(self) -> int:
        """Offset of last_seen_s; -1 in a layout without a clock."""
        return self.id_offset + 16 if self.clock else -1

    @property
    def row_bytes(self) -> int:
        """Distance between two rows of a block."""
        if self.bare:
            return self.weight_bytes
        return _round_up(self.id_offset + (20 if self.clock else 16), ROW_ALIGNMENT)

    @property
    def key(self) -> str:
        """The layout as a line of text, what registered ops carry: `layout_of_key` reads it."""
        states = ",".join(f"{name}:{width}" for name, width in self.state)
        return f"{self.dim} {str(self.dtype).removeprefix('torch.')} {states} {int(self.clock)} {int(self.bare)}"

    def fields(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """Return {name: (byte offset, width, dtype)} of each part, in row order; width 0 = a scalar."""
        found = {"weight": (0, self.dim, self.dtype)}
        if self.bare:
            return found
        for name, width in self.state:
            found[f"state.{name}"] = (self.state_offset(name), width, torch.float32)
        found["id"] = (self.id_offset, 0, torch.int64)
        found["last_seen"] = (self.last_seen_offset, 0, torch.int32)
        found["count"] = (self.count_offset, 0, torch.int32)
        if self.clock:
            found["last_seen_s"] = (self.clock_offset, 0, torch.int32)
        return found


@cache
def layout_of_key(key: str) -> RowLayout:
    """Return the layout that `RowLayout.key` describes."""
    dim, dtype, states, clock, bare = key.split(" ")
    pairs = (state.rsplit(":", 1) for state in states.split(",") if state)
    widths = tuple((name, int(width)) for name, width in pairs)
    return RowLayout(int(dim), getattr(torch, dtype), widths, clock == "1", bare == "1")


class RowBlocks:
    """Rows 0 .. capacity - 1 of one layout; the caller decides which are in use.

    Attributes:
        layout, device: as given.
        layout_key: layout.key.
        shift: a block holds 2**shift rows.
        blocks: uint8 tensors [2**shift, row_bytes].
        pointers: int64 [num_blocks], CPU; the address of each block, what numba loops take.
        device_pointers: the same on `device`, what Triton kernels take; on the CPU the same tensor.
    """

    def __init__(self, layout: RowLayout, *, device: torch.device | str = "cpu", shift: int | None = None) -> None:
        if shift is None:
            shift = max(0, (BLOCK_BYTES // layout.row_bytes).bit_length() - 1)
        if not 0 <= shift <= 31:
            raise ValueError(f"shift must be 0..31 (a block holds 2**shift rows); got {shift}")
        self.layout = layout
        self.layout_key = layout.key
        self.device = torch.device(device)
        self.shift = shift
        self.blocks: list[Tensor] = []
        self._set_pointers()

    @classmethod
    def over(cls, layout: RowLayout, shift: int, blocks: Sequence[Tensor], device: torch.device) -> "RowBlocks":
        """Return row blocks over given block tensors, sharing their memory: what a registered op makes of its arguments.

        Addresses are taken from these tensors and nowhere else: torch.compile may hand an op copies of the blocks.
        """
        made = cls(layout, device=device, shift=shift)
        made.blocks = list(blocks)
        made._set_pointers()
        return made

    @classmethod
    def of_tensor(cls, rows: Tensor) -> "RowBlocks":
        """Return row blocks that read rows [N, D], float32 or bfloat16, contiguous, where they lie; none can be added.

        Raises:
            ValueError: rows have another shape or dtype, or are not contiguous.
        """
        if rows.ndim != 2 or not rows.is_contiguous():
            raise ValueError(f"rows must be [N, D], contiguous; got {tuple(rows.shape)}, strides {rows.stride()}")
        layout = RowLayout(rows.shape[1], rows.dtype, bare=True)
        return cls.over(layout, _ONE_BLOCK, [rows.detach().view(torch.uint8)], rows.device)

    def _set_pointers(self) -> None:
        self.pointers = torch.tensor([block.data_ptr() for block in self.blocks], dtype=torch.int64)
        # a new tensor each time: kernels under way may still read the old one, which its stream's allocator keeps
        self.device_pointers = to_device(self.pointers, self.device)

    def __reduce__(self) -> tuple:
        raise TypeError("RowBlocks hold addresses and cannot be copied or pickled; write() what read() gives elsewhere")

    @property
    def capacity(self) -> int:
        return self.blocks[0].shape[0] if self.layout.bare else len(self.blocks) << self.shift

    def grow(self, num_rows: int) -> None:
        """Add blocks until capacity >= num_rows; existing rows keep address and content, new rows are zero."""
        if self.layout.bare and num_rows > self.capacity:
            raise ValueError(f"rows of a tensor do not grow; it has {self.capacity}, got {num_rows}: make a new one")
        row_bytes = self.layout.row_bytes
        while self.capacity < num_rows:
            block = zeroed_bytes(row_bytes << self.shift, self.device)
            self.blocks.append(block.view(1 << self.shift, row_bytes))
        if len(self.blocks) != self.pointers.numel():
            self._set_pointers()

    def read(self, rows: Tensor, fields: tuple[str, ...] | None = None, *, impl: Impl = "auto") -> dict[str, Tensor]:
        """Return copies of the named fields (None = all) of rows [N]: weight [N, D], state.* [N, w], the others [N].

        Checks the rows, which is one host sync on a GPU.

        Raises:
            ValueError: a row outside [0, capacity), or a field this layout does not have.
        """
        known = self.layout.fields()
        names = tuple(known) if fields is None else fields
        for name in names:
            self._field(name, known)
        if torch.compiler.is_compiling():
            read = _read_op(self.blocks, self.layout_key, self.shift, rows, _SEPARATOR.join(names), impl)
            return dict(zip(names, read, strict=True))
        rows = self._checked(rows)
        out = _empty_fields(self.layout, names, rows.numel(), self.device)
        self._copy(rows, [(known[name][0], out[name]) for name in names], impl, to_rows=False)
        return out

    def write(self, rows: Tensor, fields: Mapping[str, Tensor], *, impl: Impl = "auto") -> None:
        """Set the given fields of rows [N] (distinct); shapes and dtypes as `read` returns them, checks as there.

        Raises:
            ValueError: a row outside [0, capacity), an unknown field, or a value of another shape or dtype.
        """
        known = self.layout.fields()
        if torch.compiler.is_compiling():
            names, values = _SEPARATOR.join(fields), [given.detach() for given in fields.values()]
            _write_op(self.blocks, self.layout_key, self.shift, rows, names, values, impl)
            return
        rows = self._checked(rows)
        for name, values in fields.items():
            _, width, dtype = self._field(name, known)
            shape = (rows.numel(), width) if width else (rows.numel(),)
            if tuple(values.shape) != shape or values.dtype != dtype:
                raise ValueError(
                    f"{name} must be {shape} {dtype}; got {tuple(values.shape)} {values.dtype}; convert it"
                )
        parts = [(known[name][0], values.detach().to(self.device).contiguous()) for name, values in fields.items()]
        self._copy(rows, parts, impl, to_rows=True)

    def _field(self, name: str, known: Mapping[str, tuple[int, int, torch.dtype]]) -> tuple[int, int, torch.dtype]:
        if name not in known:
            raise ValueError(f"rows have no field {name!r}; they have {list(known)}")
        return known[name]

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be [N] int64; got {tuple(rows.shape)} {rows.dtype}")
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < self.capacity):
            raise ValueError(
                f"rows must lie in [0, {self.capacity}); got {int(rows.min())}..{int(rows.max())}: grow the store first"
            )
        return rows.contiguous()

    def _copy(self, rows: Tensor, parts: Sequence[tuple[int, Tensor]], impl: Impl, *, to_rows: bool) -> None:
        cpu = {"numba": _copy_numba, "torch": _copy_blockwise, "reference": _copy_reference}
        version = choose(impl, self.device_pointers, triton=_copy_triton, **cpu)
        if rows.numel() and parts:
            version(self, rows, parts, to_rows=to_rows)


_SEPARATOR = "|"  # between names of fields where a registered op takes them as one text


def _empty_fields(layout: RowLayout, names: Sequence[str], num_rows: int, device: torch.device) -> dict[str, Tensor]:
    known = layout.fields()
    return {
        name: torch.empty(
            (num_rows, known[name][1]) if known[name][1] else (num_rows,), dtype=known[name][2], device=device
        )
        for name in names
    }


# ---- reading and writing as torch.compile and export see them: they take the block tensors themselves


@torch.library.custom_op("recis::read_rows", mutates_args=())
def _read_op(blocks: Sequence[Tensor], layout: str, shift: int, rows: Tensor, fields: str, impl: str) -> list[Tensor]:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    return list(store.read(rows, _names(fields), impl=impl).values())  # type: ignore[arg-type]


@_read_op.register_fake
def _(blocks, layout, shift, rows, fields, impl):
    return list(_empty_fields(layout_of_key(layout), _names(fields), rows.shape[0], rows.device).values())


@torch.library.custom_op("recis::write_rows", mutates_args=("blocks",))
def _write_op(
    blocks: Sequence[Tensor], layout: str, shift: int, rows: Tensor, fields: str, values: Sequence[Tensor], impl: str
) -> None:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    store.write(rows, dict(zip(_names(fields), values, strict=True)), impl=impl)  # type: ignore[arg-type]


def _names(fields: str) -> tuple[str, ...]:
    return tuple(fields.split(_SEPARATOR)) if fields else ()


def _copy_reference(store: RowBlocks, rows: Tensor, parts: Sequence[tuple[int, Tensor]], *, to_rows: bool) -> None:
    """Byte by byte of the fields of one row after another."""
    for n, row in enumerate(rows.tolist()):
        line = store.blocks[row >> store.shift][row % (1 << store.shift)]
        for offset, values in parts:
            data = values[n].reshape(-1).view(torch.uint8)
            field = line[offset : offset + data.numel()]
            (field if to_rows else data).copy_(data if to_rows else field)


def _copy_triton(store: RowBlocks, rows: Tensor, parts: Sequence[tuple[int, Tensor]], *, to_rows: bool) -> None:
    for offset, values in parts:
        row_bytes = store.layout.row_bytes
        copy_field(store.device_pointers, store.shift, row_bytes, offset, rows, values, to_rows=to_rows)


def _copy_numba(store: RowBlocks, rows: Tensor, parts: Sequence[tuple[int, Tensor]], *, to_rows: bool) -> None:
    """All fields of a row at one visit; a bfloat16 field is as good as any, because bytes are copied."""
    lines = [(offset, values[0].numel() * values.element_size(), values.data_ptr()) for offset, values in parts]
    fields, pointers, where = np.array(lines, np.int64), store.pointers.numpy(), rows.numpy()
    loop = _scatter_fields if to_rows else _gather_fields

    def run(start: int, stop: int) -> None:
        loop(pointers, store.shift, store.layout.row_bytes, where, fields, start, stop)

    run_parts(run, split(rows.numel()))


def _copy_blockwise(store: RowBlocks, rows: Tensor, parts: Sequence[tuple[int, Tensor]], *, to_rows: bool) -> None:
    """The plain form for any device: block after block, a host sync each."""
    block_of_row, within = rows >> store.shift, rows & ((1 << store.shift) - 1)
    for number, block in enumerate(store.blocks):
        picked = (block_of_row == number).nonzero().squeeze(1)
        for offset, values in parts:
            data = values.view(rows.numel(), -1).view(torch.uint8)
            part = block[:, offset : offset + data.shape[1]]
            if to_rows:
                part[within[picked]] = data[picked]
            else:
                data[picked] = part[within[picked]]


# Fields are copied as 16-bit words: every field is a whole count of them, and the compiler widens the inner loops to vectors.
# A line of `fields` is (offset in a row, bytes, address of the values).


@njit
def _gather_fields(pointers, shift, row_bytes, rows, fields, start, stop):
    mask, last = (1 << shift) - 1, rows.size - 1
    for n in range(start, stop):
        ahead = rows[min(n + _AHEAD, last)]
        soon = pointers[ahead >> shift] + (ahead & mask) * row_bytes
        base = pointers[rows[n] >> shift] + (rows[n] & mask) * row_bytes
        for f in range(fields.shape[0]):
            offset, num_bytes = fields[f, 0], fields[f, 1]
            for line in range(offset, offset + num_bytes, 64):
                prefetch(soon + line)
            source = uint16_at(base + offset, num_bytes // 2)
            target = uint16_at(fields[f, 2] + n * num_bytes, num_bytes // 2)
            for k in range(num_bytes // 2):
                target[k] = source[k]


@njit
def _scatter_fields(pointers, shift, row_bytes, rows, fields, start, stop):
    mask, last = (1 << shift) - 1, rows.size - 1
    for n in range(start, stop):
        ahead = rows[min(n + _AHEAD, last)]
        soon = pointers[ahead >> shift] + (ahead & mask) * row_bytes
        base = pointers[rows[n] >> shift] + (rows[n] & mask) * row_bytes
        for f in range(fields.shape[0]):
            offset, num_bytes = fields[f, 0], fields[f, 1]
            for line in range(offset, offset + num_bytes, 64):
                prefetch_write(soon + line)
            source = uint16_at(fields[f, 2] + n * num_bytes, num_bytes // 2)
            target = uint16_at(base + offset, num_bytes // 2)
            for k in range(num_bytes // 2):
                target[k] = source[k]
