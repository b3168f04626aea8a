"""FarmHash and MurmurHash: published values at every length branch, numba against Python ints, buckets, columns."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.id_hash import HashKind, hash_ids, hash_strings
from recis_kernels.philox import murmur64a

IMPLS: list[Impl] = ["numba", "reference"]
KINDS: list[HashKind] = ["farm", "murmur"]
FARM_LONG = {  # FarmHash 1.1's C++ (pyfarmhash 0.5.1) on _text(n)
    16: -8987246039042272059,
    17: -7354860167802194440,
    32: -3046106903570496733,
    33: -5185216656428223796,
    64: -6450833346886370222,
    65: -7034871335152049808,
    127: -7109155291568638137,
    128: 8750054398560823225,
    129: 7635460496707031550,
    200: -5378531133547080687,
    1000: -7994623782243308688,
}


def _text(size: int) -> bytes:
    return bytes(33 + (i * 7 + size) % 90 for i in range(size))


def _hash(
    texts: list[bytes], kind: HashKind = "farm", num_buckets: int | None = None, impl: Impl = "auto"
) -> list[int]:
    data = torch.tensor(list(b"".join(texts)), dtype=torch.uint8)
    offsets = torch.tensor([0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()])
    return hash_strings(data, offsets, (0, len(texts)), [kind], [num_buckets], impl=impl).tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_conformance_values(impl):
    rows = [bytes([0, 1, 2]), bytes([1, 2, 3]), bytes([0, 5, 5]), bytes([5, 6, 7])]
    assert _hash(rows, impl=impl) == [  # A1
        -7736835464683084646,
        -5546720800891377920,
        -4442022684725028445,
        -909183002746659612,
    ]
    assert _hash(rows, "murmur", impl=impl) == [  # A2
        -4003751876240412087,
        -1042754718167355375,
        -5541886947548579749,
        4434088491466393040,
    ]
    words = [b"abc", b"hello", b"user_1", b"12345678", b""]
    assert _hash(words, impl=impl) == [  # A3
        2640714258260161385,
        -5436999610281751320,
        1009713755322965798,
        3430003927990384362,
        -7286425919675154353,
    ]
    assert _hash(words, "murmur", impl=impl) == [  # A4
        -7148968302806999301,
        2191231550387646743,
        4655867453049496070,
        8471103573108904450,
        0,
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_buckets(impl):  # A5
    hello = [_hash([b"hello"], "farm", n, impl)[0] for n in (None, 0, 1000)]
    assert hello == [-5436999610281751320, 3786372426573024488, 296]
    assert [_hash([b"abc"], "murmur", n, impl)[0] for n in (0, 1000)] == [2074403734047776507, 315]


@pytest.mark.parametrize("impl", IMPLS)
def test_farm_of_long_strings(impl):
    assert dict(zip(FARM_LONG, _hash([_text(size) for size in FARM_LONG], impl=impl), strict=True)) == FARM_LONG


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_matches_the_reference(kind):
    torch.manual_seed(2)
    texts = [bytes(torch.randint(0, 256, (size,)).tolist()) for size in range(200)]
    hashes = _hash(texts, kind, impl="numba")
    assert hashes == _hash(texts, kind, impl="reference")
    if kind == "murmur":
        assert [bits % 2**64 for bits in hashes] == [murmur64a(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_buckets", [None, 0, 1, 7, 1 << 40, (1 << 63) - 1])
def test_ids_hash_as_eight_bytes(kind, num_buckets):
    ids = torch.cat([torch.tensor([0, 1, -1, -(2**63), 2**63 - 1]), torch.randint(-(2**62), 2**62, (40,))])
    texts = [value.to_bytes(8, "little", signed=True) for value in ids.tolist()]
    want = _hash(texts, kind, num_buckets, "reference")
    for impl in IMPLS:
        assert hash_ids(ids, (0, ids.numel()), [kind], [num_buckets], impl=impl).tolist() == want


def test_many_columns_in_one_call_and_on_many_threads():
    torch.manual_seed(3)
    columns = (0, 0, 9000, 9001, 30000)
    kinds, buckets = KINDS * 2, [5, None, 0, 1000]
    lengths = torch.randint(0, 20, (30000,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    data = torch.randint(0, 256, (int(offsets[-1]),), dtype=torch.uint8)
    ids = torch.randint(-(2**62), 2**62, (30000,))
    strings = hash_strings(data, offsets, columns, kinds, buckets)
    numbers = hash_ids(ids, columns, kinds, buckets)
    for column in range(4):
        start, stop = columns[column], columns[column + 1]
        part = offsets[start : stop + 1]
        one = hash_strings(
            data[part[0] : part[-1]], part - part[0], (0, stop - start), [kinds[column]], [buckets[column]]
        )
        assert torch.equal(strings[start:stop], one)
        one = hash_ids(ids[start:stop], (0, stop - start), [kinds[column]], [buckets[column]])
        assert torch.equal(numbers[start:stop], one)


def test_int32_offsets_and_unaligned_slices():
    data = torch.tensor(list(b"xabchello"), dtype=torch.uint8)[1:]
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert hash_strings(data, offsets, (0, 2), ["farm"], [None]).tolist() == [2640714258260161385, -5436999610281751320]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kinds": ["sha"]}, "hash kind must be one of"),
        ({"num_buckets": [-1]}, r"in \[0, 2\*\*63\)"),
        ({"num_buckets": []}, "one parameter each"),
        ({"column_offsets": (0, 2)}, "from 0 to 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change, text):
    arguments = {"column_offsets": (0, 1), "kinds": ["farm"], "num_buckets": [None]} | change
    with pytest.raises(ValueError, match=text):
        hash_ids(torch.tensor([1]), **arguments)
    with pytest.raises(ValueError, match=text):
        hash_strings(torch.tensor([1], dtype=torch.uint8), torch.tensor([0, 1]), **arguments)


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        hash_strings(torch.tensor([1]), torch.tensor([0, 1]), (0, 1), ["farm"], [None])
    with pytest.raises(ValueError, match="int64"):
        hash_ids(torch.tensor([1.0]), (0, 1), ["farm"], [None])
