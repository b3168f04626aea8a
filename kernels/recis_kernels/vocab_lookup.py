"""Look strings or ids up in fixed vocabularies: which entry equals each value, exactly.

A vocabulary is an open-addressing table of entry numbers, a power of two of slots at load <= 1/2, probed linearly from
FarmHash (strings) or hash64 (ids). Equal hashes are settled by comparing bytes, so no string is ever taken for another.
Columns of a call bring a vocabulary each. Cost: a hash, about one random read, and a comparison per value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash import farm_one
from recis_kernels.columns import check_columns, run_columns
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged import check_offsets_form
from recis_kernels.philox import hash64_one

_MAX_ENTRIES = 1 << 30


@dataclass(frozen=True, slots=True)
class StringVocab:
    """Entry e is the bytes data[offsets[e]:offsets[e + 1]]; slots hold entry numbers, -1 = free."""

    data: Tensor
    offsets: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class IdVocab:
    """Entry e is ids[e]; slots hold entry numbers, -1 = free."""

    ids: Tensor
    slots: Tensor


def string_vocab(data: Tensor, offsets: Tensor) -> StringVocab:
    """Return the vocabulary of the strings data[offsets[e]:offsets[e + 1]], numbered in order.

    Raises:
        ValueError: an entry stands twice; the text gives both numbers.
    """
    check_offsets_form(offsets)
    offsets = offsets.to(torch.int64)
    data = data.contiguous()
    slots = _free_slots(offsets.numel() - 1)
    _raise_on_twin(*_insert_strings(data.data_ptr(), data.numpy(), offsets.numpy(), slots.numpy()))
    return StringVocab(data, offsets, slots)


def id_vocab(ids: Tensor) -> IdVocab:
    """Return the vocabulary of int64 ids [E], numbered in order.

    Raises:
        ValueError: an id stands twice; the text gives both numbers.
    """
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
        ValueError: data is not uint8 [bytes], or columns and vocabularies do not fit together.
    """
    if data.ndim != 1 or data.dtype != torch.uint8:
        raise ValueError(f"data must be uint8 [bytes]; got {tuple(data.shape)} {data.dtype}")
    check_offsets_form(offsets)
    check_columns(offsets.numel() - 1, column_offsets, len(vocabs))
    version = choose(impl, data, numba=_strings_numba, reference=_strings_reference)
    return version(data, offsets, column_offsets, vocabs)


def lookup_ids(ids: Tensor, column_offsets: Sequence[int], vocabs: Sequence[IdVocab], *, impl: Impl = "auto") -> Tensor:
    """Return per id the number of the equal entry of its column's vocabulary, int64 [L]; -1 = none.

    Raises:
        ValueError: ids is not int64 [L], or columns and vocabularies do not fit together.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")
    check_columns(ids.shape[0], column_offsets, len(vocabs))
    return choose(impl, ids, numba=_ids_numba, reference=_ids_reference)(ids, column_offsets, vocabs)


def _free_slots(num_entries: int) -> Tensor:
    if num_entries > _MAX_ENTRIES:
        raise ValueError(f"a vocabulary holds at most {_MAX_ENTRIES} entries; got {num_entries}")
    return torch.full((1 << (2 * num_entries).bit_length(),), -1, dtype=torch.int32)


def _raise_on_twin(first: int, second: int) -> None:
    if first >= 0:
        raise ValueError(f"entries {first} and {second} of the vocabulary are equal; each may stand once")


def _strings(data: Tensor, offsets: Tensor) -> list[bytes]:
    joined, ends = data.cpu().numpy().tobytes(), offsets.tolist()
    return [joined[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]


def _strings_reference(data, offsets, column_offsets, vocabs) -> Tensor:
    entries = [{text: e for e, text in enumerate(_strings(vocab.data, vocab.offsets))} for vocab in vocabs]
    return _reference(_strings(data, offsets), column_offsets, entries, data.device)


def _ids_reference(ids, column_offsets, vocabs) -> Tensor:
    entries = [{key: e for e, key in enumerate(vocab.ids.tolist())} for vocab in vocabs]
    return _reference(ids.tolist(), column_offsets, entries, ids.device)


def _reference(values: list, column_offsets: Sequence[int], entries: list[dict], device: torch.device) -> Tensor:
    found = []
    for column, known in enumerate(entries):
        found += [known.get(value, -1) for value in values[column_offsets[column] : column_offsets[column + 1]]]
    return torch.tensor(found, dtype=torch.int64, device=device)


def _strings_numba(data, offsets, column_offsets, vocabs) -> Tensor:
    out = torch.empty(offsets.numel() - 1, dtype=torch.int64)
    data = data.contiguous()
    source, base, ends, target = data.numpy(), data.data_ptr(), offsets.numpy(), out.numpy()
    tables = [(vocab.data.numpy(), vocab.offsets.numpy(), vocab.slots.numpy()) for vocab in vocabs]
    run_columns(
        lambda column, start, stop: _find_strings(base, source, ends, *tables[column], target, start, stop),
        out.numel(),
        column_offsets,
        min_items=2048,
    )
    return out


def _ids_numba(ids, column_offsets, vocabs) -> Tensor:
    out = torch.empty(ids.shape[0], dtype=torch.int64)
    source, target = ids.contiguous().numpy(), out.numpy()
    tables = [(vocab.ids.numpy(), vocab.slots.numpy()) for vocab in vocabs]
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
