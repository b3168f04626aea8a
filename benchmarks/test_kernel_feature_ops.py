"""Speed of the feature ops over ids: bucketize, modulo, hashes, multi-hash, crosses, distinct ids, cuts, vocabularies.

    make bench, or: pytest benchmarks/test_kernel_feature_ops.py --benchmark-json=out.json

Peers are what torch and numpy have. RecIS's CPU core is not installable; its recorded times (bucketize of 10 M values by
100 boundaries 259 ms, modulo of 10 M ids 49 ms, another machine of the same class) are quoted in `recorded_elsewhere`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch

from recis.bench.harness import at_threads, compare
from recis_kernels.bucketize import Boundaries, bucketize
from recis_kernels.feature_cross import feature_cross
from recis_kernels.id_hash import KINDS, hash_ids, hash_strings
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.multi_hash import linear_hashes, multi_hash
from recis_kernels.ragged_distinct import ragged_distinct
from recis_kernels.ragged_truncate import ragged_truncate, take_runs
from recis_kernels.vocab_lookup import id_vocab, lookup_ids, lookup_strings, string_vocab

RECIS_BUCKETIZE_S, RECIS_MOD_S = 0.259, 0.049  # of 10 M values
SIZES = [10_000, 1_000_000, 10_000_000]
NUM_ROWS = 20_000  # of the ops over rows; 20 ids each on average


def ids_of(count: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))


def rows_of(num_rows: int, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [L] below num_ids and offsets of rows of 0 to 40 ids."""
    generator = torch.Generator().manual_seed(1)
    offsets = lengths_to_offsets(torch.randint(0, 41, (num_rows,), generator=generator))
    return torch.randint(0, num_ids, (int(offsets[-1]),), generator=generator), offsets


def strings_of(count: int) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
    """Return bytes, offsets and list of strings of 6 to 40 bytes."""
    texts = [f"user_{number * 2654435761}".encode() * (1 + number % 3) for number in range(count)]
    lengths = torch.tensor([len(text) for text in texts])
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), lengths_to_offsets(lengths), texts


def run(benchmark, case: str, impls: Mapping[str, Callable[[], object]], count: int, bytes_moved: int, **more) -> None:
    impls = {**impls, "numba, 1 thread": at_threads(1, impls["numba"])}
    compare(benchmark, case=case, ours="numba", impls=impls, items=count, bytes_moved=bytes_moved, **more)


@pytest.mark.parametrize("count", SIZES)
def test_bucketize(benchmark, count):
    numbers = np.linspace(-3, 3, 100, dtype=np.float32)
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    boundaries, table = [Boundaries(numbers.tolist())], torch.from_numpy(numbers)
    impls: dict[str, Callable[[], object]] = {
        "numba": partial(bucketize, values, (0, count), boundaries),
        "torch.bucketize": partial(torch.bucketize, values, table, right=True),
        "numpy.searchsorted": lambda: np.searchsorted(numbers, values.numpy(), side="right"),
    }
    want = torch.bucketize(values, table, right=True)
    assert torch.equal(bucketize(values, (0, count), boundaries), want)
    run(
        benchmark,
        f"bucketize {count} by 100",
        impls,
        count,
        12 * count,
        targets={"items_per_s": 3 * 1e7 / RECIS_BUCKETIZE_S} if count == SIZES[-1] else {},
        extra={"recorded_elsewhere": {"RecIS 1.0 CPU core, items_per_s": 1e7 / RECIS_BUCKETIZE_S}},
    )


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("modulus", [1000, 1 << 20])
def test_mod(benchmark, modulus, count):
    ids = ids_of(count)
    impls: dict[str, Callable[[], object]] = {
        "numba": partial(id_mod, ids, (0, count), [modulus]),
        "numpy": lambda: ids.numpy().view(np.uint64) % np.uint64(modulus),
        "torch.remainder (signed)": partial(torch.remainder, ids, modulus),
    }
    want = (ids.numpy().view(np.uint64) % np.uint64(modulus)).astype(np.int64)
    assert np.array_equal(id_mod(ids, (0, count), [modulus]).numpy(), want)
    recorded = {"recorded_elsewhere": {"RecIS 1.0 CPU core, items_per_s": 1e7 / RECIS_MOD_S}}
    run(benchmark, f"mod {modulus} of {count}", impls, count, 16 * count, extra=recorded)


@pytest.mark.parametrize("count", SIZES[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_hash(benchmark, kind, count):
    data, offsets, texts = strings_of(min(count, 200_000))
    size = len(texts)
    part = 1000
    got = hash_strings(data, offsets, (0, size), [kind], [None])[:part]
    assert torch.equal(got, hash_strings(data, offsets[: part + 1], (0, part), [kind], [None], impl="reference"))
    strings: dict[str, Callable[[], object]] = {
        "numba": partial(hash_strings, data, offsets, (0, size), [kind], [None]),
        "Python's hash": lambda: [hash(text) for text in map(bytes, texts)],
    }
    run(benchmark, f"hash {kind} of {size} strings", strings, size, data.numel() + 16 * size)


@pytest.mark.parametrize("count", SIZES[:2])
@pytest.mark.parametrize("op", ["farm", "murmur", "multi_hash"])
def test_hash_of_ids(benchmark, op, count):
    ids, columns = ids_of(count), (0, count)
    hashes = [linear_hashes([1000] * 4)]
    ours = (
        partial(multi_hash, ids, columns, hashes) if op == "multi_hash" else partial(hash_ids, ids, columns, [op], [0])
    )
    few = ids[:1000]
    if op == "multi_hash":
        assert torch.equal(ours()[0][:, :1000], multi_hash(few, (0, 1000), hashes, impl="reference")[0])
    else:
        assert torch.equal(torch.as_tensor(ours())[:1000], hash_ids(few, (0, 1000), [op], [0], impl="reference"))
    run(benchmark, f"{op} of {count} ids", {"numba": ours}, count, (40 if op == "multi_hash" else 16) * count)


def test_rows(benchmark):
    """Distinct ids of every row; peer: torch.unique of (row, id), which sorts and loses the order."""
    ids, offsets = rows_of(NUM_ROWS, 30)
    rows = torch.repeat_interleave(offsets.diff())
    got, ends = ragged_distinct(ids, offsets, (0, NUM_ROWS), ["first"])
    peer = partial(torch.unique, rows * 30 + ids)
    assert torch.equal((rows * 30 + ids)[got].sort().values, peer())
    assert int(ends[-1]) == got.numel()
    ours = partial(ragged_distinct, ids, offsets, (0, NUM_ROWS), ["first"])
    run(
        benchmark,
        f"distinct ids of {NUM_ROWS} rows",
        {"numba": ours, "torch.unique": peer},
        ids.numel(),
        16 * ids.numel(),
    )


def test_cross(benchmark):
    a, a_offsets = rows_of(NUM_ROWS, 8)
    b, b_offsets = rows_of(NUM_ROWS, 8)
    few = slice(0, int(a_offsets[50]))
    part = a[few], a_offsets[:51], b[: int(b_offsets[50])], b_offsets[:51], (0, 50), [1000]
    crossed = feature_cross(a, a_offsets, b, b_offsets, (0, NUM_ROWS), [1000])
    want = feature_cross(*part, impl="reference").values
    assert torch.equal(crossed.values[: want.numel()], want)
    ours = partial(feature_cross, a, a_offsets, b, b_offsets, (0, NUM_ROWS), [1000])
    run(benchmark, f"cross of {NUM_ROWS} rows", {"numba": ours}, crossed.values.numel(), 8 * crossed.values.numel())


def test_truncate(benchmark):
    """Cut rows to their last 10 ids; peer: the same by a mask."""
    ids, offsets = rows_of(NUM_ROWS, 1 << 40)

    def ours() -> torch.Tensor:
        cut = ragged_truncate(offsets, (0, NUM_ROWS), [10], ["left"])
        return take_runs(ids, cut.starts, cut.lengths, int(cut.lengths.sum()))

    def by_mask() -> torch.Tensor:
        ends = offsets[1:].repeat_interleave(offsets.diff(), output_size=ids.numel())
        return ids[torch.arange(ids.numel()) >= ends - 10]

    assert torch.equal(ours(), by_mask())
    run(benchmark, f"truncate {NUM_ROWS} rows", {"numba": ours, "torch mask": by_mask}, ids.numel(), 16 * ids.numel())


@pytest.mark.parametrize("what", ["strings", "ids"])
def test_vocabulary(benchmark, what):
    size = 100_000
    if what == "strings":
        data, offsets, texts = strings_of(size)
        known = {text: number for number, text in enumerate(texts)}
        ours = partial(lookup_strings, data, offsets, (0, size), [string_vocab(data, offsets)])
        impls = {"numba": ours, "Python's dict": lambda: [known[text] for text in texts]}
    else:
        ids = ids_of(size).unique()
        size = ids.numel()
        ours = partial(lookup_ids, ids, (0, size), [id_vocab(ids)])
        impls = {"numba": ours, "torch.searchsorted": partial(torch.searchsorted, ids, ids)}
    assert torch.equal(ours(), torch.arange(size))
    run(benchmark, f"vocabulary of {size} {what}", impls, size, 16 * size)
