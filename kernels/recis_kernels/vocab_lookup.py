"""Look strings or ids up in fixed vocabularies: which entry equals each value, exactly.

A vocabulary is an open-addressing table of entry numbers, a power of two of slots at load <= 1/2, probed linearly from
FarmHash (strings) or hash64 (ids). Equal hashes are settled by comparing bytes, so no string is ever taken for another.
Columns of a call bring a vocabulary each. Cost: a hash, about one random read, and a comparison per value. Vocabularies are
built on the CPU; `to(device)` brings one to a GPU, where a table of addresses serves all columns in one launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash import farm_one
from recis_kernels.byte_hash_triton import bytes_word, farm_bytes, largest
from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    parameter_of_column,
    run_columns,
    values_of_program,
)
from recis_kernels.contents import check_offsets, check_range
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl
from recis_kernels.jagged import check_offsets_form
from recis_kernels.philox import hash64_one
from recis_kernels.philox_triton import hash64

_MAX_ENTRIES = 1 << 30


@dataclass(frozen=True, slots=True)
class StringVocab:
    """Entry e is the bytes data[offsets[e]:offsets[e + 1]]; slots hold entry numbers, -1 = free."""

    data: Tensor
    offsets: Tensor
    slots: Tensor

    def to(self, device: torch.device | str) -> "StringVocab":
        """Return the vocabulary on another device."""
        return StringVocab(self.data.to(device), self.offsets.to(device), self.slots.to(device))


@dataclass(frozen=True, slots=True)
class IdVocab:
    """Entry e is ids[e]; slots hold entry numbers, -1 = free."""

    ids: Tensor
    slots: Tensor

    def to(self, device: torch.device | str) -> "IdVocab":
        """Return the vocabulary on another device."""
        return IdVocab(self.ids.to(device), self.slots.to(device))


def string_vocab(data: Tensor, offsets: Tensor) -> StringVocab:
    """Return the vocabulary of the strings data[offsets[e]:offsets[e + 1]], numbered in order.

    Raises:
        ValueError: data is not uint8 [bytes], or an entry stands twice; the text gives both numbers.
    """
    _check_data(data)
    check_offsets_form(offsets)
    check_offsets(offsets, data.shape[0])
    offsets = offsets.to(torch.int64).contiguous()
    data = data.contiguous()
    slots = _free_slots(offsets.numel() - 1)
    _raise_on_twin(*_insert_strings(data.data_ptr(), data.numpy(), offsets.numpy(), slots.numpy()))
    return StringVocab(data, offsets, slots)


def id_vocab(ids: Tensor) -> IdVocab:
    """Return the vocabulary of int64 ids [E], numbered in order.

    Raises:
        ValueError: ids is not int64 [E], or an id stands twice; the text gives both numbers.
    """
    _check_ids(ids)
    ids = ids.contiguous()
    slots = _free_slots(ids.shape[0])
    _raise_on_twin(*_insert_ids(ids.numpy(), slots.numpy()))
    return IdVocab(ids, slots)


def lookup_strings(
    data: Tensor, offsets: Tensor, column_offsets: Sequence[int], vocabs: Sequence[StringVocab], *, impl: Impl = "auto"
) -> Tensor:
    """Return per string the number of the equal entry of its column's vocabulary, int64 [L]; -1 = none.

    Arguments as recis_kernels.id_hash.hash_strings.

    Raises:
        ValueError: data is not uint8 [bytes], a vocabulary lies on another device, or columns and vocabularies do not
            fit together.
    """
    _check_data(data)
    check_offsets_form(offsets)
    check_offsets(offsets, data.shape[0])
    check_columns(offsets.numel() - 1, column_offsets, len(vocabs))
    for column, vocab in enumerate(vocabs):
        _check_entries(column, data.device, vocab.slots, vocab.offsets.numel() - 1)
        check_offsets(vocab.offsets, vocab.data.shape[0], name=f"vocabs[{column}].offsets")
    run = _strings_op if torch.compiler.is_compiling() else _strings_run
    parts = [vocab.data for vocab in vocabs], [vocab.offsets for vocab in vocabs], [vocab.slots for vocab in vocabs]
    return run(data, offsets, column_offsets, *parts, impl)


def lookup_ids(ids: Tensor, column_offsets: Sequence[int], vocabs: Sequence[IdVocab], *, impl: Impl = "auto") -> Tensor:
    """Return per id the number of the equal entry of its column's vocabulary, int64 [L]; -1 = none.

    Raises:
        ValueError: ids is not int64 [L], a vocabulary lies on another device, or columns and vocabularies do not fit
            together.
    """
    _check_ids(ids)
    check_columns(ids.shape[0], column_offsets, len(vocabs))
    for column, vocab in enumerate(vocabs):
        _check_entries(column, ids.device, vocab.slots, vocab.ids.numel())
    run = _ids_op if torch.compiler.is_compiling() else _ids_run
    return run(ids, column_offsets, [vocab.ids for vocab in vocabs], [vocab.slots for vocab in vocabs], impl)


def _free_slots(num_entries: int) -> Tensor:
    if num_entries > _MAX_ENTRIES:
        raise ValueError(f"a vocabulary holds at most {_MAX_ENTRIES} entries; got {num_entries}")
    return torch.full((1 << (2 * num_entries).bit_length(),), -1, dtype=torch.int32)


def _raise_on_twin(first: int, second: int) -> None:
    if first >= 0:
        raise ValueError(f"entries {first} and {second} of the vocabulary are equal; each may stand once")


def _check_data(data: Tensor) -> None:
    if data.ndim != 1 or data.dtype != torch.uint8:
        raise ValueError(f"data must be uint8 [bytes]; got {tuple(data.shape)} {data.dtype}")


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")


def _check_entries(column: int, device: torch.device, slots: Tensor, num_entries: int) -> None:
    if slots.device != device:
        raise ValueError(
            f"values lie on {device} and vocabulary {column} on {slots.device}: bring it there once with .to()"
        )
    check_range(f"vocabs[{column}].slots", slots, -1, num_entries - 1)


# ---- nodes of torch.compile: per column the tensors of its vocabulary


def _strings_run(
    data: Tensor,
    offsets: Tensor,
    column_offsets: Sequence[int],
    entries: Sequence[Tensor],
    entry_offsets: Sequence[Tensor],
    slots: Sequence[Tensor],
    impl: str,
) -> Tensor:
    version = choose(impl, data, triton=_strings_triton, numba=_strings_numba, reference=_strings_reference)  # type: ignore[arg-type]
    return version(data, offsets, column_offsets, entries, entry_offsets, slots)


def _ids_run(
    ids: Tensor, column_offsets: Sequence[int], entries: Sequence[Tensor], slots: Sequence[Tensor], impl: str
) -> Tensor:
    version = choose(impl, ids, triton=_ids_triton, numba=_ids_numba, reference=_ids_reference)  # type: ignore[arg-type]
    return version(ids, column_offsets, entries, slots)


_strings_op = torch.library.custom_op("recis::lookup_strings", _strings_run, mutates_args=())
_ids_op = torch.library.custom_op("recis::lookup_ids", _ids_run, mutates_args=())


@_strings_op.register_fake
def _(data, offsets, column_offsets, entries, entry_offsets, slots, impl):
    return data.new_empty(offsets.shape[0] - 1, dtype=torch.int64)


@_ids_op.register_fake
def _(ids, column_offsets, entries, slots, impl):
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


def _strings(data: Tensor, offsets: Tensor) -> list[bytes]:
    joined, ends = data.cpu().numpy().tobytes(), offsets.tolist()
    return [joined[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]


def _strings_reference(data, offsets, column_offsets, entries, entry_offsets, slots) -> Tensor:
    tables = [_strings(one, ends) for one, ends in zip(entries, entry_offsets, strict=True)]
    known = [{text: e for e, text in enumerate(table)} for table in tables]
    return _reference(_strings(data, offsets), column_offsets, known, data.device)


def _ids_reference(ids, column_offsets, entries, slots) -> Tensor:
    known = [{key: e for e, key in enumerate(one.tolist())} for one in entries]
    return _reference(ids.tolist(), column_offsets, known, ids.device)


def _reference(values: list, column_offsets: Sequence[int], entries: list[dict], device: torch.device) -> Tensor:
    found = []
    for column, known in enumerate(entries):
        found += [known.get(value, -1) for value in values[column_offsets[column] : column_offsets[column + 1]]]
    return torch.tensor(found, dtype=torch.int64, device=device)


def _strings_numba(data, offsets, column_offsets, entries, entry_offsets, slots) -> Tensor:
    out = torch.empty(offsets.numel() - 1, dtype=torch.int64)
    data = data.contiguous()
    source, base, ends, target = data.numpy(), data.data_ptr(), offsets.numpy(), out.numpy()
    tables = [tuple(part.numpy() for part in parts) for parts in zip(entries, entry_offsets, slots, strict=True)]
    run_columns(
        lambda column, start, stop: _find_strings(base, source, ends, *tables[column], target, start, stop),
        out.numel(),
        column_offsets,
        min_items=2048,
    )
    return out


def _ids_numba(ids, column_offsets, entries, slots) -> Tensor:
    out = torch.empty(ids.shape[0], dtype=torch.int64)
    source, target = ids.contiguous().numpy(), out.numpy()
    tables = [(one.numpy(), table.numpy()) for one, table in zip(entries, slots, strict=True)]
    run_columns(
        lambda column, start, stop: _find_ids(source, *tables[column], target, start, stop),
        out.numel(),
        column_offsets,
        min_items=4096,
    )
    return out


@njit
def _same(a, a_first, b, b_first, size):
    i = 0
    while i < size and a[a_first + i] == b[b_first + i]:
        i += 1
    return i == size


@njit
def _slot_of_string(base, data, first, size, entries, entry_ends, slots):
    """Return the slot whose entry equals the string, or the free slot where the search ended."""
    mask = slots.size - 1
    slot = np.int64(farm_one(base + first, size) & np.uint64(mask))
    while slots[slot] >= 0:
        entry = slots[slot]
        start = entry_ends[entry]
        if entry_ends[entry + 1] - start == size and _same(data, first, entries, start, size):
            return slot
        slot = (slot + 1) & mask
    return slot


@njit
def _slot_of_id(value, ids, slots):
    mask = slots.size - 1
    slot = np.int64(hash64_one(value) & np.uint64(mask))
    while slots[slot] >= 0 and ids[slots[slot]] != value:
        slot = (slot + 1) & mask
    return slot


@njit
def _insert_strings(base, data, ends, slots):
    for entry in range(ends.size - 1):
        slot = _slot_of_string(base, data, ends[entry], ends[entry + 1] - ends[entry], data, ends, slots)
        if slots[slot] >= 0:
            return np.int64(slots[slot]), np.int64(entry)
        slots[slot] = entry
    return np.int64(-1), np.int64(-1)


@njit
def _insert_ids(ids, slots):
    for entry in range(ids.size):
        slot = _slot_of_id(ids[entry], ids, slots)
        if slots[slot] >= 0:
            return np.int64(slots[slot]), np.int64(entry)
        slots[slot] = entry
    return np.int64(-1), np.int64(-1)


@njit
def _find_strings(base, data, ends, entries, entry_ends, slots, target, start, stop):
    for i in range(start, stop):
        first = np.int64(ends[i])
        slot = _slot_of_string(base, data, first, np.int64(ends[i + 1]) - first, entries, entry_ends, slots)
        target[i] = slots[slot]


@njit
def _find_ids(source, ids, slots, target, start, stop):
    for i in range(start, stop):
        target[i] = slots[_slot_of_id(source[i], ids, slots)]


# ---- Triton

_STRINGS_PER_PROGRAM, _IDS_PER_PROGRAM = 128, 512


def _strings_triton(data, offsets, column_offsets, entries, entry_offsets, slots) -> Tensor:
    out = data.new_empty(offsets.numel() - 1, dtype=torch.int64)
    parts = [[part.data_ptr() for part in tensors] for tensors in (entries, entry_offsets, slots)]
    parameters = *parts, [table.numel() - 1 for table in slots]
    table, programs = block_table(column_offsets, parameters, _STRINGS_PER_PROGRAM, data.device)
    arguments = data.contiguous(), offsets.contiguous(), table, out, len(slots)
    launch(_lookup_strings_kernel, (programs,), *arguments, BLOCK=_STRINGS_PER_PROGRAM, num_warps=4)
    return out


def _ids_triton(ids, column_offsets, entries, slots) -> Tensor:
    out = torch.empty_like(ids, memory_format=torch.contiguous_format)
    parameters = (
        *([part.data_ptr() for part in tensors] for tensors in (entries, slots)),
        [s.numel() - 1 for s in slots],
    )
    table, programs = block_table(column_offsets, parameters, _IDS_PER_PROGRAM, ids.device)
    arguments = ids.contiguous(), table, out, len(slots)
    launch(_lookup_ids_kernel, (programs,), *arguments, BLOCK=_IDS_PER_PROGRAM, num_warps=4)
    return out


@jit
def _lookup_strings_kernel(data_ptr, offsets_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    first = tl.load(offsets_ptr + place, mask=mask, other=0).to(tl.int64)
    size = tl.load(offsets_ptr + place + 1, mask=mask, other=0).to(tl.int64) - first
    entries_ptr = parameter_of_column(table_ptr, column, num_columns, 0).to(tl.pointer_type(tl.uint8))
    ends_ptr = parameter_of_column(table_ptr, column, num_columns, 1).to(tl.pointer_type(tl.int64))
    slots_ptr = parameter_of_column(table_ptr, column, num_columns, 2).to(tl.pointer_type(tl.int32))
    last_slot = parameter_of_column(table_ptr, column, num_columns, 3)
    slot = (farm_bytes(data_ptr, first, size, mask) & last_slot.to(tl.uint64)).to(tl.int64)
    found = tl.full([BLOCK], -1, tl.int64)
    active = mask
    left = largest(active.to(tl.int32))
    step = last_slot * 0
    while (left > 0) & (step <= last_slot):  # a free slot ends each search: the table is at most half full
        entry = tl.load(slots_ptr + slot, mask=active, other=-1).to(tl.int64)
        active = active & (entry >= 0)
        start = tl.load(ends_ptr + entry, mask=active, other=0)
        equal = active & (tl.load(ends_ptr + entry + 1, mask=active, other=0) - start == size)
        at = step * 0
        longest = largest(tl.where(equal, size, 0))
        while at < longest:
            ours = bytes_word(data_ptr, first + at, size - at, equal)
            theirs = bytes_word(entries_ptr, start + at, size - at, equal)
            equal = equal & (ours == theirs)
            longest = largest(tl.where(equal, size, 0))
            at += 8
        found = tl.where(equal, entry, found)
        active = active & ~equal
        slot = (slot + 1) & last_slot
        left = largest(active.to(tl.int32))
        step += 1
    tl.store(out_ptr + place, found, mask=mask)


@jit
def _lookup_ids_kernel(ids_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    value = tl.load(ids_ptr + place, mask=mask, other=0)
    entries_ptr = parameter_of_column(table_ptr, column, num_columns, 0).to(tl.pointer_type(tl.int64))
    slots_ptr = parameter_of_column(table_ptr, column, num_columns, 1).to(tl.pointer_type(tl.int32))
    last_slot = parameter_of_column(table_ptr, column, num_columns, 2)
    slot = (hash64(value) & last_slot.to(tl.uint64)).to(tl.int64)
    found = tl.full([BLOCK], -1, tl.int64)
    active = mask
    left = largest(active.to(tl.int32))
    step = last_slot * 0
    while (left > 0) & (step <= last_slot):
        entry = tl.load(slots_ptr + slot, mask=active, other=-1).to(tl.int64)
        active = active & (entry >= 0)
        equal = active & (tl.load(entries_ptr + entry, mask=active, other=0) == value)
        found = tl.where(equal, entry, found)
        active = active & ~equal
        slot = (slot + 1) & last_slot
        left = largest(active.to(tl.int32))
        step += 1
    tl.store(out_ptr + place, found, mask=mask)
